"""What is in a file of states, whatever server wrote it: read, taken out, put in and thrown away without a model."""

import contextlib
import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from tta_serve.errors import NotFound, Unavailable
from tta_serve.snapshots import Header, decode, encode, read_header
from tta_serve.sqlite_file import Connection
from tta_serve.sqlite_store import SQLiteStore, versions
from tta_serve.store import Head, Save
from tta_serve.streams import KEPT_VERSIONS, StreamRecord

TOMBSTONE_MIN_S = 3600.0  # a replica that was cut off may not have seen a younger one
WAIT_S = 10.0  # for a server that is using the file
_ATTEMPTS = 16  # at a compare-and-set, against a server that keeps learning


class Generation(NamedTuple):
    """What one version of a model, with its adapters, has learned."""

    model: str
    generation: str
    streams: int
    tombstones: int
    snapshot_bytes: int  # of heads and kept versions
    at_s: float  # wall clock, of the last change


class StoredState(NamedTuple):
    """A stream."""

    model: str
    generation: str
    stream: str
    incarnation: int
    version: int
    steps: int
    snapshot_bytes: int  # of its head
    kept: tuple[int, ...]
    at_s: float  # wall clock, of its last change


def generations(path: Path) -> list[Generation]:
    """Every generation of every model, by model and the last change.

    Raises:
        NotFound: there is no such file.
        Unavailable: it cannot be read, or is something else.
    """
    with _opened(path) as connection, connection.transaction("DEFERRED") as execute:
        rows = execute(
            """
            SELECT model, digest, coalesce(sum(1 - gone), 0), coalesce(sum(gone), 0), coalesce(sum(size), 0) + (
                SELECT coalesce(sum(length(kept.snapshot)), 0) FROM kept JOIN heads ON heads.key = kept.head
                WHERE heads.generation = generations.key
            ), coalesce(max(at_s), 0.0)
            FROM generations LEFT JOIN
                (SELECT generation, gone, coalesce(length(snapshot), 0) AS size, at_s FROM heads)
                ON generation = generations.key
            GROUP BY generations.key ORDER BY model, max(at_s), digest
            """
        ).fetchall()
    return [Generation(*row) for row in rows]


def list_states(path: Path) -> list[StoredState]:
    """Every stream, by model, generation and name.

    Raises:
        NotFound: there is no such file.
        Unavailable: it cannot be read, or is something else.
    """
    with _opened(path) as connection, connection.transaction("DEFERRED") as execute:
        rows = execute(
            "SELECT model, digest, stream, incarnation, version, record, size, kept, at_s FROM streams "
            "WHERE gone = 0 ORDER BY model, digest, stream"
        ).fetchall()
    return [StoredState(*(*row[:5], _steps(row[5]), row[6], versions(row[7]), row[8])) for row in rows]


def load_snapshot(path: Path, model: str, generation: str, stream: str, version: int | None = None) -> bytes:
    """A stream's snapshot as it was written; None: that of its present version.

    Raises:
        NotFound: there is no such file, stream or version, or it has learned nothing.
        Unavailable: the file cannot be read, or is something else.
    """
    with _store(path, model, generation) as store:
        head = store.load(stream)
        if head is None or head.gone:
            raise NotFound(f"{path} has no stream {stream!r} of {model!r} in the generation {generation!r}; list them")
        if version is not None and version != head.version:
            return store.load_kept(stream, version)
    if head.snapshot is None:
        raise NotFound(f"the stream {stream!r} has learned nothing yet: it has no snapshot")
    return head.snapshot


def import_snapshot(path: Path, content: bytes) -> Header:
    """Put a snapshot in the place of its stream's state, in a new life that can be rolled back to what was there.

    Returns:
        The header under which it stands now.

    Raises:
        NotFound: there is no such file.
        Refused: the snapshot is damaged, or no snapshot.
        Unavailable: the file cannot be written, or is something else.
    """
    given = read_header(content)
    tensors, _ = decode(content, model=given.model, generation=given.generation, stream=given.stream)
    with _store(path, given.model, given.generation) as store:
        for _attempt in range(_ATTEMPTS):
            there = store.load(given.stream)
            # a new life: what servers have learned in the present one shall not be put on top of it
            incarnation, version = (there.incarnation + 1, there.version + 1) if there else given[3:5]
            header = given._replace(incarnation=incarnation, version=version, at_s=time.time())
            (number,) = store.save([_save(there, header, encode(tensors, header))])
            if number is not None:
                return header
    raise Unavailable(f"the stream {given.stream!r} changes faster than it can be replaced; freeze it, then try again")


def prune(
    path: Path,
    model: str,
    *,
    keep: Collection[str] = (),
    older_s: float = 0.0,
    tombstones_s: float = TOMBSTONE_MIN_S,
) -> list[Generation]:
    """Throw away a model's generations whose last change is older than so many seconds, and tombstones in the others.

    Then the file is written anew, which takes room for a copy and a second for 200 MB, in which no server can save.

    Args:
        path: the file.
        model: whose.
        keep: generations that stay, however old.
        older_s: 0: of whatever age.
        tombstones_s: younger ones stay.

    Returns:
        The generations that were thrown away.

    Raises:
        NotFound: there is no such file.
        Unavailable: it cannot be written, or is something else.
    """
    before_s = time.time() - older_s
    old = [
        each
        for each in generations(path)
        if each.model == model and each.generation not in keep and each.at_s < before_s
    ]
    with _opened(path) as connection:
        with connection.transaction("IMMEDIATE") as execute:
            for each in old:
                execute(
                    "DELETE FROM generations WHERE model = ? AND digest = ? AND NOT EXISTS "
                    "(SELECT 1 FROM heads WHERE generation = generations.key AND at_s >= ?)",  # used meanwhile
                    (model, each.generation, before_s),
                )
            execute(
                "DELETE FROM heads WHERE gone = 1 AND at_s < ? "
                "AND generation IN (SELECT key FROM generations WHERE model = ?)",
                (time.time() - tombstones_s, model),
            )
        connection.vacuum()
        connection.empty_log(WAIT_S)
    return old


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Connection]:
    _check(path)
    connection = Connection(path, WAIT_S)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def _store(path: Path, model: str, generation: str) -> Iterator[SQLiteStore]:
    _check(path)
    store = SQLiteStore(path, model, generation, wait_s=WAIT_S)
    try:
        yield store
    finally:
        store.close()


def _check(path: Path) -> None:
    if not path.is_file():  # a connection would make it
        raise NotFound(f"there is no file {path}; give the one in which a server keeps its states")


def _steps(record: str) -> int:
    return int(json.loads(record).get("steps", 0))


def _save(there: Head | None, header: Header, content: bytes) -> Save:
    keep = {there.version: there.snapshot} if there and there.snapshot is not None else {}
    kept = tuple(sorted({*(there.kept if there else ()), *keep})[-KEPT_VERSIONS:])
    before = StreamRecord.from_json(header.incarnation, header.version, kept, there.record if there else {})
    record = before._replace(steps=header.steps).noted("imported").to_json()
    head = Head(header.incarnation, header.version, record, content, kept)
    return Save(header.stream, there.tag if there else None, head, keep)
