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
    assert "ratio/p99_adapting_over_frozen" not in found  # that one is at 70 %
    assert found["share_learned/adapting"] == 0.25
    assert not any("learning_over" in name for name in found)  # was not measured
    assert rounds.totals(found) == {"failed_requests": 3, "refused_requests": 9}


def test_figures_of_both_that_learn():
    several = [
        {"adapting": interval(n, share=0.0), "learning": interval(n // 2, share=0.25), "frozen": interval(400)}
        for n in (400, 200, 300)
    ]
    found = rounds.figures({16: several})
    assert found["ratio/adapting_over_frozen"] == 0.75
    assert found["ratio/learning_over_frozen"] == 0.375
    assert (found["ratio_min/learning_over_frozen"], found["ratio_max/learning_over_frozen"]) == (0.25, 0.5)
    assert (found["share_learned/adapting"], found["share_learned/learning"]) == (0, 0.25)
    assert found["ratio/p99_learning_over_frozen/16"] == 1


def test_the_pace_is_of_the_frozen_model_at_saturation():
    assert rounds.pace(ROUNDS, "frozen") == pytest.approx(0.7 * 125)  # a median of 250 answers in 2 s


def paced():
    several = [
        {
            "adapting": interval(198, p99_ms=p99_ms, share=0.0),
            "learning": interval(180, p99_ms=3 * p99_ms, share=0.5, failed=1),
            "frozen": interval(200, p99_ms=4.0, refused=2),
        }
        for p99_ms in (4.0, 6.0, 5.0)
    ]
    return rounds.Paced(100.0, several)


def test_figures_at_one_rate():
    found = rounds.paced_figures(paced())
    assert found["rps_asked_at_70/frozen"] == 100
    assert (found["rps_at_70/frozen"], found["rps_at_70/adapting"], found["rps_at_70/learning"]) == (100, 99, 90)
    assert found["p99_ms_at_70/adapting"] == 5
    assert (found["p99_ms_at_70_min/adapting"], found["p99_ms_at_70_max/adapting"]) == (4, 6)
    assert found["ratio/p99_adapting_over_frozen"] == 1.25
    assert (found["ratio_min/p99_learning_over_frozen"], found["ratio_max/p99_learning_over_frozen"]) == (3, 4.5)
    assert found["share_learned_at_70/learning"] == 0.5
    assert "ratio/adapting_over_frozen" not in found  # that one is at saturation
    assert rounds.totals(found) == {"failed_requests": 3, "refused_requests": 6}


def test_who_kept_pace():
    assert paced().reached("adapting")
    assert not paced().reached("learning")  # 90 of 100


def test_nothing_answered_is_no_ratio():
    dead = {1: [{"adapting": interval(5), "frozen": interval(0, failed=9)} for _ in range(3)]}
    assert math.isnan(rounds.figures(dead)["ratio/adapting_over_frozen"])


def test_names_with_a_prefix():
    named = {1: [{f"resnet20_{name}": each for name, each in round_.items()} for round_ in ROUNDS[1]]}
    found = rounds.figures(named, "resnet20_")
    assert found["ratio/resnet20_adapting_over_resnet20_frozen"] == pytest.approx(0.55)
    found = rounds.paced_figures(rounds.Paced(50.0, named[1]), "resnet20_")
    assert found["ratio/p99_resnet20_adapting_over_resnet20_frozen"] == 1
    assert found["rps_asked_at_70/resnet20_frozen"] == 50
