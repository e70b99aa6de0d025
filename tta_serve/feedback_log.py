"""What users have told a model: durable, the truth of which every head's state is a function, and removable for good.

One SQLite file, which several processes may hold at once. What `append` has returned survives a crash of the process
and of the machine: write-ahead log, synced at every commit.

What was removed leaves the *bytes* of the file too. `secure_delete` alone does not see to that: SQLite moves rows
between pages as its trees grow and shrink, and where a row once lay its bytes stay in the page, out of reach of the
later delete (in 3 of 14 random histories of some hundred removals, parts of rows were found). So a removal ends by
writing the file anew (`VACUUM`, in memory as large as the file) and by emptying the write-ahead log. Backups, snapshots
of the file system and the disk's own spare blocks are beyond what a program can reach.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tta_serve import audit
from tta_serve.audit import Change, Execute, Scope
from tta_serve.errors import ConfigError, TooLarge, Unavailable
from tta_serve.feedback_file import FeedbackFile

_ENTRIES = """
    SELECT e.seq, e.stream, e.namespace, e.scope, e.id, e.place, c.number, e.code, e.was_right, e.at_s, e.head, e.class
    FROM entries e JOIN classes c ON c.key = e.class
    WHERE +e.head IN (SELECT number FROM heads WHERE model = ?) AND
"""

_OLDEST = """
    SELECT seq FROM entries JOIN classes ON key = class
    WHERE head = ? AND scope = ? AND owner = ? AND number = ? ORDER BY seq DESC LIMIT -1 OFFSET ?
"""


class Entry(NamedTuple):
    """One image whose class is known."""

    seq: int  # grows, and is never used again
    stream: str  # that gave it
    namespace: str
    scope: Scope  # in effect for its stream alone, or for all of its namespace
    id: str  # of the prediction …
    place: int  # … and which of its images
    label: int  # class number: the model's own come first
    code: bytes  # what the head keeps of the image
    right: bool | None  # whether the prediction made before it was learned said this label; None: unknown
    at_s: float  # wall clock, seconds since 1970


class New(NamedTuple):
    """One item to append."""

    stream: str
    namespace: str
    scope: Scope
    id: str
    place: int
    label: str  # the class's name
    own: int | None  # its number, if it is one of the model's own
    code: bytes
    right: bool | None = None


class OfIds(NamedTuple):
    """Of some predictions of a stream."""

    stream: str
    ids: Sequence[str]


class OfClass(NamedTuple):
    """Of a class: the model's own by its number, an added one by its name; under other heads by its name alone."""

    namespace: str
    label: str
    own: int | None
    stream: str | None = None  # None: of all streams
    scope: Scope | None = None  # None: both


class OfStream(NamedTuple):
    """All that a stream gave."""

    stream: str
    scope: Scope | None = None  # "stream": what is in effect for it alone


class Beyond(NamedTuple):
    """The oldest of a class, where there are more than a window holds. Under this head alone: others have no effect."""

    scope: Scope
    owner: str  # the stream, or the namespace where the scope is shared
    label: int  # class number
    keep: int  # the newest that stay


Where = OfIds | OfClass | OfStream | Beyond


class Found(NamedTuple):
    """What a removal would take."""

    where: Where
    entries: list[Entry]  # of this head, in order of seq
    foreign: tuple[int, ...]  # seq of those written under other heads


class Removed(NamedTuple):
    """What a removal took."""

    entries: list[Entry]
    foreign: int  # that were written under other heads, and had no effect
    residue: str | None  # why bytes of it may still be in the files; None: they are gone


class FeedbackLog:
    """The log of one model. One thread at a time may be in it, not always the same: its caller sees to that.

    Args:
        path: of the SQLite file, in a folder that exists; several models may share one.
        model: name.
        head: digest (hex) of everything that gives codes their meaning. What was written under another is kept, has no
            effect, and is removed like the rest.
        own_classes: C0, how many classes the model itself has; added ones are numbered from there.
        wait_s: how long to wait for another process that holds the file.
        clock: wall clock, seconds since 1970.

    Raises:
        ConfigError: there can be no log at `path`; the message says why and what to do.
        Unavailable: another process keeps it locked.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log = FeedbackLog(Path(folder.name) / "feedback.db", "digits", "00ff", own_classes=10)
    >>> item = New("camera-1", "", "stream", "p-17", 0, label="glyph", own=None, code=bytes([1, 2]))
    >>> [entry] = log.append([item], classes_max=5)
    >>> entry.label, log.append([item], classes_max=5), log.names("")
    (10, [None], {10: 'glyph'})
    >>> removed = log.remove(log.find(OfStream("camera-1")))
    >>> len(removed.entries), removed.residue, log.entries(), log.names("")
    (1, None, [], {})
    >>> log.close()
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: Path,
        model: str,
        head: str,
        own_classes: int,
        wait_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.model = model
        self.own_classes = own_classes
        self._clock = clock
        self._file = FeedbackFile(path, wait_s)
        try:
            self._head = self._number_of(head)
            self._data_version = 0  # SQLite's count of what other connections wrote
            self.changed_elsewhere()
        except BaseException:
            self._file.close()
            raise

    @property
    def residue(self) -> str | None:
        """Why bytes of what was removed may still be in the files; None: they are gone. `wipe` tries again."""
        return self._file.residue

    def append(
        self,
        new: Sequence[New],
        classes_max: int,
        changes: Callable[[Sequence[Entry]], Sequence[Change]] | None = None,
    ) -> list[Entry | None]:
        """Keep some items: all of them or, after an error, none. They are durable once this returns.

        Args:
            new: in the order in which they shall be learned.
            classes_max: how many added classes one stream may have of its own, and a namespace in common.
            changes: asked, with what is about to be kept, for rows of the audit log; the caller learns there, so that
                the digest afterwards is known. The file is locked meanwhile. What it raises undoes the append. Not
                asked where all are there already.

        Returns:
            For each item its entry, or None where (stream, id, place) is there already.

        Raises:
            TooLarge: the message names the label, the limit and the remedy.
            InvalidInput: a text or number that cannot be kept.
            Unavailable: the disk is full, the file locked, damaged or gone.
        """
        made: list[Entry | None] = []
        with self._file.transaction() as execute:
            at_s = self._clock()
            classes = _Classes(execute, self.model, self._head, self.own_classes, classes_max)
            for item in new:
                if self._there(item.stream, item.id, item.place):
                    made.append(None)
                    continue
                key, number = classes.of(item)
                cursor = execute(
                    "INSERT INTO entries (head, stream, namespace, scope, id, place, class, code, was_right, at_s)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (self._head, *item[:5], key, item.code, item.right, at_s),
                )
                made.append(Entry(cursor.lastrowid or 0, *item[:5], number, item.code, item.right, at_s))
            kept = [entry for entry in made if entry is not None]
            if kept and changes is not None:
                audit.write(execute, self.model, changes(kept), at_s)
        return made

    def has(self, stream: str, id: str, place: int) -> bool:
        """Whether this image of this prediction was told already, under this head."""
        with self._file.faults():
            return self._there(stream, id, place)

    def entries(
        self, namespace: str | None = None, stream: str | None = None, scope: Scope | None = None
    ) -> list[Entry]:
        """What was told under this head, in order of `seq`; None: of all."""
        condition, values = _narrowed("+e.head = ?", (self._head,), namespace=namespace, stream=stream, scope=scope)
        with self._file.faults():
            return [_entry(row) for row in self._rows(condition, values)]

    def foreign(self) -> int:
        """How many entries of this model were written under other heads."""
        with self._file.faults():
            count: int = self._file.execute(
                "SELECT COUNT(*) FROM entries JOIN heads ON number = head WHERE model = ? AND head <> ?",
                (self.model, self._head),
            ).fetchone()[0]
        return count

    def streams(self) -> list[str]:
        """Those that have entries of this model, under whichever head; sorted."""
        with self._file.faults():
            rows = self._file.execute(
                "SELECT DISTINCT stream FROM entries"
                " WHERE +head IN (SELECT number FROM heads WHERE model = ?) ORDER BY stream",
                (self.model,),
            ).fetchall()
        return [stream for (stream,) in rows]

    def names(self, namespace: str) -> dict[int, str]:
        """The added classes of a namespace that have entries under this head, by number."""
        with self._file.faults():
            rows = self._file.execute(
                "SELECT number, name FROM classes WHERE model = ? AND namespace = ? AND added"
                " AND EXISTS (SELECT 1 FROM entries WHERE class = key AND head = ?) ORDER BY number",
                (self.model, namespace, self._head),
            ).fetchall()
        return dict(rows)

    def find(self, where: Where) -> Found:
        """What `remove` would take: the state without it can be computed, and its digest, before anything is gone."""
        with self._file.faults():
            return self._found(where, self._matching(where))

    def remove(self, found: Found, changes: Sequence[Change] = (), vacuum: bool = True) -> Removed:
        """Take entries out for good, and names of classes whose last entry went.

        Args:
            found: what `find` gave.
            changes: rows of the audit log, in the same transaction.
            vacuum: write the file anew, which takes about 0.5 s for 100,000 entries. Without it traces of rows can stay
                until the next `wipe` or the next start: for windows, which slide often, and never for requests.

        Raises:
            Unavailable: as `append`; or `found` is no longer what a removal would take. Nothing was removed then.
        """
        with self._file.transaction() as execute:
            rows = self._matching(found.where)
            if self._found(found.where, rows) != found:
                raise Unavailable(
                    f"another process changed the feedback log {self.path} meanwhile: nothing was removed; try again"
                )
            for row in rows:
                execute("DELETE FROM entries WHERE seq = ?", row[:1])
            for key in {row[-1] for row in rows}:
                execute(
                    "DELETE FROM classes WHERE key = ?1 AND NOT EXISTS (SELECT 1 FROM entries WHERE class = ?1)", (key,)
                )
            if rows:
                execute("UPDATE wiping SET removals = removals + 1")
            audit.write(execute, self.model, changes, self._clock())
        if rows or vacuum:  # what slid away before is wiped with the next request, even if that finds nothing
            self._file.wipe(vacuum)
        return Removed(found.entries, len(found.foreign), self._file.residue)

    def wipe(self) -> str | None:
        """See to it that no byte of what was removed is in the files; costs little where that is so already.

        Returns:
            `residue`: None, or why it cannot be done now.
        """
        self._file.wipe()
        return self._file.residue

    def record(self, changes: Sequence[Change]) -> None:
        """Write rows of the audit log that no entry goes with."""
        with self._file.transaction() as execute:
            audit.write(execute, self.model, changes, self._clock())

    def audit(self) -> list[audit.Row]:
        """The audit log of this model."""
        with self._file.faults():
            return audit.read(self._file.execute, self.model)

    def changed_elsewhere(self) -> bool:
        """Whether another connection has written since this was last asked."""
        with self._file.faults():
            version: int = self._file.execute("PRAGMA data_version").fetchone()[0]
        before, self._data_version = self._data_version, version
        return version != before

    def last_change(self, scope: Scope, owner: str) -> int:
        """The number of the audit log's latest row on one state, which grows with every change; 0 before the first.

        Args:
            scope: of the state.
            owner: the stream, or the namespace where the scope is shared.
        """
        column = "stream" if scope == "stream" else "namespace"
        with self._file.faults():
            newest: int = self._file.execute(
                f"SELECT coalesce(max(seq), 0) FROM audit WHERE model = ? AND scope = ? AND {column} = ?",  # noqa: S608
                (self.model, scope, owner),
            ).fetchone()[0]
        return newest

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _number_of(self, digest: str) -> int:
        """Of a head, in this file."""
        with self._file.transaction(ConfigError) as execute:
            execute("INSERT INTO heads (model, digest) VALUES (?, ?) ON CONFLICT DO NOTHING", (self.model, digest))
            row = execute("SELECT number FROM heads WHERE model = ? AND digest = ?", (self.model, digest)).fetchone()
        return int(row[0])

    def _there(self, stream: str, id: str, place: int) -> bool:
        row = self._file.execute(
            "SELECT 1 FROM entries WHERE head = ? AND stream = ? AND id = ? AND place = ?",
            (self._head, stream, id, place),
        ).fetchone()
        return row is not None

    def _matching(self, where: Where) -> list[Any]:
        """Rows of `_ENTRIES`, under all heads but for `Beyond`."""
        match where:
            case OfIds(stream, ids):
                found = [self._rows("e.stream = ? AND e.id = ?", (stream, id)) for id in dict.fromkeys(ids)]
                return sorted((row for rows in found for row in rows), key=lambda row: row[0])
            case OfClass(namespace, label, own, stream, scope):
                ours = "c.added" if own is None else "NOT c.added AND c.number = ?"
                condition = f"c.namespace = ? AND c.name = ? AND (e.head <> ? OR {ours})"
                values = (namespace, label, self._head, *(() if own is None else (own,)))
                return self._rows(*_narrowed(condition, values, stream=stream, scope=scope))
            case OfStream(stream, scope):
                return self._rows(*_narrowed("e.stream = ?", (stream,), scope=scope))
            case Beyond(scope, owner, label, keep):
                values = (self._head, scope, owner, label, keep)
                return self._rows(f"e.seq IN ({_OLDEST})", values)

    def _rows(self, condition: str, values: tuple[Any, ...]) -> list[Any]:
        return self._file.execute(f"{_ENTRIES} {condition} ORDER BY e.seq", (self.model, *values)).fetchall()

    def _found(self, where: Where, rows: Sequence[Any]) -> Found:
        ours = [_entry(row) for row in rows if row[-2] == self._head]
        return Found(where, ours, tuple(row[0] for row in rows if row[-2] != self._head))


def _narrowed(condition: str, values: tuple[Any, ...], **asked: str | None) -> tuple[str, tuple[Any, ...]]:
    """One more condition for each column of which a value is asked."""
    given = {column: value for column, value in asked.items() if value is not None}
    return " AND ".join([condition, *(f"e.{column} = ?" for column in given)]), (*values, *given.values())


class _Classes:
    """The classes of items that are being appended, within one transaction."""

    def __init__(self, execute: Execute, model: str, head: int, own_classes: int, classes_max: int) -> None:
        self._execute = execute
        self._model = model
        self._head = head
        self._own_classes = own_classes
        self._classes_max = classes_max
        self._held: dict[tuple[Scope, str], set[int]] = {}  # added classes of each owner

    def of(self, item: New) -> tuple[int, int]:
        """Key and number of an item's class; both are made where it is new.

        Raises:
            TooLarge: one more added class than its owner may have.
        """
        if item.own is None:
            key, number = self._added(item)
            self._check(item, key)
            return key, number
        if not 0 <= item.own < self._own_classes:
            raise ValueError(f"the model's own classes are 0 … {self._own_classes - 1}, not {item.own}")
        row = self._execute(
            "SELECT key FROM classes WHERE model = ? AND namespace = ? AND name = ? AND NOT added AND number = ?",
            (self._model, item.namespace, item.label, item.own),
        ).fetchone()
        return row[0] if row else self._insert(item, item.own, added=False), item.own

    def _added(self, item: New) -> tuple[int, int]:
        row = self._execute(
            # a number below the model's own is of a time when the model had fewer
            "SELECT key, number FROM classes WHERE model = ? AND namespace = ? AND name = ? AND added AND number >= ?",
            (self._model, item.namespace, item.label, self._own_classes),
        ).fetchone()
        if row:
            return row[0], row[1]
        used = self._execute(
            "SELECT next FROM numbers WHERE model = ? AND namespace = ?", (self._model, item.namespace)
        ).fetchone()
        number = max(self._own_classes, used[0] if used else 0)
        self._execute("REPLACE INTO numbers VALUES (?, ?, ?)", (self._model, item.namespace, number + 1))
        return self._insert(item, number, added=True), number

    def _insert(self, item: New, number: int, added: bool) -> int:
        cursor = self._execute(
            "INSERT INTO classes (model, namespace, name, number, added) VALUES (?, ?, ?, ?, ?)",
            (self._model, item.namespace, item.label, number, added),
        )
        return cursor.lastrowid or 0

    def _check(self, item: New, key: int) -> None:
        owner = item.stream if item.scope == "stream" else item.namespace
        held = self._held.get((item.scope, owner))
        if held is None:
            rows = self._execute(
                "SELECT DISTINCT class FROM entries JOIN classes ON key = class"
                " WHERE head = ? AND scope = ? AND owner = ? AND added",
                (self._head, item.scope, owner),
            )
            held = self._held[item.scope, owner] = {row[0] for row in rows}
        if key not in held and len(held) >= self._classes_max:
            whose = f"stream {owner!r:.100}" if item.scope == "stream" else f"namespace {owner!r:.100}"
            raise TooLarge(
                f"the label {item.label!r:.100} would be added class {len(held) + 1} of the {whose}, which may have "
                f"{self._classes_max}; use a label that there is, forget a class, or raise the limit"
            )
        held.add(key)


def _entry(row: Any) -> Entry:
    return Entry._make((*row[:8], None if row[8] is None else bool(row[8]), row[9]))
