"""EATA against the clock, and how costs are taken, by hand."""

import numpy as np
import pytest

from loadtests import protocol_full_rate
from loadtests.protocol_full_rate import Costs, measure, play_eata
from loadtests.protocol_orders import Request

ROUNDS = [(Request("all", np.arange(first, first + 2)),) for first in range(0, 16, 2)]


class Counting:
    """Answers with the number of steps taken so far."""

    def __init__(self):
        self.learned = []

    def answer(self, requests):
        return [np.full(len(each.places), len(self.learned)) for each in requests]

    def learn(self, requests):
        self.learned.append(int(requests[0].places[0]) // 2)


@pytest.mark.parametrize("cost", [3.0, 2.2])
def test_of_three_batches_two_are_missed(cost):
    method = Counting()
    played = play_eata(method, ROUNDS, 16, cost)
    assert method.learned == [0, 3, 6]
    assert played.answers[::2].tolist() == [0, 1, 1, 1, 2, 2, 2, 3]  # the latest parameters answer
    assert played.share_learned == 3 / 8


def test_a_step_as_quick_as_a_forward_misses_nothing():
    assert play_eata(Counting(), ROUNDS, 16, 1.0).share_learned == 1.0


class Takes:
    """A method that moves the clock."""

    def __init__(self, clock, answer_s, learn_s):
        self.clock, self.answer_s, self.learn_s = clock, answer_s, iter(learn_s)

    def answer(self, _requests):
        self.clock[0] += self.answer_s

    def learn(self, _requests):
        self.clock[0] += next(self.learn_s)


def test_costs_are_medians_of_ratios_without_the_first(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(protocol_full_rate.time, "perf_counter", lambda: clock[0])
    frozen = Takes(clock, 0.5, [])
    eata = Takes(clock, 0.0, [9.0, 1.5, 1.0, 2.0])
    served = Takes(clock, 7.0, [9.0, 2.0, 2.5, 1.0])  # what its answer takes is no part of its step
    assert measure(frozen, eata, served, ROUNDS[:4]) == Costs(eata=3.0, default=4.0, forward_s=0.5)
