"""The service around a real engine with the small network; events say when the device may go on."""

import asyncio
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor, nn

from adapters import Pipeline
from tta_serve.engine import Engine, Query
from tta_serve.errors import InvalidInput, NotFound, Overloaded, TooLarge, Unavailable
from tta_serve.judging import Learned
from tta_serve.learner import Pools
from tta_serve.lessons import Lesson
from tta_serve.metrics import Metrics
from tta_serve.model_service import Limits
from tta_serve.models import InputSpec
from tta_serve.remembered import Remembered
from tta_serve.service import Service, probabilities
from tta_serve.views import check_stream
from tta_serve.watch import Reading

SPEC = InputSpec(4, 4, None)
WAIT_S = 20.0  # for what happens at once, unless it never does
Rows = Callable[..., Tensor]
Make = Callable[..., Service]


@pytest.fixture
def service(pipeline: Callable[..., Pipeline]) -> Make:
    """`service(mode="async", module=None, …)`: not started; a stream is ready to be learned from at 2 rows."""

    def make(
        mode: str = "async",
        module: nn.Module | None = None,
        streams_max: int = 10,
        step_rows: int = 2,
        images_per_request: int = 8,
        queue_rows: int = 100,
        resident: int = 10,
    ) -> Service:
        statistics = "batch" if mode == "sync" else "evidence"
        return Service(
            Engine(pipeline(module, statistics=statistics), torch.device("cpu"), streams_max, resident=resident),
            SPEC,
            ("a", "b", "c"),
            Metrics("m", "r"),
            mode=mode,
            limits=Limits(image_pixels=1000, images_per_request=images_per_request),
            batch_rows_max=64,
            queue_rows=queue_rows,
            pools=Pools(step_rows, step_wait_s=1000.0, queue_rows=100),
            budget=1.0,
            remembered=Remembered(100, 10**6, 600),
        )

    return make


def play(service: Service, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test while the service runs."""

    async def main() -> None:
        await service.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await test()
        finally:
            await service.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def value(service: Service, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where there is none yet."""
    for family in text_string_to_metric_families(service.metrics_text()):
        for sample in family.samples:
            if sample.name == name and sample.labels == {"model": "m", "replica": "r", **labels}:
                return sample.value
    return 0.0


def begin(service: Service, *streams: str) -> None:
    """So that requests keep their order: of a new stream, each first waits until it has begun."""
    for stream in streams:
        assert service.engine.streams.begin(stream)


def commands(service: Service) -> list[Callable[[str], Awaitable[Any]]]:
    def rollback(stream: str) -> Awaitable[Any]:
        return service.rollback(stream, 0)

    return [service.reset, service.freeze, service.resume, rollback, service.delete]


class Watched:
    """Notes what an engine does, in order; holds it back where the test wants."""

    def __init__(self, engine: Engine) -> None:
        self.order: list[str] = []
        self.may_predict, self.may_learn = threading.Event(), threading.Event()
        self.predicting = threading.Event()
        self.may_predict.set()
        self.may_learn.set()
        predict, learn = engine.predict, engine.learn

        def watched_predict(queries: Sequence[Query]) -> Any:
            self.predicting.set()
            assert self.may_predict.wait(WAIT_S)
            self.order.append(f"predict {' '.join(query.stream for query in queries)}")
            return predict(queries)

        def watched_learn(lessons: Sequence[Lesson]) -> list[Learned]:
            assert self.may_learn.wait(WAIT_S)
            self.order.append(f"learn {' '.join(lesson.stream for lesson in lessons)}")
            return learn(lessons)

        engine.predict = watched_predict  # type: ignore[method-assign]
        engine.learn = watched_learn  # type: ignore[method-assign]


def test_to_input_takes_bytes_and_floats(service: Make) -> None:
    mine = service()
    bytes_ = np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4)
    assert mine.to_input(bytes_).dtype == torch.uint8
    for dtype in (np.float16, np.float32, np.float64):
        x = mine.to_input(np.full((2, 3, 4, 4), 0.25, dtype))
        assert (x.dtype, x.shape) == (torch.float32, (2, 3, 4, 4))
        assert (x == 0.25).all()


def test_to_input_takes_what_cannot_be_written_to(service: Make) -> None:
    array = np.frombuffer(bytes(range(48)), np.uint8).reshape(1, 3, 4, 4)
    assert service().to_input(array).flatten().tolist() == list(range(48))
    unaligned = np.frombuffer(b"x" + np.full(48, 0.5, "<f4").tobytes(), "<f4", offset=1).reshape(1, 3, 4, 4)
    assert (service().to_input(unaligned) == 0.5).all()


def test_to_input_forgives_rounding(service: Make) -> None:
    array = np.zeros((1, 3, 4, 4), np.float32)
    array[0, 0, 0, :2] = (-0.0005, 1.0005)
    assert service().to_input(array).shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 4, 4), np.uint8), "the input has shape [3, 4, 4]; this model reads [n, 3, 4, 4]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "the input has shape [1, 4, 4, 3]; this model reads [n, 3, 4, 4]"),
        (np.zeros((), np.uint8), "the input has shape []; this model reads [n, 3, 4, 4]"),
        (np.zeros((0, 3, 4, 4), np.float32), "the request holds no image"),
        (np.zeros((1, 3, 4, 4), np.int64), "the input is int64; send UINT8 (0 … 255) or FP32 (0 … 1)"),
        (np.full((1, 3, 4, 4), np.nan, np.float32), "the input holds NaN or infinite values"),
        (np.full((1, 3, 4, 4), -np.inf, np.float16), "the input holds NaN or infinite values"),
        (
            np.full((1, 3, 4, 4), 255, np.float32),
            "the input spans 255 … 255; floats must lie in 0 … 1 (send UINT8 for 0 … 255)",
        ),
        (np.full((1, 3, 4, 4), -0.5, np.float64), "the input spans -0.5 … -0.5; floats must lie in 0 … 1"),
    ],
)
def test_to_input_names_the_value_and_the_limit(service: Make, array: np.ndarray, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        service().to_input(array)
    assert str(caught.value).startswith(said)


def test_a_single_nan_is_found(service: Make) -> None:
    array = np.zeros((2, 3, 4, 4), np.float32)
    array[1, 2, 3, 3] = np.nan
    with pytest.raises(InvalidInput, match="NaN"):
        service().to_input(array)


def test_too_many_images(service: Make) -> None:
    with pytest.raises(TooLarge) as caught:
        service().to_input(np.zeros((9, 3, 4, 4), np.uint8))
    assert str(caught.value) == "9 images in one request; the limit is 8 (limits.images_per_request)"
    assert len(service().to_input(np.zeros((8, 3, 4, 4), np.uint8))) == 8


@pytest.mark.parametrize("name", ["a", "0", "cam-1", "tenant:7.b_c", "A" * 128])
def test_good_names_of_streams(name: str) -> None:
    check_stream(name)


@pytest.mark.parametrize("name", ["", " a", "a b", "-a", "_a", ".", "a/b", "a\n", "é", "²", "A" * 129, "a\x00"])
def test_bad_names_of_streams(service: Make, name: str) -> None:
    mine = service()
    with pytest.raises(InvalidInput, match="cannot name a stream: 1 to 128 letters"):
        check_stream(name)
    for look in (mine.view, mine.history):
        with pytest.raises(InvalidInput, match="cannot name a stream"):
            look(name)

    async def test() -> None:
        with pytest.raises(InvalidInput, match="cannot name a stream"):
            await mine.predict(torch.zeros(1, 3, 4, 4), name)
        for command in commands(mine):
            with pytest.raises(InvalidInput, match="cannot name a stream"):
                await command(name)

    asyncio.run(test())
    assert mine.engine.streams.names() == []


def test_a_long_bad_name_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_stream("x" * 10_000)
    assert len(str(caught.value)) < 400


def test_probabilities_by_hand() -> None:
    logits = np.log(np.array([[1, 1, 2], [5, 3, 2]], np.float32))
    np.testing.assert_allclose(probabilities(logits), [[0.25, 0.25, 0.5], [0.5, 0.3, 0.2]], rtol=1e-6)
    extreme = np.array([[1e4, 0, -1e4]], np.float32)
    assert probabilities(extreme).tolist() == [[1.0, 0.0, 0.0]]
    assert probabilities(logits).dtype == np.float32


def test_decode_pictures(service: Make, picture: Callable[..., bytes]) -> None:
    mine = service()
    grey, broken = picture(), picture()[:30]

    async def test() -> None:
        x = await mine.decode([grey, grey])
        assert (x.shape, x.dtype) == ((2, 3, 4, 4), torch.uint8)
        assert (x == 128).all()
        with pytest.raises(InvalidInput, match="bytes"):
            await mine.decode([grey, broken])
        with pytest.raises(TooLarge, match=r"1600 pixels; the limit is 1000 \(limits\.image_pixels\)"):
            await mine.decode([picture(np.zeros((40, 40, 3), np.uint8))])
        with pytest.raises(TooLarge, match="9 images in one request"):
            await mine.decode([grey] * 9)
        with pytest.raises(InvalidInput, match="holds no image"):
            await mine.decode([])

    play(mine, test)
    assert value(mine, "tta_stage_seconds_count", stage="decode") == 1


def test_an_answer_is_that_of_the_network(service: Make, tiny: Callable[..., nn.Module], rows: Rows) -> None:
    mine, x = service(), rows(3)
    with torch.no_grad():
        expected = tiny()(x).numpy()

    async def test() -> None:
        answer = await mine.predict(x, adapt=False)
        np.testing.assert_allclose(answer.logits, expected, atol=1e-5)
        assert (answer.frozen_logits, answer.version, answer.adapted) == (None, "0", True)
        frozen = await mine.predict(x, adapt=False, answer="frozen")
        np.testing.assert_allclose(frozen.frozen_logits, expected, atol=1e-5)
        assert (frozen.logits, frozen.adapted) == (None, False)
        both = await mine.predict(x, adapt=False, answer="both")
        assert both.logits is not None
        assert both.frozen_logits is not None
        assert mine.view("default").stream == "default"

    play(mine, test)
    assert value(mine, "tta_images_total") == 9
    assert value(mine, "tta_stage_seconds_count", stage="queue") == 3
    assert value(mine, "tta_stage_seconds_count", stage="predict") == 3
    assert value(mine, "tta_batch_rows_sum") == 9


def test_requests_of_all_streams_share_a_forward(service: Make, rows: Rows) -> None:
    mine = service()
    watched = Watched(mine.engine)

    async def test() -> None:
        begin(mine, "first", "a", "b")
        watched.may_predict.clear()
        first = asyncio.ensure_future(mine.predict(rows(1), "first"))
        await until(watched.predicting.is_set)
        others = [asyncio.ensure_future(mine.predict(rows(1, n), stream)) for n, stream in enumerate("aab")]
        await asyncio.sleep(0)
        assert value(mine, "tta_waiting_rows") == 3
        watched.may_predict.set()
        await asyncio.gather(first, *others)

    play(mine, test)
    assert watched.order[:2] == ["predict first", "predict a a b"]
    assert value(mine, "tta_batch_streams_sum") == 3
    assert value(mine, "tta_batch_rows_sum") == 4


def test_sync_answers_then_learns_then_takes_the_next_request(service: Make, rows: Rows) -> None:
    mine = service("sync")
    watched = Watched(mine.engine)

    async def test() -> None:
        begin(mine, "a")
        watched.may_learn.clear()
        first, second = (asyncio.ensure_future(mine.predict(rows(4, n), "a")) for n in range(2))
        assert (await first).version == "0"  # the answer is out before the step has begun
        assert watched.order == ["predict a"]
        assert not second.done()
        watched.may_learn.set()
        assert (await second).version == "1"

    play(mine, test)
    assert watched.order == ["predict a", "learn a", "predict a", "learn a"]
    record = mine.engine.streams.record("a")
    assert (record.version, record.steps, record.seen) == (2, 2, 8)
    assert value(mine, "tta_steps_total", result="applied") == 2
    assert value(mine, "tta_learned_rows_total") == 8
    assert value(mine, "tta_selected_rows_total") == 8
    assert value(mine, "tta_entropy_nats") == pytest.approx(record.entropy)
    assert value(mine, "tta_stage_seconds_count", stage="learn") == 2


def test_sync_never_mixes_requests_however_small(service: Make, rows: Rows) -> None:
    mine = service("sync")
    watched = Watched(mine.engine)

    async def test() -> None:
        begin(mine, *"abc")
        await asyncio.gather(*(mine.predict(rows(1, n), stream) for n, stream in enumerate("abc")))

    play(mine, test)
    assert watched.order == [f"{what} {stream}" for stream in "abc" for what in ("predict", "learn")]


def test_sync_equals_predicting_and_learning_by_hand(
    service: Make, pipeline: Callable[..., Pipeline], rows: Rows
) -> None:
    mine = service("sync")
    plain = Engine(pipeline(statistics="batch"), torch.device("cpu"), 10)

    async def test() -> None:
        for n in range(4):
            got = await mine.predict(rows(4, n), "a")
            ((expected, lesson),) = plain.predict([Query(rows(4, n), "a")])
            plain.learn([lesson])
            np.testing.assert_allclose(got.logits, expected.logits, atol=1e-6)

    play(mine, test)


def test_a_sync_step_that_fails_costs_no_answer(service: Make, rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    mine = service("sync")

    def broken(_: Sequence[Lesson]) -> list[Learned]:
        raise ZeroDivisionError

    mine.engine.learn = broken  # type: ignore[method-assign]

    async def test() -> None:
        for _ in range(2):
            assert (await mine.predict(rows(4), "a")).version == "0"

    with caplog.at_level(logging.ERROR):
        play(mine, test)
    assert [record.message for record in caplog.records] == ["a learning step failed"] * 2
    assert value(mine, "tta_skipped_rows_total", reason="failed") == 8


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_without_adapting_nothing_is_learned_and_that_is_counted(service: Make, rows: Rows, mode: str) -> None:
    mine = service(mode)
    watched = Watched(mine.engine)

    async def test() -> None:
        for n in range(3):
            await mine.predict(rows(4, n), "a", adapt=False)
        assert mine.view("a").pending_rows == 0

    play(mine, test)
    assert watched.order == ["predict a"] * 3
    assert mine.engine.streams.record("a").version == 0
    assert value(mine, "tta_skipped_rows_total", reason="off") == 12


def test_a_frozen_service_learns_nothing_and_counts_nothing_skipped(service: Make, rows: Rows) -> None:
    mine = service("frozen")
    watched = Watched(mine.engine)

    async def test() -> None:
        assert (await mine.predict(rows(4), "a")).version == "0"
        await mine.predict(rows(4), "a", adapt=False)

    play(mine, test)
    assert watched.order == ["predict a"] * 2
    assert "tta_skipped_rows_total{" not in mine.metrics_text()


def test_async_answers_first_and_learns_beside(service: Make, rows: Rows) -> None:
    mine = service("async")
    watched = Watched(mine.engine)

    async def test() -> None:
        watched.may_learn.clear()
        assert (await mine.predict(rows(4), "a")).version == "0"
        assert (await mine.predict(rows(4, 1.0), "a")).version == "0"  # a step that takes its time holds nobody up
        await until(lambda: mine.view("a").pending_rows == 8)
        assert value(mine, "tta_pending_rows") == 8
        watched.may_learn.set()
        await until(lambda: mine.view("a").pending_rows == 0)
        view = mine.view("a")
        assert view.version >= 1
        assert (view.seen, view.selected, view.selected_share) == (8, 8, 1.0)
        assert (await mine.predict(rows(4), "a")).version == str(view.version)

    play(mine, test)


def test_too_few_rows_wait(service: Make, rows: Rows) -> None:
    mine = service("async", step_rows=5)

    async def test() -> None:
        await mine.predict(rows(4), "a")
        await until(lambda: mine.view("a").pending_rows == 4)
        assert mine.view("a").version == 0
        await mine.predict(rows(1), "a")
        await until(lambda: mine.view("a").version == 1)

    play(mine, test)


def test_a_stream_is_shown_as_it_stands(service: Make, rows: Rows) -> None:
    mine = service("sync")

    async def test() -> None:
        with pytest.raises(NotFound, match="no stream named 'a'"):
            mine.view("a")
        await mine.predict(rows(4), "a", adapt=False)
        new = mine.view("a")
        assert (new.mode, new.version, new.steps, new.seen, new.selected_share, new.entropy) == (
            "sync",
            0,
            0,
            0,
            None,
            None,
        )
        assert new.state_bytes == 0  # it shares `init()` still
        await mine.predict(rows(4), "a")
        await mine.predict(rows(1), "b", adapt=False)  # comes after the step
        view = mine.view("a")
        assert (view.version, view.steps, view.seen, view.reliable, view.selected) == (1, 1, 4, 4, 4)
        assert (view.selected_share, view.refused, view.pending_rows) == (1.0, 0, 0)
        assert view.entropy is not None
        assert value(mine, "tta_streams") == 2
        assert value(mine, "tta_state_bytes") == view.state_bytes  # the other stream has learned nothing

    play(mine, test)


def test_reset_and_delete_drop_what_waits(service: Make, rows: Rows) -> None:
    mine = service("async", step_rows=100)

    async def test() -> None:
        for stream in "ab":
            await mine.predict(rows(4), stream)
        await until(lambda: value(mine, "tta_pending_rows") == 8)
        before = mine.view("a")
        after = (await mine.reset("a")).view
        assert (after.version, after.pending_rows) == (0, 0)
        assert after.incarnation > before.incarnation
        assert (await mine.delete("b")).receipt is None
        assert value(mine, "tta_pending_rows") == 0
        for look in (mine.view, mine.history):
            with pytest.raises(NotFound):
                look("b")
        for command in commands(mine):
            with pytest.raises(NotFound, match="no stream named 'b'"):
                await command("b")

    play(mine, test)
    assert value(mine, "tta_skipped_rows_total", reason="forgotten") == 8


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_frozen_stream_answers_and_learns_nothing_until_it_is_resumed(service: Make, rows: Rows, mode: str) -> None:
    mine = service(mode, step_rows=4)

    async def test() -> None:
        await mine.predict(rows(4), "a")
        await mine.predict(rows(1), "b", adapt=False)  # in sync mode it comes after the step
        await until(lambda: mine.view("a").version == 1)
        before = await mine.predict(rows(4, 1.0), "a", adapt=False)
        assert (await mine.freeze("a")).view.frozen
        for _ in range(3):
            answer = await mine.predict(rows(4, 1.0), "a")
            assert answer.version == "2"  # freezing is a version of its own
            np.testing.assert_array_equal(answer.logits, before.logits)
        assert (mine.view("a").pending_rows, mine.view("a").seen) == (0, 4)
        await mine.predict(rows(4), "b")  # others go on
        await mine.predict(rows(1), "c", adapt=False)
        await until(lambda: mine.view("b").version == 1)
        assert not (await mine.resume("a")).view.frozen
        await mine.predict(rows(4), "a")
        await mine.predict(rows(1), "c", adapt=False)
        await until(lambda: mine.view("a").version == 4)

    play(mine, test)
    assert value(mine, "tta_skipped_rows_total", reason="frozen") == 12
    assert value(mine, "tta_learned_rows_total") == 12


def test_freezing_drops_what_waits(service: Make, rows: Rows) -> None:
    mine = service("async", step_rows=100)

    async def test() -> None:
        await mine.predict(rows(4), "a")
        await until(lambda: mine.view("a").pending_rows == 4)
        assert (await mine.freeze("a")).view.pending_rows == 0

    play(mine, test)
    assert value(mine, "tta_skipped_rows_total", reason="forgotten") == 4


def test_a_rollback_answers_as_it_did_and_drops_what_waits(service: Make, rows: Rows) -> None:
    mine = service("async", step_rows=4)

    async def test() -> None:
        first = await mine.predict(rows(2), "a", adapt=False)
        await mine.predict(rows(4), "a")
        await until(lambda: mine.view("a").version == 1)
        learned = await mine.predict(rows(2), "a", adapt=False)
        assert np.abs(learned.logits - first.logits).max() > 1e-4
        await mine.predict(rows(2), "a")  # too few: they wait
        await until(lambda: mine.view("a").pending_rows == 2)
        before = mine.view("a")
        after = (await mine.rollback("a", 0)).view
        assert (after.version, after.pending_rows) == (2, 0)
        assert after.incarnation > before.incarnation
        again = await mine.predict(rows(2), "a", adapt=False)
        assert again.version == "2"
        np.testing.assert_array_equal(again.logits, first.logits)
        with pytest.raises(NotFound, match=r"the version 1 of stream 'a' is not kept; there are 0$"):
            await mine.rollback("a", 1)

    play(mine, test)
    assert value(mine, "tta_skipped_rows_total", reason="forgotten") == 2


def test_a_history_tells_what_happened(service: Make, rows: Rows) -> None:
    mine = service("sync")

    async def test() -> None:
        await mine.predict(rows(4), "a")
        await mine.predict(rows(1), "b", adapt=False)
        await mine.freeze("a")
        await mine.freeze("a")  # it is already
        await mine.resume("a")
        await mine.rollback("a", 0)
        history = mine.history("a")
        assert (history.stream, history.version, history.versions) == ("a", 4, (0,))
        assert [(event.version, event.what) for event in history.events] == [
            (0, "begun"),
            (2, "frozen: by hand"),
            (3, "resumed"),
            (4, "rolled back to 0: by hand"),
        ]
        times = [datetime.fromisoformat(event.at) for event in history.events]
        assert times == sorted(times)
        assert all(event.at.endswith("Z") for event in history.events)

    play(mine, test)


def test_streams_are_shown_by_page_and_prefix(service: Make, rows: Rows) -> None:
    mine = service("frozen")

    async def test() -> None:
        for name in ("b", "x:2", "a", "x:1", "y:1", "x"):
            await mine.predict(rows(1), name)

        def listed(*args: Any, **more: Any) -> tuple[list[str], int]:
            views, total = mine.streams(*args, **more)
            return [view.stream for view in views], total

        assert listed(10) == (["a", "b", "x", "x:1", "x:2", "y:1"], 6)
        assert listed(2, 1) == (["b", "x"], 6)
        assert listed(2, 6) == ([], 6)
        assert listed(1, 1, "x:") == (["x:2"], 2)
        assert listed(10, without=("x:", "y:")) == (["a", "b", "x"], 3)
        assert listed(10, 0, "z") == ([], 0)

    play(mine, test)


def test_who_is_not_in_memory_is_shown_so(service: Make, rows: Rows) -> None:
    mine = service("sync", resident=1)

    async def test() -> None:
        for name in "ab":
            await mine.predict(rows(4), name)
        await mine.predict(rows(1), "c", adapt=False)
        shown = {name: (mine.view(name).resident, mine.view(name).state_bytes > 0) for name in "abc"}
        assert shown == {"a": (False, False), "b": (True, True), "c": (True, False)}  # c is `init()` still
        assert (await mine.predict(rows(1), "a", adapt=False)).version == "1"
        assert (mine.view("a").resident, mine.view("b").resident) == (True, False)

    play(mine, test)


def test_the_last_check_is_shown(service: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = service("sync")

    async def test() -> None:
        await mine.predict(rows(4), "a", adapt=False)
        new = mine.view("a")
        assert (new.drift, new.flip_rate, new.forgetting, new.gated) == (None, None, None, False)
        monkeypatch.setattr(mine.engine, "reading", lambda _: Reading(1.5, 0.25, 0.125, 0.5))
        monkeypatch.setattr(mine.engine, "gated", lambda _: True)
        record = mine.engine.streams.record("a")
        mine.engine.streams.note("a", record.incarnation, lambda record: record._replace(forgetting=(0.01, 0.002)))
        seen = mine.view("a")
        assert (seen.drift, seen.flip_rate, seen.gated) == (1.5, 0.25, True)
        assert (seen.forgetting, seen.forgetting_standard_error) == (0.01, 0.002)
        monkeypatch.setattr(mine.engine, "reading", lambda _: Reading(math.nan, 0.25, 0.125, 0.5))
        assert mine.view("a").drift is None  # no source images are known

    play(mine, test)


@pytest.mark.parametrize("result", ["stale", "frozen", "gated"])
def test_rows_without_a_step_count_as_skipped(service: Make, rows: Rows, result: Any) -> None:
    mine = service("sync")

    def learn(lessons: Sequence[Lesson]) -> list[Learned]:
        return [Learned(lesson.stream, lesson.rows, 0, math.nan, result) for lesson in lessons]

    mine.engine.learn = learn  # type: ignore[method-assign]

    async def test() -> None:
        await mine.predict(rows(4), "a")

    play(mine, test)
    assert value(mine, "tta_skipped_rows_total", reason=result) == 4
    assert value(mine, "tta_steps_total", result=result) == 1
    assert value(mine, "tta_learned_rows_total") == 0


def test_trips_of_guards_are_counted(service: Make, rows: Rows) -> None:
    mine = service("sync")

    def learn(lessons: Sequence[Lesson]) -> list[Learned]:
        return [Learned("a", 4, 2, 0.5, "applied", ("collapse", "entropy_floor"))]

    mine.engine.learn = learn  # type: ignore[method-assign]

    async def test() -> None:
        await mine.predict(rows(4), "a")
        await mine.predict(rows(4), "a")

    play(mine, test)
    assert value(mine, "tta_guard_trips_total", guard="collapse") == 2
    assert value(mine, "tta_guard_trips_total", guard="entropy_floor") == 2
    assert value(mine, "tta_learned_rows_total") == 8


def test_one_stream_too_many_is_refused_alone(service: Make, rows: Rows) -> None:
    mine = service(streams_max=1)

    async def test() -> None:
        answers = await asyncio.gather(
            *(mine.predict(rows(1), stream, adapt=False) for stream in ("a", "b", "a")), return_exceptions=True
        )
        assert isinstance(answers[1], Overloaded)
        assert not any(isinstance(answers[n], BaseException) for n in (0, 2))

    play(mine, test)


def test_a_full_queue_refuses(service: Make, rows: Rows) -> None:
    mine = service(queue_rows=4)
    watched = Watched(mine.engine)

    async def test() -> None:
        watched.may_predict.clear()
        running = [asyncio.ensure_future(mine.predict(rows(1), "a"))]
        await until(watched.predicting.is_set)
        running.append(asyncio.ensure_future(mine.predict(rows(4), "a")))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=r"4 rows are waiting, and these 1 would pass the limit of 4"):
            await mine.predict(rows(1), "a")
        watched.may_predict.set()
        await asyncio.gather(*running)

    play(mine, test)


@pytest.mark.parametrize("answer", ["adapted", "frozen", "both"])
def test_numbers_that_are_not_finite_are_never_answered(
    service: Make, tiny: Callable[..., nn.Module], rows: Rows, answer: Any
) -> None:
    module = tiny()
    head = module.get_submodule("4")
    assert isinstance(head, nn.Linear)
    head.bias.data[1] = torch.inf
    mine = service("sync", module=module)

    async def test() -> None:
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"not finite; reset the stream 'a' if this goes on"):
                await mine.predict(rows(2), "a", answer=answer)

    play(mine, test)
    view = mine.view("a")
    assert (view.steps, view.entropy) == (0, None)
    assert torch.equal(mine.engine.streams.state("a").norm.inner.params, mine.engine.pipeline.init().norm.inner.params)


def test_a_failing_forward_reaches_its_callers_only(service: Make, rows: Rows) -> None:
    mine = service()
    predict = mine.engine.predict

    def fails_once(queries: Sequence[Query]) -> Any:
        mine.engine.predict = predict  # type: ignore[method-assign]
        raise RuntimeError("out of memory")

    mine.engine.predict = fails_once  # type: ignore[method-assign]

    async def test() -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            await mine.predict(rows(1), "a")
        assert (await mine.predict(rows(1), "a")).logits is not None

    play(mine, test)


def test_ready_only_between_start_and_stop(service: Make, rows: Rows, picture: Callable[..., bytes]) -> None:
    mine = service()

    async def main() -> None:
        assert not mine.ready
        with pytest.raises(Unavailable, match="not running"):
            await mine.predict(rows(1), "a")
        await mine.start()
        assert mine.ready
        await mine.stop()
        assert not mine.ready
        for call in (mine.predict(rows(1), "a"), mine.decode([picture()])):
            with pytest.raises(Unavailable, match="not running"):
                await call
        await mine.stop()  # a second time changes nothing

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_stop_during_traffic_settles_every_caller(service: Make, rows: Rows, mode: str) -> None:
    mine = service(mode)
    watched = Watched(mine.engine)

    async def main() -> None:
        await mine.start()
        watched.may_predict.clear()
        callers = [asyncio.ensure_future(mine.predict(rows(1), "a"))]
        await until(watched.predicting.is_set)
        callers += [asyncio.ensure_future(mine.predict(rows(2, n), "b")) for n in range(5)]
        await until(lambda: mine.waiting_rows == 10)
        stopping = asyncio.ensure_future(mine.stop())
        await asyncio.sleep(0)
        assert not mine.ready
        watched.may_predict.set()
        async with asyncio.timeout(WAIT_S):
            await stopping
            first, *others = await asyncio.gather(*callers, return_exceptions=True)
        assert not isinstance(first, BaseException)  # the forward at hand was finished
        assert [str(each) for each in others] == ["the server is stopping"] * 5
        assert all(isinstance(each, Unavailable) for each in others)

    asyncio.run(main())
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tta-")]


def test_a_caller_who_leaves_takes_nobody_along(service: Make, rows: Rows) -> None:
    mine = service()
    watched = Watched(mine.engine)

    async def test() -> None:
        begin(mine, *"abc")
        watched.may_predict.clear()
        callers = [asyncio.ensure_future(mine.predict(rows(1), "a"))]
        await until(watched.predicting.is_set)
        callers += [asyncio.ensure_future(mine.predict(rows(1), stream)) for stream in "bc"]
        await asyncio.sleep(0)
        callers[1].cancel()
        watched.may_predict.set()
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(answer).__name__ for answer in answers] == ["Prediction", "CancelledError", "Prediction"]

    play(mine, test)
    assert watched.order[:2] == ["predict a", "predict c"]
