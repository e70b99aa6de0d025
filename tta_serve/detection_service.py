"""The use cases around one detector, knowing nothing of HTTP or Ray: find, and route."""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters.detection import Detections
from tta_serve import images
from tta_serve.batching import Batcher
from tta_serve.box_service import BoxService, Routing
from tta_serve.config import RGB
from tta_serve.detection import DetectionEngine, Found, Sight
from tta_serve.engine import AnswerKind, to_unit
from tta_serve.errors import InvalidInput, Overloaded, TooLarge
from tta_serve.learner import Learner, Pools
from tta_serve.metrics import Metrics
from tta_serve.model_service import Limits
from tta_serve.remembered import Key, Memory, Remembered
from tta_serve.router import Routed, route
from tta_serve.views import DEFAULT_STREAM, check_stream
from tta_serve.watch import Reading

log = logging.getLogger(__name__)

ROW_PIXELS = 2**20 * 2 // 3  # of an image that counts as one row


class Prediction(NamedTuple):
    """The answer to one request, in the order of its images."""

    detections: tuple[Detections, ...] | None  # boxes in pixels of each image as it was sent
    frozen_detections: tuple[Detections, ...] | None
    routing: tuple[Routing, ...]
    sizes: tuple[tuple[int, int], ...]  # height, width of each image
    version: str  # `ModelService.version_text`
    incarnation: int = 0  # of the stream; 0: the frozen model answered for it

    @property
    def adapted(self) -> bool:
        return self.detections is not None


class _Asked(NamedTuple):
    sight: Sight
    asked_s: float


class DetectionService(BoxService):
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
        super().__init__(engine, labels, metrics, mode=mode, limits=limits, remembered=remembered)
        self._batcher: Batcher[_Asked, Found] = Batcher(
            self._answer, rows_max=batch_rows_max, queue_rows=queue_rows, afterwards=self._after
        )
        self._learner: Learner | None = None
        if engine.aligner:
            self._learner = Learner(engine.aligner, pools, budget, self.count_learned, self.count_skipped)

    async def start(self) -> None:
        self._batcher.start()
        if self._learner:
            self._learner.start()
        await self.start_syncing()
        self._running = True

    async def stop(self) -> None:
        self._running = False
        await self._batcher.stop()
        await asyncio.to_thread(self._teacher.shutdown, cancel_futures=True)
        if self._learner:
            await asyncio.to_thread(self._learner.stop)
        await self.stop_syncing()
        self._device.shutdown()
        self._decoders.shutdown()
        self._store_threads.shutdown()

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
        record = self.engine.streams.find(stream)
        drift = self.engine.aligner.drift(stream, record.incarnation) if self.engine.aligner and record else None
        return None if drift is None else Reading(drift, math.nan, math.nan, math.nan)

    # -- predict ------------------------------------------------------------------------------------------------------

    async def decode(self, contents: Sequence[bytes]) -> list[Tensor]:
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
        begun = await self.begin(stream)
        try:
            routing = await self.route(x, modality)
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
        version = self.version_text(found.version, found.unsynced)
        return Prediction(found.detections, found.frozen_detections, routing, sizes, version, found.incarnation)

    async def route(self, x: Sequence[Tensor], modality: str | None) -> tuple[Routing, ...]:
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
        sights = [asked.sight for asked in batch]
        answers = await self._on(self._device, lambda: self.engine.predict(sights))
        rows, streams = sum(len(sight.images) for sight in sights), len({sight.stream for sight in sights})
        self.observe_batch([asked.asked_s for asked in batch], began_s, rows, streams)
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


def rows_of(images: Sequence[Tensor]) -> int:
    """What a request counts for in a batch and in the queue: a large image is as much work and memory as several.

    >>> rows_of([torch.zeros(3, 480, 640), torch.zeros(3, 1080, 1920)])
    4
    """
    return sum(math.ceil(image.shape[-2] * image.shape[-1] / ROW_PIXELS) for image in images)


def _to_bytes(image: Tensor) -> Tensor:
    """As the router reads it: uint8."""
    return image if image.dtype == torch.uint8 else (to_unit(image) * 255).round().clamp(0, 255).to(torch.uint8)
