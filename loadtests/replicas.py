"""Two replicas that learn together, against one: the error on 15 corruptions as 15 streams.

ResNet-20 is served with `replicas: 1` and then with `replicas: 2`. Both get the same images in the same order: in each
round every stream (a corruption of CIFAR-10-C at severity 5) sends one request of 16 images, over 8 connections. With
two replicas HAProxy sends each request to one of them at random, so that both learn from every stream, and the states
come together in the store each second. A round is over when no replica has rows to learn from, and not before as much
time has passed as with the other number of replicas: what is compared is where learning happens, not how much.

    python loadtests/replicas.py --data DIR [--images 512] [--json FILE] [--plot FILE]

It starts its own servers, and can be pointed at no other one; it takes about 6 minutes on two cores.

Target: the error with two replicas is at most 0.5 points above that with one. The difference is paired over the images;
the answers to one image under 15 corruptions count as one, for its standard error. It tells how far another choice of
images would differ, not another run: traffic that is spread at random learns in another order each time.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import cifar, plots, report
from loadtests.client import Client
from loadtests.errors import RequestFailed, run
from loadtests.replicas_metrics import ReplicaMetrics, largest_share
from loadtests.server import own_server

MODEL = "cifar"
REPLICAS = (1, 2)
NAMES = {1: "one", 2: "two"}
IMAGES = 512  # of each stream
ROWS = 16  # images a request: each replica sees a part of each stream
CONNECTIONS = 8
ROUND_S = 2.0  # two sync intervals; on two busy cores a round takes no less anyway
SYNC_INTERVAL_S = 1.0
DIFFERENCE_MAX = 0.5  # points
AT_RANDOM = {"RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "random(1)"}  # one draw: regardless of who has less to do

Wrong = NDArray[np.bool_]  # by stream and image, [S, N]: whether the answer was wrong
Images = Mapping[str, NDArray[np.uint8]]  # by stream, [N, 3, H, W]


class Played(NamedTuple):
    """What a server answered."""

    wrong: Wrong
    frozen: Wrong
    largest_share: float  # of the images, that one replica answered
    round_s: float  # mean


class Difference(NamedTuple):
    """Of two errors on the same images, in points."""

    mean: float
    standard_error: float


def play(
    ask: Callable[[str, NDArray[np.uint8]], tuple[NDArray[np.int64], NDArray[np.int64]]],
    drain: Callable[[], None],
    images: Images,
    labels: NDArray[np.int64],
    told: Callable[[int, int], None] = lambda _done, _rounds: None,
    round_s: float = ROUND_S,
) -> tuple[Wrong, Wrong, float]:
    """Let every stream send its images, request by request.

    Args:
        ask: the stream's and the frozen model's labels of one request.
        drain: waits until all that was sent is learned from.
        images: of each stream, the same number.
        labels: of them, [N].
        told: called after each round.
        round_s: a round takes at least so long.

    Returns:
        Which answers were wrong, which of the frozen model's were, and how many seconds a round took on average.
    """
    wrong = np.zeros((len(images), len(labels)), dtype=bool)
    frozen = np.zeros_like(wrong)
    rounds = math.ceil(len(labels) / ROWS)
    began_s = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as connections:
        for number in range(rounds):
            ends_s = time.monotonic() + round_s
            rows = slice(number * ROWS, (number + 1) * ROWS)
            said = connections.map(lambda stream: ask(stream, images[stream][rows]), images)  # noqa: B023
            for i, (adapted_labels, frozen_labels) in enumerate(said):
                wrong[i, rows] = adapted_labels != labels[rows]
                frozen[i, rows] = frozen_labels != labels[rows]
            drain()
            time.sleep(max(0.0, ends_s - time.monotonic()))
            told(number + 1, rounds)
    return wrong, frozen, (time.monotonic() - began_s) / rounds


def paired(wrong: Wrong, baseline: Wrong) -> Difference:
    """Mean of `wrong − baseline` and its standard error over the images, `s/√N` of each image's mean over the streams.

    >>> two = np.array([[True, True, False], [True, False, False]])
    >>> difference = paired(two, np.array([[False, True, False], [True, False, True]]))
    >>> difference.mean, round(difference.standard_error, 2)  # of 1/2, 0, -1/2: s = 1/2
    (0.0, 28.87)
    """
    per_image = (wrong.astype(float) - baseline.astype(float)).mean(axis=0)
    spread = float(per_image.std(ddof=1)) if len(per_image) > 1 else math.nan
    return Difference(100 * float(per_image.mean()), 100 * spread / math.sqrt(len(per_image)))


def error(wrong: Wrong) -> float:
    """In %."""
    return 100 * float(wrong.mean())


def figures(streams: Sequence[str], played: Mapping[int, Played]) -> dict[str, float]:
    """In the names of the JSON form."""
    difference = paired(played[2].wrong, played[1].wrong)
    found = {
        "error/interleaved/frozen": error(played[1].frozen),
        "difference/two_replicas_minus_one": difference.mean,
        "difference_standard_error/two_replicas_minus_one": difference.standard_error,
        "largest_share/two_replicas": played[2].largest_share,
        "images/stream": played[1].wrong.shape[1],
    }
    for count, each in played.items():
        name = f"{NAMES[count]}_replica{'s' * (count > 1)}"
        found |= {f"error/interleaved/{name}": error(each.wrong), f"round_s/{name}": each.round_s}
        for i, stream in enumerate(streams):
            found[f"error/interleaved/{name}/{stream}"] = error(each.wrong[i])
    return found


def table(streams: Sequence[str], played: Mapping[int, Played]) -> Table:
    """A line for each stream."""
    rows = Table(title="error in %, by stream", box=box.SIMPLE_HEAD)
    rows.add_column("stream")
    for name in ("frozen", "one replica", "two", "two − one"):
        rows.add_column(name, justify="right")
    for place, name in enumerate(streams):
        rows.add_row(name, *_cells(played, slice(place, place + 1)), end_section=place == len(streams) - 1)
    rows.add_row(f"mean of {len(streams)}", *_cells(played, slice(None)))
    return rows


def _cells(played: Mapping[int, Played], places: slice) -> tuple[str, str, str, str]:
    one, two = error(played[1].wrong[places]), error(played[2].wrong[places])
    return f"{error(played[1].frozen[places]):.2f}", f"{one:.2f}", f"{two:.2f}", f"{two - one:+.2f}"


def summary(played: Mapping[int, Played]) -> str:
    difference = paired(played[2].wrong, played[1].wrong)
    return (
        f"two replicas − one: {difference.mean:+.2f} ± {difference.standard_error:.2f} points (target: at most "
        f"{DIFFERENCE_MAX}); one of the two replicas answered {played[2].largest_share:.0%} of the images; a round "
        f"took {played[1].round_s:.1f} s and {played[2].round_s:.1f} s"
    )


def picture(streams: Sequence[str], played: Mapping[int, Played]) -> list[plots.Bars]:
    labels = [name.replace("_", " ") for name in streams]
    series = {
        "frozen": [error(each) for each in played[1].frozen],
        "one replica": [error(each) for each in played[1].wrong],
        "two replicas": [error(each) for each in played[2].wrong],
    }
    return [plots.Bars("Error under corruption: one replica and two", "error (%), lower is better", labels, series)]


def configuration(data: Path, replicas: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The model and the store."""
    model = cifar.served_model(data, MODEL, "eata", mode="async")
    model = {**model, "replicas": replicas, "adaptation": {**model["adaptation"], "budget": 1.0}}
    return [model], {"store": {"path": "states", "sync_interval_s": SYNC_INTERVAL_S}}


def measure(
    data: Path, replicas: int, images: Images, labels: NDArray[np.int64], told: Callable[[int, int], None]
) -> Played:
    """Play everything on a server of the script's own."""
    models, settings = configuration(data, replicas)
    with (
        own_server(models, settings=settings, environment=AT_RANDOM) as url,
        Client(url, MODEL) as client,
        httpx.Client(base_url=url) as http,
    ):
        metrics = ReplicaMetrics(http, MODEL, replicas)

        def ask(stream: str, x: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            answer = client.infer(x, stream=stream, answer="both")
            if answer.frozen is None:
                raise RequestFailed(f"{MODEL}: the server gave no frozen answer beside the adapted one")
            return answer.answered, answer.frozen

        wrong, frozen, round_s = play(ask, metrics.drain, images, labels, told)
        return Played(wrong, frozen, largest_share(metrics.images().values()), round_s)


def load(data: Path, count: int) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.int64]]:
    """The first images of each corruption, and their labels."""
    return {name: cifar.images(data, name)[:count] for name in cifar.corruptions(data)}, cifar.labels(data)[:count]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the CIFAR files")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"of each stream (default: {IMAGES})")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.images < ROWS:
        parser.error(f"--images must be {ROWS} or more, not {args.images}")
    return args


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    console = Console()
    images, labels = load(args.data, args.images)
    streams = list(images)
    played = {}
    for replicas in REPLICAS:

        def told(done: int, rounds: int) -> None:
            if done % 8 == 0 or done == rounds:
                console.print(f"{NAMES[replicas]}: round {done} of {rounds}")  # noqa: B023

        played[replicas] = measure(args.data, replicas, images, labels, told)
    console.print(table(streams, played))
    console.print(summary(played), soft_wrap=True)
    console.print(report.machine_line(), soft_wrap=True)
    found = figures(streams, played)
    if args.json:
        report.write_json(args.json, "replicas", found)
    if args.plot:
        plots.draw(args.plot, picture(streams, played))
    if (difference := found["difference/two_replicas_minus_one"]) > DIFFERENCE_MAX:
        console.print(f"target missed: two replicas − one is {difference:.2f} points, not {DIFFERENCE_MAX} or less")
        return 1
    return 0


if __name__ == "__main__":
    run(main)
