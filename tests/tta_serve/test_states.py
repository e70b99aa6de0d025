"""Streams that begin, learn, make room, come back, go back and end: over both stores, around a real engine."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import Pipeline, PipelineState, optim, tree
from tta_serve import states as module
from tta_serve import working_set
from tta_serve.durable import Durable
from tta_serve.engine import Engine, Query
from tta_serve.errors import NotFound, Overloaded, Unavailable
from tta_serve.lessons import Lesson, Observed
from tta_serve.memory_store import MemoryStore
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.states import States
from tta_serve.store import Head, Save, Store
from tta_serve.streams import KEPT_VERSIONS, StreamRecord

Rows = Callable[..., Tensor]
Make = Callable[..., Engine]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "states.db", "model", "0")
    yield made
    made.close()


@pytest.fixture
def engine(pipeline: Callable[..., Pipeline]) -> Make:
    """`engine(resident=2, store=None, streams_max=50, new_per_minute=None, **eata)`: around the small network."""

    def make(
        resident: int = 2,
        store: Store | None = None,
        streams_max: int = 50,
        new_per_minute: int | None = None,
        **config: Any,
    ) -> Engine:
        around = pipeline(**config)
        init = tree.encode(optim.rest(around.init()))
        return Engine(
            around,
            torch.device("cpu"),
            streams_max,
            resident=resident,
            durable=Durable(store, init=init, merging=around.merging()) if store else None,
            new_per_minute=new_per_minute,
        )

    return make


def ask(engine: Engine, x: Tensor, stream: str) -> Lesson:
    ((_, lesson),) = engine.predict([Query(x, stream)])
    return lesson


def teach(engine: Engine, x: Tensor, stream: str) -> str:
    (learned,) = engine.learn([ask(engine, x, stream)])
    return learned.result


def answer(engine: Engine, x: Tensor, stream: str) -> np.ndarray:
    ((found, _),) = engine.predict([Query(x, stream)])
    assert found.logits is not None
    return found.logits


def at_rest(engine: Engine, stream: str) -> PipelineState:
    return optim.rest(engine.streams.state(stream))


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(a), tree.leaves(b), strict=True))


def steps_of(state: PipelineState) -> int:
    """How many steps the optimizer remembers."""
    return int(optim.moments(state)[0].step)


def what(record: StreamRecord) -> list[str]:
    return [event.what for event in record.events]


# -- beginning --------------------------------------------------------------------------------------------------------


def test_a_stream_begins_once(engine: Make) -> None:
    streams = engine().streams
    begun = streams.begin("a")
    assert begun is not None
    assert (begun.version, begun.row, what(begun)) == (0, 0, ["begun"])
    assert streams.begin("a") is None
    assert streams.find("a") is streams.record("a") is begun


def test_so_many_begin_in_a_minute(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    streams = engine(new_per_minute=2).streams
    streams.begin("a")
    streams.begin("b")
    with pytest.raises(Overloaded) as caught:
        streams.begin("c")
    assert str(caught.value) == (
        "2 streams have begun within a minute, the limit (streams.new_per_minute); begin 'c' later"
    )
    assert caught.value.retry_after_s == pytest.approx(30.0)
    assert streams.begin("a") is None  # those that exist are no new ones
    now_s += 31
    assert streams.begin("c") is not None
    assert streams.names() == ["a", "b", "c"]


def test_a_stream_without_room_is_answered_as_a_new_one_and_its_mates_as_ever(engine: Make, rows: Rows) -> None:
    mine = engine(streams_max=1)
    teach(mine, rows(8), "a")
    expected = answer(mine, rows(3), "a"), answer(engine(), rows(3), "new")
    (a, _), (b, lesson) = mine.predict([Query(rows(3), "a"), Query(rows(3), "b")])
    for found, wanted in zip((a, b), expected, strict=True):
        np.testing.assert_allclose(found.logits, wanted, rtol=1e-5, atol=1e-5)
    assert mine.streams.names() == ["a"]
    assert mine.learn([lesson])[0].result == "stale"


def test_a_beginning_is_taken_back_unless_the_stream_went_on(engine: Make, rows: Rows) -> None:
    mine = engine()
    begun = mine.streams.begin("a")
    assert begun is not None
    mine.streams.take_back("a", begun)
    assert mine.streams.names() == []
    again = mine.streams.begin("a")
    assert again is not None
    mine.streams.take_back("a", begun)  # of another life
    teach(mine, rows(2), "a")
    mine.streams.take_back("a", again)
    assert mine.streams.record("a").version == 1


def test_nor_where_the_store_knows_of_it(engine: Make, store: Store) -> None:
    mine = engine(store=store)
    begun = mine.streams.begin("a")
    assert begun is not None
    mine.streams.flush()
    mine.streams.take_back("a", begun)
    assert mine.streams.names() == ["a"]
    assert store.count() == 1


def test_streams_that_the_store_knows_count_and_are_no_new_ones(engine: Make, rows: Rows, store: Store) -> None:
    before = engine(store=store)
    for stream in "abc":
        teach(before, rows(4), stream)
    before.streams.flush()
    mine = engine(store=store, streams_max=3, new_per_minute=1)
    mine.streams.known = store.count()  # as the thread that keeps in step says
    assert mine.streams.names() == []  # none is loaded before it is asked for
    for stream in "abc":
        assert mine.streams.begin(stream) is None
        assert ask(mine, rows(1), stream).version == 1
    with pytest.raises(Overloaded, match="there are 3 streams, the limit"):
        mine.streams.begin("d")


# -- making room and coming back --------------------------------------------------------------------------------------


def test_who_was_used_longest_ago_makes_room_and_comes_back_bit_for_bit(engine: Make, rows: Rows, store: Store) -> None:
    mine, never_out = engine(store=store), engine(resident=50)
    for number, stream in enumerate("abcdab"):
        for each in (mine, never_out):
            assert teach(each, rows(8, number), stream) == "applied"
    assert mine.streams.names() == ["a", "b"]
    assert [head.version for stream in "cd" if (head := store.load(stream))] == [1, 1]
    for stream in "cd":  # only moments began anew, and these two took one step each
        assert same(at_rest(mine, stream), at_rest(never_out, stream))
    np.testing.assert_array_equal(answer(mine, rows(3), "c"), answer(never_out, rows(3), "c"))
    assert mine.streams.record("c").version == never_out.streams.record("c").version == 1


def test_who_made_room_is_no_longer_at_hand_and_is_known_as_it_was(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    teach(mine, rows(8), "a")
    mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    before = mine.streams.record("a")
    for stream in "bc":
        teach(mine, rows(8), stream)
    assert mine.streams.find("a") is None
    assert mine.streams.record("a") == before._replace(row=0, unsynced=0)
    assert mine.streams.versions("a") == [0, 1]
    assert mine.streams.find("a") is None  # looking at it brings nothing back
    assert [line.stream for line in mine.streams.page(10)[0]] == ["a", "b", "c"]


def test_what_was_flushed_is_there_after_a_restart_bit_for_bit(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(resident=50, store=store)
    for number, stream in enumerate("abcabac"):
        teach(mine, rows(8, number), stream)
    mine.streams.freeze("c")
    assert mine.streams.flush() == 2  # freezing gave c
    assert (mine.streams.flush(), mine.streams.ahead()) == (0, [])
    again = engine(store=store)
    for stream in "abc":
        assert same(at_rest(again, stream), at_rest(mine, stream))
        assert again.streams.record(stream)._replace(row=0) == mine.streams.record(stream)._replace(row=0)
    assert teach(again, rows(8), "c") == "frozen"


def test_optimizer_moments_begin_anew_after_an_absence(engine: Make, rows: Rows) -> None:
    mine = engine()
    for start in range(3):
        teach(mine, rows(8, start), "a")
    assert steps_of(mine.streams.state("a")) == 3
    for stream in "bc":
        teach(mine, rows(8), stream)
    assert mine.streams.find("a") is None
    assert mine.streams.bytes_of("a") == 0
    assert steps_of(mine.streams.state("a")) == 0
    assert mine.streams.record("a").steps == 3


def test_asking_is_using(engine: Make, rows: Rows) -> None:
    mine = engine()
    for stream in "ab":
        teach(mine, rows(4), stream)
    answer(mine, rows(1), "a")
    teach(mine, rows(4), "c")
    assert mine.streams.names() == ["a", "c"]


def test_a_stream_that_did_not_change_is_not_written_again(engine: Make, rows: Rows) -> None:
    saved: list[tuple[str, int]] = []

    class Counting(MemoryStore):
        def save(self, saves: Sequence[Save]) -> list[int | None]:
            saved.extend((each.stream, each.head.version) for each in saves)
            return super().save(saves)

    mine = engine(store=Counting())
    for number, stream in enumerate("abcabcabc"):
        teach(mine, rows(4), stream) if number < 3 else answer(mine, rows(1), stream)
    mine.streams.flush()
    assert sorted(saved) == [("a", 1), ("b", 1), ("c", 1)]


def test_the_store_has_what_made_room(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    for number, stream in enumerate("abcabcabc"):
        teach(mine, rows(4, number), stream)
    heads = {stream: store.load(stream) for stream in "abc"}
    # 3 of b and c is in the table
    assert [head and (head.version, head.kept) for head in heads.values()] == [(3, ()), (2, ()), (2, ())]


def test_streams_that_have_learned_nothing_need_no_row(engine: Make, rows: Rows) -> None:
    mine = engine()
    for number in range(40):
        answer(mine, rows(1), f"s{number}")
    assert mine.streams._rows.used == 0
    assert len(mine.streams._recency) == 0


def test_one_batch_may_have_more_streams_than_are_resident(engine: Make, rows: Rows, store: Store) -> None:
    mine, never_out = engine(store=store), engine(resident=50)
    names = [f"s{number}" for number in range(12)]
    for round_ in range(3):
        for each in (mine, never_out):
            queries = [Query(rows(2, number + round_), name) for number, name in enumerate(names)]
            lessons = [lesson for _, lesson in each.predict(queries)]
            assert {learned.result for learned in each.learn(lessons)} == {"applied"}
            for name in names:  # moments are what an absence costs; here they shall be alike
                each.streams._table.forget_moments((name, 1))
        assert mine.streams._rows.used == len(mine.streams._recency)
    for name in names:
        assert mine.streams.record(name).version == 3
        for (field, a), (_, b) in zip(
            tree.leaves(at_rest(mine, name)), tree.leaves(at_rest(never_out, name)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=field)


@pytest.mark.parametrize("order", ["ac", "ca"])
def test_who_is_asked_for_makes_no_room_for_its_mates(engine: Make, rows: Rows, store: Store, order: str) -> None:
    mine = engine(store=store)
    for stream in "cab":
        teach(mine, rows(8), stream)
    assert mine.streams.names() == ["a", "b"]  # a was used longest ago
    lessons = [lesson for _, lesson in mine.predict([Query(rows(2), stream) for stream in order])]
    assert {lesson.stream: (lesson.incarnation, lesson.version) for lesson in lessons} == {"a": (1, 1), "c": (1, 1)}
    for stream in "b" + order[::-1]:
        ask(mine, rows(1), stream)
    assert {learned.result for learned in mine.learn(lessons)} == {"applied"}


# -- a store that fails -----------------------------------------------------------------------------------------------


class Failing(MemoryStore):
    """A store whose disk is full, or broken, when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise Unavailable("the disk is full")

    def save(self, saves: Sequence[Save]) -> list[int | None]:
        self._do("save")
        return super().save(saves)

    def load(self, stream: str) -> Head | None:
        self._do("load")
        return super().load(stream)

    def load_kept(self, stream: str, version: int) -> bytes:
        self._do("load_kept")
        return super().load_kept(stream, version)

    def erase_elsewhere(self, stream: str) -> None:
        self._do("erase_elsewhere")
        super().erase_elsewhere(stream)


@pytest.fixture
def full(engine: Make, rows: Rows) -> tuple[Engine, Failing]:
    """c has made room, a and b are resident and ahead of the store, and from now on nothing can be written."""
    store = Failing()
    mine = engine(store=store)
    for stream in "cab":
        teach(mine, rows(8), stream)
    store.fails = {"save"}
    return mine, store


def test_on_a_full_disk_those_with_a_row_are_answered_and_learn(full: tuple[Engine, Failing], rows: Rows) -> None:
    mine, _ = full
    for stream in "ab":
        assert teach(mine, rows(8), stream) == "applied"
        record = mine.streams.record(stream)
        assert (record.version, record.unsynced) == (2, 2)
    assert mine.streams._rows.used == 2


def test_on_a_full_disk_nobody_leaves_and_nothing_is_lost(
    full: tuple[Engine, Failing], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    mine, store = full
    with caplog.at_level(logging.ERROR):
        assert {stream: ask(mine, rows(3), stream).version for stream in "abc"} == {"a": 1, "b": 1, "c": 1}
        assert teach(mine, rows(8), "d") == "applied"
    assert "stay in memory: what they learned cannot be saved" in caplog.text
    assert mine.streams.names() == ["a", "b", "c", "d"]
    assert sorted(mine.streams.ahead()) == ["a", "b", "d"]  # c had learned nothing that the store does not have
    with pytest.raises(Unavailable, match="the disk is full"):
        mine.streams.flush()
    states = {stream: at_rest(mine, stream) for stream in "abcd"}
    store.fails = set()
    assert mine.streams.flush() == 3
    assert teach(mine, rows(3), "e") == "applied"
    assert len(mine.streams.names()) == 2  # and room is made again
    for stream, state in states.items():
        assert same(at_rest(mine, stream), state)


def test_where_no_row_is_free_a_new_stream_does_not_cost_its_mates_their_step(
    engine: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(working_set, "TEACHING_MAX", 1)
    store = Failing()
    mine = Engine(
        (around := engine().pipeline),
        torch.device("cpu"),
        50,
        resident=2,
        batch_streams_max=1,
        durable=Durable(store, init=tree.encode(optim.rest(around.init())), merging=around.merging()),
    )
    store.fails = {"save"}
    names = [f"s{number}" for number in range(5)]  # of 1 + 2 + 3 + 1 rows, one is `init()`'s and one for who steps
    for name in names:
        assert teach(mine, rows(8), name) == "applied"
    lessons = [lesson for _, lesson in mine.predict([Query(rows(8), "new"), Query(rows(8), "s0")])]
    with caplog.at_level(logging.ERROR):
        assert mine.learn(lessons[1:])[0].result == "applied"
        assert teach(mine, rows(8), "s5") == "applied"  # the last row
        results = {each.stream: each.result for each in mine.learn(lessons[:1])}
    assert results == {"new": "stale"}
    assert "no row of the table is free: steps of 1 streams are lost" in caplog.text
    assert (mine.streams.record("new").version, mine.streams.record("s0").version) == (0, 2)
    assert {ask(mine, rows(1), name).version for name in names} == {1, 2}
    store.fails = set()
    assert teach(mine, rows(8), "new") == "applied"
    assert mine.streams._rows.used == len(mine.streams._recency) == 2


def test_a_stream_that_cannot_be_loaded_does_not_cost_its_mates_their_answer_or_step(
    engine: Make, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    store = Failing()
    mine = engine(store=store)
    lessons = {stream: ask(mine, rows(8), stream) for stream in "cab"}
    for lesson in lessons.values():
        mine.learn([lesson])
    expected = answer(mine, rows(3), "a")
    store.fails = {"load"}
    with caplog.at_level(logging.ERROR):
        (a, _), (c, unknown) = mine.predict([Query(rows(3), "a"), Query(rows(3), "c")])
    assert "stream 'c' is answered by the frozen model" in caplog.text
    np.testing.assert_allclose(a.logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(c.logits, answer(engine(), rows(3), "new"), rtol=1e-5, atol=1e-5)
    assert (c.version, unknown.incarnation) == (0, 0)
    learned = {each.stream: each.result for each in mine.learn([lessons["c"], lessons["b"], unknown])}
    assert learned["b"] == "applied"
    assert learned["c"] == "stale"
    assert mine.streams._rows._holders == {}
    for call in (mine.streams.state, mine.streams.record, mine.streams.reset, mine.streams.delete):
        with pytest.raises(Unavailable, match="the disk is full"):
            call("c")
    store.fails = set()
    assert ask(mine, rows(3), "c").version == 1  # what it had is not lost
    assert teach(mine, rows(8), "c") == "applied"


def short(content: bytes) -> bytes:
    return content[:-3]


def empty(_: bytes) -> bytes:
    return b""


def noise(_: bytes) -> bytes:
    return bytes(range(256)) * 8


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("spoil", [short, empty, noise, flipped])
@pytest.mark.parametrize("good", [True, False])
def test_a_snapshot_that_is_not_what_was_written_is_given_up_for_the_last_good_one(
    engine: Make, rows: Rows, store: Store, spoil: Callable[[bytes], bytes], good: bool
) -> None:
    mine = engine(store=store)
    teach(mine, rows(8), "a")
    first = at_rest(mine, "a") if good else optim.rest(mine.pipeline.init())
    if good:
        mine.streams.keep_good("a", mine.streams.record("a"), first)
    teach(mine, rows(8, 1), "a")
    for stream in "bc":
        teach(mine, rows(8), stream)
    head = store.load("a")
    assert head is not None
    assert head.snapshot is not None
    assert store.save([Save("a", head.tag, head._replace(snapshot=spoil(head.snapshot)))]) != [None]
    expected = answer(mine, rows(3), "c")
    (c, _), (a, lesson) = mine.predict([Query(rows(3), "c"), Query(rows(3), "a")])
    np.testing.assert_allclose(c.logits, expected, rtol=1e-5, atol=1e-5)
    assert (a.version, lesson.incarnation) == (3, 2)  # of another life: what was under way is dropped
    assert same(at_rest(mine, "a"), first)
    record = mine.streams.record("a")
    assert record.kept == ((1,) if good else ())
    assert what(record)[-1].startswith("version 2 refused (")
    assert what(record)[-1].endswith(f"): went back to {int(good)}")
    assert mine.streams._rows.used == len(mine.streams._recency) == 2
    assert mine.learn([lesson])[0].result == "applied"


@pytest.mark.parametrize("how", ["reset", "delete", "freeze"])
def test_what_cannot_be_written_changes_nothing(full: tuple[Engine, Failing], rows: Rows, how: str) -> None:
    mine, store = full
    for stream in "ac":  # at hand, and not
        before, at_hand = mine.streams.record(stream), mine.streams.names()
        with pytest.raises(Unavailable, match="the disk is full"):
            getattr(mine.streams, how)(stream)
        assert mine.streams.record(stream) == before
        assert mine.streams.names() == at_hand
    assert teach(mine, rows(8), "a") == "applied"
    store.fails = set()
    for stream in "ac":
        getattr(mine.streams, how)(stream)
    assert mine.streams._rows.used == len(mine.streams._recency)


# -- going back -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(engine: Make, rows: Rows, store: Store) -> tuple[Engine, PipelineState]:
    """A stream at version 3 whose version 2 is kept; and that state."""
    mine = engine(store=store)
    for start in range(2):
        teach(mine, rows(8, start), "a")
    good = at_rest(mine, "a")
    mine.streams.keep_good("a", mine.streams.record("a"), good)
    teach(mine, rows(8, 2), "a")
    return mine, good


def test_roll_back_to_a_kept_version(kept: tuple[Engine, PipelineState], rows: Rows) -> None:
    mine, good = kept
    old, lesson = mine.streams.record("a"), ask(mine, rows(8), "a")
    assert mine.streams.versions("a") == [0, 2]
    new, _ = mine.streams.rollback("a", 2)
    assert same(at_rest(mine, "a"), good)
    assert new == mine.streams.record("a")
    assert (new.version, new.steps, new.kept, new.entropy) == (4, old.steps, (2,), None)
    assert new.incarnation > old.incarnation
    assert what(new)[-1] == "rolled back to 2: by hand"
    assert steps_of(mine.streams.state("a")) == 0
    assert mine.learn([lesson])[0].result == "stale"
    assert teach(mine, rows(8), "a") == "applied"
    assert mine.streams.record("a").version == 5
    assert mine.streams._rows.used == 1


def test_roll_back_to_the_beginning(kept: tuple[Engine, PipelineState]) -> None:
    mine, _ = kept
    new, _ = mine.streams.rollback("a", 0, "because")
    assert same(mine.streams.state("a"), mine.pipeline.init())
    assert (new.version, new.row, what(new)[-1]) == (4, 0, "rolled back to 0: because")
    assert mine.streams._rows.used == 0
    assert mine.streams.versions("a") == [0, 2]  # and forth again
    assert mine.streams.rollback("a", 2)[0].version == 5


def test_a_version_that_is_not_kept(kept: tuple[Engine, PipelineState]) -> None:
    mine, _ = kept
    before = mine.streams.record("a")
    for version in (3, 1, -1):
        with pytest.raises(NotFound) as caught:
            mine.streams.rollback("a", version)
        assert str(caught.value) == f"the version {version} of stream 'a' is not kept; there are 0, 2"
    assert mine.streams.record("a") == before._replace(unsynced=0)


def test_roll_back_of_a_stream_that_has_made_room(kept: tuple[Engine, PipelineState], rows: Rows, store: Store) -> None:
    mine, good = kept
    for stream in "bc":
        teach(mine, rows(8), stream)
    assert mine.streams.find("a") is None
    mine.streams.rollback("a", 2)
    assert same(at_rest(mine, "a"), good)
    head = store.load("a")
    assert head is not None
    assert (head.tag, head.kept) == ((2, 4), (2,))  # of 3 nothing is left
    assert mine.streams._rows.used == 2


def test_a_roll_back_that_fails_changes_nothing(engine: Make, rows: Rows) -> None:
    store = Failing()
    mine = engine(store=store)
    teach(mine, rows(8), "a")
    mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    for stream in "bc":
        teach(mine, rows(8), stream)
    before = mine.streams.record("a")
    for fails in ("load_kept", "save", "load"):
        store.fails = {fails}
        with pytest.raises(Unavailable):
            mine.streams.rollback("a", 1)
        store.fails = set()
        assert mine.streams.record("a") == before
        assert mine.streams._rows.used == 2
    assert mine.streams.rollback("a", 1)[0].version == 2


def test_the_guards_go_back_further_where_the_last_good_version_cannot_be_read(
    engine: Make, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    store = Failing()
    mine = engine(store=store)
    teach(mine, rows(8), "a")
    mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    store.fails = {"load_kept"}
    with caplog.at_level(logging.ERROR):
        mine.streams.act("a", mine.streams.record("a"), "freeze")
    record = mine.streams.record("a")
    assert (record.frozen, what(record)[-2:]) == (True, ["rolled back to 0: guards", "frozen: guards"])
    assert same(mine.streams.state("a"), mine.pipeline.init())
    assert "is rolled back further" in caplog.text


def test_without_the_store_the_guards_freeze_a_stream_here(
    full: tuple[Engine, Failing], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    mine, store = full
    state = at_rest(mine, "a")
    with caplog.at_level(logging.ERROR):
        mine.streams.act("a", mine.streams.record("a"), "freeze")
    assert "stream 'a' is frozen here alone" in caplog.text
    assert teach(mine, rows(8), "a") == "frozen"
    assert same(at_rest(mine, "a"), state)
    store.fails = set()
    mine.streams.flush()  # and everywhere, as soon as it can be told
    assert [event[2] for event in (store.load("a") or Head(0, 0, {}, None)).record["events"]][-1] == "frozen: guards"


def test_so_many_versions_are_kept(engine: Make, rows: Rows, store: Store) -> None:
    mine, states = engine(store=store), {}
    for start in range(KEPT_VERSIONS + 2):
        teach(mine, rows(4, start), "a")
        states[start + 1] = at_rest(mine, "a")
        mine.streams.keep_good("a", mine.streams.record("a"), states[start + 1])
        if start % 2:  # the store is given several at once
            mine.streams.flush()
    last = tuple(range(3, KEPT_VERSIONS + 3))
    assert mine.streams.versions("a") == [0, *last]
    head = store.load("a")
    assert head is not None
    assert head.kept == last
    for version in range(KEPT_VERSIONS + 3):
        if version not in last:
            with pytest.raises(NotFound):
                store.load_kept("a", version)
    for version in last:
        mine.streams.rollback("a", version)
        assert same(at_rest(mine, "a"), states[version])


def test_nothing_is_kept_of_a_life_that_is_over(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    teach(mine, rows(4), "a")
    record, state = mine.streams.record("a"), at_rest(mine, "a")
    mine.streams.delete("a")
    mine.streams.keep_good("a", record, state)
    mine.streams.flush()
    assert store.load("a") == Head(2, 0, {}, None, gone=True)
    mine.streams.begin("a")
    mine.streams.keep_good("a", record, state)
    mine.streams.flush()
    assert mine.streams.versions("a") == [0]
    head = store.load("a")
    assert head is not None
    assert (head.tag, head.snapshot, head.kept, head.gone) == ((2, 0), None, (), False)


def test_what_cannot_be_kept_now_is_kept_later(engine: Make, rows: Rows) -> None:
    store = Failing()
    mine = engine(store=store)
    teach(mine, rows(4), "a")
    state = at_rest(mine, "a")
    store.fails = {"save"}
    mine.streams.keep_good("a", mine.streams.record("a"), state)
    with pytest.raises(Unavailable):
        mine.streams.flush()
    assert mine.streams.versions("a") == [0, 1]
    teach(mine, rows(4, 1), "a")
    store.fails = set()
    mine.streams.flush()
    mine.streams.rollback("a", 1)
    assert same(at_rest(mine, "a"), state)


# -- freezing, ending -------------------------------------------------------------------------------------------------


def test_a_frozen_stream_answers_and_learns_nothing_until_it_is_resumed(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    teach(mine, rows(8), "a")
    state, lesson = mine.streams.state("a"), ask(mine, rows(8), "a")
    frozen, number = mine.streams.freeze("a")
    assert number > 0
    assert frozen.version == 2
    again, later = mine.streams.freeze("a")
    assert again is mine.streams.record("a") is frozen
    assert later > number  # for those who may not have followed the first
    assert teach(mine, rows(8), "a") == "frozen"
    assert lesson.moments is not None
    mine.absorb([Observed("a", lesson.incarnation, 8, lesson.moments)])
    assert same(mine.streams.state("a"), state)
    assert mine.streams.record("a") == frozen
    resumed, later = mine.streams.resume("a")
    assert later > number
    assert mine.streams.resume("a")[0] == resumed
    assert what(resumed) == ["begun", "frozen: by hand", "resumed"]
    assert teach(mine, rows(8), "a") == "applied"
    assert mine.streams.record("a").version == 4


def test_a_stream_that_made_room_is_frozen_as_it_is(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    teach(mine, rows(8), "a")
    state = at_rest(mine, "a")
    for stream in "bc":
        teach(mine, rows(8), stream)
    assert mine.streams.freeze("a")[0].frozen
    assert mine.streams.find("a") is None
    assert teach(mine, rows(8), "a") == "frozen"
    assert same(at_rest(mine, "a"), state)
    assert mine.streams.record("a").version == 2


def test_resuming_puts_the_guards_at_the_foot_of_their_ladder(engine: Make) -> None:
    mine = engine()
    record = mine.streams.begin("a")
    assert record is not None
    mine.streams.note("a", record.incarnation, lambda each: each._replace(ladder=each.ladder.trip()[0]))
    assert mine.streams.freeze("a")[0].ladder.rung == 1
    assert mine.streams.resume("a")[0].ladder.rung == 0


def test_freezing_and_resuming_during_a_step_stand(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    adapt = mine.pipeline.adapt

    def interrupted(*args: Any) -> Any:
        mine.streams.freeze("a")
        return adapt(*args)

    mine.pipeline.adapt = interrupted  # type: ignore[method-assign]
    assert teach(mine, rows(8), "a") == "applied"
    record, state = mine.streams.record("a"), at_rest(mine, "a")
    assert (record.frozen, record.version, record.unsynced, record.steps) == (True, 2, 1, 1)
    assert what(record) == ["begun", "frozen: by hand"]
    mine.streams.flush()
    again = engine(store=store)
    assert same(at_rest(again, "a"), state)
    assert again.streams.record("a")._replace(row=0) == record._replace(row=0, unsynced=0)


def test_delete_leaves_nothing(engine: Make, rows: Rows, store: Store) -> None:
    ended: list[tuple[str, int]] = []
    mine = engine(store=store)
    mine.streams._on_end = lambda *life: ended.append(life)
    for stream in "abc":
        teach(mine, rows(8), stream)
        mine.streams.keep_good(stream, mine.streams.record(stream), at_rest(mine, stream))
    assert mine.streams.names() == ["b", "c"]
    for stream in "abc":
        mine.streams.delete(stream)
        assert store.load(stream) == Head(2, 0, {}, None, gone=True)
        with pytest.raises(NotFound):
            store.load_kept(stream, 1)
    assert (store.count(), mine.streams.page(10)) == (0, ([], 0))
    assert (mine.streams.names(), mine.streams.bytes(), mine.streams._rows.used) == ([], 0, 0)
    assert (len(mine.streams._recency), dict(mine.streams._table._working)) == (0, {})
    assert (mine.streams._synced, mine.streams._good, mine.streams._new) == ({}, {}, set())
    assert ended == [("a", 1), ("b", 1), ("c", 1)]


def test_a_life_after_a_deletion_is_another_one(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    lesson = ask(mine, rows(8), "a")
    mine.learn([lesson])
    mine.streams.delete("a")
    assert mine.learn([lesson])[0].result == "stale"
    assert teach(mine, rows(8), "a") == "applied"
    assert mine.learn([lesson])[0].result == "stale"
    record = mine.streams.record("a")
    assert (record.incarnation, record.version, what(record)) == (2, 1, ["begun"])
    mine.streams.flush()
    assert engine(store=store).streams.record("a") == record._replace(row=0, unsynced=0)


@pytest.mark.parametrize("how", ["reset", "delete", "rollback"])
def test_a_stream_that_ends_while_its_row_is_held(engine: Make, rows: Rows, how: str) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    end = {
        "reset": mine.streams.reset,
        "delete": mine.streams.delete,
        "rollback": lambda s: mine.streams.rollback(s, 1),
    }
    with mine.streams.answering(["a"]) as (record,):
        before = tree.row(mine.streams.read([record.row]), 0)
        end[how]("a")
        teach(mine, rows(8, 5), "b")
        teach(mine, rows(8, 6), "c")
        assert same(tree.row(mine.streams.read([record.row]), 0), before)
        assert mine.streams._rows.used == 3
    assert mine.streams._rows.used == 2 == len(mine.streams._recency)


@pytest.mark.parametrize("how", ["reset", "delete", "rollback"])
def test_a_step_for_a_life_that_is_over_is_dropped_and_its_row_given_back(engine: Make, rows: Rows, how: str) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    end = {
        "reset": mine.streams.reset,
        "delete": mine.streams.delete,
        "rollback": lambda s: mine.streams.rollback(s, 0),
    }
    life = mine.streams.record("a").incarnation
    with mine.streams.teaching([("a", life), ("never seen", 1)]) as held:
        assert held.streams == ["a"]
        states = mine.streams.read_to_teach(held)
        end[how]("a")
        assert mine.streams.publish(held, [held.records[0]._replace(version=2)], states) == [False]
    assert mine.streams._rows.used == 0
    assert dict(mine.streams._table._working) == {}
    if how != "delete":
        assert same(mine.streams.state("a"), mine.pipeline.init())


def test_absorbed_moments_move_the_statistics_and_nothing_else(engine: Make, rows: Rows) -> None:
    mine = engine()
    for stream in ("a", "b"):  # one that has learned, one that has not
        if stream == "a":
            teach(mine, rows(9), stream)
        lesson = ask(mine, rows(9, 4), stream)
        before = mine.streams.state(stream)
        assert lesson.moments is not None
        mine.absorb([Observed(stream, lesson.incarnation, 9, lesson.moments)])
        after = mine.streams.state(stream)
        assert mine.streams.record(stream).version == lesson.version + 1
        assert not torch.equal(after.norm.inner.mean, before.norm.inner.mean)
        assert torch.equal(after.norm.inner.params, before.norm.inner.params)
        assert same(optim.moments(after)[0], optim.moments(before)[0])  # which go on as they were
        assert teach(mine, rows(9), stream) == "applied"


# -- bookkeeping ------------------------------------------------------------------------------------------------------

doings = st.lists(
    st.tuples(
        st.sampled_from(
            ["predict", "learn", "learn", "keep", "flush", "reset", "delete", "rollback", "freeze", "resume"]
        ),
        st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(doings, st.integers(1, 4))
def test_rows_are_those_of_the_resident_streams_whatever_happened(
    engine: Make, rows: Rows, sequence: list[tuple[str, list[str]]], resident: int
) -> None:
    store = MemoryStore()
    mine = engine(resident, store)
    expected: dict[str, int] = {}  # versions
    frozen: set[str] = set()
    for doing, names in sequence:
        if doing in ("predict", "learn"):
            lessons = [lesson for _, lesson in mine.predict([Query(rows(2), name) for name in names])]
            for name in names:
                expected.setdefault(name, 0)
            if doing == "learn":
                results = {learned.stream: learned.result for learned in mine.learn(lessons)}
                assert results == {name: "frozen" if name in frozen else "applied" for name in names}
                expected |= {name: expected[name] + 1 for name in names if name not in frozen}
        elif doing == "flush":
            saved = {name: mine.streams.record(name).unsynced for name in mine.streams.ahead()}
            new = set(mine.streams._new)
            mine.streams.flush()
            assert mine.streams.ahead() == []
            # a head of counters or kept versions alone is a version too
            expected |= {n: expected[n] + 1 for n, ahead in saved.items() if not ahead and n not in new and expected[n]}
        elif names[0] in expected:
            (name, *_), streams = names, mine.streams
            if doing == "keep":
                state = at_rest(mine, name)
                streams.keep_good(name, streams.record(name), state)
            elif doing == "rollback":
                streams.rollback(name, streams.versions(name)[-1])
                expected[name] += 1
            else:
                getattr(streams, doing)(name)
                if doing in ("reset", "delete"):
                    expected[name] = 0
                    frozen.discard(name)
                elif (doing == "freeze") != (name in frozen):
                    expected[name] += 1
                    frozen ^= {name}
                if doing == "delete":
                    del expected[name]
        assert {name: mine.streams.record(name).version for name in expected} == expected
        at_hand = {name: mine.streams.find(name) for name in mine.streams.names()}
        assert set(at_hand) <= set(expected)
        in_table = [record.row for record in at_hand.values() if record and record.row]
        assert len(set(in_table)) == len(in_table) == mine.streams._rows.used == len(mine.streams._recency)
        assert len(in_table) <= max(resident, 4)  # those of the last step made no room
        assert mine.streams._rows._holders == {}
        assert mine.streams.bytes() >= len(in_table) * mine.streams._table.row_bytes
        behind = {name for name in expected if (head := store.load(name)) is None or head.version < expected[name]}
        assert behind <= set(mine.streams.ahead())
    states = {name: at_rest(mine, name) for name in expected}
    mine.streams.flush()
    again = engine(resident, store)
    for name, state in states.items():
        assert same(at_rest(again, name), state)
    for name in list(expected):
        mine.streams.delete(name)
    assert (mine.streams._rows.used, store.count()) == (0, 0)


def test_rows_suffice_for_the_largest_step_beside_the_largest_forward(
    engine: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody new at once, again and again, while all rows of a full forward are held."""
    monkeypatch.setattr(working_set, "TEACHING_MAX", 6)
    network = engine().pipeline
    mine = Engine(network, torch.device("cpu"), 100, resident=2, batch_streams_max=5)
    names = [f"s{number}" for number in range(30)]
    for round_ in range(3):
        for begin in range(0, 30, 6):
            lot = names[begin : begin + 6]
            lessons = [
                lesson for part in (lot[:3], lot[3:]) for _, lesson in mine.predict([Query(rows(2), n) for n in part])
            ]
            others = [names[(begin + 6 + i) % 30] for i in range(5)]
            for name in others:
                mine.streams.begin(name)
            with mine.streams.answering(others):
                assert Counter(learned.result for learned in mine.learn(lessons)) == {"applied": 6}
        assert {mine.streams.record(name).version for name in names} == {round_ + 1}


# -- adapting while others make one leave -----------------------------------------------------------------------------


def test_who_is_taught_stays_whoever_else_is_asked_for(engine: Make, rows: Rows, store: Store) -> None:
    mine, alone = engine(store=store), engine(resident=50)
    for each in (mine, alone):
        teach(each, rows(8), "a")
    for stream in "bc":  # they have states of their own, so that asking for them needs room
        teach(mine, rows(8), stream)
    adapt, seen = mine.pipeline.adapt, []

    def interrupted(*args: Any) -> Any:
        if not seen:
            for stream in "bcbc":
                answer(mine, rows(1), stream)
            seen.extend(mine.streams.names())
        return adapt(*args)

    lessons = [ask(mine, rows(8, 1), "a"), ask(alone, rows(8, 1), "a")]
    for each in (mine, alone):  # `a` was away before, so that its moments began anew; so shall these
        each.streams._table.forget_moments(("a", each.streams.record("a").incarnation))
    mine.pipeline.adapt = interrupted  # type: ignore[method-assign]
    assert [mine.learn(lessons[:1])[0].result, alone.learn(lessons[1:])[0].result] == ["applied"] * 2
    assert seen == ["a", "c"]
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.unsynced) == (2, 2, 1)
    assert same(mine.streams.state("a"), alone.streams.state("a"))
    for stream in "bc":
        answer(mine, rows(1), stream)
    assert mine.streams.find("a") is None
    assert (head.version if (head := store.load("a")) else None) == 2  # the new state is what the store was given
    assert same(at_rest(mine, "a"), at_rest(alone, "a"))


def test_learning_beside_a_coming_and_going_loses_no_step(engine: Make, rows: Rows, store: Store) -> None:
    mine, steps = engine(store=store), 40
    names = [f"s{number}" for number in range(6)]
    done, failures = threading.Event(), []

    def predict() -> None:
        try:
            for name in endless(names):
                if done.is_set():
                    return
                ((found, lesson),) = mine.predict([Query(rows(1), name)])
                assert lesson.incarnation == 1  # never the frozen model's answer
                assert found.logits is not None
                assert np.isfinite(found.logits).all()
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            failures.append(error)

    lessons = {name: ask(mine, rows(4, number), name) for number, name in enumerate(names)}
    asking = threading.Thread(target=predict)
    asking.start()
    results = Counter[str]()
    for _ in range(steps):
        results.update(learned.result for learned in mine.learn(list(lessons.values())))
    done.set()
    asking.join()
    assert failures == []
    assert results == {"applied": steps * len(names)}
    for name in names:
        record = mine.streams.record(name)
        assert (record.version, record.steps, record.seen) == (steps, steps, 4 * steps)
        assert int(mine.streams.state(name).norm.inner.seen) == 4 * steps
    assert mine.streams._rows._holders == {}
    assert mine.streams._rows.used == len(mine.streams._recency)


def endless(names: list[str]) -> Iterator[str]:
    while True:
        yield from names
        time.sleep(0)  # the other thread's turn


class Interrupted(MemoryStore):
    """Between what is read and what comes of it something else happens, once."""

    meanwhile: Callable[[], object] | None = None

    def load(self, stream: str) -> Head | None:
        head = super().load(stream)
        call, self.meanwhile = self.meanwhile, None
        if call:
            call()
        return head


@pytest.mark.parametrize("how", ["reset", "delete", "rollback", "freeze", "deleted elsewhere", "came and went"])
def test_what_was_loaded_before_a_command_is_not_put_in_its_place(engine: Make, rows: Rows, how: str) -> None:
    store = Interrupted()
    mine = engine(store=store)
    for stream in "abc":
        teach(mine, rows(8), stream)
    assert mine.streams.find("a") is None

    def deleted_elsewhere() -> None:
        number = store.changes(-1).number
        assert store.save([Save("a", (1, 1), Head(2, 0, {}, None, gone=True))]) != [None]
        mine.streams.take_in(store.changes(number))

    def came_and_went() -> None:
        assert [teach(mine, rows(8), stream) for stream in "abc"] == ["applied"] * 3

    store.meanwhile = {
        "reset": lambda: mine.streams.reset("a"),
        "delete": lambda: mine.streams.delete("a"),
        "rollback": lambda: mine.streams.rollback("a", 0),
        "freeze": lambda: mine.streams.freeze("a"),
        "deleted elsewhere": deleted_elsewhere,
        "came and went": came_and_went,
    }[how]
    lesson = ask(mine, rows(2), "a")
    record = mine.streams.record("a")
    assert (lesson.incarnation, lesson.version) == (record.incarnation, record.version)
    new_life = how not in ("freeze", "came and went")
    assert record.incarnation == (2 if new_life else 1)
    assert record.version == (0 if new_life and how != "rollback" else 2)
    assert record.frozen == (how == "freeze")


def test_news_of_a_life_that_is_over_do_not_end_the_next_one(engine: Make, rows: Rows, store: Store) -> None:
    mine = engine(store=store)
    before = store.changes(-1).number
    teach(mine, rows(8), "a")
    mine.streams.flush()
    changes = store.changes(before)
    assert [(each.stream, each.incarnation, each.version) for each in changes.heads] == [("a", 1, 1)]
    mine.streams.reset("a")
    teach(mine, rows(8), "a")
    record = mine.streams.record("a")
    mine.streams.take_in(changes)
    assert mine.streams.record("a") == record
    assert (record.incarnation, record.version, record.unsynced) == (2, 1, 1)


def test_only_the_life_that_was_meant_is_taught(engine: Make, rows: Rows) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    old = mine.streams.record("a").incarnation
    new = mine.streams.reset("a")[0].incarnation
    with mine.streams.teaching([("a", old)]) as held:
        assert held.streams == []
    with mine.streams.teaching([("a", new)]) as held:
        assert held.streams == ["a"]
    mine.streams.freeze("a")
    with mine.streams.teaching([("a", new)]) as held:
        assert held.streams == []


def test_a_write_that_fails_leaks_no_row(engine: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = engine()
    teach(mine, rows(8), "a")

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mine.streams._table, "write", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        teach(mine, rows(8), "b")
    assert mine.streams._rows.used == 1


def test_a_state_of_nothing() -> None:
    """The frozen model as an adapter: streams exist, and have nothing to keep."""
    streams = States(PipelineState((), (), ()), streams_max=3)
    streams.begin("a")
    with streams.teaching([("a", streams.record("a").incarnation)]) as held:
        records = [held.records[0]._replace(version=1)]
        assert streams.publish(held, records, streams.read_to_teach(held)) == [True]
    assert streams.record("a").version == 1
    assert streams.rollback("a", 0)[0].version == 2
    streams.delete("a")
    assert streams._rows.used == 0
