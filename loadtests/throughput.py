"""Requests per second and latency over HTTP: adapting, learning all the time, frozen, and a model that does nothing.

Four models stand side by side in one run, one image a request:

- `adapting`: the defaults, on images like the source's. Its stream's gate has closed before anything counts: it is
  spared the backward passes.
- `learning`: the same with `gate: false`, on images with black and white exchanged. There is something to learn, and
  the learner takes its whole budget.
- `frozen`: the same network without an adapter.
- `noop`: answers without a forward, which shows what HTTP alone costs.

First each is loaded in turn with 1, 16 and 64 connections, each of which sends as soon as it has its answer (wrk). Then
each gets the same 70 % of the requests/s that the frozen model answered at saturation, over 16 connections (hey), and
the latency is that of a server which keeps up; see `loadtests/hey.py` for what a rate that waits for answers hides. The
order changes from round to round, so that whatever else the machine does meets all of them; told are the median over
the rounds and the range, for ratios (formed within a round) too.

    python loadtests/throughput.py [--seconds 3] [--pairs 5] [--data DIR] [--json FILE] [--plot FILE]
    python loadtests/throughput.py --url http://127.0.0.1:8000 --model digits --frozen-model frozen

Without --url it starts its own server with the built-in digits model, and takes about 10 minutes; with --data it then
measures the CIFAR ResNet-20 likewise. wrk and hey (Debian packages of these names) share the machine's cores with a
server of the script's own.

`share_learned` is the rows that the learner took steps on ÷ the rows served within the interval. `failed_requests`
counts answers other than 2xx and 429, and requests without an answer; `refused_requests` counts 429. Neither counts in
requests/s.
"""

import argparse
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import cifar, hey, plots, report, wrk
from loadtests.client import Client, Encoded, encode
from loadtests.errors import LoadTestError, run
from loadtests.rounds import (
    ADAPTING,
    FROZEN,
    LEARNERS,
    LEARNING,
    NOOP,
    Interval,
    Paced,
    Rounds,
    Spread,
    alternate,
    figures,
    learners,
    pace,
    paced_figures,
    play,
    ratios,
    saturation,
    totals,
)
from loadtests.server import own_server

CONNECTIONS = (1, 16, 64)
PAIRS_MIN = 3  # a median and a range of fewer say nothing
PACED_CONNECTIONS = 16
PACED_INTERVALS = 2  # an interval at 70 % lasts this many times as long: a p99 wants its thousand requests
WARM_SECONDS = 2
GATE_SECONDS = 1  # of load between two looks at the gate …
GATE_MAX_S = 30.0  # … which has to close by then
SHOWN = (FROZEN, ADAPTING, LEARNING, NOOP)  # in pictures, in this order
IMAGES = 32  # different ones, sent in turn
CAPTION = "median (range) over {pairs} rounds; learned: share of the rows; failed, 429: of all"
RESNET20 = "resnet20_"  # before the names of its variants


class Samples(NamedTuple):
    """What is sent, uint8 [N, 3, H, W]: at least `PACED_CONNECTIONS` of each."""

    like_source: NDArray[np.uint8]
    shifted: NDArray[np.uint8]

    def of(self, variant: str) -> NDArray[np.uint8]:
        return self.shifted if variant.endswith(LEARNING) else self.like_source


class Measured(NamedTuple):
    """All of one network's variants."""

    title: str
    prefix: str  # of the variants' names
    rounds: Rounds
    paced: Paced


class Server:
    """Measures variants on a running server; each has a stream of its own.

    Args:
        url: the server's.
        models: variant → name of the model there.
        samples: what to send.
        seconds: of an interval.
        told: gets what a user has to know about how it goes, in words.
    """

    def __init__(
        self,
        url: str,
        models: Mapping[str, str],
        samples: Samples,
        seconds: int,
        told: Callable[[str], object],
    ) -> None:
        self.url = url.rstrip("/")
        self.seconds = seconds
        self.clients = {variant: Client(url, model) for variant, model in models.items()}
        self.streams = {variant: f"throughput-{secrets.token_hex(4)}-{variant}" for variant in models}
        self.requests = {variant: requests(samples.of(variant), stream) for variant, stream in self.streams.items()}
        self._told = told
        self._gate_stays_open = False

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients.values():
            client.__exit__(None, None, None)

    def warm(self) -> None:
        """Load each variant once before anything counts: buffers, threads and the compiler's caches fill."""
        for variant in self.clients:
            self._load(variant, max(CONNECTIONS), WARM_SECONDS)

    def measure(self, variant: str, connections: int) -> Interval:
        """One interval, in which each connection sends as soon as it has its answer."""
        return self._interval(variant, lambda: self._load(variant, connections, self.seconds))

    def measure_paced(self, variant: str, rate: float) -> Interval:
        """One interval with this many requests per second."""
        url, seconds = self._infer_url(variant), self.seconds * PACED_INTERVALS
        sent = self.requests[variant][:PACED_CONNECTIONS]
        return self._interval(variant, lambda: hey.load(url, sent, rate, seconds))

    def close_gate(self, variant: str) -> bool:
        """Load a variant until its stream is spared its steps; whether that came within `GATE_MAX_S`."""
        end_s = time.monotonic() + GATE_MAX_S
        while not (gated := self._stream(variant).get("gated", False)) and time.monotonic() < end_s:
            self._load(variant, PACED_CONNECTIONS, GATE_SECONDS)
        self.clients[variant].drain(self.streams[variant])
        return bool(gated)

    def _interval(self, variant: str, load: Callable[[], wrk.Load]) -> Interval:
        """What still waits for the learner afterwards is waited for, so that it disturbs no other interval."""
        if not variant.endswith(LEARNERS):
            return Interval(load(), math.nan)
        if variant.endswith(ADAPTING) and not self._gate_stays_open and not self.close_gate(variant):
            self._gate_stays_open = True  # not tried again: every interval would wait as long
            self._told(
                f"{variant}: the gate did not close within {GATE_MAX_S:.0f} s; it is measured as it is, and the share "
                "of rows learned says how much it learns"
            )
        before = self._seen(variant)
        found = load()
        learned = self._seen(variant) - before
        self.clients[variant].drain(self.streams[variant])
        return Interval(found, learned / found.answered if found.answered else math.nan)

    def _load(self, variant: str, connections: int, seconds: int) -> wrk.Load:
        return wrk.load(self._infer_url(variant), self.requests[variant], connections, seconds)

    def _infer_url(self, variant: str) -> str:
        return self.url + self.clients[variant].infer_path

    def _seen(self, variant: str) -> int:
        """Rows of the variant's stream that the learner took steps on."""
        return int(self._stream(variant).get("seen") or 0)

    def _stream(self, variant: str) -> dict[str, Any]:
        """What the server tells of the variant's stream; empty while there is none."""
        return self.clients[variant].stream(self.streams[variant]) or {}


def requests(images: NDArray[np.uint8], stream: str) -> list[Encoded]:
    """Requests of one image each, all with the same headers."""
    return [encode(image[np.newaxis], stream=stream) for image in images]


def digits() -> Samples:
    """The images of the built-in model, and the same dark on white."""
    from sklearn.datasets import load_digits  # slow to import, and only a measurement needs it

    small: NDArray[np.float64] = load_digits().images[:IMAGES]
    images = enlarged(small)
    return Samples(images, 255 - images)


def enlarged(small: NDArray[np.float64]) -> NDArray[np.uint8]:
    """As the built-in model was trained on them: 0 … 16 [N, 8, 8] → uint8 [N, 3, 32, 32], interpolated linearly."""
    centres = (np.arange(32) + 0.5) / 4 - 0.5  # of the large pixels, counted in small ones
    weights = np.stack([np.interp(centres, np.arange(8), pixel) for pixel in np.eye(8)], axis=1)  # [32, 8]
    grey = (weights @ small @ weights.T * (255 / 16)).round().astype(np.uint8)
    return np.repeat(grey[:, np.newaxis], 3, axis=1)


def photographs(data: Path) -> Samples:
    """CIFAR images, and their negatives.

    They vary more than digits: the gate may open while only `PACED_CONNECTIONS` of them are sent.
    """
    images = cifar.images(data, "clean")[:IMAGES]
    return Samples(images, 255 - images)


def table(rounds: Rounds, title: str, prefix: str = "") -> Table:
    """A row for each number of connections and variant: median, and range in brackets."""
    pairs = len(next(iter(rounds.values())))
    rows = Table(
        title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True, caption=CAPTION.format(pairs=pairs)
    )
    _columns(rows, "conn.", "variant", "requests/s", "p50\nms", "p99 ms", "learned", "failed,\n429")
    for count, several in rounds.items():
        for number, variant in enumerate(sorted(several[0])):
            loads = [each[variant].load for each in several]
            rows.add_row(
                str(count),
                variant.removeprefix(prefix),
                str(Spread.of(load.rps for load in loads)),
                Spread.of(load.p50_ms for load in loads).middle,
                str(Spread.of(load.p99_ms for load in loads)),
                Spread.of(each[variant].share_learned for each in several).middle,
                _not_answered(loads),
                end_section=number == len(several[0]) - 1,
            )
    return rows


def ratio_table(rounds: Rounds, prefix: str = "") -> Table:
    """A row for each number of connections and variant that may learn."""
    at = saturation(rounds, prefix + FROZEN)
    rows = Table(title="÷ frozen, within a round", box=box.SIMPLE, caption=f"saturated at {at} connections")
    _columns(rows, "conn.", "variant", "requests/s", "learned", "p99")
    for count, several in rounds.items():
        found = ratios(several, prefix)
        for variant in learners(several, prefix):
            name = f"{variant}_over_{prefix}{FROZEN}"
            share = Spread.of(each[variant].share_learned for each in several).middle
            rows.add_row(str(count), variant.removeprefix(prefix), str(found[name]), share, str(found[f"p99_{name}"]))
    return rows


def paced_table(paced: Paced, prefix: str = "") -> Table:
    """A row for each variant at 70 % of the frozen model's saturation."""
    slow = [variant.removeprefix(prefix) for variant in sorted(paced.rounds[0]) if not paced.reached(variant)]
    rows = Table(
        title=f"{paced.rate:.0f} requests/s over {PACED_CONNECTIONS} connections: 70 % of frozen at saturation",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
        caption=f"* too slow for {paced.rate:.0f} requests/s: {', '.join(slow)}" if slow else None,
    )
    _columns(rows, "variant", "reached\n/s", "p50\nms", "p99 ms", "p99 ÷ frozen", "learned", "failed,\n429")
    found = ratios(paced.rounds, prefix)
    for variant in sorted(paced.rounds[0]):
        loads = [each[variant].load for each in paced.rounds]
        over = found.get(f"p99_{variant}_over_{prefix}{FROZEN}")
        rows.add_row(
            variant.removeprefix(prefix),
            Spread.of(load.rps for load in loads).middle + ("" if paced.reached(variant) else "*"),
            Spread.of(load.p50_ms for load in loads).middle,
            str(Spread.of(load.p99_ms for load in loads)),
            str(over) if over else "",
            Spread.of(each[variant].share_learned for each in paced.rounds).middle,
            _not_answered(loads),
        )
    return rows


def _columns(rows: Table, *names: str) -> None:
    for name in names:
        rows.add_column(name, justify="left" if name == "variant" else "right", no_wrap=True)


def _not_answered(loads: Sequence[wrk.Load]) -> str:
    """Failed and refused requests of all rounds."""
    return f"{sum(load.failed for load in loads)}, {sum(load.refused for load in loads)}"


def panels(rounds: Rounds, title: str, prefix: str = "") -> list[plots.Bars]:
    """Two panels of a picture: requests/s and p99 by connections, a bar and its range for each variant."""
    measured: tuple[tuple[str, str, Callable[[wrk.Load], float]], ...] = (
        ("requests per second", "requests/s, higher is better", lambda load: load.rps),
        ("99th percentile of the latency", "p99 (ms), lower is better", lambda load: load.p99_ms),
    )
    known = next(iter(rounds.values()))[0]
    variants = [prefix + name for name in SHOWN if prefix + name in known]
    found = []
    for what, unit, of in measured:
        spreads = {
            name: [Spread.of(of(each[name].load) for each in several) for several in rounds.values()]
            for name in variants
        }
        found.append(
            plots.Bars(
                title=f"{title}: {what}, median and range",
                unit=unit,
                groups="connections",
                labels=[str(count) for count in rounds],
                series={
                    name.removeprefix(prefix): [spread.median for spread in each] for name, each in spreads.items()
                },
                ranges={
                    name.removeprefix(prefix): [(spread.low, spread.high) for spread in each]
                    for name, each in spreads.items()
                },
                numbers=True,
                logarithmic="p99" in unit,
            )
        )
    return found


def paced_panel(paced: Paced, title: str, prefix: str = "") -> plots.Bars:
    """p99 at 70 % of the frozen model's saturation, a bar and its range for each variant."""
    variants = [name for name in SHOWN if prefix + name in paced.rounds[0]]
    spreads = [Spread.of(each[prefix + name].load.p99_ms for each in paced.rounds) for name in variants]
    return plots.Bars(
        title=f"{title}: at 70 % of the frozen model's requests/s, median and range",
        unit="p99 (ms), lower is better",
        labels=variants,
        series={f"{paced.rate:.0f} requests/s": [spread.median for spread in spreads]},
        ranges={f"{paced.rate:.0f} requests/s": [(spread.low, spread.high) for spread in spreads]},
        numbers=True,
    )


def own_models() -> list[dict[str, Any]]:
    adapting = {"name": "digits", "source": {"builtin": "digits"}, "adapter": "eata", "adaptation": {"mode": "async"}}
    return [
        adapting,
        without_gate(adapting, "learning"),
        {"name": "frozen", "source": {"builtin": "digits"}, "adapter": "source"},
        {"name": "noop", "source": {"builtin": "noop"}, "adapter": "source"},
    ]


def resnet20_models(data: Path) -> list[dict[str, Any]]:
    adapting = cifar.served_model(data, "resnet20", "eata", mode="async")
    return [
        adapting,
        without_gate(adapting, "resnet20-learning"),
        cifar.served_model(data, "resnet20-frozen", "source", mode="async"),
    ]


def without_gate(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same model under another name, that always learns."""
    return {**model, "name": name, "adaptation": {**model["adaptation"], "gate": False}}


def present(url: str, models: Mapping[str, str], optional: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """The variants whose model is there.

    Raises:
        LoadTestError: one is not, and is not optional.
    """
    for variant, model in models.items():
        with Client(url, model) as client:
            if client.ready():
                yield variant, model
            elif variant not in optional:
                raise LoadTestError(f"{url} has no model {model!r} that is ready; see --model, --frozen-model")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it the script starts its own")
    parser.add_argument("--model", default="digits", help="the adapting model there (default: digits)")
    parser.add_argument(
        "--learning-model",
        default="learning",
        help="the same with `gate: false`, left out if absent (default: learning)",
    )
    parser.add_argument("--frozen-model", default="frozen", help="the same without an adapter (default: frozen)")
    parser.add_argument(
        "--noop-model", default="noop", help="one that does nothing, left out if absent (default: noop)"
    )
    parser.add_argument("--seconds", type=int, default=3, help="of one interval, at 70 %% twice as long (default: 3)")
    parser.add_argument("--pairs", type=int, default=5, help=f"rounds, {PAIRS_MIN} or more (default: 5)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the CIFAR files: measure ResNet-20 too")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.pairs < PAIRS_MIN:
        parser.error(f"--pairs must be {PAIRS_MIN} or more, not {args.pairs}")
    if not 1 <= args.seconds <= 600:
        parser.error(f"--seconds must be 1 to 600, not {args.seconds}")
    if args.data and args.url:
        parser.error("--data measures ResNet-20 on a server of the script's own; leave out --url")
    return args


def measure_server(
    url: str, models: Mapping[str, str], samples: Samples, args: argparse.Namespace, console: Console
) -> tuple[Rounds, Paced]:
    """Every variant at each number of connections, and then at 70 % of what the frozen one answered.

    Raises:
        LoadTestError: the frozen one answered nothing.
    """
    (frozen,) = (variant for variant in models if variant.endswith(FROZEN))
    with Server(url, models, samples, args.seconds, console.print) as server:
        server.warm()

        def told(interval: Interval, variant: str, where: str) -> Interval:
            load = interval.load
            console.print(f"{where}, {variant}: {load.rps:.0f} requests/s, p99 {load.p99_ms:.1f} ms")
            return interval

        def measure(variant: str, connections: int) -> Interval:
            return told(server.measure(variant, connections), variant, f"{connections:3} connections")

        rounds = play(list(models), CONNECTIONS, args.pairs, measure)
        rate = pace(rounds, frozen)
        if not rate:
            raise LoadTestError(f"{url}: {models[frozen]!r} answered nothing, so there is no rate to measure others at")

        def measure_paced(variant: str) -> Interval:
            return told(server.measure_paced(variant, rate), variant, f"{rate:.0f} requests/s")

        return rounds, Paced(rate, alternate(list(models), args.pairs, measure_paced))


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    wrk.check_installed()
    hey.check_installed()
    resnet20 = resnet20_models(args.data) if args.data else []
    console = Console()
    measured: list[Measured] = []
    with ExitStack() as stack:
        models = {ADAPTING: "digits", LEARNING: "learning", FROZEN: "frozen", NOOP: "noop"}
        url = args.url
        if url:
            asked = {
                ADAPTING: args.model,
                LEARNING: args.learning_model,
                FROZEN: args.frozen_model,
                NOOP: args.noop_model,
            }
            models = dict(present(url, asked, optional=(LEARNING, NOOP)))
        else:
            url = stack.enter_context(own_server(own_models()))
        found = measure_server(url, models, digits(), args, console)
        measured.append(Measured(f"{models[ADAPTING]}, one image a request", "", *found))
    if resnet20:
        models = {RESNET20 + name: f"resnet20-{name}" for name in (LEARNING, FROZEN)}
        models = {RESNET20 + ADAPTING: "resnet20", **models}
        with own_server(resnet20) as url:
            found = measure_server(url, models, photographs(args.data), args, console)
        measured.append(Measured("ResNet-20, one image a request", RESNET20, *found))
    tell(measured, console, args)
    return 0


def tell(measured: Sequence[Measured], console: Console, args: argparse.Namespace) -> None:
    """Print the tables; write the figures and the picture where they are asked for."""
    found: dict[str, float] = {}
    pictures: list[plots.Bars] = []
    for title, prefix, rounds, paced in measured:
        console.print(table(rounds, title, prefix), ratio_table(rounds, prefix), paced_table(paced, prefix))
        found |= figures(rounds, prefix) | paced_figures(paced, prefix)
        pictures += [*panels(rounds, title, prefix), paced_panel(paced, title, prefix)]
    found |= totals(found)
    console.print(f"failed: {found['failed_requests']:.0f}, refused (429): {found['refused_requests']:.0f}")
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "throughput", found)
    if args.plot:
        plots.draw(args.plot, pictures)


if __name__ == "__main__":
    run(main)
