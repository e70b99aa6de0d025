"""The store's database, looked at from outside while servers write to it: does a stream ever go back, is anything torn?

It reads the file itself, with the server's own check of snapshots: what a server would refuse is torn here.
"""

import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from loadtests.background import Background
from tta_serve.snapshots import Refused, decode

EVERY_S = 0.2
WAIT_S = 1.0  # for the file

Tag = tuple[int, int]  # incarnation and version


class Row(NamedTuple):
    """A stream as it lies there."""

    stream: str
    generation: str
    incarnation: int
    version: int
    snapshot: bytes | None


class Watch(Background):
    """A thread that looks every 0.2 s, for the length of the block.

    Args:
        database: the file.
        model: whose streams.
    """

    def __init__(self, database: Path, model: str) -> None:
        super().__init__("watch")
        self.torn: list[str] = []  # what is wrong with each snapshot that is not whole
        self.back: list[str] = []  # each time that a stream went back
        self.looks = 0
        self.blind = 0  # looks at which the file could not be read
        self._database = database
        self._model = model
        self._newest: dict[str, Tag] = {}
        self._lock = threading.Lock()

    def look(self) -> Mapping[str, Tag] | None:
        """The streams' present versions, after all checks; None: the file cannot be read now."""
        with self._lock:
            self.looks += 1
            try:
                rows = self._read(self._newest)
            except sqlite3.OperationalError:
                self.blind += 1
                return None
            except sqlite3.DatabaseError as error:  # not locked or absent, but damaged
                self.torn.append(f"{self._database.name}: {error}")
                return None
            for row in rows:
                self._check(row)
            return self._newest.copy()

    def check_all(self) -> int:
        """Check the pages of the file, and every snapshot that is kept for rollbacks.

        Returns:
            How many snapshots there are.
        """
        with self._lock, closing(self._open()) as connection:
            (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if said != "ok":
                self.torn.append(f"{self._database.name}: {said}")
            rows = connection.execute(
                "SELECT stream, digest, incarnation, kept.version, kept.snapshot FROM streams "
                "JOIN kept ON kept.head = streams.key WHERE model = ?",
                (self._model,),
            ).fetchall()
            heads = connection.execute(
                "SELECT stream, digest, incarnation, version, snapshot FROM streams "
                "WHERE model = ? AND snapshot IS NOT NULL",
                (self._model,),
            ).fetchall()
        self.torn += [wrong for row in (*rows, *heads) if (wrong := problem_of(Row(*row), self._model))]
        return len(rows) + len(heads)

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self.look()

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=WAIT_S)

    def _read(self, known: Mapping[str, Tag]) -> list[Row]:
        """All streams; with the snapshots of those that have changed."""
        with closing(self._open()) as connection:
            connection.execute("BEGIN")
            tags = connection.execute(
                "SELECT stream, digest, incarnation, version FROM streams WHERE model = ? AND gone = 0", (self._model,)
            ).fetchall()
            rows = []
            for stream, generation, incarnation, version in tags:
                snapshot = None
                if known.get(stream) != (incarnation, version):
                    (snapshot,) = connection.execute(
                        "SELECT snapshot FROM streams WHERE model = ? AND digest = ? AND stream = ?",
                        (self._model, generation, stream),
                    ).fetchone()
                rows.append(Row(stream, generation, incarnation, version, snapshot))
        return rows

    def _check(self, row: Row) -> None:
        tag, before = (row.incarnation, row.version), self._newest.get(row.stream, (0, 0))
        if tag < before:
            self.back.append(f"{row.stream} went back from {before} to {tag}")
        elif row.incarnation > before[0] > 0:  # nobody gave a command: a server has refused what lay there
            self.torn.append(f"{row.stream} began a new life: {before} became {tag}")
        self._newest[row.stream] = tag
        if wrong := problem_of(row, self._model):
            self.torn.append(wrong)


def problem_of(row: Row, model: str) -> str:
    """Why a server would refuse a snapshot; "" where it would not, or nothing was learned."""
    if row.snapshot is None:
        return ""
    try:
        _, header = decode(row.snapshot, model=model, generation=row.generation, stream=row.stream)
    except Refused as error:
        return str(error)
    if header.version != row.version:
        return f"{row.stream}: the snapshot of version {header.version} lies where {row.version} should"
    return ""
