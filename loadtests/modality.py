"""One frozen detector, two modalities: average precision, the router, and what a mix of both costs, over HTTP.

Held-out scenes of the built-in detector in colour (RGB) and in infrared (IR), one image a request:

- AP50 and AP: RGB; IR zero-shot; IR with its histogram equalised by the client; IR with the server's translator; and,
  where --fine-tuned names its weights, IR and RGB on the detector that was fine-tuned on IR. Nothing is learned.
- `rgb_identical`: the share of RGB answers that have the same bits as those of the detector without a translator; and
  (on a server of the script's own, since it teaches) the same bits after the translator was given feedback.
- `router_right`: the share of images sent without a modality that went to the right one. Photographs in grey are right
  where no translator got them.
- requests/s of RGB alone and of RGB and IR half and half, in alternating rounds (wrk, 16 connections), with the
  modality named and without.

    python loadtests/modality.py [--fine-tuned FILE] [--data DIR] [--json FILE] [--plot FILE]
    python loadtests/modality.py --url http://127.0.0.1:8000 --model digit-scenes [--only router]

Without --url it starts its own server with `scenes` (builtin/digit-scenes and its `ir` translator), `plain` (the same
without translators) and `fine-tuned`. `tta-serve train-translator --save-fine-tuned FILE` writes FILE. The scenes are
made of digits that neither the detector nor the translator has seen; nothing else uses seed 4.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import cifar, modality_load, modality_scenes, plots, report, wrk
from loadtests.errors import LoadTestError, MissingFile, RequestFailed, run
from loadtests.modality_client import Detected, Detector
from loadtests.modality_figures import (
    panels,
    precision_figures,
    precision_table,
    share_of,
    share_same,
    wanted_table,
)
from loadtests.modality_images import equalised, grey_cifar, photographs
from loadtests.modality_scenes import AP, Scenes
from loadtests.server import own_server

PARTS = ("ap", "router", "throughput")
SCENES, PLAIN, FINE_TUNED = "scenes", "plain", "fine-tuned"  # the models
SEED = 4
PAIRS_MIN = 5
FEEDBACKS = 8  # scenes that the translator is taught

Told = Callable[[str], object]


class Way(NamedTuple):
    """How scenes are shown to which model."""

    model: str
    images: Callable[[Scenes], Sequence[NDArray[np.uint8]]]
    modality: str  # named; `rgb`: no translator


SHOWN: Mapping[str, Way] = {
    "rgb/frozen": Way(SCENES, lambda made: made.rgb, "rgb"),
    "ir/zero_shot": Way(SCENES, lambda made: made.infrared, "rgb"),
    "ir/equalised": Way(SCENES, lambda made: [equalised(image) for image in made.infrared], "rgb"),
    "ir/modtr": Way(SCENES, lambda made: made.infrared, "ir"),
    "ir/fine_tuned": Way(FINE_TUNED, lambda made: made.infrared, "rgb"),
    "rgb/fine_tuned": Way(FINE_TUNED, lambda made: made.rgb, "rgb"),
}


def look(
    client: Detector, images: Sequence[NDArray[np.uint8]], stream: str, modality: str | None = None
) -> list[Detected]:
    """What is found in each image, one request each: so that no answer depends on what shares its batch."""
    return [client.detect(image, stream=stream, modality=modality) for image in images]


def precisions(clients: Mapping[str, Detector], made: Scenes, stream: str, told: Told) -> dict[str, AP]:
    """Average precision of each way whose model is there."""
    found = {}
    for name, way in SHOWN.items():
        if way.model in clients:
            detected = look(clients[way.model], way.images(made), stream, way.modality)
            found[name] = modality_scenes.average_precision(made, detected)
            told(f"{name}: AP50 {found[name].ap50:.3f}, AP {found[name].ap:.3f}")
    return found


def teach(client: Detector, taught: Scenes, stream: str) -> int:
    """Give the translator feedback; how many infrared scenes it learned from.

    Raises:
        RequestFailed: it learned from none, so that a comparison afterwards would say nothing.
    """
    results = [
        client.teach(image, truth.boxes.tolist(), truth.labels.tolist(), stream=stream, modality="ir")
        for image, truth in zip(taught.infrared, taught.truth, strict=True)
    ]
    if "applied" not in results:
        raise RequestFailed(f"{client.model}: no feedback was applied: {', '.join(results)}")
    return results.count("applied")


def identity(
    clients: Mapping[str, Detector], made: Scenes, stream: str, taught: Scenes | None, told: Told
) -> dict[str, float]:
    """The share of RGB answers with the same bits as without a translator, and as after one has learned.

    Args:
        clients: by model.
        made: whose colour pictures are looked at.
        stream: that answers, and learns.
        taught: scenes to learn from; None: nothing is taught.
        told: gets a line for each figure.

    Raises:
        RequestFailed: nothing was learned.
    """
    found: dict[str, float] = {}
    scenes = clients[SCENES]
    before = look(scenes, made.rgb, stream, "rgb")
    if PLAIN in clients:
        found["rgb_identical/plain"] = share_same(before, look(clients[PLAIN], made.rgb, stream, "rgb"))
    if taught:
        found["feedback_applied"] = teach(scenes, taught, stream)
        found["translator_version/after_feedback"] = scenes.detect(
            taught.infrared[0], stream=stream, modality="ir"
        ).translator_version
        found["rgb_identical/after_feedback"] = share_same(before, look(scenes, made.rgb, stream, "rgb"))
    for name, figure in found.items():
        told(f"{name}: {figure:g}")
    return found


def routing(
    client: Detector, images: Mapping[str, Sequence[NDArray[np.uint8]]], stream: str, told: Told
) -> dict[str, float]:
    """The share of each kind of images, sent without a modality, that went to the right one.

    Args:
        client: the model with translators.
        images: `ir` are infrared; no other kind is for a translator.
        stream: that answers.
        told: gets a line for each kind.
    """
    found = {}
    for kind, several in images.items():
        right = "ir" if kind == "ir" else "rgb"
        found[f"router_right/{kind}"] = share_of(right, look(client, several, stream))
        told(f"{kind}: {found[f'router_right/{kind}']:.2%} of {len(several)} routed rightly")
    return found


def unnamed(made: Scenes, args: argparse.Namespace) -> dict[str, Sequence[NDArray[np.uint8]]]:
    """What is sent without a modality, by kind."""
    images: dict[str, Sequence[NDArray[np.uint8]]] = {"rgb": made.rgb, "ir": made.infrared}
    images["photographs"] = photographs(args.scenes, args.seed)
    if args.data:
        images["cifar"] = grey_cifar(args.data, args.scenes)
    return images


def own_models(fine_tuned: Path | None, translator: Path | None) -> list[dict[str, Any]]:
    """The entries of `models:` of the script's own server."""
    builtin = {"builtin": "digit-scenes"}
    scenes: dict[str, Any] = {"name": SCENES, "source": builtin}
    if translator:
        scenes["translators"] = {"ir": str(translator.resolve())}
    models = [scenes, {"name": PLAIN, "source": builtin, "adapter": "source"}]
    if fine_tuned:
        models.append(
            {
                "name": FINE_TUNED,
                "source": {"python": "tta_serve.builtin.scene_detector:build"},
                "task": "detection",
                "weights": str(fine_tuned.resolve()),
                "labels": list(modality_scenes.LABELS),
                "adapter": "source",
            }
        )
    return models


def present(clients: Mapping[str, Detector]) -> dict[str, Detector]:
    """Those whose model is there.

    Raises:
        LoadTestError: the one with translators is not.
    """
    found = {name: client for name, client in clients.items() if client.ready()}
    if SCENES not in found:
        raise LoadTestError(f"the server has no model {clients[SCENES].model!r} that is ready; see --model")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it the script starts its own")
    parser.add_argument("--model", default=SCENES, help=f"the one with an `ir` translator there (default: {SCENES})")
    parser.add_argument(
        "--plain-model", default=PLAIN, help=f"the same without translators, left out if absent (default: {PLAIN})"
    )
    parser.add_argument("--fine-tuned-model", default=FINE_TUNED, help=f"left out if absent (default: {FINE_TUNED})")
    parser.add_argument("--fine-tuned", type=Path, metavar="FILE", help="weights of the fine-tuned detector")
    parser.add_argument("--translator", type=Path, metavar="FILE", help="another `ir` translator than the built-in one")
    parser.add_argument("--scenes", type=int, default=500, help="and photographs of each kind (default: 500)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the scenes (default: {SEED})")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the CIFAR files: route those in grey too")
    parser.add_argument("--seconds", type=int, default=5, help="of one interval of load (default: 5)")
    parser.add_argument("--pairs", type=int, default=5, help=f"rounds of load, {PAIRS_MIN} or more (default: 5)")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.scenes < 1:
        parser.error(f"--scenes must be 1 or more, not {args.scenes}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    if args.pairs < PAIRS_MIN:
        parser.error(f"--pairs must be {PAIRS_MIN} or more, not {args.pairs}")
    if not 1 <= args.seconds <= 600:
        parser.error(f"--seconds must be 1 to 600, not {args.seconds}")
    if args.url and (args.fine_tuned or args.translator):
        parser.error("--fine-tuned and --translator are for a server of the script's own; leave out --url")
    return args


def main() -> int:
    args = parse_arguments()
    parts = (args.only,) if args.only else PARTS
    report.check_outputs(args.json, args.plot)
    for file in (args.fine_tuned, args.translator):
        if file and not file.is_file():
            raise MissingFile(f"{file} does not exist")
    if args.data:
        cifar.existing(args.data, "clean.npz")
    if "throughput" in parts:
        wrk.check_installed()
    console = Console()
    stream = f"modality-{secrets.token_hex(4)}"
    made = modality_scenes.make(args.scenes, args.seed, held_out=True)
    figures: dict[str, float] = {"scenes": args.scenes, "seed": args.seed}
    pictures: list[plots.Bars] = []
    with ExitStack() as stack:
        url = args.url or stack.enter_context(own_server(own_models(args.fine_tuned, args.translator)))
        names = {SCENES: args.model, PLAIN: args.plain_model, FINE_TUNED: args.fine_tuned_model}
        if not args.url:
            names = {name: name for name in names}
        clients = {name: Detector(url, model) for name, model in names.items()}
        for client in clients.values():
            stack.enter_context(client)
        clients = present(clients)
        if "ap" in parts:
            figures |= precision_figures(precisions(clients, made, stream, console.print))
        if "router" in parts:
            figures |= routing(clients[SCENES], unnamed(made, args), stream, console.print)
        pictures += panels(figures)
        if "throughput" in parts:
            route = url.rstrip("/") + clients[SCENES].infer_path
            load = modality_load.wrk_load(route, modality_load.requests(made, f"{stream}-load"))
            rounds = modality_load.measure(load, args.pairs, args.seconds, console.print)
            figures |= modality_load.figures(rounds)
            pictures.append(modality_load.panel(rounds))
        if "ap" in parts:  # last: it teaches
            taught = None if args.url else modality_scenes.make(FEEDBACKS, args.seed, held_out=False)
            figures |= identity(clients, made, stream, taught, console.print)
    if "ap" in parts:
        console.print(precision_table(figures))
    console.print(wanted_table(figures))
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "modality", figures)
    if args.plot:
        plots.draw(args.plot, pictures)
    return 0


if __name__ == "__main__":
    run(main)
