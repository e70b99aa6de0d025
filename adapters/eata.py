"""Efficient Test-Time Model Adaptation without Forgetting: EATA.

Niu, Wu, Zhang, Chen, Zheng, Zhao & Tan, ICML 2022, arXiv 2204.02610. Equations: 2 and 3 (reliable samples), 4 to 6
(redundant samples), 7 (the loss), 8 and 9 (the Fisher anchor).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters import anchors, losses, optim
from adapters.base import AdapterError, Batch, Groups, Moments, Report, Site, UnsupportedModel
from adapters.merge_rules import Averages, Pooled, Steps, Totals, discount
from adapters.merging import Merging
from adapters.norm import CONTRADICT_MIN_ROWS, Evidence, Modulation, Network, Statistics, pool

MOMENTS_MIN_ROWS = 8  # requests of fewer rows are answered with the stream's statistics alone


@dataclass(frozen=True)
class EATAConfig:
    """Settings of EATA; what the paper calls them is in brackets."""

    entropy_margin: float | None = None  # E_0 (Eq. 3), nats; None: 0.4 · ln C, as published
    redundancy_margin: float | None = None  # ε (Eq. 5), |cos|; None: `redundancy_margin(C)`
    anchor: Literal["fisher", "l2", "none"] = "fisher"
    anchor_weight: float = 1.0  # β (Eq. 8); the paper: 1 on CIFAR-10, 2,000 on ImageNet
    optimizer: optim.OptimizerName = "adam"  # the paper takes SGD with momentum 0.9; on CIFAR-10-C Adam is customary
    learning_rate: float = 1e-3
    momentum: float = 0.9  # of SGD
    source_pull: float = 0.0  # share of the way back to the source's parameters after each step
    full_step_rows: int | None = None  # selected rows of a full step; of fewer, it is shorter; None: always full
    mean_probs_decay: float = 0.9  # 1 − α (Eq. 4)
    statistics: Literal["batch", "evidence"] = "batch"  # as published, or source ⊕ stream ⊕ request (below)
    source_images: float = 16.0  # "evidence": what the source's statistics count for, in images
    stream_images_max: float = 256.0  # "evidence": what the stream's statistics count for at most, in images
    class_mix: float = 0.1  # "evidence": τ of a new stream; see `EATAState.class_mix`
    class_mix_rate: float = 0.0  # … and the weight of the newest step in its moving mean; 0: it stays what it was


CLASS_MIX_MIN = 0.02  # τ of a stream whose requests all hold the same classes
CLASS_MIX_FACTOR = 5.0  # τ above that, over the divergence of a step's classes from its stream's, nats
MARGINAL_RATE = 0.2  # of the moving mean of a stream's classes, a step


class EATAPrior(NamedTuple):
    """What EATA knows of a model beforehand; P normalised channels."""

    fisher: Tensor  # F for [γ | β], [2 P]


class EATAState(NamedTuple):
    """Everything that a stream's adaptation changes."""

    params: Tensor  # θ = [γ | β] of all normalisation layers, float32 [2 P]
    mean: Tensor  # the stream's own statistics, float32 [P]; the source's until something was seen
    var: Tensor  # float32 [P]
    images: Tensor  # images behind `mean` and `var`, capped, float32 []
    discount: Tensor  # of images so far, by contradiction and by the cap: Σ −ln of the factors, nats, float64 []
    source_images: Tensor  # images that the source's statistics are worth to this stream, float32 []
    class_mix: Tensor  # τ: variance of a request's mean about its stream's, over that between images, float32 []
    marginal: Tensor  # moving mean of the stream's answers, float32 [C]; zeros until it has learned
    mean_probs: Tensor  # m^t, Eq. 4, float32 [C]; zeros until a row was selected
    optimizer: optim.OptimizerState
    seen: Tensor  # rows so far, int64 []
    reliable: Tensor  # rows that passed the first filter so far, int64 []
    selected: Tensor  # rows that passed both so far, int64 []


def redundancy_margin(classes: int) -> float:
    """ε of Eq. 5 for a number of classes: the authors' values for 10, 100 and 1,000, and about `1.3/√C` elsewhere.

    The cosine between two probability vectors grows as classes get fewer; ImageNet's 0.05 would select nothing at 10.

    >>> redundancy_margin(10), redundancy_margin(100), redundancy_margin(1000), redundancy_margin(25)
    (0.4, 0.1, 0.05, 0.26)
    """
    return {10: 0.4, 100: 0.1, 1000: 0.05}.get(classes, min(1.0, 1.3 / math.sqrt(classes)))


class EATA:
    """Entropy minimisation on reliable, non-redundant rows, over normalisation scales and shifts, held by an anchor.

    With entropy `H(x)`, probabilities `p(x)` and their moving mean `m` over selected rows, a row is selected where
    `H(x) < E_0` and `|cos(p(x), m)| < ε`; the loss is the mean over the selected of `exp(E_0 − H(x)) · H(x)`, the
    factor held constant, plus `β Σ F (θ − θ0)²`. Where no row is selected nothing moves.

    `statistics="batch"` is the published method: every request is normalised by its own statistics. With `"evidence"`,
    statistics are pooled from three sources, in proportion to the images behind each: the source (counting as
    `source_images`), the stream's past (at most `stream_images_max`), and the request's own rows; requests of fewer
    than 8 rows use the first two alone, so a single image is answered well and for the price of a plain forward.

    Args:
        network: must have normalisation layers that can be modulated.
        classes: C.
        prior: the Fisher diagonal; needed with `anchor="fisher"` and a weight above 0.
        config: defaults are the paper's, where it has them.

    Raises:
        UnsupportedModel: the network has no normalisation layer.
        AdapterError: the prior is missing or of another size.

    Deviations from the authors' code (github.com/mr-eggplant/EATA), none of which changes a trajectory:
        all streams of a batch take their steps at once, each from the mean over its own rows; filters are masks, not
        indexing, so that no step waits for the device; the anchor's gradient is written out. A layer that gets one
        value per channel uses the source's statistics there; theirs raises an error.

    >>> from torch import nn
    >>> net = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)))
    >>> eata = EATA(net, classes=10, config=EATAConfig(anchor="l2"))
    >>> eata.init().params.shape
    torch.Size([8])
    """

    site: Site = "norm"

    def __init__(
        self, network: Network, classes: int, prior: EATAPrior | None = None, config: EATAConfig | None = None
    ) -> None:
        config = config or EATAConfig()
        if not network.channels:
            raise UnsupportedModel(
                "EATA adapts normalisation layers, and this model has none that it knows (BatchNorm1d, BatchNorm2d, "
                "GroupNorm, LayerNorm over the last dimension)"
            )
        if config.statistics == "evidence" and not network.has_statistics:
            config = replace(config, statistics="batch")  # nothing to pool: each row has its own
        self.network = network
        self.classes = classes
        self.config = config
        self.entropy_margin = 0.4 * math.log(classes) if config.entropy_margin is None else config.entropy_margin
        self.redundancy_margin = (
            redundancy_margin(classes) if config.redundancy_margin is None else config.redundancy_margin
        )
        self.source_params = torch.cat([network.scale, network.shift])
        self.importance = self._importance(prior)

    def _importance(self, prior: EATAPrior | None) -> Tensor | float:
        if self.config.anchor == "none" or self.config.anchor_weight == 0:
            return 0.0
        if self.config.anchor == "l2":
            return 1.0
        if prior is None:
            raise AdapterError(
                "the Fisher anchor needs a prior (the Fisher diagonal); or choose the anchor 'l2' or 'none'"
            )
        if prior.fisher.shape != self.source_params.shape:
            raise AdapterError(
                f"the prior holds {prior.fisher.numel()} Fisher values, this model has {self.source_params.numel()} "
                "normalisation parameters: the prior belongs to another model"
            )
        return prior.fisher.to(self.source_params)

    def init(self) -> EATAState:
        zero = torch.zeros((), dtype=torch.int64, device=self.source_params.device)
        return EATAState(
            params=self.source_params.clone(),
            mean=self.network.mean.clone(),
            var=self.network.var.clone(),
            images=self.source_params.new_zeros(()),
            discount=self.source_params.new_zeros((), dtype=torch.float64),
            source_images=self.source_params.new_full((), self.config.source_images),
            class_mix=self.source_params.new_full((), self.config.class_mix),
            marginal=self.source_params.new_zeros(self.classes),
            mean_probs=self.source_params.new_zeros(self.classes),
            optimizer=optim.init(self.config.optimizer, self.source_params),
            seen=zero,
            reliable=zero.clone(),
            selected=zero.clone(),
        )

    def params(self, states: EATAState) -> Tensor:
        """What was learned, [S, 2 P]: for guards."""
        return states.params

    def with_params(self, states: EATAState, params: Tensor) -> EATAState:
        """The same table with other parameters, [S, 2 P]: for guards."""
        return states._replace(params=params)

    def merging(self) -> Merging:
        """Parameters by the rows that they learned from, statistics by images.

        What the source's statistics are worth is measured anew by every large request: it stays the latest's.
        """
        return Merging(
            (
                Steps(("params",), by="selected"),
                Pooled("mean", "var", "images", "discount", self.config.stream_images_max),
                Averages(("class_mix", "marginal"), by="seen"),
                Averages(("mean_probs",), by="selected"),
                Totals(("seen", "reliable", "selected")),
            ),
            local=("optimizer.step", "optimizer.first", "optimizer.second"),
        )

    def modulate(self, states: EATAState, rows: Tensor, groups: Groups) -> Modulation:
        """How to answer these requests: what a request gets follows from its own rows and state alone."""
        return self._modulation(states.params, states, rows, groups, own_min_rows=MOMENTS_MIN_ROWS)

    def _modulation(
        self, params: Tensor, states: EATAState, rows: Tensor, groups: Groups, own_min_rows: int
    ) -> Modulation:
        scale, shift = params.chunk(2, dim=1)
        if self.config.statistics == "batch":
            return Modulation(scale, shift, states.mean, states.var, rows, groups, Statistics.OWN)
        known = self._known(states)
        if max(groups.sizes) < own_min_rows:
            return Modulation(scale, shift, known.mean, known.var, rows, groups, Statistics.KNOWN)
        of_group = groups.of_rows(rows)
        class_mix = states.class_mix[of_group]
        count = torch.tensor(groups.sizes, dtype=scale.dtype, device=scale.device)
        evidence = Evidence(
            known=states.images + states.source_images,
            own=torch.where(count >= own_min_rows, _worth(count, class_mix), 0.0),
            tolerance=class_mix,
        )
        return Modulation(scale, shift, known.mean, known.var, rows, groups, Statistics.BLEND, evidence)

    def _known(self, states: EATAState) -> Moments:
        """Source ⊕ stream, [S, P]: what is known before a request is seen."""
        source = Moments(self.network.mean.expand_as(states.mean), self.network.var.expand_as(states.var))
        return pool(source, states.source_images, Moments(states.mean, states.var), states.images)

    def adapt(self, states: EATAState, rows: Tensor, batch: Batch) -> tuple[EATAState, Report]:
        """One step of every stream in the batch, from the rows of weight > 0."""
        # a copy: the table's row may be a view, and other rows are written while this one is learned from
        params = states.params.detach().clone().requires_grad_()
        with torch.enable_grad():
            output = self.network(batch.x, self._modulation(params, states, rows, batch.groups, own_min_rows=1))
            entropy = losses.entropy(output.logits)
            probs = output.logits.detach().softmax(dim=1)
            choice = self._select(states, rows, entropy.detach(), probs, batch.weights)
            # exp(E_0 − H), held constant (Eq. 2 and 3); masked rows first, so that no overflow reaches the sum
            factor = torch.where(choice.selected, batch.weights / (entropy.detach() - self.entropy_margin).exp(), 0.0)
            per_row = factor * torch.where(choice.selected, entropy, 0.0)
            loss = (_sum_by_state(per_row, rows, states.seen) / choice.selected_count.clamp(min=1)).sum()
            (grad,) = torch.autograd.grad(loss, params)
        grad = grad + anchors.gradient(states.params, self.source_params, self.importance, self.config.anchor_weight)
        applied = choice.selected_count > 0
        new_params, new_optimizer = self._step(states, grad, choice.selected_count)
        new = states._replace(
            params=torch.where(applied.unsqueeze(1), new_params, states.params),
            optimizer=optim.OptimizerState(
                step=torch.where(applied, new_optimizer.step, states.optimizer.step),
                first=torch.where(applied.unsqueeze(1), new_optimizer.first, states.optimizer.first),
                second=torch.where(applied.unsqueeze(1), new_optimizer.second, states.optimizer.second),
            ),
            mean_probs=self._new_mean_probs(states, rows, probs, choice),
            seen=states.seen + choice.seen_count,
            reliable=states.reliable + choice.reliable_count,
            selected=states.selected + choice.selected_count,
        )
        if output.moments is not None:
            of_group = batch.groups.of_rows(rows)
            seen_rows = new.images.new_zeros(len(of_group)).index_add(0, batch.groups.index, choice.seen.to(new.images))
            new = self._pool_statistics(new, of_group, seen_rows, batch.groups.sizes, output.moments)
        seen_entropy = torch.where(choice.seen, entropy.detach(), 0.0)
        seen_probs = torch.where(choice.seen.unsqueeze(1), probs, 0.0)
        count = choice.seen_count.clamp(min=1)
        mean_probs = _sum_by_state(seen_probs, rows, states.seen) / count.unsqueeze(1)
        if self.config.statistics == "evidence" and self.config.class_mix_rate:
            new = self._follow_classes(new, mean_probs, choice.seen_count)
        report = Report(
            seen=choice.seen_count,
            reliable=choice.reliable_count,
            selected=choice.selected_count,
            entropy=_sum_by_state(seen_entropy, rows, states.seen) / count,
            mean_probs=mean_probs,
            applied=applied,
            refused=torch.zeros_like(applied),
            trips=torch.zeros_like(choice.seen_count),
        )
        return new, report

    def _select(self, states: EATAState, rows: Tensor, entropy: Tensor, probs: Tensor, weights: Tensor) -> "_Choice":
        """The two filters of section 4.1, as masks. A comparison with NaN is false: such a row is never selected."""
        seen = weights > 0
        reliable = seen & (entropy < self.entropy_margin)
        similarity = functional.cosine_similarity(states.mean_probs[rows], probs, dim=1).abs()
        first = states.selected[rows] == 0  # no mean yet: nothing is redundant
        selected = reliable & (first | (similarity < self.redundancy_margin))

        def count(mask: Tensor) -> Tensor:
            return _sum_by_state(mask.to(torch.int64), rows, states.seen)

        return _Choice(seen, reliable, selected, count(seen), count(reliable), count(selected))

    def _new_mean_probs(self, states: EATAState, rows: Tensor, probs: Tensor, choice: "_Choice") -> Tensor:
        """`m^t = 0.9 m^{t−1} + 0.1 · mean of the selected` (Eq. 4), or that mean itself the first time."""
        chosen = torch.where(choice.selected.unsqueeze(1), probs, 0.0)
        mean = _sum_by_state(chosen, rows, states.seen) / choice.selected_count.clamp(min=1).unsqueeze(1)
        decay = self.config.mean_probs_decay * (states.selected > 0).to(mean.dtype).unsqueeze(1)
        moved = decay * states.mean_probs + (1 - decay) * mean
        return torch.where((choice.selected_count > 0).unsqueeze(1), moved, states.mean_probs)

    def _step(self, states: EATAState, grad: Tensor, selected: Tensor) -> tuple[Tensor, optim.OptimizerState]:
        """The optimizer's step and then the pull; both shorter where few rows were selected, [S]."""
        config, full = self.config, self.config.full_step_rows
        share = (
            torch.ones_like(states.images) if full is None else (selected.to(states.params.dtype) / full).clamp(max=1)
        )
        rate = config.learning_rate if full is None else config.learning_rate * share
        if config.optimizer == "adam":
            params, optimizer = optim.adam(states.optimizer, states.params, grad, learning_rate=rate)
        else:
            params, optimizer = optim.sgd(
                states.optimizer, states.params, grad, learning_rate=rate, momentum=config.momentum
            )
        if config.source_pull:
            params = torch.lerp(params, self.source_params.expand_as(params), config.source_pull * share.unsqueeze(1))
        return params, optimizer

    def absorb(self, states: EATAState, rows: Tensor, groups: Groups, moments: Moments) -> EATAState:
        """Take requests' statistics, as `adapt` does; nothing where the published method is followed.

        Args:
            states: table of S states.
            rows: int64 [G], which state each request belongs to.
            groups: the requests; their sizes count.
            moments: [G, P], from the forward that answered.
        """
        if self.config.statistics == "batch":
            return states
        seen_rows = torch.tensor(groups.sizes, dtype=states.images.dtype, device=states.images.device)
        return self._pool_statistics(states, rows, seen_rows, groups.sizes, moments)

    def _follow_classes(self, states: EATAState, mean_probs: Tensor, seen: Tensor) -> EATAState:
        """Let τ follow how far the classes of a stream's steps lie from those of its past.

        What a request's classes do to its mean cannot be told from what a change of domain does by looking at means;
        but a change of domain leaves the classes about what they were. The Jensen-Shannon divergence of n answers from
        a long mean is (C − 1)/(8n) by chance; twice that is taken off.

        Args:
            states: table of S states.
            mean_probs: of the rows seen, [S, C].
            seen: how many, int64 [S].
        """
        middle = (mean_probs + states.marginal) / 2
        entropies = [torch.special.entr(each).sum(dim=1) for each in (middle, mean_probs, states.marginal)]
        divergence = entropies[0] - (entropies[1] + entropies[2]) / 2
        beyond_chance = (divergence - (self.classes - 1) / (4 * seen.clamp(min=1))).clamp(min=0)
        told = CLASS_MIX_MIN + CLASS_MIX_FACTOR * beyond_chance
        enough, known = seen >= CONTRADICT_MIN_ROWS, states.marginal.sum(dim=1) > 0
        moved = torch.lerp(states.class_mix, told.to(states.class_mix), self.config.class_mix_rate)
        marginal = torch.where(known.unsqueeze(1), torch.lerp(states.marginal, mean_probs, MARGINAL_RATE), mean_probs)
        return states._replace(
            class_mix=torch.where(enough & known, moved, states.class_mix),
            marginal=torch.where(enough.unsqueeze(1), marginal, states.marginal),
        )

    def _pool_statistics(
        self, states: EATAState, of_group: Tensor, seen_rows: Tensor, sizes: tuple[int, ...], moments: Moments
    ) -> EATAState:
        """Take requests' statistics into their streams': pooled by images, the past capped.

        Args:
            states: table of S states.
            of_group: int64 [G], the state of each request.
            seen_rows: float [G], its rows that count; 0: its statistics do not.
            sizes: all rows of each request.
            moments: [G, P].
        """
        class_mix = states.class_mix[of_group]
        images = _worth(seen_rows, class_mix)
        total = _sum_by_state(images, of_group, states.seen)
        share = (images / total.clamp(min=torch.finfo(total.dtype).tiny)[of_group]).unsqueeze(1)
        mean = _sum_by_state(share * moments.mean, of_group, states.seen)
        between = (moments.mean - mean[of_group]).square()
        var = _sum_by_state(share * (moments.var + between), of_group, states.seen)
        past, source_images = states.images, states.source_images
        if moments.between is not None:
            # what a request contradicts is worth less from now on: 1/(1/N + B), of the past and of the source alike
            stream = Moments(states.mean[of_group], states.var[of_group])
            source = Moments(self.network.mean.unsqueeze(0), self.network.var.unsqueeze(0))
            of_past = share.squeeze(1) * self.network.contradiction(moments, stream, sizes, class_mix)
            large = torch.where(seen_rows >= CONTRADICT_MIN_ROWS, images, 0.0)  # only these measure the source
            of_source = large * self.network.contradiction(moments, source, sizes, class_mix)
            past = past / (1 + past * _sum_by_state(of_past, of_group, states.seen))
            most, measured = self.config.source_images, _sum_by_state(large, of_group, states.seen)
            doubt = _sum_by_state(of_source, of_group, states.seen) / measured.clamp(min=torch.finfo(total.dtype).tiny)
            source_images = torch.where(measured > 0, most / (1 + most * doubt), source_images)
        pooled = pool(Moments(states.mean, states.var), past, Moments(mean, var), total)
        capped = (past + total).clamp(max=self.config.stream_images_max)
        left = past * (capped / (past + total).clamp(min=torch.finfo(total.dtype).tiny))
        return states._replace(
            mean=pooled.mean,
            var=pooled.var,
            images=capped,
            discount=states.discount + discount(states.images, left),
            source_images=source_images,
        )


def _worth(rows: Tensor, class_mix: Tensor) -> Tensor:
    """How many images' worth a request's statistics are as an estimate of its stream's: 1/(1/n + τ); 0 of none."""
    return 1 / (1 / rows + class_mix)


class _Choice(NamedTuple):
    """Which rows pass the filters, bool [B], and how many of each state's, int64 [S]."""

    seen: Tensor
    reliable: Tensor
    selected: Tensor
    seen_count: Tensor
    reliable_count: Tensor
    selected_count: Tensor


def _sum_by_state(values: Tensor, rows: Tensor, states: Tensor) -> Tensor:
    """Sum [B, …] over the rows of each state: [S, …]; `states` is any field [S]."""
    return values.new_zeros(states.shape[0], *values.shape[1:]).index_add(0, rows, values)
