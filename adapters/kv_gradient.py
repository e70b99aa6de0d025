"""The discrete key-value bottleneck as published: values learned by gradient descent.

Träuble et al., "Discrete Key-Value Bottleneck" (arXiv 2207.11240), section 3 and appendix: an image's features name one
key in each of C codebooks; the values found there are averaged, and their softmax is the answer. Labels change values
alone, by plain stochastic gradient descent on the cross-entropy, one image after the other:

    p = softmax(1/C Σ_c v[c, k_c])        v[c, k_c] ← v[c, k_c] − η/C (p − y)

Values begin at zero. A state holds those alone that an image has touched: C cells an image at most.

Published are heads whose classes are known beforehand. Here they are told one by one; but all outputs that no label
has met yet have the same values, so that one column stands for all of them, and a class that is told for the first time
begins as its copy. That is the published head exactly, as long as there are no more classes than `outputs`. A score is
a class's value above that column's: 0 is what a class gets that was never told.

Not built in: weight alignment (Zhao et al. 2020, arXiv 1911.07053, Eq. 5-7), which scales the columns of new classes to
the mean norm of the old. It answers a softmax that favours what it met last, and at this rate nearly nothing does: on
CIFAR-10 it cost 0.2 to 0.8 points two classes at a time, and found no more than 4 % of a class 20 times rarer.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.flat_keys import FlatKeys, nearest_keys, random_projections, squared_lengths
from adapters.heads import Items, NeverLearned

CHUNK_BYTES = 64 * 2**20  # of values gathered at once


@dataclass(frozen=True)
class KVGradientConfig:
    """Settings of the published head."""

    rate: float = 0.3  # η, the paper's
    outputs: int = 10  # classes expected in all; 10 in the paper. More may come: they begin as copies all the same
    # Of the scores. One pass leaves values so small that their softmax is nearly uniform; this is the best likelihood
    # on CIFAR-10 at 200 labels a class.
    scale: float = 1e4

    def __post_init__(self) -> None:
        if self.outputs < 2:
            raise ValueError(f"a softmax needs at least 2 outputs, not {self.outputs}")


class KVGradientState(NamedTuple):
    """What was told, in the order in which it was told."""

    classes: Tensor  # that have a label, ascending, int64 [K]
    images: Tensor  # of each, int64 [K]
    cells: Tensor  # touched, `codebook · J + key`, ascending, int32 [T]
    values: Tensor  # of the touched cells, and last of every class never told; other cells are 0, [T, K + 1]


class KVGradientTable(NamedTuple):
    """A state, made ready."""

    classes: tuple[int, ...]
    images: tuple[int, ...]  # of each
    cells: Tensor  # as in the state, int32 [T]
    values: Tensor  # as in the state, [T, K + 1]


class KVGradient:
    """Score by the mean value of the keys that an image names.

    Args:
        prior: frozen keys.
        features: F, the encoder's width.
        config: settings.
    """

    order_free = False

    def __init__(self, prior: FlatKeys, features: int, config: KVGradientConfig | None = None) -> None:
        self.prior = prior
        self.config = config or KVGradientConfig()
        codebooks, keys, width = prior.keys.shape
        self.projections = random_projections(int(prior.seed), codebooks, features, width).to(prior.keys)
        self.lengths = squared_lengths(prior.keys)  # [C, J]
        self.first_cells = torch.arange(codebooks, dtype=torch.int32, device=prior.keys.device) * keys  # [C]

    def init(self) -> KVGradientState:
        none = torch.zeros(0, dtype=torch.int64, device=self.prior.keys.device)
        return KVGradientState(none, none.clone(), none.int(), self.prior.keys.new_zeros(0, 1))

    def encode(self, features: Tensor) -> Tensor:
        """The nearest key in each codebook of features [B, F], int16 [B, C]."""
        return nearest_keys(self.projections, self.prior.keys, self.lengths, features)

    def learn(self, state: KVGradientState, items: Items) -> KVGradientState:
        starts = _first_of_new_classes(items.classes, state.classes)
        for first, end in pairwise((0, *starts, items.rows)):
            if first < end:
                state = self._learn_in_order(state, Items(items.codes[first:end], items.classes[first:end]))
        return state

    def _learn_in_order(self, state: KVGradientState, items: Items) -> KVGradientState:
        """The state after items of which the first alone may be of a new class: all steps have the same outputs."""
        cells = self.cells(items.codes)
        told, images = torch.unique(items.classes, return_counts=True)
        grown = _grown(state, self.init()._replace(classes=told, images=images), torch.unique(cells))
        places = torch.searchsorted(grown.cells, cells)  # [N, C]
        columns = torch.searchsorted(grown.classes, items.classes)
        targets = functional.one_hot(columns, len(grown.classes) + 1).to(grown.values.dtype)
        untold = self._untold(len(grown.classes))
        share = self.config.rate / len(self.first_cells)
        for place, target in zip(places, targets, strict=True):
            touched = grown.values[place]  # one cell of each codebook, [C, K + 1]
            grown.values[place] = touched - share * (_probabilities(touched.mean(dim=0), untold) - target)
        return grown  # its values are new: no older state holds them

    def unlearn(self, state: KVGradientState, items: Items, rest: Items) -> KVGradientState:
        """Replay the rest: steps depend on those before them, so nothing can be subtracted."""
        classes, images = torch.unique(torch.cat([items.classes, rest.classes]), return_counts=True)
        if not (torch.equal(classes, state.classes) and torch.equal(images, state.images)):
            learned = dict(zip(state.classes.tolist(), state.images.tolist(), strict=True))
            given = dict(zip(classes.tolist(), images.tolist(), strict=True))
            raise NeverLearned(f"images by class: {learned} were learned, to take out and to keep are {given}")
        return self.learn(self.init(), rest)

    def merge(self, base: KVGradientState, own: KVGradientState) -> KVGradientState:
        """The sum of both states' values; to a class that was told to one alone, the other gives what it never told."""
        first, second = _grown(base, own, own.cells), _grown(own, base, base.cells)
        return first._replace(values=first.values + second.values)

    def read(self, state: KVGradientState, before: KVGradientTable | None = None) -> KVGradientTable:  # noqa: ARG002
        classes, images = tuple(state.classes.tolist()), tuple(state.images.tolist())
        return KVGradientTable(classes, images, state.cells, state.values)

    def score(self, table: KVGradientTable, codes: Tensor) -> Tensor:
        if not table.classes:
            return table.values.new_zeros(len(codes), 0)
        logits = self._logits(table, codes)
        return self.config.scale * (logits[:, :-1] - logits[:, -1:])

    def probabilities(self, state: KVGradientState, codes: Tensor) -> Tensor:
        """What the next step would see at codes [N, C]: p of each told class and of one never told, [N, K + 1]."""
        return _probabilities(self._logits(state, codes), self._untold(len(state.classes)))

    def cells(self, codes: Tensor) -> Tensor:
        """Where codes [N, C] point, int32 [N, C]."""
        return codes.int() + self.first_cells

    def _untold(self, told: int) -> int:
        """How many outputs no label has met yet."""
        return max(self.config.outputs - told, 0)

    def _logits(self, held: KVGradientState | KVGradientTable, codes: Tensor) -> Tensor:
        """The mean of the values where codes [N, C] point, [N, K + 1]."""
        row_bytes = codes.shape[1] * held.values.shape[1] * held.values.element_size()
        means = []
        for some in torch.split(self.cells(codes), max(1, CHUNK_BYTES // row_bytes)):
            place = torch.searchsorted(held.cells, some).clamp(max=len(held.cells) - 1)
            touched = (held.cells[place] == some).unsqueeze(-1)
            means.append(held.values[place].where(touched, 0.0).mean(dim=1))
        return torch.cat(means)


def _first_of_new_classes(told: Tensor, known: Tensor) -> tuple[int, ...]:
    """Where classes that are not known are told for the first time, ascending."""
    first: dict[int, int] = {}
    for place, number in enumerate(told.tolist()):
        first.setdefault(number, place)
    return tuple(place for number, place in first.items() if number not in set(known.tolist()))


def _probabilities(logits: Tensor, untold: int) -> Tensor:
    """The softmax over told classes and so many outputs that have the last entry's logit; one of each, [..., K + 1]."""
    if not untold:
        return functional.pad(logits[..., :-1].softmax(dim=-1), (0, 1))
    copies = torch.ones_like(logits)
    copies[..., -1] = untold
    return (logits + copies.log()).softmax(dim=-1) / copies


def _grown(state: KVGradientState, other: KVGradientState, cells: Tensor) -> KVGradientState:
    """A copy of the state with room for the other's classes, and its images; and for more cells, ascending."""
    classes = torch.unique(torch.cat([state.classes, other.classes]))
    columns = torch.searchsorted(classes, state.classes)
    images = torch.zeros_like(classes)
    images[columns] += state.images
    images[torch.searchsorted(classes, other.classes)] += other.images
    wide = state.values
    if len(classes) > len(state.classes):  # seldom: gathering columns takes ten times as long as copying whole rows
        sources = torch.full_like(classes, len(state.classes))  # a new class begins as the one never told
        sources[columns] = torch.arange(len(state.classes), device=classes.device)
        wide = wide[:, functional.pad(sources, (0, 1), value=len(state.classes))]
    return KVGradientState(classes, images, *_with_room(state.cells, wide, cells))


def _with_room(cells: Tensor, values: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of cells and their values [T, K + 1] with more cells in between, whose values are 0; each ascending.

    One item is few cells among many: nothing is sorted anew, and what was there is copied once.
    """
    place = torch.searchsorted(cells, more)
    known = torch.zeros_like(more, dtype=torch.bool)
    if len(cells):
        known = cells[place.clamp(max=len(cells) - 1)] == more
    added = more[~known]
    new = place[~known] + torch.arange(len(added), device=cells.device)
    if not len(cells):
        return added.clone(), values.new_zeros(len(added), values.shape[1])
    steps = torch.ones(len(cells) + len(added), dtype=torch.int32, device=cells.device).index_fill_(0, new, 0)
    old = (steps.cumsum(0, dtype=torch.int32) - 1).clamp_(min=0)  # where each cell comes from; a new one from any
    united = cells.index_select(0, old).index_copy_(0, new, added)
    return united, values.index_select(0, old).index_fill_(0, new, 0.0)
