"""The use cases around one model, knowing nothing of HTTP or Ray: predict, look at streams, command them."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta_serve import images
from tta_serve.batching import Batcher
from tta_serve.engine import Answer, AnswerKind, Engine, Learned, Lesson, Query
from tta_serve.errors import InvalidInput, NotFound, Overloaded, TooLarge, Unavailable
from tta_serve.learner import Learner, Pools
from tta_serve.metrics import Metrics
from tta_serve.models import InputSpec
from tta_serve.streams import StreamRecord
from tta_serve.views import DEFAULT_STREAM, StreamHistory, StreamPage, StreamView, check_stream, history_of

log = logging.getLogger(__name__)

T = TypeVar("T")


class Limits(NamedTuple):
    """What one request may hold."""

    image_pixels: int
    images_per_request: int


class Prediction(NamedTuple):
    """The answer to one request, in the order of its images."""

    logits: NDArray[np.float32] | None  # of the adapted model, [n, C]
    frozen_logits: NDArray[np.float32] | None  # [n, C]
    version: int  # of the state that answered

    @property
    def adapted(self) -> bool:
        return self.logits is not None


class _Asked(NamedTuple):
    query: Query
    adapt: bool
    asked_s: float


class Service:
    """One model: requests in, answers out, adaptation beside.

    Args:
        engine: the model and its states.
        spec: what the model reads.
        labels: names of its classes.
        metrics: where everything is counted.
        mode: `sync` (one request = one batch = one step, in order), `async` (answer first, learn later), or `frozen`
            (nothing to learn).
        limits: of one request.
        batch_rows_max, queue_rows: see `batching.Waiting`.
        pools, budget: of the learner; read in `async` mode.
    """

    def __init__(
        self,
        engine: Engine,
        spec: InputSpec,
        labels: tuple[str, ...],
        metrics: Metrics,
        *,
        mode: str,
        limits: Limits,
        batch_rows_max: int,
        queue_rows: int,
        pools: Pools,
        budget: float,
    ) -> None:
        self.engine = engine
        self.spec = spec
        self.labels = labels
        self.metrics = metrics
        self.mode = mode
        self.limits = limits
        self._batcher: Batcher[_Asked, tuple[Answer, Lesson]] = Batcher(
            self._answer,
            rows_max=1 if mode == "sync" else batch_rows_max,  # a request is never split: 1 row means 1 request
            queue_rows=queue_rows,
            afterwards=self._after,
        )
        self._device = ThreadPoolExecutor(1, "tta-device", initializer=engine.prepare_thread)
        self._decoders = ThreadPoolExecutor(2, "tta-decode")
        self._learner = Learner(engine, pools, budget, self._count_learned, self._count_skipped)
        self._stepping: dict[str, int] = {}  # rows of each stream in the step that runs now, in `sync` mode
        self._running = False

    async def start(self) -> None:
        """Open for requests."""
        self._batcher.start()
        if self.mode == "async":
            self._learner.start()
        self._running = True

    async def stop(self) -> None:
        """Close; a forward or step at hand is finished first."""
        self._running = False
        await self._batcher.stop()
        await asyncio.to_thread(self._learner.stop)
        self._device.shutdown()
        self._decoders.shutdown()

    @property
    def ready(self) -> bool:
        return self._running

    async def decode(self, contents: Sequence[bytes]) -> Tensor:
        """Decode pictures into uint8 [n, 3, H, W].

        Raises:
            TooLarge, InvalidInput: see `images.decode`.
            Unavailable: the service is not running.
        """
        if not self._running:
            raise Unavailable("the server is not running")
        self.check_count(len(contents))
        began_s = time.monotonic()
        limit = self.limits.image_pixels

        def decode_all() -> Tensor:
            return torch.stack([images.decode(content, self.spec, limit) for content in contents])

        x = await self._on(self._decoders, decode_all)
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="decode")
        return x

    async def off_loop(self, call: Callable[[], T]) -> T:
        """Run something slow beside the event loop, where pictures are decoded.

        Raises:
            Unavailable: the service is stopping.
        """
        return await self._on(self._decoders, call)

    def check_count(self, count: int) -> None:
        """Raise unless a request may hold that many images."""
        if count < 1:
            raise InvalidInput("the request holds no image")
        if count > self.limits.images_per_request:
            raise TooLarge(
                f"{count} images in one request; the limit is {self.limits.images_per_request} "
                "(limits.images_per_request)"
            )

    def to_input(self, array: NDArray[Any]) -> Tensor:
        """Check a client's tensor and take it as the model's input.

        Args:
            array: [n, 3, H, W], RGB; uint8 0 … 255, or floats in [0, 1].

        Raises:
            InvalidInput: another shape, dtype or range, NaN or infinity; the message names value and limit.
            TooLarge: more images than a request may hold.
        """
        expected = ["n", *self.spec.shape]
        if array.ndim != 4 or array.shape[1:] != self.spec.shape:
            raise InvalidInput(f"the input has shape {list(array.shape)}; this model reads {expected}".replace("'", ""))
        self.check_count(len(array))
        if array.dtype == np.uint8:
            return torch.from_numpy(array.copy() if not array.flags.writeable else array)
        if array.dtype.kind != "f":
            raise InvalidInput(f"the input is {array.dtype}; send UINT8 (0 … 255) or FP32 (0 … 1)")
        low, high = float(array.min()), float(array.max())  # NaN if any is
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InvalidInput("the input holds NaN or infinite values; floats must lie in 0 … 1")
        if low < -1e-3 or high > 1 + 1e-3:
            raise InvalidInput(f"the input spans {low:g} … {high:g}; floats must lie in 0 … 1 (send UINT8 for 0 … 255)")
        return torch.from_numpy(array.astype(np.float32))

    async def predict(
        self, x: Tensor, stream: str = DEFAULT_STREAM, *, adapt: bool = True, answer: AnswerKind = "adapted"
    ) -> Prediction:
        """Answer one request.

        Args:
            x: from `decode` or `to_input`.
            stream: its name.
            adapt: whether the request may be learned from.
            answer: whose answer.

        Raises:
            InvalidInput: a bad stream name.
            Overloaded: no room for the request or for a new stream.
        """
        check_stream(stream)
        begun = self.engine.streams.begin(stream)
        asked = _Asked(Query(x, stream, answer), adapt, time.monotonic())
        try:
            result, _ = await self._batcher.submit(asked, rows=len(x))
        except Overloaded:
            if begun:  # a request that was refused leaves no stream behind
                self.engine.streams.take_back(stream, begun)
            raise
        self.metrics.count("tta_images_total", len(x))
        prediction = Prediction(result.logits, result.frozen_logits, result.version)
        if not all(np.isfinite(logits).all() for logits in prediction[:2] if logits is not None):
            raise Unavailable(
                f"the model gave numbers that are not finite; reset the stream {stream!r} if this goes on"
            )
        return prediction

    def streams(self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()) -> StreamPage:
        """A page of the streams whose names begin with `prefix` and with none of `without`."""
        names = [
            name for name in self.engine.streams.names() if name.startswith(prefix) and not name.startswith(without)
        ]
        views = []
        for name in names[offset : offset + limit]:
            with contextlib.suppress(NotFound):  # deleted since
                views.append(self.view(name))
        return StreamPage(views, len(names))

    def view(self, stream: str) -> StreamView:
        """A stream as it stands.

        Raises:
            InvalidInput, NotFound: a bad name; no such stream.
        """
        check_stream(stream)
        record, reading = self.engine.streams.record(stream), self.engine.reading(stream)
        forgetting, forgetting_error = record.forgetting or (None, None)
        return StreamView(
            stream=stream,
            mode=self.mode,
            version=record.version,
            incarnation=record.incarnation,
            steps=record.steps,
            seen=record.seen,
            reliable=record.reliable,
            selected=record.selected,
            selected_share=record.selected / record.seen if record.seen else None,
            refused=record.refused,
            trips=record.trips,
            frozen=record.frozen,
            gated=self.engine.gated(stream),
            entropy=record.entropy,
            drift=reading.drift if reading and math.isfinite(reading.drift) else None,
            flip_rate=reading.flip_rate if reading else None,
            forgetting=forgetting,
            forgetting_standard_error=forgetting_error,
            pending_rows=self._learner.pending_rows(stream) + self._stepping.get(stream, 0),
            versions=tuple(self.engine.streams.versions(stream)),
            resident=record.row is not None,
            state_bytes=self.engine.streams.bytes_of(stream),
        )

    def history(self, stream: str) -> StreamHistory:
        """What happened to a stream, and the versions that are kept of it.

        Raises:
            InvalidInput, NotFound: a bad name; no such stream.
        """
        check_stream(stream)
        return history_of(stream, self.engine.streams.record(stream), self.engine.streams.versions(stream))

    async def reset(self, stream: str) -> StreamView:
        """Begin a stream's life anew; rows that wait are dropped, here and in the commands below.

        Raises:
            InvalidInput, NotFound: a bad name; no such stream.
            Unavailable: the service is stopping.
        """
        await self._command(stream, self.engine.streams.reset)
        return self.view(stream)

    async def freeze(self, stream: str) -> StreamView:
        """Let a stream answer as it does now, and learn nothing until `resume`.

        Raises:
            InvalidInput, NotFound, Unavailable: see `reset`.
        """
        await self._command(stream, self.engine.streams.freeze)
        return self.view(stream)

    async def resume(self, stream: str) -> StreamView:
        """Let a frozen stream learn again.

        Raises:
            InvalidInput, NotFound, Unavailable: see `reset`.
        """
        await self._command(stream, self.engine.streams.resume)
        return self.view(stream)

    async def rollback(self, stream: str, version: int) -> StreamView:
        """Go back to the state of an earlier version, under a new version.

        Raises:
            InvalidInput: a bad name.
            NotFound: no such stream, or the version is not kept.
            Unavailable: the version cannot be read, or the service is stopping.
        """
        await self._command(stream, lambda stream: self.engine.streams.rollback(stream, version))
        return self.view(stream)

    async def delete(self, stream: str) -> None:
        """Forget a stream.

        Raises:
            InvalidInput, NotFound, Unavailable: see `reset`.
        """
        await self._command(stream, self.engine.streams.delete)

    async def _command(self, stream: str, command: Callable[[str], StreamRecord | None]) -> None:
        check_stream(stream)
        await self.off_loop(lambda: command(stream))  # it may read or remove files
        self._learner.forget(stream)

    def metrics_text(self) -> str:
        """Prometheus text, gauges read now."""
        names = self.engine.streams.names()
        self.metrics.set("tta_waiting_rows", self._batcher.waiting_rows)
        self.metrics.set("tta_pending_rows", self._learner.pending_rows())
        self.metrics.set("tta_streams", len(names))
        self.metrics.set("tta_state_bytes", self.engine.streams.bytes())
        return self.metrics.text()

    async def _answer(self, batch: Sequence[_Asked]) -> Sequence[tuple[Answer, Lesson]]:
        began_s = time.monotonic()
        for asked in batch:
            self.metrics.observe("tta_stage_seconds", began_s - asked.asked_s, stage="queue")
        queries = [asked.query for asked in batch]
        answers = await self._on(self._device, lambda: self.engine.predict(queries))
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="predict")
        self.metrics.observe("tta_batch_rows", sum(len(query.x) for query in queries))
        self.metrics.observe("tta_batch_streams", len({query.stream for query in queries}))
        return answers

    async def _after(self, batch: Sequence[_Asked], answers: Sequence[tuple[Answer, Lesson]]) -> None:
        if self.mode == "frozen":
            return
        lessons = []
        for asked, (_, lesson) in zip(batch, answers, strict=True):
            if not asked.adapt:
                self._count_skipped(lesson.rows, "off")
            elif self._is_frozen(lesson.stream):
                self._count_skipped(lesson.rows, "frozen")
            else:
                lessons.append(lesson)
        if self.mode == "async":
            for lesson in lessons:
                self._learner.offer(lesson)
            return
        if not lessons:
            return
        began_s = time.monotonic()
        self._stepping = {lesson.stream: len(lesson.x) for lesson in lessons}
        try:
            learned = await self._on(self._device, lambda: self.engine.learn(lessons))
        except Exception:  # the answer is out; a failed step must not end the batcher
            log.exception("a learning step failed")
            self._count_skipped(sum(len(lesson.x) for lesson in lessons), "failed")
            return
        finally:
            self._stepping = {}
        self._count_learned(learned, time.monotonic() - began_s)

    def _is_frozen(self, stream: str) -> bool:
        record = self.engine.streams.find(stream)
        return record is not None and record.frozen  # of one deleted since, the engine says that it is stale

    def _count_learned(self, learned: Sequence[Learned], took_s: float) -> None:
        self.metrics.observe("tta_stage_seconds", took_s, stage="learn")
        for each in learned:
            self.metrics.count("tta_steps_total", result=each.result)
            for guard in each.trips:
                self.metrics.count("tta_guard_trips_total", guard=guard)
            if each.result in ("stale", "frozen", "gated"):  # no step was taken
                self._count_skipped(each.seen, each.result)
                continue
            self.metrics.count("tta_learned_rows_total", each.seen)
            self.metrics.count("tta_selected_rows_total", each.selected)
            if each.result in ("applied", "filtered"):
                self.metrics.set("tta_entropy_nats", each.entropy)

    def _count_skipped(self, rows: int, reason: str) -> None:
        self.metrics.count("tta_skipped_rows_total", rows, reason=reason)

    async def _on(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, call)
        except RuntimeError as error:
            if not self._running and "shutdown" in str(error):
                raise Unavailable("the server is stopping") from None
            raise


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax of [n, C]."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return cast(NDArray[np.float32], (e / e.sum(axis=1, keepdims=True)).astype(np.float32))
