"""What SQLite's errors mean to whoever has to remedy them."""

import sqlite3
from typing import NamedTuple


class Fault(NamedTuple):
    """What is wrong with a file."""

    reason: str
    remedy: str
    passes: bool = False  # a connection that met it is as good as before


LOCKED = Fault("another process keeps it locked", "try again, or end that process", passes=True)
FULL = Fault("the disk is full", "make room on it", passes=True)
CLOSED = Fault("it cannot be opened or written", "let this user write the file and its folder, or give another path")
DAMAGED = Fault("it is damaged, or no database", "put a copy of it in its place, or move it away and begin anew")
UNREADABLE = Fault("the disk cannot be read or written", "see the system's log")
OTHER = Fault("SQLite does not do what it is asked", "see the server's log")

_BY_CODE = {
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: CLOSED,
    sqlite3.SQLITE_PERM: CLOSED,
    sqlite3.SQLITE_AUTH: CLOSED,
    sqlite3.SQLITE_CANTOPEN: CLOSED,
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
    sqlite3.SQLITE_IOERR: UNREADABLE,
}


def fault_of(error: sqlite3.Error) -> Fault:
    """What an error means; `OTHER` where nothing is known about it.

    >>> try:
    ...     sqlite3.connect("/no such folder/states.db")
    ... except sqlite3.Error as error:
    ...     fault_of(error).reason
    'it cannot be opened or written'
    """
    code: int = getattr(error, "sqlite_errorcode", -1)  # −1: not SQLite's error but of Python's module
    return _BY_CODE.get(code & 0xFF, OTHER) if code >= 0 else OTHER
