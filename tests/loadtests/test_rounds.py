import math

import pytest

from loadtests import rounds
from loadtests.rounds import Interval, Spread
from loadtests.wrk import Load


def interval(answered, p99_ms=2.0, refused=0, failed=0, share=math.nan):
    return Interval(Load(answered, refused, failed, duration_s=2.0, p50_ms=1.0, p99_ms=p99_ms), share)


ROUNDS = {
    1: [{"adapting": interval(n, share=0.5), "frozen": interval(200), "noop": interval(800)} for n in (100, 120, 110)],
    16: [
        {
            "adapting": interval(200, p99_ms=6.0, refused=3, share=0.25),
            "frozen": interval(frozen, failed=1),
            "noop": interval(4000),
        }
        for frozen in (400, 200, 250)
    ],
}


def test_every_pair_meets_in_both_orders():
    orders = [rounds.order(("adapting", "frozen", "noop"), number) for number in range(6)]
    first = [order.index("adapting") < order.index("frozen") for order in orders]
    assert first.count(True) == first.count(False) == 3
    assert all(set(order) == {"adapting", "frozen", "noop"} for order in orders)


def test_play_measures_every_variant_in_every_round():
    calls = []

    def measure(variant, connections):
        calls.append((connections, variant))
        return interval(1)

    found = rounds.play(("a", "b"), (1, 16), 3, measure)
    assert calls[:4] == [(1, "a"), (1, "b"), (1, "b"), (1, "a")]
    assert len(calls) == 12
    assert [len(each) for each in found.values()] == [3, 3]


def test_spread_is_median_and_range_of_what_is_known():
    assert Spread.of([3.0, math.nan, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert str(Spread.of([100.0, 99.0, 120.0])) == "100 (99–120)"
    assert str(Spread.of([1.5, 2.0, 1.0])) == "1.50 (1.00–2.00)"
    assert Spread.of([1.5]).middle == "1.50"
    assert str(Spread.of([math.nan])) == Spread.of([]).middle == "–"


def test_figures():
    found = rounds.figures(ROUNDS)
    assert found["rps/adapting/1"] == 55.0
    assert (found["rps_min/adapting/1"], found["rps_max/adapting/1"]) == (50.0, 60.0)
    assert found["p99_ms/frozen/16"] == 2.0
    assert found["share_learned/adapting/16"] == 0.25
    assert math.isnan(found["share_learned/frozen/16"])
    assert found["ratio/adapting_over_frozen/1"] == pytest.approx(0.55)
    assert found["saturation_connections/frozen"] == 16
    assert found["ratio/adapting_over_frozen"] == pytest.approx(0.8)  # of 0.5, 1.0 and 0.8, each within its round
    assert (found["ratio_min/adapting_over_frozen"], found["ratio_max/adapting_over_frozen"]) == (0.5, 1.0)
    assert found["ratio/p99_adapting_over_frozen/16"] == pytest.approx(3.0)
    assert "ratio/p99_adapting_over_frozen" not in found
    assert rounds.totals(found) == {"failed_requests": 3, "refused_requests": 9}


def test_nothing_answered_is_no_ratio():
    dead = {1: [{"adapting": interval(5), "frozen": interval(0, failed=9)} for _ in range(3)]}
    assert math.isnan(rounds.figures(dead)["ratio/adapting_over_frozen"])


def test_names_with_a_prefix():
    named = {1: [{f"resnet20_{name}": each for name, each in round_.items()} for round_ in ROUNDS[1]]}
    found = rounds.figures(named, "resnet20_")
    assert found["ratio/resnet20_adapting_over_resnet20_frozen"] == pytest.approx(0.55)
