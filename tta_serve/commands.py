"""Commands to streams: each changes the store first, which other replicas follow, and then what is at hand."""

from collections.abc import Callable
from typing import Any

from adapters import PipelineState, optim, tree
from adapters.merging import Merging
from tta_serve.durable import Found, Tensors
from tta_serve.errors import NotFound
from tta_serve.in_step import InStep
from tta_serve.streams import Ladder, StreamRecord


class Commands(InStep):
    """Streams that can be commanded."""

    def reset(self, stream: str) -> tuple[StreamRecord, int]:
        """Begin a stream's life anew: its state becomes `init()`. What was under way for the old life is dropped.

        Returns:
            The record (here and below), and the number of the change in the store.

        Raises:
            NotFound: it does not exist.
            Unavailable: the store is; nothing has changed.
        """
        with self._pushing:
            record, number = self.durable.reset(stream, self.record(stream))
            with self._lock:
                return self._begun_anew(stream, record, None), number

    def delete(self, stream: str) -> int:
        """Forget a stream: nothing of it remains.

        Returns:
            The number of the change in the store.

        Raises:
            NotFound: it does not exist.
            Unavailable: the store is; nothing has changed.
        """
        with self._pushing:
            try:
                life = self.record(stream).incarnation
            except NotFound:
                erased = self.durable.store.erase_elsewhere(stream)  # another model or adapter may have learned from it
                if self.durable.alone:
                    if erased:
                        return 0
                    raise
                life = 1  # it may have begun at another replica, which has not told the store yet
            _, number = self.durable.delete(stream, life)
            with self._lock:
                if stream not in self._new:
                    self.known = max(0, self.known - 1)
                if stream in self._streams:
                    self._end_life(stream)
                elif self._on_end:
                    self._on_end(stream, life)
                self._pass(stream)
            return number

    def freeze(self, stream: str, why: str = "by hand") -> tuple[StreamRecord, int]:
        """Let a stream answer as it does now and learn nothing until `resume`.

        Raises:
            NotFound: it does not exist.
            Unavailable: the store is; nothing has changed.
        """
        return self._change(
            stream,
            lambda record: record if record.frozen else record._replace(frozen=True).noted(f"frozen: {why}"),
        )

    def resume(self, stream: str) -> tuple[StreamRecord, int]:
        """Let a frozen stream learn again; its guards begin anew.

        Raises:
            NotFound: it does not exist.
            Unavailable: the store is; nothing has changed.
        """
        return self._change(
            stream,
            lambda record: record._replace(frozen=False, ladder=Ladder()).noted("resumed") if record.frozen else record,
        )

    def _change(self, stream: str, make: Callable[[StreamRecord], StreamRecord]) -> tuple[StreamRecord, int]:
        with self._pushing:
            self.record(stream)
            self.flush([stream])
            before, after, number = self.durable.change(stream, make)
            with self._lock:
                local = self._streams.get(stream)
                if local is None or local.incarnation != after.incarnation:
                    self._pass(stream)
                    return after, number
                synced = self._synced[stream]
                clean = local is synced.record
                record = local.merged(before, after)._replace(row=local.row, rebased=local.rebased)
                if before == after:
                    return local, number
                if synced.tag != (before.incarnation, before.version):  # another replica's work came in between
                    return after, number  # what it changed is taken in with the next changes
                record = record._replace(unsynced=0 if clean else local.unsynced)
                self._streams[stream] = record
                self._synced[stream] = synced._replace(
                    tag=(after.incarnation, after.version), record=record if clean else after
                )
                return record, number

    def rollback(self, stream: str, version: int, why: str = "by hand") -> tuple[StreamRecord, int]:
        """Begin a new life with an earlier state, under a new version. What was under way is dropped.

        Raises:
            NotFound: the stream does not exist, or the version is not kept.
            Unavailable: it cannot be read, or the store is unavailable; the stream goes on as it was.
        """
        with self._pushing:
            self.record(stream)
            if stream in self._streams:
                self.flush([stream])
            if version not in (versions := self.versions(stream)):
                kept = ", ".join(map(str, versions))
                raise NotFound(f"the version {version} of stream {stream!r} is not kept; there are {kept}")
            record, tensors, number = self.durable.roll_back(stream, version, why)
            self._make_room(int(tensors is not None))
            with self._lock:
                return self._begun_anew(stream, record, tensors), number

    def _begun_anew(self, stream: str, record: StreamRecord, tensors: Tensors | None) -> StreamRecord:
        """End the life that is at hand, if one is, and go on with another that the store has."""
        self.known += stream in self._new
        if stream in self._streams:
            self._end_life(stream)
        self._pass(stream)
        self._put(stream, Found((record.incarnation, record.version), record, tensors))
        return self._streams.get(stream, record)

    def restructure(self, init: PipelineState, migrate: Callable[[Any, Any], Any], why: str, merging: Merging) -> None:
        """Let states have another structure, while nobody computes with them.

        Streams at hand go on with what `migrate` leaves them. What the store has of the others has the old structure,
        and is refused when they come back: they begin a new life. Versions to roll back to are dropped.

        Args:
            init: the state of a stream that has learned nothing.
            migrate: see `Table.restructure`.
            why: for the streams' histories.
            merging: what the leaves of a state mean from now on.
        """
        with self._pushing, self._lock:
            self._table.restructure(init, migrate)
            self._init = init
            self.durable.restructure(tree.encode(optim.rest(init)), merging)
            self._good.clear()
            for stream, record in list(self._streams.items()):
                synced = self._synced[stream]
                more = bool(record.row)
                self._streams[stream] = record._replace(
                    version=record.version + more, unsynced=record.unsynced + more, kept=()
                ).noted(why)
                self._synced[stream] = synced._replace(tensors=None)
