"""One contract, which both stores keep; and what files can suffer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tta_serve.errors import NotFound
from tta_serve.snapshots import Folder, Memory, Snapshots

Make = Callable[[], Snapshots]


@pytest.fixture(params=["memory", "folder"])
def snapshots(request: pytest.FixtureRequest, tmp_path: Path) -> Snapshots:
    return Memory() if request.param == "memory" else Folder(tmp_path)


def state(number: float) -> dict[str, Tensor]:
    return {"norm.mean": torch.tensor([number, -0.0]), "norm.seen": torch.tensor(7), "norm.none": torch.zeros(0)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, dtypes and shapes included."""

    def bits(tensor: Tensor) -> object:
        return tensor.dtype, tensor.shape, tensor.numpy().tobytes()

    return {name: bits(each) for name, each in a.items()} == {name: bits(each) for name, each in b.items()}


def test_what_is_saved_comes_back_bit_for_bit(snapshots: Snapshots) -> None:
    odd = {"norm.mean": torch.tensor([torch.nan, torch.inf, 1e-45, -0.0])}
    snapshots.save("a", 0, state(1.0))
    snapshots.save("a", 12, odd)
    assert same(snapshots.load("a", 0), state(1.0))
    assert same(snapshots.load("a", 12), odd)


def test_a_later_change_of_the_tensors_changes_nothing(snapshots: Snapshots) -> None:
    mine = state(1.0)
    snapshots.save("a", 1, mine)
    mine["norm.mean"].fill_(9.0)
    assert same(snapshots.load("a", 1), state(1.0))


def test_a_version_is_replaced_whole(snapshots: Snapshots) -> None:
    before = {"norm.other": torch.ones(5)}
    snapshots.save("a", 1, before)
    loaded = snapshots.load("a", 1)
    snapshots.save("a", 1, state(2.0))
    assert same(snapshots.load("a", 1), state(2.0))
    assert same(loaded, before)  # who has read it keeps what was read
    assert snapshots.versions("a") == [1]


def test_versions_ascend_as_numbers(snapshots: Snapshots) -> None:
    for version in (10, 9, 100):
        snapshots.save("a", version, state(version))
    assert snapshots.versions("a") == [9, 10, 100]
    snapshots.drop("a", 10)
    snapshots.drop("a", 10)
    assert snapshots.versions("a") == [9, 100]
    assert same(snapshots.load("a", 9), state(9))


def test_what_was_never_saved(snapshots: Snapshots) -> None:
    assert snapshots.versions("x") == []
    snapshots.drop("x", 1)
    snapshots.delete("x")
    snapshots.save("x", 1, state(1.0))
    for stream, version in (("x", 2), ("y", 1)):
        with pytest.raises(NotFound) as caught:
            snapshots.load(stream, version)
        said = f"there is no version {version} of the stream {stream!r}; its history lists those that are kept"
        assert str(caught.value) == said


def test_delete_takes_all_of_one_stream(snapshots: Snapshots) -> None:
    for stream in ("a", "b"):
        for version in (1, 2):
            snapshots.save(stream, version, state(version))
    snapshots.delete("a")
    assert (snapshots.versions("a"), snapshots.versions("b")) == ([], [1, 2])
    with pytest.raises(NotFound):
        snapshots.load("a", 1)
    snapshots.save("a", 3, state(3.0))  # and it may begin again
    assert snapshots.versions("a") == [3]


NAMES = ("camera", "Camera", "CAMERA", "a:b", "a.b", "a:b:", "..", "a/b", "x" * 128, "ä")


def test_names_that_file_systems_do_not_tell_apart(snapshots: Snapshots) -> None:
    for number, name in enumerate(NAMES):
        snapshots.save(name, 1, state(number))
    for number, name in enumerate(NAMES):
        assert same(snapshots.load(name, 1), state(number))
    snapshots.delete("camera")
    assert [snapshots.versions(name) for name in NAMES] == [[], *[[1]] * (len(NAMES) - 1)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "states"
    inside.mkdir()
    mine = Folder(inside)
    for name in ("..", "../..", "/etc", "a/../../b"):
        mine.save(name, 1, state(1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    assert len(list(inside.iterdir())) == 4


def test_delete_leaves_no_file_and_no_folder(tmp_path: Path) -> None:
    mine = Folder(tmp_path)
    mine.save("a", 1, state(1.0))
    mine.delete("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """The disk is full in the middle: what was there before is there still, and no half file lies about."""
    mine = Folder(tmp_path)
    mine.save("a", 1, state(1.0))

    def full(path: Path, *_: object) -> None:
        if fails == "write_bytes":
            with path.open("wb") as file:
                file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, fails, full)
    for version in (1, 2):
        with pytest.raises(OSError, match="No space left on device"):
            mine.save("a", version, state(2.0))
    monkeypatch.undo()
    assert files(tmp_path) == ["1.safetensors"]
    assert same(mine.load("a", 1), state(1.0))
    assert mine.versions("a") == [1]


def test_a_folder_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    mine = Folder(tmp_path / "never made")
    with pytest.raises(FileNotFoundError):
        mine.save("a", 1, state(1.0))
