"""One stream with 80 % of the traffic, on 2 replicas: any replica for every request, or one replica for each stream.

Two servers with two replicas each stand side by side, alike but for how HAProxy spreads requests: `leastconn` (the
default) gives each to the replica that has fewer under way; `header` (`hdr(x-session-id)`) gives all of a stream to
one. The built-in `digits` model learns from what it is sent (`gate: false`), so with `leastconn` both replicas learn
from the hot stream, and bring together what they learned each second.

20 connections send single images: 16 those of the hot stream, 4 those of a stream each. First each sends as soon as it
has its answer, a fixed number of requests; then all together send 70 % of the requests/s that `leastconn` answered. The
servers are loaded in turn, and the order changes from round to round; told are the median over the rounds and the
range, for ratios (formed within a round) too.

    python loadtests/hot_stream.py [--seconds 3] [--pairs 5] [--json FILE] [--plot FILE]

It starts its own servers, and can be pointed at no other one; it takes about 5 minutes on two cores, which `hey`
(Debian package) shares with them. See `loadtests/hey.py` for what a rate that waits for answers hides.

`largest_share` is the share of the images that the busier replica answered.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import hey, plots, report
from loadtests.client import Encoded, encode
from loadtests.errors import LoadTestError, run
from loadtests.replicas_metrics import ReplicaMetrics, largest_share
from loadtests.rounds import PACE, REACHED, Spread, order
from loadtests.server import own_server
from loadtests.wrk import Load

MODEL = "digits"
REPLICAS = 2
HOT, OTHERS = 16, 4  # connections: the hot stream has 80 %
LEASTCONN, HEADER = "leastconn", "header"
BALANCE = {LEASTCONN: "leastconn", HEADER: "hdr(x-session-id)"}
RATE_MAX = 2000.0  # requests/s that no two cores answer: so each connection sends as soon as it has its answer
WARM_REQUESTS = 400
PAIRS_MIN = 3  # a median and a range of fewer say nothing
SETTINGS: dict[str, dict[str, Any]] = {"store": {"path": "states", "sync_interval_s": 1.0}}


class Interval(NamedTuple):
    """What one server did in one round."""

    load: Load
    largest_share: float


Round = Mapping[str, Interval]  # by balancing


class Server:
    """Two replicas behind one way of balancing.

    Args:
        url: the server's.
        requests: one for each connection.
    """

    def __init__(self, url: str, requests: Sequence[Encoded]) -> None:
        self._http = httpx.Client(base_url=url, timeout=60)
        self._metrics = ReplicaMetrics(self._http, MODEL, REPLICAS)
        self._url = f"{url}/v2/models/{MODEL}/infer"
        self._requests = requests

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def load(self, rate: float, seconds: float) -> Interval:
        """One interval; what waits for the learners afterwards is waited for, so that it disturbs no other one."""
        before = self._metrics.images()
        found = hey.load(self._url, self._requests, rate, seconds)
        after = self._metrics.images()
        self._metrics.drain()
        return Interval(found, largest_share([after[replica] - before[replica] for replica in after]))


def requests(hot: int = HOT, others: int = OTHERS) -> list[Encoded]:
    """One for each connection: each its own image, of which there is something to learn."""
    from loadtests.throughput import digits  # slow to import

    images = digits().shifted
    streams = ["hot"] * hot + [f"other-{number}" for number in range(others)]
    return [encode(image[np.newaxis], stream=stream) for image, stream in zip(images, streams, strict=False)]


def alternate(names: Sequence[str], pairs: int, measure: Callable[[str], Interval]) -> list[Round]:
    """Measure each in every round, the order changing."""
    return [{name: measure(name) for name in order(names, number)} for number in range(pairs)]


def ratio(rounds: Sequence[Round], of: Callable[[Load], float]) -> Spread:
    """Header ÷ leastconn, formed within each round."""
    pairs = [(of(each[HEADER].load), of(each[LEASTCONN].load)) for each in rounds]
    return Spread.of(header / least if least else math.nan for header, least in pairs)


def figures(saturated: Sequence[Round], paced: Sequence[Round], rate: float) -> dict[str, float]:
    """In the names of the JSON form; `_at_70`: at 70 % of what `leastconn` answered."""
    found = {f"rps_asked_at_70/{LEASTCONN}": rate}
    for suffix, rounds in (("", saturated), ("_at_70", paced)):
        for name in rounds[0]:
            loads = [each[name].load for each in rounds]
            for what, spread in (
                ("rps", Spread.of(load.rps for load in loads)),
                ("p50_ms", Spread.of(load.p50_ms for load in loads)),
                ("p99_ms", Spread.of(load.p99_ms for load in loads)),
                ("largest_share", Spread.of(each[name].largest_share for each in rounds)),
            ):
                found |= {
                    f"{what}{suffix}/{name}": spread.median,
                    f"{what}_min{suffix}/{name}": spread.low,
                    f"{what}_max{suffix}/{name}": spread.high,
                }
            found[f"failed_requests{suffix}/{name}"] = sum(load.failed for load in loads)
            found[f"refused_requests{suffix}/{name}"] = sum(load.refused for load in loads)
    found[f"ratio/{HEADER}_over_{LEASTCONN}"] = ratio(saturated, lambda load: load.rps).median
    found[f"ratio/p99_{HEADER}_over_{LEASTCONN}"] = ratio(paced, lambda load: load.p99_ms).median
    return found


def table(rounds: Sequence[Round], title: str) -> Table:
    """A line for each way of balancing: median, and range in brackets."""
    rows = Table(title=title, box=box.SIMPLE_HEAD, caption=f"median (range) over {len(rounds)} rounds")
    for name in ("balancing", "requests/s", "p50, ms", "p99, ms", "busier replica", "failed, 429"):
        rows.add_column(name, justify="left" if name == "balancing" else "right")
    for name in BALANCE:
        loads = [each[name].load for each in rounds]
        rows.add_row(
            name,
            str(Spread.of(load.rps for load in loads)),
            Spread.of(load.p50_ms for load in loads).middle,
            str(Spread.of(load.p99_ms for load in loads)),
            f"{Spread.of(each[name].largest_share for each in rounds).median:.0%}",
            f"{sum(load.failed for load in loads)}, {sum(load.refused for load in loads)}",
        )
    return rows


def summary(saturated: Sequence[Round], paced: Sequence[Round]) -> str:
    return (
        f"{HEADER} ÷ {LEASTCONN}: requests/s {ratio(saturated, lambda load: load.rps)}, p99 at the same rate "
        f"{ratio(paced, lambda load: load.p99_ms)}"
    )


def picture(saturated: Sequence[Round], paced: Sequence[Round]) -> list[plots.Bars]:
    measured: tuple[tuple[str, str, Sequence[Round], Callable[[Load], float]], ...] = (
        ("One hot stream: requests per second", "requests/s, higher is better", saturated, lambda load: load.rps),
        ("p99 at 70 % of that", "p99 (ms), lower is better", paced, lambda load: load.p99_ms),
    )
    panels = []
    for title, unit, rounds, of in measured:
        spreads = [Spread.of(of(each[name].load) for each in rounds) for name in BALANCE]
        series = {"2 replicas": [spread.median for spread in spreads]}
        ranges = {"2 replicas": [(spread.low, spread.high) for spread in spreads]}
        panels.append(plots.Bars(title, unit, list(BALANCE), series, ranges, numbers=True))
    return panels


def configuration() -> list[dict[str, Any]]:
    return [{"name": MODEL, "source": {"builtin": MODEL}, "replicas": REPLICAS, "adaptation": {"gate": False}}]


def measure(
    servers: Mapping[str, Server], pairs: int, seconds: float, told: Callable[[str], object]
) -> tuple[list[Round], list[Round], float]:
    """Both servers as fast as they answer, and then both at the same rate.

    Returns:
        The rounds of the one and the other, and that rate in requests/s.

    Raises:
        LoadTestError: nothing was answered.
    """
    for server in servers.values():
        server.load(RATE_MAX, WARM_REQUESTS / RATE_MAX)

    def said(interval: Interval, name: str, where: str) -> Interval:
        told(f"{where}, {name}: {interval.load.rps:.0f} requests/s, p99 {interval.load.p99_ms:.0f} ms")
        return interval

    first = servers[LEASTCONN].load(RATE_MAX, 2 * WARM_REQUESTS / RATE_MAX).load.rps
    share = first * seconds / RATE_MAX  # so that an interval lasts about as long as it shall
    saturated = alternate(
        list(servers), pairs, lambda name: said(servers[name].load(RATE_MAX, share), name, "saturated")
    )
    rate = PACE * Spread.of(each[LEASTCONN].load.rps for each in saturated).median
    if not rate:
        raise LoadTestError(f"{LEASTCONN} answered nothing, so there is no rate to measure at")
    paced = alternate(
        list(servers), pairs, lambda name: said(servers[name].load(rate, seconds), name, f"{rate:.0f} requests/s")
    )
    return saturated, paced, rate


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of an interval (default: 3)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds (default: 5)")
    report.add_arguments(parser)
    args = parser.parse_args()
    if not 1 <= args.seconds <= 600:
        parser.error(f"--seconds must be 1 to 600, not {args.seconds}")
    if args.pairs < PAIRS_MIN:
        parser.error(f"--pairs must be {PAIRS_MIN} or more, not {args.pairs}")
    return args


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    hey.check_installed()
    console, sent = Console(), requests()
    began_s = time.monotonic()
    with ExitStack() as stack:
        servers = {}
        for name, algorithm in BALANCE.items():
            environment = {"RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": algorithm}
            url = stack.enter_context(own_server(configuration(), settings=SETTINGS, environment=environment))
            servers[name] = stack.enter_context(Server(url, sent))
        saturated, paced, rate = measure(servers, args.pairs, args.seconds, console.print)
    console.print(table(saturated, "80 % of the traffic in one stream: each connection sends when it has its answer"))
    console.print(table(paced, f"{rate:.0f} requests/s: 70 % of {LEASTCONN} above"))
    console.print(summary(saturated, paced), soft_wrap=True)
    for name in BALANCE:
        if Spread.of(each[name].load.rps for each in paced).median < REACHED * rate:
            console.print(f"{name} was too slow for {rate:.0f} requests/s")
    console.print(f"{time.monotonic() - began_s:.0f} s; {report.machine_line()}", soft_wrap=True)
    if args.json:
        report.write_json(args.json, "hot_stream", figures(saturated, paced, rate))
    if args.plot:
        plots.draw(args.plot, picture(saturated, paced))
    return 0


if __name__ == "__main__":
    run(main)
