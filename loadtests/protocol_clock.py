"""Who misses what when inputs do not wait: the virtual clock of `full_rate`.

Alfarra et al., "Evaluation of Test-Time Adaptation Under Computational Time Constraints", ICML 2024, arXiv 2304.04795:
batches arrive as fast as the frozen model answers, so one unit of time is one frozen forward of a batch, and batch k
arrives at time k. A method whose adaptation takes C units adapts to a batch, misses the C − 1 that arrive meanwhile,
answers those with the parameters that it just learned, and adapts to the next.

A server that answers first and learns beside it is bound otherwise: its answers are never late, and its learner may use
a share of the device's time, the budget.
"""

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def adapts(batch: int, cost: int) -> bool:
    """Whether a method whose adaptation takes `cost` units is free to adapt when batch 0, 1, 2 … arrives.

    >>> [batch for batch in range(8) if adapts(batch, cost=3)]
    [0, 3, 6]
    """
    return batch % cost == 0


class BudgetedLearner(Generic[T]):
    """When a learner that may use `budget` of the device's time takes its steps, and which lessons it gets for them.

    A step that costs c is followed by a rest of `c·(1/budget − 1)`. It takes the lessons that wait when it starts, and
    what it learned counts from its end on.

    Args:
        budget: share of time, above 0 and at most 1.
        take: the lessons for a step that starts at this time; empty where there are none.
        cost: of a step on these lessons, in units.
        learn: does the step.
    """

    def __init__(
        self,
        budget: float,
        take: Callable[[float], Sequence[T]],
        cost: Callable[[Sequence[T]], float],
        learn: Callable[[Sequence[T]], None],
    ) -> None:
        self._rest = 1 / budget - 1
        self._take, self._cost, self._learn = take, cost, learn
        self._lessons: Sequence[T] = ()
        self._ends = math.inf  # of the step that runs
        self._free = 0.0  # when the last rest is over

    def advance(self, now: float) -> None:
        """Everything that happens until `now`: steps that end, and steps that start when a rest is over."""
        while True:
            if self._lessons:
                if self._ends > now:
                    return
                self._learn(self._lessons)
                self._lessons = ()
            if self._free > now or not self.start(self._free):
                return

    def start(self, now: float) -> bool:
        """Begin a step if none runs, the rest is over and there are lessons."""
        if self._lessons or self._free > now:
            return False
        self._lessons = self._take(now)
        if not self._lessons:
            return False
        cost = self._cost(self._lessons)
        self._ends = now + cost
        self._free = self._ends + cost * self._rest
        return True
