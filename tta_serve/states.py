"""The streams of one model: their records, and their states in the table, written out, or kept to roll back to.

A record is an immutable value in a dict, a state a row of the table. Publishing is: write a free row, then swap the
record. Whoever computes holds the rows that it reads, and a row is used again when nobody holds it, so an answer is
that of one version, and nobody waits for anybody's computing.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError

from adapters import PipelineState, optim, tree
from tta_serve.errors import NotFound, Overloaded, Unavailable
from tta_serve.snapshots import Memory, Snapshots
from tta_serve.streams import Action, Bucket, Ladder, Recency, Rows, StreamRecord
from tta_serve.table import Table

log = logging.getLogger(__name__)

TEACHING_MAX = 64  # streams of one step
KEPT_VERSIONS = 4  # good versions of a stream that are kept to roll back to


class Held(NamedTuple):
    """Streams whose rows are held while they are computed with."""

    streams: list[str]
    records: list[StreamRecord]

    @property
    def rows(self) -> list[int]:
        return [row_of(record) for record in self.records]

    @property
    def lives(self) -> list[tuple[str, int]]:
        return [(stream, record.incarnation) for stream, record in zip(self.streams, self.records, strict=True)]


class States:
    """Streams and their states.

    Args:
        init: the state of a stream that has learned nothing.
        streams_max: how many streams may exist.
        resident: how many of them have their state in the table; the others' are written out.
        new_per_minute: how many may begin in a minute; None: any number.
        snapshots: where states are written out and kept to roll back to.
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
        snapshots: Snapshots | None = None,
        answering_max: int = 64,
        on_end: Callable[[str, int], None] | None = None,
    ) -> None:
        self.streams_max = streams_max
        self.resident = resident
        self._snapshots = snapshots or Memory()
        self._init = init
        self._on_end = on_end
        # beside the resident ones: new rows of one step, and rows given up while a step and a forward hold them
        rows = 1 + resident + 2 * TEACHING_MAX + answering_max
        self._table = Table(init, rows)
        self._rows = Rows(rows)
        self._recency = Recency()  # of the streams with a row
        self._streams: dict[str, StreamRecord] = {}
        self._lives = 0  # incarnations handed out
        self._bucket = Bucket(new_per_minute, time.monotonic()) if new_per_minute else None
        self._lock = threading.RLock()  # for bookkeeping, writing a state out and bringing it back; for no computing

    def find(self, stream: str) -> StreamRecord | None:
        """The stream as it stands, if it exists."""
        return self._streams.get(stream)

    def record(self, stream: str) -> StreamRecord:
        """The stream as it stands.

        Raises:
            NotFound: it does not exist.
        """
        record = self._streams.get(stream)
        if record is None:
            raise NotFound(f"there is no stream named {stream!r}; a stream begins with its first prediction")
        return record

    def state(self, stream: str) -> PipelineState:
        """A copy of the stream's state, with the optimizer moments that are kept of it.

        Raises:
            NotFound: it does not exist.
            Unavailable: it was written out and cannot be read back.
        """
        with self._lock:
            self.record(stream)
            record = self._attach(stream)
            table = self._table.wake(self._table.read([row_of(record)]), [(stream, record.incarnation)])
            return cast(PipelineState, tree.row(table, 0))

    def names(self) -> list[str]:
        return sorted(self._streams)

    def bytes(self) -> int:
        """Bytes in memory of all streams that have learned something, optimizer moments included."""
        return self._rows.used * self._table.row_bytes + self._table.working_bytes

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

    def bytes_of(self, stream: str) -> int:
        """Bytes in memory that are this stream's alone; 0 while it is `init()`, or written out.

        Raises:
            NotFound: it does not exist.
        """
        record = self.record(stream)
        return self._table.bytes_of((stream, record.incarnation)) if record.row else 0

    def open(self, stream: str) -> StreamRecord:
        """The stream as it stands, begun if it does not exist.

        Raises:
            Overloaded: there are too many, or too many new ones.
        """
        record = self._streams.get(stream)
        if record is not None:
            return record
        return self.begin(stream) or self.record(stream)

    def begin(self, stream: str) -> StreamRecord | None:
        """Begin a stream; None if it exists already.

        Raises:
            Overloaded: there are `streams_max` already, or too many began in the last minute.
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
            if self._bucket and not self._bucket.take(time.monotonic()):
                raise Overloaded(
                    f"{self._bucket.per_minute} streams have begun within a minute, the limit "
                    f"(streams.new_per_minute); begin {stream!r} later",
                    retry_after_s=self._bucket.wait_s(),
                )
            record = self._streams[stream] = self._new_life().noted("begun")
            return record

    def adopt(self, stream: str) -> None:
        """Begin a stream that is known from before, whatever may begin now."""
        with self._lock:
            if stream not in self._streams:
                self._streams[stream] = self._new_life().noted("known from before")

    def take_back(self, stream: str, begun: StreamRecord) -> None:
        """Undo `begin`, unless the stream has gone on since."""
        with self._lock:
            if self._streams.get(stream) is begun:
                del self._streams[stream]

    def reset(self, stream: str) -> StreamRecord:
        """Begin a stream's life anew: its state becomes `init()`. What was under way for the old life is dropped.

        Raises:
            NotFound: it does not exist.
            Unavailable: its snapshots cannot be deleted.
        """
        with self._lock:
            old = self.record(stream)
            self._erase(stream)
            self._end_life(stream, old)
            record = self._streams[stream] = self._new_life()._replace(events=old.events).noted("reset")
            return record

    def delete(self, stream: str) -> None:
        """Forget a stream: nothing of it remains.

        Raises:
            NotFound: it does not exist.
            Unavailable: its snapshots cannot be deleted.
        """
        with self._lock:
            record = self.record(stream)
            self._erase(stream)
            self._end_life(stream, record)
            del self._streams[stream]

    def freeze(self, stream: str, why: str = "by hand") -> StreamRecord:
        """Let a stream answer as it does now and learn nothing until `resume`.

        Raises:
            NotFound: it does not exist.
        """
        with self._lock:
            record = self.record(stream)
            if not record.frozen:
                record = self._streams[stream] = record._replace(frozen=True).noted(f"frozen: {why}")
            return record

    def resume(self, stream: str) -> StreamRecord:
        """Let a frozen stream learn again; its guards begin anew.

        Raises:
            NotFound: it does not exist.
        """
        with self._lock:
            record = self.record(stream)
            if record.frozen:
                record = self._streams[stream] = record._replace(frozen=False, ladder=Ladder()).noted("resumed")
            return record

    def restructure(self, init: PipelineState, migrate: Callable[[Any, Any], Any], why: str) -> None:
        """Let states have another structure, while nobody computes with them.

        What was written out or kept to roll back to has the old structure and is dropped: streams that were written out
        begin a new life, the others go on with what `migrate` leaves them.

        Args:
            init: the state of a stream that has learned nothing.
            migrate: see `Table.restructure`.
            why: for the streams' histories.
        """
        with self._lock:
            self._table.restructure(init, migrate)
            self._init = init
            for stream, record in list(self._streams.items()):
                if record.row is None:
                    self._end_life(stream, record)
                    new = self._new_life()._replace(events=record.events)
                else:
                    new = record._replace(version=record.version + bool(record.row), kept=(), written=None)
                self._streams[stream] = new.noted(why)
                if record.kept or record.written is not None:
                    try:
                        self._snapshots.delete(stream)
                    except OSError:  # it costs room and nothing else: nobody reads them any more
                        log.exception("the old snapshots of stream %r could not be deleted", stream)

    def versions(self, stream: str) -> list[int]:
        """The versions that `rollback` can go to: 0 is the state of a stream that has learned nothing.

        Raises:
            NotFound: it does not exist.
        """
        return [0, *self.record(stream).kept]

    def rollback(self, stream: str, version: int, why: str = "by hand") -> StreamRecord:
        """Begin a new life with an earlier state, under a new version. What was under way is dropped.

        Raises:
            NotFound: the stream does not exist, or the version is not kept.
            Unavailable: it is kept and cannot be read, or there is no room for it; the stream goes on as it was.
        """
        with self._lock:
            old = self.record(stream)
            if version not in self.versions(stream):
                kept = ", ".join(map(str, self.versions(stream)))
                raise NotFound(f"the version {version} of stream {stream!r} is not kept; there are {kept}")
            row = self._bring_back(stream, version) if version else 0  # before the old life ends: it may fail
            self._end_life(stream, old)
            self._lives += 1
            record = self._streams[stream] = old._replace(
                incarnation=self._lives,
                row=row,
                version=old.version + 1,
                written=None,
                entropy=None,
                forgetting=None,
            ).noted(f"rolled back to {version}: {why}")
            if row:
                self._recency.touch(stream)
            self._drop_written(stream, old)
            return record

    def publish(self, held: Held, records: Sequence[StreamRecord], states: PipelineState) -> list[bool]:
        """Make these the streams' present states and records.

        Returns:
            Of each stream, whether that was done: not where it went another way meanwhile, or where there is no room.
        """
        rows: list[int | None] = []
        try:
            with self._lock:
                for stream in held.streams:
                    rows.append(self._free_row_or_none(stream))
            resting = optim.rest(states)
            if None in rows:
                has_room = [i for i, row in enumerate(rows) if row is not None]
                resting = tree.apply(lambda leaf: leaf[has_room], resting)
            self._table.write([row for row in rows if row is not None], resting)  # nobody reads these rows yet
        except BaseException:
            with self._lock:
                for row in rows:
                    self._rows.give_back(row)
            raise
        out = []
        with self._lock:
            for stream, old, record, row in zip(held.streams, held.records, records, rows, strict=True):
                present = self._streams.get(stream)
                is_out = row is not None and present is not None and present.incarnation == old.incarnation
                out.append(is_out)
                if present is None or not is_out:
                    self._rows.give_back(row)
                    continue
                self._rows.give_back(present.row)
                self._streams[stream] = record.caught_up(old, present)._replace(row=row)
                self._recency.touch(stream)
            self._table.keep_moments(
                states, [life if is_out else None for life, is_out in zip(held.lives, out, strict=True)]
            )
        return out

    def keep_good(self, stream: str, record: StreamRecord, state: PipelineState) -> None:
        """Keep a version to roll back to."""
        with self._lock:  # while it saves too: what is saved after a stream was deleted would remain
            present = self._streams.get(stream)
            if present is None or present.incarnation != record.incarnation:
                return
            try:
                self._snapshots.save(stream, record.version, tree.encode(state))
            except OSError:
                log.exception("version %d of stream %r could not be kept", record.version, stream)
                return
            kept = (*present.kept, record.version)
            for version in kept[:-KEPT_VERSIONS]:
                if version != present.written:
                    self._drop(stream, version)
            self._streams[stream] = present._replace(kept=kept[-KEPT_VERSIONS:])

    def act(self, stream: str, record: StreamRecord, action: Action) -> None:
        """The rungs above pulling: back to the last good version, and then no more learning."""
        with self._lock:
            present = self._streams.get(stream)
            if present is None or present.incarnation != record.incarnation:
                return
            if action in ("roll_back", "freeze"):
                self._roll_back_to_good(stream)
            if action == "freeze":
                self.freeze(stream, "guards")

    @contextmanager
    def answering(self, streams: Sequence[str]) -> Iterator[list[StreamRecord]]:
        """The streams as they stand, begun where they are new, their rows held."""
        records: list[StreamRecord] = []
        try:
            with self._lock:
                for stream in streams:
                    record = self._attach_or_pass(stream)
                    self._rows.hold([row_of(record)])
                    records.append(record)
            yield records
        finally:
            with self._lock:
                self._rows.release([row_of(record) for record in records])

    @contextmanager
    def teaching(self, lives: Iterable[tuple[str, int]]) -> Iterator[Held]:
        """Those streams that are still in that life, learn, and can be read; their rows held."""
        held = Held([], [])
        try:
            with self._lock:
                for stream, incarnation in lives:
                    present = self._streams.get(stream)
                    if present is None or present.incarnation != incarnation or present.frozen:
                        continue
                    record = self._attach_or_none(stream)
                    if record is not None:
                        self._rows.hold([row_of(record)])
                        held.streams.append(stream)
                        held.records.append(record)
            yield held
        finally:
            with self._lock:
                self._rows.release(held.rows)

    def _attach(self, stream: str) -> StreamRecord:
        """An existing stream with its state in the table, used just now."""
        record = self._streams[stream]
        if record.row is None:
            record = self._streams[stream] = record._replace(row=self._bring_back(stream, record.version))
        if record.row:
            self._recency.touch(stream)
        return record

    def _attach_or_pass(self, stream: str) -> StreamRecord:
        """As `_attach`; a stream that has no room, or whose state cannot be read, is answered as a new one.

        A batch must not fail for one of its streams.
        """
        try:
            self.open(stream)
            return self._attach(stream)
        except (Overloaded, NotFound):  # deleted while it asked
            return StreamRecord(incarnation=0)
        except Unavailable:
            log.exception("stream %r is answered by the frozen model", stream)
            return StreamRecord(incarnation=0)

    def _attach_or_none(self, stream: str) -> StreamRecord | None:
        """As `_attach`; None for a stream that does not exist, or whose state cannot be read: others wait with it."""
        if stream not in self._streams:
            return None
        try:
            return self._attach(stream)
        except Unavailable:
            log.exception("stream %r learns nothing", stream)
            return None

    def _free_row_or_none(self, stream: str) -> int | None:
        """As `_free_row`; None where no room can be made: the others of a step shall not lose theirs."""
        try:
            return self._free_row(stream)
        except Unavailable:
            log.exception("a step of stream %r is lost", stream)
            return None

    def _free_row(self, stream: str) -> int:
        """A free row for this stream; where it has none yet, the streams that were used longest ago make room.

        Raises:
            Unavailable: they cannot be written out.
        """
        while stream not in self._recency and len(self._recency) >= self.resident:
            self._write_out(self._recency.oldest())
        row = self._rows.take()
        if row is None:
            raise Unavailable(f"no row of the table is free for {stream!r}: {self._rows.used} are held")
        return row

    def _write_out(self, stream: str) -> None:
        record = self._streams[stream]
        if record.written != record.version:
            state = tree.row(self._table.read([row_of(record)]), 0)
            try:
                self._snapshots.save(stream, record.version, tree.encode(state))
            except OSError as error:
                raise Unavailable(f"the state of stream {stream!r} cannot be written out: {error}") from error
            self._drop_written(stream, record)
        self._leave(stream, record)
        self._streams[stream] = record._replace(row=None, written=record.version)

    def _bring_back(self, stream: str, version: int) -> int:
        """Put a snapshot into a free row.

        Raises:
            Unavailable: it cannot be read, or there is no room.
        """
        state = self._read_back(stream, version)
        row = self._free_row(stream)
        try:
            self._table.write([row], tree.stack([state]))
        except BaseException:
            self._rows.give_back(row)
            raise
        return row

    def _roll_back_to_good(self, stream: str) -> None:
        """To the last good version that can be read; 0, the last one asked, always can."""
        for version in reversed(self.versions(stream)):
            try:
                self.rollback(stream, version, "guards")
            except Unavailable:
                log.exception("stream %r is rolled back further", stream)
            else:
                return

    def _erase(self, stream: str) -> None:
        try:
            self._snapshots.delete(stream)
        except OSError as error:
            raise Unavailable(f"the snapshots of stream {stream!r} cannot be deleted: {error}; try again") from error

    def _drop_written(self, stream: str, record: StreamRecord) -> None:
        """Let go of what was written out before, unless it is kept to roll back to."""
        if record.written is not None and record.written not in record.kept:
            self._drop(stream, record.written)

    def _drop(self, stream: str, version: int) -> None:
        try:
            self._snapshots.drop(stream, version)
        except OSError:  # it costs room and nothing else
            log.exception("version %d of stream %r could not be deleted", version, stream)

    def _read_back(self, stream: str, version: int) -> PipelineState:
        try:
            tensors = self._snapshots.load(stream, version)
            return tree.decode(optim.rest(self._init), tensors)
        except (NotFound, OSError, ValueError, SafetensorError) as error:
            raise Unavailable(
                f"the state of stream {stream!r} at version {version} cannot be read back ({error}); reset the stream"
            ) from error

    def _leave(self, stream: str, record: StreamRecord) -> None:
        """A stream gives up its row and its optimizer moments."""
        self._rows.give_back(record.row)
        self._recency.forget(stream)
        self._table.forget_moments((stream, record.incarnation))

    def _end_life(self, stream: str, record: StreamRecord) -> None:
        self._leave(stream, record)
        if self._on_end:
            self._on_end(stream, record.incarnation)

    def _new_life(self) -> StreamRecord:
        self._lives += 1
        return StreamRecord(incarnation=self._lives)


def row_of(record: StreamRecord) -> int:
    """The row of a stream that is attached."""
    assert record.row is not None
    return record.row
