"""Streams that begin, learn, make room, come back, go back and end: with both stores, around a real engine."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
from tta_serve.engine import Engine, Query
from tta_serve.errors import NotFound, Overloaded, Unavailable
from tta_serve.lessons import Lesson, Observed
from tta_serve.snapshots import Folder, Memory, Snapshots
from tta_serve.states import KEPT_VERSIONS, States
from tta_serve.streams import StreamRecord

Rows = Callable[..., Tensor]
Make = Callable[..., Engine]


@pytest.fixture(params=["memory", "folder"])
def snapshots(request: pytest.FixtureRequest, tmp_path: Path) -> Snapshots:
    return Memory() if request.param == "memory" else Folder(tmp_path)


@pytest.fixture
def engine(pipeline: Callable[..., Pipeline]) -> Make:
    """`engine(resident=2, snapshots=None, streams_max=50, new_per_minute=None, **eata)`: around the small network."""

    def make(
        resident: int = 2,
        snapshots: Snapshots | None = None,
        streams_max: int = 50,
        new_per_minute: int | None = None,
        **config: Any,
    ) -> Engine:
        return Engine(
            pipeline(**config),
            torch.device("cpu"),
            streams_max,
            resident=resident,
            snapshots=snapshots,
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
    assert streams.open("a") is begun


def test_so_many_begin_in_a_minute(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s)
    streams = engine(new_per_minute=2).streams
    streams.open("a")
    streams.open("b")
    with pytest.raises(Overloaded) as caught:
        streams.open("c")
    assert str(caught.value) == (
        "2 streams have begun within a minute, the limit (streams.new_per_minute); begin 'c' later"
    )
    assert caught.value.retry_after_s == pytest.approx(30.0)
    assert streams.open("a").version == 0  # those that exist are no new ones
    now_s += 31
    assert streams.open("c").version == 0
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


# -- making room and coming back --------------------------------------------------------------------------------------


def test_who_was_used_longest_ago_makes_room_and_comes_back_bit_for_bit(
    engine: Make, rows: Rows, snapshots: Snapshots
) -> None:
    mine, never_out = engine(snapshots=snapshots), engine(resident=50)
    for number, stream in enumerate("abcdab"):
        for each in (mine, never_out):
            assert teach(each, rows(8, number), stream) == "applied"
    attached = {stream: mine.streams.record(stream).row is not None for stream in "abcd"}
    assert attached == {"a": True, "b": True, "c": False, "d": False}
    assert snapshots.versions("c") == [1]
    for stream in "cd":  # only moments began anew, and these two took one step each
        assert same(at_rest(mine, stream), at_rest(never_out, stream))
    np.testing.assert_array_equal(answer(mine, rows(3), "c"), answer(never_out, rows(3), "c"))
    assert mine.streams.record("c").version == never_out.streams.record("c").version == 1


def test_optimizer_moments_begin_anew_after_an_absence(engine: Make, rows: Rows) -> None:
    mine = engine()
    for start in range(3):
        teach(mine, rows(8, start), "a")
    assert steps_of(mine.streams.state("a")) == 3
    for stream in "bc":
        teach(mine, rows(8), stream)
    assert mine.streams.record("a").row is None
    assert mine.streams.bytes_of("a") == 0
    assert steps_of(mine.streams.state("a")) == 0
    assert mine.streams.record("a").steps == 3


def test_asking_is_using(engine: Make, rows: Rows) -> None:
    mine = engine()
    for stream in "ab":
        teach(mine, rows(4), stream)
    answer(mine, rows(1), "a")
    teach(mine, rows(4), "c")
    assert [mine.streams.record(stream).row is None for stream in "abc"] == [False, True, False]


def test_a_stream_that_did_not_change_is_not_written_again(engine: Make, rows: Rows) -> None:
    saved: list[tuple[str, int]] = []

    class Counting(Memory):
        def save(self, stream: str, version: int, tensors: dict[str, Tensor]) -> None:
            saved.append((stream, version))
            super().save(stream, version, tensors)

    mine = engine(snapshots=Counting())
    for stream in "abcabcabc":
        teach(mine, rows(4), stream) if not mine.streams.find(stream) else answer(mine, rows(1), stream)
    assert sorted(saved) == [("a", 1), ("b", 1), ("c", 1)]


def test_only_the_last_written_version_stays(engine: Make, rows: Rows, snapshots: Snapshots) -> None:
    mine = engine(snapshots=snapshots)
    for number, stream in enumerate("abcabcabc"):
        teach(mine, rows(4, number), stream)
    assert [snapshots.versions(stream) for stream in "abc"] == [[3], [2], [2]]  # 3 of b and c is in the table


def test_streams_that_have_learned_nothing_need_no_row(engine: Make, rows: Rows) -> None:
    mine = engine()
    for number in range(40):
        answer(mine, rows(1), f"s{number}")
    assert mine.streams._rows.used == 0
    assert len(mine.streams._recency) == 0


def test_one_batch_may_have_more_streams_than_are_resident(engine: Make, rows: Rows, snapshots: Snapshots) -> None:
    mine, never_out = engine(snapshots=snapshots), engine(resident=50)
    names = [f"s{number}" for number in range(12)]
    for round_ in range(3):
        for each in (mine, never_out):
            queries = [Query(rows(2, number + round_), name) for number, name in enumerate(names)]
            lessons = [lesson for _, lesson in each.predict(queries)]
            assert {learned.result for learned in each.learn(lessons)} == {"applied"}
            for name in names:  # moments are what an absence costs; here they shall be alike
                record = each.streams.record(name)
                each.streams._table.forget_moments((name, record.incarnation))
    for name in names:
        assert mine.streams.record(name).version == 3
        for (field, a), (_, b) in zip(
            tree.leaves(at_rest(mine, name)), tree.leaves(at_rest(never_out, name)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=field)


# -- a disk that fails ------------------------------------------------------------------------------------------------


class Failing(Memory):
    """A store whose disk is full, or broken, when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise OSError(28, "No space left on device")

    def save(self, stream: str, version: int, tensors: dict[str, Tensor]) -> None:
        self._do("save")
        super().save(stream, version, tensors)

    def load(self, stream: str, version: int) -> dict[str, Tensor]:
        self._do("load")
        return super().load(stream, version)

    def drop(self, stream: str, version: int) -> None:
        self._do("drop")
        super().drop(stream, version)

    def delete(self, stream: str) -> None:
        self._do("delete")
        super().delete(stream)


@pytest.fixture
def full(engine: Make, rows: Rows) -> tuple[Engine, Failing]:
    """c is written out, a and b are resident, and from now on nothing can be written."""
    store = Failing()
    mine = engine(snapshots=store)
    for stream in "cab":
        teach(mine, rows(8), stream)
    store.fails = {"save"}
    return mine, store


def test_on_a_full_disk_those_with_a_row_are_answered_and_learn(full: tuple[Engine, Failing], rows: Rows) -> None:
    mine, _ = full
    for stream in "ab":
        assert teach(mine, rows(8), stream) == "applied"
        assert mine.streams.record(stream).version == 2
    assert mine.streams._rows.used == 2


def test_on_a_full_disk_nobody_is_written_out(
    full: tuple[Engine, Failing], engine: Make, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    mine, store = full
    with pytest.raises(Unavailable) as caught:
        mine.streams.state("c")
    assert str(caught.value) == ("the state of stream 'a' cannot be written out: [Errno 28] No space left on device")
    with caplog.at_level(logging.ERROR):
        (a, _), (c, lesson) = mine.predict([Query(rows(3), "a"), Query(rows(3), "c")])
    assert "stream 'c' is answered by the frozen model" in caplog.text
    assert a.version == 1
    np.testing.assert_allclose(c.logits, answer(engine(), rows(3), "new"), rtol=1e-5, atol=1e-5)
    assert (c.version, mine.learn([lesson])[0].result) == (0, "stale")
    store.fails = set()
    assert ask(mine, rows(3), "c").version == 1  # what it had is not lost


def test_on_a_full_disk_a_new_stream_does_not_cost_its_mates_their_step(
    full: tuple[Engine, Failing], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    mine, _ = full
    lessons = [lesson for _, lesson in mine.predict([Query(rows(8), "new"), Query(rows(8), "a")])]
    with caplog.at_level(logging.ERROR):
        results = {each.stream: each.result for each in mine.learn(lessons)}
    assert results == {"new": "stale", "a": "applied"}
    assert "a step of stream 'new' is lost" in caplog.text
    assert (mine.streams.record("new").version, mine.streams.record("a").version) == (0, 2)
    assert mine.streams._rows.used == 2  # no row is lost by it


def test_a_stream_whose_file_is_gone_does_not_cost_its_mates_their_answer_or_step(
    engine: Make, rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = engine(snapshots=Folder(tmp_path))
    lessons = {stream: ask(mine, rows(8), stream) for stream in "cab"}
    for lesson in lessons.values():
        mine.learn([lesson])
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    expected = answer(mine, rows(3), "a")
    with caplog.at_level(logging.ERROR):
        (a, _), (c, _) = mine.predict([Query(rows(3), "a"), Query(rows(3), "c")])
    np.testing.assert_allclose(a.logits, expected, rtol=1e-5, atol=1e-5)
    assert c.version == 0
    learned = {each.stream: each.result for each in mine.learn([lessons["c"], lessons["b"]])}
    assert learned["b"] == "applied"
    assert "stream 'c' learns nothing" in caplog.text
    assert mine.streams._rows._holders == {}
    with pytest.raises(
        Unavailable, match=r"the state of stream 'c' at version 1 cannot be read back \(.*\); reset the"
    ):
        mine.streams.state("c")
    mine.streams.reset("c")
    assert teach(mine, rows(8), "c") == "applied"


def spoil_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def spoil_empty(file: Path) -> None:
    file.write_bytes(b"")


def spoil_noise(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 8)


def spoil_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def spoil_foreign(file: Path) -> None:
    Folder(file.parent).save("x", 1, {"norm.other": torch.zeros(3)})
    (foreign,) = (path for path in file.parent.rglob("1.safetensors") if path != file)
    foreign.replace(file)


@pytest.mark.parametrize("spoil", [spoil_short, spoil_empty, spoil_noise, spoil_folder, spoil_foreign])
def test_a_file_that_is_not_what_was_written_is_refused(
    engine: Make, rows: Rows, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    mine = engine(snapshots=Folder(tmp_path))
    for stream in "abc":
        teach(mine, rows(8), stream)
    (file,) = tmp_path.rglob("*.safetensors")
    spoil(file)
    before = mine.streams.record("a")
    with pytest.raises(Unavailable, match="the state of stream 'a' at version 1 cannot be read back"):
        mine.streams.state("a")
    assert mine.streams.record("a") == before
    assert mine.streams._rows.used == 2


@pytest.mark.parametrize("how", ["reset", "delete"])
def test_what_cannot_be_deleted_stays_as_it_was(full: tuple[Engine, Failing], rows: Rows, how: str) -> None:
    mine, store = full
    store.fails = {"delete"}
    before = mine.streams.record("a")
    with pytest.raises(Unavailable) as caught:
        getattr(mine.streams, how)("a")
    assert str(caught.value) == (
        "the snapshots of stream 'a' cannot be deleted: [Errno 28] No space left on device; try again"
    )
    assert mine.streams.record("a") == before
    assert teach(mine, rows(8), "a") == "applied"
    store.fails = set()
    getattr(mine.streams, how)("a")
    assert mine.streams._rows.used == 1


def test_an_old_file_that_cannot_be_dropped_costs_room_and_nothing_else(
    full: tuple[Engine, Failing], rows: Rows
) -> None:
    mine, store = full
    store.fails = {"drop"}
    for number, stream in enumerate("cabcab"):
        assert teach(mine, rows(8, number), stream) == "applied"
    assert [mine.streams.record(stream).version for stream in "abc"] == [3, 3, 3]
    assert len(store.versions("c")) >= 2


# -- going back -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(engine: Make, rows: Rows, snapshots: Snapshots) -> tuple[Engine, PipelineState]:
    """A stream at version 3 whose version 2 is kept; and that state."""
    mine = engine(snapshots=snapshots)
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
    new = mine.streams.rollback("a", 2)
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
    new = mine.streams.rollback("a", 0, "because")
    assert same(mine.streams.state("a"), mine.pipeline.init())
    assert (new.version, new.row, what(new)[-1]) == (4, 0, "rolled back to 0: because")
    assert mine.streams._rows.used == 0
    assert mine.streams.versions("a") == [0, 2]  # and forth again
    assert mine.streams.rollback("a", 2).version == 5


def test_a_version_that_is_not_kept(kept: tuple[Engine, PipelineState]) -> None:
    mine, _ = kept
    before = mine.streams.record("a")
    for version in (3, 1, -1):
        with pytest.raises(NotFound) as caught:
            mine.streams.rollback("a", version)
        assert str(caught.value) == f"the version {version} of stream 'a' is not kept; there are 0, 2"
    assert mine.streams.record("a") == before


def test_roll_back_of_a_stream_that_is_written_out(
    kept: tuple[Engine, PipelineState], rows: Rows, snapshots: Snapshots
) -> None:
    mine, good = kept
    for stream in "bc":
        teach(mine, rows(8), stream)
    assert mine.streams.record("a").row is None
    assert snapshots.versions("a") == [2, 3]
    mine.streams.rollback("a", 2)
    assert same(at_rest(mine, "a"), good)
    assert snapshots.versions("a") == [2]  # of 3 nothing is left
    assert mine.streams._rows.used == 2


def test_a_roll_back_that_fails_changes_nothing(engine: Make, rows: Rows) -> None:
    store = Failing()
    mine = engine(snapshots=store)
    teach(mine, rows(8), "a")
    mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    for stream in "bc":
        teach(mine, rows(8), stream)
    before = mine.streams.record("a")
    for fails in ("load", "save"):  # it cannot be read; nobody can make room
        store.fails = {fails}
        if fails == "save":  # c has a newer version than the one that was written
            teach(mine, rows(8), "b")
        with pytest.raises(Unavailable):
            mine.streams.rollback("a", 1)
        assert mine.streams.record("a") == before
        assert mine.streams._rows.used == 2
    store.fails = set()
    assert mine.streams.rollback("a", 1).version == 2


def test_the_guards_go_back_further_where_the_last_good_version_cannot_be_read(
    engine: Make, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    store = Failing()
    mine = engine(snapshots=store)
    teach(mine, rows(8), "a")
    mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    store.fails = {"load"}
    with caplog.at_level(logging.ERROR):
        mine.streams.act("a", mine.streams.record("a"), "freeze")
    record = mine.streams.record("a")
    assert (record.frozen, what(record)[-2:]) == (True, ["rolled back to 0: guards", "frozen: guards"])
    assert same(mine.streams.state("a"), mine.pipeline.init())
    assert "is rolled back further" in caplog.text


def test_so_many_versions_are_kept(engine: Make, rows: Rows, snapshots: Snapshots) -> None:
    mine = engine(snapshots=snapshots)
    for start in range(KEPT_VERSIONS + 2):
        teach(mine, rows(4, start), "a")
        mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    last = list(range(3, KEPT_VERSIONS + 3))
    assert mine.streams.versions("a") == [0, *last]
    assert snapshots.versions("a") == last


def test_nothing_is_kept_of_a_life_that_is_over(engine: Make, rows: Rows, tmp_path: Path) -> None:
    mine = engine(snapshots=Folder(tmp_path))
    teach(mine, rows(4), "a")
    record, state = mine.streams.record("a"), at_rest(mine, "a")
    mine.streams.delete("a")
    mine.streams.keep_good("a", record, state)
    assert list(tmp_path.iterdir()) == []
    mine.streams.open("a")
    mine.streams.keep_good("a", record, state)
    assert mine.streams.versions("a") == [0]


def test_what_cannot_be_kept_is_logged(engine: Make, rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    store = Failing()
    mine = engine(snapshots=store)
    teach(mine, rows(4), "a")
    store.fails = {"save"}
    with caplog.at_level(logging.ERROR):
        mine.streams.keep_good("a", mine.streams.record("a"), at_rest(mine, "a"))
    assert "version 1 of stream 'a' could not be kept" in caplog.text
    assert mine.streams.versions("a") == [0]


# -- freezing, ending -------------------------------------------------------------------------------------------------


def test_a_frozen_stream_answers_and_learns_nothing_until_it_is_resumed(engine: Make, rows: Rows) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    state, lesson = mine.streams.state("a"), ask(mine, rows(8), "a")
    frozen = mine.streams.freeze("a")
    assert mine.streams.freeze("a") is frozen
    assert teach(mine, rows(8), "a") == "frozen"
    assert lesson.moments is not None
    mine.absorb([Observed("a", lesson.incarnation, 8, lesson.moments)])
    assert same(mine.streams.state("a"), state)
    assert mine.streams.record("a") == frozen
    resumed = mine.streams.resume("a")
    assert mine.streams.resume("a") is resumed
    assert what(resumed) == ["begun", "frozen: by hand", "resumed"]
    assert teach(mine, rows(8), "a") == "applied"


def test_resuming_puts_the_guards_at_the_foot_of_their_ladder(engine: Make) -> None:
    mine = engine()
    record = mine.streams.open("a")
    mine.streams.note("a", record.incarnation, lambda each: each._replace(ladder=each.ladder.trip()[0]))
    mine.streams.freeze("a")
    assert mine.streams.resume("a").ladder.rung == 0


def test_freezing_and_resuming_during_a_step_stand(engine: Make, rows: Rows) -> None:
    mine = engine()
    adapt = mine.pipeline.adapt

    def interrupted(*args: Any) -> Any:
        mine.streams.freeze("a")
        return adapt(*args)

    mine.pipeline.adapt = interrupted  # type: ignore[method-assign]
    assert teach(mine, rows(8), "a") == "applied"
    record = mine.streams.record("a")
    assert (record.frozen, record.version, what(record)) == (True, 1, ["begun", "frozen: by hand"])


def test_delete_leaves_nothing(engine: Make, rows: Rows, tmp_path: Path) -> None:
    ended: list[tuple[str, int]] = []
    mine = engine(snapshots=Folder(tmp_path))
    mine.streams._on_end = lambda *life: ended.append(life)
    for stream in "abc":
        teach(mine, rows(8), stream)
        mine.streams.keep_good(stream, mine.streams.record(stream), at_rest(mine, stream))
    lives = {stream: mine.streams.record(stream).incarnation for stream in "abc"}
    for stream in "abc":
        mine.streams.delete(stream)
    assert list(tmp_path.rglob("*")) == []
    assert (mine.streams.names(), mine.streams.bytes(), mine.streams._rows.used) == ([], 0, 0)
    assert (len(mine.streams._recency), dict(mine.streams._table._working)) == (0, {})
    assert ended == list(lives.items())


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
        before = tree.row(mine.streams.read([record.row or 0]), 0)
        end[how]("a")
        teach(mine, rows(8, 5), "b")
        teach(mine, rows(8, 6), "c")
        assert same(tree.row(mine.streams.read([record.row or 0]), 0), before)
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
        st.sampled_from(["predict", "learn", "learn", "keep", "reset", "delete", "rollback", "freeze", "resume"]),
        st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(doings, st.integers(1, 4))
def test_rows_are_those_of_the_resident_streams_whatever_happened(
    engine: Make, rows: Rows, sequence: list[tuple[str, list[str]]], resident: int
) -> None:
    mine = engine(resident)
    expected: dict[str, int] = {}  # versions
    for doing, names in sequence:
        if doing in ("predict", "learn"):
            lessons = [lesson for _, lesson in mine.predict([Query(rows(2), name) for name in names])]
            for name in names:
                expected.setdefault(name, 0)
            if doing == "learn":
                for learned in mine.learn(lessons):
                    expected[learned.stream] += learned.result == "applied"
        elif names[0] in expected:
            (name, *_), streams = names, mine.streams
            if doing == "keep":
                streams.keep_good(name, streams.record(name), at_rest(mine, name))
            elif doing == "rollback":
                streams.rollback(name, streams.versions(name)[-1])
                expected[name] += 1
            else:
                getattr(streams, doing)(name)
                expected = {each: 0 if (each, doing) == (name, "reset") else v for each, v in expected.items()}
                if doing == "delete":
                    del expected[name]
        records = {name: mine.streams.record(name) for name in mine.streams.names()}
        assert {name: record.version for name, record in records.items()} == expected
        in_table = [record.row for record in records.values() if record.row]
        assert len(set(in_table)) == len(in_table) == mine.streams._rows.used == len(mine.streams._recency)
        assert mine.streams._rows._holders == {}
        assert mine.streams.bytes() >= len(in_table) * mine.streams._table.row_bytes
    for name in list(expected):
        mine.streams.delete(name)
    assert mine.streams._rows.used == 0


def test_rows_suffice_for_the_largest_step_beside_the_largest_forward(
    engine: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody new at once, again and again, while all rows of a full forward are held."""
    monkeypatch.setattr(module, "TEACHING_MAX", 6)
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
            with mine.streams.answering(others):
                assert Counter(learned.result for learned in mine.learn(lessons)) == {"applied": 6}
        assert {mine.streams.record(name).version for name in names} == {round_ + 1}


# -- adapting while others make one leave -----------------------------------------------------------------------------


def test_a_step_is_published_though_its_stream_was_written_out_meanwhile(
    engine: Make, rows: Rows, snapshots: Snapshots
) -> None:
    mine, alone = engine(snapshots=snapshots), engine(resident=50)
    for each in (mine, alone):
        teach(each, rows(8), "a")
    for stream in "bc":  # they have states of their own, so that asking for them needs room
        teach(mine, rows(8), stream)
    adapt, seen = mine.pipeline.adapt, []

    def interrupted(*args: Any) -> Any:
        if not seen:
            for stream in "bc":
                answer(mine, rows(1), stream)
            seen.append(mine.streams.record("a").row)
        return adapt(*args)

    lessons = [ask(mine, rows(8, 1), "a"), ask(alone, rows(8, 1), "a")]
    for each in (mine, alone):  # `a` was away before, so that its moments began anew; so shall these
        each.streams._table.forget_moments(("a", each.streams.record("a").incarnation))
    mine.pipeline.adapt = interrupted  # type: ignore[method-assign]
    assert [mine.learn(lessons[:1])[0].result, alone.learn(lessons[1:])[0].result] == ["applied"] * 2
    assert seen == [None]  # it was out while the step ran
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.written) == (2, 2, 1)
    assert same(mine.streams.state("a"), alone.streams.state("a"))
    for stream in "bc":
        answer(mine, rows(1), stream)
    assert mine.streams.record("a").written == 2  # and the new state is what is written next
    assert same(at_rest(mine, "a"), at_rest(alone, "a"))


def test_learning_beside_a_coming_and_going_loses_no_step(engine: Make, rows: Rows, tmp_path: Path) -> None:
    mine, steps = engine(snapshots=Folder(tmp_path)), 40
    names = [f"s{number}" for number in range(6)]
    done, failures = threading.Event(), []

    def predict() -> None:
        try:
            for name in endless(names):
                if done.is_set():
                    return
                ((found, _),) = mine.predict([Query(rows(1), name)])
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


def test_only_the_life_that_was_meant_is_taught(engine: Make, rows: Rows) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    old = mine.streams.record("a").incarnation
    new = mine.streams.reset("a").incarnation
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
    streams.open("a")
    with streams.teaching([("a", streams.record("a").incarnation)]) as held:
        records = [held.records[0]._replace(version=1)]
        assert streams.publish(held, records, streams.read_to_teach(held)) == [True]
    assert streams.record("a").version == 1
    assert streams.rollback("a", 0).version == 2
    streams.delete("a")
    assert streams._rows.used == 0
