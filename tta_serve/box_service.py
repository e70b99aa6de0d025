"""What a detector is taught while it serves: boxes, and other translators."""

import os
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tta_serve.box_lessons import Shown, Taught
from tta_serve.config import RGB
from tta_serve.detection import DetectionEngine
from tta_serve.errors import Forbidden, InvalidInput, NotFound, Overloaded, TooLarge
from tta_serve.feedback import Feedback, check_boxes
from tta_serve.metrics import Metrics
from tta_serve.modalities import Modality, described
from tta_serve.model_service import Limits, ModelService
from tta_serve.remembered import Key, Memory, Remembered
from tta_serve.views import check_stream

LESSONS_MAX = 64  # images whose feedback may wait; more gets 429, and more in one request 413

Decided = Literal["named", "recognised"]


class Routing(NamedTuple):
    """Which translator an image got, and why."""

    modality: str  # `rgb`: none
    decided: Decided  # by the client or by the router
    confidence: float  # of the router; 1 where the client said so
    translator_version: int = 0  # of the weights that the translator had when it answered; 0 without one


class BoxService(ModelService):
    """One detector's feedback and translators.

    Args:
        engine: the detector, its translators and its states.
        labels: by the indices that it answers.
        metrics: where everything is counted.
        mode: `async`, or `frozen` where nothing is learned.
        limits: of one request.
        remembered: images that feedback may name by their prediction.
    """

    def __init__(
        self,
        engine: DetectionEngine,
        labels: tuple[str, ...],
        metrics: Metrics,
        *,
        mode: str,
        limits: Limits,
        remembered: Remembered,
    ) -> None:
        super().__init__(engine.streams, labels, metrics, mode=mode, limits=limits)
        self.engine = engine
        self._device = ThreadPoolExecutor(1, "tta-device", initializer=engine.prepare_thread)
        self._teacher = ThreadPoolExecutor(1, "tta-teacher", initializer=self._prepare_teacher)
        self._remembered = remembered  # touched by the event loop's thread alone
        self._lessons: dict[str, int] = {}  # images of each stream that wait or are being learned from

    def _prepare_teacher(self) -> None:
        self.engine.prepare_thread()
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    @abstractmethod
    async def decode(self, contents: Sequence[bytes]) -> list[Tensor]:
        """Decode pictures into uint8 [C, H, W] each, C 1 or 3, of their own sizes.

        Raises:
            TooLarge, InvalidInput: see `images.decode_whole`; or they have too many pixels together.
            Unavailable: the service is not running.
        """

    @abstractmethod
    async def route(self, x: Sequence[Tensor], modality: str | None) -> tuple[Routing, ...]:
        """Which translator each image gets: the one that is named, or else the one that its router recognises."""

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
                (routing,) = await self.route([image], modality)
                name, life = routing.modality, incarnation
            else:
                memory = self._find(item, stream)
                image, life = memory.images[item.place], memory.incarnation
                name = memory.said[item.place] or RGB
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
            self._check_alone()
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

        def delete() -> None:
            self._check_alone()
            self._replace(name, None)

        await self._on(self._teacher, delete)

    def _check_alone(self) -> None:
        """Raise while other replicas live: they would go on with other translators, and other states."""
        if self.sync is not None and self.sync.others():
            raise Forbidden(
                "several replicas live, and each has the translators of the configuration file; change that, and run "
                "`tta-serve up` again"
            )

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
