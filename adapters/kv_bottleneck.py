"""A head that counts: which keys the images of each class had.

"Discrete Key-Value Bottleneck", Träuble et al., ICML 2023, arXiv 2207.11240: frozen features meet the nearest key of
each of C codebooks (`keys.py`), the keys' *values* are read, and their mean over the codebooks gives the class. There
values are learned by gradient descent (`kv_gradient.py`). Here a value is computed from integer counts of how often a
key was met by images of a class: one pass, in any order, and taken back by subtraction.

The value of key k for class y is the log-likelihood ratio of meeting k in class y and meeting it at all,

    v(k, y) = Σ_levels log [ (N(k_l, y) + A_l q(k_l | k_{l−1})) / ((N(k_{l−1}, y) + A_l) q(k_l | k_{l−1})) ]

over the cells k_1 ⊃ k_2 ⊃ … ∋ k of the tree of keys: at each level the share of the parent's images that fell to this
child, shrunk toward the share q of features without labels by A_l images. With few labels the deeper levels say
nothing, with many they say the most, and nobody has to choose a level: the posterior mean of a Pólya tree (Lavine,
"Some aspects of Pólya tree distributions", Annals of Statistics 20, 1992, section 2). A class without labels has v = 0.

Class-conditional likelihoods do not know how often a class was labelled: while classes come one after the other, or one
is rare, a vote by N(k, y)/N(k) would follow those that have the most labels.
"""

from dataclasses import dataclass
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.heads import Items, NeverLearned
from adapters.keys import Keys, levels_of

PSEUDO_COUNTS = (0.5, 1.0, 2.0)  # of each child, by level; the last for all deeper ones


@dataclass(frozen=True)
class CountsConfig:
    """Settings of the counting head."""

    pseudo_counts: tuple[float, ...] = PSEUDO_COUNTS  # A_l = this times the number of children
    scale: float = 8.0  # codebooks see the same image, so that their votes count for so many independent ones

    def __post_init__(self) -> None:
        if not self.pseudo_counts or min(self.pseudo_counts) <= 0 or self.scale <= 0:
            raise ValueError("pseudo_counts and scale must be above 0")


class ClassCounts(NamedTuple):
    """How often images of one class met which keys; sparse, and at least one image."""

    number: Tensor  # of the class, int64 []
    images: Tensor  # N(y), int64 []
    cells: Tensor  # codebook · J + key, ascending, int32 [T]
    counts: Tensor  # above 0, int32 [T]


class CountsState(NamedTuple):
    """What a head was told."""

    classes: tuple[ClassCounts, ...]  # by number


class CountsTable(NamedTuple):
    """Values of all keys."""

    classes: tuple[int, ...]
    images: tuple[int, ...]  # N(y)
    parts: tuple[ClassCounts, ...]  # that the values were computed from
    values: tuple[Tensor, ...]  # of each class, float32 [C · J]


class Counts:
    """The counting head.

    Args:
        keys: frozen.
        config: settings.
    """

    order_free = True

    def __init__(self, keys: Keys, config: CountsConfig | None = None) -> None:
        self.keys = keys
        self.config = config or CountsConfig()
        self._shares = _shares(keys)  # q, for each level [C, cells]
        books, count = keys.prior.usage.shape
        self._first = torch.arange(books, device=keys.prior.usage.device) * count  # cell of each codebook's first key

    def init(self) -> CountsState:
        return CountsState(())

    def encode(self, features: Tensor) -> Tensor:
        """Key ids, int16 [B, C]."""
        return self.keys.encode(features)

    def learn(self, state: CountsState, items: Items) -> CountsState:
        known = {int(each.number): each for each in state.classes}
        for number, part in self._by_class(items).items():
            known[number] = _added(known[number], part) if number in known else part
        return _state(known)

    def unlearn(self, state: CountsState, items: Items, rest: Items) -> CountsState:  # noqa: ARG002  # see the protocol
        """Subtract.

        Raises:
            NeverLearned: some of it was never counted.
        """
        known = {int(each.number): each for each in state.classes}
        for number, part in self._by_class(items).items():
            if number not in known:
                raise NeverLearned(f"the class {number} has no images")
            left = _subtracted(known.pop(number), part)
            if left is not None:
                known[number] = left
        return _state(known)

    def merge(self, base: CountsState, own: CountsState) -> CountsState:
        known = {int(each.number): each for each in base.classes}
        for each in own.classes:
            number = int(each.number)
            known[number] = _added(known[number], each) if number in known else each
        return _state(known)

    def read(self, state: CountsState, before: CountsTable | None = None) -> CountsTable:
        """Compute the values.

        Args:
            state: what was counted.
            before: of another state; values of classes whose counts are the same are taken from it.
        """
        known = dict(zip(before.classes, zip(before.parts, before.values, strict=True), strict=True)) if before else {}
        values = []
        for part in state.classes:
            there, ready = known.get(int(part.number), (None, None))
            values.append(ready if ready is not None and _are_same(there, part) else self._values(part))
        numbers = tuple(int(each.number) for each in state.classes)
        images = tuple(int(each.images) for each in state.classes)
        return CountsTable(numbers, images, state.classes, tuple(values))

    def score(self, table: CountsTable, codes: Tensor) -> Tensor:
        if not table.values:
            return torch.zeros(len(codes), 0, device=codes.device)
        cells = (codes.long() + self._first).flatten()
        means = [values[cells].view(codes.shape).mean(dim=1) for values in table.values]
        return self.config.scale * torch.stack(means, dim=1)

    def _by_class(self, items: Items) -> dict[int, ClassCounts]:
        """The items of each class as counts of their own."""
        found = {}
        cells = items.codes.long() + self._first
        for number in torch.unique(items.classes).tolist():
            mine = cells[items.classes == number]
            met, counts = torch.unique(mine, return_counts=True)
            images = torch.tensor(len(mine), device=mine.device)
            found[number] = ClassCounts(torch.tensor(number, device=mine.device), images, met.int(), counts.int())
        return found

    def _values(self, part: ClassCounts) -> Tensor:
        """v(·, y), [C · J].

        At the deepest level most keys were never met and have what their parent gives them: only those that were met
        are computed one by one.
        """
        books = len(self.keys.prior.usage)
        counts = part.counts.float()
        total = part.images.float().expand(books, 1)  # N of the parents, [C, parents]
        value = torch.zeros_like(total)
        for level, ((cells, below), share) in enumerate(zip(levels_of(self.keys.config), self._shares, strict=True)):
            branch = cells // total.shape[1]
            strength = self._pseudo_count(level) * branch
            value = value - (total + strength).log_()
            if below == 1:
                break
            value = _to_children(value, branch)
            met = torch.div(part.cells, below, rounding_mode="floor")
            total = total.new_zeros(books * cells).index_add_(0, met, counts).view(books, cells)
            value += torch.addcdiv(share.new_tensor(strength), total, share).log_()
        value = _to_children(value + log(strength), branch).flatten()
        deepest = share.flatten().index_select(0, part.cells)
        return value.index_add_(0, part.cells, (counts / (strength * deepest)).log1p_())

    def _pseudo_count(self, level: int) -> float:
        return self.config.pseudo_counts[min(level, len(self.config.pseudo_counts) - 1)]


def _shares(keys: Keys) -> list[Tensor]:
    """Of each cell the share of its parent's features without labels that fell to it, at each level; [C, cells].

    Half a feature more for each, so that none is 0 (Krichevsky & Trofimov, 1981).
    """
    shares = []
    for (cells, below), branch in zip(levels_of(keys.config), keys.config.branches, strict=True):
        met = keys.prior.usage.float().view(-1, cells, below).sum(dim=2) + 0.5
        family = met.view(len(met), -1, branch)
        shares.append((family / family.sum(dim=2, keepdim=True)).view(-1, cells))
    return shares


def _are_same(some: ClassCounts | None, other: ClassCounts) -> bool:
    return some is other or (
        some is not None
        and torch.equal(some.images, other.images)
        and torch.equal(some.cells, other.cells)
        and torch.equal(some.counts, other.counts)
    )


def _to_children(value: Tensor, branch: int) -> Tensor:
    """Every cell's value for each of its children, [C, cells · branch]."""
    return value.unsqueeze(2).expand(-1, -1, branch).flatten(1).contiguous()


def _state(known: dict[int, ClassCounts]) -> CountsState:
    return CountsState(tuple(known[number] for number in sorted(known)))


def _added(known: ClassCounts, more: ClassCounts) -> ClassCounts:
    """The counts of both; cells stay ascending."""
    place = torch.searchsorted(known.cells, more.cells)
    there = _found(known.cells, more.cells, place)
    counts = known.counts.index_add(0, place[there], more.counts[there])
    new, at = more.cells[~there], place[~there]
    at = at + torch.arange(len(new), device=at.device)  # where each new cell lies when all are in
    old = torch.ones(len(counts) + len(new), dtype=torch.bool, device=at.device).index_fill(0, at, False)
    cells = known.cells.new_empty(len(old)).masked_scatter(old, known.cells).index_copy(0, at, new)
    merged = counts.new_empty(len(old)).masked_scatter(old, counts).index_copy(0, at, more.counts[~there])
    return ClassCounts(known.number, known.images + more.images, cells, merged)


def _subtracted(known: ClassCounts, less: ClassCounts) -> ClassCounts | None:
    """The counts without some; None where no image is left.

    Raises:
        NeverLearned: they are not all in it.
    """
    place = torch.searchsorted(known.cells, less.cells)
    counts = known.counts
    if bool(_found(known.cells, less.cells, place).all()):
        counts = known.counts.index_add(0, place, -less.counts)
    if counts is known.counts or int(counts.min()) < 0 or int(less.images) > int(known.images):
        raise NeverLearned(f"some of these images of class {int(known.number)} were never counted")
    left = counts > 0
    if int(less.images) == int(known.images):
        return None
    return ClassCounts(known.number, known.images - less.images, known.cells[left], counts[left])


def _found(cells: Tensor, wanted: Tensor, place: Tensor) -> Tensor:
    """Whether each wanted cell is at its place."""
    return cells[place.clamp(max=len(cells) - 1)] == wanted
