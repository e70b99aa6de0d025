"""What a person can do with a server's file of states, without a model."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tta_serve.errors import NotFound, Unavailable
from tta_serve.snapshots import Header, Refused, decode, encode
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.state_files import (
    Generation,
    StoredState,
    generations,
    import_snapshot,
    list_states,
    load_snapshot,
    prune,
)
from tta_serve.store import Head, Save
from tta_serve.streams import StreamRecord

Fill = Callable[..., SQLiteStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "states.db"


@pytest.fixture
def fill(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fill]:
    """Saves heads into a generation of the file, at a time; streams are camera-0, camera-1, …"""
    stores: list[SQLiteStore] = []

    def make(model: str, generation: str, at_s: float, *heads: Head, **keep: bytes) -> SQLiteStore:
        monkeypatch.setattr(time, "time", lambda: at_s)
        versions = {int(name[1:]): content for name, content in keep.items()}
        stores.append(SQLiteStore(path, model, generation))
        saves = [Save(f"camera-{number}", None, head, versions) for number, head in enumerate(heads)]
        assert None not in stores[-1].save(saves)
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def snapshot(number: float = 1.0, version: int = 5, stream: str = "camera-0", incarnation: int = 2) -> bytes:
    header = Header("traffic", "a1", stream, incarnation, version, steps=3, at_s=7.5, extra='{"rounds": []}')
    return encode({"mean": torch.tensor([number])}, header)


def test_what_is_in_a_file(path: Path, fill: Fill) -> None:
    fill("traffic", "b2", 200.0, Head(1, 9, {"steps": 8}, b"new"))
    gone = Head(4, 0, {}, None, gone=True)
    fill("traffic", "a1", 100.0, Head(2, 5, {"steps": 3}, b"state", (4,)), Head(1, 0, {}, None), gone, v4=b"four")
    assert generations(path) == [
        Generation("traffic", "a1", streams=2, tombstones=1, snapshot_bytes=9, at_s=100.0),
        Generation("traffic", "b2", streams=1, tombstones=0, snapshot_bytes=3, at_s=200.0),
    ]
    assert list_states(path) == [
        StoredState("traffic", "a1", "camera-0", 2, 5, steps=3, snapshot_bytes=5, kept=(4,), at_s=100.0),
        StoredState("traffic", "a1", "camera-1", 1, 0, steps=0, snapshot_bytes=0, kept=(), at_s=100.0),
        StoredState("traffic", "b2", "camera-0", 1, 9, steps=8, snapshot_bytes=3, kept=(), at_s=200.0),
    ]


def test_a_snapshot_is_taken_out_as_it_is(path: Path, fill: Fill) -> None:
    gone = Head(4, 0, {}, None, gone=True)
    fill("traffic", "a1", 1.0, Head(2, 5, {}, b"five", (4,)), Head(1, 0, {}, None), gone, v4=b"four")
    where = (path, "traffic", "a1")
    assert load_snapshot(*where, "camera-0") == load_snapshot(*where, "camera-0", 5) == b"five"
    assert load_snapshot(*where, "camera-0", 4) == b"four"
    for stream, version, said in (
        ("camera-0", 3, "version 3 of the stream 'camera-0' is not kept"),
        ("camera-1", None, "has learned nothing yet"),
        ("camera-2", None, "no stream 'camera-2'"),
        ("camera-3", None, "no stream 'camera-3'"),
    ):
        with pytest.raises(NotFound, match=said):
            load_snapshot(*where, stream, version)
    with pytest.raises(NotFound, match="no stream 'camera-0' of 'traffic' in the generation 'b2'"):
        load_snapshot(path, "traffic", "b2", "camera-0")


def test_an_imported_snapshot_begins_a_new_life_that_can_be_rolled_back(path: Path, fill: Fill) -> None:
    record = StreamRecord(7, seen=64, steps=20).to_json()
    store = fill("traffic", "a1", 9.0, Head(7, 30, record, b"before", (28,)), v28=b"28")
    header = import_snapshot(path, snapshot(4.0))
    assert header == Header("traffic", "a1", "camera-0", 8, 31, 3, 9.0, '{"rounds": []}')
    there = store.load("camera-0")
    assert there is not None
    assert there.snapshot is not None
    tensors, written = decode(there.snapshot, model="traffic", generation="a1", stream="camera-0")
    assert (tensors["mean"].tolist(), written) == ([4.0], header)
    assert (there.tag, there.kept) == ((8, 31), (28, 30))
    assert store.load_kept("camera-0", 30) == b"before"
    assert (there.record["seen"], there.record["steps"]) == (64, 3)
    assert there.record["events"][-1][2] == "imported"


def test_a_stream_that_is_not_there_begins_with_what_is_imported(path: Path, fill: Fill) -> None:
    store = fill("traffic", "a1", 9.0, Head(1, 1, {}, b""), Head(6, 0, {}, None, gone=True))
    assert import_snapshot(path, snapshot(stream="camera-9"))[3:5] == (2, 5)
    assert import_snapshot(path, snapshot(stream="camera-1"))[3:5] == (7, 1)  # not the life that was deleted
    nine, one = store.load("camera-9"), store.load("camera-1")
    assert nine is not None
    assert one is not None
    assert [(there.tag, there.kept, there.gone) for there in (nine, one)] == [((2, 5), (), False), ((7, 1), (), False)]


def test_an_import_that_loses_against_a_server_tries_again(
    path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill("traffic", "a1", 9.0, Head(1, 1, {}, b"one"))
    load, overtaken = SQLiteStore.load, []

    def overtake(self: SQLiteStore, stream: str) -> Head | None:
        there = load(self, stream)
        assert there is not None
        if len(overtaken) < times:
            overtaken.append(store.save([Save(stream, there.tag, there._replace(version=there.version + 1))]))
        return there

    monkeypatch.setattr(SQLiteStore, "load", overtake)
    times = 2
    assert import_snapshot(path, snapshot()).version == 4
    times = 1000
    with pytest.raises(Unavailable, match="changes faster than it can be replaced; freeze it"):
        import_snapshot(path, snapshot())


def test_only_whole_snapshots_are_imported(path: Path, fill: Fill) -> None:
    store = fill("traffic", "a1", 9.0)
    for content in (b"", snapshot()[:-1], b"shopping list"):
        with pytest.raises(Refused):
            import_snapshot(path, content)
    assert store.load("camera-0") is None


def test_old_generations_and_tombstones_are_thrown_away(
    path: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    living, gone = Head(1, 1, {}, b"secret" * 1_000, (1,)), Head(2, 0, {}, None, gone=True)
    fill("traffic", "a1", 100.0, living, v1=b"secret" * 1_000)
    fill("traffic", "b2", 200.0, living._replace(snapshot=b"kept", kept=()))
    fill("traffic", "c3", 300.0, living._replace(snapshot=b"young", kept=()), gone)
    fill("street", "a1", 100.0, living._replace(snapshot=b"other", kept=()), gone)
    monkeypatch.setattr(time, "time", lambda: 400.0)
    dropped = prune(path, "traffic", keep={"b2"}, older_s=150.0, tombstones_s=150.0)
    assert dropped == [Generation("traffic", "a1", 1, 0, 12_000, 100.0)]
    assert [(each.model, each.generation, each.tombstones) for each in generations(path)] == [
        ("street", "a1", 1),
        ("traffic", "b2", 0),
        ("traffic", "c3", 1),
    ]
    assert b"secret" not in b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert [each.generation for each in prune(path, "traffic", older_s=50.0)] == ["b2", "c3"]
    assert [each.model for each in generations(path)] == ["street"]


def test_pruning_leaves_no_bytes_that_sqlite_moved(path: Path, fill: Fill) -> None:
    """Rows that were split off to other pages leave copies; the file that is written anew has none."""
    store = fill("traffic", "a1", 100.0)
    names = [f"stream-{(17 * number) % 1_500:05d}" for number in range(1_500)]  # 17 and 1,500 share no factor
    for first in range(0, 1_500, 50):
        store.save([Save(name, None, Head(1, 1, {}, name.encode() * 20)) for name in names[first : first + 50]])
    gone = names[::3]
    store.save([Save(name, (1, 1), Head(2, 0, {}, None, gone=True)) for name in gone])
    prune(path, "traffic", keep={"a1"}, older_s=-1.0, tombstones_s=-1.0)
    everything = b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert [name for name in gone if name.encode() in everything] == []
    assert all(name.encode() in everything for name in names[1::3])
    assert store.count() == 1_000


@pytest.mark.parametrize(
    "call",
    [
        generations,
        list_states,
        lambda path: load_snapshot(path, "traffic", "a1", "camera-0"),
        lambda path: import_snapshot(path, snapshot()),
        lambda path: prune(path, "traffic"),
    ],
)
def test_a_file_that_is_not_there_is_not_made(path: Path, call: Callable[[Path], object]) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        call(path)
    assert not path.exists()
    path.write_bytes(b"shopping list" * 100)
    with pytest.raises(Unavailable, match="no database"):
        call(path)
