import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.class_means import ClassMeans, ClassMeansConfig, ClassMeansPrior, fit_class_means
from adapters.heads import Items


def head(scale: float = 1.0) -> ClassMeans:
    return ClassMeans(ClassMeansPrior(torch.tensor([1.0, 1.0])), ClassMeansConfig(scale))


def taught(made: ClassMeans, features: list[list[float]], classes: list[int]) -> Items:
    return Items(made.encode(torch.tensor(features)), torch.tensor(classes))


def scores(made: ClassMeans, told: Items, features: list[list[float]]) -> Tensor:
    return made.score(made.read(made.learn(made.init(), told)), made.encode(torch.tensor(features)))


def test_scores_by_hand() -> None:
    made = head(scale=10.0)
    # centred: class 4 has (2, 0) and (0, 3), whose directions' mean points to (1, 1); class 2 has (−1, 0)
    told = taught(made, [[3.0, 1.0], [1.0, 4.0], [0.0, 1.0]], [4, 4, 2])
    found = scores(made, told, [[6.0, 1.0], [1.0, 0.0]])  # centred: (5, 0) and (0, −1)
    torch.testing.assert_close(found, torch.tensor([[-10.0, 7.0711], [0.0, -7.0711]]), atol=1e-3, rtol=0)


def test_length_of_a_feature_does_not_count() -> None:
    made = head()
    told = taught(made, [[101.0, 1.0], [1.0, 1.5]], [0, 0])
    assert scores(made, told, [[2.0, 2.0]]).item() == pytest.approx(1.0, abs=1e-4)


def test_the_mean_image_is_neutral() -> None:
    made = head()
    told = taught(made, [[2.0, 1.0], [1.0, 0.0]], [0, 1])
    assert scores(made, told, [[1.0, 1.0]]).tolist() == [[0.0, 0.0]]


def test_a_class_whose_items_cancel_out_is_neutral() -> None:
    made = head()
    told = taught(made, [[2.0, 1.0], [0.0, 1.0], [1.0, 2.0]], [0, 0, 1])
    assert scores(made, told, [[5.0, 1.0]]).tolist() == [[0.0, 0.0]]


def test_learning_one_class_copies_that_class_alone() -> None:
    made = head()
    old = made.learn(made.init(), taught(made, [[2.0, 1.0], [1.0, 2.0]], [0, 1]))
    new = made.learn(old, taught(made, [[3.0, 1.0]], [1]))
    assert new.classes[0] is old.classes[0]
    assert old.classes[1].images == 1


def test_scores_have_the_dtype_of_the_prior() -> None:
    made = ClassMeans(ClassMeansPrior(torch.zeros(2, dtype=torch.float64)))
    assert scores(made, taught(made, [[2.0, 1.0]], [0]), [[1.0, 1.0]]).dtype == torch.float64


def test_fit_by_hand() -> None:
    prior = fit_class_means(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert (prior.mean.tolist(), prior.mean.dtype) == ([2.0, 4.0], torch.float32)
    with pytest.raises(ValueError, match="there are none"):
        fit_class_means(torch.zeros(0, 2))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.permutations(range(12)), st.sets(st.integers(0, 11)))
def test_any_order_and_any_forgetting_leave_the_same_bits(order: list[int], gone: set[int]) -> None:
    made = head()
    features = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)) * 3
    every = Items(made.encode(features), torch.arange(12) % 3)
    kept = torch.tensor([i not in gone for i in range(12)])
    state = made.init()
    for i in order:
        state = made.learn(state, Items(every.codes[i : i + 1], every.classes[i : i + 1]))
    rest = Items(every.codes[kept], every.classes[kept])
    found = made.unlearn(state, Items(every.codes[~kept], every.classes[~kept]), rest)
    expected = made.learn(made.init(), rest)
    assert [(int(c.number), int(c.images), c.total.tolist()) for c in found.classes] == [
        (int(c.number), int(c.images), c.total.tolist()) for c in expected.classes
    ]
