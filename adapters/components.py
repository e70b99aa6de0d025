"""Principal components of unlabelled features, half-whitened.

`whitening` 0 keeps the components' deviations as they are (PCA), 1 makes all of them 1 (whitened PCA); half way, the
strong components lead without drowning the others.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """A projection that was fitted once, on features without labels."""

    mean: Tensor  # [F]
    directions: Tensor  # orthonormal columns divided by their deviation to the power of `whitening`, [F, D]


def fit_components(features: Tensor, count: int, whitening: float = 0.5) -> Components:
    """Fit the first principal components.

    Args:
        features: unlabelled, [N, F], N ≥ 2.
        count: D at most; fewer where the features have no more.
        whitening: 0 … 1.

    Returns:
        The projection, of the features' dtype; scaled so that a projected feature has mean squared length 1.

    Raises:
        ValueError: fewer than 2 features, or features that are all the same.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} features have no principal components; give at least 2")
    exact = features.double()  # the same on every machine as far as can be: keys that are stored hang on it
    mean = exact.mean(dim=0)
    covariance = (exact - mean).T @ (exact - mean) / (len(exact) - 1)
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    real = int((variances > variances[-1] * 1e-9).sum())
    if variances[-1] <= 0 or not real:
        raise ValueError("the features are all the same: they have no principal components")
    kept = min(count, real)
    variances, directions = variances[-kept:].flip(0), directions[:, -kept:].flip(1)
    directions = directions * directions.sum(dim=0).sign().where(directions.sum(dim=0) != 0, 1.0)  # one of two signs
    scaled = directions / variances.pow(whitening / 2)
    length = variances.pow(1 - whitening).sum().sqrt()
    return Components(mean.to(features.dtype), (scaled / length).to(features.dtype))


def project(components: Components, features: Tensor) -> Tensor:
    """Project features [B, F] onto the components, [B, D]."""
    return (features - components.mean) @ components.directions
