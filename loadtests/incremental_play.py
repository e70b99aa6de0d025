"""One pass over images whose classes arrive in tasks: each is predicted and then taught, and the test is asked between.

Continual learning's usual figures: accuracy when all was taught, and the mean *drop* of each class from its best.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from loadtests.incremental_client import LabelClient
from loadtests.incremental_images import Labels, Material, Places, batches

# Images of a request. The features of an image are the same bits in any request of as many images, and in one of
# another size not always: 10 divides every task here, so that an order changes nothing but the order.
REQUEST_IMAGES = 10
NOBODYS = -1  # the answer is none of the classes that are taught here


class Learner(Protocol):
    """What is taught and asked."""

    def teach(self, places: Places) -> int:
        """Predict training images, and then learn them; how many were right before."""
        ...

    def answer(self, places: Places) -> Labels:
        """The class of each of these test images."""
        ...


class Played(NamedTuple):
    """What came of one pass."""

    answers: Labels  # to all test images, in the end
    recalls: tuple[NDArray[np.float64], ...]  # after each task of each class [K], on every second image; NaN: not seen
    accuracies: tuple[float, ...]  # after each task, on every second image of the classes seen; a share
    right_before: float  # the share that was right before it was taught


class Served:
    """A head of a server, over HTTP.

    Args:
        client: of its model.
        material: the images.
        stream: a name that is not used yet.
    """

    def __init__(self, client: LabelClient, material: Material, stream: str) -> None:
        self.client = client
        self.material = material
        self.stream = stream
        self._requests = 0

    def teach(self, places: Places) -> int:
        right = 0
        train = self.material.train
        for some in batches(places, REQUEST_IMAGES):
            self._requests += 1
            id = f"taught-{self._requests}"
            self.client.infer(train.images[some], stream=self.stream, id=id)
            names = [self.material.names[number] for number in train.labels[some]]
            right += self.client.teach(id, names, stream=self.stream)
        return right

    def answer(self, places: Places) -> Labels:
        ours = {name: number for number, name in enumerate(self.material.names)}
        numbers = np.array([ours.get(name, NOBODYS) for name in self.client.names(self.stream)])
        images = self.material.test.images
        said = [
            self.client.infer(images[some], stream=self.stream, adapt=False).answered
            for some in batches(places, REQUEST_IMAGES)
        ]
        return numbers[np.concatenate(said)]

    def clear(self) -> None:
        """Have all labels forgotten: on a server of others nothing shall stay."""
        for name in set(self.material.names) & set(self.client.names(self.stream)):
            self.client.forget(self.stream, label=name)


def play(learner: Learner, tasks: Sequence[Places], taught: Labels, test: Labels, *, between: bool = True) -> Played:
    """Teach task after task, and ask all test images at the end.

    Args:
        learner: that was taught nothing.
        tasks: places of training images, in order.
        taught: labels of all training images.
        test: labels of all test images.
        between: ask after each task too, every second test image of the classes seen.
    """
    halves = np.arange(0, len(test), 2)
    recalls, accuracies, right, seen = [], [], 0, set[int]()
    answers = np.full(len(test), NOBODYS)
    for number, places in enumerate(tasks, start=1):
        right += learner.teach(places)
        seen |= set(taught[places].tolist())
        if number == len(tasks):
            answers = learner.answer(np.arange(len(test)))
        elif not between:
            continue
        asked = halves[np.isin(test[halves], list(seen))]
        if number < len(tasks):
            answers[asked] = learner.answer(asked)
        recalls.append(recalls_of(answers[asked], test[asked], int(test.max()) + 1))
        accuracies.append(float((answers[asked] == test[asked]).mean()))
    return Played(answers, tuple(recalls), tuple(accuracies), right / sum(map(len, tasks)))


def recalls_of(answers: Labels, labels: Labels, classes: int) -> NDArray[np.float64]:
    """The share of each class's images that was answered with it; NaN where there is none.

    >>> recalls_of(np.array([0, 1, 1]), np.array([0, 0, 1]), 3)
    array([0.5, 1. , nan])
    """
    of_class = [answers[labels == number] == number for number in range(classes)]
    return np.array([right.mean() if len(right) else np.nan for right in of_class])


def mean_drop(recalls: Sequence[NDArray[np.float64]]) -> float:
    """How far each class ended below its best, mean over the classes, in points.

    >>> mean_drop([np.array([1.0, np.nan]), np.array([0.75, 0.5])])
    12.5
    """
    return float(100 * (np.nanmax(np.stack(recalls), axis=0) - recalls[-1]).mean())
