"""`full_rate`: methods on the virtual clock, and what a step costs on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from loadtests.protocol_clock import BudgetedLearner, adapts
from loadtests.protocol_methods import FaithfulEATA, Frozen, Labels, keep
from loadtests.protocol_orders import Round
from loadtests.protocol_served import Lessons, Served


class Costs(NamedTuple):
    """Of a step on one batch, in frozen forwards of it."""

    eata: float
    default: float
    forward_s: float  # of a frozen forward of one batch


class Played(NamedTuple):
    """A run against the clock."""

    answers: Labels
    share_learned: float  # rows learned from ÷ rows played


def measure(frozen: Frozen, eata: FaithfulEATA, served: Served, rounds: Sequence[Round]) -> Costs:
    """Alternating timings over some rounds, after one that warms up; medians of the ratios within a round.

    EATA's step holds the forward that answers; the default's begins after its answer is out.
    """
    timings = []
    for requests in rounds:
        served.answer(requests)
        forward_s = _seconds(lambda requests=requests: frozen.answer(requests))
        eata_s = _seconds(lambda requests=requests: eata.learn(requests))
        default_s = _seconds(lambda requests=requests: served.learn(requests))
        timings.append((forward_s, eata_s, default_s))
    warm = timings[1:]
    return Costs(
        eata=statistics.median(eata_s / forward_s for forward_s, eata_s, _ in warm),
        default=statistics.median(default_s / forward_s for forward_s, _, default_s in warm),
        forward_s=statistics.median(forward_s for forward_s, _, _ in warm),
    )


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def play_eata(method: FaithfulEATA, rounds: Sequence[Round], places: int, cost: float) -> Played:
    """EATA adapts to every ⌈cost⌉-th batch and answers all."""
    answers, learned_from = np.full(places, -1), []
    for number, requests in enumerate(rounds):
        keep(answers, requests, method.answer(requests))
        if adapts(number, math.ceil(cost)):
            method.learn(requests)
            learned_from.append(number)
    rows = [sum(len(request.places) for request in requests) for requests in rounds]
    return Played(answers, sum(rows[number] for number in learned_from) / sum(rows))


def play_served(served: Served, rounds: Sequence[Round], places: int, costs: Costs, batch: int) -> Played:
    """The default answers all at once and learns within its budget; its queue is bounded, and the oldest give way."""

    def cost(lessons: Lessons) -> float:
        return costs.default * sum(len(lesson.x) for lesson in lessons) / batch

    learner = BudgetedLearner(
        served.budget, take=lambda now: served.take(now * costs.forward_s), cost=cost, learn=served.learn_from
    )
    answers = np.full(places, -1)
    for number, requests in enumerate(rounds):
        learner.advance(number)
        keep(answers, requests, served.answer(requests, now_s=number * costs.forward_s))
        learner.start(number)
    played = sum(len(request.places) for requests in rounds for request in requests)
    return Played(answers, served.learned_rows / played)
