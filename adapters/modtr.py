"""Modality translation for object detection without forgetting: ModTr, learning while it serves.

Medeiros, Aminbeidokhti, Peña, Latortue, Granger & Pedersoli, ECCV 2024, arXiv 2404.01492. Equations: the fusion
(section 3; `translator.py`), and the loss, which is the frozen detector's own on the translated images.

The paper trains a translator once. Here its two halves go on learning from boxes that somebody gives as feedback: the
convolutions' weights are a modality's, shared by all of its streams (`SharedWeights`); scale and shift of the norm
layers are a stream's own (`ModTr`), a few kilobytes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import optim, tree
from adapters.base import Batch, Groups, Report, Site, UnsupportedModel
from adapters.detection import Boxes, DetectionLoss
from adapters.guards import GuardConfig, Trip, cap_displacement, cap_step
from adapters.merge_rules import Steps, Totals
from adapters.merging import Merging
from adapters.norm import Modulation, Network, Statistics
from adapters.translator import Translator, weights


@dataclass(frozen=True)
class ModTrConfig:
    """Settings of a stream's own half."""

    learning_rate: float = 1e-3  # of Adam; ours, as for EATA: scales are around 1, and a step holds few images
    loss_factor: float = 0.1  # the paper's; Adam hardly sees it
    limits: GuardConfig = field(default_factory=GuardConfig)  # its caps on a step and on the displacement are used


class ModTrState(NamedTuple):
    """Everything that a stream's adaptation changes; P channels of the translator's norm layers."""

    scale: Tensor  # γ, float32 [P]
    shift: Tensor  # β, float32 [P]
    optimizer: optim.OptimizerState  # of [γ | β], [2 P]
    steps: Tensor  # taken so far, int64 []


class ModTr:
    """A translator whose norm layers follow each stream's feedback.

    The loss of a stream is `0.1 · L(fuse(x, h(x)))`, with L the detector's own loss, mean over the stream's rows that
    bring boxes. L is computed once a stream, because detectors divide by what a whole batch holds; one backward then
    gives every stream its own gradient. Norm layers use the translator's statistics, never the batch's, so a row's
    translation is its own affair. Steps are capped as `Guarded` does; where a loss or a new state would not be finite,
    the stream keeps its old state and the report says `refused`.

    A translator that has never been trained hands no gradient down (its last layer's weights are 0): nothing moves
    there until `SharedWeights` has learned something.

    Args:
        translator: is copied, and left alone.
        loss: of the frozen detector.
        config: rate and caps.

    Raises:
        UnsupportedModel: the translator was folded: no norm layer is left in it.

    Deviations from the paper: it learns offline, all weights together. Any weight above 0 counts as 1.

    >>> from adapters.translator import TranslatorConfig
    >>> def dark(images, targets):
    ...     return torch.stack([image.mean() for image in images]).mean()
    >>> modtr = ModTr(Translator(TranslatorConfig(width=4, depth=1)), dark)
    >>> states = tree.stack([modtr.init(), modtr.init()])
    >>> modtr.transform(states, torch.tensor([1]), torch.ones(1, 3, 5, 7)).shape
    torch.Size([1, 3, 5, 7])
    """

    site: Site = "input"
    classes = 0  # it reports no probabilities

    def __init__(self, translator: Translator, loss: DetectionLoss, config: ModTrConfig | None = None) -> None:
        self.network = Network(copy.deepcopy(translator))
        if not self.network.channels:
            raise UnsupportedModel("this translator has no norm layer left: give ModTr one that was not folded")
        self.loss = loss
        self.config = config or ModTrConfig()
        self.source_params = torch.cat([self.network.scale, self.network.shift])

    def init(self) -> ModTrState:
        return ModTrState(
            scale=self.network.scale.clone(),
            shift=self.network.shift.clone(),
            optimizer=optim.init("adam", self.source_params),
            steps=torch.zeros((), dtype=torch.int64, device=self.source_params.device),
        )

    def params(self, states: ModTrState) -> Tensor:
        """What was learned, [γ | β], [S, 2 P]: for guards."""
        return torch.cat([states.scale, states.shift], dim=1)

    def with_params(self, states: ModTrState, params: Tensor) -> ModTrState:
        """The same table with other parameters, [S, 2 P]: for guards."""
        scale, shift = params.chunk(2, dim=1)
        return states._replace(scale=scale.contiguous(), shift=shift.contiguous())

    def merging(self) -> Merging:
        """Scale and shift by the steps that moved them."""
        return Merging(
            (Steps(("scale", "shift"), by="steps"), Totals(("steps",))),
            local=("optimizer.step", "optimizer.first", "optimizer.second"),
        )

    def transform(self, states: ModTrState, rows: Tensor, x: Tensor) -> Tensor:
        """Translate each row with its stream's scale and shift.

        Args:
            states: table of S states; with one row, this costs what the frozen translator does.
            rows: int64 [B].
            x: float in [0, 1], [B, C, h, w].

        Returns:
            [B, 3, h, w], in [0, 1].
        """
        return self._translate(states.scale, states.shift, rows, x)

    def _translate(self, scale: Tensor, shift: Tensor, rows: Tensor, x: Tensor) -> Tensor:
        mean, var = self.network.mean.expand_as(scale), self.network.var.expand_as(scale)
        one_request = Groups(torch.zeros_like(rows), (len(rows),))  # known statistics ask for none
        told = Modulation(scale, shift, mean, var, rows, one_request, Statistics.KNOWN)
        return self.network(x, told).logits

    def adapt(self, states: ModTrState, rows: Tensor, batch: Batch) -> tuple[ModTrState, Report]:
        """One step of every stream that has a row of weight > 0, where the batch brings boxes.

        Args:
            states: table of S states.
            rows: int64 [B].
            batch: x is [B, C, h, w], boxes are in its pixels.
        """
        count = len(states.steps)
        seen = rows.new_zeros(count).index_add(0, rows, (batch.weights > 0).to(torch.int64))
        report = Report.empty(count, rows.device)._replace(seen=seen)
        lessons = _lessons(rows, batch.weights)
        if batch.boxes is None or not lessons:
            return states, report
        old = self.params(states)
        loss, grad = self._gradient(old, rows, batch.x, batch.boxes, lessons)
        stepped, optimizer = optim.adam(states.optimizer, old, grad, learning_rate=self.config.learning_rate)
        params, far = cap_step(old, stepped, self.config.limits)
        params, out = cap_displacement(params, self.source_params, self.config.limits)
        new = self.with_params(states, params)._replace(optimizer=optimizer, steps=states.steps + 1)
        taught = seen > 0
        applied = taught & loss.isfinite() & tree.finite_rows(new, count, rows.device)
        return tree.where(applied, new, states), report._replace(
            reliable=seen,
            selected=torch.where(applied, seen, 0),
            applied=applied,
            refused=taught & ~applied,
            trips=_trips(taught, applied, far, out),
        )

    def _gradient(
        self, params: Tensor, rows: Tensor, x: Tensor, boxes: Sequence[Boxes], lessons: dict[int, list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Each stream's loss, [S] (0 without a lesson), and its gradient, [S, 2 P]; one forward and one backward."""
        place = [i for own in lessons.values() for i in own]
        params = params.detach().requires_grad_()
        with torch.enable_grad():  # also where the caller has switched gradients off
            scale, shift = params.chunk(2, dim=1)
            translated = list(self._translate(scale, shift, rows[place], x[place]))
            losses = []
            for own in lessons.values():
                images, translated = translated[: len(own)], translated[len(own) :]
                losses.append(self.config.loss_factor * self.loss(images, [boxes[i] for i in own]))
            (grad,) = torch.autograd.grad(torch.stack(losses).sum(), params)
        loss = params.detach().new_zeros(len(params))
        loss[list(lessons)] = torch.stack(losses).detach().to(loss)
        return loss, grad


@dataclass(frozen=True)
class SharedConfig:
    """Settings of a modality's shared half. Sizes of weights are root mean squares."""

    learning_rate: float = 1e-4  # of AdamW; the paper's
    weight_decay: float = 0.01  # AdamW's default
    loss_factor: float = 0.1  # the paper's
    step_rms_max: float = 1e-3  # longer steps are scaled back to it; Adam's worst step is 3.2 rates
    displacement_share: float = 0.25  # of the source weights' own size: how far learning may lead away from them


class SharedState(NamedTuple):
    """Everything that feedback changes of a modality's translator; D weights, end to end."""

    weights: Tensor  # of all convolutions, float32 [D]
    optimizer: optim.OptimizerState  # [D]
    steps: Tensor  # taken so far, int64 []


class Taught(NamedTuple):
    """What one call of `SharedWeights.teach` did; tensors, so that reading them is the caller's choice."""

    loss: Tensor  # the detector's, times the factor, before the step, []
    applied: Tensor  # whether a step was taken, bool []
    refused: Tensor  # whether something was not finite and the old weights were kept, bool []
    trips: Tensor  # bits of `guards.Trip`, int64 []


class SharedWeights:
    """The half of a translator that its modality's streams share: the weights of all convolutions, learning online.

    A step is Adam's on `0.1 · L`, then a pull of `learning_rate · weight_decay` of the way back to the source's
    weights, and capped as a stream's. Norm layers keep the translator's scale, shift and statistics, so the states of
    streams go on fitting. Everything is a value: rollback is an older state, and a server swaps the translator of the
    new one in.

    Args:
        translator: the source, as it was trained; is copied, and left alone.
        loss: of the frozen detector.
        config: rate and caps.

    Deviations from AdamW (Loshchilov & Hutter, arXiv 1711.05101): weights decay toward the source's, not toward 0.

    >>> from adapters.translator import TranslatorConfig
    >>> def dark(images, targets):
    ...     return torch.stack([image.mean() for image in images]).mean()
    >>> shared = SharedWeights(Translator(TranslatorConfig(width=4, depth=1)), dark)
    >>> nothing = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    >>> state, taught = shared.teach(shared.init(), torch.ones(1, 3, 8, 8), [nothing])
    >>> round(taught.loss.item(), 4), state.steps.item()  # 0.1 · σ(5), and a step
    (0.0993, 1)
    """

    def __init__(self, translator: Translator, loss: DetectionLoss, config: SharedConfig | None = None) -> None:
        self.source = copy.deepcopy(translator).eval().requires_grad_(False)
        self.loss = loss
        self.config = config or SharedConfig()
        self.source_weights = torch.cat([each.reshape(-1) for each in weights(self.source)])
        size = self.source_weights.square().mean().sqrt().item()
        self.limits = GuardConfig(
            step_rms_max=self.config.step_rms_max, displacement_rms_max=self.config.displacement_share * size
        )

    def init(self) -> SharedState:
        return SharedState(
            weights=self.source_weights.clone(),
            optimizer=optim.init("adam", self.source_weights),
            steps=torch.zeros((), dtype=torch.int64, device=self.source_weights.device),
        )

    def translator(self, state: SharedState) -> Translator:
        """A new translator with these weights, in evaluation mode and frozen; shares no tensor with another."""
        made = copy.deepcopy(self.source)
        into = weights(made)
        parts = torch.split(state.weights, [each.numel() for each in into])
        with torch.no_grad():
            for parameter, values in zip(into, parts, strict=True):
                parameter.copy_(values.view_as(parameter))
        return made

    def teach(self, state: SharedState, x: Tensor, boxes: Sequence[Boxes]) -> tuple[SharedState, Taught]:
        """One step on images whose boxes are known; where it would not be finite, the old state.

        Args:
            state: is left alone.
            x: float in [0, 1], [B, C, h, w], B ≥ 1.
            boxes: of each image, in its pixels.

        Raises:
            ValueError: there is no image, or not a `Boxes` for each.
        """
        if not len(x) or len(x) != len(boxes):
            raise ValueError(f"teaching takes boxes for each of one image or more, not {len(boxes)} for {len(x)}")
        loss, grad = self._gradient(state, x, boxes)
        old, table = state.weights.unsqueeze(0), tree.stack([state.optimizer])
        stepped, moments = optim.adam(table, old, grad.unsqueeze(0), learning_rate=self.config.learning_rate)
        stepped = torch.lerp(stepped, self.source_weights, self.config.learning_rate * self.config.weight_decay)
        params, far = cap_step(old, stepped, self.limits)
        params, out = cap_displacement(params, self.source_weights, self.limits)
        new = SharedState(params, moments, (state.steps + 1).unsqueeze(0))
        applied = loss.isfinite() & tree.finite_rows(new, 1, old.device)  # [1]
        trips = _trips(torch.ones_like(applied), applied, far, out)
        kept = tree.where(applied, new, tree.stack([state]))
        return tree.row(kept, 0), Taught(loss, applied[0], ~applied[0], trips[0])

    def _gradient(self, state: SharedState, x: Tensor, boxes: Sequence[Boxes]) -> tuple[Tensor, Tensor]:
        """The loss [], and its gradient on the weights, [D]."""
        translator = self.translator(state)
        learning = weights(translator)
        for each in learning:
            each.requires_grad_()
        with torch.enable_grad():
            loss = self.config.loss_factor * self.loss(list(translator(x)), boxes)
            grads = torch.autograd.grad(loss, learning)
        return loss.detach(), torch.cat([each.reshape(-1) for each in grads])


def _lessons(rows: Tensor, weights: Tensor) -> dict[int, list[int]]:
    """The places in the batch of each stream's rows of weight > 0, by the stream's row in the table."""
    found: dict[int, list[int]] = {}
    for place, (row, weight) in enumerate(zip(rows.tolist(), weights.tolist(), strict=True)):
        if weight > 0:
            found.setdefault(row, []).append(place)
    return found


def _trips(taught: Tensor, applied: Tensor, far: Tensor, out: Tensor) -> Tensor:
    """Bits of `Trip` for each row of a table, int64 [S]."""
    return (
        (taught & ~applied) * int(Trip.NON_FINITE)
        + (far & applied) * int(Trip.STEP_NORM)
        + (out & applied) * int(Trip.DISPLACEMENT)
    )
