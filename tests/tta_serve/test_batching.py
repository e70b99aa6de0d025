"""Events say when a batch runs, never time: `Device` runs a batch when the test lets it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_serve.batching import Batcher, Waiting
from tta_serve.errors import Overloaded, Unavailable


def test_waiting_keeps_the_order_and_never_splits() -> None:
    waiting: Waiting[str] = Waiting(rows_max=4, queue_rows=100)
    for name, rows in (("a", 2), ("b", 2), ("c", 3), ("d", 2), ("e", 1)):
        assert waiting.offer(name, rows)
    assert waiting.rows == 10
    assert [waiting.take() for _ in range(4)] == [["a", "b"], ["c"], ["d", "e"], []]
    assert waiting.rows == 0


def test_waiting_lets_an_oversize_request_go_alone() -> None:
    waiting: Waiting[str] = Waiting(rows_max=4, queue_rows=100)
    for name, rows in (("a", 1), ("big", 9), ("b", 1)):
        waiting.offer(name, rows)
    assert [waiting.take() for _ in range(3)] == [["a"], ["big"], ["b"]]


def test_waiting_is_bounded_in_rows() -> None:
    waiting: Waiting[str] = Waiting(rows_max=4, queue_rows=8)
    assert [waiting.offer(name, 4) for name in "abc"] == [True, True, False]
    assert waiting.rows == 8
    waiting.take()
    assert waiting.offer("c", 4)


def test_an_empty_queue_has_room_for_any_request() -> None:
    waiting: Waiting[str] = Waiting(rows_max=4, queue_rows=8)
    assert waiting.offer("huge", 50)
    assert not waiting.offer("a", 1)
    assert waiting.take() == ["huge"]
    assert waiting.offer("a", 1)


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 6), st.integers(1, 12))
def test_waiting_loses_and_reorders_nothing(sizes: list[int], rows_max: int, queue_rows: int) -> None:
    waiting: Waiting[int] = Waiting(rows_max, queue_rows)
    taken_in = [number for number, rows in enumerate(sizes) if waiting.offer(number, rows)]
    assert waiting.rows == sum(sizes[number] for number in taken_in)
    assert waiting.rows <= max(queue_rows, sizes[0] if sizes else 0)
    out = []
    while batch := waiting.take():
        assert len(batch) == 1 or sum(sizes[number] for number in batch) <= rows_max
        out += batch
    assert out == taken_in
    assert waiting.rows == 0


class Device:
    """Runs batches one by one, each when `let` is called; answers "a" with "A"."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.began: asyncio.Queue[list[str]] = asyncio.Queue()
        self._may_end: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def run(self, batch: Sequence[str]) -> list[str]:
        self.batches.append(list(batch))
        self.began.put_nowait(list(batch))
        if error := await self._may_end.get():
            raise error
        return [name.upper() for name in batch]

    def let(self, times: int = 1, error: Exception | None = None) -> None:
        for _ in range(times):
            self._may_end.put_nowait(error)


Test = Callable[[Device, Batcher[str, str]], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play() -> Play:
    """`play(test, rows_max=4, queue_rows=8)`: runs `test(device, batcher)` with the batcher started, then stops it."""

    def run(test: Test, rows_max: int = 4, queue_rows: int = 8) -> None:
        async def main() -> None:
            device = Device()
            batcher: Batcher[str, str] = Batcher(device.run, rows_max, queue_rows)
            batcher.start()
            async with asyncio.timeout(20):
                await test(device, batcher)
                device.let(10)
                await batcher.stop()

        asyncio.run(main())

    return run


async def ask(batcher: Batcher[str, str], name: str, rows: int = 1) -> "asyncio.Task[str]":
    """A caller that has queued its request and waits."""
    task = asyncio.ensure_future(batcher.submit(name, rows))
    await asyncio.sleep(0)  # the task runs up to its first wait
    return task


def test_a_free_device_takes_a_request_at_once(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        device.let()
        assert await batcher.submit("a", 1) == "A"
        assert device.batches == [["a"]]

    play(test)


def test_what_arrives_while_a_batch_runs_leaves_as_one(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        tasks = [await ask(batcher, "a")]
        await device.began.get()
        tasks += [await ask(batcher, name) for name in "bcd"]
        assert batcher.waiting_rows == 3
        device.let(2)
        assert await asyncio.gather(*tasks) == ["A", "B", "C", "D"]
        assert device.batches == [["a"], ["b", "c", "d"]]
        assert batcher.waiting_rows == 0

    play(test)


def test_a_batch_is_full_and_the_rest_is_the_next(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        tasks = [await ask(batcher, "a")]
        await device.began.get()
        tasks += [await ask(batcher, name, rows) for name, rows in (("b", 2), ("c", 2), ("d", 1), ("e", 3))]
        device.let(3)
        assert await asyncio.gather(*tasks) == ["A", "B", "C", "D", "E"]
        assert device.batches == [["a"], ["b", "c"], ["d", "e"]]

    play(test)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        tasks = [await ask(batcher, "a")]
        await device.began.get()
        tasks += [await ask(batcher, name, 4) for name in "bc"]
        with pytest.raises(Overloaded) as caught:
            await batcher.submit("d", 3)
        assert str(caught.value) == (
            "8 rows are waiting, and these 3 would pass the limit of 8 (batching.queue_rows); try again later"
        )
        assert caught.value.retry_after_s >= 0.1
        device.let(3)
        assert await asyncio.gather(*tasks) == ["A", "B", "C"]
        assert "d" not in [name for batch in device.batches for name in batch]

    play(test)


def test_the_time_to_come_back_grows_with_the_batches_duration(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        batcher._batch_s = 3.0
        tasks = [await ask(batcher, "a")]
        await device.began.get()
        tasks += [await ask(batcher, name, 4) for name in "bc"]
        with pytest.raises(Overloaded) as caught:
            await batcher.submit("d", 1)
        assert caught.value.retry_after_s == pytest.approx(6.0)  # two batches of 4 rows wait
        device.let(3)
        await asyncio.gather(*tasks)

    play(test)


def test_a_caller_who_leaves_while_waiting_is_not_run_and_mates_are(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        tasks = [await ask(batcher, name) for name in "a"]
        await device.began.get()
        tasks += [await ask(batcher, name) for name in "bcd"]
        tasks[2].cancel()
        device.let(2)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers[:2] + answers[3:] == ["A", "B", "D"]
        assert isinstance(answers[2], asyncio.CancelledError)
        assert device.batches == [["a"], ["b", "d"]]

    play(test)


def test_a_caller_who_leaves_during_the_batch_does_not_disturb_mates(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        tasks = [await ask(batcher, "a")]
        await device.began.get()
        tasks += [await ask(batcher, name) for name in "bc"]
        device.let()
        assert await tasks[0] == "A"
        assert await device.began.get() == ["b", "c"]
        tasks[1].cancel()
        device.let()
        assert await tasks[2] == "C"
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]

    play(test)


def test_a_batch_of_which_all_have_left_is_not_run(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        first = await ask(batcher, "a")
        await device.began.get()
        gone = [await ask(batcher, name) for name in "bc"]
        for task in gone:
            task.cancel()
        device.let()
        assert await first == "A"
        await asyncio.gather(*gone, return_exceptions=True)
        device.let()
        assert await batcher.submit("d", 1) == "D"
        assert device.batches == [["a"], ["d"]]

    play(test)


def test_an_error_reaches_the_callers_of_its_batch_only_and_the_loop_lives_on(play: Play) -> None:
    async def test(device: Device, batcher: Batcher[str, str]) -> None:
        tasks = [await ask(batcher, "a")]
        await device.began.get()
        tasks += [await ask(batcher, name, 2) for name in "bcd"]
        device.let()
        device.let(error=ZeroDivisionError("no"))
        device.let()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answers[0], answers[3]] == ["A", "D"]
        assert all(isinstance(answer, ZeroDivisionError) for answer in answers[1:3])

    play(test)


def test_too_few_answers_are_an_error_of_that_batch() -> None:
    async def main() -> None:
        async def run(batch: Sequence[str]) -> list[str]:
            return [] if batch == ["a"] else ["B"]

        batcher: Batcher[str, str] = Batcher(run, 1, 8)
        batcher.start()
        with pytest.raises(RuntimeError, match="0 answers to 1 requests"):
            await batcher.submit("a", 1)
        assert await batcher.submit("b", 1) == "B"
        await batcher.stop()

    asyncio.run(main())


def test_afterwards_comes_after_the_answers_and_before_the_next_batch() -> None:
    async def main() -> None:
        order: list[str] = []
        may_end = asyncio.Event()
        began = asyncio.Event()

        async def run(batch: Sequence[str]) -> list[str]:
            order.append(f"run {batch[0]}")
            return [name.upper() for name in batch]

        async def afterwards(batch: Sequence[str], answers: Sequence[str]) -> None:
            assert list(answers) == [name.upper() for name in batch]
            began.set()
            await may_end.wait()
            order.append(f"after {batch[0]}")

        async def caller(name: str) -> None:
            await batcher.submit(name, 1)
            order.append(f"answer {name}")

        batcher: Batcher[str, str] = Batcher(run, 1, 8, afterwards)
        batcher.start()
        async with asyncio.timeout(20):
            callers = [asyncio.ensure_future(caller(name)) for name in "ab"]
            await began.wait()
            await callers[0]
            assert order == ["run a", "answer a"]
            may_end.set()
            await asyncio.gather(*callers)
            assert order[:4] == ["run a", "answer a", "after a", "run b"]
            await batcher.stop()

    asyncio.run(main())


def test_a_failure_of_afterwards_is_logged_and_the_loop_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def run(batch: Sequence[str]) -> list[str]:
            return [name.upper() for name in batch]

        async def afterwards(batch: Sequence[str], _: Sequence[str]) -> None:
            raise ZeroDivisionError(batch[0])

        batcher: Batcher[str, str] = Batcher(run, 4, 8, afterwards)
        batcher.start()
        assert [await batcher.submit(name, 1) for name in "ab"] == ["A", "B"]
        await batcher.stop()

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert len(caplog.records) == 2


def test_stop_finishes_the_batch_at_hand_and_turns_the_waiting_away() -> None:
    async def main() -> None:
        device = Device()
        batcher: Batcher[str, str] = Batcher(device.run, 1, 8)
        batcher.start()
        async with asyncio.timeout(20):
            tasks = [await ask(batcher, name) for name in "abc"]
            await device.began.get()
            stopping = asyncio.ensure_future(batcher.stop())
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="not running"):
                await batcher.submit("late", 1)
            device.let(3)
            await stopping
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers[0] == "A"
        assert [str(answer) for answer in answers[1:]] == ["the server is stopping"] * 2
        assert all(isinstance(answer, Unavailable) for answer in answers[1:])
        assert device.batches == [["a"]]
        assert batcher.waiting_rows == 0
        await batcher.stop()  # a second time changes nothing

    asyncio.run(main())


def test_a_loop_that_is_cancelled_tells_the_callers_of_its_batch() -> None:
    async def main() -> None:
        device = Device()
        batcher: Batcher[str, str] = Batcher(device.run, 4, 8)
        batcher.start()
        async with asyncio.timeout(20):
            task = await ask(batcher, "a")
            await device.began.get()
            assert batcher._task
            batcher._task.cancel()
            with pytest.raises(Unavailable, match="stopping"):
                await task
            with pytest.raises(Unavailable, match="not running"):
                await batcher.submit("b", 1)

    asyncio.run(main())


def test_a_batcher_that_was_not_started_takes_nothing() -> None:
    async def main() -> None:
        batcher: Batcher[str, str] = Batcher(Device().run, 4, 8)
        with pytest.raises(Unavailable, match="the server is not running"):
            await batcher.submit("a", 1)
        await batcher.stop()

    asyncio.run(main())
