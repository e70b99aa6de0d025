"""A replica in step with a store that others use too, that fails, and that comes back."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from test_durable import Replica
from torch import Tensor

from adapters import Pipeline
from tta_serve import sync as module
from tta_serve.errors import Unavailable
from tta_serve.memory_store import MemoryStore, Shelf
from tta_serve.metrics import Metrics
from tta_serve.store import Changes, Member, Save
from tta_serve.sync import Sync

Rows = Callable[..., Tensor]
REASON = "the disk is full"


class Failing(MemoryStore):
    """A store that is out of reach when told so."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__("g", shelf)
        self.fails = False
        self.closed = False

    def _do(self) -> None:
        if self.fails:
            raise Unavailable(REASON)

    def save(self, saves: Sequence[Save]) -> list[int | None]:
        self._do()
        return super().save(saves)

    def changes(self, since: int) -> Changes:
        self._do()
        return super().changes(since)

    def members(self) -> list[Member]:
        self._do()
        return super().members()

    def load(self, stream: str) -> Any:
        self._do()
        return super().load(stream)

    def close(self) -> None:
        self.closed = True


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module.time, "monotonic", found)
    return found


class Kept(Replica):
    """A replica with its sync, which is called by hand."""

    def __init__(self, pipeline: Pipeline, shelf: Shelf, name: str, **more: Any) -> None:
        self.failing = Failing(shelf)
        super().__init__(pipeline, self.failing, name)
        self.metrics = Metrics("m", name)
        self.keeping = Sync(self.streams, 1.0, self.metrics, **more)
        self.keeping.sync()


@pytest.fixture
def kept(pipeline: Callable[..., Pipeline]) -> Callable[..., Kept]:
    """`kept("a", **more)`: one more replica on the same shelf."""
    shelf = Shelf()
    return lambda name, **more: Kept(pipeline(), shelf, name, **more)


def test_a_command_has_reached_everybody_when_they_have_followed(kept: Callable[..., Kept], rows: Rows) -> None:
    a, b, c = kept("a"), kept("b"), kept("c")
    a.teach(rows(8), "s")
    for each in (a, b, c):
        each.keeping.sync()
    number = a.streams.delete("s")
    assert a.keeping.reached(number) == ["b", "c"]
    b.keeping.follow()
    assert a.keeping.reached(number) == ["c"]
    c.failing.leave("c")  # its lease is over, or it was stopped
    assert a.keeping.reached(number) == []


def test_who_is_alone_knows(kept: Callable[..., Kept]) -> None:
    a = kept("a")
    assert a.streams.durable.alone
    b = kept("b")
    a.keeping.sync()
    assert (a.streams.durable.alone, b.streams.durable.alone) == (False, False)
    b.keeping.stop()
    assert b.failing.closed
    a.keeping.sync()
    assert a.streams.durable.alone


def test_what_one_learned_the_others_have_after_an_interval(kept: Callable[..., Kept], rows: Rows) -> None:
    a, b = kept("a"), kept("b")
    for each in (a, b):
        each.teach(rows(8), "s")
    for each in (a, b, a):
        each.keeping.sync()
    assert [each.streams.record("s").seen for each in (a, b)] == [16, 16]
    assert [each.streams.record("s").unsynced for each in (a, b)] == [0, 0]


def test_a_store_that_fails_degrades_cuts_off_and_comes_back(
    kept: Callable[..., Kept], rows: Rows, clock: Clock
) -> None:
    a = kept("a")
    a.teach(rows(8), "s")
    a.keeping.sync()
    a.failing.fails = True
    clock.now_s += 1
    a.keeping.sync()
    assert a.keeping.health == (REASON, False, pytest.approx(1.0))
    assert a.teach(rows(8, 3), "s") == "applied"  # within the lease it answers and learns as ever
    clock.now_s += a.keeping.lease_s + 1
    a.keeping.sync()
    assert a.keeping.health[:2] == (REASON, True)
    assert a.teach(rows(8), "s") == "stale"
    with a.streams.answering(["s", "new"]) as records:
        assert [(record.incarnation, record.row) for record in records] == [(0, 0), (0, 0)]
    assert a.streams.begin("new") is None
    a.failing.fails = False
    a.keeping.sync()
    assert a.keeping.health == (None, False, 0.0)
    head = a.failing.load("s")
    assert head is not None
    assert (head.version, head.record["seen"]) == (2, 16)  # nothing that was learned is lost
    assert a.teach(rows(8), "s") == "applied"


def test_a_store_that_fails_at_the_start(kept: Callable[..., Kept], rows: Rows) -> None:
    a = kept("a")
    a.failing.fails = True
    late = Sync(a.streams, 1.0, a.metrics)
    late.start()
    try:
        assert late.health[:2] == (REASON, True)
        assert a.teach(rows(2), "s") == "stale"
        a.failing.fails = False
        late.sync()
        assert late.health.degraded is None
        assert a.teach(rows(2), "s") == "applied"
    finally:
        assert late.stop() == 1
    assert a.failing.closed


def test_while_it_was_cut_off_a_stream_was_deleted(kept: Callable[..., Kept], rows: Rows, clock: Clock) -> None:
    a, b = kept("a"), kept("b")
    a.teach(rows(8), "s")
    for each in (a, b):
        each.keeping.sync()
    a.failing.fails = True
    a.teach(rows(8), "s")
    clock.now_s += a.keeping.lease_s + 1
    a.keeping.sync()
    b.streams.delete("s")
    a.failing.fails = False
    a.keeping.sync()
    assert a.streams.find("s") is None
    head = b.failing.load("s")
    assert head is not None
    assert (head.gone, head.incarnation) == (True, 2)


def test_what_is_kept_elsewhere_is_looked_at_before_a_change_is_acknowledged(kept: Callable[..., Kept]) -> None:
    looked: list[list[str]] = []
    a = kept("a")
    numbers: list[int] = []
    b = kept("b", refresh=lambda: looked.append(a.keeping.reached(numbers[-1]) if numbers else []))
    numbers.append(a.keeping.announce("labels"))
    b.keeping.follow()
    assert looked[-1] == ["b"]
    assert a.keeping.reached(numbers[-1]) == []


def test_an_older_copy_of_the_store_is_followed_from_its_beginning(kept: Callable[..., Kept], rows: Rows) -> None:
    a = kept("a")
    a.teach(rows(8), "s")
    a.keeping.sync()
    a.streams.durable.store = a.keeping._store = Failing(Shelf())  # an empty one
    a.keeping.sync()
    assert a.keeping.health.degraded is None
    assert a.keeping._seen == a.keeping._store.changes(-1).number


def test_the_thread_syncs_and_its_last_flush_is_told(kept: Callable[..., Kept], rows: Rows) -> None:
    a = kept("a")
    saved = threading.Event()
    save = a.failing.save

    def watched(saves: Sequence[Save]) -> list[int | None]:
        numbers = save(saves)
        saved.set()
        return numbers

    a.failing.save = watched  # type: ignore[method-assign]
    quick = Sync(a.streams, 0.05, a.metrics)
    quick.start()
    a.teach(rows(8), "s")
    assert saved.wait(10)
    assert quick.stop() in (0, 1)
    head = a.failing.load("s")
    assert head is not None
    assert head.version == 1
    assert a.failing.members() == []


def test_past_its_lease_a_replica_is_cut_off_whatever_it_is_doing(
    kept: Callable[..., Kept], rows: Rows, clock: Clock
) -> None:
    a, b = kept("a"), kept("b")
    a.teach(rows(8), "s")
    for each in (a, b):
        each.keeping.sync()
    save = a.failing.save
    seen: list[tuple[int, int]] = []

    def slow(saves: Sequence[Save]) -> list[int | None]:
        clock.now_s += a.keeping.lease_s + 1
        with a.streams.answering(["s"]) as records:
            seen.extend((record.incarnation, record.row) for record in records)
        return save(saves)

    a.teach(rows(8), "s")
    a.failing.save = slow  # type: ignore[method-assign]
    a.keeping.sync()
    assert seen == [(0, 0)]
    assert a.keeping.health.cut_off
    a.keeping.sync()
    assert not a.keeping.health.cut_off


def test_what_nobody_foresaw_degrades_too(kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch) -> None:
    a = kept("a")
    happened = threading.Event()

    def broken(since: int) -> Changes:
        happened.set()
        raise RuntimeError("a bug")

    monkeypatch.setattr(a.failing, "changes", broken)
    quick = Sync(a.streams, 0.05, a.metrics)
    quick._thread = threading.Thread(target=quick._run)
    quick._thread.start()
    assert happened.wait(10)
    quick._stopping.set()
    quick._thread.join()
    assert quick.health.degraded == "RuntimeError: a bug"


def test_out_of_reach_for_longer_than_tombstones_are_kept_everything_is_loaded_anew(
    kept: Callable[..., Kept], rows: Rows, clock: Clock
) -> None:
    a, b = kept("a"), kept("b")
    a.teach(rows(8), "s")
    for each in (a, b):
        each.keeping.sync()
    a.teach(rows(8), "s")
    a.failing.fails = True
    clock.now_s += a.keeping.lease_s + module.PRUNE_MIN_S
    for each in (a, b):
        each.keeping.sync()
    b.streams.delete("s")
    b.failing._shelf.entries.clear()  # the tombstone was pruned
    b.teach(rows(4), "s")
    b.keeping.sync()
    a.failing.fails = False
    a.keeping.sync()
    assert a.streams.names() == []
    head = b.failing.load("s")
    assert head is not None
    assert head.record["seen"] == 4


def test_what_was_at_hand_before_the_first_sync_stays(kept: Callable[..., Kept]) -> None:
    """Streams that labels are known of begin before the store was reached."""
    a = kept("a")
    a.streams.adopt("told")
    first = Sync(a.streams, 1.0, a.metrics)
    first.start()
    first.stop()
    assert a.streams.find("told") is not None
