"""A store in this process's memory: for tests, and for servers whose states need not outlive them."""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from tta_serve.errors import NotFound
from tta_serve.store import Changed, Changes, Head, Member, Notice, Save, Stored


class _Entry(NamedTuple):
    """A head as it lies here."""

    head: Head
    kept: dict[int, bytes]
    number: int  # of its last change
    at_s: float  # wall clock, of its last change


class Shelf:
    """What the stores of one model share: heads by generation and stream, notices, members, and the last number."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.number = 0
        self.entries: dict[tuple[str, str], _Entry] = {}
        self.notices: list[tuple[Notice, float]] = []
        self.members: dict[str, Member] = {}


class MemoryStore:
    """A `Store` that lives as long as its process.

    Args:
        generation: digest of the model and of the adapters that give its states their meaning.
        shelf: what it shares with other stores of the same model; None: it has one to itself.
    """

    def __init__(self, generation: str = "", shelf: Shelf | None = None) -> None:
        self._generation = generation
        self._shelf = shelf or Shelf()

    def load(self, stream: str) -> Head | None:
        with self._shelf.lock:
            entry = self._shelf.entries.get((self._generation, stream))
        return entry.head if entry else None

    def load_kept(self, stream: str, version: int) -> bytes:
        with self._shelf.lock:
            entry = self._shelf.entries.get((self._generation, stream))
        if entry is None or version not in entry.kept:
            raise not_kept(stream, version)
        return entry.kept[version]

    def save(self, saves: Sequence[Save]) -> list[int | None]:
        with self._shelf.lock:
            return [self._save(each) for each in saves]

    def page(
        self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()
    ) -> tuple[list[Stored], int]:
        found = [
            Stored(stream, head._replace(snapshot=None), len(head.snapshot or b""))
            for stream, head in self._living()
            if stream.startswith(prefix) and not stream.startswith(without)
        ]
        return sorted(found)[offset : offset + limit], len(found)

    def count(self) -> int:
        return len(self._living())

    def changes(self, since: int) -> Changes:
        with self._shelf.lock:
            if since < 0 or since == self._shelf.number:
                return Changes(self._shelf.number, (), ())
            heads = tuple(
                Changed(stream, *entry.head.tag, entry.head.gone)
                for (generation, stream), entry in self._shelf.entries.items()
                if generation == self._generation and entry.number > since
            )
            notices = tuple(notice for notice, _ in self._shelf.notices if notice.number > since)
            return Changes(self._shelf.number, heads, notices)

    def announce(self, kind: str, detail: str) -> int:
        with self._shelf.lock:
            notice = Notice(self._next(), kind, detail)
            self._shelf.notices.append((notice, time.time()))
            return notice.number

    def erase_elsewhere(self, stream: str) -> int:
        erased = 0
        with self._shelf.lock:
            for (generation, name), entry in self._shelf.entries.items():
                if name == stream and generation != self._generation and not entry.head.gone:
                    tombstone = Head(entry.head.incarnation + 1, 0, {}, None, gone=True)
                    self._shelf.entries[generation, name] = _Entry(tombstone, {}, self._next(), time.time())
                    erased += 1
        return erased

    def renew(self, replica: str, lease_s: float, seen: int, address: str = "") -> None:
        with self._shelf.lock:
            self._shelf.members[replica] = Member(replica, time.time() + lease_s, seen, address)

    def members(self) -> list[Member]:
        now_s = time.time()
        with self._shelf.lock:
            return [member for member in self._shelf.members.values() if member.until_s > now_s]

    def leave(self, replica: str) -> None:
        with self._shelf.lock:
            self._shelf.members.pop(replica, None)

    def prune(self, older_s: float) -> int:
        before_s = time.time() - older_s
        shelf = self._shelf
        with shelf.lock:
            old = [key for key, entry in shelf.entries.items() if entry.head.gone and entry.at_s < before_s]
            for key in old:
                del shelf.entries[key]
            shelf.notices = [(notice, at_s) for notice, at_s in shelf.notices if at_s >= before_s]
            shelf.members = {name: each for name, each in shelf.members.items() if each.until_s >= before_s}
        return len(old)

    def close(self) -> None:
        pass  # what is in memory needs no closing

    def _save(self, save: Save) -> int | None:
        key = (self._generation, save.stream)
        there = self._shelf.entries.get(key)
        if save.expected != (there.head.tag if there else None):
            return None
        kept = {**(there.kept if there else {}), **save.keep}
        kept = {version: kept[version] for version in sorted(save.head.kept) if version in kept}
        head = save.head._replace(record=dict(save.head.record), kept=tuple(kept))
        number = self._next()
        self._shelf.entries[key] = _Entry(head, kept, number, time.time())
        return number

    def _next(self) -> int:
        self._shelf.number += 1
        return self._shelf.number

    def _living(self) -> list[tuple[str, Head]]:
        with self._shelf.lock:
            return [
                (stream, entry.head)
                for (generation, stream), entry in self._shelf.entries.items()
                if generation == self._generation and not entry.head.gone
            ]


def not_kept(stream: str, version: int) -> NotFound:
    return NotFound(f"version {version} of the stream {stream!r} is not kept; its history lists those that are")
