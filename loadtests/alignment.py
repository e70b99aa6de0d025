"""A detector whose normalisation follows each stream without labels (`adapter: alignment`), in bad weather, over HTTP.

Held-out scenes of the built-in detector under one shift after the other, each a stream of its own, one image a request.
After every 8 images the client waits until the server has learned from them, so that the figures are reproducible.
Every image is answered before it is learned from, by the adapting detector and by the frozen one; AP50 of both, and of
the first and the second half of the adapting one's answers.

    python loadtests/alignment.py [--scenes 200] [--json FILE] [--plot FILE]

It starts its own server. The shifts are of our making, and nothing was chosen by the scenes of seed 6.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import modality_scenes, plots, report
from loadtests.errors import RequestFailed, run
from loadtests.modality_client import Detected, Detector
from loadtests.modality_scenes import Scenes
from loadtests.server import own_server

SEED = 6
STEP_IMAGES = 8
ADAPTING, FROZEN = "adapting", "frozen"  # the models
MODELS: list[dict[str, Any]] = [
    {
        "name": ADAPTING,
        "source": {"builtin": "digit-scenes"},
        "adapter": "alignment",
        "adaptation": {"step_rows": STEP_IMAGES, "budget": 1.0},
    },
    {"name": FROZEN, "source": {"builtin": "digit-scenes"}, "adapter": "source"},
]

Picture = NDArray[np.uint8]  # [3, H, W]


def noise(image: Picture, generator: np.random.Generator) -> Picture:
    return _bytes(image / 255 + generator.normal(0, 0.3, image.shape))


def fog(image: Picture, _: np.random.Generator) -> Picture:
    """Thicker towards the top, where things are farther away."""
    left = np.linspace(0.1, 0.4, image.shape[1])[None, :, None]
    return _bytes(left * image / 255 + (1 - left) * 0.8)


def low_contrast(image: Picture, _: np.random.Generator) -> Picture:
    return _bytes(0.5 + 0.15 * (image / 255 - 0.5))


def dark(image: Picture, _: np.random.Generator) -> Picture:
    return _bytes(0.12 * image / 255)


def blur(image: Picture, _: np.random.Generator) -> Picture:
    blurred = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).filter(ImageFilter.GaussianBlur(2.2))
    return np.ascontiguousarray(np.asarray(blurred).transpose(2, 0, 1))


def clean(image: Picture, _: np.random.Generator) -> Picture:
    return image


SHIFTS: Mapping[str, Callable[[Picture, np.random.Generator], Picture]] = {
    each.__name__: each for each in (noise, fog, low_contrast, dark, blur, clean)
}


def look(client: Detector, images: Sequence[Picture], stream: str, *, adapts: bool) -> list[Detected]:
    """What is found in each image, in order; where it adapts, the server has learned from 8 before the next are sent.

    Raises:
        RequestFailed: it does not learn in time.
    """
    found = []
    for number, image in enumerate(images, start=1):
        found.append(client.detect(image, stream=stream, modality="rgb", adapt=adapts))
        if adapts and number % STEP_IMAGES == 0 and not client.drain(stream):
            raise RequestFailed(f"{client.model}: rows of {stream!r} still wait to be learned from")
    return found


def part(made: Scenes, found: Sequence[Detected], first: int, end: int) -> float:
    """AP50 of some of the scenes."""
    some = Scenes(made.rgb[first:end], made.infrared[first:end], made.truth[first:end])
    return modality_scenes.average_precision(some, found[first:end]).ap50


def measure(
    adapting: Detector, frozen: Detector, made: Scenes, seed: int, told: Callable[[str], object]
) -> dict[str, float]:
    """AP50 under each shift."""
    figures: dict[str, float] = {}
    half, count = len(made.rgb) // 2, len(made.rgb)
    for place, (name, shift) in enumerate(SHIFTS.items()):
        generator = np.random.default_rng([seed, place])
        images = [shift(image, generator) for image in made.rgb]
        learned = look(adapting, images, f"alignment-{name}", adapts=True)
        figures[f"ap50/{name}/frozen"] = part(made, look(frozen, images, "frozen", adapts=False), 0, count)
        figures[f"ap50/{name}/adapting"] = part(made, learned, 0, count)
        figures[f"ap50/{name}/adapting_first_half"] = part(made, learned, 0, half)
        figures[f"ap50/{name}/adapting_second_half"] = part(made, learned, half, count)
        told(f"{name}: frozen {figures[f'ap50/{name}/frozen']:.3f}, adapting {figures[f'ap50/{name}/adapting']:.3f}")
    return figures


def table_of(figures: Mapping[str, float]) -> Table:
    table = Table(title="AP50, answered before learning", box=box.SIMPLE_HEAD)
    table.add_column("shift")
    for column in ("frozen", "adapting", "first half", "second half"):
        table.add_column(column, justify="right")
    for name in SHIFTS:
        kinds = ("frozen", "adapting", "adapting_first_half", "adapting_second_half")
        table.add_row(name, *(f"{figures[f'ap50/{name}/{kind}']:.3f}" for kind in kinds))
    return table


def _bytes(image: NDArray[np.floating[Any]]) -> Picture:
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="of each shift (default: 200)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the scenes (default: {SEED})")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.scenes < 2 * STEP_IMAGES:
        parser.error(f"--scenes must be {2 * STEP_IMAGES} or more, not {args.scenes}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    return args


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    console = Console()
    made = modality_scenes.make(args.scenes, args.seed, held_out=True)
    with own_server(MODELS) as url, Detector(url, ADAPTING) as adapting, Detector(url, FROZEN) as frozen:
        figures = measure(adapting, frozen, made, args.seed, console.print)
    console.print(table_of(figures))
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "alignment", {"scenes": args.scenes, "seed": args.seed, **figures})
    if args.plot:
        kinds = ("frozen", "adapting")
        values = {kind: [figures[f"ap50/{name}/{kind}"] for name in SHIFTS] for kind in kinds}
        plots.draw(args.plot, [plots.Bars("AP50 of held-out scenes", "AP50", tuple(SHIFTS), values, numbers=True)])
    return 0


if __name__ == "__main__":
    run(main)
