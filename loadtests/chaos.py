"""Kills and broken disks under traffic: what is lost, what is torn, and how long until all is well again.

32 streams ask 2 replicas of the built-in `digits` model without a pause, each learning from what it sends, while faults
befall the server, one after the other, in an order drawn from a seed:

- `replica`: kill -9 of one of the two.
- `full_disk`: no file of the replicas can grow; `no_folder`: the store's folder is away; `locked`: another process
  has the database to itself. Each lasts for some seconds and is then undone.
- `haproxy`: kill -9 of HAProxy, which Ray Serve has to notice and start again.
- `node`: kill -9 of every process of `tta-serve up`, which is then started again with the same store. At least one
  where there are 30 faults.

There is no process between the replicas and the store, each opens the database itself; so none such can be killed.

    python loadtests/chaos.py [--faults 30] [--seed 0] [--json FILE] [--plot FILE]

It starts its own server on a free port, and can be pointed at no other one. 30 faults take 10 to 15 minutes on 2 cores;
after `--max-s` no further one is begun.

`failed_requests` counts requests without an answer after 3 retries; those under way while HAProxy or the whole node was
down are `outage_requests` instead. `versions_lost`: of each stream, the largest version that any answer told of
earlier than one sync interval (and a tick) before a fault, above what the store has right after it; the younger ones
are `versions_lost_in_interval`. `learning_lost_max_s`: how long before its kill the oldest learning that was lost had
first been told of. `torn`: snapshots that a server would refuse, of all that were looked at every 0.2 s.
Recovery: from the kill, or from when the fault was undone, until every stream has been answered within 2 s and `ready`
says, to each of several looks in a row, that the store can be written. The next fault comes when, besides, answers
of as many replicas as there should be were seen: `whole_p50_s`.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import chaos_faults, chaos_figures, plots, report
from loadtests.chaos_figures import Loss, Passed, loss_of
from loadtests.chaos_plan import KILLS, KINDS, LEARNING_ENDS, Fault, Kind, draw
from loadtests.chaos_ready import Readiness, good_since
from loadtests.chaos_traffic import Traffic, named_since, served_since
from loadtests.chaos_watch import Watch
from loadtests.errors import LoadTestError, run
from loadtests.server import OwnServer

MODEL = "digits"
REPLICAS = 2
STREAMS = 32
SYNC_INTERVAL_S = 1.0
TICK_S = 0.05  # what a replica needs to notice that the interval is over
FAULT_S = 30.0  # for each fault, on the whole
WARM_S = 5.0
ANSWER_S = 2.0  # within which a stream that is well is answered
RECOVERY_MAX_S = 240.0
STORE = "states"  # the folder
LOOKS_MAX_S = 10.0  # at a database that cannot be read for once


class Play:
    """One server, and faults that befall it.

    Args:
        server: started.
        traffic: under way.
        ready: looking.
        watch: looking.
        told: gets what a user has to know about how it goes, in words.
    """

    def __init__(
        self, server: OwnServer, traffic: Traffic, ready: Readiness, watch: Watch, told: Callable[[str], object]
    ) -> None:
        self._server = server
        self._traffic = traffic
        self._ready = ready
        self._watch = watch
        self._told = told
        self._judged_s = time.monotonic()  # losses before are counted
        self._of_store = chaos_faults.store_faults(server, MODEL, database(server))

    def play(self, faults: Sequence[Fault], until_s: float) -> list[Passed]:
        """Let the faults come, one when all is well after the other; none after `until_s` (monotonic)."""
        passed: list[Passed] = []
        for number, fault in enumerate(faults, start=1):
            time.sleep(fault.pause_s)
            if time.monotonic() > until_s:
                self._told(f"the time is over: {len(faults) - number + 1} faults are left out")
                break
            passed.append(self._befall(fault))
            self._told(f"{number:3}. {said_of(passed[-1])}")
            if passed[-1].whole_s is None:
                self._told("it did not recover: the server is killed and started again")
                chaos_faults.kill_node(self._server)
                self._server.start()
            self._judged_s = time.monotonic()
        return passed

    def _befall(self, fault: Fault) -> Passed:
        began_s = time.monotonic()
        if fault.kind in KILLS:
            ended_s = self._kill(fault)
            loss = self._loss(ended_s)
            if fault.kind == "node":
                self._server.start()
        else:
            ended_s = chaos_faults.last(self._of_store[fault.kind](), fault.lasts_s)
            loss = Loss()
        served_s, whole_s = self._wait(ended_s)
        if fault.kind not in LEARNING_ENDS and whole_s is not None:  # nothing may be lost at all
            time.sleep(SYNC_INTERVAL_S + TICK_S)
            loss = self._loss(ended_s, allowed_s=0.0)
        told = any(look.degraded for look in self._ready.looks() if look.at_s >= began_s)
        return Passed(fault.kind, began_s, ended_s, served_s, whole_s, told, loss)

    def _kill(self, fault: Fault) -> float:
        if fault.kind == "replica":
            return chaos_faults.kill_replica(self._server, MODEL, fault.chance)
        if fault.kind == "haproxy":
            return chaos_faults.kill_haproxy(self._server)
        return chaos_faults.kill_node(self._server)

    def _loss(self, at_s: float, allowed_s: float = SYNC_INTERVAL_S + TICK_S) -> Loss:
        until_s = time.monotonic() + LOOKS_MAX_S
        while (stored := self._watch.look()) is None:
            if time.monotonic() > until_s:
                raise LoadTestError(f"{database(self._server)} could not be read for {LOOKS_MAX_S:.0f} s")
        return loss_of(self._traffic.outcomes(), stored, at_s, allowed_s, self._judged_s)

    def _wait(self, since_s: float) -> tuple[float | None, float | None]:
        """When all streams are served and the store can be written, and when all replicas answer; None: not in time."""
        served_s = None
        until_s = time.monotonic() + RECOVERY_MAX_S
        while time.monotonic() < until_s:
            time.sleep(0.05)
            outcomes, looks = self._traffic.outcomes(), self._ready.looks()
            served = served_since(outcomes, self._traffic.streams, since_s, ANSWER_S)
            good = good_since(looks, since_s)
            if served is None or good is None:
                continue
            served_s = served_s or max(served, good)
            if len(named_since(outcomes, since_s)) >= REPLICAS:
                return served_s, time.monotonic()
        return served_s, None


def said_of(passed: Passed) -> str:
    """One line on a fault."""
    loss = passed.loss
    lost = f", lost {loss.versions} versions (and {loss.versions_young} of the last interval, {loss.learning_s:.2f} s)"
    degraded = ", ready told" if passed.told else ""
    whole = "never" if passed.whole_s is None else f"{passed.whole_s - passed.ended_s:.1f} s"
    return f"{passed.kind}: recovered in {passed.recovery_s:.1f} s, whole in {whole}{degraded}{lost}"


def database(server: OwnServer) -> Path:
    return server.folder / STORE / MODEL / "states.db"


def configuration() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The model, with the defaults but for the gate: there shall always be something to lose; and the store."""
    model = {
        "name": MODEL,
        "source": {"builtin": MODEL},
        "replicas": REPLICAS,
        "adaptation": {"gate": False},
    }
    return [model], {"store": {"path": STORE, "sync_interval_s": SYNC_INTERVAL_S}}


def images() -> NDArray[np.uint8]:
    """What is sent: there is something to learn from it, uint8 [N, 3, H, W]."""
    from loadtests.throughput import digits  # slow to import

    return digits().shifted


def table_of(found: Mapping[str, float], kinds: Sequence[Kind]) -> Table:
    """A line for each kind of fault."""
    table = Table(title="Faults; times in s", box=box.SIMPLE_HEAD)
    table.add_column("kind", no_wrap=True)
    columns = {
        "faults": "faults",
        "recovery_p50_s": "recovery p50",
        "recovery_p99_s": "p99",
        "whole_p50_s": "whole p50",
        "versions_lost": "versions lost",
        "learning_lost_max_s": "oldest lost",
        "degraded_told": "ready told",
    }
    for column in columns.values():
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for kind in (*kinds, None):
        values = [found.get(f"{name}/{kind}" if kind else name, math.nan) for name in columns]
        shown = [
            "–" if math.isnan(value) else f"{value:.{2 if name.endswith('_s') else 0}f}"
            for name, value in zip(columns, values, strict=True)
        ]
        table.add_row(kind or "all", *shown)
    return table


def summary(found: Mapping[str, float]) -> str:
    """The figures of the whole run."""
    return (
        f"{found['faults']:.0f} faults; requests: {found['requests_sent']:.0f} sent, "
        f"{found['requests_answered']:.0f} answered, {found['requests_retried']:.0f} of them retried, "
        f"{found['failed_requests']:.0f} failed, {found['outage_requests']:.0f} without an answer in outages; "
        f"versions lost: {found['versions_lost']:.0f} "
        f"(and {found['versions_lost_in_interval']:.0f} of the last interval), "
        f"versions back: {found['versions_back']:.0f}, torn snapshots: {found['torn']:.0f}; "
        f"recovery p50 {found['recovery_p50_s']:.1f} s, p99 {found['recovery_p99_s']:.1f} s"
    )


def picture(found: Mapping[str, float]) -> list[plots.Bars]:
    """Recovery times; without the kinds of which one did not recover."""
    kinds = [kind for kind in KINDS if math.isfinite(found.get(f"recovery_p99_s/{kind}", math.nan))]
    values = {share: [found[f"recovery_{share}_s/{kind}"] for kind in kinds] for share in ("p50", "p99")}
    return [
        plots.Bars("Time to recover, by fault", "s, lower is better", kinds, values, numbers=True, logarithmic=True)
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="how many (default: 30)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of these kinds (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of faults and traffic (default: 0)")
    parser.add_argument(
        "--max-s", type=float, help=f"no fault is begun after so many seconds (default: {FAULT_S:.0f} for each fault)"
    )
    report.add_arguments(parser)
    args = parser.parse_args()
    if not 1 <= args.faults <= 1000:
        parser.error(f"--faults must be 1 to 1000, not {args.faults}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    args.max_s = FAULT_S * args.faults + WARM_S if args.max_s is None else args.max_s
    return args


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    console = Console()
    faults = draw(args.faults, args.seed, args.kinds)
    streams = [f"camera-{number}" for number in range(STREAMS)]
    models, settings = configuration()
    with tempfile.TemporaryDirectory(prefix="tta-loadtest-", ignore_cleanup_errors=True) as folder:
        server = OwnServer(models, Path(folder), settings)
        watch = Watch(database(server), MODEL)
        try:
            server.start()
            with (
                Readiness(server.url, MODEL) as ready,
                watch,
                Traffic(server.url, MODEL, streams, images(), args.seed) as traffic,
            ):
                time.sleep(WARM_S)
                play = Play(server, traffic, ready, watch, lambda line: console.print(line, soft_wrap=True))
                passed = play.play(faults, time.monotonic() + args.max_s)
            end_s = time.monotonic()
        finally:
            server.stop()
        console.print(
            f"{watch.check_all()} snapshots in the store at the end; {watch.looks} looks, {watch.blind} blind"
        )
    outcomes = traffic.outcomes()
    failed, excused = chaos_figures.failures(outcomes, chaos_figures.outages(passed, end_s))
    counts = chaos_figures.count(outcomes, failed, excused)
    found = chaos_figures.figures(passed, counts, len(watch.torn), len(watch.back))
    tell(found, console, args)
    for line in (*watch.torn, *watch.back, *(f"{each.id}: {each.error}" for each in failed)):
        console.print(line, soft_wrap=True)
    for line in (wrong := chaos_figures.missed(found, args.faults)):
        console.print(f"target missed: {line}", soft_wrap=True)
    return 1 if wrong else 0


def tell(found: Mapping[str, float], console: Console, args: argparse.Namespace) -> None:
    """Print the table; write the figures and the picture where they are asked for."""
    console.print(table_of(found, [kind for kind in KINDS if f"faults/{kind}" in found]))
    console.print(summary(found), soft_wrap=True)
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "chaos", found)
    if args.plot:
        plots.draw(args.plot, picture(found))


if __name__ == "__main__":
    run(main)
