"""Flat keys: what the published key-value bottleneck looks images up by.

Träuble et al., "Discrete Key-Value Bottleneck" (arXiv 2207.11240), section 3: each of C codebooks sees the features
through a fixed random projection of its own and names the nearest of its J keys. Keys are fitted on unlabelled features
by vector quantisation with exponential moving averages (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1),
and are frozen from then on.

    N_j ← γ N_j + (1 − γ) n_j        m_j ← γ m_j + (1 − γ) Σ_{z at j} z        e_j = m_j / N_j

A key that nothing comes to any more is moved onto a feature of the batch. Deliberate deviation: with fewer features
than keys, there are as many keys as features; more of them would be copies, of which none is nearest.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # of distances held at once


@dataclass(frozen=True)
class FlatKeysConfig:
    """Settings of the keys: the sizes are those of arXiv 2207.11240, the rest is ours."""

    codebooks: int = 256  # C
    keys: int = 4096  # of each codebook at most, J
    width: int = 14  # of a key
    decay: float = 0.95  # γ; below van den Oord's 0.99, for there are few batches
    epochs: int = 10  # over the unlabelled features
    batch: int = 256  # features a step
    dead_below: float = 0.1  # of N_j, in features a step: below it a key is revived
    seed: int = 0  # of the projections, the first keys and the order


class FlatKeys(NamedTuple):
    """Frozen keys. The projections are made anew from the seed: they are 18 MB at the paper's size."""

    seed: Tensor  # int64 []
    keys: Tensor  # [C, J, d]


def random_projections(seed: int, codebooks: int, features: int, width: int) -> Tensor:
    """Each codebook's own projection, normal with variance 1 / F: as long as its F features, [C, F, d]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    normal = torch.randn(codebooks, features, width, generator=generator, dtype=torch.float32, device="cpu")
    return normal.div(features**0.5)


def fit_flat_keys(features: Tensor, config: FlatKeysConfig | None = None) -> FlatKeys:
    """Fit keys.

    Args:
        features: unlabelled, [N, F], N ≥ 1.
        config: settings.

    Raises:
        ValueError: there are no features, or more keys are asked for than an int16 can number.
    """
    config = config or FlatKeysConfig()
    if not len(features):
        raise ValueError("keys are fitted on unlabelled features; there are none")
    if config.keys > 2**15:
        raise ValueError(f"a key's number is an int16: {config.keys} keys a codebook are more than {2**15}")
    generator = torch.Generator("cpu").manual_seed(config.seed + 1)  # not the projections' own
    projections = random_projections(config.seed, config.codebooks, features.shape[1], config.width)
    fitted = [_fit_codebook(features @ each.to(features), config, generator) for each in projections]
    return FlatKeys(torch.tensor(config.seed, device=features.device), torch.stack(fitted))


def squared_lengths(keys: Tensor) -> Tensor:
    """‖e_j‖² of keys [..., J, d], [..., J]; for frozen keys, once and for all."""
    return keys.square().sum(dim=-1)


def nearest_keys(projections: Tensor, keys: Tensor, lengths: Tensor, features: Tensor) -> Tensor:
    """Each codebook's nearest key, by Euclidean distance; of equally near ones any, but always the same.

    At no time are more than 64 MB of distances held: at the paper's size, all of those of 256 images would be 1 GB.

    Args:
        projections: [C, F, d].
        keys: [C, J, d].
        lengths: their `squared_lengths`, [C, J].
        features: [B, F].

    Returns:
        Key numbers, int16 [B, C].
    """
    codebooks, count, _ = keys.shape
    rows = max(1, min(len(features), CHUNK_BYTES // (count * keys.element_size())))
    books = max(1, CHUNK_BYTES // (count * keys.element_size() * rows))
    found = torch.empty(len(features), codebooks, dtype=torch.int16, device=features.device)
    for top in range(0, len(features), rows):
        part = features[top : top + rows]
        for first in range(0, codebooks, books):
            some = slice(first, first + books)
            nearest = _nearest(part @ projections[some], keys[some], lengths[some])
            found[top : top + rows, some] = nearest.T.to(torch.int16)
    return found


def _nearest(points: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """argmin_j ‖z − e_j‖² = argmin_j ‖e_j‖² − 2 z·e_j, for points [C, B, d] and keys [C, J, d]: int64 [C, B]."""
    return torch.baddbmm(lengths.unsqueeze(-2), points, keys.transpose(-1, -2), alpha=-2).argmin(dim=-1)


def _fit_codebook(points: Tensor, config: FlatKeysConfig, generator: torch.Generator) -> Tensor:
    """The keys of one codebook, [J, d], of its points [N, d]."""
    count = min(config.keys, len(points))
    first = torch.randperm(len(points), generator=generator, device="cpu")[:count]
    keys = points[first.to(points.device)]
    sizes, sums = keys.new_ones(count), keys.clone()  # N_j, m_j
    for _ in range(config.epochs):
        order = torch.randperm(len(points), generator=generator, device="cpu").to(points.device)
        for place in torch.split(order, config.batch):
            batch = points[place]
            nearest = _nearest(batch.unsqueeze(0), keys.unsqueeze(0), squared_lengths(keys).unsqueeze(0))[0]
            hits, total = torch.zeros_like(sizes), torch.zeros_like(sums)
            hits.index_add_(0, nearest, torch.ones_like(batch[:, 0]))
            total.index_add_(0, nearest, batch)
            sizes = config.decay * sizes + (1 - config.decay) * hits
            sums = config.decay * sums + (1 - config.decay) * total
            dead = (sizes < config.dead_below).nonzero().squeeze(1)
            chosen = torch.randperm(len(batch), generator=generator, device="cpu")[: len(dead)].to(points.device)
            dead = dead[: len(chosen)]  # the others have their turn in the next batch
            sizes[dead], sums[dead] = 1.0, batch[chosen]
            keys = sums / sizes.unsqueeze(1)
    return keys
