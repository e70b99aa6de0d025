"""Each guard by itself, on numbers made by hand; then all of them around an adapter that does as it is told."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from adapters import (
    EATA,
    Batch,
    EATAConfig,
    Groups,
    GuardConfig,
    Guarded,
    GuardedState,
    Modulation,
    Moments,
    Network,
    Pipeline,
    Report,
    Source,
    Trip,
    guards,
    optim,
    tree,
    trip_names,
)
from adapters.guards import Compared

NAN, INF = float("nan"), float("inf")
CONFIG = GuardConfig()


def test_trips_have_names_for_people() -> None:
    assert trip_names(0) == ()
    assert trip_names(Trip.NON_FINITE | Trip.FORGETTING) == ("non_finite", "forgetting")
    assert trip_names(127) == (
        "non_finite",
        "step_norm",
        "displacement",
        "collapse",
        "entropy_floor",
        "selected_share",
        "forgetting",
    )


# Step norm and displacement: root mean squares over two parameters. (3, 4)/√2 has a norm of 5/√2 and an RMS of 2.5.


def test_a_short_step_keeps_every_bit() -> None:
    old, new = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0123, 0.9911]])
    params, far = guards.cap_step(old, new, CONFIG)
    assert torch.equal(params, new)
    assert far.tolist() == [False]


def test_a_long_step_is_scaled_back_and_trips_only_when_it_is_far_too_long() -> None:
    old = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    step = torch.tensor([[0.03, 0.04], [0.3, 0.4], [0.0, 0.0]]) / math.sqrt(2)  # RMS 0.025, 0.25 and 0
    params, far = guards.cap_step(old, old + step, CONFIG)
    expected = torch.tensor([[0.024, 0.032], [0.024, 0.032], [0.0, 0.0]]) / math.sqrt(2)  # RMS 0.02
    torch.testing.assert_close(params - old, expected, atol=1e-6, rtol=0)
    assert far.tolist() == [False, True, False]


@pytest.mark.parametrize("rate", [1e-3, 4e-3])
def test_adams_worst_step_is_not_cut(rate: float) -> None:
    """After a long calm one gradient, however large: 0.1/√0.001 = 3.2 rates."""
    calm = optim.OptimizerState(torch.tensor([10**6]), torch.zeros(1, 4), torch.zeros(1, 4))
    old = torch.zeros(1, 4)
    new, _ = optim.adam(calm, old, torch.full((1, 4), 1e6), learning_rate=rate)
    assert new.norm().item() / 2 == pytest.approx(3.162 * rate, rel=1e-3)
    assert torch.equal(guards.cap_step(old, new, CONFIG)[0], new)


def test_parameters_are_put_back_on_the_ball() -> None:
    source = torch.tensor([1.0, 2.0])
    away = torch.tensor([[0.1, 0.1], [3.0, 4.0]]) / math.sqrt(2)  # RMS 0.1 and 2.5
    params, out = guards.cap_displacement(source + away, source, CONFIG)
    assert torch.equal(params[0], source + away[0])
    torch.testing.assert_close(params[1] - source, torch.tensor([0.3, 0.4]) / math.sqrt(2))  # RMS 0.25
    assert out.tolist() == [False, True]
    again, out = guards.cap_displacement(params, source, CONFIG)
    torch.testing.assert_close(again, params)
    assert out.tolist() == [False, False]


# Selected share: runs of rows.


def told(seen: list[int], selected: list[int]) -> Report:
    return Report.empty(len(seen))._replace(seen=torch.tensor(seen), selected=torch.tensor(selected))


def test_runs_count_rows_and_end_with_the_first_exception() -> None:
    none, every = torch.tensor([10, 10, 10, 10]), torch.tensor([20, 20, 20, 20])
    none, every = guards.count_runs(none, every, told(seen=[4, 4, 4, 0], selected=[0, 4, 1, 0]))
    assert none.tolist() == [14, 0, 0, 10]  # none was selected; all were; some were; nothing came
    assert every.tolist() == [0, 24, 0, 20]


# Collapse and entropy floor: moving means over `memory_rows`.


def memory(
    adapted: list[float], frozen: list[float], entropies: tuple[float, float] = (0.5, 0.5), rows: int = 600
) -> Compared:
    """Means of one stream after so many rows, as their sums are kept."""
    weight = 1 - math.exp(-rows / CONFIG.memory_rows)
    return Compared(
        torch.tensor([rows]),
        weight * torch.tensor([adapted]),
        weight * torch.tensor([frozen]),
        weight * torch.tensor([entropies[0]]),
        weight * torch.tensor([entropies[1]]),
    )


EVEN, TWO, ONE = [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]
BARELY_TWO = [0.49, 0.49, 0.02, 0.0]  # more than 2 of 4 classes


@pytest.mark.parametrize(
    ("adapted", "frozen", "expected"),
    [
        (ONE, EVEN, True),
        (ONE, ONE, False),  # a camera that sees only cats
        (EVEN, ONE, False),  # the frozen one has collapsed
        (BARELY_TWO, EVEN, False),
        ([0.51, 0.49, 0.0, 0.0], EVEN, True),  # a little less than two of four
        (ONE, TWO, False),  # a half, and not less
    ],
)
def test_collapse_is_relative_to_the_frozen_answers(adapted: list[float], frozen: list[float], expected: bool) -> None:
    assert guards.collapsed(memory(adapted, frozen), CONFIG).tolist() == [expected]


def test_collapse_waits_for_enough_rows() -> None:
    assert guards.collapsed(memory(ONE, EVEN, rows=255), CONFIG).tolist() == [False]
    assert guards.collapsed(memory(ONE, EVEN, rows=256), CONFIG).tolist() == [True]
    assert guards.collapsed(memory(ONE, EVEN, rows=0), CONFIG).tolist() == [False]


@pytest.mark.parametrize(
    ("adapted", "frozen", "expected"),
    [
        (0.019, 0.2, True),  # floor: 0.02 of ln 4
        (0.021, 0.2, False),
        (0.019, 0.09, False),  # the frozen one is nearly as sure: an easy stream
        (0.0, 1.0, True),
    ],
)
def test_the_entropy_floor_is_one_only_where_the_frozen_answers_are_above_it(
    adapted: float, frozen: float, expected: bool
) -> None:
    entropies = (adapted * math.log(4), frozen * math.log(4))
    assert guards.too_sure(memory(EVEN, EVEN, entropies), CONFIG).tolist() == [expected]
    assert guards.too_sure(memory(EVEN, EVEN, entropies, rows=100), CONFIG).tolist() == [False]


def test_moving_means_of_steady_answers_are_these_answers_and_forget_by_rows() -> None:
    start = Compared(torch.tensor([0]), *(torch.zeros(1, 2),) * 2, *(torch.zeros(1),) * 2)
    report = told([60], [0])._replace(mean_probs=torch.tensor([[0.25, 0.75]]), entropy=torch.tensor([0.5]))
    frozen = guards.FrozenAnswers(torch.tensor([[1.0, 0.0]]), torch.tensor([0.1]), torch.tensor([60]))
    once = guards.compare(start, report, frozen, memory_rows=600)
    assert once.rows.tolist() == [60]
    weight = 1 - math.exp(-0.1)
    torch.testing.assert_close(once.adapted / weight, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(once.frozen / weight, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(once.adapted_entropy / weight, torch.tensor([0.5]))
    torch.testing.assert_close(once.frozen_entropy / weight, torch.tensor([0.1]))
    # two batches of 30 rows are one of 60
    half = frozen._replace(rows=torch.tensor([30]))
    twice = guards.compare(guards.compare(start, report, half, 600), report, half, 600)
    for a, b in zip(twice, once, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_answers_are_means_over_the_rows_that_were_asked_about() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [NAN, NAN], [0.0, 100.0]])
    weights, rows = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 2])
    found = guards.frozen_answers(logits, weights, rows, streams=3)
    assert found.rows.tolist() == [2, 0, 1]
    torch.testing.assert_close(found.mean_probs, torch.tensor([[0.75, 0.25], [0.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(2) / 2, 0.0, 0.0]))


# All of them around an adapter.


class Two(NamedTuple):
    params: Tensor  # [2]
    mean: Tensor  # []
    optimizer: optim.OptimizerState


class Obedient:
    """Sets a stream's parameters and mean to the three numbers of its row, and reports what it was given."""

    site = "norm"
    classes = 2
    source_params = torch.tensor([1.0, 1.0])

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def init(self) -> Two:
        moments = optim.OptimizerState(torch.tensor(7), torch.ones(2), torch.ones(2))
        return Two(self.source_params.clone(), torch.tensor(0.0), moments)

    def params(self, states: Two) -> Tensor:
        return states.params

    def with_params(self, states: Two, params: Tensor) -> Two:
        return states._replace(params=params)

    def modulate(self, states: Two, rows: Tensor, groups: Groups) -> Modulation:
        raise NotImplementedError("asked")

    def absorb(self, states: Two, rows: Tensor, groups: Groups, moments: Moments) -> Two:
        return states._replace(mean=states.mean.index_copy(0, rows, moments.mean[:, 0]))

    def pull(self, states: Two, mask: Tensor, share: float) -> Two:
        raise NotImplementedError("the guard's own takes the optimizer along")

    def adapt(self, states: Two, rows: Tensor, batch: Batch) -> tuple[Two, Report]:
        count = len(states.mean)
        none = torch.zeros(count, dtype=torch.int64)
        report = Report.empty(count)._replace(
            seen=none.index_add(0, rows, (batch.weights > 0).to(torch.int64)),
            mean_probs=torch.full((count, 2), 0.5),
            applied=(none + 0).index_fill(0, rows, 1).bool(),
        )
        new = states._replace(
            params=states.params.index_copy(0, rows, batch.x[:, :2]),
            mean=states.mean.index_copy(0, rows, batch.x[:, 2]),
        )
        return new, report._replace(**self.fields)


def table(guarded: Guarded, count: int = 3) -> GuardedState:
    return tree.stack([guarded.init()] * count)


def teach(
    guarded: Guarded, states: GuardedState, given: dict[int, list[float]], frozen: list[list[float]] | None = None
) -> tuple[GuardedState, Report]:
    """One row for each of some streams: its two parameters and its mean."""
    rows, x = torch.tensor(list(given)), torch.tensor(list(given.values()))
    logits = None if frozen is None else torch.tensor(frozen)
    return guarded.adapt(states, rows, Batch(x, Groups.of((1,) * len(x)), torch.ones(len(x)), frozen_logits=logits))


def trips(report: Report) -> list[tuple[str, ...]]:
    return [trip_names(bits) for bits in report.trips.tolist()]


def test_what_is_sound_passes_bit_for_bit() -> None:
    guarded = Guarded(Obedient())
    new, report = teach(guarded, table(guarded), {0: [1.01, 1.0, 5.0], 2: [1.0, 0.99, 6.0]})
    assert torch.equal(new.inner.params, torch.tensor([[1.01, 1.0], [1.0, 1.0], [1.0, 0.99]]))
    assert new.inner.mean.tolist() == [5.0, 0.0, 6.0]
    assert report.applied.tolist() == [True, False, True]
    assert report.refused.tolist() == [False, False, False]
    assert trips(report) == [(), (), ()]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 2])
def test_a_state_that_is_not_finite_is_refused_and_the_others_pass(bad: float, place: int) -> None:
    guarded = Guarded(Obedient())
    states = table(guarded)
    row = [1.0, 1.0, 1.0]
    row[place] = bad
    new, report = teach(guarded, states, {0: row, 2: [1.0, 1.0, 6.0]}, frozen=[[0.0, 0.0], [0.0, 0.0]])
    for (name, kept), (_, old) in zip(tree.leaves(tree.row(new, 0)), tree.leaves(tree.row(states, 0)), strict=True):
        assert torch.equal(kept, old), name
    assert new.inner.mean.tolist() == [0.0, 0.0, 6.0]
    assert new.compared.rows.tolist() == [0, 0, 1]
    assert report.applied.tolist() == [False, False, True]
    assert report.refused.tolist() == [True, False, False]
    assert trips(report) == [("non_finite",), (), ()]


@pytest.mark.parametrize(
    "fields",
    [
        {"entropy": torch.tensor([NAN, 0.0, 0.0])},
        {"mean_probs": torch.tensor([[NAN, 0.5], [0.5, 0.5], [0.5, 0.5]])},
    ],
    ids=["entropy", "mean_probs"],
)
def test_answers_that_are_not_finite_are_refused_too(fields: dict[str, Tensor]) -> None:
    guarded = Guarded(Obedient(**fields))
    new, report = teach(guarded, table(guarded), {0: [1.0, 1.0, 5.0], 1: [1.0, 1.0, 6.0]})
    assert new.inner.mean.tolist() == [0.0, 6.0, 0.0]
    assert trips(report) == [("non_finite",), (), ()]


def test_rows_that_the_frozen_network_was_not_asked_about_leave_the_memory_as_it_was() -> None:
    guarded = Guarded(Obedient())
    new, report = teach(guarded, table(guarded), {0: [1.0, 1.0, 5.0]}, frozen=[[NAN, NAN]])
    assert new.compared.frozen.tolist() == [[0.0, 0.0]] * 3
    assert new.compared.rows.tolist() == [0, 0, 0]
    assert trips(report) == [(), (), ()]


def test_what_an_inner_guard_said_stays_said() -> None:
    inner = {"refused": torch.tensor([False, True, False]), "trips": torch.tensor([0, 8, 16])}
    guarded = Guarded(Obedient(**inner))
    _, report = teach(guarded, table(guarded), {0: [NAN, 1.0, 1.0], 2: [9.0, 1.0, 1.0]})
    assert report.refused.tolist() == [True, True, False]
    assert trips(report) == [("non_finite",), ("collapse",), ("step_norm", "entropy_floor")]


def test_steps_are_capped_and_parameters_stay_on_the_ball_only_where_a_step_was_taken() -> None:
    guarded = Guarded(Obedient(), GuardConfig(step_rms_max=0.1, displacement_rms_max=0.05))
    states = table(guarded)
    far = states.inner._replace(params=torch.tensor([[1.0, 1.0], [9.0, 9.0], [1.04, 1.04]]))
    states = states._replace(inner=far)
    new, report = teach(guarded, states, {0: [3.0, 3.0, 0.0], 2: [1.06, 1.06, 0.0]})
    torch.testing.assert_close(new.inner.params, torch.tensor([[1.05, 1.05], [9.0, 9.0], [1.05, 1.05]]))
    assert trips(report) == [("step_norm", "displacement"), (), ("displacement",)]


def test_a_stream_that_selects_nothing_for_long_trips() -> None:
    guarded = Guarded(Obedient(), GuardConfig(selected_rows=3))
    states, found = table(guarded, 2), []
    for _ in range(4):
        states, report = teach(guarded, states, {0: [1.0, 1.0, 0.0]})
        found.append(trips(report))
    assert found == [[(), ()], [(), ()], [("selected_share",), ()], [("selected_share",), ()]]
    assert states.none_selected.tolist() == [4, 0]
    _, report = teach(guarded, states, {1: [1.0, 1.0, 0.0]})
    assert trips(report) == [(), ()]  # nothing came for the first: nothing is said of it


def test_collapse_and_floor_need_the_frozen_answers_of_the_same_batch() -> None:
    sure = {"mean_probs": torch.tensor([[1.0, 0.0]] * 3), "entropy": torch.zeros(3)}
    guarded = Guarded(Obedient(**sure), GuardConfig(compare_rows_min=2, collapse_share=0.9))
    states = table(guarded)
    given = {0: [1.0, 1.0, 0.0], 1: [1.0, 1.0, 0.0]}
    for _ in range(3):
        states, report = teach(guarded, states, given)
    assert trips(report) == [(), (), ()]
    assert states.compared.rows.tolist() == [0, 0, 0]
    frozen = [[0.0, 0.0], [100.0, 0.0]]  # undecided; as sure as the adapted
    states, report = teach(guarded, states, given, frozen)
    assert trips(report) == [(), (), ()]
    states, report = teach(guarded, states, given, frozen)
    assert trips(report) == [("collapse", "entropy_floor"), (), ()]
    assert states.compared.rows.tolist() == [2, 2, 0]


def test_pull_moves_toward_the_source_and_starts_memories_afresh_where_it_is_told() -> None:
    guarded = Guarded(Obedient())
    states = table(guarded)
    states = states._replace(
        inner=states.inner._replace(params=torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]), mean=torch.ones(3)),
        compared=tree.apply(torch.ones_like, states.compared),
        none_selected=torch.tensor([5, 5, 5]),
    )
    before = tree.apply(torch.clone, states)
    new = guarded.pull(states, torch.tensor([True, False, True]), 0.25)
    assert new.inner.params.tolist() == [[1.75, 0.25], [2.0, 0.0], [1.75, 0.25]]
    assert new.inner.mean.tolist() == [1.0, 1.0, 1.0]  # statistics are no learned parameters
    assert new.inner.optimizer.step.tolist() == [0, 7, 0]
    assert new.inner.optimizer.first.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert new.compared.rows.tolist() == [0, 1, 0]
    assert new.compared.adapted.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert new.none_selected.tolist() == [0, 5, 0]
    for (name, left), (_, was) in zip(tree.leaves(states), tree.leaves(before), strict=True):
        assert torch.equal(left, was), name
    whole = guarded.pull(states, torch.tensor([True, True, True]), 1.0)
    assert torch.equal(whole.inner.params, torch.ones(3, 2))


def test_absorb_keeps_what_would_not_be_finite() -> None:
    guarded = Guarded(Obedient())
    moments = Moments(torch.tensor([[4.0], [NAN]]), torch.ones(2, 1))
    new = guarded.absorb(table(guarded), torch.tensor([2, 0]), Groups.of((1, 1)), moments)
    assert new.inner.mean.tolist() == [0.0, 0.0, 4.0]


def test_everything_else_is_the_adapters() -> None:
    guarded = Guarded(Obedient())
    assert guarded.init().inner.params.tolist() == [1.0, 1.0]
    assert guarded.classes == 2
    assert guarded.params(table(guarded)).shape == (3, 2)
    with pytest.raises(NotImplementedError, match="asked"):
        guarded.modulate(table(guarded), torch.zeros(1, dtype=torch.int64), Groups.of((1,)))


def test_guards_stand_around_guards() -> None:
    twice = Guarded(Guarded(Obedient()))
    new, report = teach(twice, table(twice), {0: [NAN, 1.0, 1.0], 1: [1.01, 1.0, 1.0]})
    assert new.inner.inner.params.tolist()[1] == pytest.approx([1.01, 1.0])
    assert trips(report) == [("non_finite",), (), ()]


def test_the_frozen_model_can_be_guarded_and_pulled(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    network = Network(build("batch_norm_2d"))
    guarded = Guarded(Source(network))
    states = table(guarded)
    batch = Batch(images(2), Groups.of((2,)), torch.ones(2), frozen_logits=torch.zeros(2, 4))
    new, report = guarded.adapt(states, torch.tensor([1, 1]), batch)
    assert [field.shape[0] for field in report] == [3] * 8
    assert guarded.pull(new, torch.tensor([True, False, True]), 0.5).none_selected.tolist() == [0, 0, 0]


def eata(network: Network) -> EATA:
    return EATA(network, 4, config=EATAConfig(anchor="l2", entropy_margin=10.0, redundancy_margin=2.0))


def test_streams_that_are_compared_in_one_batch_are_compared_as_alone(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    network = Network(build("batch_norm_2d"))
    pipeline = Pipeline(network, norm=Guarded(eata(network)))
    x = images(9)
    frozen = network(x).logits
    rows = torch.tensor([0] * 5 + [2] * 4)
    both, report = pipeline.adapt(
        tree.stack([pipeline.init()] * 3), rows, Batch(x, Groups.of((5, 4)), torch.ones(9), frozen_logits=frozen)
    )
    part = Batch(x[5:], Groups.of((4,)), torch.ones(4), frozen_logits=frozen[5:])
    alone, _ = pipeline.adapt(tree.stack([pipeline.init()]), torch.zeros(4, dtype=torch.int64), part)
    assert both.norm.compared.rows.tolist() == [5, 0, 4]
    for (name, found), (_, expected) in zip(
        tree.leaves(tree.row(both.norm.compared, 2)), tree.leaves(tree.row(alone.norm.compared, 0)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, msg=name)
    weight = 1 - math.exp(-4 / CONFIG.memory_rows)
    torch.testing.assert_close(both.norm.compared.adapted[2] / weight, report.mean_probs[2], atol=1e-5, rtol=1e-4)
    assert both.norm.compared.adapted[1].tolist() == [0.0] * 4


def test_no_value_is_read_where_frozen_answers_come_along(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """On the meta device there are none to read."""
    network = Network(build("batch_norm_2d").to("meta"))
    pipeline = Pipeline(network, norm=Guarded(eata(network)))
    states = tree.stack([pipeline.init()] * 3)
    rows, x = torch.zeros(9, dtype=torch.int64, device="meta"), images(9).to("meta")
    batch = Batch(x, Groups.of((8, 1), "meta"), torch.ones(9, device="meta"), frozen_logits=network(x).logits)
    new, report = pipeline.adapt(states, rows, batch)
    new = pipeline.norm.pull(new.norm, report.refused, 0.5)
    assert {leaf.device.type for _, leaf in tree.leaves(new)} == {"meta"}
