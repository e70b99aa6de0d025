"""Ridge regression on the labels, in closed form from two sums: XᵀX and XᵀY.

Hoerl and Kennard 1970, "Ridge Regression" (DOI 10.1080/00401706.1970.10488634): `W = (XᵀX + λI)⁻¹ XᵀY`. Both sums are
of integers and exact, so that neither the order of the items nor one taken out again leaves a trace.

A class's target is `√(n̄ / n_c)` for its own items, n̄ the mean of all n_c, and 0 for others: plain one-hot where
classes are balanced, and else the weights under which least squares is linear discriminant analysis (Ye 2007, "Least
Squares Linear Discriminant Analysis", DOI 10.1145/1273496.1273633). Where one class is 20 times rarer than the others,
that is 2 to 4 points above plain one-hot targets (CIFAR-10, 200 labels a class).

There is no bias: features are centred on unlabelled data, so that the mean image scores 0 for every class, and 0 is
neutral. What is regressed on is their principal components, for XᵀX is part of every stream's state and is solved after
each change: D = 256 of 1,280 dimensions is 0.5 MB instead of 13, and costs about a point at 200 labels a class.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.class_sums import GRID, ClassSums, added, subtracted, sums_of, unit_codes, unit_vectors
from adapters.components import Components, fit_components, project
from adapters.heads import Items, NeverLearned

CHUNK = 2**14  # items whose XᵀX is summed in float64 at once: |Σ| ≤ 2^14 · 2^28 < 2^53, so every step is exact


@dataclass(frozen=True)
class RidgeConfig:
    """Settings of ridge regression."""

    penalty: float = 2.0  # λ > 0, for codes of length 1; within 0.7 points of the best from 10 to 200 labels a class
    scale: float = 10.0  # of the regression's values; the best log-likelihood from 30 to 200 labels a class

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise ValueError(f"ridge regression needs a penalty above 0, not {self.penalty}")


class RidgeState(NamedTuple):
    """What was told."""

    gram: Tensor  # XᵀX of the codes, int64 [D, D]: exact for 2^34 items
    classes: ClassSums  # the columns of XᵀY


class RidgeTable(NamedTuple):
    """A state, made ready."""

    classes: tuple[int, ...]
    images: tuple[int, ...]  # n_c
    weights: Tensor  # W, float64 [D, K]


class Ridge:
    """Score by a linear regression on the classes.

    `score = scale · z W` with `z` an image's principal components, of length 1.

    Args:
        prior: the principal components of the encoder's unlabelled features; see `fit_ridge`.
        config: settings.

    >>> head = Ridge(Components(torch.zeros(2), torch.eye(2)), RidgeConfig(penalty=1.0, scale=1.0))
    >>> codes = head.encode(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    >>> state = head.learn(head.init(), Items(codes, torch.tensor([7, 4])))
    >>> head.read(state).classes, head.score(head.read(state), codes).tolist()
    ((4, 7), [[0.0, 0.5], [0.5, 0.0]])
    """

    order_free = True

    def __init__(self, prior: Components, config: RidgeConfig | None = None) -> None:
        self.prior = prior
        self.config = config or RidgeConfig()

    def init(self) -> RidgeState:
        size, device = self.prior.directions.shape[1], self.prior.directions.device
        return RidgeState(torch.zeros(size, size, dtype=torch.int64, device=device), ())

    def encode(self, features: Tensor) -> Tensor:
        """The directions of the principal components of features [B, F] on a grid of 2^-14, int16 [B, D]."""
        return unit_codes(project(self.prior, features))

    def learn(self, state: RidgeState, items: Items) -> RidgeState:
        return RidgeState(state.gram + _gram(items.codes), added(state.classes, sums_of(items)))

    def unlearn(self, state: RidgeState, items: Items, rest: Items) -> RidgeState:  # noqa: ARG002
        classes = subtracted(state.classes, sums_of(items))
        gram = state.gram - _gram(items.codes)
        if bool((gram.diagonal() < 0).any()) or (not classes and bool(gram.any())):
            raise NeverLearned("what would be left of XᵀX is no sum of squares: other items were learned")
        return RidgeState(gram, classes)

    def merge(self, base: RidgeState, own: RidgeState) -> RidgeState:
        return RidgeState(base.gram + own.gram, added(base.classes, own.classes))

    def read(self, state: RidgeState, before: RidgeTable | None = None) -> RidgeTable:  # noqa: ARG002
        """Solve for W: a Cholesky decomposition of D³/3 multiplications."""
        numbers = tuple(int(entry.number) for entry in state.classes)
        images = tuple(int(entry.images) for entry in state.classes)
        size = len(state.gram)
        moments = torch.zeros(size, len(numbers), dtype=torch.float64, device=state.gram.device)  # XᵀY
        balanced = sum(images) / max(len(images), 1)  # n̄
        for column, entry, count in zip(moments.T, state.classes, images, strict=True):
            column.copy_(entry.total.double() / GRID * (balanced / count) ** 0.5)
        penalty = self.config.penalty * torch.eye(size, dtype=torch.float64, device=state.gram.device)
        factor = torch.linalg.cholesky(state.gram.double() / GRID**2 + penalty)
        return RidgeTable(numbers, images, torch.cholesky_solve(moments, factor))

    def score(self, table: RidgeTable, codes: Tensor) -> Tensor:
        values = unit_vectors(codes) @ table.weights
        return (self.config.scale * values).to(self.prior.mean.dtype)


def fit_ridge(features: Tensor, count: int = 256) -> Components:
    """The prior of an encoder: principal components, not whitened, for λ shall fall on the weak ones.

    Args:
        features: unlabelled, [N, F], N ≥ 2.
        count: D at most.

    Raises:
        ValueError: as `fit_components`.
    """
    return fit_components(features, count, whitening=0.0)


def _gram(codes: Tensor) -> Tensor:
    """XᵀX of codes [N, D], exact, int64 [D, D]. float64 because its matrix product is fast; see `CHUNK`."""
    total = torch.zeros(codes.shape[1], codes.shape[1], dtype=torch.int64, device=codes.device)
    for part in torch.split(codes, CHUNK):
        exact = part.double()
        total += (exact.T @ exact).long()
    return total
