import pytest
import torch
from torch import Tensor

from adapters import tree
from adapters.dampening import DampeningConfig, Importances, dampened, importances
from adapters.flat_keys import FlatKeys
from adapters.heads import Items, NeverLearned
from adapters.kv_gradient import KVGradient, KVGradientConfig, KVGradientState


def head(outputs: int = 4) -> KVGradient:
    """Two codebooks of three keys, of width one: cells 0 to 2 and 3 to 5."""
    keys = torch.tensor([[[0.0], [1.0], [2.0]], [[0.0], [-1.0], [5.0]]])
    return KVGradient(FlatKeys(torch.tensor(0), keys), 4, KVGradientConfig(1.0, outputs=outputs, scale=1.0))


def items(codes: list[list[int]], classes: list[int]) -> Items:
    return Items(torch.tensor(codes, dtype=torch.int16).reshape(-1, 2), torch.tensor(classes, dtype=torch.int64))


FIRST, SECOND = items([[0, 0]], [5]), items([[0, 1]], [8])  # they share cell 0
BOTH = items([[0, 0], [0, 1]], [5, 8])


def balanced() -> KVGradientState:
    """As if it had learned both. At either image, values cancel out: all outputs are equally likely."""
    return KVGradientState(
        torch.tensor([5, 8]),
        torch.tensor([1, 1]),
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([[9.0, 5.0, -10.0], [-9.0, -5.0, 10.0], [-9.0, -5.0, 10.0]]),
    )


def close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def same(found: KVGradientState, expected: KVGradientState) -> None:
    assert tree.digest(found) == tree.digest(expected)


def test_importances_by_hand() -> None:
    """Four outputs alike: (1 − ¼)² = 9/16 for an image's own class, 1/16 for all others."""
    found = importances(head(), balanced(), BOTH)
    assert (found.cells.tolist(), found.images.tolist()) == ([0, 3, 4], [2, 1, 1])
    close(16 * found.squares, [[10.0, 10.0, 2.0], [9.0, 1.0, 1.0], [1.0, 9.0, 1.0]])


def test_importances_are_the_squared_gradients_of_the_loss() -> None:
    """Against autograd, image by image, where probabilities differ: F is C² = 4 times as large as said there."""
    made, told = head(), items([[2, 1], [2, 0], [1, 1], [2, 1]], [0, 1, 1, 0])
    state = made.learn(made.init(), told)
    dense = torch.zeros(6, 4)
    dense[state.cells.long()] = state.values[:, [0, 1, 2, 2]]
    squares = torch.zeros(6, 4)
    for cells, label in zip(made.cells(told.codes).long(), told.classes, strict=True):
        values = dense.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(values[cells].mean(dim=0), label)
        (gradient,) = torch.autograd.grad(loss, values)
        squares += gradient.square()
    found = importances(made, state, told)
    torch.testing.assert_close(found.squares / 4, squares[state.cells.long(), :3])


def test_importances_of_some_cells_are_those_of_all() -> None:
    some = importances(head(), balanced(), BOTH, torch.tensor([0, 4], dtype=torch.int32))
    assert some.images.tolist() == [2, 1]
    close(16 * some.squares, [[10.0, 10.0, 2.0], [1.0, 9.0, 1.0]])


def test_values_that_matter_more_to_the_forgotten_shrink() -> None:
    """In cell 0 the first image is 9/10, 1/10 and 1/2 of what matters; above α = 1/5 are two of these: β = λ / share.

    Nothing but the first image touched cell 3, which goes, and nothing of it is in cell 4.
    """
    made = head()
    found = dampened(made, balanced(), FIRST, importances(made, balanced(), BOTH), DampeningConfig(0.2, 0.1))
    assert (found.classes.tolist(), found.images.tolist(), found.cells.tolist()) == ([8], [1], [0, 4])
    close(found.values, [[5.0, -10.0 * 0.1 / 0.5], [-5.0, 10.0]])


def test_a_class_that_goes_is_again_one_never_told() -> None:
    """Two outputs, both told, p = ½: each has half of what matters in cell 0, so that β = 0.1 / 0.5."""
    made = head(outputs=2)
    found = dampened(made, balanced(), FIRST, importances(made, balanced(), BOTH), DampeningConfig(0.2, 0.1))
    assert (found.classes.tolist(), found.cells.tolist()) == ([8], [0, 4])
    close(found.values, [[5.0 * 0.2, 9.0 * 0.2], [-5.0, -9.0]])


def test_a_class_keeps_its_column_while_it_has_an_image() -> None:
    made, told = head(), items([[0, 0], [0, 1], [0, 1]], [5, 8, 8])
    state = balanced()._replace(images=torch.tensor([1, 2]))
    found = dampened(made, state, SECOND, importances(made, state, told), DampeningConfig(0.2, 0.1))
    assert (found.classes.tolist(), found.images.tolist(), found.cells.tolist()) == ([5, 8], [1, 1], [0, 3, 4])
    # of 11, 19 and 3 sixteenths in cell 0, the second image is 1, 9 and 1; in cell 4 it is half of everything
    close(found.values, [[9.0, 5.0 * 1.9 / 9, -10.0 * 0.3], [-9.0, -5.0, 10.0], [-1.8, -1.0, 2.0]])


def test_no_value_ever_grows() -> None:
    """β is at most 1, though λ over the share is 1/0.9 for one value and 2 for another."""
    made = head()
    found = dampened(made, balanced(), FIRST, importances(made, balanced(), BOTH), DampeningConfig(0.2, 1.0))
    close(found.values, [[5.0, -10.0], [-5.0, 10.0]])


def test_nothing_is_dampened_that_does_not_matter_enough() -> None:
    made = head()
    found = dampened(made, balanced(), FIRST, importances(made, balanced(), BOTH), DampeningConfig(0.95, 0.0))
    close(found.values, [[5.0, -10.0], [-5.0, 10.0]])


def test_images_that_share_no_cell_are_forgotten_exactly() -> None:
    made, told = head(outputs=2), items([[0, 0], [1, 1], [2, 2]], [0, 1, 0])
    state = made.learn(made.init(), told)
    some, rest = items([[1, 1]], [1]), items([[0, 0], [2, 2]], [0, 0])
    found = dampened(made, state, some, importances(made, state, told))
    expected = made.unlearn(state, some, rest)
    assert (found.classes.tolist(), found.images.tolist(), found.cells.tolist()) == ([0], [2], [0, 2, 3, 5])
    torch.testing.assert_close(found.values, expected.values)


def test_forgetting_everything_is_the_beginning_bit_for_bit() -> None:
    made, told = head(), items([[2, 1], [2, 0], [1, 1], [2, 1]], [0, 1, 1, 0])
    state = made.learn(made.init(), told)
    same(dampened(made, state, told, importances(made, state, told)), made.init())


def test_forgetting_nothing_changes_nothing() -> None:
    made, nothing = head(), items([], [])
    for state, told in ((balanced(), BOTH), (made.init(), nothing)):
        same(dampened(made, state, nothing, importances(made, state, told)), state)


def test_its_arguments_stay() -> None:
    made, state = head(), balanced()
    overall = importances(made, state, BOTH)
    before = tree.apply(torch.clone, overall)
    dampened(made, state, FIRST, overall)
    same(state, balanced())
    assert tree.digest(overall) == tree.digest(before)


def test_what_was_never_learned_is_refused() -> None:
    made, state = head(), balanced()
    overall = importances(made, state, BOTH)
    with pytest.raises(NeverLearned, match=r"the classes \[6, 7\] have no images"):
        dampened(made, state, items([[0, 0], [0, 0]], [7, 6]), overall)
    twice = items([[0, 0], [0, 0]], [5, 5])
    with pytest.raises(NeverLearned, match=r"images by class that are too many: \{5: 1\}"):
        dampened(made, state, twice, overall)


def test_importances_of_something_else_are_refused() -> None:
    made, state = head(), balanced()
    overall = importances(made, state, BOTH)
    with pytest.raises(ValueError, match="have 2 columns, the state 3"):
        dampened(made, state, FIRST, overall._replace(squares=overall.squares[:, :2]))
    with pytest.raises(ValueError, match="lack cells"):
        dampened(made, state, FIRST, importances(made, state, BOTH, torch.tensor([0], dtype=torch.int32)))
    with pytest.raises(ValueError, match="lack cells"):
        dampened(made, state, FIRST, Importances(*(leaf[:0] for leaf in overall)))
    with pytest.raises(ValueError, match="lack images"):
        dampened(made, state, FIRST, importances(made, state, SECOND))


@pytest.mark.parametrize("settings", [(-0.1, 0.1), (0.1, -0.1)])
def test_shares_below_zero_are_refused(settings: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must not be below 0"):
        DampeningConfig(*settings)
