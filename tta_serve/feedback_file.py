"""The SQLite file of a feedback log: its schema, its setup, its transactions, what is wrong with it, and wiping it."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tta_serve import audit
from tta_serve.audit import Execute
from tta_serve.errors import ConfigError, InvalidInput, Unavailable
from tta_serve.sqlite_faults import LOCKED, OTHER, fault_of

APPLICATION = 0x7474666C  # "ttfl": which program's file it is
CACHE_KIB = 16_384  # of each connection: an append touches a few pages of every index
FORMAT = 1  # grows with every change of the schema that older servers cannot read

_SCHEMA = (
    # what gives codes their meaning
    """
    CREATE TABLE heads (
        number INTEGER PRIMARY KEY, model TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (model, digest)
    )
    """,
    # the model's own classes have rows too: so a class is found by its name under every head
    """
    CREATE TABLE classes (
        key INTEGER PRIMARY KEY,
        model TEXT NOT NULL,
        namespace TEXT NOT NULL,
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        added INTEGER NOT NULL,
        UNIQUE (model, namespace, name, added, number)
    )
    """,
    # apart from the classes: a number stays used when its class has gone
    """
    CREATE TABLE numbers (
        model TEXT NOT NULL, namespace TEXT NOT NULL, next INTEGER NOT NULL, PRIMARY KEY (model, namespace)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE entries (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        head INTEGER NOT NULL REFERENCES heads (number),
        stream TEXT NOT NULL,
        namespace TEXT NOT NULL,
        scope TEXT NOT NULL CHECK (scope IN ('stream', 'shared')),
        owner TEXT GENERATED ALWAYS AS (CASE scope WHEN 'stream' THEN stream ELSE namespace END) VIRTUAL,
        id TEXT NOT NULL,
        place INTEGER NOT NULL,
        class INTEGER NOT NULL REFERENCES classes (key),
        code BLOB NOT NULL,
        was_right INTEGER,
        at_s REAL NOT NULL
    )
    """,
    "CREATE UNIQUE INDEX entries_once ON entries (stream, id, place, head)",
    "CREATE INDEX entries_owned ON entries (head, scope, owner, class)",
    "CREATE INDEX entries_of_class ON entries (class, head)",
    # how many removals there were, and how many of them the file was written anew for
    "CREATE TABLE wiping (removals INTEGER NOT NULL, wiped INTEGER NOT NULL)",
    "INSERT INTO wiping VALUES (0, 0)",
    *audit.SCHEMA,
)

# `+`: no index on heads: there are few, and most entries are of one


class FeedbackFile:
    """A connection to the file: its setup, its transactions, what is wrong with it, and wiping it.

    Args and Raises: as of `FeedbackLog`.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        self._path = path
        self._wait_s = wait_s
        try:
            path.touch(mode=0o600)  # SQLite would let everybody read it
        except OSError as error:
            raise ConfigError(
                f"the feedback log {path} cannot be made: {error.strerror}; give a path in a folder that can be written"
            ) from error
        with self.faults(ConfigError), contextlib.ExitStack() as closing:
            self._connection = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
            closing.callback(self._connection.close)
            self._inode = _inode(path)
            with self._begun():  # or another process may make the file between two looks at it
                self._is_new()  # before anything is changed in what may be another program's
            self._set_up()
            with self._begun():  # a file that cannot be written is seen here
                if self._is_new():
                    self._make()
            self.residue: str | None = None
            self.wipe()  # after a process that was killed between a removal and this
            closing.pop_all()  # it stays open

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except (UnicodeEncodeError, OverflowError) as error:
            raise InvalidInput(
                f"a name or number cannot be kept ({error}); send Unicode and numbers below 2^63"
            ) from error

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self, otherwise: type[ConfigError | Unavailable] = Unavailable) -> Iterator[Execute]:
        """All or nothing, durable when it ends."""
        with self.faults(otherwise):
            if _inode(self._path) != self._inode:
                raise Unavailable(
                    f"the feedback log {self._path} was moved or removed while in use; put it back, then restart"
                )
            with self._begun():
                yield self.execute

    def wipe(self, vacuum: bool = True) -> None:
        """Write the file anew if something was removed, and empty the write-ahead log; `residue` says what is left."""
        try:
            removals, wiped = self.execute("SELECT removals, wiped FROM wiping").fetchone()
            if vacuum and wiped < removals:
                self.execute("VACUUM")
                # not what `removals` is by now: another process may have removed something since
                self.execute("UPDATE wiping SET wiped = max(wiped, ?)", (removals,))
                wiped = removals
            # it waits for readers of what was there before, and for as long as for any lock
            busy = self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        except (sqlite3.Error, MemoryError) as error:  # what was removed is removed, whatever comes of this
            reason = (
                self._reason(error) if isinstance(error, sqlite3.Error) else "there is too little memory for a copy"
            )
            self.residue = f"{self._path} cannot be wiped: {reason}"
            return
        if busy:
            self.residue = f"{self._path} cannot be wiped: another process has read it for more than {self._wait_s:g} s"
        else:
            self.residue = f"{self._path} was not written anew yet" if wiped < removals else None

    @contextlib.contextmanager
    def faults(self, otherwise: type[ConfigError | Unavailable] = Unavailable) -> Iterator[None]:
        """Say what is wrong with the file; mistakes of this program pass."""
        try:
            yield
        except sqlite3.Error as error:
            fault = fault_of(error)
            if fault is OTHER:
                raise
            raised = Unavailable if fault is LOCKED else otherwise
            said = f"the feedback log {self._path} cannot be used: {self._reason(error)}"
            raise raised(f"{said}; {fault.remedy}") from error

    @contextlib.contextmanager
    def _begun(self) -> Iterator[None]:
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        finally:
            if self._connection.in_transaction:  # an error; after some, SQLite itself has ended it
                self.execute("ROLLBACK")

    def _set_up(self) -> None:
        mode = self._write_ahead()
        if mode != "wal":
            raise ConfigError(f"{self._path} has no write-ahead log but {mode!r}; it must lie on a local disk")
        self.execute("PRAGMA synchronous = FULL")
        self.execute("PRAGMA foreign_keys = ON")
        self.execute("PRAGMA temp_store = MEMORY")  # no contents in temporary files
        self.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if not self.execute("PRAGMA secure_delete = ON").fetchone()[0]:
            raise ConfigError(f"SQLite {sqlite3.sqlite_version} cannot delete securely; install another build")

    def _write_ahead(self) -> str:
        until_s = time.monotonic() + self._wait_s
        while True:
            try:
                return str(self.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                # SQLite itself does not wait here for another process that is opening the same new file
                if fault_of(error) is not LOCKED or time.monotonic() > until_s:
                    raise
                time.sleep(0.01)

    def _is_new(self) -> bool:
        """Whether nothing is in the file; ConfigError where that is not ours."""
        application = self.execute("PRAGMA application_id").fetchone()[0]
        written = self.execute("PRAGMA user_version").fetchone()[0]
        if not self.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return True
        if application != APPLICATION:
            raise ConfigError(f"{self._path} is a database, but no feedback log; give another path")
        if written != FORMAT:
            raise ConfigError(
                f"the feedback log {self._path} has format {written} and this server reads {FORMAT}; "
                "use the server that wrote it, or give another path"
            )
        return False

    def _make(self) -> None:
        for statement in _SCHEMA:
            self.execute(statement)
        self.execute(f"PRAGMA application_id = {APPLICATION}")
        self.execute(f"PRAGMA user_version = {FORMAT}")

    def _reason(self, error: sqlite3.Error) -> str:
        fault = fault_of(error)
        if fault is OTHER:
            return str(error)
        waited = f" for more than {self._wait_s:g} s" if fault is LOCKED else ""
        return f"{fault.reason}{waited} ({error})"


def _inode(path: Path) -> int | None:
    """Which file lies there; None: none that can be seen."""
    try:
        return path.stat().st_ino
    except OSError:
        return None
