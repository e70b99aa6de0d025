"""The embedded store: one SQLite file for all models of a server, which any number of processes of one machine share.

Readers and a writer do not wait for each other (a write-ahead log), so there are two connections: what a request waits
for is read while another thread saves.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from tta_serve.errors import NotFound, Unavailable
from tta_serve.sqlite_file import Connection, Execute
from tta_serve.store import Changed, Changes, Head, Member, Notice, Save, Stored

log = logging.getLogger(__name__)

_CHOSEN = """
    FROM streams
    WHERE model = ?1 AND digest = ?2 AND gone = 0 AND stream >= ?3 AND coalesce(stream < ?4, TRUE)
    AND (?5 = '[]' OR NOT EXISTS
        (SELECT 1 FROM json_each(?5) WHERE stream >= value ->> 0 AND coalesce(stream < value ->> 1, TRUE)))
"""
AGAIN_S = 0.05  # that a save waits for a reader, to wipe what an earlier one could not


class SQLiteStore:
    """A `Store` in a file. Making one neither opens the file nor fails.

    Args:
        path: the file, in an existing folder on a local disk.
        model: its name.
        generation: digest of the model and of the adapters that give its states their meaning.
        wait_s: for other threads and processes.
    """

    def __init__(self, path: Path, model: str, generation: str, *, wait_s: float = 2.0) -> None:
        self._path = path
        self._model = model
        self._here = (model, generation)
        self._wait_s = wait_s
        self._reader = Connection(path, wait_s)
        self._writer = Connection(path, wait_s)
        self._wiped = False  # a process that was killed may have left something in the log
        self.residue: str | None = None  # why bytes of what was deleted may still be in the log

    def load(self, stream: str) -> Head | None:
        with self._reader.transaction("DEFERRED") as execute:
            row = execute(
                "SELECT incarnation, version, record, gone, kept, snapshot FROM streams "
                "WHERE model = ? AND digest = ? AND stream = ?",
                (*self._here, stream),
            ).fetchone()
        return _head(*row) if row else None

    def load_kept(self, stream: str, version: int) -> bytes:
        with self._reader.transaction("DEFERRED") as execute:
            row = execute(
                "SELECT kept.snapshot FROM streams JOIN kept ON kept.head = streams.key "
                "WHERE model = ? AND digest = ? AND stream = ? AND kept.version = ?",
                (*self._here, stream, version),
            ).fetchone()
        if row is None:
            raise NotFound(f"version {version} of the stream {stream!r} is not kept; its history lists those that are")
        return bytes(row[0])

    def save(self, saves: Sequence[Save]) -> list[int | None]:
        if not saves:
            return []
        with self._writer.transaction("IMMEDIATE") as execute:
            execute("INSERT OR IGNORE INTO generations (model, digest) VALUES (?, ?)", self._here)
            numbers = [self._save(execute, each) for each in saves]
        self._wipe(any(each.head.gone for each in saves))
        return numbers

    def page(
        self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()
    ) -> tuple[list[Stored], int]:
        chosen = (*self._here, prefix, _after(prefix), json.dumps([[each, _after(each)] for each in without]))
        with self._reader.transaction("DEFERRED") as execute:
            total = execute(f"SELECT COUNT(*) {_CHOSEN}", chosen).fetchone()[0]
            rows = execute(
                f"SELECT stream, size, incarnation, version, record, gone, kept {_CHOSEN} "
                "ORDER BY stream LIMIT ?6 OFFSET ?7",
                (*chosen, limit, offset),
            ).fetchall()
        return [Stored(stream, _head(*row), size) for stream, size, *row in rows], total

    def count(self) -> int:
        with self._reader.transaction("DEFERRED") as execute:
            found = execute("SELECT COUNT(*) FROM streams WHERE model = ? AND digest = ? AND gone = 0", self._here)
            return int(found.fetchone()[0])

    def changes(self, since: int) -> Changes:
        with self._reader.transaction("DEFERRED") as execute:
            row = execute("SELECT last FROM models WHERE name = ?", (self._model,)).fetchone()
            number = row[0] if row else 0
            if since < 0 or since == number:
                return Changes(number, (), ())
            heads = execute(
                "SELECT stream, incarnation, version, gone FROM streams "
                "WHERE model = ? AND digest = ? AND number > ? ORDER BY number",
                (*self._here, since),
            ).fetchall()
            notices = execute(
                "SELECT number, kind, detail FROM notices WHERE model = ? AND number > ? ORDER BY number",
                (self._model, since),
            ).fetchall()
        changed = tuple(
            Changed(stream, incarnation, version, bool(gone)) for stream, incarnation, version, gone in heads
        )
        return Changes(number, changed, tuple(Notice(*notice) for notice in notices))

    def announce(self, kind: str, detail: str) -> int:
        with self._writer.transaction("IMMEDIATE") as execute:
            number = _next(execute, self._model)
            notice = (self._model, number, kind, detail, time.time())
            execute("INSERT INTO notices (model, number, kind, detail, at_s) VALUES (?, ?, ?, ?, ?)", notice)
        return number

    def erase_elsewhere(self, stream: str) -> int:
        with self._writer.transaction("IMMEDIATE") as execute:
            keys = execute(
                "SELECT key FROM streams WHERE model = ? AND digest != ? AND stream = ? AND gone = 0",
                (*self._here, stream),
            ).fetchall()
            for (key,) in keys:
                execute("DELETE FROM kept WHERE head = ?", (key,))
                execute(
                    "UPDATE heads SET incarnation = incarnation + 1, version = 0, gone = 1, number = ?, at_s = ?, "
                    "record = '{}', snapshot = NULL WHERE key = ?",
                    (_next(execute, self._model), time.time(), key),
                )
        self._wipe(bool(keys))
        return len(keys)

    def renew(self, replica: str, lease_s: float, seen: int, address: str = "") -> None:
        with self._writer.transaction("IMMEDIATE") as execute:
            execute(
                "INSERT OR REPLACE INTO members (model, replica, until_s, seen, address) VALUES (?, ?, ?, ?, ?)",
                (self._model, replica, time.time() + lease_s, seen, address),
            )

    def members(self) -> list[Member]:
        with self._reader.transaction("DEFERRED") as execute:
            rows = execute(
                "SELECT replica, until_s, seen, address FROM members WHERE model = ? AND until_s > ?",
                (self._model, time.time()),
            ).fetchall()
        return [Member(*row) for row in rows]

    def leave(self, replica: str) -> None:
        with self._writer.transaction("IMMEDIATE") as execute:
            execute("DELETE FROM members WHERE model = ? AND replica = ?", (self._model, replica))

    def prune(self, older_s: float) -> int:
        values = (self._model, time.time() - older_s)
        with self._writer.transaction("IMMEDIATE") as execute:
            dropped = execute(
                "DELETE FROM heads WHERE gone = 1 "
                "AND generation IN (SELECT key FROM generations WHERE model = ?) AND at_s < ?",
                values,
            ).rowcount
            execute("DELETE FROM notices WHERE model = ? AND at_s < ?", values)
            execute("DELETE FROM members WHERE model = ? AND until_s < ?", values)
        self._wipe(dropped > 0)
        return dropped

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _save(self, execute: Execute, save: Save) -> int | None:
        head = save.head
        there = execute(
            "SELECT incarnation, version FROM streams WHERE model = ? AND digest = ? AND stream = ?",
            (*self._here, save.stream),
        ).fetchone()
        if save.expected != there:
            return None
        number = _next(execute, self._model)
        life = (save.stream, head.incarnation, head.version, head.gone, number, time.time())
        (key,) = execute(
            """
            INSERT INTO heads (generation, stream, incarnation, version, gone, number, at_s, record, snapshot)
            SELECT key, ?, ?, ?, ?, ?, ?, ?, ? FROM generations WHERE model = ? AND digest = ?
            ON CONFLICT (generation, stream) DO UPDATE SET
                incarnation = excluded.incarnation, version = excluded.version, gone = excluded.gone,
                number = excluded.number, at_s = excluded.at_s, record = excluded.record, snapshot = excluded.snapshot
            RETURNING key
            """,
            (*life, json.dumps(dict(head.record)), head.snapshot, *self._here),
        ).fetchone()
        for (version,) in execute("SELECT version FROM kept WHERE head = ?", (key,)).fetchall():
            if version not in head.kept:
                execute("DELETE FROM kept WHERE head = ? AND version = ?", (key, version))
        for version in sorted(set(head.kept) & set(save.keep)):
            execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (key, version, save.keep[version]))
        return number

    def _wipe(self, removed: bool) -> None:
        """Empty the log after something was removed; what cannot be wiped now is tried again with the next save."""
        if not removed and self._wiped:
            return
        try:
            self._writer.empty_log(self._wait_s if removed else AGAIN_S)
        except Unavailable as error:  # what was saved is saved, whatever comes of this
            self._wiped, self.residue = False, str(error)
            log.warning("%s", error)
        else:
            self._wiped, self.residue = True, None


def _next(execute: Execute, model: str) -> int:
    """The number of a change.

    The first one is the time, in ms: so numbers go on growing where the file was lost and another one begun.
    """
    statement = "INSERT INTO models VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET last = last + 1 RETURNING last"
    return int(execute(statement, (model, round(1000 * time.time()))).fetchone()[0])


def _head(
    incarnation: int, version: int, record: str, gone: int, kept: str | None, snapshot: bytes | None = None
) -> Head:
    return Head(incarnation, version, json.loads(record), snapshot, versions(kept), bool(gone))


def versions(listed: str | None) -> tuple[int, ...]:
    """What `group_concat` made of versions, ascending.

    >>> versions("10,9"), versions(None)
    ((9, 10), ())
    """
    return tuple(sorted(map(int, listed.split(",")))) if listed else ()


def _after(prefix: str) -> str | None:
    """The least text that is greater than all that begin with `prefix`; None: there is none.

    >>> _after("cam"), _after("a" + chr(0x10FFFF)), _after("")
    ('can', 'b', None)
    """
    rest = prefix.rstrip(chr(0x10FFFF))
    if not rest:
        return None
    last = ord(rest[-1]) + 1
    return rest[:-1] + chr(0xE000 if last == 0xD800 else last)  # what lies between is no Unicode
