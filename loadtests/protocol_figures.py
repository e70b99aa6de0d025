"""From runs to figures: errors, paired differences with their standard errors, verdicts, names of the JSON form."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loadtests.protocol_jobs import Job, MethodName, Run, job_of, wrong_at
from loadtests.protocol_orders import Orders, Places, Protocol, places_asked, plan
from loadtests.protocol_probe import Probe

FORGETTING_MAX = 0.5  # points, beside one standard error
STANDARD_ERRORS = 2  # within these of the lowest, the default counts as lowest

Wrong = NDArray[np.bool_] | NDArray[np.float64]  # by answer: 1 where wrong


class Estimate(NamedTuple):
    """A mean of paired differences, in percentage points."""

    mean: float
    standard_error: float


class Cell(NamedTuple):
    """One method in one protocol."""

    error: float  # %
    parts: dict[str, float]  # of each corruption, and in `recurring` of each visit: `fog/2`; %
    over_default: Estimate | None  # its error minus the default's; None without a run of the default
    forgetting: Estimate | None  # None where nothing is learned
    source_mismatch: float | None  # %
    share_learned: float


class Row(NamedTuple):
    """One protocol."""

    protocol: Protocol
    cells: dict[MethodName, Cell]  # of the methods that have a result
    lowest: bool | None  # whether the default's error is lowest, or as good as; None where a result is missing
    remembers: bool | None  # whether the default forgets no more than it may; None without a run of it


def percent(wrong: Wrong) -> float:
    return 100 * float(wrong.sum()) / len(wrong)


def paired(wrong: Wrong, baseline: Wrong) -> Estimate:
    """Mean of `wrong − baseline`, answer by answer, and its standard error `s/√n`.

    >>> estimate = paired(np.array([1.0, 1, 0, 1]), np.array([0.0, 1, 0, 0]))
    >>> estimate.mean, round(estimate.standard_error, 2)  # of 1, 0, 0, 1: s² = 1/3
    (50.0, 28.87)
    """
    difference = wrong.astype(float) - baseline.astype(float)
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else math.nan
    return Estimate(100 * float(difference.mean()), 100 * spread / math.sqrt(len(difference)))


def forgetting(probe: Probe) -> Estimate:
    """What the learned parameters lost on the probe, image by image."""
    return paired(probe.learned, probe.source)


def row(protocol: Protocol, methods: Sequence[MethodName], runs: Mapping[Job, Run], orders: Orders) -> Row:
    """One protocol's figures, of the methods whose runs have succeeded."""
    asked = places_asked(plan(protocol, orders).rounds)
    found = {method: runs[job] for method in methods if (job := job_of(method, protocol)) in runs}
    wrong = {method: wrong_at(run, asked) for method, run in found.items()}
    cells = {
        method: Cell(
            error=percent(each),
            parts=_parts(each, asked, orders),
            over_default=paired(each, wrong["default"]) if "default" in wrong else None,
            forgetting=forgetting(probe) if (probe := found[method].probe) else None,
            source_mismatch=percent(probe.state) if probe else None,
            share_learned=found[method].share_learned,
        )
        for method, each in wrong.items()
    }
    complete = "default" in cells and len(cells) == len(methods)
    return Row(protocol, cells, lowest(cells) if complete else None, remembers(cells))


def lowest(cells: Mapping[MethodName, Cell]) -> bool:
    """Whether the default's error is the lowest, or within two paired standard errors of the lowest."""
    over = min(cells.values(), key=lambda cell: cell.error).over_default
    assert over is not None  # the default is among them
    return bool(-over.mean <= STANDARD_ERRORS * over.standard_error)


def remembers(cells: Mapping[MethodName, Cell]) -> bool | None:
    """Whether the default's forgetting is at most 0.5 points and one standard error."""
    found = cells["default"].forgetting if "default" in cells else None
    return None if found is None else bool(found.mean <= FORGETTING_MAX + found.standard_error)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """All figures in the names of the JSON form: `<what>/<protocol>/<method>`."""
    named: dict[str, float] = {}
    for each in rows:
        for method, cell in each.cells.items():
            which = f"{each.protocol}/{method}"
            named[f"error/{which}"] = cell.error
            named |= {f"error/{which}/{part}": error for part, error in cell.parts.items()}
            if cell.over_default and method != "default":
                named[f"difference/{which}"], named[f"standard_error/{which}"] = cell.over_default
            if cell.forgetting and cell.source_mismatch is not None:
                named[f"forgetting/{which}"], named[f"standard_error/forgetting/{which}"] = cell.forgetting
                named[f"source_mismatch/{which}"] = cell.source_mismatch
                named[f"share_learned/{which}"] = cell.share_learned
        for verdict in ("lowest", "remembers"):
            if (held := getattr(each, verdict)) is not None:
                named[f"{verdict}/{each.protocol}/default"] = float(held)
    return named


def _parts(wrong: Wrong, asked: Places, orders: Orders) -> dict[str, float]:
    """Errors of the corruptions; of their visits where there are several."""
    visit, image = np.divmod(asked, len(orders.corruptions) * orders.images)
    corruption = image // orders.images
    several = visit.max() > 0
    return {
        orders.corruptions[k] + (f"/{number + 1}" if several else ""): percent(wrong[these])
        for number in np.unique(visit)
        for k in np.unique(corruption)
        if (these := (visit == number) & (corruption == k)).any()
    }
