"""The SQLite file of states: its schema, and connections that open when they are needed, and again after faults."""

import contextlib
import functools
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tta_serve.errors import InvalidInput, Unavailable
from tta_serve.sqlite_faults import LOCKED, fault_of

APPLICATION = 0x74747374  # "ttst": which program's file it is
CACHE_KIB = 4_096  # of each connection
FORMAT = 1  # grows with every change of the schema that older servers cannot read

Execute = Callable[..., sqlite3.Cursor]

_SCHEMA = (
    # the last number that was given to a change
    "CREATE TABLE models (name TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID",
    """
    CREATE TABLE generations (
        key INTEGER PRIMARY KEY, model TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (model, digest)
    )
    """,
    # the snapshot last: what comes before it is read without it
    """
    CREATE TABLE heads (
        key INTEGER PRIMARY KEY,
        generation INTEGER NOT NULL REFERENCES generations (key) ON DELETE CASCADE,
        stream TEXT NOT NULL,
        incarnation INTEGER NOT NULL,
        version INTEGER NOT NULL,
        gone INTEGER NOT NULL,
        number INTEGER NOT NULL,
        at_s REAL NOT NULL,
        record TEXT NOT NULL,
        snapshot BLOB,
        UNIQUE (generation, stream)
    )
    """,
    "CREATE INDEX heads_changed ON heads (generation, number)",
    "CREATE INDEX heads_by_name ON heads (generation, gone, stream)",
    "CREATE INDEX heads_gone ON heads (at_s) WHERE gone = 1",
    """
    CREATE TABLE kept (
        head INTEGER NOT NULL REFERENCES heads (key) ON DELETE CASCADE,
        version INTEGER NOT NULL,
        snapshot BLOB NOT NULL,
        PRIMARY KEY (head, version)
    )
    """,
    """
    CREATE VIEW streams AS
    SELECT
        heads.key, model, digest, stream, incarnation, version, gone, number, at_s, record, snapshot,
        coalesce(length(snapshot), 0) AS size,
        (SELECT group_concat(kept.version) FROM kept WHERE kept.head = heads.key) AS kept
    FROM heads JOIN generations ON generations.key = heads.generation
    """,
    """
    CREATE TABLE notices (
        model TEXT NOT NULL,
        number INTEGER NOT NULL,
        kind TEXT NOT NULL,
        detail TEXT NOT NULL,
        at_s REAL NOT NULL,
        PRIMARY KEY (model, number)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE members (
        model TEXT NOT NULL,
        replica TEXT NOT NULL,
        until_s REAL NOT NULL,
        seen INTEGER NOT NULL,
        address TEXT NOT NULL,
        PRIMARY KEY (model, replica)
    ) WITHOUT ROWID
    """,
)


class Connection:
    """One connection to the file; one thread at a time has it.

    Making it does nothing yet. The file is opened, and made where there is none, by what is first asked of it; after a
    fault, and where another file has come into its place, it is opened again.

    Args:
        path: the file, in an existing folder on a local disk.
        wait_s: for other threads and processes.

    Raises, from every method:
        Unavailable: what is wrong with the file, and what to do.
        InvalidInput: a name or number that SQLite cannot keep.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        self._path = path
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode: int | None = None
        self._closed = False

    @contextlib.contextmanager
    def transaction(self, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[Execute]:
        """Sees one state of the file; what it changes is changed wholly, durable when it ends, or not at all."""
        with self._present() as connection, _begun(connection, kind) as execute:
            yield execute

    def empty_log(self, wait_s: float) -> None:
        """Bring what is in the write-ahead log into the file, and cut the log to nothing: what was removed is in it."""
        with self._present() as connection:
            connection.execute(f"PRAGMA busy_timeout = {round(1000 * wait_s)}")
            try:
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                connection.execute(f"PRAGMA busy_timeout = {round(1000 * self._wait_s)}")
        if busy:
            raise Unavailable(f"the log of {self._path} still holds what was removed: it is being read; end the reader")

    def vacuum(self) -> None:
        """Write the file anew: SQLite moves rows about, and where they were before their bytes may stay."""
        with self._present() as connection:
            connection.execute("PRAGMA temp_store = FILE")  # the copy may be larger than the memory
            connection.execute("VACUUM")
            connection.execute("PRAGMA temp_store = MEMORY")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._let_go()

    @contextlib.contextmanager
    def _present(self) -> Iterator[sqlite3.Connection]:
        if not self._lock.acquire(timeout=self._wait_s):
            raise Unavailable(f"{self._said}: this process has used it for more than {self._wait_s:g} s; try again")
        try:
            if self._closed:
                raise Unavailable(f"{self._said}: it was closed; the server is stopping")
            if self._connection is None or _inode(self._path) != self._inode:
                self._let_go()
                self._connection = self._open()
            yield self._connection
        except sqlite3.Error as error:
            fault = fault_of(error)
            if not fault.passes:
                self._let_go()
            waited = f" for more than {self._wait_s:g} s" if fault is LOCKED else ""
            raise Unavailable(f"{self._said}: {fault.reason}{waited} ({error}); {fault.remedy}") from error
        finally:
            self._lock.release()

    @property
    def _said(self) -> str:
        return f"the states in {self._path} cannot be used"

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.touch(mode=0o600)  # SQLite would let everybody read it
        except OSError as error:
            raise Unavailable(
                f"{self._said}: {error.strerror}; give a path in a folder that this user can write"
            ) from error
        self._inode = _inode(self._path)
        with contextlib.ExitStack() as closing:
            connection = sqlite3.connect(
                self._path, timeout=self._wait_s, isolation_level=None, check_same_thread=False
            )
            closing.callback(connection.close)
            made = self._is_made(connection)  # before anything is changed in what may be another program's
            mode = self._write_ahead(connection)
            if mode != "wal":
                raise Unavailable(f"{self._said}: it has no write-ahead log but {mode!r}; it must lie on a local disk")
            if not made:
                self._make(connection)
            for setting in ("synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY", "secure_delete = ON"):
                connection.execute(f"PRAGMA {setting}")
            connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            closing.pop_all()  # it stays open
        return connection

    def _is_made(self, connection: sqlite3.Connection) -> bool:
        """Whether the schema is in the file; Unavailable where another one is."""
        if not connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            return False
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise Unavailable(f"{self._said}: it is another program's database; give another path")
        written = connection.execute("PRAGMA user_version").fetchone()[0]
        if written != FORMAT:
            raise Unavailable(
                f"{self._said}: it has format {written} and this server reads {FORMAT}; "
                "use the server that wrote it, or give another path"
            )
        return True

    def _make(self, connection: sqlite3.Connection) -> None:
        with _begun(connection, "IMMEDIATE") as execute:
            if self._is_made(connection):  # by another process, meanwhile
                return
            for statement in _SCHEMA:
                execute(statement)
            execute(f"PRAGMA application_id = {APPLICATION}")
            execute(f"PRAGMA user_version = {FORMAT}")

    def _write_ahead(self, connection: sqlite3.Connection) -> str:
        until_s = time.monotonic() + self._wait_s
        while True:
            try:
                return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                # SQLite itself does not wait here for another process that is opening the same new file
                if fault_of(error) is not LOCKED or time.monotonic() > until_s:
                    raise
                time.sleep(0.01)


@contextlib.contextmanager
def _begun(connection: sqlite3.Connection, kind: str) -> Iterator[Execute]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield functools.partial(_execute, connection)
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:  # an error; after some, SQLite itself has ended it
            connection.execute("ROLLBACK")


def _execute(connection: sqlite3.Connection, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
    try:
        return connection.execute(statement, values)
    except (UnicodeEncodeError, OverflowError) as error:
        raise InvalidInput(f"a name or number cannot be kept ({error}); send Unicode and numbers below 2^63") from error


def _inode(path: Path) -> int | None:
    """Which file lies there; None: none that can be seen."""
    try:
        return path.stat().st_ino
    except OSError:
        return None
