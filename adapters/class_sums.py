"""Exact sums of codes, class by class: what a class mean and a ridge regression have learned.

Codes are integers, so that a sum is the same in whatever order it was made, and taking an item out again leaves no
rounding behind: floats promise neither. A class's entry is never changed; one item more copies that class alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adapters.heads import Items, NeverLearned

GRID = 2**14  # steps of 1: a unit vector's entries are −16,384 … 16,384 and fit an int16


class ClassSum(NamedTuple):
    """What was told of one class."""

    number: Tensor  # of the class, int64 []
    images: Tensor  # n_c > 0, int64 []
    total: Tensor  # Σ of its items' codes, int64 [F]: exact for 2^49 items


ClassSums = tuple[ClassSum, ...]  # by number, ascending; a class without items is absent


def unit_codes(vectors: Tensor) -> Tensor:
    """The directions of vectors [B, F] on the grid, `round(2^14 · v / ‖v‖)`, int16 [B, F].

    A vector of length zero, or one that is not finite, has no direction: its code is 0, which no class is near to.
    """
    directions = functional.normalize(vectors.double(), dim=1)
    usable = vectors.isfinite().all(dim=1, keepdim=True)
    return (directions * GRID).where(usable, 0.0).round().to(torch.int16)


def unit_vectors(codes: Tensor) -> Tensor:
    """The directions that codes [B, F] stand for, float64 [B, F]."""
    return codes.double() / GRID


def sums_of(items: Items) -> ClassSums:
    """The sums of some items alone."""
    entries = []
    for number in torch.unique(items.classes):  # ascending
        codes = items.codes[items.classes == number]
        entries.append(ClassSum(number.clone(), number.new_tensor(len(codes)), codes.sum(dim=0, dtype=torch.int64)))
    return tuple(entries)


def added(left: ClassSums, right: ClassSums) -> ClassSums:
    """The sums of the items of both.

    >>> one = sums_of(Items(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])))
    >>> [entry.total.tolist() for entry in added(one, one)]
    [[2, 4], [6, 8]]
    """
    entries = {int(entry.number): entry for entry in left}
    for entry in right:
        old = entries.get(int(entry.number))
        if old is not None:
            entry = ClassSum(entry.number, old.images + entry.images, old.total + entry.total)
        entries[int(entry.number)] = entry
    return tuple(entries[number] for number in sorted(entries))


def subtracted(left: ClassSums, right: ClassSums) -> ClassSums:
    """The sums `left` without the items of `right`, which are among its own.

    Raises:
        NeverLearned: a class has no such items, or what would be left is no sum of codes.
    """
    entries = {int(entry.number): entry for entry in left}
    for number, gone in ((int(entry.number), entry) for entry in right):
        old = entries.pop(number, None)
        held = 0 if old is None else int(old.images)
        if old is None or held < int(gone.images):
            raise NeverLearned(f"class {number} has {held} items; {int(gone.images)} cannot be taken out")
        entry = ClassSum(old.number, old.images - gone.images, old.total - gone.total)
        if bool((entry.total.abs() > entry.images * GRID).any()):  # for the last item of a class: not zero
            raise NeverLearned(f"what would be left of class {number} is no sum of codes: other items were learned")
        if held > int(gone.images):
            entries[number] = entry
    return tuple(entries[number] for number in sorted(entries))
