"""Learning from boxes: a lesson teaches its stream's state, and its modality's shared weights."""

import math
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import Batch, Groups, PipelineState, tree
from adapters.detection import Boxes
from adapters.modtr import ModTrState
from adapters.translator import with_channels
from tta_serve import modalities, stepping
from tta_serve.config import ModTrSettings
from tta_serve.detectors import Detector, Size, scale_boxes
from tta_serve.engine import to_unit
from tta_serve.judging import Learned
from tta_serve.modalities import Modalities, Modality, SharedStep
from tta_serve.monitor import Forgotten
from tta_serve.states import Held, States
from tta_serve.streams import PULL_SHARE


class Shown(NamedTuple):
    """Images of one stream and one modality whose boxes are known."""

    images: tuple[Tensor, ...]  # uint8, or float32 in [0, 1]; [C, H, W] each, C 1 or 3; on the host
    boxes: tuple[Boxes, ...]  # in their pixels
    modality: str
    stream: str
    incarnation: int  # of the stream when it answered


class Taught(NamedTuple):
    """What boxes did."""

    stream: Learned | None  # None where streams do not learn
    modality: SharedStep | None  # None where modalities do not learn, or this one no more


class BoxLearner:
    """Takes steps on boxes that somebody gave.

    Args:
        detector: frozen; whose loss is learned through.
        known: the modalities, whose shared weights learn.
        streams: whose states learn.
        settings: what learns, and the guard on the probe.
        stepping: held during a step of a stream: two steps of one stream at once would lose one.
    """

    def __init__(
        self, detector: Detector, known: Modalities, streams: States, settings: ModTrSettings, stepping: Lock
    ) -> None:
        self.detector = detector
        self.streams = streams
        self.settings = settings
        self._modalities = known
        self._stepping = stepping

    @property
    def device(self) -> torch.device:
        return self.detector.device

    @torch.no_grad()
    def learn(self, shown: Shown) -> Taught:
        """Take a step of the stream, and one of its modality's shared weights, for every size among the images."""
        modality = self._modalities.present.get(shown.modality)
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
        modality = self._modalities.present.get(name)
        if modality is None or modality.frozen:
            return []
        new, step = modalities.teach(modality, x, boxes, self.detector, self.settings.ap50_drop_max)
        return [step] if self._modalities.swap(name, modality, new) else []  # else it was replaced meanwhile

    def _teach_stream(self, shown: Shown, x: Tensor, boxes: Sequence[Boxes]) -> Learned:
        with self._stepping, self.streams.teaching([(shown.stream, shown.incarnation)]) as held:
            if not held.streams:
                return Learned(shown.stream, len(x), 0, math.nan, "stale")
            known = self._modalities.present
            if shown.modality not in known:
                return Learned(shown.stream, len(x), 0, math.nan, "stale")
            return self._step(held, known[shown.modality], list(known).index(shown.modality), x, boxes)

    def _step(self, held: Held, modality: Modality, place: int, x: Tensor, boxes: Sequence[Boxes]) -> Learned:
        old = self.streams.read_to_teach(held)
        rows = torch.zeros(len(x), dtype=torch.int64, device=self.device)
        groups = Groups.of((len(x),), self.device)
        batch = Batch(x, groups, weights=x.new_ones(len(x)), boxes=tuple(boxes))
        state, report = modality.modtr.adapt(old.input[place], rows, batch)
        due = bool(report.applied[0]) and int(state.steps[0]) % modalities.PROBE_EVERY_STEPS == 0
        lost = self._forgotten(modality, state) if due else {}

        def with_state(mine: ModTrState) -> PipelineState:
            return old._replace(input=tuple(mine if i == place else each for i, each in enumerate(old.input)))

        def pull(new: PipelineState, _: Tensor) -> PipelineState:
            return with_state(_pulled(modality, new.input[place]))

        new, report = with_state(state), report._replace(entropy=torch.full_like(report.entropy, math.nan))
        (learned,) = stepping.settle(self.streams, held, old, new, report, lost, pull, lambda _: due)
        return learned

    def _forgotten(self, modality: Modality, state: ModTrState) -> dict[int, Forgotten]:
        """What the stream lost on its modality's probe: AP50, as a share, whose standard error is not known."""
        if modality.probe is None:
            return {}
        lost = modality.probe.ap50 - modalities.measure(modality, modality.probe, self.detector, state)
        return {0: Forgotten(lost, math.nan, lost > self.settings.ap50_drop_max)}


def _pulled(modality: Modality, states: ModTrState) -> ModTrState:
    """Half the way back to the translator's own scale and shift, the optimizer anew."""
    params = modality.modtr.params(states)
    source = modality.modtr.source_params.expand_as(params)
    pulled = modality.modtr.with_params(states, torch.lerp(params, source, PULL_SHARE))
    return pulled._replace(optimizer=tree.apply(torch.zeros_like, states.optimizer))


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
