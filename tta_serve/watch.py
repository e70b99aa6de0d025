"""What is known of a stream beside its state: how far it has drifted, whether that changed, whether to go on paying.

A `Watch` is fed by *checks*: now and then, some of a stream's rows are answered by the frozen network too. No tensors.

References:
    ADWIN: Bifet & Gavaldà, SDM 2007. Page-Hinkley: Page, Biometrika 1954. Both from river.
"""

import math
from typing import NamedTuple

from river import drift

CHECK_EVERY_STEPS = 4  # of a stream that learns
CHECK_EVERY_LOTS = 8  # of one that does not: a lot is what would have been a step
CHECK_ROWS = 256  # rows of one check: a whole lot, so that guards compare answers to the same rows
CALM_CHECKS = 5  # in a row, before the gate closes
CALM_FLIPS = 0.05  # share of answers that differ from the frozen ones; below it, learning is not missed
MEMORY = 0.2  # weight of the newest check in the moving means


class Reading(NamedTuple):
    """One check of one stream."""

    drift: float  # 1.0 is the alarm line; NaN where the model has no figure
    flip_rate: float  # share of rows that adapted and frozen answers label differently
    divergence: float  # between the mean adapted and the mean frozen answer
    entropy: float  # mean of the adapted answers, nats


class Watch:
    """The checks of one stream, in order.

    The gate closes when `CALM_CHECKS` checks in a row show no drift and hardly any answer that differs from the frozen
    one: a stream like the source does not need what it would learn. A check that shows otherwise, or a detector that
    sees a change, opens it.

    Args:
        may_close: whether there is a gate at all.

    >>> watch = Watch()
    >>> for _ in range(CALM_CHECKS): changes = watch.read(Reading(0.5, 0.0, 0.0, 0.1))
    >>> watch.gated, watch.read(Reading(1.5, 0.0, 0.0, 0.1)), watch.gated
    (True, (), False)
    """

    def __init__(self, *, may_close: bool = True) -> None:
        self.may_close = may_close
        self.last: Reading | None = None  # drift and entropy of the last check, moving means of the others
        self.gated = False
        self._calm = 0
        self._lots = 0  # since the last check
        # a stream is checked every few seconds: windows of 32 values, river's default, would see a change minutes late
        # and its confidence of 0.002, too; at 0.1, a rise from 0.6 to 4 after 100 checks is seen after 15 and not 31
        self._drift = drift.ADWIN(delta=0.1, clock=1, grace_period=8, min_window_length=4)  # type: ignore[no-untyped-call]
        # a lasting rise of the entropy by 0.1 nats is seen after about 20 checks, one by 1 nat after two
        self._entropy = drift.PageHinkley(min_instances=8, delta=0.02, threshold=1.6)

    def due(self, steps_since: int) -> bool:
        """Whether the lot that comes now is to be checked; ask once for each lot.

        Args:
            steps_since: steps that the stream took since its last check.
        """
        self._lots += 1
        due = self.last is None or steps_since >= CHECK_EVERY_STEPS or self._lots >= CHECK_EVERY_LOTS
        if due:
            self._lots = 0
        return due

    def read(self, reading: Reading) -> tuple[str, ...]:
        """Take a check; returns what has changed: "drift", "entropy"."""
        before = self.last or reading
        self.last = reading._replace(
            flip_rate=_moved(before.flip_rate, reading.flip_rate),
            divergence=_moved(before.divergence, reading.divergence),
        )
        changes = []
        if math.isfinite(reading.drift):
            # ADWIN's bounds are for values in 0 … 1
            self._drift.update(reading.drift / (1 + reading.drift))  # type: ignore[no-untyped-call]
            if self._drift.drift_detected:
                changes.append("drift")
        if math.isfinite(reading.entropy):
            self._entropy.update(reading.entropy)  # type: ignore[no-untyped-call]
            if self._entropy.drift_detected:
                changes.append("entropy")
        calm = reading.drift < 1 and self.last.flip_rate <= CALM_FLIPS and not changes  # NaN is never below 1
        self._calm = self._calm + 1 if calm else 0
        self.gated = self.may_close and self._calm >= CALM_CHECKS
        return tuple(changes)


def _moved(mean: float, new: float) -> float:
    return mean + MEMORY * (new - mean)
