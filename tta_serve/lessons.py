"""What a stream is taught: rows that were answered, and the moments of those that get no step."""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Moments, tree


class Lesson(NamedTuple):
    """Rows of one stream to learn from."""

    x: Tensor  # as asked, so that uint8 takes a byte while it waits; [n, 3, H, W] on the device
    stream: str
    incarnation: int  # of the stream when it answered; rows of an earlier life teach nothing
    version: int
    moments: Moments | None = None  # of the request, [1, P], where the forward measured them
    logits: Tensor | None = None  # as answered, [n, C]

    @property
    def rows(self) -> int:
        return len(self.x)

    def only(self, rows: NDArray[np.bool_]) -> "Lesson":
        """Some of the rows; without the moments, which are of all."""
        chosen = torch.from_numpy(rows).to(self.x.device)
        logits = None if self.logits is None else self.logits[chosen]
        return self._replace(x=self.x[chosen], logits=logits, moments=None)

    @property
    def nbytes(self) -> int:
        """What it keeps in memory while it waits."""
        beside = 0 if self.logits is None else self.logits.nbytes
        return self.x.nbytes + beside + (tree.nbytes(self.moments) if self.moments is not None else 0)


class Observed(NamedTuple):
    """The moments that a request was answered with, without its rows."""

    stream: str
    incarnation: int
    rows: int
    moments: Moments  # [1, P]


L = TypeVar("L", Lesson, Observed)


def rows_of(lessons: Iterable[Lesson]) -> int:
    return sum(lesson.rows for lesson in lessons)


def observed(lessons: Iterable[Lesson]) -> list[Observed]:
    """What is left to learn from rows that get no step."""
    return [
        Observed(lesson.stream, lesson.incarnation, lesson.rows, lesson.moments)
        for lesson in lessons
        if lesson.moments is not None
    ]
