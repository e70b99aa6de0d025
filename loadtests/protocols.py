"""Error under distribution shift in eight protocols: this server's default beside the methods that it must not lose to.

ResNet-20 on the 15 corruptions of CIFAR-10-C at severity 5, in process. Each protocol is played by the frozen model, by
batch statistics, by EATA as published, by EATA with a state per stream id, and by the server's default (`mode: async`),
drained: after each request its learner finishes, so that a run can be repeated. `loadtests/shift.py` checks the same
over HTTP.

    python loadtests/protocols.py --data DIR [--jobs 2] [--json FILE] [--plot FILE]
    python loadtests/protocols.py --data DIR --protocols continual,mixed --methods frozen,eata,default
    python loadtests/protocols.py --data DIR --keep RUNS --eata-cost 3 --default-cost 4   # can be stopped and gone on

per_shift     a fresh state for each corruption, its images in order
continual     the corruptions in a row, no reset
interleaved   batch 1 of each corruption in turn, then batch 2 …; each corruption has its stream id
mixed         every batch holds all corruptions; with stream ids it is one request for each
correlated    as per_shift, with labels in runs
batch_of_one  as per_shift, one image a request; the default's rows gather until a step has enough
recurring     A, B, C, A, B, C, A, B, C without reset: the error at each visit
full_rate     continual, arriving as fast as the frozen model answers (Alfarra et al., ICML 2024, arXiv 2304.04795)

Per protocol: the mean error; the difference to the default's with its paired standard error over all answers;
forgetting (the error of the learned parameters on clean images minus that of the source's, both under the same batches'
own statistics) and source mismatch (the error of the whole state on them), as means over the streams; and whether the
default is lowest, or within two standard errors of the lowest, and forgets at most 0.5 points and one standard error.
All of it takes 40 minutes on two cores.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import protocol_figures, protocol_keep, protocol_table, report
from loadtests.errors import run
from loadtests.protocol_full_rate import Costs
from loadtests.protocol_images import load_orders
from loadtests.protocol_jobs import METHODS, Job, Run, Settings, jobs_of, measure_costs, work
from loadtests.protocol_orders import PROTOCOLS
from loadtests.protocol_pool import run_jobs

BATCH = 200
BATCH_MAX = 256  # rows of one of the learner's steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the CIFAR files")
    parser.add_argument(
        "--protocols", type=_some(PROTOCOLS), default=PROTOCOLS, help="some, with commas (default: all)"
    )
    parser.add_argument("--methods", type=_some(METHODS), default=METHODS, help="some, with commas (default: all)")
    parser.add_argument("--corruptions", type=_split, default=(), help="some, with commas (default: all)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"images a request (default: {BATCH})")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument(
        "--eata-cost", type=float, help="of EATA's step in full_rate, in frozen forwards (default: timed)"
    )
    parser.add_argument("--default-cost", type=float, help="of the default's step there (default: timed)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each run here, and use those that are kept")
    report.add_arguments(parser)
    args = parser.parse_args()
    if not 1 <= args.batch <= BATCH_MAX:
        parser.error(f"--batch must be 1 … {BATCH_MAX}, not {args.batch}")
    if args.jobs < 1:
        parser.error(f"--jobs must be 1 or more, not {args.jobs}")
    for cost in (args.eata_cost, args.default_cost):
        if cost is not None and cost <= 0:
            parser.error(f"a cost must be above 0, not {cost}")
    return args


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _some(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads some of the known names, in their known order."""

    def read(text: str) -> tuple[str, ...]:
        if unknown := set(_split(text)) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
        return tuple(name for name in known if name in _split(text))

    return read


def timed_costs(args: argparse.Namespace, settings: Settings) -> Costs | None:
    """What steps cost, where `full_rate` needs it: timed, unless it is told."""
    if "full_rate" not in args.protocols or not {"eata", "eata_per_stream", "default"} & set(args.methods):
        return None
    timed = measure_costs(settings)
    return timed._replace(eata=args.eata_cost or timed.eata, default=args.default_cost or timed.default)


def work_or_load(settings: Settings, costs: Costs | None, keep: Path | None, job: Job) -> Run:
    """Do a run, or take it from where it is kept."""
    if keep is None:
        return work(settings, costs, job)
    paid = costs if job.protocol == "full_rate" else None
    cost = None if paid is None else paid.default if job.method == "default" else paid.eata
    asked_for = protocol_keep.described(settings, cost)
    done = protocol_keep.load(keep, job, asked_for)
    if done is None:
        done = work(settings, costs, job)
        protocol_keep.save(keep, job, asked_for, done)
    return done


def progress(jobs: Sequence[Job]) -> Callable[[Job, Run], None]:
    """Tells on stderr of each run that is done."""
    began_s, done = time.monotonic(), []

    def tell(job: Job, result: Run) -> None:
        done.append(job)
        error = 100 * float(result.wrong[result.asked].mean())
        passed_s = time.monotonic() - began_s
        print(
            f"[{len(done)}/{len(jobs)}, {passed_s:.0f} s] {job.method}, {job.protocol}: {error:.2f} %", file=sys.stderr
        )

    return tell


def main() -> int:
    args = parse()
    report.check_outputs(args.json, args.plot)
    began_s = time.monotonic()
    settings = Settings(args.data, args.corruptions, args.batch)
    orders = load_orders(*settings)
    costs = timed_costs(args, settings)
    jobs = jobs_of(args.methods, args.protocols)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    outcome = run_jobs(jobs, partial(work_or_load, settings, costs, args.keep), args.jobs, progress(jobs))
    rows = [protocol_figures.row(protocol, args.methods, outcome.results, orders) for protocol in args.protocols]
    console = Console()
    reference = args.batch == BATCH and not args.corruptions
    console.print(protocol_table.errors(rows, args.methods, reference=reference))
    if learning := [method for method in ("eata", "default") if method in args.methods]:
        console.print(protocol_table.memory(rows, learning))
    for row in rows:
        if row.protocol == "recurring":
            console.print(protocol_table.visits(row))
        if row.protocol == "full_rate" and costs:
            console.print(protocol_table.costs_line(costs, row), soft_wrap=True)
    for job, why in outcome.failures.items():
        print(f"failed: {job.method}, {job.protocol}: {why}", file=sys.stderr)
    console.print(f"{time.monotonic() - began_s:.0f} s; {report.machine_line()}", soft_wrap=True)
    if args.json:
        report.write_json(args.json, "protocols", protocol_figures.figures(rows) | cost_figures(costs))
    if args.plot:
        protocol_table.plot(args.plot, rows, args.methods)
    return 1 if outcome.failures else 0


def cost_figures(costs: Costs | None) -> dict[str, float]:
    """In frozen forwards of one batch, and that forward itself."""
    if costs is None:
        return {}
    return {
        "cost/full_rate/eata": costs.eata,
        "cost/full_rate/default": costs.default,
        "forward_ms/full_rate/frozen": 1000 * costs.forward_s,
    }


if __name__ == "__main__":
    run(main)
