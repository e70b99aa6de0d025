"""The heads in a bucket, of all generations of one model: read, replaced if they are still the same, and put anew.

MODEL/generations/GENERATION/heads/STREAM            the head, with its snapshot
MODEL/generations/GENERATION/kept/STREAM/VERSION-…   a version to roll back to
"""

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tta_serve.errors import Unavailable
from tta_serve.object_bucket import Bucket, Tag
from tta_serve.object_format import (
    ALIVE,
    GONE,
    START_BYTES,
    VOID,
    Entry,
    Start,
    Unreadable,
    as_head,
    decode_head,
    decode_record,
    decode_start,
    encode_head,
    name_of,
    needed_bytes,
    segment,
    state_of,
)
from tta_serve.store import Head, Save, Stored

ATTEMPTS = 16  # at a head that others write all the time


class Place(NamedTuple):
    """Where a head lies."""

    generation: str
    stream: str


class Seen(NamedTuple):
    """The beginning of a head as it was found."""

    start: Start
    tag: Tag  # of the object
    content: bytes  # all but the snapshot, at least


class Plan(NamedTuple):
    """How a head is to be replaced."""

    place: Place
    save: Save
    start: Start  # of the new head
    expected: Tag | None  # of the object that is to be replaced; None: there is none
    put: Mapping[str, bytes]  # objects of kept versions to put with it, by name
    dropped: tuple[str, ...]  # those that the new head does not name any more

    def entry(self) -> Entry:
        objects = (*self.put, *self.dropped)
        return Entry(*self.place, self.start.incarnation, self.start.version, self.start.state == GONE, objects)


class Heads:
    """Methods may be called from any thread.

    Args:
        bucket: where they lie.
        folder: of the model.
    """

    def __init__(self, bucket: Bucket, folder: str) -> None:
        self._bucket = bucket
        self._folder = f"{folder}/generations"

    def load(self, place: Place) -> Head | None:
        path = self._path(place)
        found = self._bucket.get(path)
        if found is None:
            return None
        try:
            start, head = decode_head(found.content)
        except Unreadable as error:
            raise unreadable(self._bucket, path, error) from None
        return None if start.state == VOID else head

    def load_kept(self, place: Place, version: int) -> bytes | None:
        """A version that is kept; None: it is not."""
        for _ in range(ATTEMPTS):
            seen = self.start(place)
            name = seen.start.kept.get(version) if seen else None
            if seen is None or name is None:
                return None
            found = self._bucket.get(self._kept_path(place, name))
            if found is not None:
                return found.content
            again = self.start(place)
            if again is not None and again.tag == seen.tag:  # else it was dropped in between
                raise unreadable(self._bucket, self._kept_path(place, name), Unreadable("it is missing"))
        raise contended(place.stream)

    def start(self, place: Place) -> Seen | None:
        """A head without its snapshot, void ones too; None: there is no object."""
        path, asked = self._path(place), START_BYTES
        try:
            while True:
                found = self._bucket.get(path, asked)
                if found is None:
                    return None
                needed = needed_bytes(found.content)
                if needed <= len(found.content):
                    return Seen(decode_start(found.content), found.tag, found.content)
                if needed > found.whole_bytes:
                    raise Unreadable("it is cut off")
                asked = needed
        except Unreadable as error:
            raise unreadable(self._bucket, path, error) from None

    def line(self, place: Place) -> Stored | None:
        """What a listing says of a stream; None: there is none."""
        seen = self.start(place)
        if seen is None or seen.start.state != ALIVE:
            return None
        try:
            head = as_head(seen.start, decode_record(seen.content), None)
        except Unreadable as error:
            raise unreadable(self._bucket, self._path(place), error) from None
        return Stored(place.stream, head, max(0, seen.start.snapshot_bytes))

    def places(self, generation: str) -> list[tuple[Place, int]]:
        """All heads of a generation, and of each whether it is alive, gone or void."""
        found = self._bucket.objects(f"{self._folder}/{segment(generation)}/heads")
        return [(Place(generation, name_of(each.name)), state_of(each.size)) for each in found]

    def generations(self) -> list[str]:
        return [name_of(each) for each in self._bucket.folders(self._folder)]

    def plan(self, generation: str, save: Save, write: str) -> Plan | None:
        """How to replace a head; None: another is there than the expected one.

        Args:
            generation: whose.
            save: what to put there.
            write: a name that no other write has.
        """
        place, head = Place(generation, save.stream), save.head
        seen = self.start(place)
        if save.expected != (seen.start.tag if seen else None):
            return None
        old = seen.start.kept if seen else {}
        given = {version: f"{version}-{write}" for version in save.keep if version in head.kept}
        kept = {version: name for version, name in {**old, **given}.items() if version in head.kept}
        start = Start(
            incarnation=head.incarnation,
            version=head.version,
            state=GONE if head.gone else ALIVE,
            number=0,  # not known yet
            at_s=time.time(),
            write=write,
            kept=kept,
            snapshot_bytes=-1,
        )
        put = {name: save.keep[version] for version, name in given.items()}
        dropped = tuple(sorted(set(old.values()) - set(kept.values())))
        return Plan(place, save, start, seen.tag if seen else None, put, dropped)

    def replace(self, plan: Plan, number: int) -> bool:
        """Put a head in the place of another, if that is still there; whether it was."""
        for name, content in plan.put.items():
            self._bucket.put(self._kept_path(plan.place, name), content)
        head = plan.save.head
        return self._put(plan.place, plan.start._replace(number=number), plan.expected, head)

    def fence(self, place: Place, seen: Seen | None) -> bool:
        """Put a head there anew as it is (a void one, where there is none): who expects the former one has lost.

        Returns:
            Whether it was still there.
        """
        if seen is None:
            return self._put(place, _void(0), None, None)
        path = self._path(place)
        found = self._bucket.get(path)
        if found is None or found.tag != seen.tag:
            return False
        try:
            start, head = decode_head(found.content)
        except Unreadable as error:
            raise unreadable(self._bucket, path, error) from None
        return self._put(place, start._replace(write=unique()), found.tag, head)

    def void(self, place: Place, before_s: float) -> bool:
        """Leave nothing of a tombstone that is older; delete what is void for longer. Whether a tombstone went."""
        seen = self.start(place)
        if seen is None or seen.start.at_s >= before_s or seen.start.state == ALIVE:
            return False
        if seen.start.state == VOID:
            self._bucket.delete(self._path(place))
            return False
        return self._put(place, _void(seen.start.number), seen.tag, None)

    def drop(self, place: Place, names: Iterable[str]) -> None:
        """Delete objects of kept versions that no head names."""
        for name in names:
            self._bucket.delete(self._kept_path(place, name))

    def _put(self, place: Place, start: Start, expected: Tag | None, head: Head | None) -> bool:
        path = self._path(place)
        content = encode_head(start, head.record if head else {}, head.snapshot if head else None)
        try:
            if self._bucket.put_if(path, content, expected):
                return True
        except Unavailable:
            if not self._is(place, start.write):  # it may have been put, and the answer lost
                raise
            return True
        return self._is(place, start.write)

    def _is(self, place: Place, write: str) -> bool:
        seen = self.start(place)
        return seen is not None and seen.start.write == write

    def _path(self, place: Place) -> str:
        return f"{self._folder}/{segment(place.generation)}/heads/{segment(place.stream)}"

    def _kept_path(self, place: Place, name: str) -> str:
        return f"{self._folder}/{segment(place.generation)}/kept/{segment(place.stream)}/{name}"


def unique() -> str:
    """A name that nothing else has."""
    return uuid.uuid4().hex


def unreadable(bucket: Bucket, path: str, error: Unreadable) -> Unavailable:
    return Unavailable(
        f"the object {path} in {bucket.url} cannot be read: {error}; take it away, or put back what was there"
    )


def contended(stream: str) -> Unavailable:
    return Unavailable(f"stream {stream!r} is written by others all the time: {ATTEMPTS} attempts were lost; try again")


def _void(number: int) -> Start:
    return Start(0, 0, VOID, number, time.time(), unique(), {}, -1)
