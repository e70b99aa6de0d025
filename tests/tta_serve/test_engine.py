import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters import Pipeline, Source, tree
from tta_serve.engine import Engine, Query, to_unit
from tta_serve.errors import NotFound, Overloaded
from tta_serve.lessons import Lesson
from tta_serve.streams import StreamRecord

CPU = torch.device("cpu")
Rows = Callable[..., Tensor]
Make = Callable[..., Engine]


@pytest.fixture
def engine(pipeline: Callable[..., Pipeline]) -> Make:
    """`engine(streams_max=10, **eata)`: an engine around the small network."""

    def make(streams_max: int = 10, **config: Any) -> Engine:
        return Engine(pipeline(**config), CPU, streams_max)

    return make


def logits(engine: Engine, x: Tensor, stream: str) -> np.ndarray:
    ((answer, _),) = engine.predict([Query(x, stream)])
    assert answer.logits is not None
    return answer.logits


def teach(engine: Engine, x: Tensor, stream: str) -> str:
    ((_, lesson),) = engine.predict([Query(x, stream)])
    (learned,) = engine.learn([lesson])
    return learned.result


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_a_stream_that_learned_nothing_answers_as_the_network(
    engine: Make, tiny: Callable[..., nn.Module], rows: Rows
) -> None:
    mine, x = engine(), rows(3)
    with torch.no_grad():
        expected = tiny()(x).numpy()
    np.testing.assert_allclose(logits(mine, x, "a"), expected, atol=1e-5)


def test_frozen_answers_equal_the_plain_network_whatever_was_learned(
    engine: Make, tiny: Callable[..., nn.Module], rows: Rows
) -> None:
    mine, x = engine(), rows(9)
    teach(mine, rows(16, start=5.0), "a")
    with torch.no_grad():
        expected = tiny()(x).numpy()
    ((frozen, _), (both, _)) = mine.predict([Query(x, "a", "frozen"), Query(x, "a", "both")])
    assert frozen.logits is None
    assert frozen.frozen_logits is not None
    assert both.logits is not None
    np.testing.assert_allclose(frozen.frozen_logits, expected, atol=1e-6)
    np.testing.assert_allclose(both.frozen_logits, frozen.frozen_logits, atol=1e-6)
    assert np.abs(both.logits - expected).max() > 1e-3
    assert (frozen.version, both.version) == (1, 1)


def test_mixed_streams_are_answered_as_if_each_were_alone(engine: Make, rows: Rows) -> None:
    mine = engine()
    for number, stream in enumerate("abc"):
        teach(mine, rows(16, start=number), stream)
    queries = [
        Query(rows(1, 1.0), "a"),
        Query(rows(9, 2.0), "b"),  # of 8 rows and more: its own rows count
        Query(rows(3, 3.0), "a", "both"),
        Query(rows(2, 4.0), "new"),
        Query(rows(12, 5.0), "c", "frozen"),
        Query(rows(8, 6.0), "b"),
    ]
    together = [answer for answer, _ in mine.predict(queries)]
    for query, answer in zip(queries, together, strict=True):
        ((alone, _),) = mine.predict([query])
        assert answer.version == alone.version
        for mixed, single in ((answer.logits, alone.logits), (answer.frozen_logits, alone.frozen_logits)):
            assert (mixed is None) == (single is None)
            if mixed is not None:
                assert len(mixed) == len(query.x)
                np.testing.assert_allclose(mixed, single, rtol=1e-5, atol=1e-5)  # float32, logits above 1


def test_bytes_and_floats_are_the_same_picture(engine: Make) -> None:
    mine = engine()
    bytes_ = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
    np.testing.assert_array_equal(logits(mine, bytes_, "a"), logits(mine, bytes_ / 255, "a"))
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    x = torch.rand(2)
    assert to_unit(x) is x


def test_learning_publishes_one_version_and_counts(engine: Make, rows: Rows) -> None:
    mine = engine()
    ((_, first),) = mine.predict([Query(rows(3), "a")])
    before = mine.streams.record("a")
    assert (before.version, before.seen, before.entropy) == (0, 0, None)
    assert (first.stream, first.incarnation, first.version) == ("a", before.incarnation, 0)
    (learned,) = mine.learn([first])
    assert (learned.stream, learned.seen, learned.selected, learned.result) == ("a", 3, 3, "applied")
    after = mine.streams.record("a")
    assert after == before._replace(
        row=after.row, version=1, unsynced=1, steps=1, seen=3, reliable=3, selected=3, entropy=learned.entropy
    )
    assert (before.row, after.row) == (0, 1)
    assert 0 < learned.entropy < np.log(3)
    assert not same(mine.streams.state("a"), mine.pipeline.init())
    assert not np.array_equal(logits(mine, rows(3), "a"), logits(mine, rows(3), "other"))


def test_lessons_of_one_stream_are_one_step(engine: Make, rows: Rows) -> None:
    one, other = engine(), engine()
    lessons = [lesson for _, lesson in one.predict([Query(rows(2), "a"), Query(rows(3, 2.0), "a")])]
    (learned,) = one.learn(lessons)
    assert (learned.seen, one.streams.record("a").version) == (5, 1)
    teach(other, torch.cat([rows(2), rows(3, 2.0)]), "a")
    assert same(one.streams.state("a"), other.streams.state("a"))


def test_streams_learn_as_if_each_were_alone(engine: Make, rows: Rows) -> None:
    together, alone = engine(), engine()
    queries = [Query(rows(4, number), stream) for number, stream in enumerate("abab")]
    together.learn([lesson for _, lesson in together.predict(queries)])
    for stream in "ab":
        mine = [query for query in queries if query.stream == stream]
        alone.learn([lesson for _, lesson in alone.predict(mine)])
        pairs = zip(tree.leaves(together.streams.state(stream)), tree.leaves(alone.streams.state(stream)), strict=True)
        for (name, a), (_, b) in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_rows_that_no_filter_lets_through_are_seen_and_no_more(engine: Make, rows: Rows) -> None:
    mine = engine(entropy_margin=1e-6)
    assert teach(mine, rows(4), "a") == "filtered"
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.seen, record.reliable, record.selected) == (1, 0, 4, 0, 0)
    assert record.entropy is not None


def test_nothing_to_learn(engine: Make) -> None:
    assert engine().learn([]) == []


def test_reset_gives_the_first_state_bit_for_bit(engine: Make, rows: Rows) -> None:
    mine = engine()
    fresh = logits(mine, rows(3), "a")
    for start in range(3):
        teach(mine, rows(8, start), "a")
    old = mine.streams.record("a")
    new, _ = mine.streams.reset("a")
    assert new == mine.streams.record("a")
    assert same(mine.streams.state("a"), mine.pipeline.init())
    assert new.incarnation > old.incarnation
    assert new == StreamRecord(new.incarnation, events=new.events)
    assert [event.what for event in new.events] == ["begun", "reset"]
    np.testing.assert_array_equal(logits(mine, rows(3), "a"), fresh)


@pytest.mark.parametrize("how", ["reset", "delete", "delete and begin again"])
def test_lessons_of_an_earlier_life_teach_nothing(engine: Make, rows: Rows, how: str) -> None:
    mine = engine()
    old, mate = (lesson for _, lesson in mine.predict([Query(rows(4), "a"), Query(rows(4), "b")]))
    if how == "reset":
        mine.streams.reset("a")
    else:
        mine.streams.delete("a")
    if how == "delete and begin again":
        mine.streams.begin("a")
    learned = {each.stream: each for each in mine.learn([old, mate])}
    assert (learned["a"].result, learned["a"].seen, learned["a"].selected) == ("stale", 4, 0)
    assert learned["b"].result == "applied"
    if how == "delete":
        assert mine.streams.names() == ["b"]
    else:
        assert mine.streams.record("a").version == 0
        assert same(mine.streams.state("a"), mine.pipeline.init())


def test_only_stale_lessons(engine: Make, rows: Rows) -> None:
    mine = engine()
    (learned,) = mine.learn([Lesson(rows(2), "never seen", incarnation=1, version=0)])
    assert (learned.result, learned.seen) == ("stale", 2)
    assert mine.streams.names() == []


@pytest.mark.parametrize("how", ["reset", "delete"])
def test_a_step_under_way_is_dropped_with_its_stream(engine: Make, rows: Rows, how: str) -> None:
    mine = engine()
    adapt = mine.pipeline.adapt

    def interrupted(*args: Any) -> Any:
        getattr(mine.streams, how)("a")
        return adapt(*args)

    lessons = [lesson for _, lesson in mine.predict([Query(rows(4), "a"), Query(rows(4), "b")])]
    mine.pipeline.adapt = interrupted  # type: ignore[method-assign]
    results = {each.stream: each.result for each in mine.learn(lessons)}
    assert results == {"a": "stale", "b": "applied"}
    if how == "reset":
        assert same(mine.streams.state("a"), mine.pipeline.init())
    assert mine.streams.names() == (["b"] if how == "delete" else ["a", "b"])


def test_a_forward_keeps_the_state_that_it_began_with(engine: Make, rows: Rows) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    expected = logits(mine, rows(3), "a")
    predict = mine.pipeline.predict

    def interrupted(*args: Any) -> Any:
        mine.streams.reset("a")
        return predict(*args)

    mine.pipeline.predict = interrupted  # type: ignore[method-assign]
    ((answer, lesson),) = mine.predict([Query(rows(3), "a")])
    assert answer.version == 1
    np.testing.assert_array_equal(answer.logits, expected)
    assert mine.learn([lesson])[0].result == "stale"


def test_so_many_streams_and_no_more(engine: Make, rows: Rows) -> None:
    mine = engine(streams_max=2)
    for stream in "ab":
        mine.streams.begin(stream)
    with pytest.raises(Overloaded) as caught:
        mine.streams.begin("c")
    assert str(caught.value) == "there are 2 streams, the limit (streams.max); delete one before beginning 'c'"
    assert caught.value.retry_after_s > 0
    assert len(logits(mine, rows(1), "a")) == 1  # those that exist are served
    mine.streams.delete("b")
    assert mine.streams.begin("c") == mine.streams.record("c")
    assert mine.streams.names() == ["a", "c"]


def test_streams_that_do_not_exist(engine: Make) -> None:
    mine = engine()
    for call in (mine.streams.record, mine.streams.reset, mine.streams.delete):
        with pytest.raises(NotFound, match="there is no stream named 'x'; a stream begins with its first prediction"):
            call("x")


def test_every_life_of_a_stream_has_its_own_number(engine: Make) -> None:
    mine = engine()

    def begin() -> int:
        begun = mine.streams.begin("a")
        assert begun == mine.streams.record("a")
        return begun.incarnation

    seen = [begin(), mine.streams.reset("a")[0].incarnation, mine.streams.rollback("a", 0)[0].incarnation]
    mine.streams.delete("a")
    seen.append(begin())
    mine.streams.delete("a")
    seen.append(begin())
    assert seen == [1, 2, 3, 4, 5]


def test_an_update_that_is_not_finite_is_refused_and_the_stream_pulled_back(engine: Make, rows: Rows) -> None:
    mine = engine()
    teach(mine, rows(8), "a")
    before, state, source = mine.streams.record("a"), mine.streams.state("a"), mine.pipeline.init().norm.inner.params
    poisoned = rows(8)
    poisoned[3, 0, 0, 0] = torch.nan
    good = mine.predict([Query(rows(8), "b")])[0][1]
    bad = Lesson(poisoned, "a", before.incarnation, before.version)
    learned = {each.stream: each for each in mine.learn([bad, good])}
    assert (learned["a"].result, learned["a"].trips) == ("refused", ("non_finite",))
    assert learned["b"].result == "applied"
    after = mine.streams.record("a")
    assert (after.version, after.steps, after.refused, after.trips, after.entropy) == (2, before.steps, 1, 1, None)
    assert after.seen == before.seen + 8
    now, then = mine.streams.state("a").norm.inner, state.norm.inner
    torch.testing.assert_close(now.params, (then.params + source) / 2)
    assert torch.equal(now.mean, then.mean)
    assert teach(mine, rows(8), "a") == "applied"  # and goes on


def test_with_the_requests_own_statistics_a_row_that_is_not_finite_spoils_its_mates(engine: Make, rows: Rows) -> None:
    mine = engine(statistics="batch")
    assert teach(mine, torch.full((4, 3, 4, 4), torch.nan), "a") == "refused"
    record = mine.streams.record("a")
    assert (record.entropy, record.seen, record.selected) == (None, 4, 0)
    assert np.isfinite(logits(mine, rows(4), "a")).all()


def test_bytes_are_those_of_streams_that_have_learned(engine: Make, rows: Rows) -> None:
    mine = engine()
    for stream in "abc":
        mine.streams.begin(stream)
    assert mine.streams.bytes() == mine.streams.bytes_of("a") == 0  # they share init()
    teach(mine, rows(4), "a")
    one = tree.nbytes(mine.pipeline.init()) + 8  # beside the moments lies their number of steps
    assert mine.streams.bytes() == mine.streams.bytes_of("a") == one
    mine.streams.delete("a")
    assert mine.streams.bytes() == 0


def test_threads_are_set_for_the_processor(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    mine = engine()
    mine.threads = 3
    mine.prepare_thread()
    assert asked == [3]


def test_on_a_gpu_the_learner_has_a_stream_of_lower_priority(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[torch.device, int]] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: (device, priority))
    monkeypatch.setattr(torch.cuda, "set_stream", chosen.append)
    mine = engine()
    mine.device = torch.device("cuda")
    mine.prepare_thread()
    mine.prepare_thread(learns=True)
    assert chosen == [(mine.device, -1), (mine.device, 0)]  # lower numbers go first


def test_the_frozen_model_as_an_adapter(pipeline: Callable[..., Pipeline], rows: Rows) -> None:
    network = pipeline().network
    mine = Engine(Pipeline(network, norm=Source(network)), CPU, streams_max=10)
    ((first, lesson), (second, _)) = mine.predict([Query(rows(9), "a", "both"), Query(rows(2), "b")])
    assert first.logits is not None
    assert second.logits is not None
    np.testing.assert_allclose(first.logits, first.frozen_logits, atol=1e-6)
    assert mine.streams.bytes() == 0
    mine.learn([lesson])
    assert mine.streams.record("a").steps == mine.streams.record("a").seen == 0


def test_predicting_and_learning_at_once_leave_consistent_records(engine: Make, rows: Rows) -> None:
    """One thread learns, another predicts, a third resets: versions count steps, and no answer mixes two states."""
    mine = engine()
    steps, x = 40, rows(3)
    lessons = [rows(8, start) for start in range(steps)]
    mine.streams.begin("a")
    mine.streams.begin("b")
    answers: list[tuple[int, np.ndarray]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def predict() -> None:
        while not done.is_set():
            ((a, _), (b, _)) = mine.predict([Query(x, "a"), Query(x, "b")])
            assert a.logits is not None
            assert b.logits is not None
            assert np.isfinite(b.logits).all()
            answers.append((a.version, a.logits))

    def learn() -> None:
        for lesson in lessons:
            a, b = mine.streams.record("a"), mine.streams.record("b")
            mine.learn([Lesson(lesson, "a", a.incarnation, a.version), Lesson(lesson, "b", b.incarnation, b.version)])

    def reset() -> None:
        while not done.wait(0.001):  # a loop without a rest would hold the interpreter's lock
            mine.streams.reset("b")

    def guarded(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001  # shown by the assertion below
                failures.append(error)

        return run

    others = [threading.Thread(target=guarded(call)) for call in (predict, reset)]
    for thread in others:
        thread.start()
    guarded(learn)()
    done.set()
    for thread in others:
        thread.join()
    assert failures == []
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.seen) == (steps, steps, 8 * steps)
    versions = [version for version, _ in answers]
    assert versions == sorted(versions)
    # each answer is that of its version: learn the same again, step by step, and compare
    again, by_version = engine(), dict(answers)
    for version in range(steps + 1):
        if version in by_version:
            np.testing.assert_allclose(by_version[version], logits(again, x, "a"), atol=1e-4)
        if version < steps:
            teach(again, lessons[version], "a")
