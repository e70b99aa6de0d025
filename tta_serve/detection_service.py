"""The use cases around one detector, knowing nothing of HTTP or Ray: find, route, and learn from boxes."""

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.detection import Detections
from tta_serve import images
from tta_serve.batching import Batcher
from tta_serve.box_lessons import Shown, Taught
from tta_serve.config import RGB
from tta_serve.detection import DetectionEngine, Found, Sight
from tta_serve.engine import AnswerKind, to_unit
from tta_serve.errors import InvalidInput, NotFound, Overloaded, TooLarge
from tta_serve.feedback import Feedback, check_boxes
from tta_serve.learner import Learner, Pools
from tta_serve.metrics import Metrics
from tta_serve.modalities import Modality, described
from tta_serve.model_service import Limits, ModelService
from tta_serve.remembered import Key, Memory, Remembered
from tta_serve.router import Routed, route
from tta_serve.views import DEFAULT_STREAM, check_stream
from tta_serve.watch import Reading

log = logging.getLogger(__name__)

ROW_PIXELS = 2**20 * 2 // 3  # of an image that counts as one row
LESSONS_MAX = 64  # images whose feedback may wait; more gets 429, and more in one request 413

Decided = Literal["named", "recognised"]


class Routing(NamedTuple):
    """Which translator an image got, and why."""

    modality: str  # `rgb`: none
    decided: Decided  # by the client or by the router
    confidence: float  # of the router; 1 where the client said so
    translator_version: int = 0  # of the weights that the translator had when it answered; 0 without one


class Prediction(NamedTuple):
    """The answer to one request, in the order of its images."""

    detections: tuple[Detections, ...] | None  # boxes in pixels of each image as it was sent
    frozen_detections: tuple[Detections, ...] | None
    routing: tuple[Routing, ...]
    sizes: tuple[tuple[int, int], ...]  # height, width of each image
    version: int

    @property
    def adapted(self) -> bool:
        return self.detections is not None


class _Asked(NamedTuple):
    sight: Sight
    asked_s: float


class DetectionService(ModelService):
    """One detector: images in, boxes out, feedback beside.

    Args:
        engine: the detector, its translators and its states.
        labels: by the indices that it answers.
        metrics: where everything is counted.
        mode: `async`, or `frozen` where nothing is learned.
        limits: of one request.
        batch_rows_max, queue_rows: see `batching.Waiting`.
        remembered: images that feedback may name by their prediction.
        pools, budget: of the learner that aligns streams; read where the engine does so.
    """

    def __init__(
        self,
        engine: DetectionEngine,
        labels: tuple[str, ...],
        metrics: Metrics,
        *,
        mode: str,
        limits: Limits,
        batch_rows_max: int,
        queue_rows: int,
        remembered: Remembered,
        pools: Pools,
        budget: float,
    ) -> None:
        super().__init__(engine.streams, labels, metrics, mode=mode, limits=limits)
        self.engine = engine
        self._batcher: Batcher[_Asked, Found] = Batcher(
            self._answer, rows_max=batch_rows_max, queue_rows=queue_rows, afterwards=self._after
        )
        self._device = ThreadPoolExecutor(1, "tta-device", initializer=engine.prepare_thread)
        self._teacher = ThreadPoolExecutor(1, "tta-teacher", initializer=self._prepare_teacher)
        self._remembered = remembered  # touched by the event loop's thread alone
        self._learner: Learner | None = None
        if engine.aligner:
            self._learner = Learner(engine.aligner, pools, budget, self.count_learned, self.count_skipped)
        self._lessons: dict[str, int] = {}  # images of each stream that wait or are being learned from

    def _prepare_teacher(self) -> None:
        self.engine.prepare_thread()
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    async def start(self) -> None:
        self._batcher.start()
        if self._learner:
            self._learner.start()
        self._running = True

    async def stop(self) -> None:
        self._running = False
        await self._batcher.stop()
        await asyncio.to_thread(self._teacher.shutdown, cancel_futures=True)
        if self._learner:
            await asyncio.to_thread(self._learner.stop)
        self._device.shutdown()
        self._decoders.shutdown()

    @property
    def waiting_rows(self) -> int:
        return self._batcher.waiting_rows

    def pending_rows(self, stream: str | None = None) -> int:
        waiting = self._learner.pending_rows(stream) if self._learner else 0
        return waiting + (sum(self._lessons.values()) if stream is None else self._lessons.get(stream, 0))

    def drop_pending(self, stream: str) -> None:
        # feedback that waits is of the old life, and is found stale
        self._remembered.forget(stream)
        if self._learner:
            self._learner.forget(stream)

    def reading(self, stream: str) -> Reading | None:
        incarnation = self.engine.streams.record(stream).incarnation
        drift = self.engine.aligner.drift(stream, incarnation) if self.engine.aligner else None
        return None if drift is None else Reading(drift, math.nan, math.nan, math.nan)

    # -- predict ------------------------------------------------------------------------------------------------------

    async def decode(self, contents: Sequence[bytes]) -> list[Tensor]:
        """Decode pictures into uint8 [C, H, W] each, C 1 or 3, of their own sizes.

        Raises:
            TooLarge, InvalidInput: see `images.decode_whole`.
            Unavailable: the service is not running.
        """
        self.check_running()
        self.check_count(len(contents))
        began_s = time.monotonic()
        limit = self.limits.image_pixels

        def decode_all() -> list[Tensor]:
            # from their headers: a hundred kilobytes may be a hundred megapixels
            self.check_pixels(sum(images.pixels_of(content, limit) for content in contents))
            return [images.decode_whole(content, limit) for content in contents]

        x = await self._on(self._decoders, decode_all)
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="decode")
        return x

    def to_images(self, array: NDArray[Any]) -> list[Tensor]:
        """Check a client's tensor and take it as images.

        Args:
            array: [n, C, H, W], C 3 (RGB) or 1; uint8 0 … 255, or floats in [0, 1].

        Raises:
            InvalidInput: another shape, dtype or range, NaN or infinity; the message names value and limit.
            TooLarge: more images, or larger ones, than a request may hold.
        """
        if array.ndim != 4 or array.shape[1] not in (1, 3):
            raise InvalidInput(
                f"the input has shape {list(array.shape)}; a detector reads [n, 3, height, width], or "
                "[n, 1, height, width] of one channel"
            )
        self.check_count(len(array))
        pixels = array.shape[2] * array.shape[3]
        if pixels > self.limits.image_pixels:
            raise TooLarge(
                f"the images are {array.shape[3]}×{array.shape[2]}, {pixels} pixels each; the limit is "
                f"{self.limits.image_pixels} (limits.image_pixels)"
            )
        self.check_pixels(pixels * len(array))
        return list(torch.from_numpy(images.checked_range(array)))

    def check_pixels(self, pixels: int) -> None:
        """Raise TooLarge unless a request's images may have so many pixels together."""
        if pixels > self.limits.request_pixels:
            raise TooLarge(
                f"the request's images have {pixels} pixels together; the limit is {self.limits.request_pixels} "
                "(limits.request_pixels)"
            )

    def check_modality(self, name: str | None) -> str | None:
        """The modality that a client names, if there is such a translator.

        Raises:
            InvalidInput: there is none.
        """
        known = [RGB, *self.engine.modalities]
        if name is not None and name not in known:
            raise InvalidInput(
                f"there is no translator for the modality {name[:100]!r}; there are {', '.join(known)} (leave it out "
                "to have the modality recognised)"
            )
        return name

    async def predict(
        self,
        x: Sequence[Tensor],
        stream: str = DEFAULT_STREAM,
        *,
        id: str,
        modality: str | None = None,
        adapt: bool = True,
        answer: AnswerKind = "adapted",
    ) -> Prediction:
        """Answer one request.

        Args:
            x: from `decode` or `to_images`.
            stream: its name.
            id: of the prediction, for feedback.
            modality: of all images; None: each is recognised by itself.
            adapt: whether the request may be remembered for feedback.
            answer: whose answer.

        Raises:
            InvalidInput: a bad stream name, or an unknown modality.
            Overloaded: no room for the request or for a new stream.
        """
        check_stream(stream)
        self.check_modality(modality)
        begun = self.engine.streams.begin(stream)
        try:
            routing = await self._route(x, modality)
            sight = Sight(tuple(x), tuple(each.modality for each in routing), stream, answer, adapt)
            found = await self._batcher.submit(_Asked(sight, time.monotonic()), rows=rows_of(x))
        except Overloaded:
            if begun:  # a request that was refused leaves no stream behind
                self.engine.streams.take_back(stream, begun)
            raise
        self.metrics.count("tta_images_total", len(x))
        for each in found.modalities:
            self.metrics.count("tta_modality_images_total", modality=each)
        record = self.engine.streams.find(stream)
        if adapt and self.mode != "frozen" and record is not None and record.incarnation == found.incarnation:
            memory = Memory(tuple(x), found.modalities, found.incarnation, time.monotonic())
            self._remembered.keep(Key(stream, id), memory)
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in x)
        # a translator may have been deleted since it was routed to
        routing = tuple(
            each._replace(modality=used, translator_version=version)
            for each, used, version in zip(routing, found.modalities, found.translator_versions, strict=True)
        )
        return Prediction(found.detections, found.frozen_detections, routing, sizes, found.version)

    async def _route(self, x: Sequence[Tensor], modality: str | None) -> tuple[Routing, ...]:
        if modality is not None:
            return tuple(Routing(modality, "named", 1.0) for _ in x)
        routers = {name: each.router for name, each in self.engine.modalities.items() if each.router is not None}
        if not routers:
            return tuple(Routing(RGB, "recognised", 1.0) for _ in x)
        least = self.engine.settings.router_confidence
        began_s = time.monotonic()

        def route_all() -> list[Routed]:
            return [route(_to_bytes(image), routers, least) for image in x]

        routed = await self._on(self._decoders, route_all)
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="route")
        return tuple(Routing(each.modality, "recognised", each.confidence) for each in routed)

    async def _answer(self, batch: Sequence[_Asked]) -> Sequence[Found]:
        began_s = time.monotonic()
        for asked in batch:
            self.metrics.observe("tta_stage_seconds", began_s - asked.asked_s, stage="queue")
        sights = [asked.sight for asked in batch]
        answers = await self._on(self._device, lambda: self.engine.predict(sights))
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="predict")
        self.metrics.observe("tta_batch_rows", sum(len(sight.images) for sight in sights))
        self.metrics.observe("tta_batch_streams", len({sight.stream for sight in sights}))
        return answers

    async def _after(self, batch: Sequence[_Asked], answers: Sequence[Found]) -> None:
        if self._learner is None:
            return
        for asked, found in zip(batch, answers, strict=True):
            if not asked.sight.adapt:
                self.count_skipped(len(asked.sight.images), "off")
                continue
            for lesson in found.lessons:
                self._learner.offer(lesson)

    # -- learn --------------------------------------------------------------------------------------------------------

    async def teach(self, items: Sequence[Feedback], stream: str, modality: str | None) -> list[Taught]:
        """Learn from boxes, at once: in effect for the next prediction when this returns.

        Args:
            items: what is in which image.
            stream: that the images are of.
            modality: of images that come with their boxes; None: each is recognised. Remembered ones keep theirs.

        Returns:
            What came of each item, in order.

        Raises:
            InvalidInput: boxes, labels, picture or modality are wrong. Nothing was learned then, of any item.
            NotFound: no such stream, or a prediction is not remembered.
            Forbidden, Overloaded, Unavailable: nothing learns here; too much waits; not running.
        """
        self.check_running()
        check_stream(stream)
        self.check_modality(modality)
        self.check_count(len(items))
        if self.mode == "frozen" or self.engine.settings.learns == "nothing":
            raise InvalidInput("this model learns from no feedback (adapter: source, or modtr with learns: nothing)")
        if len(items) > LESSONS_MAX:
            raise TooLarge(f"feedback for {len(items)} images in one request; the limit is {LESSONS_MAX}")
        waiting = sum(self._lessons.values())
        if waiting + len(items) > LESSONS_MAX:
            raise Overloaded(f"feedback for {waiting} images waits; the limit is {LESSONS_MAX}", 1.0)
        incarnation = self.engine.streams.record(stream).incarnation
        self._lessons[stream] = self._lessons.get(stream, 0) + len(items)  # before anything is waited for
        try:
            lessons = await self._lessons_of(items, stream, incarnation, modality)
            return [await self._teach(lesson) for lesson in lessons]
        finally:
            self._lessons[stream] -= len(items)
            if not self._lessons[stream]:
                del self._lessons[stream]

    async def _teach(self, lesson: "_Lesson") -> Taught:
        if lesson.memory and lesson.place in lesson.memory.used:
            return Taught(None, None)  # the same feedback again changes nothing
        if lesson.memory:
            lesson.memory.used |= {lesson.place}
        began_s = time.monotonic()
        try:
            taught = await self._on(self._teacher, lambda: self.engine.boxes.learn(lesson.shown))
        except Exception:
            self._may_come_again(lesson)
            raise
        # (of a client that has left meanwhile the step runs on, and its feedback stays used)
        if taught.stream and taught.stream.result in ("stale", "frozen"):
            self._may_come_again(lesson)
        self._count(taught, time.monotonic() - began_s)
        return taught

    def _may_come_again(self, lesson: "_Lesson") -> None:
        if lesson.memory:
            lesson.memory.used -= {lesson.place}

    def _count(self, taught: Taught, took_s: float) -> None:
        if taught.stream:
            self.count_learned([taught.stream], took_s)
        else:
            self.metrics.observe("tta_stage_seconds", took_s, stage="learn")
            self.metrics.count("tta_learned_rows_total")
        for guard in taught.modality.trips if taught.modality else ():
            self.metrics.count("tta_guard_trips_total", guard=guard)

    async def _lessons_of(
        self, items: Sequence[Feedback], stream: str, incarnation: int, modality: str | None
    ) -> list["_Lesson"]:
        sent = [item.image for item in items if item.image is not None]
        pictures = iter(await self.decode(sent) if sent else [])
        lessons: list[_Lesson] = []
        for item in items:
            if item.image is not None:
                image, memory = next(pictures), None
                (routing,) = await self._route([image], modality)
                name, life = routing.modality, incarnation
            else:
                memory = self._find(item, stream)
                image, name, life = memory.images[item.place], memory.modalities[item.place], memory.incarnation
            if name == RGB:
                raise InvalidInput(
                    "this image is not translated (its modality is rgb), so there is nothing that its boxes could "
                    f"teach; name the modality if it is one of {', '.join(self.engine.modalities) or 'none'}"
                )
            size = (image.shape[-2], image.shape[-1])
            boxes = await self.off_loop(lambda: check_boxes(item, size, self.labels))  # noqa: B023  # awaited here
            lessons.append(_Lesson(Shown((image,), (boxes,), name, stream, life), memory, item.place))
        return lessons

    def _find(self, item: Feedback, stream: str) -> Memory:
        memory = self._remembered.find(Key(stream, item.id or ""), time.monotonic())
        if memory is None:
            raise NotFound(
                f"no prediction {str(item.id)[:100]!r} of stream {stream!r} is remembered "
                "(feedback.remember_images and remember_s say how many and how long); send the image with its boxes"
            )
        if not 0 <= item.place < len(memory.images):
            raise InvalidInput(f"the index is {item.place}, and that prediction has {len(memory.images)} images")
        return memory

    async def put_translator(self, name: str, content: bytes) -> dict[str, Any]:
        """Serve another translator for a modality, from the next batch on.

        Raises:
            InvalidInput: the file is none, or for another detector or modality. Nothing has changed then.
            Unavailable: the service is not running.
        """
        self.check_running()

        def put() -> Modality:
            modality = self.engine.put(name, content)
            self._replace(name, modality)
            return modality

        return described(await self._on(self._teacher, put))

    async def delete_translator(self, name: str) -> None:
        """Translate a modality no longer.

        Raises:
            NotFound: it is not translated.
            Unavailable: the service is not running.
        """
        self.check_running()
        await self._on(self._teacher, lambda: self._replace(name, None))

    def _replace(self, name: str, modality: Modality | None) -> None:
        """In the thread that learns, while the thread that predicts is at it: neither does anything else meanwhile."""
        self._device.submit(self.engine.replace, name, modality).result()

    def translators(self) -> Mapping[str, dict[str, Any]]:
        """What there is to say of each modality."""
        return {name: described(modality) for name, modality in self.engine.modalities.items()}


class _Lesson(NamedTuple):
    shown: Shown
    memory: Memory | None  # of the prediction that it is for
    place: int  # of the image there


def rows_of(images: Sequence[Tensor]) -> int:
    """What a request counts for in a batch and in the queue: a large image is as much work and memory as several.

    >>> rows_of([torch.zeros(3, 480, 640), torch.zeros(3, 1080, 1920)])
    4
    """
    return sum(math.ceil(image.shape[-2] * image.shape[-1] / ROW_PIXELS) for image in images)


def _to_bytes(image: Tensor) -> Tensor:
    """As the router reads it: uint8."""
    return image if image.dtype == torch.uint8 else (to_unit(image) * 255).round().clamp(0, 255).to(torch.uint8)
