from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import tree


class Inner(NamedTuple):
    step: Tensor
    empty: Tensor


class State(NamedTuple):
    weight: Tensor
    inner: Inner


def state(weight: tuple[float, ...] = (1.0, 2.0), step: int = 3) -> State:
    return State(torch.tensor(weight), Inner(torch.tensor(step), torch.zeros(0)))


def test_leaves_have_dotted_names_in_the_order_of_the_fields() -> None:
    assert [name for name, _ in tree.leaves(state())] == ["weight", "inner.step", "inner.empty"]
    assert [name for name, _ in tree.leaves((torch.zeros(1), (), state()))] == [
        "0",
        "2.weight",
        "2.inner.step",
        "2.inner.empty",
    ]


def test_apply_keeps_the_structure() -> None:
    both = tree.apply(torch.add, state(), state((10.0, 20.0), 4))
    assert isinstance(both, State)
    assert isinstance(both.inner, Inner)
    assert (both.weight.tolist(), both.inner.step.item()) == ([11.0, 22.0], 7)


@pytest.mark.parametrize("bad", [0.5, [torch.zeros(1)], {"a": torch.zeros(1)}, None])
def test_apply_takes_tensors_and_tuples_only(bad: object) -> None:
    with pytest.raises(TypeError, match=f"not {type(bad).__name__}"):
        tree.apply(torch.neg, (bad,))


def test_apply_refuses_trees_of_another_shape() -> None:
    with pytest.raises(ValueError, match="shorter"):
        tree.apply(torch.add, (torch.zeros(1), torch.zeros(1)), (torch.zeros(1),))


def test_stack_and_row() -> None:
    table = tree.stack([state(), state((3.0, 4.0), 9)])
    assert table.weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert table.inner.step.tolist() == [3, 9]
    assert table.inner.empty.shape == (2, 0)
    one = tree.row(table, 1)
    assert (one.weight.tolist(), one.inner.step.item(), one.inner.empty.shape) == ([3.0, 4.0], 9, (0,))


def test_row_is_a_copy() -> None:
    table = tree.stack([state(), state()])
    tree.row(table, 0).weight.fill_(99.0)
    assert table.weight.tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_where_chooses_per_row() -> None:
    old = tree.stack([state(), state()])
    new = tree.stack([state((7.0, 8.0), 4), state((float("nan"), 8.0), 5)])
    chosen = tree.where(torch.tensor([True, False]), new, old)
    assert chosen.weight.tolist() == [[7.0, 8.0], [1.0, 2.0]]
    assert chosen.inner.step.tolist() == [4, 3]


def test_finite_rows() -> None:
    table = tree.stack([state(), state((float("inf"), 0.0)), state((0.0, float("nan")))])
    assert tree.finite_rows(table, 3, torch.device("cpu")).tolist() == [True, False, False]
    assert tree.finite_rows((), 2, torch.device("cpu")).tolist() == [True, True]


def test_encode_gives_named_contiguous_tensors_without_a_graph() -> None:
    turned = State(torch.ones(2, 3).t().requires_grad_(), Inner(torch.tensor(1), torch.zeros(0)))
    tensors = tree.encode(turned)
    assert list(tensors) == ["weight", "inner.step", "inner.empty"]
    assert tensors["weight"].is_contiguous()
    assert not tensors["weight"].requires_grad


def test_decode_rebuilds() -> None:
    decoded = tree.decode(state((0.0, 0.0), 0), tree.encode(state()))
    assert isinstance(decoded.inner, Inner)
    assert (decoded.weight.tolist(), decoded.inner.step.item()) == ([1.0, 2.0], 3)


def test_decode_names_everything_that_does_not_fit() -> None:
    tensors = tree.encode(state())
    del tensors["weight"]
    tensors["surplus"] = torch.zeros(1)
    tensors["inner.step"] = torch.tensor(3.0)  # dtype
    tensors["inner.empty"] = torch.zeros(1)  # shape
    with pytest.raises(ValueError, match=r"surplus, weight, inner\.step, inner\.empty"):
        tree.decode(state(), tensors)


def test_nbytes_by_hand() -> None:
    assert tree.nbytes(state()) == 2 * 4 + 8
    assert tree.nbytes(()) == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=1, max_size=5), st.integers(-(2**63), 2**63 - 1))
def test_any_value_survives_the_round_trip(weight: list[float], step: int) -> None:
    before = state(tuple(weight), step)
    after = tree.decode(before, tree.encode(before))
    assert torch.equal(after.weight.view(torch.int32), before.weight.view(torch.int32))
    assert torch.equal(after.inner.step, before.inner.step)
