"""Cells of the table that share a run ask the same of the same: proven by the requests themselves."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from loadtests.protocol_full_rate import Costs
from loadtests.protocol_jobs import METHODS, Job, Run, Settings, job_of, jobs_of, work, wrong_at
from loadtests.protocol_orders import PROTOCOLS, Orders, by_stream, plan

ORDERS = Orders(("fog", "snow", "frost"), 4, 2, np.random.default_rng(0).permutation(12), np.array([2, 0, 3, 1]))
IMAGES = 12


def requests(rounds):
    """Which images are sent together, whatever the stream and the visit."""
    return {tuple(np.array(places) % IMAGES) for several in by_stream(rounds).values() for places in several}


def histories(rounds):
    """What each stream is sent, whatever its name."""
    return sorted(by_stream(rounds).values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batch_statistics_share_a_run_where_the_requests_are_the_same(protocol):
    shared = job_of("batch_statistics", protocol).protocol
    assert requests(plan(protocol, ORDERS).rounds) <= requests(plan(shared, ORDERS).rounds)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_eata_per_stream_shares_a_run_where_the_streams_are_the_same(protocol):
    shared = job_of("eata_per_stream", protocol)
    playing = plan(shared.protocol, ORDERS)
    played = playing.rounds if shared.method == "eata" else playing.rounds_with_ids
    assert histories(plan(protocol, ORDERS).rounds_with_ids) == histories(played)
    assert (protocol == "full_rate") == (shared.protocol == "full_rate")  # the clock is another matter


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_eata_and_the_default_are_played_in_every_protocol(protocol):
    for method in ("eata", "default"):
        assert job_of(method, protocol) == Job(method, protocol)


def test_every_run_once():
    jobs = jobs_of(METHODS, PROTOCOLS)
    assert len(jobs) == len(set(jobs)) == 8 + 8 + 1 + 4 + 1
    assert jobs[0] == Job("default", "batch_of_one")
    assert jobs_of(["frozen"], ["continual", "mixed"]) == [Job("frozen", "per_shift")]


def test_one_visit_answers_for_later_ones():
    run = Run(np.array([True, False, False]), np.arange(3), probe=None, share_learned=0.0)
    assert wrong_at(run, np.array([0, 1, 3, 4])).tolist() == [True, False, True, False]


def test_work_can_be_sent_to_another_process():
    call = partial(work, Settings(Path("cifar"), (), 200), Costs(3.0, 4.0, 0.3))
    sent = pickle.loads(pickle.dumps(call))
    assert (sent.func, sent.args) == (work, call.args)
