import sqlite3
from collections.abc import Iterator

import pytest

from tta_serve import audit
from tta_serve.audit import Change, Row


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in audit.SCHEMA:
        connection.execute(statement)
    yield connection
    connection.close()


LEARN = Change("learn", "acme", "camera-1", "stream", 3, "00", "0f", "counts")
FORGET = Change("forget", "", None, None, 0)


def test_rows_come_back_as_they_were_written(connection: sqlite3.Connection) -> None:
    audit.write(connection.execute, "digits", [LEARN, FORGET], at_s=12.5)
    audit.write(connection.execute, "other", [FORGET], at_s=13.0)
    audit.write(connection.execute, "digits", [], at_s=13.5)
    audit.write(connection.execute, "digits", [FORGET], at_s=14.0)
    assert audit.read(connection.execute, "digits") == [
        Row(1, 12.5, "digits", LEARN),
        Row(2, 12.5, "digits", FORGET),
        Row(4, 14.0, "digits", FORGET),
    ]
    assert audit.read(connection.execute, "other") == [Row(3, 13.0, "other", FORGET)]
    assert audit.read(connection.execute, "none") == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET items = 0",
        "UPDATE audit SET seq = 9 WHERE seq = 1",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE seq = 2",
        "REPLACE INTO audit (seq, at_s, model, namespace, what, items) VALUES (1, 0, 'digits', '', 'nothing', 0)",
        "INSERT INTO audit (seq, at_s, model, namespace, what, items) VALUES (2, 0, 'digits', '', 'nothing', 0)"
        " ON CONFLICT DO UPDATE SET items = 0",
    ],
)
def test_no_row_is_changed_or_dropped(connection: sqlite3.Connection, statement: str) -> None:
    audit.write(connection.execute, "digits", [LEARN, FORGET], at_s=12.5)
    before = audit.read(connection.execute, "digits")
    with pytest.raises(sqlite3.IntegrityError, match="the audit log only grows"):
        connection.execute(statement)
    assert audit.read(connection.execute, "digits") == before


def test_fewer_than_no_items_is_a_mistake(connection: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="items >= 0"):
        audit.write(connection.execute, "digits", [FORGET._replace(items=-1)], at_s=1.0)
    assert audit.read(connection.execute, "digits") == []
