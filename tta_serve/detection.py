"""A detector, its translators and the live states of its streams: look, and learn from boxes.

What `engine.py` is for classifiers. `predict` and `learn` may run in two threads at once: what answers is a value,
taken once for a batch and swapped whole; states are kept as there (`states.py`).
"""

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import Batch, Groups, PipelineState, Report, optim, tree
from adapters.detection import Boxes, Detections
from adapters.modtr import ModTrState
from adapters.translator import with_channels
from tta_serve import modalities, translators
from tta_serve.config import RGB, ModTrSettings
from tta_serve.detectors import Detector, Size, scale_boxes
from tta_serve.engine import PULL_SHARE, AnswerKind, to_unit
from tta_serve.errors import InvalidInput, NotFound
from tta_serve.judging import Learned, counts_of, judge
from tta_serve.modalities import Modality, SharedStep
from tta_serve.monitor import Forgotten
from tta_serve.snapshots import Snapshots
from tta_serve.states import Held, States, row_of
from tta_serve.streams import StreamRecord

log = logging.getLogger(__name__)

MODALITIES_MAX = 16  # a stream has a state for each
PIXELS_MAX = 8 * 800 * 1344  # of one forward: eight of torchvision's usual images


class Sight(NamedTuple):
    """One request's images."""

    images: tuple[Tensor, ...]  # uint8, or float32 in [0, 1]; [C, H, W] each, C 1 or 3; on the host
    modalities: tuple[str, ...]  # of each
    stream: str
    answer: AnswerKind = "adapted"


class Found(NamedTuple):
    """What one request gets."""

    detections: tuple[Detections, ...] | None  # in each image; None where only the frozen answer was asked for
    frozen_detections: tuple[Detections, ...] | None  # without a translator; None where only the other was asked for
    modalities: tuple[str, ...]  # of each image, whose translator was used
    translator_versions: tuple[int, ...]  # of the weights that this translator had; 0 without one
    version: int  # of the state that answered
    incarnation: int


class Shown(NamedTuple):
    """Images of one stream and one modality whose boxes are known."""

    images: tuple[Tensor, ...]  # as in `Sight`
    boxes: tuple[Boxes, ...]  # in their pixels
    modality: str
    stream: str
    incarnation: int  # of the stream when it answered


class Taught(NamedTuple):
    """What boxes did."""

    stream: Learned | None  # None where streams do not learn
    modality: SharedStep | None  # None where modalities do not learn, or this one no more


class DetectionEngine:
    """A frozen detector behind translators.

    Args:
        detector: frozen, on its device.
        translators: by modality.
        settings: of the adapter.
        digest: of the detector's weights.
        threads: of one forward on the CPU.
        streams_max, resident, new_per_minute, snapshots: see `States`.
        batch_streams_max: streams of one forward.
    """

    def __init__(
        self,
        detector: Detector,
        translators: Mapping[str, Modality],
        settings: ModTrSettings,
        digest: str,
        threads: int = 1,
        *,
        streams_max: int,
        resident: int = 1024,
        new_per_minute: int | None = None,
        snapshots: Snapshots | None = None,
        batch_streams_max: int = 64,
    ) -> None:
        self.detector = detector
        self.settings = settings
        self.digest = digest
        self.threads = threads
        self._modalities = dict(translators)
        self._changing = threading.Lock()  # of `_modalities`, which is replaced and never changed
        self.streams = States(
            _init(self._modalities),
            streams_max=streams_max,
            resident=resident,
            new_per_minute=new_per_minute,
            snapshots=snapshots,
            answering_max=batch_streams_max,
        )

    @property
    def device(self) -> torch.device:
        return self.detector.device

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """As they answer now; never changed, only replaced."""
        return self._modalities

    def prepare_thread(self) -> None:
        """Call once in each thread that will compute."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)

    def put(self, name: str, content: bytes) -> Modality:
        """A modality from a translator's file, not served yet; with the probe of the one that it replaces.

        Raises:
            InvalidInput: see `translators.parse`; or there would be too many.
        """
        known = self._modalities
        if name not in known and len(known) >= MODALITIES_MAX:
            raise InvalidInput(
                f"there are {len(known)} translators, which is the limit; delete one before adding {name!r}"
            )
        file = translators.parse(content, self.digest, name)
        return modalities.begin(file, self.detector, self.settings, known[name].probe if name in known else None)

    def replace(self, name: str, modality: Modality | None) -> None:
        """Serve another translator for a modality, or none. To be called while neither `predict` nor `learn` runs.

        What streams have learned for the translator of before is dropped, and what they have for others stays.

        Raises:
            NotFound: there is none to delete.
            Unavailable: see `States.restructure`.
        """
        with self._changing:
            old = list(self._modalities)
            if modality is None and name not in old:
                raise NotFound(
                    f"there is no translator for the modality {name!r}; there are {', '.join(old) or 'none'}"
                )
            known = {each: value for each, value in self._modalities.items() if each != name}
            if modality is not None:
                known[name] = modality

            def migrate(table: PipelineState, fresh: PipelineState) -> PipelineState:
                columns = [
                    new if each == name else table.input[old.index(each)]
                    for each, new in zip(known, fresh.input, strict=True)
                ]
                return fresh._replace(input=tuple(columns))

            what = "deleted" if modality is None else "replaced" if name in old else "added"
            self.streams.restructure(_init(known), migrate, f"translator {name} {what}")
            self._modalities = known

    # -- predict ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, sights: Sequence[Sight]) -> list[Found]:
        """Answer requests of any mix of streams and modalities: a forward for each translator, and one merged forward
        of the detector for all images of one padded size.
        """
        known = self._modalities
        seen: list[list[_Image]] = []
        with self.streams.answering([sight.stream for sight in sights]) as records:
            for sight, record in zip(sights, records, strict=True):
                names = [name if name in known else RGB for name in sight.modalities]  # it may just have been deleted
                seen.append([self._take_in(*each, record) for each in zip(sight.images, names, strict=True)])
            everything = [image for images in seen for image in images]
            translated = self._translate(known, everything)
            adapted, frozen = self._look(sights, seen, iter(translated))
        versions = {RGB: 0} | {name: modality.version for name, modality in known.items()}
        used = [tuple(image.modality for image in images) for images in seen]
        return [
            Found(
                adapted[i],
                frozen[i],
                used[i],
                tuple(versions[name] for name in used[i]),
                record.version,
                record.incarnation,
            )
            for i, record in enumerate(records)
        ]

    def _take_in(self, image: Tensor, modality: str, record: StreamRecord) -> "_Image":
        x = to_unit(image.to(self.device, non_blocking=True))
        return _Image(self.detector.prepare(x), (x.shape[-2], x.shape[-1]), modality, row_of(record))

    def _translate(self, known: Mapping[str, Modality], images: Sequence["_Image"]) -> list[Tensor]:
        """What the detector shall look at: images grouped by translator and, within, those of streams that have
        learned nothing apart, since for them the norm layers are folded away.
        """
        found = [with_channels(image.x, 3) for image in images]
        lots: dict[tuple[str, bool], list[int]] = {}
        for number, image in enumerate(images):
            if image.modality != RGB:
                lots.setdefault((image.modality, image.row != 0), []).append(number)
        for (name, learned), numbers in lots.items():
            states, rows = None, torch.zeros(0, dtype=torch.int64)
            if learned:
                places: dict[int, int] = {}  # of the table's rows, in the small table of this lot
                own = [places.setdefault(images[number].row, len(places)) for number in numbers]
                states = self.streams.read(list(places)).input[list(known).index(name)]
                rows = torch.tensor(own, device=self.device)
            y = modalities.translate(known[name], [images[number].x for number in numbers], states, rows)
            for number, translated in zip(numbers, y, strict=True):
                found[number] = translated
        return found

    def _look(
        self, sights: Sequence[Sight], seen: Sequence[Sequence["_Image"]], translated: Iterator[Tensor]
    ) -> tuple[list[tuple[Detections, ...] | None], list[tuple[Detections, ...] | None]]:
        """Each request's detections with and without translators; an image without one is looked at once for both."""
        queue: list[tuple[Tensor, Size]] = []
        asked: list[list[tuple[int | None, int | None]]] = []  # places in the queue, of each image

        def put(image: Tensor, size: Size) -> int:
            queue.append((image, size))
            return len(queue) - 1

        for sight, images in zip(sights, seen, strict=True):
            of_request = []
            for image in images:
                y, adapted, frozen = next(translated), None, None
                if sight.answer != "frozen":
                    adapted = put(y, image.size)
                if sight.answer != "adapted":
                    same = image.modality == RGB and adapted is not None
                    frozen = adapted if same else put(with_channels(image.x, 3), image.size)
                of_request.append((adapted, frozen))
            asked.append(of_request)
        found = self._detect(queue)

        def answers(which: int) -> list[tuple[Detections, ...] | None]:
            every = []
            for images in asked:
                places = [image[which] for image in images]
                every.append(None if None in places else tuple(found[place] for place in places if place is not None))
            return every

        return answers(0), answers(1)

    def _detect(self, queue: Sequence[tuple[Tensor, Size]]) -> list[Detections]:
        """One merged batch, cut only where its pixels would not fit in memory."""
        found: list[Detections] = []
        first = pixels = 0
        for number, (image, _) in enumerate(queue):
            own = math.prod(self.detector.canvas((image.shape[-2], image.shape[-1])))
            if number > first and pixels + own > PIXELS_MAX:
                found += self.detector.detect(*_columns(queue[first:number]))
                first, pixels = number, 0
            pixels += own
        return found + (self.detector.detect(*_columns(queue[first:])) if queue else [])

    # -- learn --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, shown: Shown) -> Taught:
        """Take a step of the stream, and one of its modality's shared weights, for every size among the images."""
        modality = self._modalities.get(shown.modality)
        record = self.streams.find(shown.stream)
        rows = len(shown.images)
        if modality is None or record is None or record.incarnation != shown.incarnation:
            return Taught(Learned(shown.stream, rows, 0, math.nan, "stale"), None)
        if record.frozen:
            return Taught(Learned(shown.stream, rows, 0, math.nan, "frozen"), None)
        of_stream: list[Learned] = []
        of_modality: list[SharedStep] = []
        for x, boxes in self._lessons(shown, modality.channels):
            if self.settings.learns in ("both", "stream"):
                of_stream.append(self._teach_stream(shown, x, boxes))
            if self.settings.learns in ("both", "modality"):
                of_modality += self._teach_modality(shown.modality, x, boxes)
        if self.settings.learns == "modality" and not of_modality:  # the last rung of its guards
            return Taught(Learned(shown.stream, rows, 0, math.nan, "frozen"), None)
        return Taught(_together(of_stream), _together_shared(of_modality))

    def _lessons(self, shown: Shown, channels: int) -> list[tuple[Tensor, list[Boxes]]]:
        """Prepared images of one size, and their boxes, for each size."""
        sizes: dict[Size, list[tuple[Tensor, Boxes]]] = {}
        for image, boxes in zip(shown.images, shown.boxes, strict=True):
            x = to_unit(image.to(self.device))
            prepared = self.detector.prepare(x)
            size = (prepared.shape[-2], prepared.shape[-1])
            moved = Boxes(boxes.boxes.to(self.device), boxes.labels.to(self.device))
            target = scale_boxes(moved, (x.shape[-2], x.shape[-1]), size)
            sizes.setdefault(size, []).append((with_channels(prepared, channels), target))
        return [(torch.stack([x for x, _ in each]), [boxes for _, boxes in each]) for each in sizes.values()]

    def _teach_modality(self, name: str, x: Tensor, boxes: Sequence[Boxes]) -> list[SharedStep]:
        modality = self._modalities.get(name)
        if modality is None or modality.frozen:
            return []
        new, step = modalities.teach(modality, x, boxes, self.detector, self.settings.ap50_drop_max)
        with self._changing:
            if self._modalities.get(name) is modality:  # else it was replaced meanwhile, and what was learned is void
                self._modalities = {**self._modalities, name: new}
        return [step]

    def _teach_stream(self, shown: Shown, x: Tensor, boxes: Sequence[Boxes]) -> Learned:
        with self.streams.teaching([(shown.stream, shown.incarnation)]) as held:
            if not held.streams:
                return Learned(shown.stream, len(x), 0, math.nan, "stale")
            known = self._modalities
            if shown.modality not in known:
                return Learned(shown.stream, len(x), 0, math.nan, "stale")
            return self._step(held, known[shown.modality], list(known).index(shown.modality), x, boxes)

    def _step(self, held: Held, modality: Modality, place: int, x: Tensor, boxes: Sequence[Boxes]) -> Learned:
        old = self.streams.read_to_teach(held)
        rows = torch.zeros(len(x), dtype=torch.int64, device=self.device)
        groups = Groups.of((len(x),), self.device)
        batch = Batch(x, groups, weights=x.new_ones(len(x)), boxes=tuple(boxes))
        state, report = modality.modtr.adapt(old.input[place], rows, batch)
        lost = self._forgotten(held.records[0], modality, state, report)
        entropies = [math.nan]  # detections have none that is comparable
        records, judged, actions = judge(held.streams, held.records, counts_of(report), entropies, lost)
        (action,) = actions
        if action == "pull":
            state = _pulled(modality, state)
        elif action:
            state = old.input[place]  # what a guard condemned answers nobody, not even until it is rolled back
        new = old._replace(input=tuple(state if i == place else each for i, each in enumerate(old.input)))
        (is_out,) = self.streams.publish(held, records, new)
        if action:
            self.streams.act(held.streams[0], records[0], action)
        elif is_out and records[0].steps % modalities.PROBE_EVERY_STEPS == 0:
            self.streams.keep_good(held.streams[0], records[0], tree.row(optim.rest(new), 0))
        return judged[0] if is_out else judged[0]._replace(selected=0, result="stale")

    def _forgotten(
        self, record: StreamRecord, modality: Modality, state: ModTrState, report: Report
    ) -> dict[int, Forgotten]:
        """What the stream lost on its modality's probe, when its turn comes: AP50 as a share, which has no simple
        standard error.
        """
        due = bool(report.applied[0]) and (record.steps + 1) % modalities.PROBE_EVERY_STEPS == 0
        if modality.probe is None or not due:
            return {}
        lost = modality.probe.ap50 - modalities.measure(modality, modality.probe, self.detector, state)
        return {0: Forgotten(lost, 0.0, lost > self.settings.ap50_drop_max)}


class _Image(NamedTuple):
    """An image on its way through."""

    x: Tensor  # prepared, [C, h, w]
    size: Size  # before that
    modality: str
    row: int  # of its stream, in the table of states; 0: has learned nothing


def _init(known: Mapping[str, Modality]) -> PipelineState:
    """The state of a stream that has learned nothing: one for every modality, since a camera may have two."""
    return PipelineState(tuple(modality.modtr.init() for modality in known.values()), (), ())


def _pulled(modality: Modality, states: ModTrState) -> ModTrState:
    """Half the way back to the translator's own scale and shift, the optimizer anew."""
    params = modality.modtr.params(states)
    source = modality.modtr.source_params.expand_as(params)
    pulled = modality.modtr.with_params(states, torch.lerp(params, source, PULL_SHARE))
    return pulled._replace(optimizer=tree.apply(torch.zeros_like, states.optimizer))


def _columns(queue: Sequence[tuple[Tensor, Size]]) -> tuple[list[Tensor], list[Size]]:
    return [image for image, _ in queue], [size for _, size in queue]


def _together(steps: Sequence[Learned]) -> Learned | None:
    """The steps of one lesson as one."""
    if not steps:
        return None
    applied = [step for step in steps if step.result == "applied"]
    return steps[-1]._replace(
        seen=sum(step.seen for step in steps),
        selected=sum(step.selected for step in steps),
        result="applied" if applied else steps[-1].result,
        trips=tuple(dict.fromkeys(trip for step in steps for trip in step.trips)),
    )


def _together_shared(steps: Sequence[SharedStep]) -> SharedStep | None:
    if not steps:
        return None
    return SharedStep(
        sum(step.loss for step in steps) / len(steps),
        any(step.applied for step in steps),
        tuple(dict.fromkeys(trip for step in steps for trip in step.trips)),
    )
