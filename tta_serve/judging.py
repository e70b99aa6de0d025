"""What a step made of each stream's record, and what its guards want done."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from adapters import Report
from adapters.guards import Trip, trip_names
from tta_serve.monitor import Forgotten
from tta_serve.streams import Action, StreamRecord

log = logging.getLogger(__name__)

Result = Literal["applied", "filtered", "refused", "stale", "frozen", "gated"]


class Learned(NamedTuple):
    """What one call of `learn` did for one stream."""

    stream: str
    seen: int
    selected: int
    entropy: float
    result: Result
    trips: tuple[str, ...] = ()  # guards


class Counts(NamedTuple):
    """A report's fields of one stream, on the host."""

    seen: int
    reliable: int
    selected: int
    applied: int
    refused: int
    trips: int


def counts_of(report: Report) -> list[Counts]:
    """A report's counts, stream by stream."""
    fields = (report.seen, report.reliable, report.selected, report.applied, report.refused, report.trips)
    return [Counts(*map(int, each)) for each in torch.stack(fields).T.tolist()]


def judge(
    streams: Sequence[str],
    olds: Sequence[StreamRecord],
    counts: Sequence[Counts],
    entropies: Sequence[float],
    forgotten: Mapping[int, Forgotten],
) -> tuple[list[StreamRecord], list[Learned], list[Action | None]]:
    """What a step made of each stream; and what the guards want done.

    Args:
        streams: their names.
        olds: their records before the step.
        counts: of the step.
        entropies: mean entropy of the rows seen, nats; NaN where there is none.
        forgotten: what those streams forgot that were probed, by their place.
    """
    records: list[StreamRecord] = []
    done: list[Learned] = []
    actions: list[Action | None] = []
    for i, (stream, old, count) in enumerate(zip(streams, olds, counts, strict=True)):
        entropy, lost, bits, action = entropies[i], forgotten.get(i), count.trips, None
        record = old._replace(
            version=old.version + (not count.refused),
            steps=old.steps + count.applied,
            seen=old.seen + count.seen,
            reliable=old.reliable + count.reliable,
            selected=old.selected + count.selected,
            refused=old.refused + count.refused,
            entropy=entropy if math.isfinite(entropy) and not count.refused else None,
            ladder=old.ladder.step() if count.applied else old.ladder,
            forgetting=(lost.points, lost.standard_error) if lost else old.forgetting,
        )
        if lost and lost.too_much:
            bits |= Trip.FORGETTING
        if trips := trip_names(bits):
            ladder, action = old.ladder.trip()
            version = record.version + (bool(count.refused) and action == "pull")  # pulling changes the state
            record = record._replace(version=version, trips=old.trips + 1, ladder=ladder)
            record = record.noted(f"{' and '.join(trips)}: {action}")
            log.warning("stream %r: the guards %s tripped: %s", stream, ", ".join(trips), action)
        records.append(record)
        actions.append(action)
        result: Result = "refused" if count.refused else "applied" if count.applied else "filtered"
        done.append(Learned(stream, count.seen, count.selected, entropy, result, trips))
    return records, done, actions
