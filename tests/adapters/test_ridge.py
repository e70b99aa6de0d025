import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import tree
from adapters.components import Components
from adapters.heads import Items, NeverLearned
from adapters.ridge import CHUNK, Ridge, RidgeConfig, fit_ridge


def head(width: int = 2, penalty: float = 1.0) -> Ridge:
    return Ridge(Components(torch.zeros(width), torch.eye(width)), RidgeConfig(penalty, scale=1.0))


def taught(made: Ridge, features: list[list[float]], classes: list[int]) -> Items:
    return Items(made.encode(torch.tensor(features)), torch.tensor(classes))


def scores(made: Ridge, told: Items, features: list[list[float]]) -> Tensor:
    return made.score(made.read(made.learn(made.init(), told)), made.encode(torch.tensor(features)))


def test_weights_of_balanced_classes_by_hand() -> None:
    made = head()
    # XᵀX = diag(2, 2), XᵀY = [[2, 0], [0, 2]]; with λ = 1, W = 2/3 I
    told = taught(made, [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 9.0]], [3, 3, 8, 8])
    state = made.learn(made.init(), told)
    assert state.gram.tolist() == [[2 * 2**28, 0], [0, 2 * 2**28]]
    assert made.read(state).classes == (3, 8)
    torch.testing.assert_close(made.read(state).weights, torch.eye(2, dtype=torch.float64) * 2 / 3)


def test_a_rare_class_weighs_more_by_hand() -> None:
    made = head()
    # n = (3, 1), n̄ = 2: targets √(2/3) and √2. XᵀX + λ = diag(4, 2), XᵀY = diag(3 √(2/3), √2)
    told = taught(made, [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 0, 1])
    weights = made.read(made.learn(made.init(), told)).weights
    expected = torch.tensor([[3 * (2 / 3) ** 0.5 / 4, 0.0], [0.0, 2**0.5 / 2]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)


def test_the_mean_image_is_neutral() -> None:
    made = Ridge(Components(torch.tensor([5.0, 5.0]), torch.eye(2)))
    assert scores(made, taught(made, [[6.0, 5.0], [5.0, 6.0]], [0, 1]), [[5.0, 5.0]]).tolist() == [[0.0, 0.0]]


def test_one_class_alone_can_be_learned() -> None:
    made = head()
    found = scores(made, taught(made, [[1.0, 0.0]], [0]), [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert found.tolist() == [[0.5], [-0.5], [0.0]]


def test_sums_in_chunks_are_exact() -> None:
    made = head(width=1)
    told = Items(torch.full((CHUNK + 3, 1), 16383, dtype=torch.int16), torch.zeros(CHUNK + 3, dtype=torch.int64))
    state = made.learn(made.init(), told)
    assert int(state.gram) == (CHUNK + 3) * 16383**2
    assert int(state.classes[0].total) == (CHUNK + 3) * 16383


def test_what_was_not_learned_is_not_taken_out() -> None:
    made = head()
    state = made.learn(made.init(), taught(made, [[1.0, 0.0], [1.0, 0.0]], [0, 0]))
    nothing = Items(torch.zeros(0, 2, dtype=torch.int16), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(NeverLearned, match="no sum of squares"):
        made.unlearn(state, Items(torch.tensor([[16384, 5]], dtype=torch.int16), torch.tensor([0])), nothing)


def test_a_penalty_is_needed() -> None:
    with pytest.raises(ValueError, match="above 0, not 0"):
        RidgeConfig(penalty=0)


def test_fit_keeps_the_strongest_components() -> None:
    features = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    prior = fit_ridge(features, count=1)
    assert prior.directions.shape == (3, 1)
    assert prior.directions[1:].abs().max() < 1e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_any_order_and_any_forgetting_leave_the_same_bits(order: list[int], gone: set[int]) -> None:
    made = head(width=3)
    every = Items(made.encode(torch.randn(12, 3, generator=torch.Generator().manual_seed(0))), torch.arange(12) % 3)
    kept = torch.tensor([i not in gone for i in range(12)])
    state = made.init()
    for i in order:
        state = made.learn(state, Items(every.codes[i : i + 1], every.classes[i : i + 1]))
    rest = Items(every.codes[kept], every.classes[kept])
    found = made.unlearn(state, Items(every.codes[~kept], every.classes[~kept]), rest)
    expected = made.learn(made.init(), rest)
    assert {n: leaf.tolist() for n, leaf in tree.leaves(found)} == {
        n: leaf.tolist() for n, leaf in tree.leaves(expected)
    }
    assert torch.equal(made.read(found).weights, made.read(expected).weights)
