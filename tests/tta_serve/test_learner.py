"""`Pools` is given the time; `Learner` stands on a fake engine that the test lets work, step by step."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import Moments
from tta_serve import learner as module
from tta_serve.judging import Learned
from tta_serve.learner import STEP_ROWS_MAX, Learner, Pools
from tta_serve.lessons import Lesson

WAIT_S = 20.0  # for what happens at once, unless it never does


def lesson(stream: str, rows: int = 1, number: int = 0) -> Lesson:
    """Rows of a stream; `number` tells lessons apart."""
    return Lesson(torch.zeros(rows, 1), stream, incarnation=1, version=number)


def names(lessons: Sequence[Lesson]) -> list[tuple[str, int]]:
    return [(each.stream, len(each.x)) for each in lessons]


def test_a_stream_is_ready_when_it_has_enough_rows() -> None:
    pools = Pools(step_rows=4, step_wait_s=10.0, queue_rows=100)
    pools.add(lesson("a", 3), now_s=0.0)
    pools.add(lesson("b", 1), now_s=0.0)
    assert pools.take(now_s=1.0) == []
    pools.add(lesson("a", 1), now_s=1.0)
    assert names(pools.take(now_s=1.0)) == [("a", 3), ("a", 1)]
    assert (pools.rows, pools.rows_of("a"), pools.rows_of("b")) == (1, 0, 1)


def test_a_stream_is_ready_when_its_oldest_rows_have_waited() -> None:
    pools = Pools(step_rows=4, step_wait_s=10.0, queue_rows=100)
    pools.add(lesson("a"), now_s=0.0)
    pools.add(lesson("a"), now_s=9.0)
    pools.add(lesson("b"), now_s=5.0)
    assert pools.take(now_s=9.9) == []
    assert names(pools.take(now_s=10.0)) == [("a", 1), ("a", 1)]
    assert names(pools.take(now_s=15.0)) == [("b", 1)]
    assert pools.take(now_s=1000.0) == []


def test_who_has_waited_longest_comes_first() -> None:
    pools = Pools(step_rows=1, step_wait_s=10.0, queue_rows=100)
    for now_s, stream in enumerate("cab"):
        pools.add(lesson(stream), now_s)
    assert names(pools.take(now_s=5.0)) == [("c", 1), ("a", 1), ("b", 1)]


def test_one_step_has_so_many_rows_and_the_rest_waits() -> None:
    half = STEP_ROWS_MAX // 2
    pools = Pools(step_rows=1, step_wait_s=10.0, queue_rows=10_000)
    for now_s, (stream, rows) in enumerate((("a", half), ("b", half - 1), ("b", 2), ("c", 1))):
        pools.add(lesson(stream, rows), now_s)
    assert names(pools.take(now_s=5.0)) == [("a", half), ("b", half - 1), ("c", 1)]
    assert names(pools.take(now_s=5.0)) == [("b", 2)]


def test_a_lesson_larger_than_a_step_is_taken_alone() -> None:
    pools = Pools(step_rows=1, step_wait_s=10.0, queue_rows=10_000)
    pools.add(lesson("a", STEP_ROWS_MAX + 1), 0.0)
    pools.add(lesson("a", 1), 1.0)
    assert names(pools.take(5.0)) == [("a", STEP_ROWS_MAX + 1)]
    assert names(pools.take(5.0)) == [("a", 1)]


def test_the_oldest_rows_of_the_fullest_stream_give_way() -> None:
    pools = Pools(step_rows=100, step_wait_s=10.0, queue_rows=8)
    for number in range(3):
        assert pools.add(lesson("busy", 2, number), now_s=number) == []
    assert pools.add(lesson("quiet", 2), now_s=3.0) == []
    assert [each.version for each in pools.add(lesson("busy", 2, 3), now_s=4.0)] == [0]
    assert (pools.rows, pools.rows_of("busy"), pools.rows_of("quiet")) == (8, 6, 2)
    assert [each.version for each in pools.take(now_s=100.0) if each.stream == "busy"] == [1, 2, 3]


def test_a_quiet_stream_is_not_crowded_out() -> None:
    pools = Pools(step_rows=1000, step_wait_s=1000.0, queue_rows=16)
    pools.add(lesson("quiet", 3), now_s=0.0)
    for now_s in range(100):
        pools.add(lesson("busy", 2), now_s)
    assert pools.rows_of("quiet") == 3


def test_a_lesson_larger_than_the_queue_is_kept_alone() -> None:
    pools = Pools(step_rows=1, step_wait_s=10.0, queue_rows=4)
    pools.add(lesson("a", 2), 0.0)
    pools.add(lesson("b", 1), 0.0)
    assert names(pools.add(lesson("c", 9), 0.0)) == [("a", 2), ("b", 1)]
    assert (pools.rows, pools.rows_of("a"), pools.rows_of("c")) == (9, 0, 9)
    assert names(pools.add(lesson("d", 1), 0.0)) == [("c", 9)]
    assert pools.rows == 1


def test_forget_drops_one_stream() -> None:
    pools = Pools(step_rows=1, step_wait_s=10.0, queue_rows=100)
    for stream in "aba":
        pools.add(lesson(stream, 2), 0.0)
    assert pools.forget("a") == 4
    assert pools.forget("a") == 0
    assert (pools.rows, pools.rows_of("a")) == (2, 0)
    assert names(pools.take(0.0)) == [("b", 2)]


actions = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 12)),
    st.tuples(st.just("take"), st.just(""), st.integers(0, 3)),
    st.tuples(st.just("forget"), st.sampled_from("abc"), st.just(0)),
)


@settings(deadline=None)
@given(st.lists(actions, max_size=40), st.integers(1, 8), st.integers(1, 20))
def test_nothing_is_lost_or_doubled_or_over_the_limit(
    steps: list[tuple[str, str, int]], step_rows: int, queue_rows: int
) -> None:
    pools = Pools(step_rows, step_wait_s=2.0, queue_rows=queue_rows)
    added: dict[int, Lesson] = {}
    given_way = 0
    taken: list[Lesson] = []
    for now_s, (action, stream, amount) in enumerate(steps):
        if action == "add":
            added[now_s] = lesson(stream, amount, number=now_s)
            given_way += sum(each.rows for each in pools.add(added[now_s], now_s))
            assert pools.rows <= max(queue_rows, amount)
        elif action == "take":
            batch = pools.take(now_s + amount)
            assert len(batch) <= 1 or sum(len(each.x) for each in batch) <= STEP_ROWS_MAX
            taken += batch
        else:
            given_way += pools.forget(stream)
        assert pools.rows == sum(map(pools.rows_of, "abc"))
    while batch := pools.take(now_s=1e9):
        taken += batch
    assert pools.rows == 0
    numbers = [each.version for each in taken]
    assert len(set(numbers)) == len(numbers)
    for stream in "abc":
        mine = [each.version for each in taken if each.stream == stream]
        assert mine == sorted(mine)
    assert sum(len(each.x) for each in added.values()) == sum(len(each.x) for each in taken) + given_way


def test_a_request_of_more_rows_than_a_step_is_cut_with_its_answers() -> None:
    mine = Bench(queue_rows=1000)
    whole = lesson("a", STEP_ROWS_MAX + 3)
    logits = torch.arange(2.0 * whole.rows).view(-1, 2)
    mine.learner.offer(whole._replace(x=torch.arange(float(whole.rows)).view(-1, 1), logits=logits))
    first, second = (pooled.lesson for pooled in mine.learner._pools._pools["a"])
    assert (first.rows, second.rows) == (STEP_ROWS_MAX, 3)
    for part in (first, second):
        assert part.logits is not None
        torch.testing.assert_close(part.logits[:, 0] / 2, part.x[:, 0])


def test_what_waits_is_counted_with_its_answers_and_moments() -> None:
    pools = Pools(step_rows=100, step_wait_s=10.0, queue_rows=100)
    moments = Moments(torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 5))
    pools.add(lesson("a", 2)._replace(logits=torch.zeros(2, 3), moments=moments), 0.0)
    assert pools.bytes == 4 * (2 + 6 + 15)
    pools.forget("a")
    assert pools.bytes == 0


class FakeEngine:
    """Learns a batch when the test lets it; an exception put in is raised."""

    def __init__(self) -> None:
        self.began: queue.Queue[list[Lesson]] = queue.Queue()
        self.may_end: queue.Queue[Exception | None] = queue.Queue()
        self.thread_name = ""
        self.device = torch.device("cpu")

    def prepare_thread(self, *, learns: bool) -> None:
        assert learns
        self.thread_name = threading.current_thread().name

    def learn(self, lessons: Sequence[Lesson]) -> list[Learned]:
        self.began.put(list(lessons))
        if error := self.may_end.get(timeout=WAIT_S):
            raise error
        return [Learned(each.stream, len(each.x), 0, 0.0, "applied") for each in lessons]


class Bench:
    """A learner with a fake engine, and what it reported."""

    def __init__(self, budget: float = 1.0, step_wait_s: float = 1000.0, queue_rows: int = 100) -> None:
        self.engine = FakeEngine()
        self.learned: queue.Queue[tuple[list[Learned], float]] = queue.Queue()
        self.skipped: queue.Queue[tuple[int, str]] = queue.Queue()
        self.learner = Learner(
            self.engine,  # type: ignore[arg-type]
            Pools(step_rows=2, step_wait_s=step_wait_s, queue_rows=queue_rows),
            budget,
            lambda learned, took_s: self.learned.put((list(learned), took_s)),
            lambda rows, reason: self.skipped.put((rows, reason)),
        )


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """`bench(budget=1.0, …)`: a started learner, stopped at the end."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        made[-1].learner.start()
        return made[-1]

    yield make
    for each in made:
        each.engine.may_end.put(None)
        each.learner.stop()


def test_learns_what_is_ready_and_reports_it(bench: Callable[..., Bench]) -> None:
    mine = bench()
    mine.learner.offer(lesson("a"))
    mine.learner.offer(lesson("a"))
    assert names(mine.engine.began.get(timeout=WAIT_S)) == [("a", 1), ("a", 1)]
    mine.engine.may_end.put(None)
    learned, took_s = mine.learned.get(timeout=WAIT_S)
    assert [(each.stream, each.result) for each in learned] == [("a", "applied")] * 2
    assert took_s >= 0
    assert mine.engine.thread_name == "tta-learner"
    assert mine.skipped.empty()


def test_rows_become_ready_by_waiting(bench: Callable[..., Bench]) -> None:
    mine = bench(step_wait_s=0.01)
    mine.learner.offer(lesson("a"))
    assert names(mine.engine.began.get(timeout=WAIT_S)) == [("a", 1)]


def test_pending_rows_count_the_step_that_runs(bench: Callable[..., Bench]) -> None:
    mine = bench()
    mine.learner.offer(lesson("a", 3))
    mine.engine.began.get(timeout=WAIT_S)
    mine.learner.offer(lesson("a", 1))
    mine.learner.offer(lesson("b", 1))
    pending = mine.learner.pending_rows
    assert (pending(), pending("a"), pending("b"), pending("c")) == (5, 4, 1, 0)
    mine.engine.may_end.put(None)
    mine.learned.get(timeout=WAIT_S)
    assert (pending(), pending("a"), pending("b")) == (2, 1, 1)


def test_rows_that_give_way_are_counted(bench: Callable[..., Bench]) -> None:
    mine = bench(queue_rows=4)
    mine.learner.offer(lesson("a", 2))
    mine.engine.began.get(timeout=WAIT_S)  # from here on nothing is taken
    for _ in range(3):
        mine.learner.offer(lesson("a", 2))
    assert mine.skipped.get_nowait() == (2, "queue_full")
    assert mine.skipped.empty()


def test_forgotten_rows_are_counted_and_not_learned(bench: Callable[..., Bench]) -> None:
    mine = bench()
    mine.learner.offer(lesson("a", 2))
    mine.engine.began.get(timeout=WAIT_S)
    mine.learner.offer(lesson("a", 3))
    mine.learner.offer(lesson("b", 2))
    mine.learner.forget("a")
    mine.learner.forget("a")
    assert mine.skipped.get_nowait() == (3, "forgotten")
    assert mine.skipped.empty()
    mine.engine.may_end.put(None)
    assert names(mine.engine.began.get(timeout=WAIT_S)) == [("b", 2)]


def test_a_step_that_fails_is_counted_and_the_thread_lives_on(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    mine = bench()
    with caplog.at_level(logging.ERROR):
        mine.learner.offer(lesson("a", 3))
        mine.engine.began.get(timeout=WAIT_S)
        mine.engine.may_end.put(ZeroDivisionError("no"))
        assert mine.skipped.get(timeout=WAIT_S) == (3, "failed")
    assert "a learning step over 1 requests failed" in caplog.text
    mine.learner.offer(lesson("b", 2))
    assert names(mine.engine.began.get(timeout=WAIT_S)) == [("b", 2)]
    assert mine.learner.pending_rows("a") == 0
    assert mine.learned.empty()


def test_stop_ends_after_the_step_at_hand_and_drops_the_rest() -> None:
    mine = Bench()
    mine.learner.start()
    mine.learner.offer(lesson("a", 2))
    mine.engine.began.get(timeout=WAIT_S)
    mine.learner.offer(lesson("b", 2))
    stopping = threading.Thread(target=mine.learner.stop)
    stopping.start()
    mine.engine.may_end.put(None)
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    assert len(mine.learned.get_nowait()[0]) == 1
    assert mine.engine.began.empty()
    mine.learner.stop()  # a second time changes nothing


def test_stop_wakes_a_learner_that_waits_or_rests() -> None:
    idle = Bench()
    idle.learner.start()
    idle.learner.stop()
    never = Bench()
    never.learner.stop()
    never.learner.offer(lesson("a", 5))  # nobody takes them, nothing breaks
    assert never.learner.pending_rows() == 5


def test_only_an_arrival_that_changes_something_wakes_the_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, woken = Bench(), []
    monkeypatch.setattr(mine.learner._changed, "notify", lambda: woken.append(mine.learner.pending_rows()))
    for stream in "aba":
        mine.learner.offer(lesson(stream))
    assert woken == [1, 3]  # the first begins the wait for more, and two of a stream are enough
    mine.learner._resting = True
    mine.learner.offer(lesson("b", 5))
    assert woken == [1, 3]


class Clock:
    """Time that passes only when the learner waits for it, or the engine works."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.rests_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    thread_time = monotonic


@pytest.mark.parametrize(("budget", "rests_s"), [(0.25, [6.0]), (0.5, [2.0]), (1.0, [])])
def test_after_a_step_it_rests_for_what_the_budget_leaves(
    monkeypatch: pytest.MonkeyPatch, budget: float, rests_s: list[float]
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)

    mine = Bench(budget=budget, queue_rows=1000)

    def learn(lessons: Sequence[Lesson]) -> list[Learned]:
        clock.now_s += 2.0  # a step takes two seconds
        if len(lessons[0].x) == 3:
            mine.learner._stopping = True
        return []

    def wait(timeout: float | None = None) -> bool:
        if timeout is not None:
            clock.rests_s.append(timeout)
            clock.now_s += timeout
        return True

    mine.engine.learn = learn  # type: ignore[method-assign]
    monkeypatch.setattr(mine.learner._changed, "wait", wait)
    mine.learner.offer(lesson("first", STEP_ROWS_MAX))
    mine.learner.offer(lesson("last", 3))  # the first fills a step; this is the next
    mine.learner.start()
    mine.learner._thread.join(WAIT_S)
    assert not mine.learner._thread.is_alive()
    assert clock.rests_s == rests_s
    assert clock.now_s == 100.0 + 2.0 + sum(rests_s) + 2.0
