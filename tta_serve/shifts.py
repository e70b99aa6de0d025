"""Shifts that the demo puts digits through: uint8 images [N, 32, 32, 3] in, the same out, one phase after the other.

How severe each is was chosen on the held-out digits: the frozen model loses 10 points or more, an adapting one can win
them back.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Shift = Callable[[Images, np.random.Generator], Images]

NOISE_STD = 40.0  # of 255
CONTRAST = 0.5  # share of the contrast that is left
BLUR_STD_PIXELS = 3.5


def clean(images: Images, generator: np.random.Generator) -> Images:  # noqa: ARG001
    """The images as they are."""
    return images


def noise(images: Images, generator: np.random.Generator) -> Images:
    """Gaussian noise, drawn anew for every value of every image."""
    return _bytes(images + NOISE_STD * generator.standard_normal(images.shape, dtype=np.float32))


def low_contrast(images: Images, generator: np.random.Generator) -> Images:  # noqa: ARG001
    """Every value moved half the way to the middle grey: black turns to dark grey, white to light grey."""
    return _bytes(128 + CONTRAST * (images.astype(np.float32) - 128))


def inverted(images: Images, generator: np.random.Generator) -> Images:  # noqa: ARG001
    """The negative: dark digits on white."""
    return 255 - images


def blur(images: Images, generator: np.random.Generator) -> Images:  # noqa: ARG001
    """A Gaussian blur; beyond the edges the image repeats its border.

    >>> white = np.full((1, 32, 32, 3), 255, np.uint8)
    >>> bool((blur(white, np.random.default_rng(0)) == white).all())
    True
    """
    reach = round(3 * BLUR_STD_PIXELS)
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    weights = np.exp(-(offsets**2) / (2 * BLUR_STD_PIXELS**2))
    weights /= weights.sum()
    blurred = images.astype(np.float32)
    for axis in (1, 2):
        size = blurred.shape[axis]
        padding = [(reach, reach) if each == axis else (0, 0) for each in range(4)]
        padded = np.pad(blurred, padding, mode="edge")
        blurred = sum(w * padded.take(range(i, i + size), axis) for i, w in enumerate(weights))
    return _bytes(blurred)


def _bytes(values: NDArray[np.float32]) -> Images:
    return values.round().clip(0, 255).astype(np.uint8)


class Phase(NamedTuple):
    """One part of the demo."""

    name: str
    shift: Shift
    shifted: bool  # whether the images differ from those that the model was trained on


PHASES = (
    Phase("clean", clean, shifted=False),
    Phase("noise", noise, shifted=True),
    Phase("low contrast", low_contrast, shifted=True),
    Phase("inverted", inverted, shifted=True),
    Phase("blur", blur, shifted=True),
    Phase("clean again", clean, shifted=False),
)
