"""How the forward runs: eager, or through `torch.compile`.

What is compiled is the *folded* forward, in which every row brings its own `y = a·x + b` for every channel of the
normalisation layers: two tensors beside the images, so that one graph serves any mix of streams. Requests that are
answered from their own rows too (the *moments* path) run eagerly.

torch keeps what it has compiled below `cache_folder()`: the next start finds it there.
"""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters import Groups, Modulation, Network, Statistics
from adapters.base import Output

log = logging.getLogger(__name__)

RuntimeName = Literal["eager", "compile"]
Graph = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # x, a, b → logits, features
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own name for it
DIFFERENCE_MAX = 1e-3  # of a compiled answer from the eager one, over the largest of the eager answers
REASON_MAX = 300  # characters of a compiler's complaint that are worth a line in the log


class Runtime(Protocol):
    """Runs the network's forward."""

    @property
    def name(self) -> RuntimeName: ...

    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Output:
        """What `Network.__call__` gives, without gradients.

        Args:
            x: [B, …].
            modulation: for the same B rows; None for the frozen network's answer.
        """
        ...


class CannotCompile(Exception):
    """Why a network is not compiled; never leaves `build_runtime`."""


class Eager:
    """Runs the network as it is.

    Args:
        network: any.
    """

    name: RuntimeName = "eager"

    def __init__(self, network: Network) -> None:
        self._network = network

    @torch.no_grad()
    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Output:
        return self._network(x, modulation)


class _Expected(NamedTuple):
    """What graphs were compiled for. An input that differs runs eagerly."""

    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype
    device: torch.device


class Compiled:
    """Runs the folded forward as compiled graphs, one bucket of rows at a time; everything else eagerly.

    A batch is padded with blank rows up to the next bucket, and the answer cut; it runs as it is where the graph takes
    any number of rows down to the bucket below. One of more rows than the largest bucket runs in parts. Call `warm`
    before the first forward: afterwards nothing is compiled any more, whatever comes.

    Args:
        network: whose rows do not see one another in evaluation mode; `warm` notices otherwise.
        buckets: numbers of rows.
        threads: OpenMP threads of the threads that will call `forward`, on a CPU.
        compile: makes a graph of a module: it compiles at its first call, and raises `FailOnRecompileLimitHit` at a
            later one that would need another graph.
    """

    name: RuntimeName = "compile"

    def __init__(
        self,
        network: Network,
        buckets: Sequence[int],
        threads: int = 1,
        compile: Callable[[nn.Module], Graph] | None = None,
    ) -> None:
        self.buckets = tuple(sorted(set(buckets)))
        self._network = network
        self._threads = threads
        self._compile = compile or _inductor
        self._folded = _Folded(network)
        self._graphs: dict[int, Graph] = {}  # by bucket; several may share one
        self._expected: _Expected | None = None
        self._flexible: set[int] = set()  # buckets whose graph takes fewer rows too, down to the next bucket
        self._said = False  # whether the log has a line on a forward that ran eagerly

    @torch.no_grad()
    def warm(self, shape: Sequence[int]) -> None:
        """Compile for images of this shape, and compare each bucket's answers with the eager ones.

        Args:
            shape: of one row, without the batch.

        Raises:
            CannotCompile: the answers differ. Whatever the compiler raises passes too.
        """
        device = self._network.scale.device
        before = torch.get_num_threads()
        if device.type == "cpu":
            torch.set_num_threads(self._threads)
        try:
            graph: Graph | None = None
            # The weights never change: oneDNN lays them out once, for its own kernels. `torch.compile(options=…)` would
            # come too late: whether weights are constants is decided while the module is traced.
            with torch._inductor.config.patch(freezing=device.type == "cpu"):
                for bucket in reversed(self.buckets):  # the graph of the largest fits most of the smaller ones
                    x = _noise(bucket, shape, device)
                    graph = self._graphs[bucket] = self._compiled(x, graph)
            self._expected = _Expected(tuple(shape), torch.float32, device)
            for below, bucket in zip((0, *self.buckets), self.buckets, strict=False):
                x = _noise(max(bucket - 1, below + 1), shape, device)  # odd where it can be: no power of two divides it
                if self._graphs.get(below) is self._graphs[bucket] and self._takes(self._graphs[bucket], x):
                    self._flexible.add(bucket)
                self._compare(x)
        finally:
            torch.set_num_threads(before)

    @torch.no_grad()
    def forward(self, x: Tensor, modulation: Modulation | None = None) -> Output:
        if modulation and modulation.statistics is not Statistics.KNOWN and self._network.has_statistics:
            return self._network(x, modulation)
        if not self._expects(x):
            return self._network(x, modulation)
        told = modulation or self._frozen(x)
        most = self.buckets[-1]
        parts = zip(torch.split(x, most), torch.split(told.rows, most), strict=True)
        try:
            answers = [self._run(part, told._replace(rows=rows)) for part, rows in parts]
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._say_once(f"no graph takes {len(x)} rows in the caller's mode of torch")
            return self._network(x, modulation)
        if len(answers) == 1:
            return answers[0]
        logits = torch.cat([answer.logits for answer in answers])
        features = [answer.features for answer in answers if answer.features is not None]
        return Output(logits, torch.cat(features) if features else None, None)

    def _run(self, x: Tensor, modulation: Modulation) -> Output:
        """The answer to no more rows than the largest bucket has."""
        rows = len(x)
        bucket = next(bucket for bucket in self.buckets if bucket >= rows)
        blank = 0 if bucket in self._flexible else bucket - rows
        if blank:
            x = torch.cat([x, x.new_zeros(blank, *x.shape[1:])])
            modulation = modulation._replace(rows=functional.pad(modulation.rows, (0, blank)))
        logits, features = self._graphs[bucket](x.contiguous(), *self._network.fold(modulation))
        return Output(logits[:rows], None if features is None else features[:rows], None)

    def _expects(self, x: Tensor) -> bool:
        """Whether the graphs are made for such an input and for this thread."""
        if not len(x) or self._expected != (x.shape[1:], x.dtype, x.device) or torch.is_inference_mode_enabled():
            return False
        if x.device.type == "cpu" and torch.get_num_threads() != self._threads:
            self._say_once(f"its thread has {torch.get_num_threads()} OpenMP threads, the graphs have {self._threads}")
            return False
        return True

    def _frozen(self, x: Tensor) -> Modulation:
        """The source's own scale, shift and statistics for every row."""
        source = self._network
        scale, shift, mean, var = (each.unsqueeze(0) for each in (source.scale, source.shift, source.mean, source.var))
        rows = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return Modulation(scale, shift, mean, var, rows, Groups.of((len(x),), x.device), Statistics.KNOWN)

    def _compiled(self, x: Tensor, shared: Graph | None) -> Graph:
        """A graph for as many rows as x has: `shared` where that fits, or a new one."""
        if shared is not None and self._takes(shared, x):
            return shared
        graph = self._compile(self._folded)
        graph(*self._arguments(x))
        return graph

    def _takes(self, graph: Graph, x: Tensor) -> bool:
        """Whether a graph that is compiled already takes as many rows as x has."""
        torch_log = logging.getLogger("torch._dynamo.convert_frame")
        level = torch_log.level
        torch_log.setLevel(logging.ERROR)  # a graph that does not fit is what we ask for, and no warning
        try:
            graph(*self._arguments(x))
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return False
        finally:
            torch_log.setLevel(level)
        return True

    def _arguments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, a and b of the frozen network, marked so that a graph takes other numbers of rows where it can."""
        a, b = self._network.fold(self._frozen(x))
        if len(x) > 1:  # torch takes a 1 for a constant whatever it is told
            for tensor in (x, a, b):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return x, a, b

    def _compare(self, x: Tensor) -> None:
        """Refuse where rows do not get what they get eagerly and without padding."""
        expected, found = self._network(x).logits, self.forward(x).logits
        difference = float((found - expected).abs().max())
        if not difference <= DIFFERENCE_MAX * max(1.0, float(expected.abs().max())):  # NaN is refused too
            raise CannotCompile(f"compiled answers to {len(x)} rows differ from eager ones by {difference:.3g}")

    def _say_once(self, reason: str) -> None:
        if not self._said:
            self._said = True
            log.warning("runtime: compile: a forward runs eagerly: %s", reason)


class _Told:
    """What the forward that is traced was told, and what it leaves behind. Dynamo sees through it: all becomes None."""

    a: Tensor | None = None  # [B, P]
    b: Tensor | None = None  # [B, P]
    features: Tensor | None = None


class _Folded(nn.Module):
    """A network's twin that shares its tensors and takes a and b as arguments: a pure function for the compiler."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._told = told = _Told()
        memo: dict[int, Any] = {id(each): each for each in (*network.model.parameters(), *network.model.buffers())}
        memo |= {id(layer): _ByRow(layer, told) for layer in network.layers}
        if network.head is not None:
            memo[id(network.head)] = _Head(network.head, told)
        self.model = copy.deepcopy(network.model, memo)

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        told = self._told
        told.a, told.b, told.features = a, b, None
        logits = self.model(x)
        features = told.features
        told.a = told.b = told.features = None
        return logits, features


class _ByRow(nn.Module):
    """A normalisation layer, with what the forward was told."""

    def __init__(self, layer: Any, told: _Told) -> None:
        super().__init__()
        self.layer = layer
        self._told = told

    def forward(self, x: Tensor) -> Tensor:
        told = self._told
        assert told.a is not None
        assert told.b is not None
        at = self.layer.slice
        return cast(Tensor, self.layer.by_row(x, told.a[:, at], told.b[:, at]))


class _Head(nn.Module):
    """The last linear layer; what it reads are the features."""

    def __init__(self, head: nn.Linear, told: _Told) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self._told = told

    def forward(self, x: Tensor) -> Tensor:
        self._told.features = x
        return functional.linear(x, self.weight, self.bias)


def build_runtime(
    name: RuntimeName,
    network: Network,
    shape: Sequence[int],
    rows_max: int,
    threads: int = 1,
    compile: Callable[[nn.Module], Graph] | None = None,
) -> Runtime:
    """A runtime that is ready: with `compile`, all is compiled. Where that fails it is `eager`, and the log says why.

    Args:
        name: as configured.
        network: the frozen network.
        shape: of one row, without the batch.
        rows_max: rows of the largest batch that is worth a graph.
        threads: OpenMP threads of the threads that will call `forward`, on a CPU.
        compile: see `Compiled`.
    """
    if name == "eager":
        return Eager(network)
    try:
        # before torch's compiler is imported, which writes a folder of its own there; empty means the current folder
        if not os.environ.get(CACHE_VARIABLE):
            os.environ[CACHE_VARIABLE] = str(_private(cache_folder()))
        if network.scale.device.type == "cpu":
            _check_compiler()
        compiled = Compiled(network, buckets(rows_max), threads, compile)
        compiled.warm(shape)
    except Exception as error:  # noqa: BLE001  # whatever keeps it from compiling, eager answers
        log.warning("runtime: compile is not to be had, so that forwards run eagerly: %s", _reason(error))
        return Eager(network)
    return compiled


def buckets(rows_max: int) -> tuple[int, ...]:
    """Powers of two, and `rows_max` itself.

    >>> buckets(64), buckets(12), buckets(1)
    ((1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 12), (1,))
    """
    return (*(2**power for power in range((rows_max - 1).bit_length())), rows_max)


def cache_folder() -> Path:
    """Where graphs are kept between starts, unless torch's own variable names a folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tta-serve" / "inductor"


def _noise(rows: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Images of noise in [0, 1], always the same; [rows, *shape]."""
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(0)).to(device)


def _private(folder: Path) -> Path:
    """Make the folder for this user alone: what lies there is loaded as code.

    Raises:
        CannotCompile: somebody else can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CannotCompile(f"{folder} is not a folder of this user's alone; remove it, or set {CACHE_VARIABLE}")
    return folder


def _check_compiler() -> None:
    """Before half a minute of tracing.

    Raises:
        CannotCompile: there is no C++ compiler.
    """
    names = [name for name in torch._inductor.config.cpp.cxx if name]
    if not any(shutil.which(name) for name in names):
        raise CannotCompile(f"there is no C++ compiler ({', '.join(names)}); install g++, or name one in CXX")


def _inductor(module: nn.Module) -> Graph:
    """A graph by torch's own compiler."""
    compile = cast(Any, torch.compile)  # its overloads leave out the newest arguments
    return cast(Graph, compile(module, fullgraph=True, recompile_limit=1, isolate_recompiles=True))


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    text = " ".join(str(error).split())
    told = type(error).__name__ if not isinstance(error, CannotCompile) else ""
    return ": ".join(part for part in (told, text[:REASON_MAX]) if part)
