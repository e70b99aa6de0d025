"""Where streams live durably: what every store promises. Values and a protocol; no I/O.

Of each stream a store has one *head*: its present life (`incarnation`), how often it was changed (`version`), a record
of it for people, and its state as a snapshot (`snapshots.py`); beside it, snapshots of earlier versions to roll back
to. A head is replaced by compare-and-set on (incarnation, version): whoever computed from another head than the
present one loses, loads that one, and computes again. Nothing else keeps replicas from undoing each other's work, so
any number of them may write, with nobody in between.

Every change of a head, and every *notice* (what all replicas shall know and no head says), has a number; numbers grow.
A replica asks for what has changed since the last number that it knows, and writes the number it has reached beside
its *lease*: a change has reached everybody when no live member is below its number. A member whose lease is over has
been cut off: it knows that too, by its own clock, and answers with the frozen model until it has caught up.

A stream that was deleted leaves a *tombstone* (`Head.gone`): its incarnation and nothing else, so that what was
learned in the old life is not taken for a new one's. Tombstones are pruned once no lease can be as old.

A store is opened for one model and *generation* (a digest of the model and of the adapters that give its states their
meaning). Generations never read each other's heads; they share members and numbers, and a deletion reaches all of
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Head(NamedTuple):
    """A stream as it is stored."""

    incarnation: int  # of its present life, from 1; of a tombstone: the next life's
    version: int  # grows by one with every published change; 0: has learned nothing
    record: Mapping[str, Any]  # JSON: counters, events (`StreamRecord.to_json`); {} of a tombstone
    snapshot: bytes | None  # None: has learned nothing; also where it was not asked for
    kept: tuple[int, ...] = ()  # versions that can be rolled back to, ascending
    gone: bool = False  # a tombstone

    @property
    def tag(self) -> tuple[int, int]:
        """What compare-and-set compares."""
        return (self.incarnation, self.version)


class Save(NamedTuple):
    """A head to put in the place of another."""

    stream: str
    expected: tuple[int, int] | None  # incarnation and version of the head that is there now; None: there is none
    head: Head
    keep: Mapping[int, bytes] = {}  # snapshots to keep, by version; those not in `head.kept` are dropped


class Changed(NamedTuple):
    """A head that was changed."""

    stream: str
    incarnation: int
    version: int
    gone: bool


class Notice(NamedTuple):
    """What all replicas of a model shall know and no head says."""

    number: int
    kind: str
    detail: str


class Changes(NamedTuple):
    """What has changed since some number."""

    number: int  # of the last change there is
    heads: tuple[Changed, ...]  # each stream once, as it is now
    notices: tuple[Notice, ...]  # in order


class Member(NamedTuple):
    """A replica, of whatever generation."""

    replica: str
    until_s: float  # wall clock at which its lease ends, seconds since 1970
    seen: int  # the number up to which it knows all changes
    address: str = ""  # where it can be asked for its metrics


class Stored(NamedTuple):
    """A line of a listing."""

    stream: str
    head: Head  # without the snapshot
    snapshot_bytes: int


class Store(Protocol):
    """One model's streams, in one generation. Methods may be called from any thread.

    Raises, from every method:
        Unavailable: it cannot be reached, read or written now; nothing was changed, as far as can be known.
    """

    def load(self, stream: str) -> Head | None:
        """The head of a stream, or None."""
        ...

    def load_kept(self, stream: str, version: int) -> bytes:
        """The snapshot of a version that is kept.

        Raises:
            NotFound: it is not.
        """
        ...

    def save(self, saves: Sequence[Save]) -> list[int | None]:
        """Put heads in the place of those that are expected; each succeeds or fails for itself.

        Where a tombstone stands, `expected` is its tag. On return what succeeded is durable.

        Returns:
            Of each the number of the change; None where another head was there than the expected one.
        """
        ...

    def page(
        self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()
    ) -> tuple[list[Stored], int]:
        """Streams by name, those that begin with `prefix` and with none of `without`; and how many there are in all."""
        ...

    def count(self) -> int:
        """How many streams there are, without tombstones."""
        ...

    def changes(self, since: int) -> Changes:
        """What has changed since this number; since -1: nothing is listed, only the present number given."""
        ...

    def announce(self, kind: str, detail: str) -> int:
        """Give notice to all replicas; the notice's number."""
        ...

    def erase_elsewhere(self, stream: str) -> int:
        """Put tombstones in the place of the stream's heads in the model's other generations; drop what they keep.

        Returns:
            How many heads there were.
        """
        ...

    def renew(self, replica: str, lease_s: float, seen: int, address: str = "") -> None:
        """Join, or stay, for so many seconds from now; and say up to which number all changes are known."""
        ...

    def members(self) -> list[Member]:
        """The replicas whose lease is not over."""
        ...

    def leave(self, replica: str) -> None:
        """End a lease at once."""
        ...

    def prune(self, older_s: float) -> int:
        """Drop tombstones and notices that are older than so many seconds, and members whose lease ended before that.

        Returns:
            How many tombstones were dropped.
        """
        ...

    def close(self) -> None: ...
