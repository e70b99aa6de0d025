"""What a monitor measures, against two plain forwards; and what the engine makes of it."""

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters import EATA, EATAConfig, Guarded, Network, Pipeline, Source, optim, tree
from adapters.drift import Drift, drift_prior
from adapters.forgetting import Forgetting, Probe
from adapters.guards import GuardConfig
from tta_serve import monitor as module
from tta_serve.engine import GOOD_EVERY_STEPS, Engine, Query
from tta_serve.judging import Learned
from tta_serve.monitor import Forgotten, Monitor, Served
from tta_serve.watch import CALM_CHECKS, CHECK_EVERY_LOTS, CHECK_ROWS

Rows = Callable[..., Tensor]
CPU = torch.device("cpu")


def source_images(count: int) -> Tensor:
    """[count, 3, 4, 4] in [0, 1], each by itself."""
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pipeline_of(tiny: Callable[..., nn.Module]) -> Callable[..., Pipeline]:
    """`pipeline_of(guards=None, **eata)`: EATA around the small network, whose source are `source_images`."""

    def make(guards: GuardConfig | None = None, **config: Any) -> Pipeline:
        module_ = tiny()
        with torch.no_grad():
            seen = module_[0](source_images(400))
            module_[1].running_mean.copy_(seen.mean((0, 2, 3)))
            module_[1].running_var.copy_(seen.var((0, 2, 3)))
        network = Network(module_)
        own = {"anchor": "none", "entropy_margin": 10.0, "redundancy_margin": 2.0, "statistics": "evidence", **config}
        return Pipeline(network, norm=Guarded(EATA(network, 3, config=EATAConfig(**own)), guards))

    return make


def drift_of(pipeline: Pipeline) -> Drift:
    return Drift(pipeline.network, drift_prior(pipeline.network, [source_images(100)]))


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_a_check_says_what_two_forwards_say(
    pipeline_of: Callable[..., Pipeline], tiny: Callable[..., nn.Module], rows: Rows
) -> None:
    pipeline = pipeline_of()
    drift = drift_of(pipeline)
    xs = [rows(3), rows(5, 2.0)]
    adapted = [torch.tensor([[2.0, 0.0, 0.0]] * 3), torch.tensor([[0.0, 0.0, 1.0]] * 5)]
    readings, frozen = Monitor(pipeline, drift).check([Served(*each) for each in zip(xs, adapted, strict=True)])
    for x, logits, reading, found in zip(xs, adapted, readings, frozen, strict=True):
        with torch.no_grad():
            plain = pipeline.network(x).logits
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
        p, q = logits.softmax(1).double(), plain.softmax(1).double()
        assert reading.flip_rate == pytest.approx(
            np.mean([a.argmax() != b.argmax() for a, b in zip(p, q, strict=True)])
        )
        assert reading.entropy == pytest.approx(-(p * p.log()).sum(1).mean().item(), abs=1e-5)
        a, b = p.mean(0), q.mean(0)
        middle = (a + b) / 2
        bits = ((a * (a / middle).log2()).sum() + (b * (b / middle).log2()).sum()) / 2
        assert reading.divergence == pytest.approx(bits.item(), abs=1e-4)
        assert reading.drift == pytest.approx(by_hand(pipeline, drift, x), rel=1e-3)


def by_hand(pipeline: Pipeline, drift: Drift, x: Tensor) -> float:
    """Symmetric KL of what the only batch-norm reads, over the limit for a window of this size."""
    with torch.no_grad():
        seen = pipeline.network.model[0](x).double()  # type: ignore[index,operator]
    mean, var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)
    source_mean, source_var = drift.prior.mean.double(), drift.prior.var.double()
    floor = 0.01 * source_var.mean()
    var, source_var = var.maximum(floor), source_var.maximum(floor)
    apart = (mean - source_mean) ** 2
    kl = 0.5 * (var / source_var + source_var / var + apart * (1 / var + 1 / source_var)) - 1
    limit = np.exp(np.interp(np.log(len(x)), drift.prior.sizes.double().log(), drift.prior.limits.double().log()))
    return float(kl.mean() / limit)


def test_a_check_reads_the_last_rows(pipeline_of: Callable[..., Pipeline], rows: Rows) -> None:
    pipeline = pipeline_of()
    x, logits = rows(CHECK_ROWS + 3), torch.zeros(CHECK_ROWS + 3, 3)
    logits[:3] = torch.tensor([100.0, 0.0, 0.0])
    ((reading,), (frozen,)) = Monitor(pipeline).check([Served(x, logits)])
    assert reading.entropy == pytest.approx(math.log(3), abs=1e-5)
    assert frozen.shape == (CHECK_ROWS, 3)


def test_without_source_images_drift_is_not_known(pipeline_of: Callable[..., Pipeline], rows: Rows) -> None:
    ((reading,), _) = Monitor(pipeline_of()).check([Served(rows(2), torch.zeros(2, 3))])
    assert math.isnan(reading.drift)
    assert reading.entropy == pytest.approx(math.log(3))


def test_images_of_the_source_lie_below_the_alarm_line_and_dark_ones_above(
    pipeline_of: Callable[..., Pipeline],
) -> None:
    pipeline = pipeline_of()
    x = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    served = [Served(x, torch.zeros(64, 3)), Served(0.3 * x, torch.zeros(64, 3))]
    ((like, dark), _) = Monitor(pipeline, drift_of(pipeline)).check(served)
    assert like.drift < 1 < dark.drift


def test_what_was_forgotten(pipeline_of: Callable[..., Pipeline]) -> None:
    pipeline = pipeline_of()
    x = source_images(40)
    with torch.no_grad():
        labels = pipeline.network(x).logits.argmax(1)
    forgetting = Forgetting(pipeline.network, Probe(x, labels))
    table = tree.stack([pipeline.init().norm])
    assert Monitor(pipeline).forgotten(table) is None
    bare = Pipeline(pipeline.network)
    assert Monitor(bare, forgetting=forgetting).forgotten(()) is None
    assert Monitor(pipeline, forgetting=forgetting).forgotten(table) == Forgotten(0.0, 0.0, too_much=False)
    spoilt = pipeline.norm.with_params(table, -pipeline.norm.params(table))  # type: ignore[union-attr]
    found = Monitor(pipeline, forgetting=forgetting).forgotten(spoilt)
    expected = forgetting.measure(pipeline.norm, spoilt)  # type: ignore[arg-type]
    assert found is not None
    assert found[:2] == (expected.points.item(), expected.standard_error.item())
    assert found.points > 0.1
    for limit in (0.02, 0.99):
        found = Monitor(pipeline, forgetting=forgetting, forgetting_max=limit).forgotten(spoilt)
        assert found is not None
        assert found.too_much == (found.points - 1.645 * found.standard_error > limit)


def test_watches_are_of_one_life_and_so_many(pipeline_of: Callable[..., Pipeline], monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WATCHES_MAX", 3)
    mine = Monitor(pipeline_of())
    first = mine.watch("a", 1)
    assert mine.known("a", 1) is mine.watch("a", 1) is first
    assert mine.known("a", 2) is None
    for stream in "bcad":
        mine.watch(stream, 1)
    assert [mine.known(stream, 1) is not None for stream in "abcd"] == [True, False, True, True]
    mine.forget("a", 1)
    mine.forget("a", 1)
    assert mine.known("a", 1) is None


def test_a_life_may_end_while_its_checks_are_read(pipeline_of: Callable[..., Pipeline]) -> None:
    mine, done = Monitor(pipeline_of()), threading.Event()

    def end() -> None:
        while not done.is_set():
            mine.forget("a", 1)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        for _ in range(3000):
            assert mine.watch("a", 1).last is None
    finally:
        done.set()
        ending.join()


# -- the gate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(pipeline_of: Callable[..., Pipeline]) -> Callable[..., Engine]:
    """`watched(gate=True)`: an engine with drift and a gate; it learns so slowly that answers do not flip."""

    def make(gate: bool = True) -> Engine:
        pipeline = pipeline_of(learning_rate=1e-6)
        return Engine(pipeline, CPU, 10, monitor=Monitor(pipeline, drift_of(pipeline), gate=gate))

    return make


def like_the_source(number: int, rows: int = 16) -> Tensor:
    return torch.rand(rows, 3, 4, 4, generator=torch.Generator().manual_seed(1000 + number))


def teach(engine: Engine, x: Tensor, stream: str = "a") -> Learned:
    ((_, lesson),) = engine.predict([Query(x, stream)])
    (learned,) = engine.learn([lesson])
    return learned


def until_gated(engine: Engine) -> int:
    for number in range(200):
        teach(engine, like_the_source(number))
        if engine.gated("a"):
            return number
    raise AssertionError("the gate did not close")


@pytest.mark.parametrize("how", ["reset", "delete", "freeze"])
def test_a_life_that_ends_while_it_is_checked_teaches_nothing(
    watched: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    mine = watched()
    assert mine._monitor is not None
    check = mine._monitor.check

    def interrupted(*given: Any) -> Any:
        getattr(mine.streams, how)("a")
        if how == "delete":
            mine.streams.begin("a")
        return check(*given)

    monkeypatch.setattr(mine._monitor, "check", interrupted)
    learned = teach(mine, like_the_source(0))
    assert (learned.result, learned.seen) == ("stale", 16)
    assert mine.streams.record("a").version == (1 if how == "freeze" else 0)
    state = zip(tree.leaves(mine.streams.state("a")), tree.leaves(mine.pipeline.init()), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in state)


def test_a_stream_like_the_source_stops_paying_and_goes_on_measuring(watched: Callable[..., Engine]) -> None:
    mine = watched()
    mine.streams.begin("a")
    assert mine.reading("a") is None
    until_gated(mine)
    record, state = mine.streams.record("a"), mine.streams.state("a")
    reading = mine.reading("a")
    assert reading is not None
    assert reading.drift < 1
    assert "gate closed" in [event.what for event in record.events]
    learned = teach(mine, like_the_source(500))
    assert (learned.result, learned.seen, learned.selected) == ("gated", 16, 0)
    after, moved = mine.streams.record("a"), mine.streams.state("a")
    assert (after.version, after.steps, after.seen) == (record.version + 1, record.steps, record.seen)
    assert not torch.equal(moved.norm.inner.mean, state.norm.inner.mean)
    assert torch.equal(moved.norm.inner.params, state.norm.inner.params)
    assert [each.step.item() for each in optim.moments(moved)] == [each.step.item() for each in optim.moments(state)]


def test_rows_whose_forward_measured_nothing_are_passed_over(watched: Callable[..., Engine]) -> None:
    mine = watched()
    until_gated(mine)
    before = mine.streams.record("a").version
    assert teach(mine, like_the_source(500, rows=2)).result == "gated"
    assert mine.streams.record("a").version == before


def test_a_change_of_the_input_wakes_it(watched: Callable[..., Engine]) -> None:
    mine = watched()
    until_gated(mine)
    results = [teach(mine, 0.2 * like_the_source(number)).result for number in range(600, 600 + CHECK_EVERY_LOTS)]
    assert results[-1] == "applied"
    assert set(results) == {"gated", "applied"}
    assert not mine.gated("a")
    assert "gate opened" in [event.what for event in mine.streams.record("a").events]


def test_a_gate_is_one_streams_own(watched: Callable[..., Engine]) -> None:
    mine = watched()
    until_gated(mine)
    lessons = [lesson for _, lesson in mine.predict([Query(like_the_source(1), stream) for stream in "ab"])]
    assert {each.stream: each.result for each in mine.learn(lessons)} == {"a": "gated", "b": "applied"}


@pytest.mark.parametrize("how", ["reset", "delete", "rollback"])
def test_a_new_life_has_an_open_gate(watched: Callable[..., Engine], how: str) -> None:
    mine = watched()
    until_gated(mine)
    mine.streams.rollback("a", 0) if how == "rollback" else getattr(mine.streams, how)("a")
    assert teach(mine, like_the_source(1)).result == "applied"
    assert not mine.gated("a")


def test_without_a_gate_it_goes_on_paying(watched: Callable[..., Engine]) -> None:
    mine = watched(gate=False)
    for number in range(6 * CALM_CHECKS):
        assert teach(mine, like_the_source(number)).result == "applied"
    assert mine.reading("a") is not None
    assert not mine.gated("a")


def test_without_a_monitor_there_is_no_reading(pipeline_of: Callable[..., Pipeline]) -> None:
    mine = Engine(pipeline_of(), CPU, 10)
    teach(mine, like_the_source(0))
    assert (mine.reading("a"), mine.gated("a")) == (None, False)


# -- forgetting -------------------------------------------------------------------------------------------------------

BLIND = GuardConfig(  # nothing but the probe says that something is wrong
    step_rms_max=1e9, displacement_rms_max=1e9, compare_rows_min=10**9, selected_rows=10**9
)


def test_forgetting_takes_the_ladder_rung_by_rung(pipeline_of: Callable[..., Pipeline]) -> None:
    """With a rate a thousand times too high the parameters are soon good for nothing, and the probe says so."""
    pipeline = pipeline_of(BLIND, learning_rate=1e-4)
    x = source_images(200)
    with torch.no_grad():
        probe = Probe(x, pipeline.network(x).logits.argmax(1))
    monitor = Monitor(pipeline, forgetting=Forgetting(pipeline.network, probe), gate=False)
    mine = Engine(pipeline, CPU, 10, monitor=monitor)
    for number in range(GOOD_EVERY_STEPS):
        assert teach(mine, like_the_source(number)).trips == ()
    record = mine.streams.record("a")
    good = optim.rest(mine.streams.state("a"))
    assert (record.steps, record.kept) == (GOOD_EVERY_STEPS, (GOOD_EVERY_STEPS,))
    assert record.forgetting is not None
    assert record.forgetting[0] < 0.02

    eata = pipeline.norm.adapter  # type: ignore[union-attr]
    eata.config = EATAConfig(**{**vars(eata.config), "learning_rate": 10.0})
    tripped: list[tuple[int, str]] = []
    for number in range(3 * GOOD_EVERY_STEPS):
        if teach(mine, like_the_source(number)).trips == ("forgetting",):
            record = mine.streams.record("a")
            tripped.append((record.steps, record.events[-1].what))
            if len(tripped) == 1:
                assert record.forgetting is not None
                points, error = record.forgetting
                assert points - 1.645 * error > 0.02
                assert record.version == record.steps  # a pull is part of the step
            if len(tripped) == 2:
                assert same(optim.rest(mine.streams.state("a")), good)
    assert tripped == [
        (2 * GOOD_EVERY_STEPS, "forgetting: pull"),
        (3 * GOOD_EVERY_STEPS, f"rolled back to {GOOD_EVERY_STEPS}: guards"),
        (4 * GOOD_EVERY_STEPS, "frozen: guards"),
    ]
    record = mine.streams.record("a")
    assert (record.frozen, record.trips, record.kept) == (True, 3, (GOOD_EVERY_STEPS,))
    assert same(optim.rest(mine.streams.state("a")), good)
    assert teach(mine, like_the_source(0)).result == "frozen"


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(a), tree.leaves(b), strict=True))


def test_the_frozen_model_forgets_nothing(pipeline_of: Callable[..., Pipeline]) -> None:
    network = pipeline_of().network
    x = source_images(10)
    forgetting = Forgetting(network, Probe(x, torch.zeros(10, dtype=torch.int64)))
    mine = Monitor(Pipeline(network, norm=Source(network)), forgetting=forgetting)
    assert mine.forgotten(()) == Forgotten(0.0, 0.0, too_much=False)
