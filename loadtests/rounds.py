"""Variants measured in turn, round by round: the order, medians and ranges, ratios within a round, names of figures.

Nothing here measures; it is given what was measured.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from loadtests.wrk import Load

ADAPTING, FROZEN, NOOP = "adapting", "frozen", "noop"  # the variants; a prefix may stand before them


class Interval(NamedTuple):
    """What one variant did in one round."""

    load: Load
    share_learned: float  # rows learned ÷ rows served; NaN where nothing learns or nothing was served


Round = dict[str, Interval]  # by variant
Rounds = dict[int, list[Round]]  # by connections
Measure = Callable[[str, int], Interval]  # variant, connections


class Spread(NamedTuple):
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of the values that could be measured; all NaN where none could."""
        known = [value for value in values if math.isfinite(value)]
        return cls(statistics.median(known), min(known), max(known)) if known else cls(math.nan, math.nan, math.nan)

    @property
    def middle(self) -> str:
        """The median for people: three digits or so."""
        return "–" if math.isnan(self.median) else f"{self.median:.{self._decimals}f}"

    def __str__(self) -> str:
        if math.isnan(self.median):
            return self.middle
        return f"{self.middle} ({self.low:.{self._decimals}f}–{self.high:.{self._decimals}f})"

    @property
    def _decimals(self) -> int:
        return 0 if self.median >= 100 else 1 if self.median >= 10 else 2


def order(variants: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: every second one runs backwards, and every pair of rounds begins with the next.

    >>> [order("abc", number) for number in range(4)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['b', 'c', 'a'], ['a', 'c', 'b']]
    """
    turn = number // 2 % len(variants)
    turned = [*variants[turn:], *variants[:turn]]
    return turned[::-1] if number % 2 else turned


def play(variants: Sequence[str], connections: Sequence[int], pairs: int, measure: Measure) -> Rounds:
    """Measure every variant in every round."""
    return {
        count: [{name: measure(name, count) for name in order(variants, number)} for number in range(pairs)]
        for count in connections
    }


def saturation(rounds: Rounds, frozen: str) -> int:
    """The number of connections at which the frozen model answers most requests."""
    return max(rounds, key=lambda count: statistics.median(each[frozen].load.rps for each in rounds[count]))


def ratio(rounds: Sequence[Round], adapting: str, frozen: str, of: Callable[[Load], float]) -> Spread:
    """Adapting ÷ frozen, formed within each round."""
    pairs = [(of(each[adapting].load), of(each[frozen].load)) for each in rounds]
    return Spread.of(a / f if f else math.nan for a, f in pairs)


def figures(rounds: Rounds, prefix: str = "") -> dict[str, float]:
    """All figures in the names of the JSON form.

    `ratio/adapting_over_frozen` is the one at saturation; with `/<connections>` behind it, the one there.
    """
    found: dict[str, float] = {}
    for count, several in rounds.items():
        for variant in several[0]:
            loads = [each[variant].load for each in several]
            where = f"{variant}/{count}"
            for name, spread in (
                ("rps", Spread.of(load.rps for load in loads)),
                ("p50_ms", Spread.of(load.p50_ms for load in loads)),
                ("p99_ms", Spread.of(load.p99_ms for load in loads)),
                ("share_learned", Spread.of(each[variant].share_learned for each in several)),
            ):
                found |= _named(f"{name}/{where}", spread)
            found[f"failed_requests/{where}"] = sum(load.failed for load in loads)
            found[f"refused_requests/{where}"] = sum(load.refused for load in loads)
        for name, spread in ratios(several, prefix).items():
            found |= _named(f"ratio/{name}/{count}", spread)
    at = saturation(rounds, prefix + FROZEN)
    found[f"saturation_connections/{prefix}{FROZEN}"] = at
    for name, spread in ratios(rounds[at], prefix).items():
        if not name.startswith("p99_"):  # a p99 at saturation is that of a queue
            found |= _named(f"ratio/{name}", spread)
    return found


def ratios(rounds: Sequence[Round], prefix: str = "") -> dict[str, Spread]:
    """Of requests/s and of p99, by name."""
    adapting, frozen = prefix + ADAPTING, prefix + FROZEN
    return {
        f"{adapting}_over_{frozen}": ratio(rounds, adapting, frozen, lambda load: load.rps),
        f"p99_{adapting}_over_{frozen}": ratio(rounds, adapting, frozen, lambda load: load.p99_ms),
    }


def totals(found: Mapping[str, float]) -> dict[str, float]:
    """Failed and refused requests of the whole run."""
    return {
        kind: sum(value for name, value in found.items() if name.startswith(f"{kind}/"))
        for kind in ("failed_requests", "refused_requests")
    }


def _named(name: str, spread: Spread) -> dict[str, float]:
    """`rps/adapting/16`, and its range as `rps_min/adapting/16` and `rps_max/adapting/16`."""
    what, _, which = name.partition("/")
    return {name: spread.median, f"{what}_min/{which}": spread.low, f"{what}_max/{which}": spread.high}
