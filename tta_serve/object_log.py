"""The numbered changes of a model in a bucket: an object each, whose key is its number, made by whoever comes first.

Numbers have no gaps: the next object is made only when the one before is there, and two writers cannot make the same.
So who has read all objects up to one has missed nothing. Old ones are dropped from the beginning; before that, the
*floor* is raised above them, so that a writer who slept through it and makes a dropped number anew finds out. The
floor begins as the time in ms: numbers go on growing where a bucket was emptied.

A change of several heads has as many numbers, and the last of them is the object's: number = 1024 × key + 1023.
"""

import time
from collections import OrderedDict
from typing import NamedTuple

from tta_serve.errors import Unavailable
from tta_serve.object_bucket import Bucket
from tta_serve.object_format import OPEN, SETTLED, Change, Unreadable, decode_change, encode_change, state_of
from tta_serve.object_heads import unreadable

SPAN = 1024  # numbers of an object: so many heads change at once at most
REMEMBERED = 4096  # settled changes, which never change again
ATTEMPTS = 100  # at a number: each time that one is lost, another writer has won


class Logged(NamedTuple):
    """A change as it lies there."""

    change: Change
    state: int  # OPEN or SETTLED


def number_of(key: int, place: int = 0, count: int = 1) -> int:
    """The number of one of the heads that change together.

    >>> number_of(2), number_of(2, 0, 3), number_of(2, 2, 3)
    (3071, 3069, 3071)
    """
    return key * SPAN + SPAN - count + place


def key_of(number: int) -> int:
    return number // SPAN


class ChangeLog:
    """Methods may be called from any thread.

    Args:
        bucket: where it lies.
        folder: of the model.
    """

    def __init__(self, bucket: Bucket, folder: str) -> None:
        self._bucket = bucket
        self._changes = f"{folder}/changes"
        self._floor = f"{folder}/floor"
        self._last: int | None = None  # the last key known of
        self._settled: OrderedDict[int, Logged] = OrderedDict()

    def listed(self, begin: int | None) -> dict[int, int]:
        """What there is, from a key on: of each key whether it is open or settled, ascending."""
        after = None if begin is None or begin < 1 else _name(begin - 1)
        found = {int(each.name): state_of(each.size) for each in self._bucket.objects(self._changes, after)}
        if found:
            self._last = max(found)
        return found

    def read(self, key: int) -> Logged | None:
        """A change; None: it was dropped."""
        if (known := self._settled.get(key)) is not None:
            return known
        path = self._path(key)
        found = self._bucket.get(path)
        if found is None:
            return None
        try:
            logged = Logged(decode_change(found.content), state_of(found.whole_bytes))
        except Unreadable as error:
            raise unreadable(self._bucket, path, error) from None
        self._remember(key, logged)
        return logged

    def claim(self, change: Change, state: int = OPEN) -> int:
        """Give a change a number, which is the key of its object."""
        self.prepare()
        content = encode_change(change, state)
        for _ in range(ATTEMPTS):
            if self._last is None and not self.listed(None):
                self._last = self.floor()
            key = (self._last or 0) + 1
            if not self._bucket.put_if(self._path(key), content, None):
                there = self._bucket.get(self._path(key))
                if there is None or there.content != content:  # else the answer to a first attempt was lost
                    self.listed(key)
                    continue
            floor = self.floor()
            if key > floor:
                self._last = key
                self._remember(key, Logged(change, state))
                return key
            self._bucket.delete(self._path(key))  # it was made before, and dropped
            self._last = max([floor, *self.listed(None)])
        raise Unavailable(f"the object store {self._bucket.url}: {ATTEMPTS} numbers went to other writers; try again")

    def settle(self, key: int, change: Change) -> None:
        """What came of a change."""
        self._bucket.put(self._path(key), encode_change(change, SETTLED))
        self._remember(key, Logged(change, SETTLED))

    def prepare(self) -> None:
        """Make sure, once, that changes can be made here."""
        if not self._bucket.proven:
            self._bucket.prove(self._floor, _number(self.floor()))

    def floor(self) -> int:
        """The last key that was dropped, or may be at any moment."""
        for _ in range(2):
            found = self._bucket.get(self._floor)
            if found is not None:
                try:
                    return int(found.content)
                except ValueError as error:
                    raise unreadable(self._bucket, self._floor, Unreadable(str(error))) from None
            begin = round(1000 * time.time())
            if self._bucket.put_if(self._floor, _number(begin), None):
                return begin
        raise Unavailable(f"the object store {self._bucket.url}: {self._floor} comes and goes")

    def raise_floor(self, last: int) -> None:
        """Say that changes up to a key may be gone at any moment; they must be settled, and not the last there is."""
        while self.floor() < last:
            found = self._bucket.get(self._floor)
            if found is not None and self._bucket.put_if(self._floor, _number(last), found.tag):
                break

    def erase(self, key: int) -> None:
        """Take away one that was dropped."""
        self._bucket.delete(self._path(key))
        self._settled.pop(key, None)

    def _remember(self, key: int, logged: Logged) -> None:
        if logged.state == SETTLED:
            self._settled[key] = logged
            while len(self._settled) > REMEMBERED:
                try:
                    self._settled.popitem(last=False)
                except KeyError:  # another thread was first
                    break

    def _path(self, key: int) -> str:
        return f"{self._changes}/{_name(key)}"


def _name(key: int) -> str:
    return f"{key:020d}"


def _number(key: int) -> bytes:
    return str(key).encode()
