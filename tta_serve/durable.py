"""A replica's dealings with the store: streams as records and tensors on this side, heads and snapshots on that one.

What a replica learned since it last was in step with the store is a *contribution* (`adapters/merging.py`). A replica
that is alone puts its state in the place of the one that it began from. Where others may have written meanwhile, the
contribution is merged into what is there, and put there only if it is still there: compare-and-set, as often as it
takes.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.merging import Contribution, Merged, Merging, contribute, rebase
from tta_serve import snapshots
from tta_serve.errors import NotFound, Unavailable
from tta_serve.snapshots import Header, Refused
from tta_serve.store import Head, Save, Store
from tta_serve.streams import KEPT_VERSIONS, StreamRecord

log = logging.getLogger(__name__)

ATTEMPTS = 16  # at a compare-and-set: each time that one is lost, another replica has won
COMMANDED = "commanded"  # the notice that a stream's record was changed within its life
OTHER_STRUCTURE = "states have another structure now"
WINDOW = 2  # sync intervals whose contributions are averaged with those that come late

Tensors = Mapping[str, Tensor]
Tag = tuple[int, int]


class Found(NamedTuple):
    """A stream as it is stored."""

    tag: Tag
    record: StreamRecord
    tensors: Tensors | None  # None: it has learned nothing
    gone: bool = False  # a tombstone; the record is that of the life that may begin


class Synced(NamedTuple):
    """Where a replica's working copy last was in step with the store."""

    tag: Tag | None  # of the head; None: the store does not know the stream
    record: StreamRecord  # there; of a stream that it does not know, one that has seen nothing
    tensors: Tensors | None = None  # there; None: nothing was learned, there or since


class Work(NamedTuple):
    """A stream that may have gone on since it was in step with the store."""

    stream: str
    synced: Synced
    record: StreamRecord
    tensors: Tensors | None
    good: Mapping[int, Tensors] = {}  # versions to keep that the store does not have


class Pushed(NamedTuple):
    """What came of giving work to the store."""

    tag: Tag | None  # of the head there is now; None: the life is over
    record: StreamRecord
    tensors: Tensors | None  # brought together with others' work; None: as it was given


class Durable:
    """One replica's side of the store.

    Args:
        store: of its model and generation.
        model, generation: see `snapshots.Header`.
        replica: its name.
        merging: what the leaves of a state mean.
        init: the state of a stream that has learned nothing, encoded.
        on_refused: told why, when a snapshot is refused.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: str = "model",
        generation: str = "0",
        replica: str = "replica",
        merging: Merging | None = None,
        init: Tensors,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        self.store = store
        self.replica = replica
        self.alone = True  # no other replica lives
        self.interval: Callable[[], int] = lambda: 0  # the number of the present sync interval, alike in all replicas
        self._model = model
        self._generation = generation
        self._merging = merging or Merging()
        self._init = init
        self._on_refused = on_refused

    def restructure(self, init: Tensors, merging: Merging) -> None:
        """States have another structure from now on."""
        self._init, self._merging = init, merging

    # -- read ---------------------------------------------------------------------------------------------------------

    def peek(self, stream: str) -> Found | None:
        """As `load`, without looking at the state."""
        head = self.store.load(stream)
        return None if head is None else Found(head.tag, _record(head), None, head.gone)

    def load(self, stream: str) -> Found | None:
        """A stream as it is stored. A snapshot that is refused is given up for the last good one, in a new life.

        Raises:
            Unavailable: the store is.
        """
        for _ in range(ATTEMPTS):
            head = self.store.load(stream)
            if head is None or head.snapshot is None:
                return None if head is None else Found(head.tag, _record(head), None, head.gone)
            try:
                return Found(head.tag, _record(head), self._decode(stream, head.snapshot).state)
            except Refused as error:
                if error.reason == OTHER_STRUCTURE and not self.alone:
                    raise  # of a replica with other translators, which must not lose it
                self._give_up(stream, head, error)
        raise _beaten(stream)

    def kept(self, stream: str, version: int) -> Tensors:
        """A version that is kept.

        Raises:
            NotFound: it is not.
            Unavailable: it cannot be read.
        """
        return self._decode(stream, self.store.load_kept(stream, version)).state

    def _decode(self, stream: str, content: bytes) -> Merged:
        """Raises:
        Refused: it is not what was written, or belongs elsewhere.
        """
        tensors, header = snapshots.decode(content, model=self._model, generation=self._generation, stream=stream)
        try:
            merged = Merged.decode(tensors, json.loads(header.extra)) if header.extra else Merged(tensors)
        except ValueError as error:
            raise Refused(stream, header.version, str(error)) from error
        if _shapes(merged.state) != _shapes(self._init):
            raise Refused(stream, header.version, OTHER_STRUCTURE)
        return merged

    def _give_up(self, stream: str, head: Head, error: Refused) -> None:
        """Begin a new life with the last good version, or with nothing; unless another replica has gone on already."""
        log.error("stream %r: %s", stream, error)
        if self._on_refused:
            self._on_refused(error.reason)
        version, snapshot = 0, None
        for each in reversed(head.kept):
            try:
                content = self.store.load_kept(stream, each)
                merged = self._decode(stream, content)
            except (Refused, NotFound) as also:
                log.error("stream %r: %s", stream, also)  # a reason, not a traceback
            else:
                version, snapshot = each, merged.state
                break
        record = _record(head)._replace(incarnation=head.incarnation + 1, version=head.version + 1)
        record = record._replace(kept=tuple(each for each in record.kept if each <= version))
        record = record.noted(f"version {head.version} refused ({error.reason}): went back to {version}")
        self.store.save([Save(stream, head.tag, self._head(stream, record, snapshot))])

    # -- write --------------------------------------------------------------------------------------------------------

    def push(self, works: Sequence[Work]) -> tuple[dict[str, Pushed], Unavailable | None]:
        """Give work to the store.

        Args:
            works: of different streams.

        Returns:
            By stream, what is there now; and why the others are missing, where some are.
        """
        done: dict[str, Pushed] = {}
        try:
            self._push(works, done)
        except Unavailable as error:  # what was saved must be known, or it would be given again
            return done, error
        return done, None

    def _push(self, works: Sequence[Work], done: dict[str, Pushed]) -> None:
        if self.alone:
            given = [(work, save) for work in works if (save := self._as_given(work, done))]
            numbers = self.store.save([save for _, save in given])
            for (work, save), number in zip(given, numbers, strict=True):
                if number is not None:
                    record = work.record._replace(version=save.head.version, unsynced=0)
                    done[work.stream] = Pushed(save.head.tag, record, None)
        for _ in range(ATTEMPTS):
            left = [work for work in works if work.stream not in done]
            if not left:
                return
            proposed = [(work, *found) for work in left if (found := self._merged(work, done))]
            saved = self.store.save([save for _, save, _ in proposed])
            for (work, _, pushed), number in zip(proposed, saved, strict=True):
                if number is not None:
                    done[work.stream] = pushed
        raise _beaten(next(work.stream for work in works if work.stream not in done))

    def _as_given(self, work: Work, done: dict[str, Pushed]) -> Save | None:
        """What to save where nobody else has written; None, and a line in `done`, where it is no state to save."""
        record = _newer(work.record, work.synced.tag)
        try:
            head = self._head(work.stream, record, work.tensors)
            kept = {version: self._kept(work, version, state) for version, state in work.good.items()}
        except Refused as error:
            done[work.stream] = self._lost(work, error)
            return None
        return Save(work.stream, work.synced.tag, head, kept)

    def _lost(self, work: Work, error: Exception) -> Pushed:
        """What does not fit, or is not finite, is given up for what the store has."""
        log.error("what stream %r learned is lost: %s", work.stream, error)
        return Pushed(None, work.record, None)

    def _merged(self, work: Work, done: dict[str, Pushed]) -> tuple[Save, Pushed] | None:
        """What to save, and what the replica goes on with; None, and a line in `done`, where the life is over."""
        stream, synced = work.stream, work.synced
        head = self.store.load(stream)
        fresh = head is None or head.gone
        if head is None or head.gone:
            over = synced.tag != (head.tag if head else None)
        else:
            over = head.incarnation != work.record.incarnation
        if over:
            done[stream] = Pushed(None, work.record, None)
            return None
        theirs = synced.record if fresh or head is None else _record(head)
        present = Merged(self._init)
        if head is not None and head.snapshot is not None:
            try:
                present = self._decode(stream, head.snapshot)
            except Refused as error:
                self._give_up(stream, head, error)
                done[stream] = Pushed(None, work.record, None)
                return None
        base = self._init if synced.tensors is None else synced.tensors
        state = base if work.tensors is None else work.tensors
        # two contributions of one replica within an interval are two, and add up
        mine = [each.sequence for each in present.rounds if self.replica in each.replicas]
        # nor shall what was learned be lost where another replica's clock is ahead
        sequence = max(self.interval(), *(each + 1 for each in mine), (present.newest or 0) - WINDOW + 1)
        given = Contribution(self.replica, sequence, base, state)
        try:
            merged = contribute(self._merging, present, given, window=0 if self.alone else WINDOW)
        except ValueError as error:
            done[stream] = self._lost(work, error)
            return None
        record = work.record.merged(synced.record, theirs)._replace(unsynced=0)
        record = _newer(record, head.tag if head is not None else None)
        alike = _same(merged.state, state) and theirs.version == synced.record.version
        if alike:
            kept = {v: self._kept(work, v, each) for v, each in work.good.items() if _is_finite(each)}
        else:  # versions have other numbers now; what is good here is kept as what came of it
            record = record._replace(kept=theirs.kept, rebased=work.record.rebased + 1)
            kept = {}
            if work.good:
                record = record._replace(kept=(*theirs.kept, record.version)[-KEPT_VERSIONS:])
        learned = bool(record.version) and bool(merged.state)
        try:
            new = self._head(stream, record, merged.state if learned else None, merged)
        except Refused as error:
            done[stream] = self._lost(work, error)
            return None
        if not alike and work.good and new.snapshot is not None:
            kept = {record.version: new.snapshot}
        expected = head.tag if head is not None else None
        return Save(stream, expected, new, kept), Pushed(new.tag, record, None if alike else merged.state)

    def _head(self, stream: str, record: StreamRecord, state: Tensors | None, rounds: Merged | None = None) -> Head:
        snapshot = None if not state else self._encode(stream, record, state, rounds)
        return Head(record.incarnation, record.version, record.to_json(), snapshot, record.kept)

    def _kept(self, work: Work, version: int, state: Tensors) -> bytes:
        return self._encode(work.stream, work.record._replace(version=version), state)

    def _encode(self, stream: str, record: StreamRecord, state: Tensors, rounds: Merged | None = None) -> bytes:
        tensors, extra = (dict(state), {}) if rounds is None else rounds.encode()
        header = Header(
            model=self._model,
            generation=self._generation,
            stream=stream,
            incarnation=record.incarnation,
            version=record.version,
            steps=record.steps,
            at_s=time.time(),
            extra=json.dumps(extra) if extra.get("rounds") else "",
        )
        return snapshots.encode(tensors, header)

    def rebased(self, onto: Tensors, base: Tensors, state: Tensors) -> Tensors:
        """What was learned from `base` to `state`, put on top of another state."""
        return rebase(self._merging, onto, base, state)

    # -- commands -----------------------------------------------------------------------------------------------------

    def delete(self, stream: str, life: int) -> tuple[Tag, int]:
        """Leave nothing but a tombstone, here and in the model's other generations.

        Args:
            stream: its name.
            life: the incarnation that this replica knows; 0: none.

        Returns:
            The tombstone's tag, and the change's number.
        """

        def gone(_: Head | None, incarnation: int) -> Head:
            return Head(incarnation + 1, 0, {}, None, gone=True)

        # first: while the stream is there, a deletion that failed can be tried again
        self.store.erase_elsewhere(stream)
        head, number = self._replace(stream, life, gone)
        return head.tag, number

    def reset(self, stream: str, present: StreamRecord) -> tuple[StreamRecord, int]:
        """Begin a new life with nothing learned."""

        def new(head: Head | None, incarnation: int) -> Head:
            events = (_record(head) if head is not None and not head.gone else present).events
            return self._head(stream, StreamRecord(incarnation + 1, events=events).noted("reset"), None)

        head, number = self._replace(stream, present.incarnation, new)
        return _record(head), number

    def roll_back(self, stream: str, version: int, why: str) -> tuple[StreamRecord, Tensors | None, int]:
        """Begin a new life with an earlier version's state.

        Raises:
            NotFound: no such stream, or the version is not kept.
            Unavailable: it cannot be read.
        """
        state = self.kept(stream, version) if version else None

        def new(head: Head | None, incarnation: int) -> Head:
            old = _alive(stream, head)
            record = old._replace(incarnation=incarnation + 1, version=old.version + 1, entropy=None, forgetting=None)
            return self._head(stream, record.noted(f"rolled back to {version}: {why}"), state)

        head, number = self._replace(stream, 0, new)
        return _record(head), state, number

    def change(
        self, stream: str, make: Callable[[StreamRecord], StreamRecord]
    ) -> tuple[StreamRecord, StreamRecord, int]:
        """Change what is written of a stream, in the same life; its state stays.

        Returns:
            The record before and after, and the change's number.

        Raises:
            NotFound: no such stream.
        """
        before: list[StreamRecord] = []

        def new(head: Head | None, incarnation: int) -> Head:
            old = _alive(stream, head)
            assert head is not None
            before[:] = [old]
            if make(old) is old:  # so it is already; others may not know yet
                return head
            record = make(old._replace(version=old.version + 1))
            snapshot = None
            if head.snapshot is not None:  # anew: a snapshot names its version
                merged = self._decode(stream, head.snapshot)
                snapshot = self._encode(stream, record, merged.state, merged)
            return Head(incarnation, record.version, record.to_json(), snapshot, record.kept)

        head, _ = self._replace(stream, 0, new)
        # who has learned meanwhile follows heads at its next flush; what is commanded, at once
        return before[0], _record(head), self.store.announce(COMMANDED, stream)

    def _replace(self, stream: str, life: int, make: Callable[[Head | None, int], Head]) -> tuple[Head, int]:
        for _ in range(ATTEMPTS):
            head = self.store.load(stream)
            new = make(head, max(life, head.incarnation if head else 0))
            (number,) = self.store.save([Save(stream, head.tag if head else None, new)])
            if number is not None:
                return new, number
        raise _beaten(stream)


def _alive(stream: str, head: Head | None) -> StreamRecord:
    if head is None or head.gone:
        raise NotFound(f"there is no stream named {stream!r}; a stream begins with its first prediction")
    return _record(head)


def _newer(record: StreamRecord, expected: Tag | None) -> StreamRecord:
    """What takes the place of a head has another tag, be it of counters alone: or compare-and-set would not see it."""
    same = expected is not None and record.version and (record.incarnation, record.version) == expected
    return record._replace(version=record.version + 1) if same else record


def _is_finite(state: Tensors) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in state.values() if leaf.is_floating_point())


def _record(head: Head) -> StreamRecord:
    return StreamRecord.from_json(head.incarnation, head.version, head.kept, head.record)


def _shapes(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _same(some: Tensors, others: Tensors) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def _beaten(stream: str) -> Unavailable:
    return Unavailable(f"stream {stream!r} is written by others all the time: {ATTEMPTS} attempts were lost; try again")
