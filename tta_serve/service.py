"""The use cases around one classifier, knowing nothing of HTTP or Ray: predict, and learn beside it."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta_serve import images
from tta_serve.batching import Batcher
from tta_serve.engine import Answer, AnswerKind, Engine, Query
from tta_serve.errors import InvalidInput, Overloaded, Unavailable
from tta_serve.label_service import LabelService
from tta_serve.learner import Learner, Pools
from tta_serve.lessons import Lesson
from tta_serve.metrics import Metrics
from tta_serve.model_service import Limits
from tta_serve.models import InputSpec
from tta_serve.remembered import Remembered
from tta_serve.views import DEFAULT_STREAM, check_stream
from tta_serve.watch import Reading

log = logging.getLogger(__name__)

T = TypeVar("T")


class Prediction(NamedTuple):
    """The answer to one request, in the order of its images."""

    logits: NDArray[np.float32] | None  # of the adapted model, [n, C + added classes]
    frozen_logits: NDArray[np.float32] | None  # [n, C]
    version: str  # of the state that answered: `ModelService.version_text`
    incarnation: int = 0  # of the stream; 0: the frozen model answered for it
    added: tuple[str, ...] = ()  # names of the classes behind the model's own
    head_version: int = 0  # of what labels have taught
    unknown: NDArray[np.float32] | None = None  # of each image, 0 … 1, where an open set is looked for

    @property
    def adapted(self) -> bool:
        return self.logits is not None


class _Asked(NamedTuple):
    query: Query
    adapt: bool
    asked_s: float


class Service(LabelService):
    """One classifier: requests in, answers out, adaptation beside.

    Args:
        engine: the model and its states.
        spec: what the model reads.
        labels: names of its classes.
        metrics: where everything is counted.
        mode: `sync` (one request = one batch = one step, in order), `async` (answer first, learn later), `labels`
            (nothing to learn but from these), or `frozen` (nothing to learn).
        limits: of one request.
        batch_rows_max, queue_rows: see `batching.Waiting`.
        pools, budget: of the learner; read in `async` mode.
        remembered: what labels may name by its prediction.
        unknown_above: of the score; images above teach nothing without a label. Read where the engine gives scores.
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
        remembered: Remembered,
        unknown_above: float = 1.0,
    ) -> None:
        super().__init__(
            engine, labels, metrics, mode=mode, limits=limits, remembered=remembered, unknown_above=unknown_above
        )
        self.spec = spec
        self._batcher: Batcher[_Asked, tuple[Answer, Lesson]] = Batcher(
            self._answer,
            rows_max=1 if mode == "sync" else batch_rows_max,  # a request is never split: 1 row means 1 request
            queue_rows=queue_rows,
            afterwards=self._after,
        )
        self._device = ThreadPoolExecutor(1, "tta-device", initializer=engine.prepare_thread)
        self._learner = Learner(engine, pools, budget, self.count_learned, self.count_skipped, engine.absorb)
        self._stepping: dict[str, int] = {}  # rows of each stream in the step that runs now, in `sync` mode

    async def start(self) -> None:
        self._batcher.start()
        if self.mode == "async":
            self._learner.start()
        await self.start_syncing()
        self._running = True

    async def stop(self) -> None:
        self._running = False
        await self._batcher.stop()
        await self.stop_teaching()
        await asyncio.to_thread(self._learner.stop)
        await self.stop_syncing()
        self._device.shutdown()
        self._decoders.shutdown()
        self._store_threads.shutdown()

    async def decode(self, contents: Sequence[bytes]) -> Tensor:
        self.check_running()
        self.check_count(len(contents))
        began_s = time.monotonic()
        limit = self.limits.image_pixels

        def decode_all() -> Tensor:
            return torch.stack([images.decode(content, self.spec, limit) for content in contents])

        x = await self._on(self._decoders, decode_all)
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="decode")
        return x

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
        return torch.from_numpy(images.checked_range(array))

    async def predict(
        self,
        x: Tensor,
        stream: str = DEFAULT_STREAM,
        *,
        id: str | None = None,
        adapt: bool = True,
        answer: AnswerKind = "adapted",
    ) -> Prediction:
        """Answer one request.

        Args:
            x: from `decode` or `to_input`.
            stream: its name.
            id: of the prediction, for labels that may come; None: none will.
            adapt: whether the request may be learned from.
            answer: whose answer.

        Raises:
            InvalidInput: a bad stream name.
            Overloaded: no room for the request or for a new stream.
        """
        remember = id is not None and adapt and self.engine.heads is not None
        result, incarnation = await self._ask(Query(x, stream, answer, remember), adapt)
        self.metrics.count("tta_images_total", len(x))
        version = self.version_text(result.version, result.unsynced)
        prediction = Prediction(*result[:2], version, incarnation, result.added, result.head_version, result.unknown)
        if remember and id is not None:
            self.remember(id, stream, result, incarnation)
        return prediction

    async def look(self, x: Tensor, stream: str) -> tuple[Answer, int]:
        return await self._ask(Query(x, stream, remember=True), adapt=False)

    async def _ask(self, query: Query, adapt: bool) -> tuple[Answer, int]:
        """The answer, and the incarnation of the stream that gave it.

        Raises:
            Unavailable: the answer holds numbers that are not finite.
        """
        check_stream(query.stream)
        begun = await self.begin(query.stream)
        try:
            answer, lesson = await self._batcher.submit(_Asked(query, adapt, time.monotonic()), rows=len(query.x))
        except Overloaded:
            if begun:  # a request that was refused leaves no stream behind
                self.engine.streams.take_back(query.stream, begun)
            raise
        if not all(np.isfinite(logits).all() for logits in answer[:2] if logits is not None):
            raise Unavailable(
                f"the model gave numbers that are not finite; reset the stream {query.stream!r} if this goes on"
            )
        return answer, lesson.incarnation

    @property
    def waiting_rows(self) -> int:
        return self._batcher.waiting_rows

    def pending_rows(self, stream: str | None = None) -> int:
        waiting = self._learner.pending_rows(stream)
        return waiting + (sum(self._stepping.values()) if stream is None else self._stepping.get(stream, 0))

    def drop_pending(self, stream: str) -> None:
        self.drop_remembered(stream)
        self._learner.forget(stream)

    def reading(self, stream: str) -> Reading | None:
        return self.engine.reading(stream)

    def gated(self, stream: str) -> bool:
        return self.engine.gated(stream)

    async def _answer(self, batch: Sequence[_Asked]) -> Sequence[tuple[Answer, Lesson]]:
        began_s = time.monotonic()
        queries = [asked.query for asked in batch]
        answers = await self._on(self._device, lambda: self.engine.predict(queries))
        rows, streams = sum(len(query.x) for query in queries), len({query.stream for query in queries})
        self.observe_batch([asked.asked_s for asked in batch], began_s, rows, streams)
        return answers

    async def _after(self, batch: Sequence[_Asked], answers: Sequence[tuple[Answer, Lesson]]) -> None:
        if self.mode in ("frozen", "labels"):
            return
        lessons = []
        for asked, (answer, lesson) in zip(batch, answers, strict=True):
            if not asked.adapt:
                self.count_skipped(lesson.rows, "off")
            elif self._is_frozen(lesson.stream):
                self.count_skipped(lesson.rows, "frozen")
            elif answer.unknown is None or not (strange := answer.unknown > self.unknown_above).any():
                lessons.append(lesson)
            else:
                self.count_skipped(int(strange.sum()), "unknown")
                if not strange.all():
                    lessons.append(lesson.only(~strange))
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
            self.count_skipped(sum(len(lesson.x) for lesson in lessons), "failed")
            return
        finally:
            self._stepping = {}
        self.count_learned(learned, time.monotonic() - began_s)

    def _is_frozen(self, stream: str) -> bool:
        record = self.engine.streams.find(stream)
        return record is not None and record.frozen  # of one deleted since, the engine says that it is stale


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax of [n, C]."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return cast(NDArray[np.float32], (e / e.sum(axis=1, keepdims=True)).astype(np.float32))
