"""Images per second of one forward: eager, compiled, and the frozen model in ONNX Runtime, in one process.

    python loadtests/runtime.py [--models resnet20,resnet18,mobilenet_v3_small] [--batch 16] [--rounds 5] [--threads 1]
                                [--cache DIR] [--json FILE] [--plot FILE]

Every row of the batch belongs to a stream of its own, with its own scale, shift and statistics; ONNX Runtime answers
for the frozen model, which is all that it can do at that price. Before anything counts, each must agree with the
others. The order changes from round to round, and ratios are formed within a round. The weights are random: they
change no timing.

`compile_s/cold` is what a first start takes for all buckets up to the batch, from an empty cache; `compile_s/warm` what
the next one takes, in a process of its own as well.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnxruntime
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adapters import Groups, Modulation, Network, Statistics
from loadtests import plots, report, resnet20
from loadtests.errors import LoadTestError, run
from loadtests.rounds import Spread, order
from tta_serve.runtime import CACHE_VARIABLE, Compiled, Runtime, buckets, build_runtime

EAGER, COMPILE, ONNX = "eager", "compile", "onnx"
RATIOS = ((COMPILE, EAGER), (COMPILE, ONNX), (EAGER, ONNX))
ROUNDS_MIN = 3  # a median and a range of fewer say nothing
INTERVAL_S = 1.0  # at least this long runs one variant in one round
AGREE = 1e-3  # answers may differ by this share of the largest
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20.build, (3, 32, 32)),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), (3, 224, 224)),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(weights=None), (3, 224, 224)),
}

Forward = Callable[[], Tensor]
Rounds = list[dict[str, float]]  # of each round: variant → images/s


def build(name: str) -> nn.Module:
    """The model with random weights, always the same."""
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def own_states(network: Network, rows: int) -> Modulation:
    """As many streams as rows, each a little away from the source."""
    random = torch.Generator().manual_seed(1)

    def near(value: Tensor) -> Tensor:
        return value + 0.1 * torch.rand(rows, network.channels, generator=random)

    return Modulation(
        scale=near(network.scale),
        shift=near(network.shift),
        mean=near(network.mean),
        var=near(network.var),
        rows=torch.arange(rows),
        groups=Groups.of((1,) * rows),
        statistics=Statistics.KNOWN,
    )


def onnx_forward(model: nn.Module, x: Tensor, threads: int, folder: Path) -> Forward:
    """The frozen model in ONNX Runtime, on the same images."""
    file = folder / "model.onnx"
    with warnings.catch_warnings():
        # torch warns of its older exporter; the newer one needs onnxscript besides, and gives the same operators
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["logits"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = x.numpy()
    return lambda: torch.from_numpy(session.run(["logits"], {"x": images})[0])


def check_agreement(what: str, found: Tensor, expected: Tensor) -> None:
    """Before timing: whether both compute the same.

    Raises:
        LoadTestError: they do not.
    """
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= AGREE * largest:  # NaN is refused too
        raise LoadTestError(f"{what}: answers differ by {difference:.3g}, the largest is {largest:.3g}")


def variants(network: Network, x: Tensor, compiled: Runtime, onnx: Forward) -> dict[str, Forward]:
    """What is timed, after a check that they agree.

    Raises:
        LoadTestError: they do not, or nothing was compiled.
    """
    if not isinstance(compiled, Compiled):
        raise LoadTestError("the model was not compiled; the line above says why")
    states = own_states(network, len(x))
    check_agreement("ONNX Runtime and torch, frozen", onnx(), network(x).logits)
    check_agreement("compiled and eager", compiled.forward(x, states).logits, network(x, states).logits)
    return {
        EAGER: lambda: network(x, states).logits,
        COMPILE: lambda: compiled.forward(x, states).logits,
        ONNX: onnx,
    }


def play(forwards: Mapping[str, Forward], images: int, rounds: int, clock: Callable[[], float]) -> Rounds:
    """Images/s of each variant in each round; the first forward of an interval does not count."""

    def measure(forward: Forward) -> float:
        forward()
        begun, done = clock(), 0
        while (elapsed := clock() - begun) < INTERVAL_S or not done:
            forward()
            done += 1
        return images * done / elapsed

    return [{name: measure(forwards[name]) for name in order(list(forwards), number)} for number in range(rounds)]


def ratio(rounds: Rounds, above: str, below: str) -> Spread:
    return Spread.of(each[above] / each[below] for each in rounds)


def figures(model: str, rounds: Rounds, compile_s: Mapping[str, float]) -> dict[str, float]:
    """Medians and ranges, in the names of the JSON form."""
    found: dict[str, float] = {f"compile_s/{start}/{model}": seconds for start, seconds in compile_s.items()}
    spreads = {f"images_per_s/{name}/{model}": Spread.of(each[name] for each in rounds) for name in rounds[0]}
    spreads |= {f"ratio/{above}_over_{below}/{model}": ratio(rounds, above, below) for above, below in RATIOS}
    for name, spread in spreads.items():
        what, _, which = name.partition("/")
        found |= {name: spread.median, f"{what}_min/{which}": spread.low, f"{what}_max/{which}": spread.high}
    return found


def table(measured: Mapping[str, Rounds], compile_s: Mapping[str, Mapping[str, float]]) -> Table:
    rows = Table(title="One forward, a stream a row: median (range) of images/s and of ratios within a round")
    rows.add_column("", no_wrap=True)
    for model in measured:
        rows.add_column(model, justify="right")
    for name in (EAGER, COMPILE, ONNX):
        frozen = " (frozen)" if name == ONNX else ""
        rows.add_row(
            f"{name}{frozen}, images/s", *(str(Spread.of(r[name] for r in rounds)) for rounds in measured.values())
        )
    for above, below in RATIOS:
        rows.add_row(f"{above} ÷ {below}", *(str(ratio(rounds, above, below)) for rounds in measured.values()))
    for start in ("cold", "warm"):
        rows.add_row(f"compiling, {start}, s", *(f"{compile_s[model][start]:.0f}" for model in measured))
    return rows


def panel(measured: Mapping[str, Rounds]) -> plots.Bars:
    spreads = {
        f"{above} ÷ {below}": [ratio(rounds, above, below) for rounds in measured.values()] for above, below in RATIOS
    }
    return plots.Bars(
        title="images/s with a stream a row, median and range",
        unit="ratio, higher is better",
        labels=list(measured),
        series={name: [spread.median for spread in each] for name, each in spreads.items()},
        ranges={name: [(spread.low, spread.high) for spread in each] for name, each in spreads.items()},
        levels={"equal": 1.0},
        numbers=True,
    )


def compile_seconds(model: str, batch: int, threads: int, cache: Path) -> float:
    """Seconds that a start of its own takes to have everything compiled.

    Raises:
        LoadTestError: it failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--models", model, "--batch", str(batch)]
    command += ["--threads", str(threads), "--only-compile"]
    environment = {**os.environ, CACHE_VARIABLE: str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LoadTestError(f"{model} does not compile: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def build_compiled(name: str, network: Network, batch: int, threads: int) -> tuple[Runtime, float]:
    """The runtime, and the seconds it took to be ready."""
    begun = time.perf_counter()
    compiled = build_runtime("compile", network, MODELS[name][1], batch, threads)
    return compiled, time.perf_counter() - begun


def measure(name: str, args: argparse.Namespace, folder: Path) -> Rounds:
    network = Network(build(name))
    x = torch.rand(args.batch, *MODELS[name][1], generator=torch.Generator().manual_seed(2))
    compiled, _ = build_compiled(name, network, args.batch, args.threads)
    onnx = onnx_forward(build(name), x, args.threads, folder)
    return play(variants(network, x, compiled, onnx), args.batch, args.rounds, time.perf_counter)


def model_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"no model named {', '.join(unknown)}; there are {', '.join(MODELS)}")
    return names


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=model_names, default=tuple(MODELS), metavar="A,B", help=f"default: {','.join(MODELS)}"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows of the forward (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help=f"{ROUNDS_MIN} or more (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of each forward (default: 1)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled graphs here (default: a new folder)")
    parser.add_argument("--only-compile", action="store_true", help="print the seconds until all is compiled, and end")
    report.add_arguments(parser)
    args = parser.parse_args(given)
    if args.rounds < ROUNDS_MIN:
        parser.error(f"--rounds must be {ROUNDS_MIN} or more, not {args.rounds}")
    if args.batch < 1 or args.threads < 1:
        parser.error("--batch and --threads must be 1 or more")
    return args


def only_compile(args: argparse.Namespace) -> int:
    for name in args.models:
        compiled, seconds = build_compiled(name, Network(build(name)), args.batch, args.threads)
        if not isinstance(compiled, Compiled):
            return 1  # the log says why
        print(f"{name}: {len(buckets(args.batch))} buckets in s: {seconds:.3f}")
    return 0


@torch.no_grad()
def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    torch.set_num_threads(args.threads)
    if args.only_compile:
        return only_compile(args)
    console = Console()
    measured: dict[str, Rounds] = {}
    compile_s: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = args.cache or folder / "cache"
        os.environ[CACHE_VARIABLE] = str(cache)
        for name in args.models:
            compile_s[name] = {}
            for start in ("cold", "warm"):
                compile_s[name][start] = compile_seconds(name, args.batch, args.threads, cache)
                console.print(f"{name}: compiled in {compile_s[name][start]:.1f} s ({start})")
            measured[name] = measure(name, args, folder)
    console.print(table(measured, compile_s))
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        found: dict[str, float] = {}
        for name, rounds in measured.items():
            found |= figures(name, rounds, compile_s[name])
        report.write_json(args.json, "runtime", found)
    if args.plot:
        plots.draw(args.plot, [panel(measured)])
    return 0


if __name__ == "__main__":
    run(main)
