"""What has changed in a bucket: changes are followed in order, and those that a dead writer left open are settled.

See `object_store.py` for how a writer may die.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

from tta_serve.object_format import GONE, SETTLED, VOID, Change, Entry, Start
from tta_serve.object_heads import ATTEMPTS, Heads, Place, contended
from tta_serve.object_log import ChangeLog, Logged, key_of, number_of
from tta_serve.store import Changed, Changes, Notice

GRACE_S = 15.0  # that a change may be open: several times what a healthy writer needs
READ_AT_ONCE = 64

T = TypeVar("T")
R = TypeVar("R")


class _Followed(NamedTuple):
    """How far changes are known."""

    number: int
    changes: list[tuple[int, Change]]  # by key, those behind the number that was asked from
    complete: bool  # no object behind that number was dropped


class Follower:
    """Methods may be called from any thread.

    Args:
        log: the changes.
        heads: what they are of.
        generation: whose heads are told of.
        threads: for requests at once.
        clock: monotonic seconds, by which an open change ages.
    """

    def __init__(
        self, log: ChangeLog, heads: Heads, generation: str, threads: ThreadPoolExecutor, clock: Callable[[], float]
    ) -> None:
        self._log = log
        self._heads = heads
        self._generation = generation
        self._threads = threads
        self._clock = clock
        self._open_since_s: dict[int, float] = {}  # by key: when this client first found it open
        self._ahead: dict[str, Start] = {}  # heads that were told of before the changes that put them there

    def changes(self, since: int) -> Changes:
        """See `Store.changes`."""
        if since < 0:
            return Changes(self._present(), (), ())
        listed = self._log.listed(max(1, key_of(since)))
        if not listed:  # nothing has changed yet, or the bucket was emptied
            return Changes(0, (), ())
        found = self._follow(listed, since)
        notices = tuple(Notice(number_of(key), *change.notice) for key, change in found.changes if change.notice)
        if not found.complete:
            starts = self._scan(since)
            self._ahead = {stream: start for stream, start in starts.items() if start.number > found.number}
            heads = {stream: _changed(stream, start) for stream, start in starts.items()}
        else:
            heads = self._changed(found.changes, since)
        return Changes(found.number, tuple(heads.values()), notices)

    def prune(self, before_s: float) -> None:
        """Drop changes that are older, but the last one: it says where numbers go on."""
        keys = sorted(self._log.listed(None))
        floor = self._log.floor()
        old: list[int] = [key for key in keys if key <= floor]  # somebody died while they were dropped
        for key, logged in self._read(key for key in keys[:-1] if key > floor):
            if logged is None:
                continue
            if logged.state != SETTLED or logged.change.at_s >= before_s:
                break
            old.append(key)
        if old:
            self._log.raise_floor(old[-1])
            together(self._threads, self._log.erase, old)
        if keys and (last := self._log.read(keys[-1])) and last.state == SETTLED:
            change = last.change
            if change.notice and change.at_s < before_s:
                self._log.settle(keys[-1], change._replace(notice=None))

    def _present(self) -> int:
        """The number up to which whoever looks at a head now knows all changes."""
        listed = self._log.listed(None)
        number = 0
        for key in range(max(min(listed), self._log.floor() + 1), max(listed) + 1) if listed else ():
            if listed.get(key) != SETTLED:
                logged = self._settled(key)
                if logged is not None and logged.state != SETTLED:
                    return max(number, number_of(key - 1))
            number = number_of(key)
        return number

    def _follow(self, listed: Mapping[int, int], since: int) -> _Followed:
        begin, end = min(listed), max(listed)
        complete = begin == key_of(since)  # else it was dropped, and what followed it perhaps too
        if not complete:
            begin = max(begin, self._log.floor() + 1)
        number = since
        changes: list[tuple[int, Change]] = []
        for key, logged in self._read(key for key in range(begin, end + 1) if number_of(key) > since):
            if logged is None:
                complete = False
            elif logged.state != SETTLED:
                return _Followed(max(number, number_of(key - 1)), changes, complete)
            else:
                changes.append((key, logged.change))
            number = number_of(key)
        return _Followed(number, changes, complete)

    def _changed(self, changes: Iterable[tuple[int, Change]], since: int) -> dict[str, Changed]:
        """The streams that changed, as the last change of each left them."""
        heads: dict[str, Changed] = {}
        for key, change in changes:
            for place, entry in enumerate(change.entries):
                number = number_of(key, place, len(change.entries))
                if not entry.won or entry.generation != self._generation or number <= since:
                    continue
                ahead = self._ahead.get(entry.stream)
                if ahead is not None and ahead.number > number:  # what was told is not taken back
                    heads[entry.stream] = _changed(entry.stream, ahead)
                else:
                    heads[entry.stream] = Changed(entry.stream, entry.incarnation, entry.version, entry.gone)
        return heads

    def _scan(self, since: int) -> dict[str, Start]:
        """All heads that changed since a number, as they are."""
        places = [place for place, state in self._heads.places(self._generation) if state != VOID]
        found = zip(places, together(self._threads, self._heads.start, places), strict=True)
        starts = {place.stream: seen.start for place, seen in found if seen is not None}
        return {name: start for name, start in starts.items() if start.state != VOID and start.number > since}

    def _read(self, keys: Iterable[int]) -> Iterable[tuple[int, Logged | None]]:
        """Changes in order, settled where that can be done: many are read at once, and no more than are wanted."""
        rest = list(keys)
        for begin in range(0, len(rest), READ_AT_ONCE):
            some = rest[begin : begin + READ_AT_ONCE]
            together(self._threads, self._log.read, some)  # which remembers those that are settled
            for key in some:
                yield key, self._settled(key)

    def _settled(self, key: int) -> Logged | None:
        """A change; settled in its writer's place if it can be. None: it was dropped."""
        logged = self._log.read(key)
        if logged is None or logged.state == SETTLED:
            self._open_since_s.pop(key, None)
            return logged
        now_s = self._clock()
        late = now_s - self._open_since_s.setdefault(key, now_s) >= GRACE_S
        entries = []
        for place, entry in enumerate(logged.change.entries):
            outcome = self._outcome(entry, number_of(key, place, len(logged.change.entries)), late)
            if outcome is None:
                return logged
            entries.append(outcome)
        change = logged.change._replace(entries=tuple(entries))
        self._log.settle(key, change)
        self._open_since_s.pop(key, None)
        return Logged(change, SETTLED)

    def _outcome(self, entry: Entry, number: int, late: bool) -> Entry | None:
        """What became of a head that was to be replaced; None: it may still be."""
        place = Place(entry.generation, entry.stream)
        for _ in range(ATTEMPTS):
            seen = self._heads.start(place)
            start = seen.start if seen else None
            done = start is not None and start.number >= number
            if not done and not late:
                return None
            if done or self._heads.fence(place, seen):
                named = set(start.kept.values()) if start else set()
                self._heads.drop(place, (name for name in entry.objects if name not in named))
                if not done or start is None or start.state == VOID:
                    return entry._replace(won=False)
                gone = start.state == GONE
                return entry._replace(incarnation=start.incarnation, version=start.version, gone=gone, won=True)
        raise contended(entry.stream)


def together(threads: ThreadPoolExecutor, ask: Callable[[T], R], of: Iterable[T]) -> list[R]:
    """Answers in order, asked for at once; when one fails, the others have been waited for."""
    asked = list(of)
    if len(asked) < 2:
        return [ask(each) for each in asked]
    futures = [threads.submit(ask, each) for each in asked]
    wait(futures)
    return [future.result() for future in futures]


def _changed(stream: str, start: Start) -> Changed:
    return Changed(stream, start.incarnation, start.version, start.state == GONE)
