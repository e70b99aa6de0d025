"""The images of `incremental.py`: what is taught, what chooses settings, and what is asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtests import cifar, throughput
from loadtests.errors import LoadTestError

SIDE = 128  # pixels that the encoder sees of CIFAR's 32: at 224 a forward costs three times as much
DIGITS_TEST = 20  # of each class

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Places = NDArray[np.int64]  # of images in a part


class Part(NamedTuple):
    """Images whose classes are known."""

    images: Images  # [N, 3, H, W], RGB, of the size that the model reads
    labels: Labels  # [N], 0 … K − 1


class Material(NamedTuple):
    """All that one comparison sees."""

    names: tuple[str, ...]  # of the K classes; the model knows none of them
    train: Part  # as many of each class
    rest: Part  # chooses settings
    test: Part
    unlabelled: Images  # train and rest as they came, [N, H, W, 3]: what keys are made of

    @property
    def side(self) -> int:
        """Height and width that the model reads."""
        return int(self.train.images.shape[2])


def of_cifar(data: Path, per_class: int, side: int = SIDE) -> Material:
    """CIFAR: the first `per_class` images of each class in source.npz, the rest of it, and clean.npz.

    Raises:
        MissingFile: a file does not exist.
        LoadTestError: there are too few images.
    """
    with np.load(cifar.existing(data, "source.npz")) as arrays:
        small, labels = arrays["images"], arrays["labels"].astype(np.int64)
    taught, rest = split(labels, per_class)
    large = enlarged(small, side)
    test = Part(enlarged(cifar.images(data, "clean").transpose(0, 2, 3, 1), side), cifar.labels(data))
    # the prefix: a name that the model knows would not add a class
    names = tuple(f"cifar-{name}" for name in cifar.LABELS)
    return Material(names, Part(large[taught], labels[taught]), Part(large[rest], labels[rest]), test, small)


def of_digits(per_class: int) -> Material:
    """Handwritten digits, for a trial in seconds: `per_class` of each class to teach, as many again to choose by.

    Raises:
        LoadTestError: there are too few images.
    """
    from sklearn.datasets import load_digits  # slow to import, and only a trial needs it

    bunch = load_digits()
    images, labels = throughput.enlarged(bunch.images), bunch.target.astype(np.int64)
    places = {
        what: np.concatenate([np.flatnonzero(labels == number)[first:end] for number in range(10)])
        for what, first, end in (
            ("test", 0, DIGITS_TEST),
            ("train", DIGITS_TEST, DIGITS_TEST + per_class),
            ("rest", DIGITS_TEST + per_class, DIGITS_TEST + 2 * per_class),
        )
    }
    if len(places["rest"]) < 10 * per_class:
        raise LoadTestError(f"there are fewer than {DIGITS_TEST + 2 * per_class} images of a digit; take fewer a class")
    parts = {what: Part(images[some], labels[some]) for what, some in places.items()}
    unlabelled = np.concatenate([parts["train"].images, parts["rest"].images]).transpose(0, 2, 3, 1)
    names = tuple(f"digit-{number}" for number in range(10))
    return Material(names, parts["train"], parts["rest"], parts["test"], unlabelled)


def split(labels: Labels, per_class: int) -> tuple[Places, Places]:
    """The first images of each class, and all others.

    >>> split(np.array([1, 0, 0, 1, 1]), 1)
    (array([0, 1]), array([2, 3, 4]))

    Raises:
        LoadTestError: a class has too few.
    """
    of_class = [np.flatnonzero(labels == number) for number in range(int(labels.max()) + 1)]
    fewest = min(len(places) for places in of_class)
    if fewest <= per_class:
        raise LoadTestError(f"a class has {fewest} images: {per_class} to teach leave none to choose settings by")
    taught = np.sort(np.concatenate([places[:per_class] for places in of_class]))
    return taught, np.setdiff1d(np.arange(len(labels)), taught)


def enlarged(images: Images, side: int) -> Images:
    """As the server fits a picture to the model: uint8 [N, H, W, 3] → [N, 3, side, side], interpolated bicubically."""
    large = [np.asarray(Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC)) for each in images]
    return np.ascontiguousarray(np.stack(large).transpose(0, 3, 1, 2))


def batches(places: Places, size: int) -> Sequence[Places]:
    """Parts of so many in a row; the last may have fewer."""
    return [places[first : first + size] for first in range(0, len(places), size)]
