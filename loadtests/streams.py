"""Many streams in one batch, against the same streams one after the other; and who is served in a busy hour.

In process, one thread: `tta_serve.engine` itself. Every stream brings the same number of images, and the two ways run
in alternating rounds over the same images. Ratios above 1 say how much faster the mixed batch is.

Also a saturated learner: one stream sends most of the traffic, and the table says which share of its
rows each stream was taught. Time is counted, not measured: a step per so many arriving rows.

    python loadtests/streams.py --models resnet20 resnet18
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from adapters import EATA, EATAConfig, Guarded, Network, Pipeline
from loadtests import report, resnet20
from loadtests.errors import run
from loadtests.rounds import Spread, order
from tta_serve.engine import Engine, Query
from tta_serve.learner import Pools
from tta_serve.lessons import Lesson

ROUNDS_MIN = 5
MIXED, SERIAL = "mixed", "serial"


class Model(NamedTuple):
    """What is measured; the weights are random, for time does not depend on them."""

    build: Callable[[], nn.Module]
    pixels: int  # both ways
    classes: int


MODELS = {
    "resnet20": Model(resnet20.build, 32, 10),
    "resnet18": Model(lambda: torchvision.models.resnet18(weights=None), 224, 1000),
    "resnet50": Model(lambda: torchvision.models.resnet50(weights=None), 224, 1000),
}

FAIR_STREAMS = 17  # one busy and 16 quiet
FAIR_BUSY_SHARE = 0.8
FAIR_ROWS = 8_000  # that arrive
FAIR_ROWS_A_STEP = 512  # that arrive while one step is taken: twice what it can take


def build_engine(model: Model, device: torch.device) -> Engine:
    """An engine with the server's defaults, but for filters that let every row through: all of them cost."""
    torch.manual_seed(0)
    network = Network(model.build().to(device))
    everything = EATAConfig(
        anchor="l2",
        entropy_margin=10.0,
        redundancy_margin=2.0,
        statistics="evidence",
        class_mix_rate=0.3,
        full_step_rows=64,
        source_pull=0.02,
        learning_rate=1e-6,
    )
    return Engine(Pipeline(network, norm=Guarded(EATA(network, model.classes, config=everything))), device, 10_000)


class Bench:
    """One model with streams that have all learned something.

    Args:
        model: to measure.
        streams: how many.
        rows: images that each of them brings.
        device: where.
    """

    def __init__(self, model: Model, streams: int, rows: int, device: torch.device) -> None:
        self.engine = build_engine(model, device)
        x = torch.rand(streams, rows, 3, model.pixels, model.pixels, generator=torch.Generator().manual_seed(1))
        self.queries = [Query(part, f"s{number}") for number, part in enumerate(x)]
        self.lessons: list[Lesson] = [lesson for _, lesson in self.engine.predict(self.queries)]
        self.engine.learn(self.lessons)

    def predict(self, way: str) -> float:
        """Seconds to answer every stream once."""
        began_s = time.perf_counter()
        if way == MIXED:
            self.engine.predict(self.queries)
        else:
            for query in self.queries:
                self.engine.predict([query])
        return time.perf_counter() - began_s

    def learn(self, way: str) -> float:
        """Seconds to take one step of every stream."""
        began_s = time.perf_counter()
        if way == MIXED:
            self.engine.learn(self.lessons)
        else:
            for lesson in self.lessons:
                self.engine.learn([lesson])
        return time.perf_counter() - began_s


def measure(bench: Bench, rounds: int) -> dict[str, Spread]:
    """Serial ÷ mixed seconds, formed within each round."""
    found: dict[str, Spread] = {}
    for what, act in (("predict", bench.predict), ("learn", bench.learn)):
        for way in (MIXED, SERIAL):  # once for nothing
            act(way)
        ratios = []
        for number in range(rounds):
            seconds = {way: act(way) for way in order((MIXED, SERIAL), number)}
            ratios.append(seconds[SERIAL] / seconds[MIXED])
        found[what] = Spread.of(ratios)
    return found


class Fairness(NamedTuple):
    """Shares of their rows that streams were taught."""

    busy: float
    quiet_mean: float
    quiet_least: float


def fairness(pools: Pools) -> Fairness:
    """Let rows arrive, most of them of one stream, while steps are too few for all of them.

    Args:
        pools: as the server has them.
    """
    generator = torch.Generator().manual_seed(2)
    busy = torch.rand(FAIR_ROWS, generator=generator) < FAIR_BUSY_SHARE
    quiet = torch.randint(1, FAIR_STREAMS, (FAIR_ROWS,), generator=generator)
    arrived, taught = [0] * FAIR_STREAMS, [0] * FAIR_STREAMS
    row: Tensor = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for number in range(FAIR_ROWS):
        stream = 0 if busy[number] else int(quiet[number])
        arrived[stream] += 1
        now_s = number / 1000
        pools.add(Lesson(row, str(stream), incarnation=1, version=0), now_s)
        if number % FAIR_ROWS_A_STEP == FAIR_ROWS_A_STEP - 1:
            for lesson in pools.take(now_s):
                taught[int(lesson.stream)] += lesson.rows
    shares = [part / whole for part, whole in zip(taught, arrived, strict=True)]
    return Fairness(shares[0], sum(shares[1:]) / (FAIR_STREAMS - 1), min(shares[1:]))


def figures(ratios: dict[str, dict[str, Spread]], fair: Fairness) -> dict[str, float]:
    """In the names of the JSON form."""
    found = {
        f"ratio/mixed_over_serial_{what}/{name}": spread.median
        for name, each in ratios.items()
        for what, spread in each.items()
    }
    return found | {
        "share_learned/busy": fair.busy,
        "share_learned/quiet": fair.quiet_mean,
        "share_learned_min/quiet": fair.quiet_least,
    }


def table(ratios: dict[str, dict[str, Spread]], streams: int, rows: int) -> Table:
    title = f"{streams} streams, {rows} image(s) each: mixed batch ÷ one after the other, median (range)"
    shown = Table(title=title)
    for column in ("model", "predict", "learn"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for name, each in ratios.items():
        shown.add_row(name, str(each["predict"]), str(each["learn"]))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet20", "resnet18"])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1, help="images of each stream (default: 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS_MIN)
    parser.add_argument("--device", default="cpu")
    report.add_arguments(parser, plot=False)
    args = parser.parse_args()
    if min(args.streams, args.rows) < 1 or args.rounds < ROUNDS_MIN:
        parser.error(f"--streams and --rows must be 1 or more, --rounds {ROUNDS_MIN} or more")
    report.check_outputs(args.json)
    torch.set_num_threads(1)
    console, device = Console(), torch.device(args.device)
    ratios = {name: measure(Bench(MODELS[name], args.streams, args.rows, device), args.rounds) for name in args.models}
    fair = fairness(Pools(step_rows=32, step_wait_s=0.5, queue_rows=1024))
    console.print(table(ratios, args.streams, args.rows))
    console.print(
        f"Learner at half of what arrives, one stream with {FAIR_BUSY_SHARE:.0%} of it: "
        f"taught {fair.busy:.0%} of its rows, the other {FAIR_STREAMS - 1} streams {fair.quiet_mean:.0%} "
        f"(the least {fair.quiet_least:.0%})"
    )
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "streams", figures(ratios, fair))
    return 0


if __name__ == "__main__":
    run(main)
