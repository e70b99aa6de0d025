"""A hostile stream beside two honest ones: a recorded schedule, played with the hostile requests and without them."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adapters import EATA, EATAConfig, Guarded, Network, Pipeline, tree
from adapters.drift import Drift, drift_prior
from adapters.forgetting import Forgetting, Probe
from tta_serve.engine import Engine, Query
from tta_serve.monitor import Monitor

LOT = 64  # single-image requests of the hostile stream in one micro-batch, and in one step
KINDS = ("constant", "noise", "adversarial", "extremes", "nan")
Rows = Callable[..., Tensor]
Schedule = list[list[Query]]


def draw(count: int, seed: int) -> Tensor:
    """[count, 3, 4, 4] in [0, 1], every number by itself."""
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def engine(tiny: Callable[..., nn.Module]) -> Callable[[], Engine]:
    """`engine()`: the small network with the server's own settings, drift, gate, probe and all guards."""

    def make() -> Engine:
        module, source = tiny(), draw(400, seed=3)
        with torch.no_grad():
            seen = module[0](source)
            module[1].running_mean.copy_(seen.mean((0, 2, 3)))
            module[1].running_var.copy_(seen.var((0, 2, 3)))
        network = Network(module)
        config = EATAConfig(
            anchor="l2",
            learning_rate=4e-3,
            source_pull=0.02,
            full_step_rows=64,
            statistics="evidence",
            entropy_margin=1.0,  # of ln 3 = 1.1: this network is unsure of most things
        )
        pipeline = Pipeline(network, norm=Guarded(EATA(network, 3, config=config)))
        with torch.no_grad():
            probe = Probe(source[:200], network(source[:200]).logits.argmax(1))
        monitor = Monitor(pipeline, Drift(network, drift_prior(network, [source[:100]])), Forgetting(network, probe))
        return Engine(pipeline, torch.device("cpu"), 10, monitor=monitor, batch_streams_max=LOT + 2)

    return make


def adversarial(network: nn.Module, count: int) -> Tensor:
    """Images that the frozen network is made to take for class 0, by gradient."""
    x = draw(count, seed=1)
    for _ in range(20):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).log_softmax(1)[:, 0].sum(), x)
        x = (x.detach() + 0.05 * gradient.sign()).clamp(0, 1)
    return x


def hostile_images(kind: str, network: nn.Module) -> Iterator[Tensor]:
    """Single images [1, 3, 4, 4] without end."""
    if kind == "noise":
        return (draw(1, seed=10_000 + number) for number in itertools.count())
    if kind == "constant":
        made = torch.full((1, 3, 4, 4), 0.5)
    elif kind == "extremes":
        made = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    elif kind == "nan":
        made = torch.full((1, 3, 4, 4), math.nan)
    else:
        made = adversarial(network, 64)
    return itertools.cycle(made.split(1))


def schedule(hostile: Sequence[Tensor], rows: Rows) -> Schedule:
    """Micro-batches of two honest requests, of the two paths, with the hostile ones before, between and behind."""
    lots = [hostile[begin : begin + LOT] for begin in range(0, len(hostile), LOT)]
    recorded: Schedule = []
    for number, lot in enumerate(lots):
        queries = [Query(x, "hostile") for x in lot]
        queries.insert(number % len(queries), Query(rows(2, 1.0 + number), "few"))
        queries.insert(2 * number % len(queries), Query(0.7 * rows(9, 2.0 + number), "many"))
        recorded.append(queries)
    return recorded


def without(recorded: Schedule) -> Schedule:
    return [[query for query in queries if query.stream != "hostile"] for queries in recorded]


class Told(NamedTuple):
    """What an honest request was told."""

    stream: str
    version: int
    logits: NDArray[np.float32]


def play(engine: Engine, recorded: Schedule) -> tuple[list[Told], list[tuple[int, tuple[str, ...]]]]:
    """Answer and learn, one micro-batch after the other.

    Returns:
        What the honest requests were told, and the hostile stream's trips: after how many of its requests, and which.
    """
    told: list[Told] = []
    trips: list[tuple[int, tuple[str, ...]]] = []
    asked = 0
    for queries in recorded:
        answers = engine.predict(queries)
        asked += sum(query.stream == "hostile" for query in queries)
        for query, (answer, _) in zip(queries, answers, strict=True):
            if query.stream != "hostile":
                assert answer.logits is not None
                told.append(Told(query.stream, answer.version, answer.logits))
        for learned in engine.learn([lesson for _, lesson in answers]):
            if learned.trips:
                assert learned.stream == "hostile"
                trips.append((asked, learned.trips))
    return told, trips


def assert_same(with_it: Sequence[Told], without_it: Sequence[Told]) -> None:
    assert len(with_it) == len(without_it)
    for one, other in zip(with_it, without_it, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-5)
        assert np.isfinite(one.logits).all()


def same(a: object, b: object) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(a), tree.leaves(b), strict=True))


def take(kind: str, network: nn.Module, count: int) -> list[Tensor]:
    return list(itertools.islice(hostile_images(kind, network), count))


@pytest.mark.parametrize("kind", KINDS)
def test_honest_streams_do_not_notice(
    engine: Callable[[], Engine], tiny: Callable[..., nn.Module], rows: Rows, kind: str
) -> None:
    mine, apart = engine(), engine()
    recorded = schedule(take(kind, mine.pipeline.network.model, 400), rows)
    told, _ = play(mine, recorded)
    alone, trips = play(apart, without(recorded))
    assert_same(told, alone)
    assert trips == []
    for stream in ("few", "many"):
        assert mine.streams.record(stream).version == apart.streams.record(stream).version == len(recorded)
        assert mine.streams.record(stream).trips == 0
    mine.streams.reset("hostile")
    assert same(mine.streams.state("hostile"), mine.pipeline.init())


def test_ten_thousand_hostile_requests(
    engine: Callable[[], Engine], rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # every trip is logged, and nothing else is asked of it here
    mine, apart = engine(), engine()
    network = mine.pipeline.network.model
    images = [image for kind in KINDS for image in take(kind, network, 2000)]
    assert len(images) == 10_000
    recorded = schedule(images, rows)
    told, trips = play(mine, recorded)
    alone, _ = play(apart, without(recorded))
    assert_same(told, alone)
    record = mine.streams.record("hostile")
    assert record.trips == len(trips) >= 3
    assert record.frozen
    assert "frozen: guards" in [event.what for event in record.events]
    mine.streams.reset("hostile")
    assert same(mine.streams.state("hostile"), mine.pipeline.init())
    for stream in ("few", "many"):
        assert mine.streams.record(stream).version == apart.streams.record(stream).version
        assert mine.streams.record(stream).trips == 0


def test_nan_trips_at_once_and_freezes_at_the_third_step(engine: Callable[[], Engine], rows: Rows) -> None:
    mine = engine()
    _, trips = play(mine, schedule(take("nan", mine.pipeline.network.model, 5 * LOT), rows))
    assert trips == [(LOT * number, ("non_finite",)) for number in (1, 2, 3)]
    record = mine.streams.record("hostile")
    assert (record.frozen, record.selected, record.refused) == (True, 0, 3)
    assert same(mine.streams.state("hostile"), mine.pipeline.init())  # the only good version there was
