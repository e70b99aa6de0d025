"""Which modality an image belongs to, from its statistics alone: whether it has colour, its histogram, its noise.

A `Router` knows one modality. It gives a confidence: the probability by a logistic regression against everything else
that it was shown, lowered where the image is unlike every image of the modality that it was shown (Mahalanobis
distance; cf. Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks", NeurIPS 2018, arXiv 1807.03888, there in the features of a network). The second part is what lets it say "none
of mine" of photographs of a kind that nobody had when it was fitted.

Fitting needs scikit-learn; a fitted router is numbers, and numpy applies them.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tta_serve.config import RGB

VERSION = 1  # of the features: what they are and how they are computed
BINS = 16  # of the histogram
FEATURES = (
    "channel_spread",
    "saturation",
    *(f"histogram_{bin:02}" for bin in range(BINS)),
    "mean",
    "deviation",
    "skew",
    "entropy",
    "gradient",
    "octave",
    "noise",
    "residual_share",
    "residual_tail",
    "residual_correlation",
)

SAMPLED_SIDE = 128  # pixels; colour and histogram look at about as many, evenly spread
CROPPED_SIDE = 128  # pixels; texture and noise look at the centre, where neighbours are neighbours
SIDE_MIN = 6  # pixels; a smaller image repeats its border up to there, so that every difference exists

ROUNDING = 1 / 12  # variance of rounding to whole grey levels; keeps logarithms finite on flat images
SKEW_MAX = 5.0

IMAGES_MIN = 10  # of the modality: fewer say nothing about how much they vary
FOLDS = 5
TYPICAL_SHARE = 0.99  # of the modality's own held-out distances lie below the limit before its margin
LIMIT_MARGIN = 1.5
DEVIATION_MIN = 0.02  # a feature that hardly varies within the modality may vary by this much elsewhere
RIDGE = 0.1  # added to the covariance of standardised features
FALL = 4  # typicality falls with this power of the distance beyond the limit
NUMBER_MAX = 1e6  # of a fitted number: far above any, far below what overflows

JPEG_QUALITY = 75
DIMMED = (0.25, 0.7)  # share of the light that is left in grey photographs taken in the dark

Array = NDArray[np.float64]
Levels = NDArray[np.float32]  # grey levels, 0 … 255, [h, w]


class Routed(NamedTuple):
    """Where an image goes."""

    modality: str  # `rgb` where no router is confident
    confidence: float  # in 0 … 1; that it is of this modality, and for `rgb` that it is of none of the others


class Router(NamedTuple):
    """One modality against everything else; F features in the order of `FEATURES`, float64."""

    mean: Array  # of what the regression was fitted on, [F]
    deviation: Array  # of the same, [F]
    weights: Array  # of the regression, for standardised features, [F]
    bias: float
    centre: Array  # mean of the modality, [F]
    whitening: Array  # W with W Wᵀ = Σ⁻¹, the modality's inverse covariance, [F, F]
    limit: float  # the largest distance √(‖(f − centre) W‖² / F) that counts as typical

    def confidence(self, described: Array) -> float:
        """How surely an image with these features is of the modality, in 0 … 1.

        `σ(w · (f − mean) / deviation + b) · min(1, (limit / distance)^4)`.
        """
        evidence = float((described - self.mean) / self.deviation @ self.weights) + self.bias
        probability = math.exp(min(evidence, 0)) / (1 + math.exp(-abs(evidence)))  # σ, and no exp overflows
        distance = _distance(described, self.centre, self.whitening)
        return probability * (min(1.0, self.limit / distance) ** FALL if distance > 0 else 1.0)

    def to_json(self) -> str:
        """As a JSON object; `from_json` gives the same numbers back, to the last bit."""
        numbers = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in self._asdict().items()
        }
        return json.dumps({"version": VERSION, "features": list(FEATURES), **numbers}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Router":
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, another version or other features, a field too many or too few, or numbers of the
                wrong shape, not finite or absurdly large. The message says which.
        """
        try:
            read = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("the router is not JSON") from None
        names = {"version", "features", *cls._fields}
        if not isinstance(read, dict) or set(read) != names:
            raise ValueError(f"the router must be an object with {', '.join(sorted(names))} and nothing else")
        if type(read["version"]) is not int or read["version"] != VERSION:
            raise ValueError(f"the router is of version {read['version']!r:.40}; this server reads version {VERSION}")
        if read["features"] != list(FEATURES):
            raise ValueError(f"the router's features are not those of this server ({', '.join(FEATURES)})")
        size = len(FEATURES)
        shapes = {"bias": (), "limit": (), "whitening": (size, size)}
        arrays = {name: _numbers(name, read[name], shapes.get(name, (size,))) for name in cls._fields}
        for name in ("deviation", "limit"):
            if (arrays[name] < 1 / NUMBER_MAX).any():
                raise ValueError(f"the router's {name} must be at least {1 / NUMBER_MAX}")
        return cls._make(array if array.ndim else float(array) for array in arrays.values())


def route(image: Tensor, routers: Mapping[str, Router], min_confidence: float = 0.9) -> Routed:
    """The modality of an image that came without one.

    Args:
        image: uint8 [C, H, W], C 1 or 3, as it was sent: resizing it changes its noise.
        routers: by modality.
        min_confidence: below it the image counts as ordinary.

    >>> route(torch.zeros(3, 4, 4, dtype=torch.uint8), routers={})
    Routed(modality='rgb', confidence=1.0)
    """
    if not routers:
        return Routed(RGB, 1.0)
    described = features(image)
    confidences = {modality: router.confidence(described) for modality, router in routers.items()}
    best = max(sorted(confidences), key=confidences.__getitem__)  # sorted: ties do not hang on who came first
    if confidences[best] < min_confidence:
        return Routed(RGB, 1 - confidences[best])
    return Routed(best, confidences[best])


def fit(modality_images: Sequence[Tensor], other_images: Sequence[Tensor], seed: int) -> Router:
    """Learn to tell a modality from everything else.

    Every image is shown four times: as it is, at half its size, through JPEG, and through both. Everything else is also
    shown in grey, once as bright as it was and once dimmed, so that having no colour is not enough for a modality.

    Args:
        modality_images: uint8 [C, H, W], C 1 or 3; at least `IMAGES_MIN`, tens to hundreds.
        other_images: what else will be sent: colour photographs, other modalities. None at all leaves a router that
            judges by likeness alone.
        seed: of the folds, and of how much is dimmed.

    Raises:
        ValueError: fewer than `IMAGES_MIN` images of the modality.
    """
    # not at the top: takes a second to import, and serving has no need of it
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold

    if len(modality_images) < IMAGES_MIN:
        raise ValueError(f"{len(modality_images)} images of the modality; a router needs at least {IMAGES_MIN}")
    generator = np.random.default_rng(seed)
    own = np.stack([_describe_variants(image) for image in modality_images])  # [N, variants, F]
    flat_own = own.reshape(-1, len(FEATURES))
    folds = KFold(FOLDS, shuffle=True, random_state=seed).split(own)
    distances = [
        _distance(described, *typical)
        for known, left_out in folds
        for typical in [_typical(own[known].reshape(-1, len(FEATURES)))]
        for described in own[left_out].reshape(-1, len(FEATURES))
    ]
    centre, whitening = _typical(flat_own)
    limit = LIMIT_MARGIN * float(np.quantile(distances, TYPICAL_SHARE))
    if not other_images:
        zero, one = np.zeros(len(FEATURES)), np.ones(len(FEATURES))
        # a bias this high is a probability of 1: likeness decides
        return Router(zero, one, zero, 50.0, centre, whitening, limit)
    others = np.concatenate([_describe_variants(view) for image in other_images for view in _views(image, generator)])
    every = np.concatenate([flat_own, others])
    mean, deviation = every.mean(axis=0), np.maximum(every.std(axis=0), DEVIATION_MIN)
    regression = LogisticRegression(class_weight="balanced", max_iter=1000)
    regression.fit((every - mean) / deviation, np.arange(len(every)) < len(flat_own))
    return Router(mean, deviation, regression.coef_[0], float(regression.intercept_[0]), centre, whitening, limit)


def features(image: Tensor) -> Array:
    """Describe an image in `len(FEATURES)` numbers, each of the order of 1.

    Of up to `SAMPLED_SIDE`² pixels evenly spread, with M and m the largest and the smallest of red, green and blue,
    and y the luminance (ITU-R BT.601) in 0 … 255:

    - `channel_spread`: mean of (M − m) / 255; 0 where the channels are equal, or there is one
    - `saturation`: mean of (M − m) / M, as in HSV; 0 where M is 0
    - `histogram_…`: √ of the share of y in each of 16 bins (the Euclidean distance of roots is Hellinger's)
    - `mean`, `deviation`: of y / 255; `skew`: mean of ((y − mean) / deviation)³, cut at ±5; 0 on flat images
    - `entropy`: −Σ p log₂ p over the bins, of 4 bits

    Of the centre, `CROPPED_SIDE`² pixels as they are, with r the response of the mask
    (1 −2 1; −2 4 −2; 1 −2 1), which is blind to edges along the axes and to slopes, and has the variance 36 σ² for
    white noise of variance σ² (Immerkær, "Fast Noise Variance Estimation", CVIU 64(2), 1996); logarithms are to the
    base 10, of powers to which that of rounding to whole levels has been added, σ² = 1/12:

    - `gradient`: log of the mean squared difference of neighbours
    - `octave`: log of the same in means of 2×2 pixels, over it: high for blurred images, low for noise
    - `noise`: log of the median |r| plus one
    - `residual_share`: log of the mean r² over the variance of y: what is finest, as a share of everything
    - `residual_tail`: log of mean r⁴ over (mean r²)²: log 3 for Gaussian noise, more for edges on calm ground
    - `residual_correlation`: of neighbours in r; −2/3 for white noise, more for what has been blurred or enlarged

    Args:
        image: uint8 [C, H, W], C 1 or 3, at least 1×1. Three equal channels are described exactly as one.

    Raises:
        ValueError: another type or shape.
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"an image is uint8 [1 or 3, H, W], not {image.dtype} {list(image.shape)}")
    pixels = image.cpu().numpy()
    height, width = pixels.shape[1:]
    sampled = pixels[:, :: -(-height // SAMPLED_SIDE), :: -(-width // SAMPLED_SIDE)]
    top, left = max(0, height - CROPPED_SIDE) // 2, max(0, width - CROPPED_SIDE) // 2
    cropped = pixels[:, top : top + CROPPED_SIDE, left : left + CROPPED_SIDE]
    return np.array([*_colour(sampled), *_tones(_luminance(sampled)), *_texture(_luminance(cropped))])


def _luminance(pixels: NDArray[np.uint8]) -> Levels:
    """[C, h, w] → [h, w] in 0 … 255; exactly y for three channels of y, which decimal fractions would miss."""
    if len(pixels) == 1:
        return np.asarray(pixels[0], np.float32)
    red, green, blue = pixels.astype(np.int32)
    return np.asarray((299 * red + 587 * green + 114 * blue) / 1000, np.float32)


def _colour(pixels: NDArray[np.uint8]) -> list[float]:
    if len(pixels) == 1:
        return [0.0, 0.0]
    largest = pixels.max(axis=0)
    spread = (largest - pixels.min(axis=0)).astype(np.float32)
    return [float(spread.mean()) / 255, float((spread / np.maximum(largest, 1)).mean())]


def _tones(y: Levels) -> list[float]:
    shares = np.bincount((y.ravel() * (BINS / 256)).astype(np.intp), minlength=BINS) / y.size
    present = shares[shares > 0]
    mean = float(y.mean())
    centred = y - mean
    squared = centred * centred
    variance = float(squared.mean())
    skew = float((squared * centred).mean()) / (variance + ROUNDING) ** 1.5
    entropy = -float((present * np.log2(present)).sum()) / math.log2(BINS)
    skew = min(max(skew, -SKEW_MAX), SKEW_MAX)
    return [*np.sqrt(shares), mean / 255, math.sqrt(variance) / 255, skew, entropy]


def _texture(y: Levels) -> list[float]:
    missing = [max(0, SIDE_MIN - side) for side in y.shape]
    if any(missing):
        y = np.pad(y, [(0, each) for each in missing], mode="edge")
    height, width = y.shape[0] // 2 * 2, y.shape[1] // 2 * 2
    pairs = y[:height:2, :width] + y[1:height:2, :width]
    halved = (pairs[:, ::2] + pairs[:, 1::2]) * np.float32(0.25)
    energy, coarse_energy = _gradient_energy(y), _gradient_energy(halved)
    rows = y[2:] - 2 * y[1:-1] + y[:-2]
    residual = rows[:, 2:] - 2 * rows[:, 1:-1] + rows[:, :-2]
    squared = residual * residual
    power, fourth = float(squared.mean()), float((squared * squared).mean())
    middle = residual.size // 2
    median = float(np.partition(np.abs(residual), middle, axis=None)[middle])  # np.median takes eight times as long
    beside = float((residual[:, 1:] * residual[:, :-1]).mean() + (residual[1:] * residual[:-1]).mean()) / 2
    rounding = 36 * ROUNDING  # what rounding alone leaves in the residual
    return [
        math.log10(energy + ROUNDING),
        math.log10((coarse_energy + ROUNDING) / (energy + ROUNDING)),
        math.log10(median + 1),
        math.log10((power + rounding) / (float(y.var()) + ROUNDING)),
        math.log10((fourth + 3 * rounding**2) / (power + rounding) ** 2),
        beside / (power + rounding),
    ]


def _gradient_energy(y: Levels) -> float:
    down, across = y[1:] - y[:-1], y[:, 1:] - y[:, :-1]
    return float((down * down).mean() + (across * across).mean())


def _distance(described: Array, centre: Array, whitening: Array) -> float:
    """Mahalanobis distance, per √feature: about 1 for what is typical."""
    whitened = (described - centre) @ whitening
    return math.sqrt(float(whitened @ whitened) / len(whitened))


def _typical(described: Array) -> tuple[Array, Array]:
    """Centre [F] and whitening [F, F] of described images [N, F].

    The covariance is shrunk (Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
    J. Multivariate Analysis 88, 2004): there may be fewer images than features.
    """
    from sklearn.covariance import ledoit_wolf

    centre = described.mean(axis=0)
    deviation = np.maximum(described.std(axis=0), DEVIATION_MIN)
    covariance, _ = ledoit_wolf((described - centre) / deviation, assume_centered=True)
    inverse = np.linalg.inv(covariance + RIDGE * np.eye(len(centre)))
    return centre, np.linalg.cholesky(inverse) / deviation[:, None]


def _describe_variants(image: Tensor) -> Array:
    """Features of the image as it is, at half its size, and of both through JPEG: [4, F]."""
    described = features(image)  # first: it says what is wrong with an image
    halved = _from_pillow(_halve(_to_pillow(image)))
    return np.stack([described, *(features(each) for each in (halved, _jpeg(image), _jpeg(halved)))])


def _views(image: Tensor, generator: np.random.Generator) -> list[Tensor]:
    """An image, the same without colour, and that again in less light."""
    grey = torch.from_numpy(_luminance(image.numpy()).round().astype(np.uint8))[None]
    dimmed = (grey * generator.uniform(*DIMMED)).round().to(torch.uint8)
    return [image, grey, dimmed] if len(image) == 3 else [grey, dimmed]


def _halve(image: Image.Image) -> Image.Image:
    size = max(1, image.width // 2), max(1, image.height // 2)
    return image.resize(size, Image.Resampling.BILINEAR)


def _jpeg(image: Tensor) -> Tensor:
    buffer = io.BytesIO()
    _to_pillow(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    with Image.open(buffer) as decoded:
        return _from_pillow(decoded)


def _to_pillow(image: Tensor) -> Image.Image:
    pixels = image.numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _from_pillow(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Nested lists of numbers as an array.

    Raises:
        ValueError: anything else.
    """
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "if" or array.shape != shape:
        raise ValueError(f"the router's {name} must be numbers of shape {list(shape)}")
    if not (np.abs(array.astype(np.float64)) <= NUMBER_MAX).all():
        raise ValueError(f"the router's {name} must be finite and at most {NUMBER_MAX:g}")
    return array.astype(np.float64)
