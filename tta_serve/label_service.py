"""What a classifier is told while it serves: labels, and what of them to forget."""

import asyncio
import reprlib
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tta_serve.audit import Scope
from tta_serve.engine import Answer, Engine
from tta_serve.errors import InvalidInput, NotFound, Overloaded
from tta_serve.heads import Heads, Told, View
from tta_serve.metrics import Metrics
from tta_serve.model_service import Commanded, Deleted, Limits, ModelService
from tta_serve.receipts import Receipt
from tta_serve.remembered import Key, Memory, Remembered
from tta_serve.views import check_stream

LABEL_LENGTH_MAX = 100
LABELS_WAITING_MAX = 1024  # more gets 429
FORGETS_WAITING_MAX = 16  # each writes the store's file anew

Outcome = Literal["applied", "repeated", "frozen", "stale"]


class Label(NamedTuple):
    """What is in one image: of an earlier prediction, or with the image itself."""

    label: str | int  # a name, or the index of a class that there is
    id: str | None  # of the prediction, or what the client wants to call this; None: what the server calls it
    place: int = 0  # which image of that prediction
    image: bytes | None = None  # the picture


class Taken(NamedTuple):
    """What came of one label."""

    outcome: Outcome
    id: str
    place: int
    label: str
    predicted: str | None  # the answer before it was learned; None where it is no longer known
    right: bool | None


class Asking(NamedTuple):
    """An image that a person should look at."""

    id: str  # of the prediction
    place: int  # which of its images
    unknown: float  # 0 … 1
    predicted: str | None  # None: a class that was forgotten since
    age_s: float  # since it was predicted


class _Seen(NamedTuple):
    """An image, as far as a head sees it."""

    features: Tensor | None  # [F]; None where it was told before
    predicted: str | None
    incarnation: int  # of the stream when it answered


class Forgotten(NamedTuple):
    """What came of forgetting labels."""

    receipt: Receipt
    number: int = 0  # of the change in the store
    waiting: tuple[str, ...] = ()  # live replicas that it had not reached in time


class LabelService(ModelService):
    """One classifier's feedback.

    Args:
        engine: the model and its states.
        labels: the model's own classes.
        metrics: where everything is counted.
        mode: see `Service`.
        limits: of one request.
        remembered: what feedback may name by its prediction.
        unknown_above: see `Service`.
    """

    def __init__(
        self,
        engine: Engine,
        labels: tuple[str, ...],
        metrics: Metrics,
        *,
        mode: str,
        limits: Limits,
        remembered: Remembered,
        unknown_above: float,
    ) -> None:
        super().__init__(engine.streams, labels, metrics, mode=mode, limits=limits)
        self.engine = engine
        self.unknown_above = unknown_above
        self._remembered = remembered  # touched by the event loop's thread alone
        self._teacher = ThreadPoolExecutor(1, "tta-teacher", initializer=engine.prepare_thread)
        self._waiting_labels = 0
        self._waiting_forgets = 0
        for stream in engine.heads.streams() if engine.heads else ():
            engine.streams.adopt(stream)

    @abstractmethod
    async def decode(self, contents: Sequence[bytes]) -> Tensor:
        """Decode pictures into uint8 [n, 3, H, W].

        Raises:
            TooLarge, InvalidInput: see `images.decode`.
            Unavailable: the service is not running.
        """

    @abstractmethod
    async def look(self, x: Tensor, stream: str) -> tuple[Answer, int]:
        """Answer with features, learning nothing from the images; and the stream's incarnation."""

    def labels_of(self, stream: str) -> tuple[str, ...]:
        """The classes that a stream can be answered with, by index; they grow with the labels that it is told.

        Raises:
            InvalidInput: a bad stream name.
        """
        check_stream(stream)
        return self.engine.heads.labels_of(stream) if self.engine.heads else self.labels

    def read_with(self, stream: str) -> View:
        """What a stream's images are read with.

        Raises:
            InvalidInput: nothing here learns from labels.
        """
        self._check_learns()
        assert self.engine.heads is not None
        return self.engine.heads.view(stream)

    def remember(self, id: str, stream: str, answer: Answer, incarnation: int) -> None:
        """Keep what labels may come for."""
        record = self.engine.streams.find(stream)
        if answer.features is None or answer.logits is None or record is None or record.incarnation != incarnation:
            return  # a stream that was deleted meanwhile leaves nothing behind
        labels = (*self.labels, *answer.added)
        said = tuple(labels[i] for i in answer.logits.argmax(axis=1))
        unknown = () if answer.unknown is None else tuple(answer.unknown.tolist())
        memory = Memory(tuple(answer.features), said, incarnation, time.monotonic(), unknown=unknown)
        self._remembered.keep(Key(stream, id), memory)

    def drop_remembered(self, stream: str) -> None:
        """Forget the features of a stream's predictions."""
        self._remembered.forget(stream)

    def queries(self, stream: str, limit: int) -> list[Asking]:
        """Images of a stream that look like nothing known and have no label yet, the strangest first.

        Raises:
            InvalidInput: a bad stream name, or nothing here says what is unknown, or remembers it.
        """
        check_stream(stream)
        if self.engine.open_set is None or self.engine.heads is None:
            raise InvalidInput("nothing is asked here; give the model `open_set` and the adapter kv_bottleneck")
        now_s = time.monotonic()
        asking = [
            Asking(id, place, unknown, memory.said[place], now_s - memory.at_s)
            for id, memory in self._remembered.of(stream, now_s)
            for place, unknown in enumerate(memory.unknown)
            if unknown > self.unknown_above and place not in memory.used
        ]
        return sorted(asking, key=lambda each: (-each.unknown, each.age_s))[:limit]

    async def teach(self, items: Sequence[Label], stream: str, scope: Scope) -> list[Taken]:
        """Learn labels, at once: durable, and in effect for the next prediction, when this returns.

        Args:
            items: what is in which image.
            stream: that the images are of.
            scope: whom it shall change.

        Returns:
            What came of each item, in order.

        Raises:
            InvalidInput: a label or a picture is wrong. Nothing was learned then, of any item; nor after what follows.
            NotFound: no such stream, or a prediction is not remembered.
            TooLarge: a class more than there may be, or more images than a request may hold.
            Overloaded, Unavailable: too much waits; not running, or the store is not.
        """
        self.check_running()
        check_stream(stream)
        self._check_learns()
        self.check_count(len(items))
        if self._waiting_labels and self._waiting_labels + len(items) > LABELS_WAITING_MAX:
            raise Overloaded(f"{self._waiting_labels} labels wait; the limit is {LABELS_WAITING_MAX}", 1.0)
        known = await self.off_loop(lambda: self.labels_of(stream))
        named = [item._replace(label=label_of(item.label, known), id=item.id or self.new_id()) for item in items]
        self._waiting_labels += len(named)  # before anything is waited for
        try:
            seen = await self._see(named, stream)
        except BaseException:
            self._waiting_labels -= len(named)
            raise
        named = [item._replace(image=None) for item in named]  # it was looked at, and is no longer needed
        # a client that leaves now shall not leave half of it done, and its labels wait until they are learned
        return await asyncio.shield(self._learn(named, seen, stream, scope))

    async def forget(
        self, stream: str, *, ids: Sequence[str] = (), label: str | None = None, everywhere: bool = False
    ) -> Forgotten:
        """Take exactly the effect of some labels out.

        Args:
            stream: that told them.
            ids: of its predictions; or
            label: a class.
            everywhere: of the class, what all streams of the namespace told.

        Raises:
            InvalidInput: a bad stream name, or nothing here learns from labels.
            NotFound: nothing of the kind was told.
            Overloaded, Unavailable: too many wait; not running, or the store is not.
        """
        self.check_running()
        check_stream(stream)
        self._check_learns()
        heads = self.engine.heads
        assert heads is not None
        if self._waiting_forgets >= FORGETS_WAITING_MAX:
            raise Overloaded(f"{self._waiting_forgets} requests to forget wait; that is the limit", 1.0)
        self._waiting_forgets += 1
        try:
            receipt = await self._forget(heads, stream, ids, label, everywhere)
        finally:
            self._waiting_forgets -= 1
        sync = self.sync
        # the log says what was forgotten; the notice, who has looked at the log since
        number = await self.with_store(lambda: sync.announce("labels")) if sync else 0
        return Forgotten(receipt, number, await self.everywhere(number))

    async def _forget(
        self, heads: Heads, stream: str, ids: Sequence[str], label: str | None, everywhere: bool
    ) -> Receipt:
        began_s = time.monotonic()
        if label is not None:
            receipt = await self._on(self._teacher, lambda: heads.forget_class(stream, label, everywhere=everywhere))
        else:
            receipt = await self._on(self._teacher, lambda: heads.forget_ids(stream, ids))
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="forget")
        if not receipt.removed and not receipt.foreign:
            what = f"the class {label[:100]!r}" if label is not None else f"the predictions {reprlib.repr(list(ids))}"
            raise NotFound(f"stream {stream!r} told nothing of {what}")
        self.metrics.count("tta_forgotten_labels_total", receipt.removed + receipt.foreign)
        self._remembered.unsay(receipt.classes)
        for id in ids:
            if memory := self._remembered.find(Key(stream, id), time.monotonic()):
                memory.used = frozenset()  # it may be asked about again
        return receipt

    async def reset(self, stream: str) -> Commanded:
        heads = self.engine.heads
        if heads is None:
            return await super().reset(stream)
        _, number = await self._end_life(stream, heads.reset, lambda stream: self.engine.streams.reset(stream)[1])
        waiting = await self.everywhere(number)
        return Commanded(await self.with_store(lambda: self.view(stream)), number, waiting)

    async def delete(self, stream: str) -> Deleted:
        heads = self.engine.heads
        if heads is None:
            return await super().delete(stream)
        receipt, number = await self._end_life(stream, heads.delete, self.engine.streams.delete)
        return Deleted(receipt, number, await self.everywhere(number))

    async def stop_teaching(self) -> None:
        """Learn and forget what is under way, and let go of the store; a second time changes nothing."""
        await asyncio.to_thread(self._teacher.shutdown, cancel_futures=True)
        if self.engine.heads is not None:
            self.engine.heads.close()

    async def _end_life(
        self, stream: str, forget: Callable[[str], Receipt], command: Callable[[str], int]
    ) -> tuple[Receipt, int]:
        """First what was told, and then the rest: where the store fails, nothing has changed and it can be tried again.

        In the thread that teaches, so that nothing is learned in between. A client that leaves does not stop it
        half-way.
        """
        check_stream(stream)

        def end() -> tuple[Receipt, int]:
            self.engine.streams.record(stream)  # it exists
            receipt = forget(stream)
            return receipt, command(stream)

        async def ended() -> tuple[Receipt, int]:
            done = await self._on(self._teacher, end)
            self.drop_pending(stream)
            return done

        return await asyncio.shield(ended())

    def _check_learns(self) -> None:
        if self.engine.heads is None:
            raise InvalidInput("this model learns from no labels; give it the adapter kv_bottleneck")

    async def _see(self, items: Sequence[Label], stream: str) -> list[_Seen]:
        """What there is to learn from, of each item. Nothing has changed yet, but that pictures begin their stream."""
        pictures = [item.image for item in items if item.image is not None]
        if not pictures:
            self.engine.streams.record(stream)  # it exists
        recalled = iter([await self._recall(item, stream) for item in items if item.image is None])
        looked = iter(await self._look_at(pictures, stream) if pictures else [])
        return [next(recalled if item.image is None else looked) for item in items]

    async def _recall(self, item: Label, stream: str) -> _Seen:
        heads = self.engine.heads
        assert heads is not None
        id = item.id or ""
        memory = self._remembered.find(Key(stream, id), time.monotonic())
        if memory is None:
            if await self._on(self._teacher, lambda: heads.has(stream, id, item.place)):
                return _Seen(None, None, 0)
            raise NotFound(
                f"no prediction {id[:100]!r} of stream {stream!r} is remembered "
                "(feedback.remember_images and remember_s say how many and how long); send the image with its label"
            )
        if not 0 <= item.place < len(memory.images):
            raise InvalidInput(
                f"the index is {item.place}, and the prediction {id[:100]!r} has {len(memory.images)} images"
            )
        return _Seen(memory.images[item.place], memory.said[item.place], memory.incarnation)

    async def _look_at(self, pictures: Sequence[bytes], stream: str) -> list[_Seen]:
        x = await self.decode(pictures)
        answer, incarnation = await self.look(x, stream)
        assert answer.features is not None
        assert answer.logits is not None
        labels = (*self.labels, *answer.added)
        said = [labels[i] for i in answer.logits.argmax(axis=1)]
        return [_Seen(features, label, incarnation) for features, label in zip(answer.features, said, strict=True)]

    async def _learn(self, items: Sequence[Label], seen: Sequence[_Seen], stream: str, scope: Scope) -> list[Taken]:
        began_s = time.monotonic()
        try:
            outcomes = await self._on(self._teacher, lambda: self._learn_now(items, seen, stream, scope))
        finally:
            self._waiting_labels -= len(items)
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="teach")
        taken = []
        for item, each, outcome in zip(items, seen, outcomes, strict=True):
            right = None if each.predicted is None else each.predicted == item.label
            taken.append(Taken(outcome, item.id or "", item.place, str(item.label), each.predicted, right))
            self.metrics.count("tta_labels_total", result=outcome)
            memory = self._remembered.find(Key(stream, item.id or ""), time.monotonic())
            if memory and outcome in ("applied", "repeated"):
                memory.used |= {item.place}  # nobody need be asked any more
            if outcome == "applied" and right is not None:
                self.metrics.count("tta_prequential_labels_total", right="true" if right else "false")
        return taken

    def _learn_now(self, items: Sequence[Label], seen: Sequence[_Seen], stream: str, scope: Scope) -> list[Outcome]:
        """In the thread that teaches, where nothing else changes a head."""
        heads = self.engine.heads
        assert heads is not None
        record = self.engine.streams.find(stream)
        outcomes: list[Outcome] = ["repeated"] * len(items)
        fresh: list[int] = []
        for i, each in enumerate(seen):
            if each.features is None or heads.has(stream, items[i].id or "", items[i].place):
                continue
            if record is None or record.incarnation != each.incarnation:
                outcomes[i] = "stale"
            elif record.frozen:
                outcomes[i] = "frozen"
            else:
                fresh.append(i)
        if fresh:
            features = torch.stack([each.features for each in (seen[i] for i in fresh) if each.features is not None])
            codes = heads.head.encode(features.to(self.engine.device)).cpu()
            told = [
                Told(items[i].id or "", items[i].place, str(items[i].label), code, _right(items[i], seen[i]))
                for i, code in zip(fresh, codes, strict=True)
            ]
            for i, new in zip(fresh, heads.learn(stream, scope, told), strict=True):
                outcomes[i] = "applied" if new else "repeated"
        return outcomes


def _right(item: Label, seen: _Seen) -> bool | None:
    return None if seen.predicted is None else seen.predicted == item.label


def label_of(label: str | int, known: Sequence[str]) -> str:
    """The name of a class given by name, known or not, or by the index of one that there is.

    >>> label_of("glyph", ["0", "1"]), label_of(1, ["0", "1"])
    ('glyph', '1')

    Raises:
        InvalidInput: there is no such index, or this cannot name a class.
    """
    if isinstance(label, int):
        if not 0 <= label < len(known):
            raise InvalidInput(f"there is no class {label!s:.40}; give a name, or an index, 0 … {len(known) - 1}")
        return known[label]
    if label in known:
        return label
    if not 0 < len(label) <= LABEL_LENGTH_MAX or not label.isprintable() or label != label.strip():
        raise InvalidInput(
            f"{label[:200]!r} cannot name a class: 1 to {LABEL_LENGTH_MAX} printable characters, no space at the ends"
        )
    return label
