"""Jobs that succeed, fail and die. Any process can import `operator.call`, and the job says what it calls."""

import math
import operator
import os
from functools import partial

import pytest

from loadtests.protocol_pool import run_jobs

RIGHT, WRONG = partial(math.sqrt, 4.0), partial(math.sqrt, -1.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_one_that_fails_takes_no_other_with_it(processes, capsys):
    told = []
    outcome = run_jobs([WRONG, RIGHT], operator.call, processes, lambda _job, result: told.append(result))
    assert outcome.results == {RIGHT: 2.0}
    assert list(outcome.failures) == [WRONG]
    assert outcome.failures[WRONG].startswith("ValueError: ")
    assert told == [2.0]
    assert "ValueError" in capsys.readouterr().err


def test_one_that_dies_takes_no_other_with_it():
    dies = partial(os._exit, 3)
    outcome = run_jobs([RIGHT, dies], operator.call, 1 + 1)
    assert outcome.failures == {dies: "its process died"}
    assert outcome.results == {RIGHT: 2.0}


def test_an_interrupt_is_no_failure():
    def interrupted(_job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(["a"], interrupted, 1)
