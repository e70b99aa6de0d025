from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adapters import Batch, Groups, KeepFinite, Modulation, Report


class Number(NamedTuple):
    value: Tensor


class Setter:
    """Sets a stream's number to the first pixel of its last row."""

    site = "norm"

    def init(self) -> Number:
        return Number(torch.tensor(5.0))

    def modulate(self, states: Number, rows: Tensor, groups: Groups) -> Modulation:
        raise NotImplementedError("asked")

    def adapt(self, states: Number, rows: Tensor, batch: Batch) -> tuple[Number, Report]:
        count = len(states.value)
        applied = torch.zeros(count, dtype=torch.bool).index_fill(0, rows, value=True)
        return Number(states.value.index_copy(0, rows, batch.x[:, 0])), Report.empty(count)._replace(applied=applied)


def adapt(pixels: list[float], rows: list[int]) -> tuple[list[float], Report]:
    batch = Batch(torch.tensor(pixels).unsqueeze(1), Groups.of((1,) * len(rows)), torch.ones(len(rows)))
    new, report = KeepFinite(Setter()).adapt(Number(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(rows), batch)
    return new.value.tolist(), report


def test_finite_states_pass() -> None:
    values, report = adapt([7.0, 8.0], [0, 2])
    assert values == [7.0, 2.0, 8.0]
    assert report.applied.tolist() == [True, False, True]
    assert report.refused.tolist() == [False, False, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_state_that_is_not_finite_is_refused_and_the_others_pass(bad: float) -> None:
    values, report = adapt([bad, 8.0], [0, 2])
    assert values == [1.0, 2.0, 8.0]
    assert report.applied.tolist() == [False, False, True]
    assert report.refused.tolist() == [True, False, False]


def test_what_an_inner_guard_refused_stays_refused() -> None:
    class Refuses(Setter):
        def adapt(self, states: Any, rows: Tensor, batch: Batch) -> tuple[Number, Report]:
            new, report = super().adapt(states, rows, batch)
            return new, report._replace(refused=torch.tensor([False, True, False]))

    batch = Batch(torch.tensor([[float("nan")]]), Groups.of((1,)), torch.ones(1))
    _, report = KeepFinite(Refuses()).adapt(Number(torch.zeros(3)), torch.tensor([0]), batch)
    assert report.refused.tolist() == [True, True, False]


def test_everything_else_is_the_adapters() -> None:
    guarded = KeepFinite(Setter())
    assert guarded.init().value.item() == 5.0
    with pytest.raises(NotImplementedError, match="asked"):
        guarded.modulate(guarded.init(), torch.zeros(1, dtype=torch.int64), Groups.of((1,)))
