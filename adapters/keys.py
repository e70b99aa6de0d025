"""Frozen keys of a discrete bottleneck: from an encoder's features to one key id for each of many codebooks.

"Discrete Key-Value Bottleneck", Träuble et al., ICML 2023, arXiv 2207.11240, section 3: every codebook looks at the
features through a fixed random projection of its own, and answers with the nearest of its keys, which were made from
features without labels and never change afterwards.

Deliberate deviations: keys are a *tree* (16 cells, each of 4, each of 4: 256 keys) made by k-means level by level, so
that an id says at once where a feature lies roughly and where exactly: few labels can tell apart the first, many the
last. And features are projected onto their half-whitened principal components first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.components import Components, fit_components, project

CHUNK_BYTES = 32 * 2**20  # of one intermediate tensor


@dataclass(frozen=True)
class KeysConfig:
    """How keys are made."""

    codebooks: int = 256  # C, section 5
    branches: tuple[int, ...] = (16, 4, 4)  # children of a cell at each level; their product is J, the keys a codebook
    key_dim: int = 14  # section 5
    components: int = 128
    whitening: float = 0.5
    rounds: int = 3  # of k-means at each level; more changed nothing that labels could tell
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.codebooks > 0 and self.key_dim > 0 and self.components > 0 and self.rounds > 0):
            raise ValueError("codebooks, key_dim, components and rounds must be above 0")
        if not self.branches or min(self.branches) < 2 or self.keys > 2**15:
            raise ValueError(f"branches {self.branches} must be 2 or more each, and give at most {2**15} keys")

    @property
    def keys(self) -> int:
        """J."""
        return prod(self.branches)


class KeysPrior(NamedTuple):
    """Keys as they are stored."""

    components: Components
    centres: tuple[Tensor, ...]  # of the cells at each level, [C, cells, key_dim]
    usage: Tensor  # features that fell to each key when the keys were made, int32 [C, J]


class Keys:
    """Keys that are ready to be asked.

    Args:
        prior: from `fit_keys`.
        config: that it was made with.

    >>> features = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    >>> config = KeysConfig(codebooks=3, branches=(4, 2), key_dim=2)
    >>> keys = Keys(fit_keys(features, config), config)
    >>> keys.encode(features).shape, int(keys.encode(features).max()) < 8
    (torch.Size([64, 3]), True)
    """

    def __init__(self, prior: KeysPrior, config: KeysConfig) -> None:
        self.prior = prior
        self.config = config
        self.projection = _projection(prior.components, config)  # [D, C·k]
        self._halves = tuple(_half(centres) for centres in prior.centres)

    @property
    def features(self) -> int:
        """F."""
        return len(self.prior.components.mean)

    def encode(self, features: Tensor) -> Tensor:
        """The nearest key of each codebook.

        Args:
            features: [B, F].

        Returns:
            int16 [B, C], 0 … J − 1.
        """
        parts = [self._encode(part) for part in torch.split(features, _rows_at_once(self.config))]
        return torch.cat(parts) if parts else features.new_zeros(0, self.config.codebooks, dtype=torch.int16)

    def _encode(self, features: Tensor) -> Tensor:
        points = _points(self.prior.components, self.projection, features, self.config)
        cells = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
        for centres, half, branch in zip(self.prior.centres, self._halves, self.config.branches, strict=True):
            cells = _nearest_child(points, cells, centres, half, branch)
        return cells.T.to(torch.int16)


def fit_keys(features: Tensor, config: KeysConfig) -> KeysPrior:
    """Make keys from features without labels: k-means in every cell of every codebook, level by level.

    A cell that no feature falls to takes the place of the feature of its parent that lies farthest from its own centre.

    Args:
        features: [N, F], N ≥ 2.
        config: how.

    Raises:
        ValueError: too few features, or they are all the same.
    """
    components = fit_components(features, config.components, config.whitening)
    points = _points(components, _projection(components, config), features, config)  # [C, N, k]
    generator = torch.Generator().manual_seed(config.seed + 1)  # another than the projections'
    cells = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    levels, parents = [], 1
    for branch in config.branches:
        centres = _first_centres(points, cells, parents, branch, generator)
        for _ in range(config.rounds):
            children = _nearest_child(points, cells, centres, _half(centres), branch)
            centres = _revived(points, cells, children, _means(points, children, centres), branch)
        levels.append(centres)
        cells, parents = _nearest_child(points, cells, centres, _half(centres), branch), parents * branch
    ones = torch.ones_like(cells, dtype=torch.int32)
    usage = ones.new_zeros(config.codebooks, config.keys).scatter_add_(1, cells, ones)
    return KeysPrior(components, tuple(levels), usage)


def _projection(components: Components, config: KeysConfig) -> Tensor:
    """All codebooks' random projections side by side, [D, C·k]; the same seed gives the same."""
    generator = torch.Generator().manual_seed(config.seed)
    directions = components.directions
    drawn = torch.randn(directions.shape[1], config.codebooks * config.key_dim, generator=generator)
    return drawn.to(directions.device, directions.dtype)


def _points(components: Components, projection: Tensor, features: Tensor, config: KeysConfig) -> Tensor:
    """What each codebook sees, [C, B, k]."""
    seen = project(components, features) @ projection
    return seen.view(len(features), config.codebooks, config.key_dim).transpose(0, 1).contiguous()


def _half(centres: Tensor) -> Tensor:
    """|c|²/2, [C, cells]: |p − c|² = |p|² + 2 (|c|²/2 − p·c), and the first term is the same for all."""
    return centres.square().sum(dim=2) / 2


def _nearest_child(points: Tensor, cells: Tensor, centres: Tensor, half: Tensor, branch: int) -> Tensor:
    """Of each point's cell, the child whose centre is nearest; int64 [C, B].

    Args:
        points: [C, B, k].
        cells: of the level above, [C, B].
        centres: of all children, [C, cells, k].
        half: `_half(centres)`.
        branch: children of a cell.
    """
    books, rows = cells.shape
    if centres.shape[1] == branch:  # the first level: all points have the same candidates
        return torch.baddbmm(half.unsqueeze(1), points, centres.transpose(1, 2), alpha=-1).argmin(dim=2)
    first = (cells + torch.arange(books, device=cells.device).unsqueeze(1) * (centres.shape[1] // branch)) * branch
    flat_points, flat_centres, flat_half = points.flatten(0, 1), centres.flatten(0, 1), half.flatten()
    if rows == 1:  # all children at once: a gather more or less costs more than what it gathers
        places = first + torch.arange(branch, device=cells.device)
        distances = flat_half[places] - (flat_centres[places] * flat_points.unsqueeze(1)).sum(dim=2)
        return cells * branch + distances.argmin(dim=1, keepdim=True)
    distances = flat_points.new_empty(books * rows, branch)
    for child in range(branch):
        place = first.flatten() + child
        distances[:, child] = flat_half[place] - (flat_centres[place] * flat_points).sum(dim=1)
    return cells * branch + distances.argmin(dim=1).view(books, rows)


def _first_centres(points: Tensor, cells: Tensor, parents: int, branch: int, generator: torch.Generator) -> Tensor:
    """For every child a point of its parent, drawn at random and different while there are enough; [C, cells, k]."""
    books, count, dims = points.shape
    drawn = torch.rand(cells.shape, generator=generator).to(points.device)
    order = (cells.double() + 0.5 * drawn).argsort(dim=1)  # by parent, and at random within
    sorted_cells = cells.gather(1, order)
    every = torch.arange(parents, device=cells.device).expand(books, -1).contiguous()
    first = torch.searchsorted(sorted_cells, every)
    members = torch.searchsorted(sorted_cells, every, right=True) - first
    centres = points.new_empty(books, parents * branch, dims)
    for child in range(branch):
        place = (first + child % members.clamp(min=1)).clamp(max=count - 1)
        chosen = order.gather(1, place).unsqueeze(2).expand(-1, -1, dims)
        centres[:, child::branch] = points.gather(1, chosen)
    return centres


def _means(points: Tensor, children: Tensor, centres: Tensor) -> Tensor:
    """The mean of each cell's points; its centre as it was where there is none."""
    books, cells, dims = centres.shape
    flat = (children + torch.arange(books, device=children.device).unsqueeze(1) * cells).flatten()
    sums = centres.new_zeros(books * cells, dims).index_add_(0, flat, points.flatten(0, 1)).view_as(centres)
    members = torch.bincount(flat, minlength=books * cells).view(books, cells, 1)
    return torch.where(members > 0, sums / members.clamp(min=1), centres)


def _revived(points: Tensor, cells: Tensor, children: Tensor, centres: Tensor, branch: int) -> Tensor:
    """Centres of which one empty child of each parent has moved to the parent's farthest point."""
    books, cell_count = centres.shape[:2]
    flat = (children + torch.arange(books, device=children.device).unsqueeze(1) * cell_count).flatten()
    distances = (points.flatten(0, 1) - centres.flatten(0, 1)[flat]).square().sum(dim=1).view_as(children)  # [C, B]
    members = torch.bincount(flat, minlength=books * cell_count)
    empty = (members == 0).view(books, -1, branch)
    farthest = distances.new_zeros(books, cell_count // branch).scatter_reduce_(1, cells, distances, "amax")
    is_farthest = (distances > 0) & (distances >= farthest.gather(1, cells))
    place = torch.full((books, cell_count // branch), -1, dtype=torch.int64, device=points.device)
    place.scatter_reduce_(
        1, cells, torch.where(is_farthest, torch.arange(len(cells[0]), device=cells.device), -1), "amax"
    )
    chosen = empty & (empty.cumsum(dim=2) == 1) & (place >= 0).unsqueeze(2)
    book, parent, child = chosen.nonzero(as_tuple=True)
    moved = centres.clone()
    moved[book, parent * branch + child] = points[book, place[book, parent]]
    return moved


def _rows_at_once(config: KeysConfig) -> int:
    """Rows whose distances to the children of one cell stay below `CHUNK_BYTES`."""
    widest = max(config.keys // config.branches[-1] if len(config.branches) > 1 else 1, config.branches[0])
    return max(1, CHUNK_BYTES // (4 * config.codebooks * max(config.key_dim, widest)))


def levels_of(config: KeysConfig) -> Iterator[tuple[int, int]]:
    """Of each level its number of cells, and how many keys lie in each.

    >>> list(levels_of(KeysConfig()))
    [(16, 16), (64, 4), (256, 1)]
    """
    cells = 1
    for branch in config.branches:
        cells *= branch
        yield cells, config.keys // cells
