"""Checks made by hand: when the gate closes and opens, and what counts as a change."""

import math

import numpy as np
import pytest

from tta_serve.watch import CALM_CHECKS, CALM_FLIPS, CHECK_EVERY_LOTS, CHECK_EVERY_STEPS, Reading, Watch

CALM = Reading(drift=0.5, flip_rate=0.0, divergence=0.0, entropy=0.3)


def calmed(**options: bool) -> Watch:
    """After `CALM_CHECKS` calm checks."""
    watch = Watch(**options)
    for _ in range(CALM_CHECKS):
        assert watch.read(CALM) == ()
    return watch


def test_the_gate_closes_after_so_many_calm_checks() -> None:
    watch = Watch()
    gated = []
    for _ in range(CALM_CHECKS + 1):
        watch.read(CALM)
        gated.append(watch.gated)
    assert gated == [False] * (CALM_CHECKS - 1) + [True, True]


def test_where_there_is_no_gate_it_never_closes() -> None:
    assert not calmed(may_close=False).gated


@pytest.mark.parametrize(
    "other",
    [
        CALM._replace(drift=1.0),
        CALM._replace(drift=math.inf),
        CALM._replace(drift=math.nan),
        CALM._replace(flip_rate=0.3),  # a fifth of it is above 0.05
    ],
)
def test_one_check_that_is_not_calm_opens_it_and_the_count_begins_anew(other: Reading) -> None:
    watch = calmed()
    watch.read(other)
    assert not watch.gated
    while watch.last and watch.last.flip_rate > CALM_FLIPS:
        watch.read(CALM)
        assert not watch.gated
    closed_after = 0
    while not watch.gated:
        watch.read(CALM)
        closed_after += 1
    assert CALM_CHECKS - 1 <= closed_after <= CALM_CHECKS  # the check that ended the flips was calm itself


def test_a_few_flips_now_and_then_are_calm() -> None:
    watch = calmed()
    watch.read(CALM._replace(flip_rate=0.24))  # a fifth of it is below 0.05
    assert watch.gated


def test_unknown_drift_never_closes_the_gate() -> None:
    watch = Watch()
    for _ in range(10 * CALM_CHECKS):
        assert watch.read(CALM._replace(drift=math.nan)) == ()
    assert not watch.gated


def test_an_entropy_that_is_not_finite_is_shown_and_feeds_no_detector() -> None:
    watch = calmed()
    for entropy in (math.nan, math.inf):
        for _ in range(20):
            assert watch.read(CALM._replace(entropy=entropy)) == ()
    assert watch.last == CALM._replace(entropy=math.inf)


def test_flips_and_divergence_are_moving_means() -> None:
    watch = Watch()
    watch.read(Reading(0.5, 0.5, 1.0, 0.3))
    watch.read(Reading(0.7, 0.0, 0.5, 0.1))
    assert watch.last is not None
    assert watch.last == pytest.approx((0.7, 0.4, 0.9, 0.1))  # 0.5 − 0.5/5, 1 − 0.5/5


def noisy(seed: int, count: int, drift: float = 0.6, entropy: float = 0.4) -> list[Reading]:
    """Like a real stream's, where nothing happens: drift ±15 %, entropy ± 0.05 nats."""
    draws = np.random.default_rng(seed).normal(size=(count, 2))
    return [CALM._replace(drift=drift * math.exp(0.15 * a), entropy=max(0.0, entropy + 0.05 * b)) for a, b in draws]


@pytest.mark.parametrize(("what", "after", "within"), [("drift", {"drift": 4.0}, 20), ("entropy", {"entropy": 1.4}, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_a_sudden_change_is_seen(what: str, after: dict[str, float], within: int, seed: int) -> None:
    watch = Watch()
    for reading in noisy(seed, 100):
        watch.read(reading)
    seen = [what in watch.read(reading) for reading in noisy(seed + 100, within, **after)]
    assert any(seen)


@pytest.mark.parametrize("seed", range(4))
def test_a_drift_that_ends_is_seen_too(seed: int) -> None:
    watch = Watch()
    for reading in noisy(seed, 100, drift=4.0):
        watch.read(reading)
    assert any("drift" in watch.read(reading) for reading in noisy(seed + 100, 24))


def test_where_nothing_happens_there_is_hardly_an_alarm() -> None:
    alarms = 0
    for seed in range(4):
        watch = Watch()
        alarms += sum(bool(watch.read(reading)) for reading in noisy(seed, 500))
    assert alarms <= 4  # in 2,000 checks


def test_a_detected_change_opens_the_gate() -> None:
    """Both sides of the change are below the alarm line: only the detector sees it."""
    watch = Watch()
    for reading in noisy(0, 100, drift=0.2):
        watch.read(reading)
    assert watch.gated
    for reading in noisy(1, 40, drift=0.75):
        if "drift" in watch.read(reading):
            assert not watch.gated
            return
    pytest.fail("the change was not seen")


def test_the_first_lot_is_checked_and_then_some() -> None:
    watch = Watch()
    assert watch.due(0)
    assert watch.due(0)  # there was no check yet: nothing to go by
    watch.read(CALM)
    assert [watch.due(steps) for steps in range(1, 2 * CHECK_EVERY_STEPS)] == [
        steps >= CHECK_EVERY_STEPS for steps in range(1, 2 * CHECK_EVERY_STEPS)
    ]


def test_a_stream_that_takes_no_steps_is_checked_too() -> None:
    watch = Watch()
    watch.due(0)
    watch.read(CALM)
    due = [watch.due(0) for _ in range(3 * CHECK_EVERY_LOTS)]
    assert [number for number, each in enumerate(due, start=1) if each] == [
        CHECK_EVERY_LOTS,
        2 * CHECK_EVERY_LOTS,
        3 * CHECK_EVERY_LOTS,
    ]
