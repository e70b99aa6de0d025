"""Guards: they stand around an adapter and look at what it did before anyone sees it.

A guard that *trips* says so in the report; what happens next (pull toward the source, roll back, freeze) is the
caller's ladder. Two mend what they find as well: values that are not finite never leave, and steps are kept short and
near the source.

Without labels, a guard compares the adapted answers with the frozen ones on the same rows. That cannot see everything:
where the frozen answers have collapsed too, a collapse of the adapted ones is not seen, and no absolute limit is sound,
for a camera may see cats only. What is absolute is `forgetting.py`, which asks images whose answers are known.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from adapters import losses, optim, tree
from adapters.base import Batch, Groups, Moments, NormAdapter, Report, Site
from adapters.merge_rules import Fading
from adapters.merging import Merging
from adapters.norm import Modulation

S = TypeVar("S")


class Trip(enum.IntFlag):
    """Which guards tripped; `Report.trips` holds them as one number."""

    NON_FINITE = 1  # the new state or the answers hold NaN or an infinity
    STEP_NORM = 2  # a step far beyond the cap
    DISPLACEMENT = 4  # parameters that wanted to leave the ball around the source's
    COLLAPSE = 8  # adapted answers concentrate on far fewer classes than the frozen ones
    ENTROPY_FLOOR = 16  # adapted answers are sure of everything where the frozen ones are not
    SELECTED_SHARE = 32  # for many rows, all or none were selected
    FORGETTING = 64  # the learned parameters err more on the source's images: see `forgetting.py`


def trip_names(bits: int) -> tuple[str, ...]:
    """Names for logs and metrics.

    >>> trip_names(9), trip_names(0)
    (('non_finite', 'collapse'), ())
    """
    return tuple(name.lower() for name, trip in Trip.__members__.items() if bits & trip)


@dataclass(frozen=True)
class GuardConfig:
    """Limits of the guards. Distances of parameters are root mean squares, so that they mean the same for any D."""

    step_rms_max: float = 0.02  # longer steps are scaled back to it; Adam's worst step is 3.2 rates: 0.013 at 4e-3
    step_trip_factor: float = 5.0  # a step of more than so many `step_rms_max` trips
    displacement_rms_max: float = 0.25  # |θ − θ0|; Adam at 4e-3 is at 0.04 after 2,000 rows in steps of 64
    memory_rows: float = 600.0  # moving means forget a row to 1/e in so many: 0.9 a batch of 64
    compare_rows_min: int = 256  # rows before adapted and frozen answers are compared
    collapse_share: float = 0.5  # of the frozen answers' number of classes, exp(entropy of the mean answer)
    entropy_floor: float = 0.02  # of ln C: mean entropy of an answer; a ResNet-20 on its own clean images has 0.08
    entropy_floor_gap: float = 5.0  # … while the frozen answers' is more than so many floors
    selected_rows: int = 4096  # rows in a row of which none, or all, were selected: 64 batches of 64
    forgetting_max: float = 0.02  # for `forgetting.forgets`: error added on the probe, as a share


class Guardable(NormAdapter[S], Protocol[S]):
    """What guards need of an adapter."""

    @property
    def classes(self) -> int:
        """C of `Report.mean_probs`; 0 where it reports none."""
        ...

    @property
    def source_params(self) -> Tensor:
        """θ0, [D]; D is 0 where nothing is learned."""
        ...

    def params(self, states: S) -> Tensor:
        """θ, [S, D]; [1, 0] where nothing is learned and the table cannot say how many rows it has."""
        ...

    def with_params(self, states: S, params: Tensor) -> S:
        """The same table with other parameters, [S, D]."""
        ...


class Compared(NamedTuple):
    """Moving means of the adapted and the frozen answers to the same rows, from zeros: divide by their weight."""

    rows: Tensor  # compared so far, int64 []
    adapted: Tensor  # probabilities, float32 [C]
    frozen: Tensor  # float32 [C]
    adapted_entropy: Tensor  # of single answers, nats, float32 []
    frozen_entropy: Tensor  # float32 []


class GuardedState(NamedTuple):
    """The adapter's state, and what the guards remember of the stream."""

    inner: Any
    compared: Compared
    none_selected: Tensor  # rows since one was selected last, int64 []
    all_selected: Tensor  # rows since one was passed over last, int64 []


class Guarded:
    """A norm adapter with guards around it.

    - *non-finite*: where the new state or the answers hold NaN or an infinity, the stream keeps its old state, guards'
      memory included, and the report says `refused`.
    - *step norm*: a step longer than `step_rms_max` is scaled back to it. That alone is no alarm (a few hard rows, a
      rate that is set high); one of more than `step_trip_factor` times that trips.
    - *displacement*: parameters that leave the ball around the source's are put back on it, and trip.
    - *collapse* and *entropy floor*: only where the batch brings the frozen answers; see the functions of these names.
    - *selected share*: trips where for `selected_rows` rows none, or all, were selected. Rows and not batches are
      counted: a batch of one row is always one or the other.

    Args:
        adapter: what to guard.
        config: the limits.

    >>> from torch import nn
    >>> from adapters import EATA, EATAConfig, Network
    >>> network = Network(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    >>> guarded = Guarded(EATA(network, classes=3, config=EATAConfig(anchor="l2")))
    >>> guarded.init().compared.rows
    tensor(0)
    """

    site: Site = "norm"

    def __init__(self, adapter: Guardable[Any], config: GuardConfig | None = None) -> None:
        self.adapter = adapter
        self.config = config or GuardConfig()

    @property
    def classes(self) -> int:
        return self.adapter.classes

    @property
    def source_params(self) -> Tensor:
        return self.adapter.source_params

    def params(self, states: GuardedState) -> Tensor:
        return self.adapter.params(states.inner)

    def with_params(self, states: GuardedState, params: Tensor) -> GuardedState:
        return states._replace(inner=self.adapter.with_params(states.inner, params))

    def init(self) -> GuardedState:
        like = self.adapter.source_params
        zero, count = like.new_zeros(()), torch.zeros((), dtype=torch.int64, device=like.device)
        probs = like.new_zeros(self.adapter.classes)
        return GuardedState(
            self.adapter.init(),
            Compared(count, probs, probs.clone(), zero, zero.clone()),
            none_selected=count.clone(),
            all_selected=count.clone(),
        )

    def modulate(self, states: GuardedState, rows: Tensor, groups: Groups) -> Modulation:
        return self.adapter.modulate(states.inner, rows, groups)

    def absorb(self, states: GuardedState, rows: Tensor, groups: Groups, moments: Moments) -> GuardedState:
        """As the adapter does, except that a state that would not be finite stays what it was."""
        new = self.adapter.absorb(states.inner, rows, groups, moments)
        finite = tree.finite_rows(new, len(states.none_selected), states.none_selected.device)
        return states._replace(inner=tree.where(finite, new, states.inner))

    def merging(self) -> Merging:
        """The adapter's rules, and the comparison's means by the rows that were compared.

        Runs of rows without a choice are the latest contribution's: where one replica alone is stuck, its run goes on.
        """
        names = ("compared.adapted", "compared.frozen", "compared.adapted_entropy", "compared.frozen_entropy")
        compared = Fading(names, rows="compared.rows", memory_rows=self.config.memory_rows)
        return self.adapter.merging().below("inner").joined(Merging((compared,)))

    def adapt(self, states: GuardedState, rows: Tensor, batch: Batch) -> tuple[GuardedState, Report]:
        count, device = len(states.none_selected), states.none_selected.device
        inner, report = self.adapter.adapt(states.inner, rows, batch)
        report = tree.apply(lambda field: _padded(field, count), report)
        bits = report.trips
        if self.adapter.source_params.numel():
            found = self.adapter.params(inner)
            params, far = cap_step(self.adapter.params(states.inner), found, self.config)
            params, out = cap_displacement(params, self.adapter.source_params, self.config)
            # a stream without data keeps every bit, wherever it is
            inner = self.adapter.with_params(inner, torch.where(report.applied.unsqueeze(1), params, found))
            bits = bits | _bit(far & report.applied, Trip.STEP_NORM) | _bit(out & report.applied, Trip.DISPLACEMENT)
        none, every = count_runs(states.none_selected, states.all_selected, report)
        new = GuardedState(inner, states.compared, none, every)
        active = report.seen > 0
        stuck = torch.maximum(none, every) >= self.config.selected_rows
        bits = bits | _bit(stuck & active, Trip.SELECTED_SHARE)
        if batch.frozen_logits is not None and self.adapter.classes:
            frozen = frozen_answers(batch.frozen_logits, batch.weights, rows, count)
            new = new._replace(compared=compare(states.compared, report, frozen, self.config.memory_rows))
            bits = bits | _bit(collapsed(new.compared, self.config) & active, Trip.COLLAPSE)
            bits = bits | _bit(too_sure(new.compared, self.config) & active, Trip.ENTROPY_FLOOR)
        finite = tree.finite_rows(new, count, device)
        finite = finite & report.entropy.isfinite() & report.mean_probs.isfinite().all(dim=1)
        return tree.where(finite, new, states), report._replace(
            applied=report.applied & finite,
            refused=report.refused | ~finite,
            trips=torch.where(finite, bits, report.trips | int(Trip.NON_FINITE)),
        )

    def pull(self, states: GuardedState, mask: Tensor, share: float) -> GuardedState:
        """Move the learned parameters by `share` toward the source, where `mask` [S] is true.

        The optimizer starts afresh there (its momentum points to where the parameters shall not go), and so do the
        guards' memories, so that the next trip is about what comes after.
        """
        moments = optim.moments(states)
        fresh = optim.with_moments(states, [tree.apply(torch.zeros_like, each) for each in moments])
        source = self.adapter.source_params
        if source.numel():
            params = self.params(states)
            fresh = self.with_params(fresh, torch.lerp(params, source.expand_as(params), share))
        forgotten = tree.apply(torch.zeros_like, fresh._replace(inner=()))
        return tree.where(mask, forgotten._replace(inner=fresh.inner), states)


def cap_step(old: Tensor, new: Tensor, config: GuardConfig) -> tuple[Tensor, Tensor]:
    """Scale steps back to `step_rms_max`, [S, D]; and whether they were so far beyond it that it is an alarm, [S].

    >>> cap_step(torch.zeros(1, 4), torch.full((1, 4), 0.04), GuardConfig())
    (tensor([[0.0200, 0.0200, 0.0200, 0.0200]]), tensor([False]))
    """
    length, limit = _rms(new - old), config.step_rms_max
    scaled = old + (limit / length.clamp(min=limit)).unsqueeze(1) * (new - old)
    return torch.where((length > limit).unsqueeze(1), scaled, new), length > config.step_trip_factor * limit


def cap_displacement(params: Tensor, source: Tensor, config: GuardConfig) -> tuple[Tensor, Tensor]:
    """Put parameters [S, D] that are too far from the source's [D] back on the ball; and whether they were, [S].

    >>> cap_displacement(torch.full((1, 4), 1.5), torch.ones(4), GuardConfig())
    (tensor([[1.2500, 1.2500, 1.2500, 1.2500]]), tensor([True]))
    """
    length, limit = _rms(params - source), config.displacement_rms_max
    projected = source + (limit / length.clamp(min=limit)).unsqueeze(1) * (params - source)
    # rounding may leave a projected point outside by a hair, and that is no reason to trip again
    return torch.where((length > limit).unsqueeze(1), projected, params), length > limit * (1 + 1e-5)


def count_runs(none_selected: Tensor, all_selected: Tensor, report: Report) -> tuple[Tensor, Tensor]:
    """Rows since one was selected, and since one was not; both [S]. A batch that brought nothing changes neither."""
    none = torch.where(report.selected == 0, none_selected + report.seen, 0)
    every = torch.where(report.selected == report.seen, all_selected + report.seen, 0)
    idle = report.seen == 0
    return torch.where(idle, none_selected, none), torch.where(idle, all_selected, every)


class FrozenAnswers(NamedTuple):
    """Means of the frozen network's answers to the rows it was asked about, by stream; 0 where there was none."""

    mean_probs: Tensor  # [S, C]
    entropy: Tensor  # of single answers, nats, [S]
    rows: Tensor  # asked about, int64 [S]


def frozen_answers(logits: Tensor, weights: Tensor, rows: Tensor, streams: int) -> FrozenAnswers:
    """What `Report` says of the adapted answers, of the frozen ones.

    Args:
        logits: [B, C]; rows that hold NaN were not asked about.
        weights: [B]; rows of weight 0 are not seen.
        rows: int64 [B].
        streams: S.
    """
    asked = (weights > 0) & ~logits.isnan().any(dim=1)
    probs = torch.where(asked.unsqueeze(1), logits.softmax(dim=1), 0.0)
    entropy = torch.where(asked, losses.entropy(logits), 0.0)
    count = rows.new_zeros(streams).index_add(0, rows, asked.to(rows.dtype))
    each = count.clamp(min=1)
    mean_probs = probs.new_zeros(streams, probs.shape[1]).index_add(0, rows, probs) / each.unsqueeze(1)
    return FrozenAnswers(mean_probs, entropy.new_zeros(streams).index_add(0, rows, entropy) / each, count)


def compare(memory: Compared, report: Report, frozen: FrozenAnswers, memory_rows: float) -> Compared:
    """Take one batch into the moving means: of n rows asked about, with the weight `1 − exp(−n/memory_rows)`."""
    seen = frozen.rows.to(memory.adapted_entropy.dtype)
    weight = -torch.expm1(-seen / memory_rows)

    def moved(past: Tensor, now: Tensor) -> Tensor:
        shape = (-1, *[1] * (past.dim() - 1))
        return torch.where((seen > 0).view(shape), torch.lerp(past, now.to(past), weight.view(shape)), past)

    return Compared(
        rows=memory.rows + frozen.rows,
        adapted=moved(memory.adapted, report.mean_probs),
        frozen=moved(memory.frozen, frozen.mean_probs),
        adapted_entropy=moved(memory.adapted_entropy, report.entropy),
        frozen_entropy=moved(memory.frozen_entropy, frozen.entropy),
    )


def collapsed(memory: Compared, config: GuardConfig) -> Tensor:
    """Whether adapted answers fell to fewer classes than `collapse_share` of the frozen ones', [S].

    The number of classes is `exp(entropy of the mean answer)`. A stream that shows one class has few in both and does
    not trip; where the frozen answers have collapsed themselves, this is blind.
    """
    weight = _weight(memory, config).unsqueeze(1)
    adapted, frozen = effective_classes(memory.adapted / weight), effective_classes(memory.frozen / weight)
    return (memory.rows >= config.compare_rows_min) & (adapted < config.collapse_share * frozen)


def too_sure(memory: Compared, config: GuardConfig) -> Tensor:
    """Whether adapted answers are surer than the entropy floor while the frozen ones are far from it, [S]."""
    floor = config.entropy_floor * math.log(max(memory.adapted.shape[1], 1))
    weight = _weight(memory, config)
    sure = memory.adapted_entropy / weight < floor
    unsure = memory.frozen_entropy / weight > config.entropy_floor_gap * floor
    return (memory.rows >= config.compare_rows_min) & sure & unsure


def effective_classes(mean_probs: Tensor) -> Tensor:
    """`exp(H)` of probabilities [S, C]: between 1 and C, [S].

    >>> effective_classes(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    tensor([2., 1.])
    """
    entropy: Tensor = torch.special.entr(mean_probs).sum(dim=1)
    return entropy.exp()


def _weight(memory: Compared, config: GuardConfig) -> Tensor:
    """What the weights in the moving means sum to, [S]: 0 is avoided for streams that have none yet."""
    weight = -torch.expm1(-memory.rows.to(memory.adapted_entropy.dtype) / config.memory_rows)
    return torch.where(memory.rows > 0, weight, 1.0)


def _rms(table: Tensor) -> Tensor:
    """Root mean square of each row, [S]; 0 where D is 0."""
    length: Tensor = table.norm(dim=1)
    return length / math.sqrt(max(table.shape[1], 1))


def _bit(mask: Tensor, trip: Trip) -> Tensor:
    return mask.to(torch.int64) * int(trip)


def _padded(field: Tensor, count: int) -> Tensor:
    """A report's field with rows for all states: an adapter without state cannot know how many the table has."""
    missing = count - field.shape[0]
    return torch.cat([field, field.new_zeros(missing, *field.shape[1:])]) if missing else field
