"""The streams of one model that a replica has at hand: their records, and their states in the table.

A record is an immutable value in a dict, a state a row of the table. Publishing is: write a free row, then swap the
record. Whoever computes holds the rows that it reads, and a row is used again when nobody holds it, so an answer is
that of one version, and nobody waits for anybody's computing.

Streams live in the store (`durable.py`); here is a working copy of those in use. What is done with it stands in three
files, each on the one before: brought in step with the store (`in_step.py`), commanded (`commands.py`), and answered
from and taught (`states.py`). The lock is for bookkeeping in memory alone: nobody who holds it waits for the store.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from adapters import PipelineState, optim, tree
from tta_serve.durable import Durable, Found, Synced, Tag, Tensors, Work
from tta_serve.memory_store import MemoryStore
from tta_serve.streams import Bucket, Recency, Rows, StreamRecord
from tta_serve.table import Table

log = logging.getLogger(__name__)

TEACHING_MAX = 64  # streams of one step


class Held(NamedTuple):
    """Streams whose rows are held while they are computed with."""

    streams: list[str]
    records: list[StreamRecord]

    @property
    def rows(self) -> list[int]:
        return [record.row for record in self.records]

    @property
    def lives(self) -> list[tuple[str, int]]:
        return [(stream, record.incarnation) for stream, record in zip(self.streams, self.records, strict=True)]


class WorkingSet:
    """Streams at hand.

    Args:
        init: the state of a stream that has learned nothing.
        streams_max: how many streams may exist.
        resident: how many of them have their state in the table.
        new_per_minute: how many may begin in a minute; None: any number.
        durable: where streams live; None: in this process's memory.
        answering_max: streams of one forward.
        on_end: told of a stream's life that has ended: its name and incarnation.
    """

    def __init__(
        self,
        init: PipelineState,
        *,
        streams_max: int,
        resident: int = 1024,
        new_per_minute: int | None = None,
        durable: Durable | None = None,
        answering_max: int = 64,
        on_end: Callable[[str, int], None] | None = None,
    ) -> None:
        self.streams_max = streams_max
        self.resident = resident
        self.durable = durable or Durable(MemoryStore(), init=tree.encode(optim.rest(init)))
        self.lease_until_s = math.inf  # monotonic; past it nothing here is known to be still so
        self.known = 0  # streams that the store knows
        self._init = init
        self._on_end = on_end
        # beside the resident ones: those of a step and of a forward that make no room meanwhile, the new rows of the
        # step, and rows given up while it holds them
        rows = 1 + resident + 3 * TEACHING_MAX + answering_max
        self._table = Table(init, rows)
        self._rows = Rows(rows)
        self._recency = Recency()  # of the streams with a row
        self._records_max = max(4 * resident, 4096)  # those that have learned nothing need no row, and are many
        self._streams: dict[str, StreamRecord] = {}
        self._synced: dict[str, Synced] = {}
        self._good: dict[str, dict[int, Tensors]] = {}  # versions to keep that the store does not have yet
        self._new: set[str] = set()  # that the store does not know yet
        self._needed: Counter[str] = Counter()  # that make no room now: a step or a forward is about to read them
        self._loading = 0  # threads that read the store for streams that are not at hand …
        self._passed: Counter[str] = Counter()  # … and what has happened meanwhile to streams that are not, or were
        self._bucket = Bucket(new_per_minute, time.monotonic()) if new_per_minute else None
        self._lock = threading.RLock()
        self._pushing = threading.RLock()  # around all that writes to the store; taken before the other lock

    @property
    def cut_off(self) -> bool:
        """Whether the lease is over: others may have deleted streams without waiting for this replica."""
        return time.monotonic() > self.lease_until_s

    def find(self, stream: str) -> StreamRecord | None:
        """The stream as it stands, if it is at hand."""
        return self._streams.get(stream)

    def names(self) -> list[str]:
        """Those at hand."""
        return sorted(self._streams)

    def bytes(self) -> int:
        """Bytes in memory of all streams that have learned something, optimizer moments included."""
        return self._rows.used * self._table.row_bytes + self._table.working_bytes

    def bytes_of(self, stream: str) -> int:
        """Bytes in memory that are this stream's alone; 0 while it is `init()`, or not at hand."""
        record = self._streams.get(stream)
        return self._table.bytes_of((stream, record.incarnation)) if record and record.row else 0

    def read(self, rows: Sequence[int]) -> PipelineState:
        """The states of these rows, which the caller holds, stacked; without optimizer moments."""
        return cast(PipelineState, self._table.read(rows))

    def read_to_teach(self, held: Held) -> PipelineState:
        """The states of these streams, stacked, with their optimizer moments."""
        return cast(PipelineState, self._table.wake(self._table.read(held.rows), held.lives))

    def note(self, stream: str, incarnation: int, change: Callable[[StreamRecord], StreamRecord]) -> None:
        """Change what is written of a stream; nothing happens when that life is over."""
        with self._lock:
            record = self._streams.get(stream)
            if record is not None and record.incarnation == incarnation:
                self._streams[stream] = change(record)

    def ahead(self) -> list[str]:
        """Streams at hand that the store is behind of."""
        with self._lock:
            return [stream for stream in self._streams if self._is_ahead(stream)]

    def _is_ahead(self, stream: str) -> bool:
        record, synced = self._streams.get(stream), self._synced.get(stream)
        return record is not None and synced is not None and (record is not synced.record or synced.tag is None)

    def _work(self, stream: str) -> Work:
        record = self._streams[stream]
        tensors = self._encoded(record.row) if record.row else None
        return Work(stream, self._synced[stream], record, tensors, dict(self._good.get(stream, {})))

    def _went_on(self, stream: str, present: StreamRecord) -> None:
        """Before a stream goes on from where it was in step: keep that state, to tell what was learned since."""
        synced = self._synced[stream]
        if synced.tensors is None and present.row and not present.unsynced:
            self._synced[stream] = synced._replace(tensors=self._encoded(present.row))

    def _put(self, stream: str, found: Found) -> bool:
        """A stream from the store, at hand from now on; false, and it is not, where there is no row."""
        row = 0
        if found.tensors is not None:
            taken = self._rows.take()
            if taken is None:
                log.error("no row of the table is free for stream %r", stream)
                return False
            row = taken
            self._write(row, found.tensors)
            self._recency.touch(stream)
        record = self._streams[stream] = found.record._replace(row=row)
        self._synced[stream] = Synced(found.tag, record)
        return True

    def _replace(
        self, stream: str, present: StreamRecord, record: StreamRecord, tensors: Tensors | None, tag: Tag
    ) -> bool:
        """Another state and record in the place of those at hand; optimizer moments begin anew."""
        row = 0
        if tensors is not None:
            taken = self._rows.take()
            if taken is None:
                log.error("no row of the table is free for what others taught stream %r; it is loaded again", stream)
                self._drop(stream)
                return False
            row = taken
            self._write(row, tensors)
        self._rows.give_back(present.row)
        self._table.forget_moments((stream, present.incarnation))
        record = self._streams[stream] = record._replace(row=row)
        self._synced[stream] = Synced(tag, record)
        if row:
            self._recency.touch(stream)
        else:
            self._recency.forget(stream)
        return True

    def _use(self, stream: str) -> StreamRecord | None:
        """A stream at hand, used just now."""
        record = self._streams.get(stream)
        if record is not None and record.row:
            self._recency.touch(stream)
        return record

    def _pass(self, stream: str) -> None:
        """What is being read of this stream is no longer so."""
        if self._loading:
            self._passed[stream] += 1

    def _drop(self, stream: str) -> None:
        """No longer at hand; its life goes on."""
        self._pass(stream)
        record = self._streams.pop(stream)
        self._rows.give_back(record.row)
        self._recency.forget(stream)
        self._table.forget_moments((stream, record.incarnation))
        self._synced.pop(stream, None)
        self._good.pop(stream, None)
        self._new.discard(stream)

    def _end_life(self, stream: str) -> None:
        incarnation = self._streams[stream].incarnation
        self._drop(stream)
        if self._on_end:
            self._on_end(stream, incarnation)

    def _encoded(self, row: int) -> Tensors:
        return tree.encode(tree.row(self._table.read([row]), 0))

    def _write(self, row: int, tensors: Tensors) -> None:
        state = tree.decode(optim.rest(self._init), dict(tensors))
        self._table.write([row], tree.stack([state]))
