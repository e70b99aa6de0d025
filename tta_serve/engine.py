"""The model, its pipeline and the live states: predict and learn.

Beside what it stands on (`table.py`, `monitor.py`, `runtime.py`), the only caller of torch while serving.

`predict` and `learn` may run in two threads at once, and neither waits for the other's computing: see `states.py`.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Batch, Groups, Moments, Pipeline, PipelineState, tree
from adapters.base import Forward, Output
from adapters.eata import MOMENTS_MIN_ROWS
from adapters.fusion import Fusion
from adapters.guards import Guarded
from adapters.open_set import OpenSet
from tta_serve import stepping
from tta_serve.durable import Durable
from tta_serve.heads import Heads, View
from tta_serve.judging import Counts, Learned, counts_of
from tta_serve.lessons import Lesson, Observed, observed, rows_of
from tta_serve.monitor import Forgotten, Monitor, Served
from tta_serve.runtime import Runtime
from tta_serve.states import Held, States
from tta_serve.streams import PULL_SHARE, StreamRecord
from tta_serve.watch import Reading, Watch

GOOD_EVERY_STEPS = 32  # steps between two of them; before one is kept, the probe is asked what was forgotten

AnswerKind = Literal["adapted", "frozen", "both"]


class Query(NamedTuple):
    """One request's rows."""

    x: Tensor  # float32 in [0, 1], or uint8; [n, 3, H, W] on the host
    stream: str
    answer: AnswerKind = "adapted"
    remember: bool = False  # whether labels may come for it: its features are wanted


class _Adapted(NamedTuple):
    """What the adapted model says of one request."""

    logits: NDArray[np.float32]  # [n, C + added classes]
    network_logits: Tensor  # before the head, [n, C]
    moments: Moments | None
    view: View | None
    features: Tensor | None
    unknown: NDArray[np.float32] | None


class Answer(NamedTuple):
    """What one request gets."""

    logits: NDArray[np.float32] | None  # [n, C + added classes]; None where only the frozen answer was asked for
    frozen_logits: NDArray[np.float32] | None  # [n, C]; None where only the adapted answer was asked for
    version: int  # of the state that answered
    unsynced: int = 0  # of its changes, those that the store does not have
    added: tuple[str, ...] = ()  # names of the classes behind the model's own
    head_version: int = 0  # of what its labels have taught
    features: Tensor | None = None  # [n, F], where they were wanted
    unknown: NDArray[np.float32] | None = None  # of each image, 0 … 1, where an open set is looked for


def is_good(record: StreamRecord) -> bool:
    """Whether this version is one to roll back to."""
    return record.steps % GOOD_EVERY_STEPS == 0


class Engine:
    """One model with its pipeline and the states of its streams.

    Args:
        pipeline: the adapters around the network.
        device: where the network is.
        streams_max: how many streams may exist.
        threads: of one forward on the CPU.
        resident: how many of them have their state in the table; the others' are written out.
        new_per_minute: how many streams may begin in a minute; None: any number.
        durable: where streams live; None: in this process's memory.
        monitor: looks at streams now and then; None: nobody does, and no gate closes.
        batch_streams_max: streams of one forward.
        runtime: runs the forward of predictions; None: the network does.
        heads: what labels have taught; None: nothing does.
        open_set: says how unknown images are; None: nobody does.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        device: torch.device,
        streams_max: int,
        threads: int = 1,
        *,
        resident: int = 1024,
        new_per_minute: int | None = None,
        durable: Durable | None = None,
        monitor: Monitor | None = None,
        batch_streams_max: int = 64,
        runtime: Runtime | None = None,
        heads: Heads | None = None,
        open_set: OpenSet | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.open_set = open_set
        self.heads = heads
        self.device = device
        self.threads = threads
        self._monitor = monitor
        self._forward: Forward = runtime.forward if runtime else pipeline.network
        self._init = pipeline.init()._replace(head=())  # heads grow, and live in `heads`
        self.streams = States(
            self._init,
            streams_max=streams_max,
            resident=resident,
            new_per_minute=new_per_minute,
            durable=durable,
            answering_max=batch_streams_max,
            on_end=monitor.forget if monitor else None,
        )

    def prepare_thread(self, *, learns: bool = False) -> None:
        """Call once in each thread that will compute.

        The number of OpenMP threads is the thread's own; on a GPU each gets a CUDA stream, the learner's of lower
        priority.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        else:
            stream = torch.cuda.Stream(self.device, priority=0 if learns else -1)  # type: ignore[no-untyped-call]
            torch.cuda.set_stream(stream)

    def reading(self, stream: str) -> Reading | None:
        """The last check of a stream here; None before the first."""
        watch = self._watch(stream)
        return watch.last if watch else None

    def gated(self, stream: str) -> bool:
        """Whether a stream is spared its steps here because it is like the source."""
        watch = self._watch(stream)
        return watch is not None and watch.gated

    def _watch(self, stream: str) -> Watch | None:
        record = self.streams.find(stream)
        return self._monitor.known(stream, record.incarnation) if self._monitor and record else None

    # -- predict ------------------------------------------------------------------------------------------------------

    def warm(self, shape: tuple[int, ...]) -> None:
        """Predict and adapt once on blank images of this shape, alone and in a larger request; nothing is kept.

        What cannot run at all fails here and not in the first request, and that one need not wait for what torch
        prepares at its first forward and backward.
        """
        for rows in (1, 8):
            x = torch.zeros(rows, *shape, device=self.device)
            index = torch.zeros(rows, dtype=torch.int64, device=self.device)
            table, groups = tree.stack([self._init]), Groups.of((rows,), self.device)
            with torch.no_grad():
                self.pipeline.predict(self._with_heads(table, [None]), index, groups, x, self._forward)
                self.pipeline.adapt(table, index, Batch(x, groups, weights=x.new_ones(rows)))

    @torch.no_grad()
    def predict(self, queries: Sequence[Query]) -> list[tuple[Answer, Lesson]]:
        """Answer requests of any mix of streams in one forward (and one more where frozen answers are asked for).

        Returns:
            For each query its answer, and the rows as a lesson that may be given to `learn`.
        """
        given = [query.x.to(self.device, non_blocking=True) for query in queries]
        inputs = [to_unit(x) for x in given]
        adapted_for = [i for i, query in enumerate(queries) if query.answer != "frozen"]
        frozen_for = [i for i, query in enumerate(queries) if query.answer != "adapted"]
        with self.streams.answering([query.stream for query in queries]) as records:
            adapted = dict(
                zip(
                    adapted_for,
                    self._adapted([inputs[i] for i in adapted_for], [(queries[i], records[i]) for i in adapted_for]),
                    strict=True,
                )
            )
            frozen = dict(zip(frozen_for, self._frozen([inputs[i] for i in frozen_for]), strict=True))
        return [
            (
                Answer(
                    frozen_logits=frozen.get(i),
                    version=record.version,
                    unsynced=record.unsynced,
                    **_shown(adapted.get(i)),
                ),
                Lesson(
                    given[i],
                    query.stream,
                    record.incarnation,
                    record.version,
                    adapted[i].moments if i in adapted else None,
                    adapted[i].network_logits if i in adapted else None,
                ),
            )
            for i, (query, record) in enumerate(zip(queries, records, strict=True))
        ]

    def _adapted(self, inputs: Sequence[Tensor], asked: Sequence[tuple[Query, StreamRecord]]) -> list["_Adapted"]:
        """What the adapted model says of each request."""
        if not inputs:
            return []
        sizes = tuple(len(x) for x in inputs)
        views = [self.heads.view_to_answer(query.stream) if self.heads else None for query, _ in asked]
        numbers: dict[tuple[int, int], int] = {}  # of a row and a head, in the small table of this batch
        pairs = [(record.row, view) for (_, record), view in zip(asked, views, strict=True)]
        of_request = [numbers.setdefault((row, id(view)), len(numbers)) for row, view in pairs]
        firsts = [of_request.index(number) for number in range(len(numbers))]
        groups = Groups.of(sizes, self.device)
        rows = torch.tensor(of_request).repeat_interleave(torch.tensor(sizes)).to(self.device)
        table = self._with_heads(self.streams.read([pairs[i][0] for i in firsts]), [views[i] for i in firsts])
        output = self.pipeline.predict(table, rows, groups, torch.cat(list(inputs)), self._forward)
        found = output.moments
        moments = [
            tree.apply(lambda leaf: leaf[i : i + 1].clone(), found) if found and n >= MOMENTS_MIN_ROWS else None  # noqa: B023
            for i, n in enumerate(sizes)
        ]
        own = output.logits if output.network_logits is None else output.network_logits
        width = own.shape[1]
        unknown = self._unknown(table, rows, output, own, sizes)
        features = torch.split(output.features, list(sizes)) if output.features is not None else [None] * len(sizes)
        return [
            _Adapted(
                said[:, : width + len(view.added)] if view else said,
                network.clone(),  # a lesson that waits must not keep the whole batch's in memory
                measured,
                view,
                read.cpu().clone() if read is not None and query.remember else None,
                strange,
            )
            for (query, _), said, network, measured, view, read, strange in zip(
                asked,
                _split(output.logits, sizes),
                torch.split(own, list(sizes)),
                moments,
                views,
                features,
                unknown,
                strict=True,
            )
        ]

    def _unknown(
        self, table: PipelineState, rows: Tensor, output: Output, own: Tensor, sizes: tuple[int, ...]
    ) -> Sequence[NDArray[np.float32] | None]:
        """How unknown the images of each request are."""
        if self.open_set is None:
            return [None] * len(sizes)
        head = self.pipeline.head
        unknown = self.open_set.unknown(own)
        if isinstance(head, Fusion) and output.features is not None:
            none = head.none(table.head, rows, output.features)
            told = torch.tensor([bool(each.classes) for each in table.head], device=rows.device)[rows]
            # where the head alone answers, what the network knows does not matter
            unknown = torch.where(told, none, unknown) if head.answers == "head" else unknown * none
        return _split(unknown, sizes)

    def _with_heads(self, table: PipelineState, views: Sequence[View | None]) -> PipelineState:
        """A table of states with the tables of their heads, where there are heads."""
        if self.heads is None:
            return table
        return table._replace(head=tuple((view or self.heads.untold).table for view in views))

    def _frozen(self, inputs: Sequence[Tensor]) -> list[NDArray[np.float32]]:
        if not inputs:
            return []
        return _split(self._forward(torch.cat(list(inputs))).logits, tuple(len(x) for x in inputs))

    # -- learn --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, observed: Sequence[Observed]) -> None:
        """Take the moments of requests that get no step into their streams' statistics: no forward, no gradient.

        What is stale or of a frozen stream is left alone, as in `learn`.
        """
        stepping.absorb(self.streams, observed, self.pipeline.absorb, self.device)

    @torch.no_grad()
    def learn(self, lessons: Sequence[Lesson]) -> list[Learned]:
        """Take one step for every stream among the lessons, in one backward, and publish the new states.

        Lessons of one stream are one group: their rows share their statistics. A lesson of another incarnation than the
        stream's present one is stale and teaches nothing; nor does one of a frozen stream.
        """
        live, done = stepping.live_of(self.streams, lessons)
        frozen, gated = self._check(live)
        for stream in gated:  # no step; their statistics are taken where they were measured
            lots = live.pop(stream)
            self.absorb(observed(lots))
            done.append(Learned(stream, rows_of(lots), 0, math.nan, "gated"))
        with self.streams.teaching([(stream, lots[0].incarnation) for stream, lots in live.items()]) as held:
            for stream in live.keys() - set(held.streams):  # it went while it was looked at, or cannot be read
                done.append(Learned(stream, rows_of(live[stream]), 0, 0.0, "stale"))
            if held.streams:
                done += self._step(held, [live[stream] for stream in held.streams], frozen)
        return done

    def _step(self, held: Held, lots: Sequence[Sequence[Lesson]], frozen: Mapping[str, Tensor]) -> list[Learned]:
        batch = self._batch(lots, [frozen.get(stream) for stream in held.streams])
        old = self.streams.read_to_teach(held)
        new, report = self.pipeline.adapt(old, batch.groups.index, batch)
        lost = self._probe(held, counts_of(report), new)
        return stepping.settle(self.streams, held, old, new, report, lost, self._pull, is_good)

    def _check(self, live: dict[str, list[Lesson]]) -> tuple[dict[str, Tensor], list[str]]:
        """Check the streams whose turn it is.

        Returns:
            The frozen logits of those that were, for their last rows; and which streams the gate is closed for.
        """
        if self._monitor is None:
            return {}, []
        due: dict[str, Served] = {}
        for stream, lessons in live.items():
            record = self.streams.find(stream)
            watch = self._monitor.watch(stream, lessons[0].incarnation)
            if record is None or not watch.due(record.steps - record.checked_steps):
                continue
            logits = [lesson.logits for lesson in lessons if lesson.logits is not None]
            if len(logits) == len(lessons):  # else some were answered by the frozen network alone: the next lot will do
                due[stream] = Served(torch.cat([to_unit(lesson.x) for lesson in lessons]), torch.cat(logits))
        if due:
            readings, frozen = self._monitor.check(list(due.values()))
            for stream, reading in zip(due, readings, strict=True):
                incarnation = live[stream][0].incarnation
                watch = self._monitor.watch(stream, incarnation)
                was_gated, changes = watch.gated, watch.read(reading)
                notes = [f"change of {what}" for what in changes]
                if watch.gated != was_gated:
                    notes.append("gate closed" if watch.gated else "gate opened")
                self.streams.note(stream, incarnation, lambda record: record.checked(notes))  # noqa: B023
        else:
            frozen = []
        gated = [stream for stream, lots in live.items() if self._monitor.watch(stream, lots[0].incarnation).gated]
        return dict(zip(due, frozen, strict=True)), gated

    def _probe(self, held: Held, counts: Sequence[Counts], new: PipelineState) -> dict[int, Forgotten]:
        """What the streams forgot whose steps make a round number; by their place among those held."""
        found: dict[int, Forgotten] = {}
        for i, (old, count) in enumerate(zip(held.records, counts, strict=True)):
            if self._monitor and count.applied and (old.steps + 1) % GOOD_EVERY_STEPS == 0:
                forgotten = self._monitor.forgotten(tree.apply(lambda leaf: leaf[i : i + 1], new.norm))  # noqa: B023
                if forgotten is not None:
                    found[i] = forgotten
        return found

    def _batch(self, lots: Sequence[Sequence[Lesson]], frozen: Sequence[Tensor | None]) -> Batch:
        """The lessons of some streams as one batch, a group each; with the frozen logits of their last rows."""
        parts = []
        for lessons in lots:
            inputs = [to_unit(lesson.x) for lesson in lessons]
            parts.append(torch.cat(inputs) if len(inputs) > 1 else inputs[0])
        sizes = tuple(len(part) for part in parts)
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        given = [logits for logits in frozen if logits is not None]
        frozen_logits = None
        if given:
            frozen_logits = given[0].new_full((len(x), given[0].shape[1]), math.nan)  # NaN: was not asked
            for end, logits in zip(np.cumsum(sizes).tolist(), frozen, strict=True):
                if logits is not None:
                    frozen_logits[end - len(logits) : end] = logits
        groups = Groups.of(sizes, self.device)
        return Batch(x, groups, weights=x.new_ones(len(x)), frozen_logits=frozen_logits)

    def _pull(self, states: PipelineState, mask: Tensor) -> PipelineState:
        norm = self.pipeline.norm
        assert isinstance(norm, Guarded)  # who else would have tripped
        return states._replace(norm=norm.pull(states.norm, mask, PULL_SHARE))


def _shown(adapted: _Adapted | None) -> dict[str, Any]:
    """What of it is in an answer."""
    if adapted is None:
        return {"logits": None}
    view = adapted.view
    return {
        "logits": adapted.logits,
        "features": adapted.features,
        "unknown": adapted.unknown,
        "added": view.added if view else (),
        "head_version": view.version if view else 0,
    }


def _split(logits: Tensor, sizes: Sequence[int]) -> list[NDArray[np.float32]]:
    return np.split(logits.cpu().numpy(), np.cumsum(sizes)[:-1])


def to_unit(x: Tensor) -> Tensor:
    """Images as float32 in [0, 1]; uint8 means 0 … 255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def pick_device(name: str) -> torch.device:
    """The device that the configuration names; `auto` is the first GPU, or the CPU where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def plan_threads(cores: int, models_on_node: int) -> int:
    """Threads of one forward, so that predicting, learning and HTTP of all models fit the cores.

    >>> plan_threads(2, 1), plan_threads(16, 1), plan_threads(16, 3)
    (1, 7, 2)
    """
    return max(1, (cores - models_on_node) // (2 * models_on_node))
