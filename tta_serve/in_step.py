"""Streams in step with the store: loaded when asked for, saved when they learned, gone when others need room."""

import logging
from collections.abc import Iterable, Sequence
from typing import cast

from adapters import PipelineState, optim, tree
from tta_serve.durable import Found, Pushed, Synced, Work
from tta_serve.errors import NotFound, Unavailable
from tta_serve.store import Changes, Stored
from tta_serve.streams import StreamRecord
from tta_serve.working_set import WorkingSet

log = logging.getLogger(__name__)

FLUSH_MAX = 256  # streams given to the store at once


class InStep(WorkingSet):
    """Streams at hand and in the store."""

    def record(self, stream: str) -> StreamRecord:
        """The stream as it stands, at hand or in the store.

        Raises:
            NotFound: it does not exist.
            Unavailable: it is not at hand, and the store cannot say.
        """
        record = self._streams.get(stream)
        if record is None:
            found = self.durable.peek(stream)
            if found is None or found.gone:
                raise NotFound(f"there is no stream named {stream!r}; a stream begins with its first prediction")
            record = found.record
        return record

    def versions(self, stream: str) -> list[int]:
        """The versions that `rollback` can go to: 0 is the state of a stream that has learned nothing.

        Raises:
            NotFound: it does not exist.
        """
        return [0, *self.record(stream).kept]

    def state(self, stream: str) -> PipelineState:
        """A copy of the stream's state, with the optimizer moments that are kept of it.

        Raises:
            NotFound: it does not exist.
            Unavailable: it is not at hand and cannot be loaded, or has no room.
        """
        self.record(stream)
        self._bring([stream])
        with self._lock:
            record = self._use(stream)
            if record is None:
                raise Unavailable(f"there is no room for the state of stream {stream!r} now; try again")
            table = self._table.wake(self._table.read([record.row]), [(stream, record.incarnation)])
            return cast(PipelineState, tree.row(table, 0))

    def page(
        self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()
    ) -> tuple[list[Stored], int]:
        """All streams by name, at hand or not: see `Store.page`.

        Raises:
            Unavailable: the store is.
        """
        self.flush(sorted(self._new))
        return self.durable.store.page(limit, offset, prefix, without=without)

    def flush(self, streams: Sequence[str] | None = None) -> int:
        """Give the store what it does not have yet, and take from it what others learned meanwhile.

        Args:
            streams: of those at hand; None: all.

        Returns:
            How many streams there were to give.

        Raises:
            Unavailable: the store is. What it did not get stays to be given.
        """
        given = 0
        with self._pushing:
            wanted = self.ahead() if streams is None else list(streams)
            for first in range(0, len(wanted), FLUSH_MAX):
                with self._lock:
                    works = [self._work(each) for each in wanted[first : first + FLUSH_MAX] if self._is_ahead(each)]
                pushed, failure = self.durable.push(works)
                given += len(pushed)
                with self._lock:
                    for work in works:
                        if (done := pushed.get(work.stream)) is not None:
                            self._take_in(work, done)
                if failure is not None:
                    raise failure
        return given

    def take_in(self, changes: Changes) -> None:
        """Follow what others changed in the store.

        Raises:
            Unavailable: the store is.
        """
        with self._pushing:
            for head in changes.heads:
                with self._lock:
                    local, synced = self._streams.get(head.stream), self._synced.get(head.stream)
                    if local is None or synced is None:
                        self._pass(head.stream)
                        continue
                    if synced.tag == (head.incarnation, head.version) or head.incarnation < local.incarnation:
                        continue  # nothing new, or old: a command came in between
                    if head.gone or head.incarnation > local.incarnation:
                        self._end_life(head.stream)
                        continue
                # what was learned here is brought together with it by the next flush: doing so now would be a change
                # that others follow, and so on
                if not self._is_ahead(head.stream):
                    self._reload(head.stream)

    def let_go(self) -> None:
        """Have nothing at hand any more; what the store did not get is lost."""
        with self._pushing, self._lock:
            for stream in list(self._streams):
                self._drop(stream)

    def _reload(self, stream: str) -> None:
        found = self.durable.load(stream)
        with self._lock:
            local = self._streams.get(stream)
            if local is None or self._is_ahead(stream):
                return
            if found is None or found.gone or found.tag[0] != local.incarnation:
                self._end_life(stream)
            elif found.tag != self._synced[stream].tag:
                self._replace(stream, local, found.record._replace(rebased=local.rebased + 1), found.tensors, found.tag)

    def _take_in(self, work: Work, pushed: Pushed) -> None:
        """A stream as it goes on, once the store has what it had."""
        stream, present = work.stream, self._streams.get(work.stream)
        if stream in self._new and pushed.tag is not None:
            self._new.discard(stream)
            self.known += 1
        if present is None or present.incarnation != work.record.incarnation:
            return
        if pushed.tag is None:
            self._end_life(stream)
            return
        good = self._good.get(stream, {})
        if left := {version: each for version, each in good.items() if version not in work.good and not pushed.tensors}:
            self._good[stream] = left
        else:
            self._good.pop(stream, None)
        if pushed.tensors is not None:
            self._rebase(work, pushed, present)
            return
        if present is work.record:
            record = pushed.record._replace(row=present.row, rebased=present.rebased)
            self._streams[stream] = record
            self._synced[stream] = Synced(pushed.tag, record)
        else:  # it has gone on meanwhile
            ahead = present.version - work.record.version
            self._streams[stream] = present._replace(version=pushed.record.version + ahead, unsynced=ahead)
            self._synced[stream] = Synced(pushed.tag, pushed.record, work.tensors)

    def _rebase(self, work: Work, pushed: Pushed, present: StreamRecord) -> None:
        """Go on from what came of bringing a stream's work together with others'."""
        stream, tensors = work.stream, pushed.tensors
        assert pushed.tag is not None
        if present is work.record:
            self._replace(stream, present, pushed.record, tensors, pushed.tag)
            return
        record = present.merged(work.record, pushed.record)
        record = record._replace(unsynced=record.version - pushed.record.version, rebased=pushed.record.rebased)
        assert tensors is not None
        base = tree.encode(optim.rest(self._init)) if work.tensors is None else work.tensors
        learned = self.durable.rebased(tensors, base, self._encoded(present.row))
        if self._replace(stream, present, record, learned, pushed.tag):
            self._synced[stream] = Synced(pushed.tag, pushed.record, tensors)

    def _bring(self, streams: Iterable[str]) -> dict[str, Found]:
        """Load those that are not at hand.

        Returns:
            Those that are tombstones: what their next life begins with.

        Raises:
            Unavailable: one of them cannot be loaded; the others were.
        """
        gone: dict[str, Found] = {}
        failed: Unavailable | None = None
        for stream in streams:
            if stream in self._streams:
                continue
            try:
                found = self._load(stream)
            except Unavailable as error:
                failed = error
                continue
            if found and found.gone:
                gone[stream] = found
        if failed:
            raise failed
        return gone

    def _load(self, stream: str) -> Found | None:
        """What the store has, at hand from now on unless it is a tombstone.

        Where a command or another replica changed it while it was read, it is read again: what was deleted must not
        come back.
        """
        with self._lock:
            self._loading += 1
        try:
            while True:
                passed = self._passed[stream]
                found = self.durable.load(stream)
                if found is None or found.gone:
                    return found
                self._make_room(int(found.tensors is not None))
                with self._lock:
                    if stream in self._streams:
                        return found
                    if self._passed[stream] == passed:
                        if not self._put(stream, found):
                            raise Unavailable(f"there is no room for the state of stream {stream!r} now; try again")
                        return found
        finally:
            with self._lock:
                self._loading -= 1
                if not self._loading:
                    self._passed.clear()

    def _make_room(self, count: int) -> None:
        """Let streams go that were used longest ago, so that `count` more can have rows; first give what they learned.

        Where the store is not to be had, those that it is behind of stay, and there are more than `resident`.
        """
        with self._lock:
            over = len(self._recency) + count - self.resident
            leaving = [] if over <= 0 else [each for each in self._recency if not self._needed[each]][:over]
            many = len(self._streams) - self._records_max
            if many > 0:
                leaving += [each for each, record in self._streams.items() if not record.row][: many + many // 4]
            ahead = [each for each in leaving if self._is_ahead(each)]
        if not leaving:
            return
        if ahead:
            try:
                self.flush(ahead)
            except Unavailable:
                log.exception("%d streams stay in memory: what they learned cannot be saved", len(ahead))
        with self._lock:
            for stream in leaving:
                if stream in self._streams and not self._needed[stream] and not self._is_ahead(stream):
                    self._drop(stream)
