"""Variants measured in turn, round by round: the order, medians and ranges, ratios within a round, names of figures.

Nothing here measures; it is given what was measured.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from loadtests.wrk import Load

ADAPTING, LEARNING, FROZEN, NOOP = "adapting", "learning", "frozen", "noop"  # the variants, after a prefix
LEARNERS = (ADAPTING, LEARNING)
PACE = 0.7  # of the frozen model's throughput at saturation …
REACHED = 0.95  # … and a variant that gives less than this share of it could not keep pace


class Interval(NamedTuple):
    """What one variant did in one round."""

    load: Load
    share_learned: float  # rows learned ÷ rows served; NaN where nothing learns or nothing was served


Round = dict[str, Interval]  # by variant
Rounds = dict[int, list[Round]]  # by connections
Measure = Callable[[str, int], Interval]  # variant, connections


class Paced(NamedTuple):
    """What the variants did at one rate."""

    rate: float  # requests/s that were to be sent
    rounds: list[Round]

    def reached(self, variant: str) -> bool:
        """Whether the variant answered as many as were to be sent, or nearly."""
        return statistics.median(each[variant].load.rps for each in self.rounds) >= REACHED * self.rate


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
    """Measure every variant in every round, at each number of connections."""
    return {count: alternate(variants, pairs, lambda name: measure(name, count)) for count in connections}  # noqa: B023


def alternate(variants: Sequence[str], pairs: int, measure: Callable[[str], Interval]) -> list[Round]:
    """Measure every variant in every round."""
    return [{name: measure(name) for name in order(variants, number)} for number in range(pairs)]


def saturation(rounds: Rounds, frozen: str) -> int:
    """The number of connections at which the frozen model answers most requests."""
    return max(rounds, key=lambda count: statistics.median(each[frozen].load.rps for each in rounds[count]))


def pace(rounds: Rounds, frozen: str) -> float:
    """70 % of the requests/s that the frozen model answers at saturation."""
    return PACE * statistics.median(each[frozen].load.rps for each in rounds[saturation(rounds, frozen)])


def ratio(rounds: Sequence[Round], adapting: str, frozen: str, of: Callable[[Load], float]) -> Spread:
    """Adapting ÷ frozen, formed within each round."""
    pairs = [(of(each[adapting].load), of(each[frozen].load)) for each in rounds]
    return Spread.of(a / f if f else math.nan for a, f in pairs)


def figures(rounds: Rounds, prefix: str = "") -> dict[str, float]:
    """All figures in the names of the JSON form.

    `ratio/adapting_over_frozen` and `share_learned/adapting` are those at saturation; with `/<connections>` behind it,
    those there.
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
        if not name.startswith("p99_"):  # a p99 at saturation is that of a queue; see `paced_figures`
            found |= _named(f"ratio/{name}", spread)
    for variant in learners(rounds[at], prefix):
        found |= _named(f"share_learned/{variant}", Spread.of(each[variant].share_learned for each in rounds[at]))
    return found


def paced_figures(paced: Paced, prefix: str = "") -> dict[str, float]:
    """What was measured at 70 % of the frozen model's saturation, in the names of the JSON form.

    `rps_at_70/frozen` is the rate that was reached, `rps_asked_at_70/frozen` the one that was to be.
    """
    found = {f"rps_asked_at_70/{prefix}{FROZEN}": paced.rate}
    for variant in paced.rounds[0]:
        loads = [each[variant].load for each in paced.rounds]
        for name, spread in (
            ("rps_at_70", Spread.of(load.rps for load in loads)),
            ("p50_ms_at_70", Spread.of(load.p50_ms for load in loads)),
            ("p99_ms_at_70", Spread.of(load.p99_ms for load in loads)),
            ("share_learned_at_70", Spread.of(each[variant].share_learned for each in paced.rounds)),
        ):
            found |= _named(f"{name}/{variant}", spread)
        found[f"failed_requests/{variant}/at_70"] = sum(load.failed for load in loads)
        found[f"refused_requests/{variant}/at_70"] = sum(load.refused for load in loads)
    for name, spread in ratios(paced.rounds, prefix).items():
        if name.startswith("p99_"):  # all variants get the same rate: requests/s say nothing
            found |= _named(f"ratio/{name}", spread)
    return found


def learners(rounds: Sequence[Round], prefix: str = "") -> list[str]:
    """The variants among those measured that may learn."""
    return [prefix + name for name in LEARNERS if prefix + name in rounds[0]]


def ratios(rounds: Sequence[Round], prefix: str = "") -> dict[str, Spread]:
    """Of requests/s and of p99, by name, for each variant that may learn."""
    frozen = prefix + FROZEN
    found: dict[str, Spread] = {}
    for variant in learners(rounds, prefix):
        found[f"{variant}_over_{frozen}"] = ratio(rounds, variant, frozen, lambda load: load.rps)
        found[f"p99_{variant}_over_{frozen}"] = ratio(rounds, variant, frozen, lambda load: load.p99_ms)
    return found


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
