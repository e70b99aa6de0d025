"""Most tests trace with Dynamo and run the graph without a C++ compiler; two compile for real."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from adapters import Batch, Groups, Modulation, Network, Pipeline, Statistics, tree
from tta_serve import runtime
from tta_serve.runtime import Compiled, Eager, build_runtime

Rows = Callable[..., Tensor]
SHAPE = (3, 4, 4)
BUCKETS = (1, 2, 4, 8)


class Traced:
    """Compiles without C++: what Dynamo makes of the module, run as it stands. Counts compilations.

    Args:
        rigid: each graph takes one number of rows alone, as some models make it.
    """

    def __init__(self, rigid: bool = False) -> None:
        self.rigid = rigid
        self.rows: list[int] = []  # of each forward of a graph
        self.compiled = 0

    def __call__(self, module: nn.Module) -> runtime.Graph:
        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            self.compiled += 1
            return graph.forward

        compiled = torch.compile(module, backend=backend, fullgraph=True, recompile_limit=1, isolate_recompiles=True)
        taken: list[int] = []

        def graph(x: Tensor, a: Tensor, b: Tensor) -> Any:
            if self.rigid and taken and len(x) != taken[0]:
                raise FailOnRecompileLimitHit
            found = compiled(x, a, b)
            taken.append(len(x))
            self.rows.append(len(x))
            return found

        return graph


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def warmed(network: Network, compiler: Traced, buckets: tuple[int, ...] = BUCKETS) -> Compiled:
    compiled = Compiled(network, buckets, compile=compiler)
    compiled.warm(SHAPE)
    compiler.rows.clear()
    return compiled


def mixed(network: Network, rows: int, statistics: Statistics = Statistics.KNOWN) -> Modulation:
    """Every row of another stream, in an order that is not the table's."""
    of = torch.arange(rows * network.channels, dtype=torch.float32).reshape(rows, network.channels)
    return Modulation(
        scale=network.scale + 0.5 * of.sin(),
        shift=network.shift + 0.5 * of.cos(),
        mean=network.mean + 0.3 * (of + 1).sin(),
        var=network.var * (1.5 + (of + 2).sin()),
        rows=torch.arange(rows).flip(0),
        groups=Groups.of((1,) * rows),
        statistics=statistics,
    )


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this server warned of; torch has a log of its own."""
    ours = [record for record in caplog.records if record.name.startswith("tta_serve")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rigid", [False, True])
def test_compiled_answers_equal_eager_ones_at_every_edge_of_a_bucket(
    tiny: Callable[..., nn.Module], rows: Rows, rigid: bool
) -> None:
    network, compiler = Network(tiny()), Traced(rigid)
    compiled = warmed(network, compiler)
    graphs = compiler.compiled
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 19):
        x, told = rows(count), mixed(network, count)
        with torch.no_grad():
            expected = network(x, told)
        found = compiled.forward(x, told)
        same(found, expected)
        assert found.moments is None
        assert found.logits.shape == (count, 3)
    assert compiler.compiled == graphs  # nothing was compiled after the warm-up


def test_padding_and_parts(tiny: Callable[..., nn.Module], rows: Rows) -> None:
    network, compiler = Network(tiny()), Traced(rigid=True)
    compiled = warmed(network, compiler)
    assert compiler.compiled == 4
    for count, ran in ((1, [1]), (3, [4]), (5, [8]), (8, [8]), (11, [8, 4]), (17, [8, 8, 1])):
        compiler.rows.clear()
        compiled.forward(rows(count), mixed(network, count))
        assert compiler.rows == ran


def test_a_graph_that_takes_any_number_of_rows_is_shared_and_needs_no_padding(
    tiny: Callable[..., nn.Module], rows: Rows
) -> None:
    network, compiler = Network(tiny()), Traced()
    compiled = warmed(network, compiler)
    assert compiler.compiled == 2  # one row, and any other number
    for count in (1, 3, 5, 8):
        compiled.forward(rows(count), mixed(network, count))
    assert compiler.rows == [1, 3, 5, 8]


def test_padding_never_reaches_an_answer(tiny: Callable[..., nn.Module], rows: Rows) -> None:
    network, compiler = Network(tiny()), Traced(rigid=True)
    compiled = warmed(network, compiler)
    told = mixed(network, 5)
    # blank rows use the table's first state: it spoils them, and the one row that asked for it, and no other
    told.scale[0], told.mean[0] = torch.nan, torch.inf
    told = told._replace(rows=torch.tensor([1, 2, 0, 3, 4]))
    found = compiled.forward(rows(5), told).logits
    assert found.isfinite().all(dim=1).tolist() == [True, True, False, True, True]
    keep = [0, 1, 3, 4]
    alone = compiled.forward(rows(5)[keep], told._replace(rows=told.rows[keep], groups=Groups.of((1,) * 4)))
    torch.testing.assert_close(found[keep], alone.logits, rtol=1e-5, atol=1e-5)


def test_without_a_modulation_it_is_the_frozen_network(tiny: Callable[..., nn.Module], rows: Rows) -> None:
    network, compiler = Network(tiny()), Traced()
    compiled = warmed(network, compiler)
    with torch.no_grad():
        same(compiled.forward(rows(3)), network(rows(3)))
    assert compiler.rows == [3]


def test_one_state_for_all_rows(tiny: Callable[..., nn.Module], rows: Rows) -> None:
    network, compiler = Network(tiny()), Traced()
    compiled = warmed(network, compiler)
    told = mixed(network, 1)._replace(rows=torch.zeros(4, dtype=torch.int64), groups=Groups.of((4,)))
    with torch.no_grad():
        same(compiled.forward(rows(4), told), network(rows(4), told))
    assert compiler.rows == [4]


def test_a_request_on_the_moments_path_runs_eagerly(pipeline: Callable[..., Pipeline], rows: Rows) -> None:
    around = pipeline()
    compiler = Traced()
    compiled = warmed(around.network, compiler)
    assert around.norm is not None
    x, states = rows(9), tree.stack([around.norm.init()])
    told = around.norm.modulate(states, torch.zeros(9, dtype=torch.int64), Groups.of((9,)))
    assert told.statistics is Statistics.BLEND
    found = compiled.forward(x, told)
    assert found.moments is not None
    assert found.moments.mean.shape == (1, 4)
    compiled.forward(x, told._replace(statistics=Statistics.OWN))
    assert compiler.rows == []


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.Sequential(nn.Flatten(2), nn.LayerNorm(4), nn.Unflatten(2, (2, 2)))]
)
@pytest.mark.parametrize("statistics", [Statistics.KNOWN, Statistics.OWN])
def test_layers_whose_statistics_are_the_rows_own(
    norm: Callable[[], nn.Module], statistics: Statistics, rows: Rows
) -> None:
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
    compiler = Traced()
    compiled = warmed(network, compiler)
    told = mixed(network, 3, statistics)
    with torch.no_grad():
        same(compiled.forward(rows(3), told), network(rows(3), told))
    assert compiler.rows == [3]


def test_folding_by_hand() -> None:
    norms = nn.Sequential(nn.BatchNorm1d(1, eps=0.0), nn.Linear(1, 2, bias=False), nn.LayerNorm(2))
    network = Network(norms)
    told = mixed(network, 2)._replace(
        scale=torch.tensor([[2.0, 3.0, 4.0], [6.0, 7.0, 8.0]]),
        shift=torch.tensor([[1.0, 5.0, 6.0], [0.0, 9.0, 9.0]]),
        mean=torch.tensor([[3.0, torch.nan, 7.0], [1.0, 7.0, 7.0]]),  # a layer-norm reads none
        var=torch.tensor([[4.0, torch.nan, 7.0], [9.0, 7.0, 7.0]]),
        rows=torch.tensor([1, 0]),
    )
    a, b = network.fold(told)
    assert a.tolist() == [[2.0, 7.0, 8.0], [1.0, 3.0, 4.0]]
    assert b.tolist() == [[-2.0, 9.0, 9.0], [-2.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x[:0],
        lambda x: x.double(),
        lambda x: torch.cat([x, x], dim=3),
    ],
)
def test_an_input_that_no_graph_was_made_for_runs_eagerly(odd: Callable[[Tensor], Tensor], rows: Rows) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    network, compiler = Network(model), Traced()
    compiled = warmed(network, compiler)
    x = odd(rows(2))
    if x.dtype == torch.float64:
        network.model.double()
    assert compiled.forward(x).logits.shape == (len(x), 3)
    assert compiler.rows == []


def test_a_thread_with_another_number_of_threads_runs_eagerly_and_the_log_says_so_once(
    tiny: Callable[..., nn.Module], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    network, compiler = Network(tiny()), Traced()
    compiled = warmed(network, compiler)
    torch.set_num_threads(2)
    first = compiled.forward(rows(2))
    compiled.forward(rows(2))
    torch.set_num_threads(1)
    same(compiled.forward(rows(2)), first)
    assert compiler.rows == [2]
    assert messages(caplog) == [
        "runtime: compile: a forward runs eagerly: its thread has 2 OpenMP threads, the graphs have 1"
    ]


def test_a_guard_that_fails_while_serving_compiles_nothing(
    tiny: Callable[..., nn.Module], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    network, compiler = Network(tiny()), Traced()
    compiled = warmed(network, compiler)
    graphs = compiler.compiled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled.forward(rows(2)).logits.shape == (2, 3)
    assert (compiler.compiled, compiler.rows) == (graphs, [])
    assert "no graph takes 2 rows" in caplog.text
    same(compiled.forward(rows(2)), network(rows(2)))
    assert compiler.rows == [2]  # the graph lives on


def test_predicting_compiled_while_learning_eagerly(pipeline: Callable[..., Pipeline], rows: Rows) -> None:
    around = pipeline()
    compiled = warmed(around.network, Traced())
    told = mixed(around.network, 3)
    with torch.no_grad():
        expected = around.network(rows(3), told)
    start = tree.stack([around.init()])
    lessons = [
        (torch.zeros(6, dtype=torch.int64), Batch(rows(6, start=i), Groups.of((6,)), torch.ones(6))) for i in range(30)
    ]

    def learn() -> Any:
        states = start
        for index, batch in lessons:
            states, _ = around.adapt(states, index, batch)
        return states

    alone, beside, failed = learn(), [], []

    def predict() -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(100):
                same(compiled.forward(rows(3), told), expected)
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=predict)
    thread.start()
    beside = learn()
    thread.join()
    assert not failed
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(alone), tree.leaves(beside), strict=True))
    assert any(not torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(alone), tree.leaves(start), strict=True))


class SeesItsBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def refuse(_module: nn.Module) -> runtime.Graph:
    def graph(*_: Tensor) -> Any:
        raise RuntimeError("ld: cannot find\n  -lgomp") from OSError("inner\nreason")

    return graph


@pytest.mark.parametrize(
    ("part", "compiler", "reason"),
    [
        (nn.Identity(), refuse, "OSError: inner reason"),
        (SeesItsBatch(), Traced(rigid=True), "compiled answers to 3 rows differ from eager ones by "),
        (Breaks(), Traced(), "UserError|Unsupported|GuardOnDataDependentSymNode"),
    ],
)
def test_what_cannot_be_compiled_runs_eagerly_with_one_line_in_the_log(
    part: nn.Module,
    compiler: Any,
    reason: str,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(runtime.CACHE_VARIABLE, str(tmp_path))
    torch.manual_seed(0)
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), part, nn.Flatten(), nn.Linear(16, 3)))
    built = build_runtime("compile", network, SHAPE, rows_max=4, compile=compiler)
    (line,) = messages(caplog)
    assert line.startswith("runtime: compile is not to be had, so that forwards run eagerly: ")
    assert any(each in line for each in reason.split("|"))
    assert "\n" not in line
    assert (type(built), built.name) == (Eager, "eager")
    with torch.no_grad():
        same(built.forward(rows(2), mixed(network, 2)), network(rows(2), mixed(network, 2)))


def test_eager_is_the_network_itself(tiny: Callable[..., nn.Module], rows: Rows) -> None:
    network = Network(tiny())
    built = build_runtime("eager", network, SHAPE, rows_max=64)
    told = mixed(network, 2)._replace(scale=network.scale.expand(2, -1).clone().requires_grad_())
    found = built.forward(rows(2), told)
    assert not found.logits.requires_grad
    assert torch.equal(found.logits, network(rows(2), told).logits)


def test_the_cache_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = runtime.cache_folder()
    assert folder == tmp_path / "tta-serve" / "inductor"
    assert runtime._private(folder).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(runtime.CannotCompile, match=r"inductor is not a folder of this user's alone; remove it"):
        runtime._private(folder)


SCRIPT = """
import logging, pickle, sys
import torch
from torch import nn
from adapters import Network
from tta_serve.runtime import build_runtime

logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
torch.set_num_threads(1)
torch.manual_seed(0)
network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
built = build_runtime("compile", network, (3, 4, 4), rows_max=1)
x = torch.rand(1, 3, 4, 4)
with torch.no_grad():
    difference = (built.forward(x).logits - network(x).logits).abs().max()
packed = torch._dynamo.utils.counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"]
print(built.name, float(difference) < 1e-4, packed)
"""


def start(**environment: str) -> subprocess.CompletedProcess[str]:
    """Build a runtime in a new process, as a server's start does."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(runtime.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_a_second_start_finds_what_the_first_compiled(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), runtime.CACHE_VARIABLE: ""}

    def kernels() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "tta-serve" / "inductor").rglob("*.so")}

    assert start(**environment).stdout.split() == ["compile", "True", "1"]  # the one convolution has its weights packed
    first = kernels()
    assert first
    assert start(**environment).stdout.split() == ["compile", "True", "1"]
    assert kernels() == first


@pytest.mark.slow
def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    done = start(CXX="/nowhere/g++", **{runtime.CACHE_VARIABLE: str(tmp_path)})
    assert done.stdout.split()[:2] == ["eager", "True"]
    assert "there is no C++ compiler (/nowhere/g++); install g++, or name one in CXX" in done.stderr
