"""One contract, which the stores of this package keep."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_checks import CHECKS, TIMED_CHECKS, Clock, Make

from tta_serve.memory_store import MemoryStore, Shelf
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Store


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    shelf, stores = Shelf(), []

    def another(generation: str = "a1") -> Store:
        memory = request.param == "memory"
        path = tmp_path / "states.db"
        stores.append(MemoryStore(generation, shelf) if memory else SQLiteStore(path, "traffic", generation, wait_s=30))
        return stores[-1]

    yield another
    for store in stores:
        store.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_store(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.parametrize("check", TIMED_CHECKS, ids=lambda check: check.__name__)
def test_every_store_in_time(make: Make, check: Callable[[Make, Clock], None], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    check(make, clock)


def test_no_check_is_left_out() -> None:
    import store_checks

    named = {each for name, each in vars(store_checks).items() if name.startswith("check_")}
    assert named == {*CHECKS, *TIMED_CHECKS}
    assert len(named) == 16


def test_a_memory_store_of_its_own_shares_nothing() -> None:
    MemoryStore().announce("kind", "")
    assert MemoryStore().changes(0).number == 0
