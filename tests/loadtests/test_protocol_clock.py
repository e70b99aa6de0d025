"""The virtual clock by hand: which batches are learned from, and when what was learned counts."""

from collections import deque

from loadtests.protocol_clock import BudgetedLearner, adapts


def test_a_method_that_takes_three_units_adapts_to_every_third():
    assert [batch for batch in range(10) if adapts(batch, cost=3)] == [0, 3, 6, 9]
    assert all(adapts(batch, cost=1) for batch in range(5))


def played(batches, budget, cost, waiting):
    """Batch k arrives at time k; at most `waiting` wait, the oldest give way.

    Returns:
        What was learned, and how much of it was when each batch was answered.
    """
    queue, learned, at_answer = deque(maxlen=waiting), [], []
    learner = BudgetedLearner(
        budget,
        take=lambda _now: [queue.popleft()] if queue else [],
        cost=lambda lessons: cost * len(lessons),
        learn=learned.extend,
    )
    for batch in range(batches):
        learner.advance(batch)
        at_answer.append(len(learned))
        queue.append(batch)
        learner.start(batch)
    return learned, at_answer


def test_budget_of_three_tenths():
    # a step of 2.9 and its rest make 2.9 / 0.3 = 9.67 units: they start at 0, 9.67, 19.33, 29 and end 2.9 later.
    # Five wait: at 9.67 the oldest of 5 … 9, at 19.33 of 15 … 19, at 29 (before batch 29 is there) of 24 … 28
    learned, at_answer = played(33, budget=0.3, cost=2.9, waiting=5)
    assert learned == [0, 5, 15, 24]
    assert [at_answer.index(count) for count in range(1, 5)] == [3, 13, 23, 32]


def test_the_whole_device_learns_without_rest():
    learned, at_answer = played(7, budget=1.0, cost=2, waiting=9)
    assert learned == [0, 1, 2]
    assert at_answer == [0, 0, 1, 1, 2, 2, 3]


def test_a_quick_step_learns_from_all():
    learned, at_answer = played(5, budget=0.5, cost=0.25, waiting=9)
    assert learned == [0, 1, 2, 3]
    assert at_answer == [0, 1, 2, 3, 4]


def test_an_idle_learner_starts_when_something_arrives():
    queue, learned = [], []

    def take(_now):
        taken = list(queue)
        queue.clear()
        return taken

    learner = BudgetedLearner(1.0, take, cost=len, learn=learned.extend)
    learner.advance(5)
    assert not learner.start(5)
    queue.append("a")
    assert learner.start(6)
    queue.append("b")
    assert not learner.start(6.5)  # a step runs
    learner.advance(6.9)
    assert learned == []
    learner.advance(7)
    assert learned == ["a"]
    learner.advance(8)
    assert learned == ["a", "b"]
