"""The images of a protocol run: the corruptions end to end, and the clean ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadtests import cifar
from loadtests.protocol_orders import Orders, Places, chosen


class Images(NamedTuple):
    """K corruptions of the same N images."""

    pixels: NDArray[np.uint8]  # [K·N, 3, H, W] RGB
    labels: NDArray[np.int64]  # [N], those of every corruption
    clean: NDArray[np.uint8]  # [N, 3, H, W]: the probe

    def at(self, places: Places) -> NDArray[np.uint8]:
        return self.pixels[places % len(self.pixels)]

    def labels_at(self, places: Places) -> NDArray[np.int64]:
        return self.labels[places % len(self.labels)]


def load(data: Path, corruptions: Sequence[str]) -> Images:
    """Read the corruptions from the CIFAR files, in this order."""
    pixels = np.concatenate([cifar.images(data, name) for name in corruptions])
    return Images(pixels, cifar.labels(data), cifar.images(data, "clean"))


def load_orders(data: Path, corruptions: Sequence[str], batch: int) -> Orders:
    """Read the orders, of some corruptions or (given none) of all.

    Raises:
        MissingFile: there is no such file, or no such corruption in it.
    """
    with np.load(cifar.existing(data, "orders.npz")) as arrays:
        mixed, correlated = arrays["mixed"].astype(np.int64), arrays["correlated"].astype(np.int64)
    names = cifar.corruptions(data)
    for name in corruptions:
        cifar.existing(data, f"{name}.npz")
    every = Orders(names, len(correlated), batch, mixed, correlated)
    return chosen(every, corruptions) if corruptions else every
