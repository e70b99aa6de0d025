"""Alignment: what a detector's backbone gives is led back to what it gave on the source's images, without labels.

Yoo, Lee, Chung, Kim & Kwak, "What, How, and When Should Object Detectors Update in Continually Changing Test Domains?",
CVPR 2024, arXiv 2312.08875. From there: the features of images, level by level, as Gaussians that are aligned with the
source's by a KL divergence (their image-level loss); a step only while they lie farther from the source than its own
images do (their first criterion of when to update).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters import drift, optim
from adapters.base import AdapterError, Batch, Groups, Moments, Report, Site, UnsupportedModel
from adapters.merge_rules import Pooled, Steps, Totals, discount
from adapters.merging import Merging
from adapters.norm import Evidence, Modulation, Network, Statistics, pool


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of alignment. Evidence is counted in images; a limit on it is how soon the past is forgotten.

    Chosen on the built-in detector's scenes of training digits.
    """

    learning_rate: float = 1e-2  # of Adam
    full_step_rows: int = 8  # rows of a full step; of fewer, it is shorter
    drift_max: float = 1.0  # up to here, in units of the alarm line, there is nothing to learn
    source_images: float = 8.0  # what the source's batch-norm statistics count for
    stream_images_max: float = 64.0  # what the stream's own count for at most; 0: only scale and shift adapt
    feature_images_max: float = 16.0  # images that the moving moments of the features remember


class AlignmentPrior(NamedTuple):
    """The source's features; L levels, of F channels in all. Tensors only: saved and restored as they are."""

    mean: Tensor  # over all pixels of the source's images, [F]
    var: Tensor  # biased, [F]
    levels: Tensor  # channels of each level, int64 [L]
    sizes: Tensor  # window sizes, growing, int64 [K]
    limits: Tensor  # 99th percentile of the gap between windows of that size of the source's images and it, [K]


class AlignmentState(NamedTuple):
    """Everything that a stream's adaptation changes."""

    params: Tensor  # θ = [γ | β] of all normalisation layers, float32 [2 P]
    mean: Tensor  # the stream's own batch-norm statistics, float32 [P]; the source's until something was seen
    var: Tensor  # float32 [P]
    images: Tensor  # images behind `mean` and `var`, capped, float32 []
    discount: Tensor  # of images so far, by the cap: Σ −ln of the factors, nats, float64 []
    feature_mean: Tensor  # moving moments of the features, float32 [F]; the source's until something was seen
    feature_var: Tensor  # float32 [F]
    feature_images: Tensor  # images behind these two, capped, float32 []
    feature_discount: Tensor  # as `discount`, of feature_images, float64 []
    optimizer: optim.OptimizerState
    seen: Tensor  # rows so far, int64 []
    selected: Tensor  # rows that a step was taken on so far, int64 []


class Alignment:
    """Batch-norm statistics that follow the stream, and scales and shifts that learn while it has drifted.

    The features of a stream's last images have, at channel c of level l, the mean `m` and the variance `v` over all
    pixels; the source's have `μ` and `σ²`. The gap is the mean over levels of the mean over channels of the symmetric
    KL divergence between these Gaussians,

        L(θ) = 1/L Σ_l 1/C_l Σ_c ½ (v/σ² + σ²/v + (m − μ)² (1/v + 1/σ²)) − 1,

    and drift is L over the 99th percentile of what windows of as many of the source's own images have: 1.0 is the alarm
    line. A stream above it takes a step of Adam on L; `m` and `v` are moving averages, through whose newest images the
    gradient flows. Below it nothing is learned, and no gradient is computed where that holds for all streams.

    Requests are normalised by statistics known before: the source's and the stream's own, in proportion to the images
    behind each. So an answer needs one image only, and costs a plain forward. The stream's follow in any case.

    Args:
        network: the backbone, whose answer is feature maps [B, C, h, w], one or a dict of them (a level each); [B, C]
            counts as a map of one pixel. Must have normalisation layers that can be modulated.
        prior: of this network: `alignment_prior`.
        config: rate and memories.

    Raises:
        UnsupportedModel: the network has no normalisation layer.
        AdapterError: the prior is not sound.

    Deviations from the paper: scales and shifts learn, where theirs adds low-rank adaptors; batch-norm statistics adapt
        too; Gaussians are diagonal and of all pixels, with both variances in a symmetric divergence, where theirs are
        of the means of images, with the source's covariance in both places; the moving averages begin with the first
        images and not with the source; features of single objects are not aligned; the second criterion of when to
        update (a sudden rise of the loss) is left out, since a stream whose loss rises passes the alarm line.

    >>> from torch import nn
    >>> net = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    >>> images = torch.sin(torch.arange(8 * 3 * 6 * 6.0)).view(8, 3, 6, 6)
    >>> alignment = Alignment(net, alignment_prior(net, [images]))
    >>> states = alignment.init()
    >>> states.params.shape, states.feature_mean.shape
    (torch.Size([8]), torch.Size([4]))
    """

    site: Site = "norm"
    classes = 0  # it reports no probabilities

    def __init__(self, network: Network, prior: AlignmentPrior, config: AlignmentConfig | None = None) -> None:
        if not network.channels:
            raise UnsupportedModel(
                "alignment adapts normalisation layers, and this backbone has none that it knows (BatchNorm1d, "
                "BatchNorm2d, GroupNorm, LayerNorm over the last dimension)"
            )
        levels = tuple(prior.levels.tolist())
        if not (len(prior.mean) == len(prior.var) == sum(levels) > 0 and len(prior.sizes) == len(prior.limits) > 0):
            raise AdapterError(
                f"the prior holds {len(prior.mean)} means, {len(prior.var)} variances and levels of {levels} channels, "
                f"{len(prior.sizes)} window sizes and {len(prior.limits)} limits: it was not made by `alignment_prior`"
            )
        self.network = network
        self.prior = AlignmentPrior(*(each.to(network.scale.device) for each in prior))
        self.config = config or AlignmentConfig()
        self.source_params = torch.cat([network.scale, network.shift])
        self.levels = levels

    def init(self) -> AlignmentState:
        zero = torch.zeros((), dtype=torch.int64, device=self.source_params.device)
        return AlignmentState(
            params=self.source_params.clone(),
            mean=self.network.mean.clone(),
            var=self.network.var.clone(),
            images=self.source_params.new_zeros(()),
            discount=self.source_params.new_zeros((), dtype=torch.float64),
            feature_mean=self.prior.mean.clone(),
            feature_var=self.prior.var.clone(),
            feature_images=self.source_params.new_zeros(()),
            feature_discount=self.source_params.new_zeros((), dtype=torch.float64),
            optimizer=optim.init("adam", self.source_params),
            seen=zero,
            selected=zero.clone(),
        )

    def params(self, states: AlignmentState) -> Tensor:
        """What was learned, [S, 2 P]: for guards."""
        return states.params

    def with_params(self, states: AlignmentState, params: Tensor) -> AlignmentState:
        """The same table with other parameters, [S, 2 P]: for guards."""
        return states._replace(params=params)

    def merging(self) -> Merging:
        """Parameters by the rows that steps were taken on, statistics and features by images."""
        config = self.config
        of_features = ("feature_mean", "feature_var", "feature_images", "feature_discount")
        return Merging(
            (
                Steps(("params",), by="selected"),
                Pooled("mean", "var", "images", "discount", config.stream_images_max),
                Pooled(*of_features, images_max=config.feature_images_max),
                Totals(("seen", "selected")),
            ),
            local=("optimizer.step", "optimizer.first", "optimizer.second"),
        )

    def modulate(self, states: AlignmentState, rows: Tensor, groups: Groups) -> Modulation:
        """How to answer these requests: by what is known of their streams, whatever else is in the batch."""
        return self._modulation(states.params, states, rows, groups)

    def _modulation(self, params: Tensor, states: AlignmentState, rows: Tensor, groups: Groups) -> Modulation:
        scale, shift = params.chunk(2, dim=1)
        source = Moments(self.network.mean.expand_as(states.mean), self.network.var.expand_as(states.var))
        worth = torch.full_like(states.images, self.config.source_images)
        known = pool(source, worth, Moments(states.mean, states.var), states.images)
        return Modulation(scale, shift, known.mean, known.var, rows, groups, Statistics.KNOWN)

    def drift(self, states: AlignmentState) -> Tensor:
        """How far each stream's last features lie from the source's, [S]: 1.0 is the alarm line; 0 of a new stream.

        As the adapted network sees them, so it falls while a stream adapts.
        """
        features = Moments(states.feature_mean, states.feature_var)
        return divergence(features, self.prior, self.levels) / self._alarm_line(states.feature_images)

    def adapt(self, states: AlignmentState, rows: Tensor, batch: Batch) -> tuple[AlignmentState, Report]:
        """Statistics follow the rows of weight > 0, and streams that have drifted take a step.

        One forward, and one backward where any stream has drifted. Every row of a drifted stream counts as reliable.
        """
        # a copy: the table's row may be a view, and other rows are written while this one is learned from
        params = states.params.detach().clone().requires_grad_()
        seen = (batch.weights > 0).to(states.images)
        count = _sum_by_state(seen, rows, states.images)
        images = (states.feature_images + count).clamp(max=self.config.feature_images_max)
        with torch.enable_grad():
            told = self._modulation(params, states, rows, batch.groups)
            output = self.network(batch.x, _measuring(told))
            newest = _pool_by_state(image_moments(output.logits), seen, rows, states.images)
            past = Moments(states.feature_mean, states.feature_var)
            features = pool(past, states.feature_images, newest, count)
            gap = divergence(features, self.prior, self.levels)
            drifted = (count > 0) & (gap.detach() / self._alarm_line(images) > self.config.drift_max)
            grad = torch.zeros_like(states.params)
            if drifted.any():
                (grad,) = torch.autograd.grad(torch.where(drifted, gap, 0.0).sum(), params)
        new = self._step(states, grad, count, drifted)
        active = (count > 0).unsqueeze(1)
        new = new._replace(
            feature_mean=torch.where(active, features.mean.detach(), states.feature_mean),
            feature_var=torch.where(active, features.var.detach(), states.feature_var),
            feature_images=torch.where(count > 0, images, states.feature_images),
            feature_discount=states.feature_discount + _discount(states.feature_images, count, images),
        )
        if output.moments is not None:
            requests = len(batch.groups.sizes)
            seen_rows = seen.new_zeros(requests).index_add(0, batch.groups.index, seen)
            new = self._pool_statistics(new, batch.groups.of_rows(rows), seen_rows, output.moments)
        seen_count = count.to(torch.int64)
        selected = torch.where(drifted, seen_count, 0)
        none = torch.zeros_like(count)
        report = Report(
            seen=seen_count,
            reliable=selected,
            selected=selected,
            entropy=none,
            mean_probs=none.new_zeros(len(none), 0),
            applied=drifted,
            refused=torch.zeros_like(drifted),
            trips=torch.zeros_like(seen_count),
        )
        return new._replace(seen=states.seen + seen_count, selected=states.selected + selected), report

    def absorb(self, states: AlignmentState, rows: Tensor, groups: Groups, moments: Moments) -> AlignmentState:
        """Take requests' batch-norm statistics; see `NormAdapter.absorb`."""
        seen_rows = torch.tensor(groups.sizes, dtype=states.images.dtype, device=states.images.device)
        return self._pool_statistics(states, rows, seen_rows, moments)

    def _alarm_line(self, images: Tensor) -> Tensor:
        """The prior's limit for streams with so many images behind their features, [S]."""
        prior = self.prior
        return drift.limit(drift.DriftPrior(prior.mean, prior.var, prior.sizes, prior.limits), images.clamp(min=1))

    def _step(self, states: AlignmentState, grad: Tensor, count: Tensor, drifted: Tensor) -> AlignmentState:
        """Adam's step of the streams that have drifted; the others keep every bit."""
        rate = self.config.learning_rate * (count / self.config.full_step_rows).clamp(max=1)
        params, optimizer = optim.adam(states.optimizer, states.params, grad, learning_rate=rate)
        stepped = drifted.unsqueeze(1)
        return states._replace(
            params=torch.where(stepped, params, states.params),
            optimizer=optim.OptimizerState(
                step=torch.where(drifted, optimizer.step, states.optimizer.step),
                first=torch.where(stepped, optimizer.first, states.optimizer.first),
                second=torch.where(stepped, optimizer.second, states.optimizer.second),
            ),
        )

    def _pool_statistics(
        self, states: AlignmentState, of_group: Tensor, seen_rows: Tensor, moments: Moments
    ) -> AlignmentState:
        """Take requests' statistics into their streams': pooled by images, the past capped.

        Args:
            states: table of S states.
            of_group: int64 [G], the state of each request.
            seen_rows: float [G], its rows that count; 0: its statistics do not.
            moments: [G, P].
        """
        count = _sum_by_state(seen_rows, of_group, states.images)
        newest = _pool_by_state(moments, seen_rows, of_group, states.images)
        pooled = pool(Moments(states.mean, states.var), states.images, newest, count)
        active = (count > 0).unsqueeze(1)
        images = (states.images + count).clamp(max=self.config.stream_images_max)
        return states._replace(
            mean=torch.where(active, pooled.mean, states.mean),
            var=torch.where(active, pooled.var, states.var),
            images=images,
            discount=states.discount + _discount(states.images, count, images),
        )


def alignment_prior(network: Network, batches: Iterable[Tensor], seed: int = 0) -> AlignmentPrior:
    """Measure the source's features, and how far windows of its own images lie from them, as `drift.drift_prior` does.

    Args:
        network: the frozen backbone.
        batches: N source images without labels, each [B, …]; as the backbone reads them (`Detector.pixels`).
        seed: of the draws.

    Raises:
        ValueError: there were fewer than 4 images.
    """
    found: list[Moments] = []
    levels: list[int] = []
    with torch.no_grad():
        for x in batches:
            maps = network(x).logits
            levels = [level.shape[1] for level in _levels(maps)]
            found.append(image_moments(maps))
    count = sum(len(each.mean) for each in found)
    if count < 4:
        raise ValueError(f"alignment needs at least 4 source images to compare with, not {count}")
    images = Moments(torch.cat([each.mean for each in found]), torch.cat([each.var for each in found]))
    device = images.mean.device
    source = drift.pool_images(images, torch.ones(1, count, device=device))
    channels = torch.tensor(levels, device=device)
    prior = AlignmentPrior(source.mean[0], source.var[0], channels, channels.new_zeros(0), source.mean.new_zeros(0))
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in drift.SIZES if size <= count // 4]
    limits = []
    for size in sizes:
        gaps = [
            divergence(drift.pool_images(images, chosen.to(device)), prior, tuple(levels))
            for chosen in drift._draw_windows(count, size, generator)
        ]
        limits.append(torch.cat(gaps).quantile(drift.QUANTILE) * (count + size) / (count - size))
    return prior._replace(sizes=torch.tensor(sizes, device=device), limits=torch.stack(limits))


def image_moments(maps: Any) -> Moments:
    """Mean and biased variance over the pixels of every image, at every channel of every level, end to end.

    Args:
        maps: [B, C, …] or [B, C], or a dict of such.

    Returns:
        [B, F].

    >>> image_moments({"8": torch.tensor([[[1.0, 3.0]]]), "16": torch.tensor([[5.0]])})[:2]
    (tensor([[2., 5.]]), tensor([[1., 0.]]))
    """
    means, variances = [], []
    for level in _levels(maps):
        var, mean = torch.var_mean(level.reshape(*level.shape[:2], -1), dim=2, correction=0)
        means.append(mean)
        variances.append(var)
    return Moments(torch.cat(means, dim=1), torch.cat(variances, dim=1))


def divergence(features: Moments, prior: AlignmentPrior, levels: tuple[int, ...]) -> Tensor:
    """Mean over levels of the mean over channels of `drift.symmetric_kl` between features and the source's, [S].

    Variances below a hundredth of their level's mean in the source are raised to it, as in `drift`.

    Args:
        features: [S, F].
        prior: its `mean` and `var` are read, [F].
        levels: channels of each level, F in all.

    >>> none = torch.zeros(0)
    >>> prior = AlignmentPrior(torch.zeros(2), torch.tensor([1.0, 4.0]), none, none, none)
    >>> divergence(Moments(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])), prior, (1, 1))  # of 4 and 9/8
    tensor([2.5625])
    """
    found = []
    of_each = (torch.split(each, list(levels), dim=-1) for each in (*features[:2], prior.mean, prior.var))
    for mean, var, source_mean, source_var in zip(*of_each, strict=True):
        floor = (drift.VARIANCE_FLOOR * source_var.mean()).clamp(min=torch.finfo(source_var.dtype).tiny)
        window, source = Moments(mean, var.maximum(floor)), Moments(source_mean, source_var.maximum(floor))
        found.append(drift.symmetric_kl(window, source).mean(dim=1))
    return torch.stack(found).mean(dim=0)


def _levels(maps: Any) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else list(maps.values())


def _measuring(told: Modulation) -> Modulation:
    """The same forward, which measures every request's own moments as well; to it they are worth nothing."""
    evidence = Evidence(
        known=told.mean.new_ones(told.mean.shape[0]),
        own=told.mean.new_zeros(len(told.groups.sizes)),
        tolerance=math.inf,
    )
    return told._replace(statistics=Statistics.BLEND, evidence=evidence)


def _discount(past: Tensor, new: Tensor, capped: Tensor) -> Tensor:
    """How much the past images lose where they and the new ones are worth `capped` together; each [S]."""
    return discount(past, past * (capped / (past + new).clamp(min=torch.finfo(past.dtype).tiny)))


def _pool_by_state(parts: Moments, images: Tensor, rows: Tensor, states: Tensor) -> Moments:
    """Moments of parts [N, K] with so many images behind each [N], as those of their states, [S, K]; 0 of none."""
    total = _sum_by_state(images, rows, states)
    share = (images / total.clamp(min=1)[rows]).unsqueeze(1)
    part_mean, part_var = (torch.where(share > 0, each, 0.0) for each in parts[:2])  # NaN · 0 is NaN
    mean = _sum_by_state(share * part_mean, rows, states)
    var = _sum_by_state(share * (part_var + (part_mean - mean[rows]).square()), rows, states)
    return Moments(mean, var)


def _sum_by_state(values: Tensor, rows: Tensor, states: Tensor) -> Tensor:
    """Sum [B, …] over the rows of each state: [S, …]; `states` is any field [S]."""
    return values.new_zeros(states.shape[0], *values.shape[1:]).index_add(0, rows, values)
