"""The model, its pipeline and the live states: predict, learn, reset. The only caller of torch while serving.

A stream is an immutable record in a dict, so publishing is one assignment: a forward that has begun keeps the record
that it read. `predict` and `learn` may run in two threads at once.
"""

import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Batch, Groups, Pipeline, PipelineState, tree
from tta_serve.errors import NotFound, Overloaded

AnswerKind = Literal["adapted", "frozen", "both"]


class Query(NamedTuple):
    """One request's rows."""

    x: Tensor  # float32 in [0, 1], or uint8; [n, 3, H, W] on the host
    stream: str
    answer: AnswerKind = "adapted"


class Answer(NamedTuple):
    """What one request gets."""

    logits: NDArray[np.float32] | None  # [n, C]; None where only the frozen answer was asked for
    frozen_logits: NDArray[np.float32] | None  # [n, C]; None where only the adapted answer was asked for
    version: int  # of the state that answered


class Lesson(NamedTuple):
    """Rows of one stream to learn from."""

    x: Tensor  # as asked, so that uint8 takes a byte while it waits; [n, 3, H, W] on the device
    stream: str
    incarnation: int  # of the stream when it answered; rows of an earlier life teach nothing
    version: int


class StreamRecord(NamedTuple):
    """A stream as it stands: an immutable value."""

    state: PipelineState
    incarnation: int
    version: int = 0
    steps: int = 0  # updates of parameters
    seen: int = 0  # rows given to the adapter
    reliable: int = 0
    selected: int = 0
    refused: int = 0  # updates that a guard refused
    entropy: float | None = None  # mean over the rows last learned from, nats


class Learned(NamedTuple):
    """What one call of `learn` did for one stream."""

    stream: str
    seen: int
    selected: int
    entropy: float
    result: Literal["applied", "filtered", "refused", "stale"]


class Engine:
    """One model with its pipeline and the states of its streams.

    Args:
        pipeline: the adapters around the network.
        device: where the network is.
        streams_max: how many streams may exist.
        threads: of one forward on the CPU.
    """

    def __init__(self, pipeline: Pipeline, device: torch.device, streams_max: int, threads: int = 1) -> None:
        self.pipeline = pipeline
        self.device = device
        self.streams_max = streams_max
        self.threads = threads
        self._init = pipeline.init()
        self._streams: dict[str, StreamRecord] = {}
        self._lives = 0  # incarnations handed out
        self._lock = threading.Lock()  # held for dict updates only, never while computing

    def prepare_thread(self) -> None:
        """Call once in each thread that will compute: the number of OpenMP threads is the thread's own."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)

    def record(self, stream: str) -> StreamRecord:
        """The stream as it stands.

        Raises:
            NotFound: it does not exist.
        """
        record = self._streams.get(stream)
        if record is None:
            raise NotFound(f"there is no stream named {stream!r}; a stream begins with its first prediction")
        return record

    def stream_names(self) -> list[str]:
        return sorted(self._streams)

    def state_bytes(self) -> int:
        """Bytes of all states; streams that have learned nothing share one."""
        states = {id(record.state): record.state for record in list(self._streams.values())}
        return sum(tree.nbytes(state) for state in states.values())

    def open(self, stream: str) -> StreamRecord:
        """The stream as it stands, begun if it does not exist.

        Raises:
            Overloaded: there are `streams_max` already.
        """
        record = self._streams.get(stream)
        if record is not None:
            return record
        return self.begin(stream) or self.record(stream)

    def begin(self, stream: str) -> StreamRecord | None:
        """Begin a stream; None if it exists already.

        Raises:
            Overloaded: there are `streams_max` already.
        """
        if stream in self._streams:
            return None
        with self._lock:
            if stream in self._streams:
                return None
            if len(self._streams) >= self.streams_max:
                raise Overloaded(
                    f"there are {self.streams_max} streams, the limit (streams.max); "
                    f"delete one before beginning {stream!r}",
                    retry_after_s=60,
                )
            record = self._streams[stream] = self._new_life()
            return record

    def take_back(self, stream: str, begun: StreamRecord) -> None:
        """Undo `begin`, unless the stream has gone on since."""
        with self._lock:
            if self._streams.get(stream) is begun:
                del self._streams[stream]

    def reset(self, stream: str) -> StreamRecord:
        """Begin a stream's life anew: its state becomes `init()`. What was under way for the old life is dropped.

        Raises:
            NotFound: it does not exist.
        """
        with self._lock:
            self.record(stream)
            record = self._streams[stream] = self._new_life()
            return record

    def delete(self, stream: str) -> None:
        """Forget a stream: nothing of it remains.

        Raises:
            NotFound: it does not exist.
        """
        with self._lock:
            self.record(stream)
            del self._streams[stream]

    def _open_or_pass(self, stream: str) -> StreamRecord:
        """As `open`; a stream that was deleted while it asked, and has no room now, passes by without a trace.

        A batch must not fail for one of its streams.
        """
        try:
            return self.open(stream)
        except (Overloaded, NotFound):
            return StreamRecord(self._init, incarnation=0)

    def _new_life(self) -> StreamRecord:
        self._lives += 1
        return StreamRecord(self._init, incarnation=self._lives)

    def warm(self, shape: tuple[int, ...]) -> None:
        """Predict and adapt once on blank images of this shape, alone and in a larger request; nothing is kept.

        What cannot run at all fails here and not in the first request, and that one need not wait for what torch
        prepares at its first forward and backward.
        """
        for rows in (1, 8):
            x = torch.zeros(rows, *shape, device=self.device)
            table, index = self._table(["warm"], [StreamRecord(self._init, incarnation=0)], (rows,))
            groups = Groups.of((rows,), self.device)
            with torch.no_grad():
                self.pipeline.predict(table, index, groups, x)
                self.pipeline.adapt(table, index, Batch(x, groups, weights=x.new_ones(rows)))

    @torch.no_grad()
    def predict(self, queries: Sequence[Query]) -> list[tuple[Answer, Lesson]]:
        """Answer requests of any mix of streams in one forward (and one more where frozen answers are asked for).

        Returns:
            For each query its answer, and the rows as a lesson that may be given to `learn`.
        """
        given = [query.x.to(self.device, non_blocking=True) for query in queries]
        inputs = [to_unit(x) for x in given]
        records = [self._open_or_pass(query.stream) for query in queries]
        adapted = self._forward(
            [i for i, query in enumerate(queries) if query.answer != "frozen"], inputs, queries, records
        )
        frozen = self._forward([i for i, query in enumerate(queries) if query.answer != "adapted"], inputs)
        return [
            (
                Answer(adapted.get(i), frozen.get(i), record.version),
                Lesson(given[i], query.stream, record.incarnation, record.version),
            )
            for i, (query, record) in enumerate(zip(queries, records, strict=True))
        ]

    def _forward(
        self,
        chosen: list[int],
        inputs: Sequence[Tensor],
        queries: Sequence[Query] | None = None,
        records: Sequence[StreamRecord] = (),
    ) -> dict[int, NDArray[np.float32]]:
        """Logits of the chosen requests, by number; by the frozen network where no queries are given."""
        if not chosen:
            return {}
        x = torch.cat([inputs[i] for i in chosen])
        sizes = tuple(len(inputs[i]) for i in chosen)
        if queries is None:
            logits = self.pipeline.network(x).logits
        else:
            table, rows = self._table([queries[i].stream for i in chosen], [records[i] for i in chosen], sizes)
            logits = self.pipeline.predict(table, rows, Groups.of(sizes, self.device), x).logits
        parts = np.split(logits.cpu().numpy(), np.cumsum(sizes)[:-1])
        return dict(zip(chosen, parts, strict=True))

    def _table(
        self, streams: Sequence[str], records: Sequence[StreamRecord], sizes: tuple[int, ...]
    ) -> tuple[PipelineState, Tensor]:
        """The states of these requests as a table, and which row of it each row of the batch uses."""
        numbers: dict[tuple[str, int, int], int] = {}
        states: list[PipelineState] = []
        row_of_request: list[int] = []
        for stream, record in zip(streams, records, strict=True):
            key = (stream, record.incarnation, record.version)
            if key not in numbers:
                numbers[key] = len(states)
                states.append(record.state)
            row_of_request.append(numbers[key])
        # a table of one row is a view: most batches hold one stream
        one = len(states) == 1
        table = tree.apply(lambda leaf: leaf.unsqueeze(0), states[0]) if one else tree.stack(states)
        rows = torch.tensor(row_of_request).repeat_interleave(torch.tensor(sizes)).to(self.device)
        return table, rows

    @torch.no_grad()
    def learn(self, lessons: Sequence[Lesson]) -> list[Learned]:
        """Take one step for every stream among the lessons, in one backward, and publish the new states.

        Lessons of one stream are one group: their rows share their statistics. A lesson of another incarnation than the
        stream's present one is stale and teaches nothing.
        """
        live: dict[str, list[Tensor]] = {}
        records: dict[str, StreamRecord] = {}
        done: list[Learned] = []
        for lesson in lessons:
            record = self._streams.get(lesson.stream)
            if record is None or record.incarnation != lesson.incarnation:
                done.append(Learned(lesson.stream, len(lesson.x), 0, 0.0, "stale"))
                continue
            records.setdefault(lesson.stream, record)
            live.setdefault(lesson.stream, []).append(to_unit(lesson.x))
        if not live:
            return done
        parts = [torch.cat(rows) if len(rows) > 1 else rows[0] for rows in live.values()]
        sizes = tuple(len(part) for part in parts)
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        table, rows = self._table(list(live), list(records.values()), sizes)
        batch = Batch(x, Groups.of(sizes, self.device), weights=x.new_ones(len(x)))
        new, report = self.pipeline.adapt(table, rows, batch)
        counts = torch.stack([report.seen, report.reliable, report.selected, report.applied, report.refused]).tolist()
        entropies = report.entropy.tolist()
        for i, (stream, record) in enumerate(records.items()):
            seen, reliable, selected, applied, refused = (int(count[i]) for count in counts)
            published = self._publish(
                stream,
                record._replace(
                    state=record.state if refused else tree.row(new, i),
                    version=record.version + (not refused),
                    steps=record.steps + applied,
                    seen=record.seen + seen,
                    reliable=record.reliable + reliable,
                    selected=record.selected + selected,
                    refused=record.refused + refused,
                    entropy=entropies[i] if math.isfinite(entropies[i]) and not refused else None,
                ),
            )
            result: Any = "refused" if refused else "applied" if applied else "filtered"
            done.append(Learned(stream, seen, selected, entropies[i], result if published else "stale"))
        return done

    def _publish(self, stream: str, record: StreamRecord) -> bool:
        """Make a record the stream's present one, unless the stream began a new life meanwhile."""
        with self._lock:
            present = self._streams.get(stream)
            if present is None or present.incarnation != record.incarnation:
                return False
            self._streams[stream] = record
            return True


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
