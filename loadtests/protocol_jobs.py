"""The runs behind the table: which cells share one, and how one is done."""

import math
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import Pipeline
from loadtests import protocol_full_rate, protocol_images, protocol_probe, protocol_served
from loadtests.protocol_full_rate import Costs, Played
from loadtests.protocol_images import Images
from loadtests.protocol_methods import BatchStatistics, FaithfulEATA, Frozen, faithful_pipeline, play
from loadtests.protocol_orders import Protocol, Round, by_stream, places_asked, plan
from loadtests.protocol_probe import Probe
from loadtests.protocol_served import Served

MethodName = Literal["frozen", "batch_statistics", "eata", "eata_per_stream", "default"]
METHODS: tuple[MethodName, ...] = ("frozen", "batch_statistics", "eata", "eata_per_stream", "default")
COST_ROUNDS = 8  # of timings; the first warms up

# the most expensive first, so that no process is left alone with one at the end
_BY_COST: tuple[MethodName, ...] = ("default", "eata", "eata_per_stream", "batch_statistics", "frozen")


class Settings(NamedTuple):
    """What all runs of one table have in common."""

    data: Path
    corruptions: tuple[str, ...]  # empty: all
    batch: int


class Job(NamedTuple):
    """One run."""

    method: MethodName
    protocol: Protocol


class Run(NamedTuple):
    """What came of a run."""

    wrong: NDArray[np.bool_]  # by place; meaningless where none was asked for
    asked: NDArray[np.int64]  # places, ascending
    probe: Probe | None  # of methods that learn
    share_learned: float  # rows learned from ÷ rows played


def job_of(method: MethodName, protocol: Protocol) -> Job:
    """The run that answers for a cell of the table: cells that ask the same of the same share one.

    >>> job_of("eata_per_stream", "interleaved")
    Job(method='eata', protocol='per_shift')
    """
    if method == "frozen":
        return Job(method, "per_shift")
    if method == "batch_statistics" and protocol in ("continual", "interleaved", "recurring", "full_rate"):
        return Job(method, "per_shift")  # it has no past, and the requests are these
    if method == "eata_per_stream" and protocol == "interleaved":
        return Job("eata", "per_shift")  # streams never meet
    if method == "eata_per_stream" and protocol != "mixed":
        return Job("eata", protocol)  # the ids tell nothing new
    return Job(method, protocol)


def jobs_of(methods: Iterable[MethodName], protocols: Iterable[Protocol]) -> list[Job]:
    """All runs that a table needs, each once."""
    protocols = list(protocols)
    jobs = {job_of(method, protocol) for method in methods for protocol in protocols}
    # one image a request costs most
    return sorted(jobs, key=lambda job: (job.protocol != "batch_of_one", _BY_COST.index(job.method), job.protocol))


def wrong_at(run: Run, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these places a run got wrong; one that has played every image once answers for later visits too."""
    wrong: NDArray[np.bool_] = run.wrong[places % len(run.wrong)]
    return wrong


class Bench:
    """What the runs of one process share: read and built when first needed, never changed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.orders = protocol_images.load_orders(settings.data, settings.corruptions, settings.batch)

    @cached_property
    def images(self) -> Images:
        return protocol_images.load(self.settings.data, self.orders.corruptions)

    @cached_property
    def faithful(self) -> Pipeline:
        return faithful_pipeline(self.settings.data)

    @cached_property
    def built(self) -> protocol_served.Default:
        return protocol_served.default(self.settings.data)

    def costs(self) -> Costs:
        """What steps cost, timed on the first requests of `continual`."""
        rounds = plan("continual", self.orders).rounds[:COST_ROUNDS]
        frozen, eata = Frozen(self.faithful.network, self.images), FaithfulEATA(self.faithful, self.images)
        return protocol_full_rate.measure(frozen, eata, Served(self.built, self.images), rounds)

    def run(self, job: Job, costs: Costs | None) -> Run:
        playing = plan(job.protocol, self.orders)
        asked = places_asked(playing.rounds)
        visit = len(self.images.pixels)
        places = math.ceil((asked[-1] + 1) / visit) * visit
        if job.method == "default":
            played, probe = self._play_default(job.protocol, playing.rounds_with_ids, places, costs)
        elif job.method in ("eata", "eata_per_stream"):
            rounds = playing.rounds if job.method == "eata" else playing.rounds_with_ids
            played, probe = self._play_eata(job.protocol, rounds, places, costs)
        else:
            method = (Frozen if job.method == "frozen" else BatchStatistics)(self.faithful.network, self.images)
            played, probe = Played(play(method, playing.rounds, places), share_learned=0.0), None
        wrong = played.answers != self.images.labels_at(np.arange(places))
        return Run(wrong, asked, probe, played.share_learned)

    def _play_eata(
        self, protocol: Protocol, rounds: list[Round], places: int, costs: Costs | None
    ) -> tuple[Played, Probe]:
        method = FaithfulEATA(self.faithful, self.images)
        if protocol == "full_rate":
            assert costs is not None  # measured where this protocol is played
            played = protocol_full_rate.play_eata(method, rounds, places, costs.eata)
        else:
            played = Played(play(method, rounds, places), share_learned=1.0)
        return played, protocol_probe.of_eata(method, self.images.labels)

    def _play_default(
        self, protocol: Protocol, rounds: list[Round], places: int, costs: Costs | None
    ) -> tuple[Played, Probe]:
        served = Served(self.built, self.images, drained=protocol != "batch_of_one")
        if protocol == "full_rate":
            assert costs is not None
            played = protocol_full_rate.play_served(served, rounds, places, costs, self.settings.batch)
        else:
            answers = play(served, rounds, places)
            played = Played(answers, served.learned_rows / len(places_asked(rounds)))
        streams = list(by_stream(rounds))
        return played, protocol_probe.of_served(served, streams, self.images.labels)


@cache
def bench(settings: Settings) -> Bench:
    """The bench of this process, on one thread."""
    torch.set_num_threads(1)
    return Bench(settings)


def measure_costs(settings: Settings) -> Costs:
    return bench(settings).costs()


def work(settings: Settings, costs: Costs | None, job: Job) -> Run:
    return bench(settings).run(job, costs)
