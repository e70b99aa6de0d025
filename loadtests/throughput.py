"""Requests per second and latency over HTTP: adapting, frozen, and a model that does nothing, in one run.

Three models stand side by side: `adapting` learns from what it serves, `frozen` is the same network without an adapter,
and `noop` answers without a forward, which shows what HTTP alone costs. Each is loaded in turn at 1, 16 and 64
connections, one image a request. The order changes from round to round, so that whatever else the machine does meets
all of them; told are the median over the rounds and the range, for the ratio adapting ÷ frozen (within a round) too.

    python loadtests/throughput.py [--seconds 5] [--pairs 5] [--data DIR] [--json FILE] [--plot FILE]
    python loadtests/throughput.py --url http://127.0.0.1:8000 --model digits --frozen-model frozen --noop-model noop

Without --url it starts its own server with the built-in digits model; with --data it then measures the CIFAR ResNet-20
likewise. The load generator is wrk (Debian package `wrk`); it shares the machine's cores with a server of the script's
own. The images are digits with black and white exchanged, which is a shift: there is something to learn.

`share_learned` is the rows that the learner took ÷ the rows served within the interval. `failed_requests` counts
answers other than 2xx and 429, and requests without an answer; `refused_requests` counts 429. Neither counts in
requests/s.
"""

import argparse
import math
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import cifar, plots, report, wrk
from loadtests.client import Client, Encoded, encode
from loadtests.errors import LoadTestError, run
from loadtests.rounds import (
    ADAPTING,
    FROZEN,
    NOOP,
    Interval,
    Rounds,
    Spread,
    figures,
    play,
    ratios,
    saturation,
    totals,
)
from loadtests.server import own_server

CONNECTIONS = (1, 16, 64)
PAIRS_MIN = 3  # a median and a range of fewer say nothing
WARM_SECONDS = 2
IMAGES = 32  # different ones, sent in turn
CAPTION = "median (range) over {pairs} rounds; learned: share of the rows; failed, 429: of all"
RESNET20 = "resnet20_"  # before the names of its variants


class Server:
    """Measures variants on a running server; each has a stream of its own.

    Args:
        url: the server's.
        models: variant → name of the model there.
        seconds: of an interval.
    """

    def __init__(self, url: str, models: Mapping[str, str], seconds: int) -> None:
        self.url = url.rstrip("/")
        self.seconds = seconds
        self.clients = {variant: Client(url, model) for variant, model in models.items()}
        self.streams = {variant: f"throughput-{secrets.token_hex(4)}-{variant}" for variant in models}
        self.requests = {variant: requests(stream) for variant, stream in self.streams.items()}

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
        """One interval. What still waits for the learner afterwards is waited for, so that it disturbs no other."""
        if not variant.endswith(ADAPTING):
            return Interval(self._load(variant, connections, self.seconds), math.nan)
        before = self._seen(variant)
        load = self._load(variant, connections, self.seconds)
        learned = self._seen(variant) - before
        self.clients[variant].drain(self.streams[variant])
        return Interval(load, learned / load.answered if load.answered else math.nan)

    def _load(self, variant: str, connections: int, seconds: int) -> wrk.Load:
        return wrk.load(self.url + self.clients[variant].infer_path, self.requests[variant], connections, seconds)

    def _seen(self, variant: str) -> int:
        """Rows that the learner has taken from the variant's stream; 0 while there is no such stream."""
        told = self.clients[variant].stream(self.streams[variant]) or {}
        return int(told.get("seen") or 0)


def requests(stream: str) -> list[Encoded]:
    """Requests of one image each, all with the same headers."""
    return [encode(image[np.newaxis], stream=stream) for image in inverted_digits(IMAGES)]


def inverted_digits(count: int) -> NDArray[np.uint8]:
    """scikit-learn's digits, four times enlarged, dark on white: uint8 [count, 3, 32, 32]."""
    from sklearn.datasets import load_digits  # slow to import, and only a measurement needs it

    small: NDArray[np.float64] = load_digits().images[:count]
    large = np.kron(small, np.ones((1, 4, 4)))
    grey = (255 - large * (255 / 16)).round().astype(np.uint8)
    return np.repeat(grey[:, np.newaxis], 3, axis=1)


def table(rounds: Rounds, title: str, prefix: str = "") -> Table:
    """A row for each number of connections and variant: median, and range in brackets."""
    pairs = len(next(iter(rounds.values())))
    rows = Table(
        title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True, caption=CAPTION.format(pairs=pairs)
    )
    rows.add_column("conn.", justify="right", no_wrap=True)
    rows.add_column("variant", no_wrap=True)
    for name in ("requests/s", "p50 ms", "p99 ms", "learned", "failed", "429"):
        rows.add_column(name, justify="right", no_wrap=True)
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
                str(sum(load.failed for load in loads)),
                str(sum(load.refused for load in loads)),
                end_section=number == len(several[0]) - 1,
            )
    return rows


def ratio_table(rounds: Rounds, prefix: str = "") -> Table:
    at = saturation(rounds, prefix + FROZEN)
    rows = Table(title="adapting ÷ frozen, within a round", caption=f"saturated at {at} connections")
    for name in ("connections", "requests/s", "p99"):
        rows.add_column(name, justify="right")
    for count, several in rounds.items():
        rows.add_row(str(count), *map(str, ratios(several, prefix).values()))
    return rows


def panels(rounds: Rounds, title: str, prefix: str = "") -> list[plots.Bars]:
    """Two panels of a picture: requests/s and p99 by connections, a bar and its range for each variant."""
    measured: tuple[tuple[str, str, Callable[[wrk.Load], float]], ...] = (
        ("requests per second", "requests/s, higher is better", lambda load: load.rps),
        ("99th percentile of the latency", "p99 (ms), lower is better", lambda load: load.p99_ms),
    )
    known = next(iter(rounds.values()))[0]
    variants = [prefix + name for name in (FROZEN, ADAPTING, NOOP) if prefix + name in known]
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


def own_models() -> list[dict[str, Any]]:
    return [
        {"name": "digits", "source": {"builtin": "digits"}, "adapter": "eata", "adaptation": {"mode": "async"}},
        {"name": "frozen", "source": {"builtin": "digits"}, "adapter": "source"},
        {"name": "noop", "source": {"builtin": "noop"}, "adapter": "source"},
    ]


def resnet20_models(data: Path) -> list[dict[str, Any]]:
    eata = {"eata": {"learning_rate": 0.001, "optimizer": "adam", "anchor_weight": 1.0}}
    return [
        cifar.served_model(data, "resnet20", eata, mode="async"),
        cifar.served_model(data, "resnet20-frozen", "source", mode="async"),
    ]


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
    parser.add_argument("--frozen-model", default="frozen", help="the same without an adapter (default: frozen)")
    parser.add_argument(
        "--noop-model", default="noop", help="one that does nothing, left out if absent (default: noop)"
    )
    parser.add_argument("--seconds", type=int, default=5, help="of one interval (default: 5)")
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


def measure_server(url: str, models: Mapping[str, str], args: argparse.Namespace, console: Console) -> Rounds:
    with Server(url, models, args.seconds) as server:
        server.warm()

        def measure(variant: str, connections: int) -> Interval:
            interval = server.measure(variant, connections)
            load = interval.load
            console.print(
                f"{connections:3} connections, {variant}: {load.rps:.0f} requests/s, p99 {load.p99_ms:.1f} ms"
            )
            return interval

        return play(list(models), CONNECTIONS, args.pairs, measure)


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    wrk.check_installed()
    resnet20 = resnet20_models(args.data) if args.data else []
    console = Console()
    measured: list[tuple[str, str, Rounds]] = []  # title, prefix, rounds
    with ExitStack() as stack:
        models = {ADAPTING: "digits", FROZEN: "frozen", NOOP: "noop"}
        url = args.url
        if url:
            asked = {ADAPTING: args.model, FROZEN: args.frozen_model, NOOP: args.noop_model}
            models = dict(present(url, asked, optional=(NOOP,)))
        else:
            url = stack.enter_context(own_server(own_models()))
        measured.append((f"{models[ADAPTING]}, one image a request", "", measure_server(url, models, args, console)))
    if resnet20:
        models = {RESNET20 + ADAPTING: "resnet20", RESNET20 + FROZEN: "resnet20-frozen"}
        with own_server(resnet20) as url:
            rounds = measure_server(url, models, args, console)
        measured.append(("ResNet-20, one image a request", RESNET20, rounds))
    found: dict[str, float] = {}
    for title, prefix, rounds in measured:
        console.print(table(rounds, title, prefix), ratio_table(rounds, prefix))
        found |= figures(rounds, prefix)
    found |= totals(found)
    console.print(f"failed: {found['failed_requests']:.0f}, refused (429): {found['refused_requests']:.0f}")
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "throughput", found)
    if args.plot:
        plots.draw(args.plot, [panel for title, prefix, rounds in measured for panel in panels(rounds, title, prefix)])
    return 0


if __name__ == "__main__":
    run(main)
