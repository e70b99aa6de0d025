"""What a run of faults came to: what was lost, how long it took, and the figures' names. Nothing here does I/O."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loadtests.chaos_plan import KINDS, LEARNING_ENDS, OUTAGES, Kind
from loadtests.chaos_traffic import Outcome

NOTHING = (0, 0)


class Loss(NamedTuple):
    """Learning that answers told of and the store does not have."""

    versions: int = 0  # older than allowed, of all streams
    versions_young: int = 0  # the others, which the last sync interval may cost
    learning_s: float = 0.0  # age of the oldest that is lost


class Passed(NamedTuple):
    """A fault, and what came of it."""

    kind: Kind
    began_s: float  # monotonic
    ended_s: float  # a kill: when it was killed; a fault of the store: when it was undone
    served_s: float | None  # since then all streams are answered, and the store can be written; None: not in time
    whole_s: float | None  # since then all replicas answer; None: not in time
    told: bool  # whether `ready` said that the store cannot be written
    loss: Loss

    @property
    def recovery_s(self) -> float:
        return math.nan if self.served_s is None else self.served_s - self.ended_s


class Counts(NamedTuple):
    """Requests of a run."""

    sent: int
    answered: int
    retried: int  # that needed more than one attempt, and were answered
    attempts: int
    failed: int
    outage: int  # without an answer while there was nobody to give one


def loss_of(
    outcomes: Iterable[Outcome], stored: Mapping[str, tuple[int, int]], at_s: float, allowed_s: float, since_s: float
) -> Loss:
    """What answers had told of before a moment, and the store does not have after it.

    Args:
        outcomes: all of the run.
        stored: incarnation and version of each stream.
        at_s: the moment, monotonic.
        allowed_s: how old what is lost may be.
        since_s: answers to earlier requests are not looked at: the loss before this one was counted then.
    """
    versions = {True: dict.fromkeys(stored, 0), False: dict.fromkeys(stored, 0)}  # by whether it is too old
    oldest_s = at_s
    for outcome in outcomes:
        told = outcome.told
        if told is None or not told.incarnation or not since_s <= outcome.began_s or outcome.ended_s > at_s:
            continue
        incarnation, version = stored.get(outcome.stream, NOTHING)
        if (told.incarnation, told.total) <= (incarnation, version):
            continue
        oldest_s = min(oldest_s, outcome.ended_s)
        lost = told.total - version if told.incarnation == incarnation else told.total
        found = versions[outcome.ended_s < at_s - allowed_s]
        found[outcome.stream] = max(found.get(outcome.stream, 0), lost)
    old = versions[True]
    young = {stream: lost - old.get(stream, 0) for stream, lost in versions[False].items()}
    return Loss(sum(old.values()), sum(max(0, lost) for lost in young.values()), at_s - oldest_s)


def failures(
    outcomes: Iterable[Outcome], outages: Sequence[tuple[float, float]]
) -> tuple[list[Outcome], list[Outcome]]:
    """The requests without an answer: those that should have had one, and the others.

    Args:
        outcomes: all of the run.
        outages: from when to when nobody could answer; a request that was under way within one belongs to it.
    """
    failed: list[Outcome] = []
    excused: list[Outcome] = []
    for each in outcomes:
        if not each.answered:
            down = any(each.began_s < end_s and each.ended_s > began_s for began_s, end_s in outages)
            (excused if down else failed).append(each)
    return failed, excused


def count(outcomes: Sequence[Outcome], failed: Sequence[Outcome], excused: Sequence[Outcome]) -> Counts:
    """Requests by what came of them; those that failed as `failures` tells them apart."""
    return Counts(
        sent=len(outcomes),
        answered=sum(outcome.answered for outcome in outcomes),
        retried=sum(outcome.answered and outcome.attempts > 1 for outcome in outcomes),
        attempts=sum(outcome.attempts for outcome in outcomes),
        failed=len(failed),
        outage=len(excused),
    )


def outages(passed: Sequence[Passed], end_s: float) -> list[tuple[float, float]]:
    """From when to when nobody could answer, kills of replicas apart."""
    return [(each.ended_s, each.served_s or end_s) for each in passed if each.kind in OUTAGES]


def percentile(values: Iterable[float], share: float) -> float:
    """By the nearest rank; NaN of nothing, and infinite where a fault did not recover.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 50)
    2.0
    """
    known = [math.inf if math.isnan(value) else value for value in values]
    return float(np.percentile(known, share, method="inverted_cdf")) if known else math.nan


def figures(passed: Sequence[Passed], counts: Counts, torn: int, back: int) -> dict[str, float]:
    """In the names of the JSON form: of all faults, and of each kind behind a slash."""
    found: dict[str, float] = {
        "faults": len(passed),
        "not_recovered": sum(each.whole_s is None for each in passed),
        "requests_sent": counts.sent,
        "requests_answered": counts.answered,
        "requests_retried": counts.retried,
        "retries": counts.attempts - counts.sent,
        "failed_requests": counts.failed,
        "outage_requests": counts.outage,
        "torn": torn,
        "versions_back": back,
        "versions_lost": sum(each.loss.versions for each in passed),
        "versions_lost_in_interval": sum(each.loss.versions_young for each in passed),
        "learning_lost_max_s": max((each.loss.learning_s for each in passed), default=0.0),
    }
    found |= {f"recovery_p{share}_s": percentile((each.recovery_s for each in passed), share) for share in (50, 99)}
    for kind in KINDS:
        if some := [each for each in passed if each.kind == kind]:
            found |= {f"{name}/{kind}": value for name, value in of_kind(kind, some).items()}
    return found


def of_kind(kind: Kind, some: Sequence[Passed]) -> dict[str, float]:
    """Figures of faults of one kind."""
    found: dict[str, float] = {
        "faults": len(some),
        "recovery_p50_s": percentile((each.recovery_s for each in some), 50),
        "recovery_p99_s": percentile((each.recovery_s for each in some), 99),
        "versions_lost": sum(each.loss.versions for each in some),
    }
    if kind in LEARNING_ENDS:
        found["whole_p50_s"] = percentile(
            (math.nan if each.whole_s is None else each.whole_s - each.ended_s for each in some), 50
        )
        found["learning_lost_max_s"] = max(each.loss.learning_s for each in some)
    elif kind not in OUTAGES:
        found["degraded_told"] = sum(each.told for each in some)
    if kind in OUTAGES:
        found["outage_max_s"] = percentile((each.recovery_s for each in some), 100)
    return found


def missed(found: Mapping[str, float], wanted: int) -> list[str]:
    """The targets that were missed, in words."""
    zero = ("torn", "versions_back", "versions_lost", "failed_requests", "not_recovered")
    said = [f"{name} {found[name]:.0f}, not 0" for name in zero if found[name]]
    if found["faults"] < wanted:
        said.append(f"{found['faults']:.0f} faults of {wanted}: the time was over")
    return said
