"""A modality while it is served: its translator, the weights that its streams share, and the guards on these.

A modality is a value: teaching gives a new one, and whoever serves swaps it in whole.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters import optim, tree
from adapters.detection import Boxes
from adapters.guards import Trip, trip_names
from adapters.modtr import ModTr, ModTrConfig, ModTrState, SharedConfig, SharedState, SharedWeights
from adapters.translator import folded, with_channels
from tta_serve import coco, translators
from tta_serve.coco import Example
from tta_serve.config import ModTrSettings
from tta_serve.detectors import TRIAL_PIXELS, Detector, Size
from tta_serve.errors import InvalidInput
from tta_serve.router import Router
from tta_serve.streams import PULL_SHARE, Ladder
from tta_serve.translators import TranslatorFile

log = logging.getLogger(__name__)

PROBE_IMAGES = 48  # each is translated and looked at whenever the probe is asked
PROBE_EVERY_STEPS = 8


class Probe(NamedTuple):
    """Images of a modality whose boxes are known: what feedback must not unlearn."""

    images: tuple[Tensor, ...]  # prepared, float32 [C, h, w], C 1 or 3
    sizes: tuple[Size, ...]  # before they were prepared
    truth: tuple[Boxes, ...]  # in pixels of these
    ap50: float  # with the file's translator


class Modality(NamedTuple):
    """One modality as it answers now."""

    file: TranslatorFile
    modtr: ModTr  # around the translator with the weights of now
    serving: nn.Module  # the same translator for streams that have learned nothing, batch norm folded
    shared: SharedWeights
    state: SharedState
    good: SharedState  # to roll back to
    probe: Probe | None
    ladder: Ladder = Ladder()
    version: int = 0  # grows with every change of the shared weights
    trips: int = 0
    frozen: bool = False  # learns no more; set by the last rung, lifted by a new file
    ap50: float | None = None  # on the probe, when it was asked last

    @property
    def router(self) -> Router | None:
        return self.file.router

    @property
    def channels(self) -> int:
        """Of the images that the translator reads."""
        return self.file.config.in_channels


class Modalities:
    """The modalities that are served: `present` is a value, which is replaced and never changed."""

    def __init__(self, present: Mapping[str, Modality]) -> None:
        self.present = dict(present)
        self._swapping = threading.Lock()

    def swap(self, name: str, old: Modality, new: Modality) -> bool:
        """Serve `new` where `old` is served; False where something else is by now."""
        with self._swapping:
            if self.present.get(name) is not old:
                return False
            self.present = {**self.present, name: new}
            return True


class SharedStep(NamedTuple):
    """What one lesson did to a modality's shared weights."""

    loss: float
    applied: bool
    trips: tuple[str, ...]  # guards


def begin(file: TranslatorFile, detector: Detector, settings: ModTrSettings, probe: Probe | None = None) -> Modality:
    """A modality that has learned nothing yet.

    Args:
        file: its translator.
        detector: that it stands in front of.
        settings: learning rates.
        probe: its AP50 is measured anew.
    """
    translator = translators.build(file).to(detector.device)
    shared = SharedWeights(translator, detector.loss, SharedConfig(learning_rate=settings.modality_learning_rate))
    state = shared.init()
    modtr = ModTr(translator, detector.loss, ModTrConfig(learning_rate=settings.stream_learning_rate))
    modality = Modality(file, modtr, folded(translator), shared, state, state, None)
    if probe is None:
        return modality
    ap50 = measure(modality, probe, detector, None)
    return modality._replace(probe=probe._replace(ap50=ap50), ap50=ap50)


def check(modality: Modality, detector: Detector) -> None:
    """Raise InvalidInput unless the translator gives numbers that can be looked at, folded and not."""
    noise = torch.rand(3, TRIAL_PIXELS, TRIAL_PIXELS, generator=torch.Generator().manual_seed(0)).to(detector.device)
    images = [detector.prepare(image) for image in (torch.zeros_like(noise), noise)]
    rows = torch.zeros(len(images), dtype=torch.int64, device=detector.device)
    with torch.no_grad():
        for states in (None, tree.stack([modality.modtr.init()])):
            if not all(image.isfinite().all() for image in translate(modality, images, states, rows)):
                raise InvalidInput("the translator makes images that are not finite; train it again")


def translate(modality: Modality, images: Sequence[Tensor], states: ModTrState | None, rows: Tensor) -> list[Tensor]:
    """Images as the detector understands them; those of one size in one forward.

    Args:
        modality: theirs.
        images: prepared, [C, h, w] each, C 1 or 3.
        states: table of S states; None: of streams that have learned nothing.
        rows: int64 [B], which state each image uses; not read where `states` is None.

    Returns:
        [3, h, w] each, in their order.
    """
    sizes: dict[Size, list[int]] = {}
    for number, image in enumerate(images):
        sizes.setdefault((image.shape[-2], image.shape[-1]), []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in sizes.values():
        x = torch.stack([with_channels(images[number], modality.channels) for number in numbers])
        y = modality.serving(x) if states is None else modality.modtr.transform(states, rows[numbers], x)
        found.update(zip(numbers, y, strict=True))
    return [found[number] for number in range(len(images))]


def measure(modality: Modality, probe: Probe, detector: Detector, states: ModTrState | None) -> float:
    """AP50 on the probe.

    Args:
        modality: whose translator.
        probe: what is looked at.
        detector: that looks.
        states: table of the one state that is tried; None: of a stream that has learned nothing.
    """
    rows = torch.zeros(len(probe.images), dtype=torch.int64, device=detector.device)
    with torch.no_grad():
        found = detector.detect(translate(modality, probe.images, states, rows), probe.sizes)
    return coco.average_precision(probe.truth, found, probe.sizes).ap50


def teach(
    modality: Modality, x: Tensor, boxes: Sequence[Boxes], detector: Detector, ap50_drop_max: float
) -> tuple[Modality, SharedStep]:
    """Let the shared weights learn from boxes, and the guards look at what came of it.

    Args:
        modality: is left alone.
        x: prepared images of one size, [B, C, h, w], C as the translator reads.
        boxes: in each, in its pixels.
        detector: whose loss it is; for the probe.
        ap50_drop_max: on the probe, against the file's translator, before a guard trips.
    """
    state, taught = modality.shared.teach(modality.state, x, boxes)
    applied, bits = bool(taught.applied), int(taught.trips)
    new = with_weights(modality, state)._replace(ladder=modality.ladder.step()) if applied else modality
    if applied and int(state.steps) % PROBE_EVERY_STEPS == 0:
        if new.probe is not None:
            new = new._replace(ap50=measure(new, new.probe, detector, None))
        if new.probe is not None and new.ap50 is not None and new.ap50 < new.probe.ap50 - ap50_drop_max:
            bits |= Trip.FORGETTING
        elif not bits:
            new = new._replace(good=state)
    trips = trip_names(bits)
    if trips:
        new = _tripped(new, modality, trips)
    return new, SharedStep(float(taught.loss), applied, trips)


def with_weights(modality: Modality, state: SharedState) -> Modality:
    """The modality with other shared weights, under a new version."""
    translator = modality.shared.translator(state)
    return modality._replace(
        modtr=ModTr(translator, modality.modtr.loss, modality.modtr.config),
        serving=folded(translator),
        state=state,
        version=modality.version + 1,
    )


def _tripped(new: Modality, old: Modality, trips: Sequence[str]) -> Modality:
    """First half the way back to the file's weights, then the last good ones, then these and no more learning."""
    ladder, action = new.ladder.trip()
    log.warning("modality %r: the guards %s tripped: %s", new.file.modality, ", ".join(trips), action)
    if action == "pull":
        source = new.shared.source_weights
        weights = torch.lerp(new.state.weights, source, PULL_SHARE)
        state = new.state._replace(weights=weights, optimizer=optim.init("adam", source))
    else:
        state = new.good
    return with_weights(new, state)._replace(ladder=ladder, trips=old.trips + 1, frozen=action == "freeze", ap50=None)


def probe_of(examples: Sequence[Example], detector: Detector) -> Probe:
    """A probe of some of these images, from all over; its AP50 is still to be measured."""
    chosen = examples[:: max(1, len(examples) // PROBE_IMAGES)][:PROBE_IMAGES]
    images = []
    for example in chosen:
        image = coco.read_image(example.file).to(detector.device).float() / 255
        images.append(detector.prepare(image))
    truth = tuple(example.truth for example in chosen)
    return Probe(tuple(images), tuple(example.size for example in chosen), truth, ap50=0.0)


def described(modality: Modality) -> dict[str, Any]:
    """What there is to say of a modality, as JSON."""
    return {
        "modality": modality.file.modality,
        "detector": modality.file.detector,
        "parameters": int(sum(weight.numel() for weight in modality.file.weights.values())),
        "in_channels": modality.channels,
        "fusion": modality.file.config.fusion,
        "recognised": modality.router is not None,
        "version": modality.version,
        "steps": int(modality.state.steps),
        "trips": modality.trips,
        "frozen": modality.frozen,
        "ap50_probe": modality.ap50,
        "metrics": modality.file.metrics,
    }
