"""What files and processes can suffer: faults are told in words and pass when their cause is gone; nothing is lost."""

import contextlib
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_serve import sqlite_file
from tta_serve.errors import InvalidInput, NotFound, Unavailable
from tta_serve.memory_store import MemoryStore, Shelf
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save, Store

Open = Callable[..., SQLiteStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "states.db"


@pytest.fixture
def open_store(path: Path) -> Iterator[Open]:
    stores: list[SQLiteStore] = []

    def make(model: str = "traffic", generation: str = "a1", wait_s: float = 5.0, at: Path = path) -> SQLiteStore:
        stores.append(SQLiteStore(at, model, generation, wait_s=wait_s))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def save(store: SQLiteStore, stream: str, version: int, snapshot: bytes = b"state") -> None:
    expected = (1, version - 1) if version > 1 else None
    (number,) = store.save([Save(stream, expected, Head(1, version, {}, snapshot))])
    assert number is not None


def delete(store: SQLiteStore, stream: str) -> None:
    there = store.load(stream)
    assert there is not None
    tombstone = Head(there.incarnation + 1, 0, {}, None, gone=True)
    assert store.save([Save(stream, there.tag, tombstone)]) != [None]


def version_of(store: SQLiteStore, stream: str) -> int:
    there = store.load(stream)
    return 0 if there is None else there.version


METHODS: dict[str, Callable[[SQLiteStore], object]] = {
    "load": lambda store: store.load("s"),
    "load_kept": lambda store: store.load_kept("s", 1),
    "save": lambda store: store.save([Save("s", None, Head(1, 1, {}, b"state"))]),
    "page": lambda store: store.page(10),
    "count": lambda store: store.count(),
    "changes": lambda store: store.changes(0),
    "announce": lambda store: store.announce("kind", "detail"),
    "erase_elsewhere": lambda store: store.erase_elsewhere("s"),
    "renew": lambda store: store.renew("r", 5.0, 0),
    "members": lambda store: store.members(),
    "leave": lambda store: store.leave("r"),
    "prune": lambda store: store.prune(60.0),
}
WRITING = ("save", "announce", "erase_elsewhere", "renew", "leave", "prune")


def check_unavailable(store: SQLiteStore, said: str, methods: Iterator[str] | tuple[str, ...] = tuple(METHODS)) -> None:
    for name in methods:
        with pytest.raises(Unavailable, match=said) as caught:
            METHODS[name](store)
        assert str(store._path) in str(caught.value)


# The file


def test_methods_are_all_tried() -> None:
    public = {name for name, each in vars(SQLiteStore).items() if not name.startswith("_") and callable(each)}
    assert public == {*METHODS, "close"}


def test_the_file_is_made_by_the_first_call_and_for_its_user_only(open_store: Open, path: Path) -> None:
    store = open_store()
    assert not path.exists()
    assert store.load("s") is None
    save(store, "s", 1)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    assert modes == dict.fromkeys(("states.db", "states.db-wal", "states.db-shm"), 0o600)


def test_settings_that_durability_rests_on(open_store: Open, path: Path) -> None:
    store = open_store()
    save(store, "s", 1)
    with store._writer.transaction("DEFERRED") as execute:
        found = {
            name: execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1}


def test_models_share_a_file_and_nothing_else(open_store: Open) -> None:
    one, other = open_store("traffic"), open_store("street")
    number = one.announce("kind", "detail")
    save(one, "s", 1)
    one.renew("r", 60.0, 0)
    assert (other.load("s"), other.count(), other.members()) == (None, 0, [])
    assert other.changes(number - 1) == (0, (), ())


def test_numbers_go_on_growing_in_another_file(
    open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tta_serve.sqlite_store.time.time", lambda: 1000.0)
    one = open_store()
    assert [one.announce("kind", ""), one.announce("kind", "")] == [1_000_000, 1_000_001]
    monkeypatch.setattr("tta_serve.sqlite_store.time.time", lambda: 1001.0)
    assert open_store(at=tmp_path / "new.db").announce("kind", "") == 1_001_000
    assert one.announce("kind", "") == 1_000_002


def test_names_and_numbers_that_cannot_be_kept(open_store: Open) -> None:
    store = open_store()
    for call in (lambda: store.load("\udc80"), lambda: store.changes(2**63), lambda: store.announce("\udc80", "")):
        with pytest.raises(InvalidInput, match="cannot be kept"):
            call()
    with pytest.raises(InvalidInput, match="cannot be kept"):
        store.save([Save("a", None, Head(1, 1, {}, b"")), Save("b", None, Head(1, 2**63, {}, b""))])
    assert store.load("a") is None  # all or nothing


def test_what_is_closed_stays_closed(open_store: Open) -> None:
    store = open_store()
    save(store, "s", 1)
    store.close()
    store.close()
    check_unavailable(store, "it was closed")


# Faults, each told in words by every method, and gone with its cause


def test_a_folder_that_is_not_there_yet(open_store: Open, tmp_path: Path) -> None:
    store = open_store(at=tmp_path / "disk" / "states.db")
    check_unavailable(store, "No such file or directory; give a path in a folder that this user can write")
    (tmp_path / "disk").mkdir()
    save(store, "s", 1)
    assert version_of(store, "s") == 1


def test_a_folder_in_the_files_place(open_store: Open, path: Path) -> None:
    store = open_store()
    path.mkdir()
    check_unavailable(store, "it cannot be opened or written")
    path.rmdir()
    save(store, "s", 1)


def test_a_file_that_cannot_be_made(open_store: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that is read-only; who runs as root sees no such thing."""
    store = open_store()

    def refused(self: Path, mode: int) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "touch", refused)
        check_unavailable(store, "Permission denied; give a path in a folder that this user can write")
    save(store, "s", 1)


def test_a_file_that_became_read_only(open_store: Open) -> None:
    store = open_store()
    save(store, "s", 1)
    store._writer._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(Unavailable, match=r"it cannot be opened or written.*let this user write the file"):
        save(store, "s", 2)
    assert version_of(store, "s") == 1
    save(store, "s", 2)  # on another connection


def test_a_full_disk(open_store: Open) -> None:
    store = open_store()
    save(store, "s", 1, b"x" * 20_000)
    pages = store._writer._connection.execute("PRAGMA page_count").fetchone()[0]
    store._writer._connection.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"the disk is full \(.*\); make room on it"):
            store.save([Save(f"t{each}", None, Head(1, 1, {}, b"x" * 20_000)) for each in range(4)])
    assert [version_of(store, name) for name in ("s", "t0", "t3")] == [1, 0, 0]
    store._writer._connection.execute("PRAGMA max_page_count = 100000")
    save(store, "t0", 1)


def test_a_disk_that_refuses_to_write(open_store: Open) -> None:
    """The system's own refusal: files of this process may not grow."""
    store = open_store()
    save(store, "s", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(Unavailable, match="the disk"):
            save(store, "large", 1, b"x" * 1_000_000)
        assert version_of(store, "s") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert version_of(store, "large") == 0
    save(store, "large", 1, b"x" * 1_000_000)


def test_a_locked_file_can_be_read(open_store: Open, path: Path) -> None:
    store = open_store(wait_s=0.01)
    save(store, "s", 1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        check_unavailable(store, "another process keeps it locked for more than 0.01 s", WRITING)
        assert version_of(store, "s") == 1
        assert store.count() == 1
        other.execute("ROLLBACK")
    save(store, "s", 2)


def test_a_file_that_is_locked_to_readers_too(open_store: Open, path: Path) -> None:
    made = open_store()
    save(made, "s", 1)
    made.close()
    store = open_store(wait_s=0.01)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        check_unavailable(store, r"another process keeps it locked.*; try again, or end that process")
        other.execute("ROLLBACK")
    save(store, "s", 2)


def test_a_file_that_is_no_database(open_store: Open, path: Path) -> None:
    content = b"shopping list: " * 500
    path.write_bytes(content)
    store = open_store()
    check_unavailable(store, r"it is damaged, or no database.*; put a copy of it in its place")
    assert path.read_bytes() == content
    path.unlink()
    save(store, "s", 1)


def test_a_database_of_another_program(open_store: Open, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE heads (name)")
    content = path.read_bytes()
    store = open_store()
    check_unavailable(store, "it is another program's database; give another path")
    assert path.read_bytes() == content
    path.unlink()
    save(store, "s", 1)


def test_a_file_of_a_newer_format(open_store: Open, path: Path) -> None:
    save(open_store(), "s", 1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA user_version = 2")
    store = open_store()
    check_unavailable(store, "it has format 2 and this server reads 1; use the server that wrote it")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA user_version = 1")
    save(store, "s", 2)


def test_a_damaged_file(open_store: Open, path: Path) -> None:
    made = open_store()
    save(made, "s", 1, b"x" * 50_000)
    made.close()  # and the log is empty
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    store = open_store()
    check_unavailable(store, "it is damaged, or no database")
    path.write_bytes(whole)
    assert version_of(store, "s") == 1
    save(store, "s", 2)


def test_a_table_that_is_missing(open_store: Open, path: Path) -> None:
    store = open_store()
    save(store, "s", 1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("DROP TABLE members")
    check_unavailable(store, r"SQLite does not do what it is asked \(no such table.*members\)", ("renew", "members"))
    assert version_of(store, "s") == 1


def test_a_file_that_was_taken_away_is_begun_anew(open_store: Open, path: Path) -> None:
    store = open_store()
    save(store, "s", 1)
    assert version_of(store, "s") == 1  # both connections are open
    path.rename(path.with_name("moved.db"))
    assert store.load("s") is None
    save(store, "s", 1, b"new")
    (other := open_store()).count()
    assert other.load("s") == Head(1, 1, {}, b"new")
    assert len(list(path.parent.glob("states.db"))) == 1


def test_a_file_that_another_took_the_place_of_is_opened(open_store: Open, path: Path, tmp_path: Path) -> None:
    store, copy = open_store(), open_store(at=tmp_path / "copy.db")
    save(store, "s", 1, b"first")
    assert version_of(store, "s") == 1  # both connections are open
    save(copy, "s", 1, b"second")
    copy.close()
    (tmp_path / "copy.db").replace(path)
    for left in ("states.db-wal", "states.db-shm"):
        (tmp_path / left).unlink()
    there = store.load("s")
    assert there is not None
    assert there.snapshot == b"second"
    save(store, "s", 2)


def test_a_thread_that_waits_for_another_gives_up(open_store: Open) -> None:
    store = open_store(wait_s=0.01)
    save(store, "s", 1)
    with store._writer.transaction("IMMEDIATE"):
        check_unavailable(store, "this process has used it for more than 0.01 s; try again", WRITING)
        assert version_of(store, "s") == 1
    save(store, "s", 2)


def test_a_copy_without_a_log_gets_one(open_store: Open, path: Path) -> None:
    made = open_store()
    save(made, "s", 1)
    made.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    store = open_store()
    save(store, "s", 2)
    assert path.with_name("states.db-wal").exists()


# Any history

STREAMS, GENERATIONS = ("s", "t"), ("a1", "b2")
TAGS = st.none() | st.tuples(st.integers(1, 2), st.integers(0, 2))
HEADS = st.builds(
    lambda tag, snapshot, kept, gone: (
        Head(tag[0], 0, {}, None, gone=True) if gone else Head(*tag, {"steps": tag[1]}, snapshot, kept)
    ),
    st.tuples(st.integers(1, 2), st.integers(0, 2)),
    st.none() | st.binary(max_size=2),
    st.sampled_from([(), (1,), (1, 2), (2,)]),
    st.booleans(),
)
SAVES = st.builds(Save, st.sampled_from(STREAMS), TAGS, HEADS, st.just({1: b"one", 2: b"two"}))
STEPS = st.one_of(
    st.tuples(st.just("save"), st.sampled_from(GENERATIONS), st.lists(SAVES, max_size=4)),
    st.tuples(st.just("erase_elsewhere"), st.sampled_from(GENERATIONS), st.sampled_from(STREAMS)),
    st.tuples(st.just("announce"), st.sampled_from(GENERATIONS), st.just("kind"), st.just("detail")),
    st.tuples(st.just("prune"), st.sampled_from(GENERATIONS), st.sampled_from([-1.0, 1.0])),
)


def seen(store: Store) -> list[object]:
    kept = []
    for stream in STREAMS:
        for version in (1, 2):
            with contextlib.suppress(NotFound):
                kept.append((stream, version, store.load_kept(stream, version)))
    changes = [
        found._replace(heads=tuple(sorted(found.heads)))
        for found in (store.changes(since) for since in (-1, 0, 1, 2, 5))
    ]
    return [*map(store.load, STREAMS), kept, changes, store.page(10), store.page(1, 1), store.count()]


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=12))
def test_any_history_is_that_of_the_store_in_memory(steps: list[tuple[str, str, object]]) -> None:
    shelf = Shelf()
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patched,
        contextlib.ExitStack() as closing,
    ):
        patched.setattr(time, "time", lambda: 0.001)  # so that SQLite's numbers begin with 1 too
        memory = {each: MemoryStore(each, shelf) for each in GENERATIONS}
        sqlite = {each: SQLiteStore(Path(folder) / "states.db", "traffic", each) for each in GENERATIONS}
        for store in sqlite.values():
            closing.callback(store.close)
        for method, generation, *arguments in steps:
            expected = getattr(memory[generation], method)(*arguments)
            assert getattr(sqlite[generation], method)(*arguments) == expected
            for each in GENERATIONS:
                assert seen(sqlite[each]) == seen(memory[each])


# What was deleted


def content_of(folder: Path) -> bytes:
    return b"".join(each.read_bytes() for each in sorted(folder.iterdir()))


def test_a_deleted_streams_bytes_are_in_no_file(open_store: Open, path: Path) -> None:
    rng = random.Random(3)
    contents = {f"camera-{each:02d}": rng.randbytes(rng.randrange(10_000, 30_000)) for each in range(40)}
    store = open_store()
    reader = open_store()
    for stream, content in contents.items():
        kept = {1: content[::-1]}
        store.save([Save(stream, None, Head(1, 1, {"events": [stream]}, content, (1,)), kept)])
    gone = [*contents][::3]
    assert all(reader.load(stream) for stream in contents)

    def found(stream: str) -> int:
        everything = content_of(path.parent)
        pieces = [each[at : at + 64] for each in (contents[stream], contents[stream][::-1]) for at in (0, 4_900, 9_900)]
        return sum(piece in everything for piece in pieces)

    assert [found(stream) for stream in gone] == [6] * len(gone)  # the search finds what is there
    for stream in gone:
        delete(store, stream)
    assert store.residue is None
    assert (path.parent / "states.db-wal").stat().st_size == 0
    assert [found(stream) for stream in gone] == [0] * len(gone)
    assert found("camera-01") == 6
    assert b'"camera-00"' not in content_of(path.parent)  # of the record
    assert b"camera-00" in content_of(path.parent)  # of the tombstone
    assert store.prune(-1.0) == len(gone)
    assert [stream for stream in gone if stream.encode() in content_of(path.parent)] == []
    assert b"camera-01" in content_of(path.parent)


def test_a_reader_that_stays_is_told_of_and_wiping_comes_later(
    open_store: Open, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(wait_s=0.01)
    save(store, "s", 1, b"secret" * 10_000)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT * FROM heads").fetchall()
        delete(store, "s")  # it is deleted all the same
        there = store.load("s")
        assert there is not None
        assert there.gone
        assert store.residue is not None
        assert "still holds what was removed" in store.residue
        assert store.residue in caplog.text
        assert b"secret" in content_of(path.parent)
        other.execute("COMMIT")
    save(store, "t", 1)
    assert store.residue is None
    assert b"secret" not in content_of(path.parent)


def test_what_a_killed_process_left_the_next_one_wipes(open_store: Open, path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save
store = SQLiteStore(Path(sys.argv[1]), "traffic", "a1")
store.save([Save("s", None, Head(1, 1, {}, b"secret" * 10_000))])
store._writer.empty_log = lambda _: os.kill(os.getpid(), signal.SIGKILL)
store.save([Save("s", (1, 1), Head(2, 0, {}, None, gone=True))])
"""
    process = start(code, str(path))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert b"secret" in content_of(path.parent)
    save(open_store(), "t", 1)
    assert b"secret" not in content_of(path.parent)


# Threads and processes


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    root = Path(sqlite_file.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_loads_do_not_wait_for_a_save(open_store: Open) -> None:
    store = open_store()
    save(store, "s", 1)
    inside, done = threading.Event(), threading.Event()

    def write() -> None:
        with store._writer.transaction("IMMEDIATE") as execute:
            execute("UPDATE heads SET version = 9")
            inside.set()
            done.wait(timeout=60)

    writer = threading.Thread(target=write)
    writer.start()
    assert inside.wait(timeout=60)
    assert version_of(store, "s") == 1  # as it was before the save that has not ended
    done.set()
    writer.join()
    assert version_of(store, "s") == 9


ADDING = """
import sys
from pathlib import Path
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save
store = SQLiteStore(Path(sys.argv[1]), "traffic", "a1", wait_s=60)
wins = 0
for _ in range(150):
    there = store.load("sum")
    old = (None, 0) if there is None else (there.tag, int(there.snapshot))
    (number,) = store.save([Save("sum", old[0], Head(1, old[1] + 1, {}, str(old[1] + 1).encode()))])
    wins += number is not None
print(wins)
"""


def test_two_processes_lose_nothing(open_store: Open, path: Path) -> None:
    """And both may be the one that makes the file."""
    processes = [start(ADDING, str(path)) for _ in range(2)]
    wins = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert min(wins) > 0
    there = open_store().load("sum")
    assert there == Head(1, sum(wins), {}, str(sum(wins)).encode())


WRITING_ON = """
import sys
from pathlib import Path
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save
store = SQLiteStore(Path(sys.argv[1]), "traffic", "a1", wait_s=60)
names = [f"s{each}" for each in range(8)]
there = store.load("s0")
version = there.version if there else 0
while True:
    version += 1
    new = Head(1, version, {}, bytes([version % 256]) * 20_000, (version,))
    expected = (1, version - 1) if version > 1 else None
    numbers = store.save([Save(name, expected, new, {version: new.snapshot}) for name in names])
    assert None not in numbers, numbers
    print(version, flush=True)
"""


def test_what_was_acknowledged_is_there_after_a_kill(open_store: Open, path: Path) -> None:
    """Ten kills at random moments: all eight streams are whole and at the version last acknowledged, or the next."""
    rng = random.Random(7)
    acknowledged = 0
    for _ in range(10):
        process = start(WRITING_ON, str(path))
        assert process.stdout is not None
        try:
            for _ in range(rng.randrange(1, 12)):
                acknowledged = int(process.stdout.readline())
            spin = rng.randrange(0, 200_000)  # somewhere within a save
            while spin:
                spin -= 1
        finally:
            process.kill()
            rest = process.stdout.read()  # not `communicate`, which passes by what was read ahead
            process.stdout.close()
            process.wait(timeout=60)
        acknowledged = max([acknowledged, *map(int, rest.split())])
        store = open_store()
        with store._reader.transaction("DEFERRED") as execute:
            assert execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert execute("PRAGMA foreign_key_check").fetchall() == []
        heads = [store.load(f"s{each}") for each in range(8)]
        versions = {there.version for there in heads if there}
        assert len(heads) == 8
        assert versions in ({acknowledged}, {acknowledged + 1})
        (version,) = versions
        content = bytes([version % 256]) * 20_000
        assert heads == [Head(1, version, {}, content, (version,))] * 8
        assert store.load_kept("s3", version) == content
        with pytest.raises(NotFound):
            store.load_kept("s3", version - 1)
        store.close()
        acknowledged = version
