"""The orders in which the images of `incremental.py` arrive, and a comparison over all of them.

*Order gap*: accuracy with all images shuffled minus accuracy with the classes one after the other.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from loadtests.incremental_images import Labels, Material, Places
from loadtests.incremental_play import Learner, Played, play

CLASSES_A_TASK = 2
RARITY = 20  # how much fewer images the rare class has

Which = Literal["in_order", "shuffled", "rare_in_order", "rare_shuffled"]
Tasks = tuple[Places, ...]
Orders = dict[Which, Tasks]
Compared = dict[Which, Played]


def orders_of(labels: Labels, rare: int, seed: int) -> Orders:
    """All images two classes at a time and all at random; and the same with one class much rarer.

    Args:
        labels: of the training images.
        rare: number of the rare class.
        seed: of what is shuffled.
    """
    everything = np.arange(len(labels))
    fewer = rarer(labels, rare, max(1, int((labels == rare).sum()) // RARITY))
    return {
        "in_order": in_class_order(labels, everything, CLASSES_A_TASK, seed),
        "shuffled": shuffled(everything, seed),
        "rare_in_order": in_class_order(labels, fewer, CLASSES_A_TASK, seed),
        "rare_shuffled": shuffled(fewer, seed),
    }


def compare(learner_of: Callable[[Which], Learner], orders: Orders, material: Material) -> Compared:
    """Play every order, each with a learner of its own; between tasks only those in class order are asked."""
    return {
        which: play(
            learner_of(which), orders[which], material.train.labels, material.test.labels, between=which == "in_order"
        )
        for which in get_args(Which)
    }


def in_class_order(labels: Labels, places: Places, classes_a_task: int, seed: int) -> Tasks:
    """Tasks of some classes each, in order of their numbers; shuffled within a task.

    Args:
        labels: of all training images.
        places: those that arrive.
        classes_a_task: how many.
        seed: of the order.
    """
    random = np.random.default_rng(seed)
    firsts = range(0, int(labels.max()) + 1, classes_a_task)
    tasks = [places[(labels[places] >= first) & (labels[places] < first + classes_a_task)] for first in firsts]
    return tuple(random.permutation(task) for task in tasks)


def shuffled(places: Places, seed: int) -> Tasks:
    """One task of all, in any order."""
    return (np.random.default_rng(seed).permutation(places),)


def rarer(labels: Labels, rare: int, keep: int) -> Places:
    """All places but those of the class `rare` behind its first `keep`.

    >>> rarer(np.array([0, 1, 1, 0, 1]), rare=1, keep=2)
    array([0, 1, 2, 3])
    """
    left_out = np.flatnonzero(labels == rare)[keep:]
    return np.setdiff1d(np.arange(len(labels)), left_out)
