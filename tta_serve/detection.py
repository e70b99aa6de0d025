"""A detector, its translators and the live states of its streams: look, and learn from boxes.

What `engine.py` is for classifiers. `predict` and `learn` may run in two threads at once: what answers is a value,
taken once for a batch and swapped whole; states are kept as there (`states.py`).
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import PipelineState
from adapters.detection import Detections
from adapters.guards import Guarded
from adapters.merging import Merging
from adapters.translator import with_channels
from tta_serve import modalities, translators
from tta_serve.aligning import Aligner
from tta_serve.box_lessons import BoxLearner
from tta_serve.config import RGB, ModTrSettings
from tta_serve.detectors import Detector, Size
from tta_serve.durable import Durable
from tta_serve.engine import AnswerKind, to_unit
from tta_serve.errors import InvalidInput, NotFound
from tta_serve.lessons import Lesson
from tta_serve.modalities import Modalities, Modality
from tta_serve.states import States
from tta_serve.streams import StreamRecord

MODALITIES_MAX = 16  # a stream has a state for each
PIXELS_MAX = 8 * 800 * 1344  # of one forward: eight of torchvision's usual images


class Sight(NamedTuple):
    """One request's images."""

    images: tuple[Tensor, ...]  # uint8, or float32 in [0, 1]; [C, H, W] each, C 1 or 3; on the host
    modalities: tuple[str, ...]  # of each
    stream: str
    answer: AnswerKind = "adapted"
    adapt: bool = True  # whether the stream may be aligned with it


class Found(NamedTuple):
    """What one request gets."""

    detections: tuple[Detections, ...] | None  # in each image; None where only the frozen answer was asked for
    frozen_detections: tuple[Detections, ...] | None  # without a translator; None where only the other was asked for
    modalities: tuple[str, ...]  # of each image, whose translator was used
    translator_versions: tuple[int, ...]  # of the weights that this translator had; 0 without one
    version: int  # of the state that answered
    incarnation: int
    unsynced: int = 0  # of the version's changes, those that the store does not have
    lessons: tuple[Lesson, ...] = ()  # what was looked at, to align with; none without such an adapter


class DetectionEngine:
    """A frozen detector behind translators.

    Args:
        detector: frozen, on its device.
        translators: by modality.
        settings: of the adapter.
        digest: of the detector's weights.
        threads: of one forward on the CPU.
        norm: adapts the detector's own normalisation layers, stream by stream; None: nothing does.
        streams_max, resident, new_per_minute, durable: see `States`.
        batch_streams_max: streams of one forward.
    """

    def __init__(
        self,
        detector: Detector,
        translators: Mapping[str, Modality],
        settings: ModTrSettings,
        digest: str,
        threads: int = 1,
        norm: Guarded | None = None,
        *,
        streams_max: int,
        resident: int = 1024,
        new_per_minute: int | None = None,
        durable: Durable | None = None,
        batch_streams_max: int = 64,
    ) -> None:
        self.detector = detector
        self.settings = settings
        self.digest = digest
        self.threads = threads
        self._modalities = Modalities(translators)
        self._norm = norm
        self.streams = States(
            init_of(translators, norm),
            streams_max=streams_max,
            resident=resident,
            new_per_minute=new_per_minute,
            durable=durable,
            answering_max=batch_streams_max,
            on_end=self._end_life,
        )
        self._stepping = threading.Lock()
        self.boxes = BoxLearner(detector, self._modalities, self.streams, settings, self._stepping)
        self.aligner: Aligner | None = None
        if norm:
            keeps = settings.learns not in ("both", "stream")
            self.aligner = Aligner(detector, norm, self.streams, self.prepare_thread, self._stepping, keeps)

    def _end_life(self, stream: str, incarnation: int) -> None:
        if self.aligner:
            self.aligner.forget(stream, incarnation)

    @property
    def device(self) -> torch.device:
        return self.detector.device

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """As they answer now; never changed, only replaced."""
        return self._modalities.present

    def prepare_thread(self, *, learns: bool = False) -> None:  # noqa: ARG002  # one CUDA stream serves both yet
        """Call once in each thread that will compute."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)

    def put(self, name: str, content: bytes) -> Modality:
        """A modality from a translator's file, not served yet; with the probe of the one that it replaces.

        Raises:
            InvalidInput: see `translators.parse`; or there would be too many.
        """
        known = self.modalities
        if name not in known and len(known) >= MODALITIES_MAX:
            raise InvalidInput(
                f"there are {len(known)} translators, which is the limit; delete one before adding {name!r}"
            )
        file = translators.parse(content, self.digest, name)
        modality = modalities.begin(file, self.detector, self.settings, known[name].probe if name in known else None)
        modalities.check(modality, self.detector)
        return modality

    def replace(self, name: str, modality: Modality | None) -> None:
        """Serve another translator for a modality, or none. Neither `predict` nor `boxes.learn` may run meanwhile.

        What streams have learned for the translator of before is dropped, and what they have for others stays.

        Raises:
            NotFound: there is none to delete.
            Unavailable: see `States.restructure`.
        """
        present = self.modalities
        old = list(present)
        if modality is None and name not in old:
            raise NotFound(f"there is no translator for the modality {name!r}; there are {', '.join(old) or 'none'}")
        known = {each: value for each, value in present.items() if each != name}
        if modality is not None:
            known[name] = modality

        def migrate(table: PipelineState, fresh: PipelineState) -> PipelineState:
            columns = [
                new if each == name else table.input[old.index(each)]
                for each, new in zip(known, fresh.input, strict=True)
            ]
            return table._replace(input=tuple(columns))

        what = "deleted" if modality is None else "replaced" if name in old else "added"
        with self._stepping:
            self.streams.restructure(
                init_of(known, self._norm), migrate, f"translator {name} {what}", merging_of(known, self._norm)
            )
            self._modalities.present = known

    # -- predict ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, sights: Sequence[Sight]) -> list[Found]:
        """Answer requests of any mix of streams and modalities: a forward for each translator, and one merged forward
        of the detector for all images of one padded size.
        """
        known = self.modalities
        seen: list[list[_Image]] = []
        with self.streams.answering([sight.stream for sight in sights]) as records:
            for sight, record in zip(sights, records, strict=True):
                names = [name if name in known else RGB for name in sight.modalities]  # it may just have been deleted
                seen.append([self._take_in(*each, record) for each in zip(sight.images, names, strict=True)])
            everything = [image for images in seen for image in images]
            translated = self._translate(known, everything, self._unseen(sights, seen))
            adapted, frozen = self._look(sights, seen, iter(translated))
            shown = iter(translated)
            lessons = [
                self._lessons(sight, record, [next(shown) for _ in images])
                for sight, record, images in zip(sights, records, seen, strict=True)
            ]
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
                record.unsynced,
                lessons[i],
            )
            for i, record in enumerate(records)
        ]

    def _lessons(self, sight: Sight, record: StreamRecord, images: Sequence[Tensor]) -> tuple[Lesson, ...]:
        if self.aligner is None or not sight.adapt or record.frozen:
            return ()
        return self.aligner.lessons(sight.stream, record, images)

    def _take_in(self, image: Tensor, modality: str, record: StreamRecord) -> "_Image":
        x = to_unit(image.to(self.device, non_blocking=True))
        return _Image(self.detector.prepare(x), (x.shape[-2], x.shape[-1]), modality, record.row)

    def _unseen(self, sights: Sequence[Sight], seen: Sequence[Sequence["_Image"]]) -> set[int]:
        """Places among all images of those whose translation nobody asks for."""
        asked = [sight.answer != "frozen" or (self.aligner is not None and sight.adapt) for sight in sights]
        of_images = [wanted for wanted, images in zip(asked, seen, strict=True) for _ in images]
        return {place for place, wanted in enumerate(of_images) if not wanted}

    def _translate(self, known: Mapping[str, Modality], images: Sequence["_Image"], unseen: Set[int]) -> list[Tensor]:
        """What the detector shall look at: images grouped by translator and, within, those of streams that have
        learned nothing apart, since for them the norm layers are folded away.
        """
        found = [with_channels(image.x, 3) for image in images]
        lots: dict[tuple[str, bool], list[int]] = {}
        for number, image in enumerate(images):
            if image.modality != RGB and number not in unseen:
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
        queue: list[_Queued] = []
        asked: list[list[tuple[int | None, int | None]]] = []  # places in the queue, of each image

        def put(image: Tensor, size: Size, row: int) -> int:
            queue.append(_Queued(image, size, row))
            return len(queue) - 1

        for sight, images in zip(sights, seen, strict=True):
            of_request = []
            for image in images:
                y, adapted, frozen = next(translated), None, None
                if sight.answer != "frozen":
                    adapted = put(y, image.size, image.row)
                if sight.answer != "adapted":
                    unmoved = self._norm is None or image.row == 0
                    same = image.modality == RGB and unmoved and adapted is not None
                    frozen = adapted if same else put(with_channels(image.x, 3), image.size, 0)
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

    def _detect(self, queue: Sequence["_Queued"]) -> list[Detections]:
        """One merged batch, cut only where its pixels would not fit in memory."""
        lots: list[list[_Queued]] = []
        pixels = PIXELS_MAX
        for each in queue:
            own = math.prod(self.detector.canvas((each.image.shape[-2], each.image.shape[-1])))
            if pixels + own > PIXELS_MAX or not lots:
                lots.append([])
                pixels = 0
            lots[-1].append(each)
            pixels += own
        return [found for lot in lots for found in self._detect_lot(lot)]

    def _detect_lot(self, lot: Sequence["_Queued"]) -> list[Detections]:
        rows = [each.row for each in lot]
        # where no stream has learned anything, the detector's forward is that without an adapter, to the bit
        modulation = self.aligner.modulation(rows) if self.aligner and any(rows) else None
        return self.detector.detect([each.image for each in lot], [each.size for each in lot], modulation)


class _Image(NamedTuple):
    """An image on its way through."""

    x: Tensor  # prepared, [C, h, w]
    size: Size  # before that
    modality: str
    row: int  # of its stream, in the table of states; 0: has learned nothing


class _Queued(NamedTuple):
    """An image that the detector shall look at."""

    image: Tensor  # [3, h, w]
    size: Size  # before it was prepared
    row: int  # of its stream; 0: as the detector was trained


def init_of(known: Mapping[str, Modality], norm: Guarded | None) -> PipelineState:
    """The state of a stream that has learned nothing: one for every modality, since a camera may have two."""
    return PipelineState(tuple(modality.modtr.init() for modality in known.values()), norm.init() if norm else (), ())


def merging_of(known: Mapping[str, Modality], norm: Guarded | None) -> Merging:
    """What the leaves of these states mean where several replicas change them."""
    merging = norm.merging().below("norm") if norm else Merging()
    for place, modality in enumerate(known.values()):
        merging = merging.joined(modality.modtr.merging().below(f"input.{place}"))
    return merging
