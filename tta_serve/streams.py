"""Streams as values, and the policies around them, without I/O or tensors.

Which row of the table is whose, who was used last, how many may begin, and what happens when a guard trips.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

EVENTS_MAX = 64  # kept of each stream; the oldest go
KEPT_VERSIONS = 4  # good versions of a stream that are kept to roll back to
CALM_STEPS = 64  # after so many steps without a trip the ladder begins at its foot again

Action = Literal["pull", "roll_back", "freeze"]
LADDER: tuple[Action, ...] = ("pull", "roll_back", "freeze")


class Event(NamedTuple):
    """Something in a stream's life that a person may want to know of."""

    at_s: float  # wall clock, seconds since 1970
    version: int  # of the state after it
    what: str


PULL_SHARE = 0.5  # of the way back to the source, on the first rung


class Ladder(NamedTuple):
    """How far the guards have gone with a stream: each trip takes the next rung."""

    rung: int = 0
    calm_steps: int = 0  # since the last trip

    def trip(self) -> tuple["Ladder", Action]:
        """The next rung, and what to do there; the last one is taken again and again.

        >>> ladder, first = Ladder().trip()
        >>> first, ladder.trip()[1], ladder.trip()[0].trip()[1]
        ('pull', 'roll_back', 'freeze')
        """
        return Ladder(min(self.rung + 1, len(LADDER))), LADDER[min(self.rung, len(LADDER) - 1)]

    def step(self) -> "Ladder":
        """After a step without a trip.

        >>> ladder = Ladder(rung=2, calm_steps=CALM_STEPS - 1)
        >>> ladder.step(), Ladder(rung=2).step()
        (Ladder(rung=0, calm_steps=0), Ladder(rung=2, calm_steps=1))
        """
        if not self.rung:
            return self
        return Ladder() if self.calm_steps + 1 >= CALM_STEPS else self._replace(calm_steps=self.calm_steps + 1)


class StreamRecord(NamedTuple):
    """A stream as it stands: an immutable value, so that publishing is one assignment."""

    incarnation: int
    row: int = 0  # of the table; 0: still `init()`
    version: int = 0  # the store's, and one more for each change since
    unsynced: int = 0  # changes that the store does not have yet
    rebased: int = 0  # how often what other replicas learned was taken in
    steps: int = 0  # updates of parameters
    seen: int = 0  # rows given to the adapter
    reliable: int = 0
    selected: int = 0
    refused: int = 0  # updates that a guard refused
    trips: int = 0  # of guards
    entropy: float | None = None  # mean over the rows last learned from, nats
    forgetting: tuple[float, float] | None = None  # error added on the probe, as a share, and its standard error
    checked_steps: int = 0  # `steps` at the last check
    frozen: bool = False  # learns nothing until it is resumed
    ladder: Ladder = Ladder()
    kept: tuple[int, ...] = ()  # good versions, to roll back to
    events: tuple[Event, ...] = ()

    def noted(self, what: str) -> "StreamRecord":
        """With one more event, at this version and time."""
        return self._replace(events=(*self.events, Event(time.time(), self.version, what))[-EVENTS_MAX:])

    def checked(self, notes: Iterable[str]) -> "StreamRecord":
        """After a check, with what it noted."""
        record = self._replace(checked_steps=self.steps)
        for note in notes:
            record = record.noted(note)
        return record

    def caught_up(self, old: "StreamRecord", present: "StreamRecord") -> "StreamRecord":
        """What a step made of `old`, with what happened to the stream while the step ran.

        Freezing, resuming and syncing need not wait for a step: what they changed stands.
        """
        record = self.merged(old, present)
        return record._replace(
            frozen=present.frozen,
            ladder=self.ladder if present.ladder == old.ladder else present.ladder,
            unsynced=present.unsynced + self.version - old.version,
            rebased=present.rebased,
        )

    def merged(self, base: "StreamRecord", theirs: "StreamRecord") -> "StreamRecord":
        """What was made of `base` here, put on top of what somebody else made of it.

        >>> base = StreamRecord(1, version=5, seen=100, steps=3)
        >>> mine, theirs = base._replace(version=7, seen=164, steps=5), base._replace(version=6, seen=132, frozen=True)
        >>> both = mine.merged(base, theirs)
        >>> both.version, both.seen, both.steps, both.frozen
        (8, 196, 5, True)
        """
        counted = {name: getattr(theirs, name) + getattr(self, name) - getattr(base, name) for name in COUNTS}
        mine = {name: getattr(self, name) for name in LATEST if getattr(self, name) != getattr(base, name)}
        events = dict.fromkeys((*theirs.events, *(event for event in self.events if event not in base.events)))
        return theirs._replace(
            **counted,
            **mine,
            kept=theirs.kept if self.kept == base.kept else tuple(sorted({*theirs.kept, *self.kept})[-KEPT_VERSIONS:]),
            events=tuple(sorted(events, key=lambda event: event.at_s))[-EVENTS_MAX:],
        )

    def to_json(self) -> dict[str, Any]:
        """What a store keeps of it beside its incarnation, version and kept versions."""
        kept = {name: getattr(self, name) for name in (*COUNTS, *LATEST) if name != "version"}
        return {**kept, "ladder": list(self.ladder), "events": [list(event) for event in self.events]}

    @classmethod
    def from_json(
        cls, incarnation: int, version: int, kept: tuple[int, ...], content: Mapping[str, Any]
    ) -> "StreamRecord":
        """A record as `to_json` gave it; what an older server did not know has its default."""
        known = {name: content[name] for name in (*COUNTS, *LATEST) if name in content}
        if known.get("forgetting"):
            known["forgetting"] = tuple(known["forgetting"])
        if "ladder" in known:
            known["ladder"] = Ladder(*known["ladder"])
        events = tuple(Event(*event) for event in content.get("events", ()))
        return cls(incarnation, **{**known, "version": version, "kept": kept, "events": events})


COUNTS = ("version", "steps", "seen", "reliable", "selected", "refused", "trips")  # what each adds to
LATEST = ("entropy", "forgetting", "checked_steps", "frozen", "ladder")  # what the last one to change it says


class Rows:
    """Which rows of a table are free. A row that was given back while a forward holds it is free when it lets go.

    Args:
        count: rows of the table; row 0 is `init()`'s and never handed out.

    >>> rows = Rows(3)
    >>> rows.take(), rows.take(), rows.take()
    (1, 2, None)
    >>> rows.hold([2])
    >>> rows.give_back(2)
    >>> rows.take() is None
    True
    >>> rows.release([2])
    >>> rows.take()
    2
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, 0, -1))
        self._holders: dict[int, int] = {}
        self._leaving: set[int] = set()
        self._count = count

    @property
    def used(self) -> int:
        """Rows handed out and not free again."""
        return self._count - 1 - len(self._free)

    def take(self) -> int | None:
        """A free row, or None where there is none."""
        return self._free.pop() if self._free else None

    def hold(self, rows: Iterable[int]) -> None:
        """A forward begins to read these rows."""
        for row in rows:
            self._holders[row] = self._holders.get(row, 0) + 1

    def release(self, rows: Iterable[int]) -> None:
        """A forward that held these rows has ended."""
        for row in rows:
            self._holders[row] -= 1
            if not self._holders[row]:
                del self._holders[row]
                if row in self._leaving:
                    self._leaving.remove(row)
                    self._free.append(row)

    def give_back(self, row: int | None) -> None:
        """Nobody will begin to read this row any more."""
        if not row:  # written out, or `init()`'s
            return
        if row in self._holders:
            self._leaving.add(row)
        else:
            self._free.append(row)


class Recency:
    """Names in the order of their last use; everything O(1).

    >>> recency = Recency()
    >>> for name in "abca": recency.touch(name)
    >>> recency.oldest(), len(recency)
    ('b', 3)
    """

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def touch(self, name: str) -> None:
        self._names[name] = None
        self._names.move_to_end(name)

    def forget(self, name: str) -> None:
        self._names.pop(name, None)

    def oldest(self) -> str:
        return next(iter(self._names))

    def __iter__(self) -> Iterator[str]:
        """The oldest first."""
        return iter(self._names)


class Bucket:
    """A token bucket: at most `per_minute` in any minute, on average, and no more than that at once.

    >>> bucket = Bucket(per_minute=2, now_s=0.0)
    >>> [bucket.take(now_s) for now_s in (0.0, 1.0, 2.0, 31.0)]
    [True, True, False, True]
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._tokens = float(per_minute)
        self._at_s = now_s

    def take(self, now_s: float) -> bool:
        """Take one, if there is one."""
        refilled = self._tokens + (now_s - self._at_s) * self.per_minute / 60
        self._tokens, self._at_s = min(float(self.per_minute), refilled), now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def wait_s(self) -> float:
        """Seconds until there is one again."""
        return max(0.0, (1 - self._tokens) * 60 / self.per_minute)
