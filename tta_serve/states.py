"""The streams of one model, as those use them who answer and who teach: see `working_set.py`."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from adapters import PipelineState, optim, tree
from tta_serve.commands import Commands
from tta_serve.durable import Synced
from tta_serve.errors import NotFound, Overloaded, Unavailable
from tta_serve.streams import KEPT_VERSIONS, Action, StreamRecord
from tta_serve.working_set import TEACHING_MAX, Held

__all__ = ["TEACHING_MAX", "Held", "States"]

log = logging.getLogger(__name__)

NOBODY = StreamRecord(incarnation=0)  # who is answered by the frozen model, and teaches nothing


class States(Commands):
    """Streams and their states."""

    def begin(self, stream: str) -> StreamRecord | None:
        """Begin a stream; None if it exists already, or while nothing can be begun.

        Raises:
            Overloaded: there are `streams_max` already, or too many began in the last minute.
        """
        return self._begin(stream, limited=True)

    def adopt(self, stream: str) -> None:
        """Begin a stream that is known from before, whatever may begin now; nothing is loaded of one that exists."""
        try:
            found = self.durable.peek(stream)
        except Unavailable:
            log.exception("stream %r begins when it is asked for", stream)
            return
        if found is None or found.gone:
            self._begin(stream, limited=False)

    def _begin(self, stream: str, *, limited: bool) -> StreamRecord | None:
        if stream in self._streams or self.cut_off:
            return None
        try:
            found = self._bring([stream]).get(stream)
        except Unavailable:
            log.exception("stream %r is answered by the frozen model", stream)
            return None
        with self._lock:
            if stream in self._streams:
                return None
            if limited:
                self._check_room(stream)
            record = StreamRecord(found.tag[0] if found else 1)
            self._synced[stream] = Synced(found.tag if found else None, record)
            self._new.add(stream)
            record = self._streams[stream] = record.noted("begun" if limited else "known from before")
        self._make_room(0)  # records of streams that have learned nothing take some too
        return record

    def _check_room(self, stream: str) -> None:
        if self.known + len(self._new) >= self.streams_max:
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

    def take_back(self, stream: str, begun: StreamRecord) -> None:
        """Undo `begin`, unless the stream has gone on since, or the store knows of it."""
        with self._lock:
            if self._streams.get(stream) is begun and stream in self._new:
                self._drop(stream)

    @contextmanager
    def answering(self, streams: Sequence[str]) -> Iterator[list[StreamRecord]]:
        """The streams as they stand, begun where they are new, their rows held.

        One that has no room, or cannot be loaded, is answered as a new one: a batch must not fail for one of its
        streams.
        """
        records: list[StreamRecord] = []
        try:
            with self._staying(streams):  # until their rows are held
                for stream in dict.fromkeys(streams):
                    if stream not in self._streams and not self.cut_off:
                        try:
                            self.begin(stream)
                        except Overloaded:
                            log.debug("stream %r is answered by the frozen model: there is no room", stream)
                with self._lock:
                    for stream in streams:
                        record = NOBODY if self.cut_off else self._use(stream) or NOBODY
                        self._rows.hold([record.row])
                        records.append(record)
            yield records
        finally:
            with self._lock:
                self._rows.release([record.row for record in records])

    @contextmanager
    def teaching(self, lives: Iterable[tuple[str, int]]) -> Iterator[Held]:
        """Those streams that are still in that life, learn, and can be read; their rows held, and nobody's room."""
        wanted = [] if self.cut_off else list(lives)
        streams = [stream for stream, _ in wanted]
        held = Held([], [])
        with self._staying(streams):
            try:
                self._bring(streams)
            except Unavailable:
                log.exception("streams that are not at hand learn nothing")
            try:
                with self._lock:
                    for stream, incarnation in wanted:
                        record = self._streams.get(stream)
                        if record is None or record.incarnation != incarnation or record.frozen:
                            continue
                        record = self._use(stream)
                        assert record is not None
                        self._rows.hold([record.row])
                        held.streams.append(stream)
                        held.records.append(record)
                yield held
            finally:
                with self._lock:
                    self._rows.release(held.rows)

    @contextmanager
    def _staying(self, streams: Sequence[str]) -> Iterator[None]:
        """None of these makes room meanwhile, once it is at hand."""
        with self._lock:
            self._needed.update(streams)
        try:
            yield
        finally:
            with self._lock:
                self._needed.subtract(streams)
                self._needed = +self._needed

    def alive(self, stream: str) -> StreamRecord | None:
        """The stream as it stands, at hand or in the store; None where it does not exist, or nobody can say."""
        record = self._streams.get(stream)
        if record is None and not self.cut_off:
            try:
                record = self.record(stream)
            except NotFound:
                return None
            except Unavailable:
                log.exception("stream %r learns nothing", stream)
        return record

    def publish(self, held: Held, records: Sequence[StreamRecord], states: PipelineState) -> list[bool]:
        """Make these the streams' present states and records.

        Returns:
            Of each stream, whether that was done: not where it went another way meanwhile, or where there is no room.
        """
        self._make_room(sum(not record.row for record in held.records))
        rows: list[int | None] = []
        try:
            with self._lock:
                rows = [self._rows.take() for _ in held.streams]
            resting = optim.rest(states)
            if None in rows:
                log.error("no row of the table is free: steps of %d streams are lost", rows.count(None))
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
                if row is None or present is None or present.incarnation != old.incarnation:
                    self._rows.give_back(row)
                    out.append(False)
                    continue
                if present.rebased != old.rebased:  # others' work was taken in while this step was computed
                    onto, base, state = (self._encoded(each) for each in (present.row, old.row, row))
                    self._write(row, self.durable.rebased(onto, base, state))
                self._went_on(stream, present)
                self._rows.give_back(present.row)
                self._streams[stream] = record.caught_up(old, present)._replace(row=row)
                self._recency.touch(stream)
                out.append(True)
            self._table.keep_moments(
                states, [life if is_out else None for life, is_out in zip(held.lives, out, strict=True)]
            )
        return out

    def keep_good(self, stream: str, record: StreamRecord, state: PipelineState) -> None:
        """Keep a version to roll back to; the store has it with the next flush."""
        tensors = tree.encode(state)
        with self._lock:
            present = self._streams.get(stream)
            if present is None or present.incarnation != record.incarnation or present.rebased != record.rebased:
                return
            kept = (*present.kept, record.version)[-KEPT_VERSIONS:]
            good = self._good.setdefault(stream, {})
            good[record.version] = tensors
            self._good[stream] = {version: each for version, each in good.items() if version in kept}
            self._streams[stream] = present._replace(kept=kept)

    def act(self, stream: str, record: StreamRecord, action: Action) -> None:
        """The rungs above pulling: back to the last good version, and then no more learning."""
        present = self._streams.get(stream)
        if present is None or present.incarnation != record.incarnation:
            return
        if action not in ("roll_back", "freeze"):
            return
        went_back = self._roll_back_to_good(stream)
        if went_back and action == "roll_back":
            return
        try:  # what cannot go back learns no more
            self.freeze(stream, "guards")
        except (Unavailable, NotFound):
            log.exception("stream %r is frozen here alone", stream)
            present = self._streams.get(stream, present)
            self.note(stream, present.incarnation, lambda old: old._replace(frozen=True).noted("frozen: guards"))

    def _roll_back_to_good(self, stream: str) -> bool:
        """To the last good version that can be read; 0, the last one asked, always can where the store can."""
        try:
            for version in reversed(self.versions(stream)):
                try:
                    self.rollback(stream, version, "guards")
                except Unavailable:
                    log.exception("stream %r is rolled back further", stream)
                else:
                    return True
        except (NotFound, Unavailable):
            log.exception("stream %r cannot be rolled back", stream)
        return False
