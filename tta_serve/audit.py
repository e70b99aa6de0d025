"""What was learned and what was removed, and when: a table that only grows, without contents.

No label, no id of a prediction, no code: how many items, whose, and the digests of the states before and after. The
rows lie in the database whose changes they tell of, and are written in the same transaction as those.

Triggers refuse to change or to drop a row. That stops mistakes and SQL from elsewhere; whoever may write the file may
also remove the triggers, so that an audit against the server's owner needs a copy out of the owner's reach.
"""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Scope = Literal["stream", "shared"]
Execute = Callable[..., sqlite3.Cursor]  # of a connection

SCHEMA = (
    """
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        at_s REAL NOT NULL,
        model TEXT NOT NULL,
        namespace TEXT NOT NULL,
        stream TEXT,
        what TEXT NOT NULL,
        scope TEXT,
        items INTEGER NOT NULL CHECK (items >= 0),
        state_before TEXT,
        state_after TEXT,
        note TEXT
    )
    """,
    "CREATE INDEX audit_of_stream ON audit (model, scope, stream)",
    "CREATE INDEX audit_of_namespace ON audit (model, scope, namespace)",
    "CREATE TRIGGER audit_keeps BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    "CREATE TRIGGER audit_stays BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    # INSERT OR REPLACE drops the row that is in its way without asking the trigger on DELETE
    """
    CREATE TRIGGER audit_grows BEFORE INSERT ON audit WHEN EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq)
    BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END
    """,
)


class Change(NamedTuple):
    """One state that changed, as its owner tells of it."""

    what: str  # the request, in a word: learn, forget, reset, delete …
    namespace: str
    stream: str | None  # that asked; None: of the whole namespace
    scope: Scope | None  # of the state; None: none was touched
    items: int  # learned or removed
    state_before: str | None = None  # digest, hex
    state_after: str | None = None
    note: str | None = None  # the server's words, and never the contents of an item


class Row(NamedTuple):
    """A change as it was written."""

    seq: int
    at_s: float  # wall clock, seconds since 1970
    model: str
    change: Change


def write(execute: Execute, model: str, changes: Sequence[Change], at_s: float) -> None:
    """Add rows, in the transaction that is open."""
    for change in changes:
        execute(
            "INSERT INTO audit (at_s, model, what, namespace, stream, scope, items, state_before, state_after, note)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (at_s, model, *change),
        )


def read(execute: Execute, model: str) -> list[Row]:
    """All rows of a model, in the order in which they were written."""
    rows = execute(
        "SELECT seq, at_s, model, what, namespace, stream, scope, items, state_before, state_after, note"
        " FROM audit WHERE model = ? ORDER BY seq",
        (model,),
    )
    return [Row(seq, at_s, name, Change(*change)) for seq, at_s, name, *change in rows]
