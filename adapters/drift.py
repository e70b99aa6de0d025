"""Drift: how far the images of a stream's own last window lie from the source's, as the frozen network sees them.

For each batch-norm layer the symmetric KL divergence between two Gaussians per channel, those of the window and those
of the source, mean over the channels; the median over the layers; divided by the 99th percentile of the same for
windows of that size of the source's own images. 1.0 is the alarm line.

- Measured on the *frozen* forward. In an adapted one each layer undoes the shift that it was given, so that the layers
  after it hardly see any, and the better a stream has adapted the less drift it would show.
- The source's statistics are those of the prior's images, measured by the same forward, and not the network's running
  ones: those are of augmented training images, and that constant difference is not drift.
- Median and not mean over layers: one layer with channels that are nearly constant can have any divergence.
- A window of few classes is another distribution than the source's too, and reads as drift.
- Without batch-norm there is nothing to compare: group-norm and layer-norm keep no statistics. The figure is then NaN.

References:
    Chan, Golub & LeVeque 1979 for pooling; Lin, "Divergence Measures Based on the Shannon Entropy", 1991, for
    `marginal_divergence`.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.base import Groups, Moments, Output
from adapters.norm import Evidence, Network, Statistics, _BatchNorm
from adapters.source import Source, SourceState

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # window sizes, in images
WINDOWS = 1000  # drawn for each size
WINDOWS_AT_ONCE = 100
QUANTILE = 0.99
VARIANCE_FLOOR = 0.01  # of the source's mean variance in a layer: below it, a channel is as good as constant


class DriftPrior(NamedTuple):
    """What drift is measured against. Tensors only: saved and restored as they are."""

    mean: Tensor  # of the source's images at every normalised channel, [P]
    var: Tensor  # biased, [P]
    sizes: Tensor  # window sizes, growing, int64 [K]; K is 0 for a network without batch-norm
    limits: Tensor  # 99th percentile of the divergence for each size, [K]


class DriftReading(NamedTuple):
    """What one frozen forward says of G windows of images."""

    drift: Tensor  # 1.0 is the alarm line; NaN for a network without batch-norm, [G]
    by_layer: Tensor  # the same for each of L batch-norm layers, of which `drift` is the median, [G, L]
    frozen_logits: Tensor  # [B, C]


class Drift:
    """Measures drift.

    Args:
        network: the frozen network.
        prior: of this network.

    Raises:
        ValueError: the prior was made for another network.
    """

    def __init__(self, network: Network, prior: DriftPrior) -> None:
        if prior.mean.shape != network.mean.shape:
            raise ValueError(
                f"the drift prior is for {prior.mean.numel()} normalised channels, and this network has "
                f"{network.channels}: it was made for another network"
            )
        self.network = network
        self.prior = prior

    @torch.no_grad()
    def measure(self, x: Tensor, groups: Groups) -> DriftReading:
        """One frozen forward over windows of images.

        Args:
            x: [B, …].
            groups: which window each row belongs to: G windows, of one stream each.
        """
        output = frozen_forward(self.network, x, groups)
        if output.moments is None or not len(self.prior.sizes):
            none = output.logits.new_full((len(groups.sizes),), math.nan)
            return DriftReading(none, none.new_zeros(len(groups.sizes), 0), output.logits)
        sizes = torch.tensor(groups.sizes, device=x.device)
        by_layer = divergence_by_layer(self.network, output.moments, self.prior) / limit(self.prior, sizes).unsqueeze(1)
        return DriftReading(by_layer.quantile(0.5, dim=1), by_layer, output.logits)


def drift_prior(network: Network, batches: Iterable[Tensor], seed: int = 0) -> DriftPrior:
    """Measure the source: its statistics, and how far windows of its own images lie from them.

    One frozen forward over all images; windows are then pooled from the moments of single images, drawn at random
    without putting back. Their images took part in the source's statistics, which fresh ones do not, so limits are
    multiplied by (N + n)/(N − n), the ratio of the mean squared errors 1/n + 1/N and 1/n − 1/N. Sizes above N/4 are
    left out.

    Args:
        network: the frozen network.
        batches: N source images without labels, each [B, …]. Their moments take 8·N·P bytes.
        seed: of the draws.

    Raises:
        ValueError: there were fewer than 4 images.
    """
    moments = _single_images(network, batches)
    count, device = len(moments.mean), moments.mean.device
    if count < 4:
        raise ValueError(f"drift needs at least 4 source images to compare with, not {count}")
    source = pool_images(moments, torch.ones(1, count, device=device))
    prior = DriftPrior(source.mean[0], source.var[0], torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    if not network.has_statistics:
        return prior
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for size in SIZES if size <= count // 4]
    limits = []
    for size in sizes:
        found = [
            divergence_by_layer(network, pool_images(moments, chosen.to(device)), prior).quantile(0.5, dim=1)
            for chosen in _draw_windows(count, size, generator)
        ]
        limits.append(torch.cat(found).quantile(QUANTILE) * (count + size) / (count - size))
    return prior._replace(sizes=torch.tensor(sizes, device=device), limits=torch.stack(limits))


def _single_images(network: Network, batches: Iterable[Tensor]) -> Moments:
    """Moments of every image by itself, [N, P]."""
    means, variances = [], []
    with torch.no_grad():
        for x in batches:
            found = frozen_forward(network, x, Groups.of((1,) * len(x), x.device)).moments
            means.append(network.mean.expand(len(x), -1) if found is None else found.mean)
            variances.append(network.var.expand(len(x), -1) if found is None else found.var)
    empty = network.mean.new_zeros(0, network.channels)
    return Moments(torch.cat([empty, *means]), torch.cat([empty, *variances]))


def _draw_windows(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`WINDOWS` windows of `size` out of `count` images, some at a time: 1 where an image is in, else 0; [W, N]."""
    for _ in range(WINDOWS // WINDOWS_AT_ONCE):
        order = torch.rand(WINDOWS_AT_ONCE, count, generator=generator).argsort(dim=1)
        yield torch.zeros(WINDOWS_AT_ONCE, count).scatter_(1, order[:, :size], 1.0)


def pool_images(images: Moments, windows: Tensor) -> Moments:
    """Moments of windows from those of single images.

    Args:
        images: [N, P].
        windows: 1 where an image is in a window, else 0; [W, N].

    Returns:
        [W, P].

    >>> images = Moments(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([[1.0], [3.0], [0.0]]))
    >>> pool_images(images, torch.tensor([[1.0, 1.0, 0.0]]))[:2]  # mean 1; variance (1 + 3)/2 + 1
    (tensor([[1.]]), tensor([[3.]]))
    """
    share = windows / windows.sum(dim=1, keepdim=True)
    about = images.mean.mean(dim=0)  # squares about a near point lose no digits to a large mean
    centred = images.mean - about
    mean = share @ centred
    var = share @ (images.var + centred.square()) - mean.square()
    return Moments(mean + about, var.clamp(min=0))


def frozen_forward(network: Network, x: Tensor, groups: Groups) -> Output:
    """The frozen network's answers, and the moments of each group; None of these without batch-norm.

    It normalises by the source's statistics: the groups' own are measured, and worth nothing.
    """
    if not network.has_statistics:
        return network(x)
    told = Source(network).modulate(SourceState(), torch.zeros_like(groups.index), groups)
    evidence = Evidence(
        known=told.mean.new_ones(1),
        own=told.mean.new_zeros(len(groups.sizes)),
        tolerance=math.inf,  # nothing is contradicted
    )
    return network(x, told._replace(statistics=Statistics.BLEND, evidence=evidence))


def divergence_by_layer(network: Network, moments: Moments, prior: DriftPrior) -> Tensor:
    """Mean over each batch-norm layer's channels of the divergence between windows and the source, [G, L].

    Args:
        network: with P channels.
        moments: of windows, [G, P].
        prior: its `mean` and `var` are read, [P].
    """
    found = []
    for at in _batch_norm_slices(network):
        floor = (VARIANCE_FLOOR * prior.var[at].mean()).clamp(min=torch.finfo(prior.var.dtype).tiny)
        window = Moments(moments.mean[:, at], moments.var[:, at].maximum(floor))
        source = Moments(prior.mean[at], prior.var[at].maximum(floor))
        found.append(symmetric_kl(window, source).mean(dim=1))
    return torch.stack(found, dim=1)


def _batch_norm_slices(network: Network) -> list[slice]:
    return [layer.slice for layer in network._layers if isinstance(layer, _BatchNorm)]


def symmetric_kl(a: Moments, b: Moments) -> Tensor:
    """`KL(a‖b) + KL(b‖a)` of Gaussians: `½ (σ_a²/σ_b² + σ_b²/σ_a² + (μ_a − μ_b)² (1/σ_a² + 1/σ_b²)) − 1`.

    >>> one, other = Moments(torch.tensor(0.0), torch.tensor(1.0)), Moments(torch.tensor(2.0), torch.tensor(4.0))
    >>> symmetric_kl(one, other)  # ½ (1/4 + 4 + 4 · 5/4) − 1
    tensor(3.6250)
    """
    distance = (a.mean - b.mean).square()
    return 0.5 * (a.var / b.var + b.var / a.var + distance * (1 / a.var + 1 / b.var)) - 1


def limit(prior: DriftPrior, rows: Tensor) -> Tensor:
    """The prior's limit for windows of any sizes [G]: straight between its own in log-log, and held beyond its ends.

    >>> prior = DriftPrior(torch.zeros(1), torch.ones(1), torch.tensor([4, 16]), torch.tensor([0.2, 0.05]))
    >>> limit(prior, torch.tensor([1, 4, 8, 16, 500]))
    tensor([0.2000, 0.2000, 0.1000, 0.0500, 0.0500])
    """
    limits = prior.limits.log()
    if len(prior.sizes) == 1:
        return limits.exp().expand(len(rows))
    sizes = prior.sizes.to(limits).log()
    at = rows.to(limits).log().clamp(min=sizes[0], max=sizes[-1])
    right = torch.searchsorted(sizes, at).clamp(1, len(sizes) - 1)
    share = (at - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    return torch.lerp(limits[right - 1], limits[right], share).exp()


def flip_rate(adapted_logits: Tensor, frozen_logits: Tensor, groups: Groups) -> Tensor:
    """Share of each group's rows that the adapted network answers otherwise than the frozen one, [G].

    >>> adapted, frozen = torch.tensor([[1.0, 0], [0, 1], [0, 1]]), torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    >>> flip_rate(adapted, frozen, Groups.of((2, 1)))
    tensor([0.5000, 0.0000])
    """
    flipped = adapted_logits.argmax(dim=1) != frozen_logits.argmax(dim=1)
    return _mean_by_group(flipped.to(adapted_logits.dtype).unsqueeze(1), groups).squeeze(1)


def mean_probs(logits: Tensor, groups: Groups) -> Tensor:
    """Mean probabilities of each group's rows, [G, C]: the marginal of its classes."""
    return _mean_by_group(logits.softmax(dim=1), groups)


def marginal_divergence(adapted: Tensor, frozen: Tensor) -> Tensor:
    """Jensen-Shannon divergence between mean probabilities [G, C], in bits: 0 where equal, 1 where disjoint; [G].

    >>> marginal_divergence(torch.tensor([[1.0, 0.0], [0.3, 0.7]]), torch.tensor([[0.0, 1.0], [0.3, 0.7]]))
    tensor([1., 0.])
    """

    def entropy(probs: Tensor) -> Tensor:
        summed: Tensor = torch.special.entr(probs).sum(dim=1)
        return summed

    nats = entropy((adapted + frozen) / 2) - (entropy(adapted) + entropy(frozen)) / 2
    return (nats / math.log(2)).clamp(0, 1)


def _mean_by_group(values: Tensor, groups: Groups) -> Tensor:
    sizes = torch.tensor(groups.sizes, dtype=values.dtype, device=values.device).unsqueeze(1)
    return values.new_zeros(len(groups.sizes), values.shape[1]).index_add(0, groups.index, values) / sizes
