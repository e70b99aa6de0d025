"""Error under distribution shift: the 15 corruptions of CIFAR-10-C at severity 5, through a live server.

Every request holds 200 images of one corruption and asks for both answers (`x-answer: both`), so that the adapting and
the frozen model see the same images in one run. `continual` plays all corruptions as one stream without reset, and then
the clean images; `per_shift` gives each corruption a stream of its own.

    python loadtests/shift.py --data DIR [--protocol per_shift] [--json FILE] [--plot FILE]
    python loadtests/shift.py --data DIR --url http://127.0.0.1:8000 --model cifar

Without --url it starts its own server with ResNet-20 and EATA in `mode: sync`: one request, one batch, one step. On a
server in `mode: async`, --drain waits after each request until the learner is done, so that a run can be repeated.

The reference that stands beside our figures: EATA (Niu et al., arXiv 2204.02610) in the library
mariodoebler/test-time-adaptation, with its CIFAR-10-C settings (Adam, 1e-3), on the same images and weights.
"""

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import cifar, plots, report
from loadtests.client import Client
from loadtests.errors import RequestFailed, run
from loadtests.server import own_server

Protocol = Literal["continual", "per_shift"]
Shift = tuple[str, NDArray[np.uint8], NDArray[np.int64]]  # name, images [N, 3, 32, 32], labels [N]

BATCH = 200
CLEAN = "clean"
EATA: dict[str, Any] = {"eata": {"learning_rate": 0.001, "optimizer": "adam", "anchor_weight": 1.0}}


class Errors(NamedTuple):
    """Errors in %, of the same images."""

    frozen: float
    adapting: float


# Mean over the corruptions, and on the clean images afterwards (told for `continual` only); batches of 200.
REFERENCE: Mapping[Protocol, tuple[Errors, Errors | None]] = {
    "continual": (Errors(41.13, 23.71), Errors(12.90, 13.15)),
    "per_shift": (Errors(41.13, 24.45), None),
}


def play(
    client: Client,
    shifts: Iterable[Shift],
    stream_of: Callable[[str], str],
    *,
    batch: int = BATCH,
    drain: bool = False,
    told: Callable[[str, Errors], None] = lambda _name, _errors: None,
) -> dict[str, Errors]:
    """Play shifts one after the other and count wrong answers.

    Args:
        client: the model.
        shifts: in the order to be played.
        stream_of: the stream that plays a shift.
        batch: images a request.
        drain: wait after each request until the learner is done.
        told: is called after each shift.

    Raises:
        RequestFailed: a request failed; the figures would not be those of the protocol.
    """
    errors = {}
    for name, images, labels in shifts:
        stream = stream_of(name)
        wrong = np.zeros(2)
        for first in range(0, len(images), batch):
            rows = slice(first, first + batch)
            answer = client.infer(images[rows], stream=stream, answer="both", id=f"{name}-{first}")
            if answer.frozen is None:
                raise RequestFailed(f"{client.model}: the server gave no frozen answer beside the adapted one")
            wrong += (answer.frozen != labels[rows]).sum(), (answer.answered != labels[rows]).sum()
            if drain and not client.drain(stream):
                raise RequestFailed(f"{client.model}: the learner still had rows of {stream} waiting after a minute")
        errors[name] = Errors(*(float(count) for count in wrong * 100 / len(images)))
        told(name, errors[name])
    return errors


def settled(client: Client, stream: str, image: NDArray[np.uint8]) -> dict[str, Any] | None:
    """What the server tells of a stream once it has learned from all that was sent.

    In `mode: sync` the last answer is out before its step is taken; one that teaches nothing has to wait for that step.
    """
    client.infer(image, stream=stream, adapt=False)
    client.drain(stream)
    return client.stream(stream)


def streams(protocol: Protocol) -> Callable[[str], str]:
    """Names of streams that no earlier run has used."""
    run_name = f"shift-{secrets.token_hex(4)}"
    return (lambda name: f"{run_name}-{name}") if protocol == "per_shift" else lambda _name: run_name


def load(data: Path) -> Iterator[Shift]:
    """The corruptions in the order of the protocol, then the clean images; one in memory at a time."""
    labels = cifar.labels(data)
    for name in (*cifar.corruptions(data), CLEAN):
        yield name, cifar.images(data, name), labels


def mean(errors: Mapping[str, Errors]) -> Errors:
    """Mean over the corruptions; the clean images are none."""
    corrupted = [each for name, each in errors.items() if name != CLEAN]
    return Errors(*(float(np.mean(column)) for column in zip(*corrupted, strict=True)))


def figures(errors: Mapping[str, Errors], protocol: Protocol, stream: Mapping[str, Any] | None) -> dict[str, float]:
    """The errors in the names of the JSON form, with what the server tells of the last stream."""
    found = {f"error/{protocol}/default": mean(errors).adapting, f"error/{protocol}/frozen": mean(errors).frozen}
    for name, each in errors.items():
        found |= {f"error/{protocol}/default/{name}": each.adapting, f"error/{protocol}/frozen/{name}": each.frozen}
    for count in ("steps", "seen", "reliable", "selected"):
        if stream and isinstance(stream.get(count), int):
            found[f"{count}/{protocol}/default"] = stream[count]
    return found


def table(errors: Mapping[str, Errors], protocol: Protocol, *, reference: bool = True) -> Table:
    rows = Table(title=f"Error in %, protocol {protocol}", caption=_caption(protocol) if reference else None)
    rows.add_column("shift")
    for name in ("frozen", "adapting", "difference"):
        rows.add_column(name, justify="right")
    of_mean, of_clean = REFERENCE[protocol] if reference else (None, None)
    corrupted = {name: each for name, each in errors.items() if name != CLEAN}
    for number, (name, each) in enumerate(corrupted.items(), start=1):
        rows.add_row(name, *_cells(each), end_section=number == len(corrupted))
    rows.add_row(f"mean of {len(corrupted)}", *_cells(mean(errors)), style="bold", end_section=of_mean is None)
    if of_mean:
        rows.add_row("  reference", *_cells(of_mean), style="dim", end_section=True)
    if CLEAN in errors:
        rows.add_row(CLEAN if protocol == "per_shift" else f"{CLEAN}, afterwards", *_cells(errors[CLEAN]))
        if of_clean:
            rows.add_row("  reference", *_cells(of_clean), style="dim")
    return rows


def _cells(errors: Errors) -> tuple[str, str, str]:
    return f"{errors.frozen:.2f}", f"{errors.adapting:.2f}", f"{errors.adapting - errors.frozen:+.2f}"


def _caption(protocol: Protocol) -> str:
    return f"reference: EATA in mariodoebler/test-time-adaptation, {protocol}, same images and weights"


def plot(file: Path, errors: Mapping[str, Errors], protocol: Protocol, *, reference: bool = True) -> None:
    """Write a picture: two bars for each shift, their means, and the means of the reference as lines."""
    corrupted = {name: each for name, each in errors.items() if name != CLEAN}
    clean = {CLEAN: errors[CLEAN]} if CLEAN in errors else {}
    shown = corrupted | {"MEAN": mean(errors)} | clean
    plots.draw(
        file,
        [
            plots.Bars(
                title=f"Error under corruption (severity 5), protocol {protocol}: frozen and adapting, same images",
                unit="error (%), lower is better",
                labels=[name.replace("_", " ") for name in shown],
                series={
                    "frozen": [each.frozen for each in shown.values()],
                    "adapting": [each.adapting for each in shown.values()],
                },
                levels=_levels(REFERENCE[protocol][0]) if reference else {},
            )
        ],
    )


def _levels(of_mean: Errors) -> dict[str, float]:
    return {
        f"reference mean, frozen: {of_mean.frozen:.2f} %": of_mean.frozen,
        f"reference mean, EATA: {of_mean.adapting:.2f} %": of_mean.adapting,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the CIFAR files")
    parser.add_argument("--url", help="a running server; without it the script starts its own")
    parser.add_argument("--model", default="cifar", help="the model's name there (default: cifar)")
    parser.add_argument("--protocol", choices=("continual", "per_shift"), default="continual")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images a request (default: {BATCH})")
    parser.add_argument("--drain", action="store_true", help="wait for the learner after each request (mode: async)")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch must be 1 or more, not {args.batch}")
    return args


def main() -> int:
    args = parse()
    report.check_outputs(args.json, args.plot)
    console = Console()
    with ExitStack() as stack:
        url = args.url
        if not url:
            models = [cifar.served_model(args.data, args.model, EATA, mode="sync")]
            url = stack.enter_context(own_server(models))
        client = stack.enter_context(Client(url, args.model))
        begin = time.monotonic()
        stream_of = streams(args.protocol)
        errors = play(
            client,
            load(args.data),
            stream_of,
            batch=args.batch,
            drain=args.drain,
            told=lambda name, each: console.print(f"{name}: {each.frozen:.2f} → {each.adapting:.2f} %"),
        )
        took_s = time.monotonic() - begin
        stream = settled(client, stream_of(CLEAN), cifar.images(args.data, CLEAN)[:1])
    reference = args.batch == BATCH
    console.print(table(errors, args.protocol, reference=reference))
    console.print(f"{took_s:.0f} s; {report.machine_line()}", soft_wrap=True)
    if args.json:
        report.write_json(args.json, "shift", figures(errors, args.protocol, stream))
    if args.plot:
        plot(args.plot, errors, args.protocol, reference=reference)
    return 0


if __name__ == "__main__":
    run(main)
