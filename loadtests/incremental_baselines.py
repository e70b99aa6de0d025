"""What a head is compared with: one linear layer, taught one image after the other, or from all images at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadtests.incremental_images import Labels, Material, Places

RATES = tuple(10.0 ** (exponent / 2) for exponent in range(-14, 1))  # of learning: 1e-7 … 1
USUAL_RATE = 1e-3
PENALTIES = tuple(10.0**exponent for exponent in range(-5, 2))  # sklearn's C, the inverse of L2's weight
ITERATIONS = 2000  # of L-BFGS

Features = NDArray[np.float32]  # [N, F]


class Seen(NamedTuple):
    """The features of the images, centred, and of one scale."""

    train: Features
    rest: Features
    test: Features


class SGD:
    """Softmax regression that takes a step for each image. It knows from the first how many classes will come.

    Args:
        train: features that it is taught, [N, F].
        labels: of these.
        asked: features that it is asked, [M, F].
        classes: K.
        rate: of learning.
    """

    def __init__(self, train: Features, labels: Labels, asked: Features, classes: int, rate: float) -> None:
        self.train = train
        self.labels = labels
        self.asked = asked
        self.rate = rate
        self._weights = np.zeros((classes, train.shape[1]), np.float32)
        self._bias = np.zeros(classes, np.float32)

    def teach(self, places: Places) -> int:
        right = 0
        for place in places:
            x, label = self.train[place], self.labels[place]
            logits = self._weights @ x + self._bias
            right += int(logits.argmax() == label)
            error = np.exp(logits - logits.max())
            error /= error.sum()
            error[label] -= 1
            self._weights -= self.rate * np.outer(error, x)
            self._bias -= self.rate * error
        return right

    def answer(self, places: Places) -> Labels:
        answers: Labels = (self.asked[places] @ self._weights.T + self._bias).argmax(axis=1)
        return answers


def best_rate(seen: Seen, material: Material, tasks: Sequence[Places]) -> float:
    """The rate with which these tasks, in this order, end most accurate on the rest."""

    def accuracy(rate: float) -> float:
        learner = SGD(seen.train, material.train.labels, seen.rest, len(material.names), rate)
        for places in tasks:
            learner.teach(places)
        everything = np.arange(len(material.rest.labels))
        return float((learner.answer(everything) == material.rest.labels).mean())

    best: float = max(RATES, key=accuracy)
    return best


def sgd(seen: Seen, material: Material, rate: float) -> SGD:
    """One that was taught nothing, and is asked the test."""
    return SGD(seen.train, material.train.labels, seen.test, len(material.names), rate)


def ceiling(seen: Seen, material: Material, places: Places) -> Labels:
    """Answers to the test of a softmax regression on all these training images at once.

    Its L2 penalty is the best on the rest.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    labels = material.train.labels[places]
    fitted = [
        LogisticRegression(C=penalty, max_iter=ITERATIONS).fit(seen.train[places], labels) for penalty in PENALTIES
    ]
    best = max(fitted, key=lambda model: float(model.score(seen.rest, material.rest.labels)))
    answers: Labels = best.predict(seen.test)
    return answers


def normalised(train: Features, rest: Features, test: Features) -> Seen:
    """All features minus the mean of train and rest, over their one standard deviation: no label is looked at."""
    unlabelled = np.concatenate([train, rest])
    mean, deviation = unlabelled.mean(axis=0), unlabelled.std()
    return Seen(*((part - mean) / deviation for part in (train, rest, test)))
