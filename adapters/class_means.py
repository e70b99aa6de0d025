"""Nearest class mean: an image belongs to the class whose mean feature points its way.

Mensink et al. 2013, "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost" (DOI
10.1109/TPAMI.2013.83), section 3.2; with features and means of length 1 as in iCaRL (arXiv 1611.07725,
section 2.1).

Deliberate deviations: features are centred on the mean of the model's unlabelled data, so that a cosine of 0 says
nothing for or against a class; means are those of all items, kept as exact sums, not of a chosen few.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.class_sums import ClassSums, added, subtracted, sums_of, unit_codes, unit_vectors
from adapters.heads import Items


@dataclass(frozen=True)
class ClassMeansConfig:
    """Settings of class means."""

    scale: float = 12.0  # of the cosine; the best log-likelihood on CIFAR-10 from 10 to 200 labels a class


class ClassMeansPrior(NamedTuple):
    """What is known before any label."""

    mean: Tensor  # of unlabelled features, [F]


class ClassMeansState(NamedTuple):
    """What was told."""

    classes: ClassSums


class ClassMeansTable(NamedTuple):
    """A state, made ready."""

    classes: tuple[int, ...]
    images: tuple[int, ...]  # of each
    directions: Tensor  # of the class means, of length 1 (or 0, where items cancel out), float64 [K, F]


class ClassMeans:
    """Score by the cosine between an image and each class's mean.

    `score_c = scale · cos(z, Σ_{i in c} z_i)` with `z = f − mean`, each item of length 1.

    Args:
        prior: of the encoder whose features will be read.
        config: settings.

    >>> head = ClassMeans(ClassMeansPrior(torch.zeros(2)), ClassMeansConfig(scale=1.0))
    >>> codes = head.encode(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    >>> state = head.learn(head.init(), Items(codes, torch.tensor([7, 4])))
    >>> head.read(state).classes, head.score(head.read(state), codes).tolist()
    ((4, 7), [[0.0, 1.0], [1.0, 0.0]])
    """

    order_free = True

    def __init__(self, prior: ClassMeansPrior, config: ClassMeansConfig | None = None) -> None:
        self.prior = prior
        self.config = config or ClassMeansConfig()

    def init(self) -> ClassMeansState:
        return ClassMeansState(())

    def encode(self, features: Tensor) -> Tensor:
        """The directions of centred features [B, F] on a grid of 2^-14, int16 [B, F]."""
        return unit_codes(features - self.prior.mean)

    def learn(self, state: ClassMeansState, items: Items) -> ClassMeansState:
        return ClassMeansState(added(state.classes, sums_of(items)))

    def unlearn(self, state: ClassMeansState, items: Items, rest: Items) -> ClassMeansState:  # noqa: ARG002
        return ClassMeansState(subtracted(state.classes, sums_of(items)))

    def merge(self, base: ClassMeansState, own: ClassMeansState) -> ClassMeansState:
        return ClassMeansState(added(base.classes, own.classes))

    def read(self, state: ClassMeansState, before: ClassMeansTable | None = None) -> ClassMeansTable:  # noqa: ARG002
        width, device = len(self.prior.mean), self.prior.mean.device
        totals = torch.zeros(len(state.classes), width, dtype=torch.float64, device=device)
        for row, entry in zip(totals, state.classes, strict=True):
            row.copy_(entry.total)
        numbers = tuple(int(entry.number) for entry in state.classes)
        images = tuple(int(entry.images) for entry in state.classes)
        return ClassMeansTable(numbers, images, functional.normalize(totals, dim=1))

    def score(self, table: ClassMeansTable, codes: Tensor) -> Tensor:
        cosines = unit_vectors(codes) @ table.directions.T
        return (self.config.scale * cosines).to(self.prior.mean.dtype)


def fit_class_means(features: Tensor) -> ClassMeansPrior:
    """The prior of an encoder.

    Args:
        features: unlabelled, [N, F], N ≥ 1.

    Raises:
        ValueError: there are none.
    """
    if not len(features):
        raise ValueError("class means need unlabelled features to centre on; there are none")
    return ClassMeansPrior(features.double().mean(dim=0).to(features.dtype))
