"""Several replicas, each with its own table, on one SQLite file: what they learn, and what becomes of commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import Pipeline, PipelineState, optim, tree
from tta_serve.durable import Durable
from tta_serve.engine import Engine, Query
from tta_serve.errors import NotFound, Unavailable
from tta_serve.memory_store import MemoryStore, Shelf
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save, Store

Rows = Callable[..., Tensor]


class Replica:
    """An engine that is in step with the others when it is told to be."""

    def __init__(self, pipeline: Pipeline, store: Store, name: str, resident: int = 50, *, alone: bool = False) -> None:
        init = tree.encode(optim.rest(pipeline.init()))
        durable = Durable(
            store, model="m", generation="g", replica=name, merging=pipeline.merging(), init=init,
            on_refused=lambda why: self.refused.append(why),
        )  # fmt: skip
        durable.alone = alone
        self.refused: list[str] = []
        self.engine = Engine(pipeline, torch.device("cpu"), 50, resident=resident, durable=durable)
        self.streams = self.engine.streams
        self.store = store
        self._seen = store.changes(-1).number

    def teach(self, x: Tensor, stream: str) -> str:
        ((_, lesson),) = self.engine.predict([Query(x, stream)])
        (learned,) = self.engine.learn([lesson])
        return learned.result

    def follow(self) -> None:
        changes = self.store.changes(self._seen)
        self.streams.take_in(changes)
        self._seen = changes.number

    def sync(self, sequence: int) -> None:
        self.streams.durable.interval = lambda: sequence
        self.follow()
        self.streams.flush()

    def state(self, stream: str) -> PipelineState:
        return optim.rest(self.streams.state(stream))

    def moved(self, stream: str) -> Tensor:
        """How far its parameters are from the source's."""
        return self.state(stream).norm.inner.params - self.engine.pipeline.init().norm.inner.params


@pytest.fixture
def replica(pipeline: Callable[..., Pipeline], tmp_path: Path) -> Callable[..., Replica]:
    """`replica("a", resident=50, alone=False)`: another one on the same file."""

    def make(name: str, **more: Any) -> Replica:
        return Replica(pipeline(), SQLiteStore(tmp_path / "states.db", "m", "g"), name, **more)

    return make


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(a), tree.leaves(b), strict=True))


def in_step(replicas: list[Replica], sequence: int) -> None:
    """Everybody gives and takes until nothing is left to take."""
    for turn in range(2):
        for each in replicas:
            each.sync(sequence + turn)
    for each in replicas:
        each.follow()


# -- learning ---------------------------------------------------------------------------------------------------------


def test_what_one_replica_learned_another_begins_with(replica: Callable[..., Replica], rows: Rows) -> None:
    a = replica("a", alone=True)
    for start in range(3):
        a.teach(rows(8, start), "s")
    a.sync(1)
    b = replica("b")
    assert b.streams.find("s") is None
    assert same(b.state("s"), a.state("s"))
    assert b.streams.record("s") == a.streams.record("s")._replace(row=b.streams.record("s").row)
    assert b.streams.record("s").version == 3


def test_alone_nothing_is_changed_by_syncing(replica: Callable[..., Replica], rows: Rows) -> None:
    a, never = replica("a", alone=True), replica("never")
    never.store = never.streams.durable.store = MemoryStore("g")
    for sequence in range(4):
        for each in (a, never):
            assert each.teach(rows(8, sequence), "s") == "applied"
        a.sync(sequence)
    assert same(a.streams.state("s"), never.streams.state("s"))  # optimizer moments too
    record = a.streams.record("s")
    assert (record.version, record.unsynced, record.rebased) == (4, 0, 0)


def test_two_that_learn_the_same_in_step_go_as_far_as_one(replica: Callable[..., Replica], rows: Rows) -> None:
    a, b, one = replica("a"), replica("b"), replica("one")
    one.store = one.streams.durable.store = MemoryStore("g")
    for sequence in range(1, 6):
        for each in (a, b, one):
            each.teach(rows(8), "s")
        a.sync(sequence)
        b.sync(sequence)
        a.follow()
        one.streams._table.forget_moments(("s", 1))  # as those of replicas that were brought together
    assert same(a.state("s"), b.state("s"))
    assert a.streams.record("s").seen == 2 * one.streams.record("s").seen == 80
    assert a.streams.record("s").version == 2 * one.streams.record("s").version == 10
    assert float(a.moved("s").norm()) == pytest.approx(float(one.moved("s").norm()), rel=0.02)


def test_a_step_that_was_computed_meanwhile_is_put_on_top(replica: Callable[..., Replica], rows: Rows) -> None:
    a, b = replica("a"), replica("b")
    a.teach(rows(8), "s")
    in_step([a, b], 1)
    b.state("s")
    adapt = b.engine.pipeline.adapt

    def interrupted(*args: Any) -> Any:
        a.teach(rows(8, 5), "s")
        a.sync(10)
        b.follow()
        return adapt(*args)

    b.engine.pipeline.adapt = interrupted  # type: ignore[method-assign]
    assert b.teach(rows(8, 9), "s") == "applied"
    record = b.streams.record("s")
    assert (record.version, record.unsynced, record.seen) == (3, 1, 24)
    b.engine.pipeline.adapt = adapt  # type: ignore[method-assign]
    in_step([b, a], 20)
    assert same(a.state("s"), b.state("s"))
    assert (a.streams.record("s").version, int(a.state("s").norm.inner.seen)) == (3, 24)


doings = st.lists(
    st.tuples(
        st.sampled_from(["learn"] * 4 + ["sync"] * 2 + ["follow", "reset", "delete", "freeze", "resume", "rollback"]),
        st.integers(0, 2),
        st.sampled_from("xy"),
    ),
    max_size=24,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(doings, st.sampled_from([1, 50]))
def test_whatever_happened_all_agree_in_the_end(
    pipeline: Callable[..., Pipeline], rows: Rows, sequence: list[tuple[str, int, str]], resident: int
) -> None:
    store = MemoryStore("g")
    replicas = [Replica(pipeline(), store, name, resident) for name in "abc"]
    for place, (doing, number, stream) in enumerate(sequence, start=1):
        mine = replicas[number]
        if doing == "learn":
            mine.teach(rows(2, place), stream)
        elif doing == "sync":
            mine.sync(place)
        elif doing == "follow":
            mine.follow()
        else:
            try:
                if doing == "rollback":
                    mine.streams.rollback(stream, 0)
                else:
                    getattr(mine.streams, doing)(stream)
            except NotFound:  # it never began, or another replica deleted it
                head = store.load(stream)
                assert head is None or head.gone
    in_step(replicas, 100)
    for stream in "xy":
        head = store.load(stream)
        for each in replicas:
            if head is None or head.gone:
                assert each.streams.find(stream) is None
                continue
            record = each.streams.record(stream)
            assert ((record.incarnation, record.version), record.unsynced) == (head.tag, 0)
            assert record.seen == head.record["seen"]
            assert record.frozen == head.record["frozen"]
            assert same(each.state(stream), replicas[0].state(stream))
            assert torch.isfinite(each.moved(stream)).all()
    for each in replicas:
        assert each.streams._rows._holders == {}
        assert each.streams._rows.used == len(each.streams._recency)


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "delete"])
def test_what_was_learned_in_a_life_that_is_over_does_not_come_back(
    replica: Callable[..., Replica], rows: Rows, how: str
) -> None:
    a, b, late = replica("a"), replica("b"), replica("late")
    for each in (a, b, late):
        each.teach(rows(8), "s")
    in_step([a, b], 1)
    b.teach(rows(8), "s")
    getattr(a.streams, how)("s")
    head = a.store.load("s")
    assert head is not None
    assert (head.incarnation, head.version, head.snapshot, head.gone) == (2, 0, None, how == "delete")
    b.sync(5)  # it has learned meanwhile, and does not know yet
    late.streams.flush()  # nor does this one, to which the stream was new
    assert a.store.load("s") == head
    assert b.streams.find("s") is None
    assert late.streams.find("s") is None
    assert b.teach(rows(8), "s") == "applied"
    record = b.streams.record("s")
    assert (record.incarnation, record.version, record.seen) == (2, 1, 8)


def test_freezing_reaches_everybody_and_costs_nothing_that_was_learned(
    replica: Callable[..., Replica], rows: Rows
) -> None:
    a, b = replica("a"), replica("b")
    for each in (a, b):
        each.teach(rows(8), "s")
    in_step([a, b], 1)
    b.teach(rows(8), "s")
    frozen, number = a.streams.freeze("s")
    assert (frozen.frozen, frozen.version) == (True, 3)
    b.sync(5)
    record = b.streams.record("s")
    assert (record.frozen, record.version, record.seen) == (True, 4, 24)
    assert b.teach(rows(8), "s") == "frozen"
    a.follow()
    assert number > 0
    assert a.streams.resume("s")[0].seen == 24
    b.follow()
    assert b.teach(rows(8), "s") == "applied"


def test_rolling_back_at_another_replica_than_the_one_that_kept_the_version(
    replica: Callable[..., Replica], rows: Rows
) -> None:
    a, b = replica("a", alone=True), replica("b")
    a.teach(rows(8), "s")
    good = a.state("s")
    a.streams.keep_good("s", a.streams.record("s"), good)
    a.teach(rows(8, 3), "s")
    a.sync(1)
    assert b.streams.versions("s") == [0, 1]
    record, _ = b.streams.rollback("s", 1)
    assert (record.incarnation, record.version, record.kept) == (2, 3, (1,))
    assert same(b.state("s"), good)
    a.sync(2)
    assert same(a.state("s"), good)
    with pytest.raises(NotFound, match=r"the version 2 of stream 's' is not kept; there are 0, 1"):
        a.streams.rollback("s", 2)


# -- a store that is not as it was -------------------------------------------------------------------------------------


def spoil(store: Store, stream: str, content: bytes) -> None:
    head = store.load(stream)
    assert head is not None
    assert store.save([Save(stream, head.tag, head._replace(snapshot=content))]) != [None]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_snapshot_that_is_refused_is_given_up_for_the_last_good_one(
    replica: Callable[..., Replica], rows: Rows, keeps: bool
) -> None:
    a = replica("a", alone=True)
    a.teach(rows(8), "s")
    good = a.state("s")
    if keeps:
        a.streams.keep_good("s", a.streams.record("s"), good)
    a.teach(rows(8, 3), "s")
    a.sync(1)
    head = a.store.load("s")
    assert head is not None
    assert head.snapshot is not None
    spoil(a.store, "s", head.snapshot[:-3])
    b, c = replica("b"), replica("c")
    assert same(b.state("s"), good if keeps else optim.rest(b.engine.pipeline.init()))
    record = b.streams.record("s")
    assert (record.incarnation, record.version) == (2, 3)
    assert f"went back to {1 if keeps else 0}" in record.events[-1].what
    assert len(b.refused) == 1
    assert same(c.state("s"), b.state("s"))
    assert c.refused == []  # it was mended for all
    a.sync(2)
    assert a.streams.find("s") is None


def test_a_state_of_another_structure_is_refused(replica: Callable[..., Replica], rows: Rows) -> None:
    a = replica("a", alone=True)
    a.teach(rows(8), "s")
    a.sync(1)
    b = replica("b")
    b.streams.durable.restructure({"other": torch.zeros(3)}, b.engine.pipeline.merging())
    with pytest.raises(Unavailable, match="states have another structure now"):
        b.streams.durable.load("s")  # another replica may have that structure, and must not lose it
    assert b.refused == []
    b.streams.durable.alone = True
    found = b.streams.durable.load("s")
    assert found is not None
    assert (found.tensors, found.record.incarnation) == (None, 2)
    assert b.refused == ["states have another structure now"]


def test_streams_that_learned_nothing_are_known_to_all(replica: Callable[..., Replica]) -> None:
    a, b = replica("a", alone=True), replica("b")
    for name in ("x", "y"):
        a.streams.begin(name)
    lines, total = a.streams.page(10)
    assert ([line.stream for line in lines], total) == (["x", "y"], 2)
    assert b.store.load("x") == Head(1, 0, b.streams.record("x").to_json(), None)
    assert b.streams.begin("x") is None
    assert [event.what for event in b.streams.record("x").events] == ["begun"]


def test_what_was_saved_before_a_store_failed_is_not_given_twice(
    replica: Callable[..., Replica], rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = replica("a"), replica("b")
    for stream in ("s", "t"):
        for each in (a, b):
            each.teach(rows(8), stream)
    in_step([a, b], 1)
    a.teach(rows(8, 2), "s")
    b.teach(rows(8, 3), "t")
    a.teach(rows(8, 4), "t")
    load = a.store.load
    looks: list[str] = []

    def failing(stream: str) -> Any:
        looks.append(stream)
        if stream == "t" and looks.count("t") == 1:
            found = load(stream)
            b.sync(5)  # it wins
            return found
        if looks.count("t") == 2 and stream == "t":
            raise Unavailable("locked")
        return load(stream)

    monkeypatch.setattr(a.store, "load", failing)
    with pytest.raises(Unavailable, match="locked"):
        a.streams.flush()
    monkeypatch.undo()
    in_step([a, b], 10)
    for stream, seen in (("s", 24), ("t", 32)):
        head = a.store.load(stream)
        assert head is not None
        assert head.record["seen"] == seen
        assert int(b.state(stream).norm.inner.seen) == seen


def test_counters_alone_are_a_version_too(replica: Callable[..., Replica], rows: Rows) -> None:
    """Or a head of counters could take the place of another one with the same tag."""
    a, b = replica("a"), replica("b")
    a.teach(rows(8), "s")
    in_step([a, b], 1)
    b.state("s")
    for each, seen in ((a, 100), (b, 1000)):
        each.streams.note("s", 1, lambda record, seen=seen: record._replace(seen=record.seen + seen))  # type: ignore[misc]
    in_step([a, b], 5)
    head = a.store.load("s")
    assert head is not None
    assert (head.version, head.record["seen"]) == (3, 1108)


def test_a_deletion_reaches_what_only_another_generation_has(pipeline: Callable[..., Pipeline], rows: Rows) -> None:
    shelf = Shelf()
    old, new = Replica(pipeline(), MemoryStore("g", shelf), "a", alone=True), MemoryStore("h", shelf)
    old.teach(rows(8), "s")
    old.sync(1)
    later = Replica(pipeline(), new, "b", alone=True)
    later.streams.delete("s")
    head = old.store.load("s")
    assert head is not None
    assert (head.gone, head.snapshot) == (True, None)
    with pytest.raises(NotFound):
        later.streams.delete("s")


def test_a_stream_that_another_replica_has_just_begun_can_be_deleted(
    replica: Callable[..., Replica], rows: Rows
) -> None:
    a, b = replica("a"), replica("b")
    a.teach(rows(8), "s")  # and the store does not know it yet
    b.streams.delete("s")
    a.follow()
    assert a.streams.find("s") is None
    a.streams.flush()
    head = a.store.load("s")
    assert head is not None
    assert (head.gone, head.incarnation) == (True, 2)
