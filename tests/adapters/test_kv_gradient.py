import math

import pytest
import torch
from torch import Tensor

from adapters import kv_gradient
from adapters.flat_keys import FlatKeys
from adapters.heads import Items, NeverLearned
from adapters.kv_gradient import KVGradient, KVGradientConfig, KVGradientState


def head(rate: float = 1.0, outputs: int = 4) -> KVGradient:
    """Two codebooks of three keys, of width one."""
    keys = torch.tensor([[[0.0], [1.0], [2.0]], [[0.0], [-1.0], [5.0]]])
    return KVGradient(FlatKeys(torch.tensor(0), keys), 4, KVGradientConfig(rate, outputs=outputs, scale=1.0))


def items(codes: list[list[int]], classes: list[int]) -> Items:
    return Items(torch.tensor(codes, dtype=torch.int16).reshape(-1, 2), torch.tensor(classes, dtype=torch.int64))


def learned(made: KVGradient, told: Items) -> KVGradientState:
    return made.learn(made.init(), told)


def close(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_first_step_by_hand() -> None:
    """Four outputs alike, p = ¼: both cells of the class gain η/C · ¾ = ⅜, those of the other three lose ⅛ each."""
    state = learned(head(), items([[2, 1]], [7]))
    assert (state.classes.tolist(), state.images.tolist(), state.cells.tolist()) == ([7], [1], [2, 4])
    close(state.values, [[0.375, -0.125], [0.375, -0.125]])


def test_a_new_class_begins_as_a_copy_of_those_never_told() -> None:
    """The second image shares cell 2 with (⅜, −⅛ thrice): logits are half of it, with p = e^(½ logit) / Σ."""
    state = head().learn(learned(head(), items([[2, 1]], [7])), items([[2, 0]], [3]))
    told, other = math.exp(0.375 / 2), math.exp(-0.125 / 2)
    seven, three = told / (told + 3 * other), other / (told + 3 * other)
    assert (state.classes.tolist(), state.cells.tolist()) == ([3, 7], [2, 3, 4])
    step = [(1 - three) / 2, -seven / 2, -three / 2]
    close(state.values, [[-0.125 + step[0], 0.375 + step[1], -0.125 + step[2]], step, [-0.125, 0.375, -0.125]])


@pytest.mark.parametrize("outputs", [2, 3, 5])
def test_it_is_the_published_head(outputs: int) -> None:
    """Against autograd on the dense table of all outputs, which are known beforehand there."""
    made = head(rate=0.3, outputs=outputs)
    told = items([[2, 1], [2, 0], [1, 1], [2, 1]], [0, 1, 1, 0])
    dense = torch.zeros(2, 3, outputs)
    for code, label in zip(told.codes.long(), told.classes, strict=True):
        dense.requires_grad_()
        loss = torch.nn.functional.cross_entropy(dense[torch.arange(2), code].mean(dim=0), label)
        (gradient,) = torch.autograd.grad(loss, dense)
        dense = (dense - 0.3 * gradient).detach()
    state = learned(made, told)
    flat = dense.reshape(6, outputs)
    torch.testing.assert_close(state.values[:, :2], flat[state.cells.long(), :2])
    if outputs > 2:
        torch.testing.assert_close(state.values[:, 2], flat[state.cells.long(), 2])
    untouched = [cell for cell in range(6) if cell not in state.cells.tolist()]
    assert flat[untouched].abs().max() == 0


def test_more_classes_may_come_than_were_expected() -> None:
    made = head(outputs=2)
    told = items([[0, 0], [1, 1], [2, 2]], [0, 1, 2])
    scores = made.score(made.read(learned(made, told)), told.codes)
    assert scores.argmax(dim=1).tolist() == [0, 1, 2]


def test_one_output_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 outputs, not 1"):
        KVGradientConfig(outputs=1)


def test_scores_are_the_mean_of_values_and_zero_where_nothing_was_told() -> None:
    made = head()
    state = KVGradientState(
        torch.tensor([1, 4]),
        torch.tensor([1, 1]),
        torch.tensor([1, 5], dtype=torch.int32),
        torch.tensor([[2.0, -4.0, 0.0], [7.0, 2.0, 1.0]]),
    )
    table = made.read(state)
    assert table.classes == (1, 4)
    found = made.score(table, items([[1, 2], [1, 0], [0, 0], [2, 2]], [0] * 4).codes)
    assert found.tolist() == [[4.0, -1.5], [1.0, -2.0], [0.0, 0.0], [3.0, 0.5]]


def test_scoring_in_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = head()
    told = items([[2, 1], [0, 0], [1, 2]], [0, 1, 2])
    table = made.read(learned(made, told))
    expected = made.score(table, told.codes)
    monkeypatch.setattr(kv_gradient, "CHUNK_BYTES", 1)
    assert torch.equal(made.score(table, told.codes), expected)


def test_scale_multiplies_scores_alone() -> None:
    small, large = head(), KVGradient(head().prior, 4, KVGradientConfig(1.0, outputs=4, scale=8.0))
    told = items([[2, 1], [2, 0]], [0, 1])
    expected = 8 * small.score(small.read(learned(small, told)), told.codes)
    assert torch.equal(large.score(large.read(learned(large, told)), told.codes), expected)


def test_order_matters_and_unlearning_replays_it() -> None:
    made = head()
    told = items([[2, 1], [2, 1], [2, 0]], [0, 1, 0])
    backwards = Items(told.codes.flip(0), told.classes.flip(0))
    assert not torch.equal(learned(made, told).values, learned(made, backwards).values)
    found = made.unlearn(learned(made, told), items([[2, 1]], [1]), items([[2, 1], [2, 0]], [0, 0]))
    expected = learned(made, items([[2, 1], [2, 0]], [0, 0]))
    assert found.classes.tolist() == [0]
    assert torch.equal(found.cells, expected.cells)
    assert torch.equal(found.values, expected.values)


def test_unlearning_needs_all_the_rest() -> None:
    made = head()
    state = learned(made, items([[2, 1], [2, 1], [2, 0]], [0, 1, 0]))
    with pytest.raises(NeverLearned, match=r"\{0: 2, 1: 1\} were learned, to take out and to keep are \{0: 1, 1: 1\}"):
        made.unlearn(state, items([[2, 1]], [1]), items([[2, 1]], [0]))


def test_merging_adds_values_over_both_classes_and_cells() -> None:
    made = head()
    base = KVGradientState(
        torch.tensor([0, 2]),
        torch.tensor([3, 1]),
        torch.tensor([0, 4], dtype=torch.int32),
        torch.tensor([[1.0, 2.0, 0.5], [3.0, 4.0, 0.25]]),
    )
    own = KVGradientState(
        torch.tensor([1, 2]),
        torch.tensor([1, 5]),
        torch.tensor([3, 4], dtype=torch.int32),
        torch.tensor([[10.0, 20.0, -1.0], [30.0, 40.0, -2.0]]),
    )
    merged = made.merge(base, own)
    assert (merged.classes.tolist(), merged.images.tolist(), merged.cells.tolist()) == ([0, 1, 2], [3, 1, 6], [0, 3, 4])
    assert merged.values.tolist() == [
        [1.0, 0.5, 2.0, 0.5],  # class 1 is one that base was never told
        [-1.0, 10.0, 20.0, -1.0],  # and class 0 one that own never was
        [3.0 - 2.0, 0.25 + 30.0, 4.0 + 40.0, 0.25 - 2.0],
    ]


def test_a_state_grows_by_at_most_a_cell_a_codebook_an_item() -> None:
    made = head()
    state = made.init()
    for count, code in enumerate(([0, 0], [0, 1], [2, 1]), start=1):
        state = made.learn(state, items([code], [0]))
        assert len(state.cells) <= 2 * count
    assert state.cells.tolist() == [0, 2, 3, 4]


def test_cells_are_put_in_between_and_the_state_before_stays() -> None:
    """At a rate of 0 values stay what they are: nothing but their places changes."""
    made = head(rate=0.0)
    cells, values = torch.tensor([1, 4], dtype=torch.int32), torch.tensor([[2.0, -4.0], [7.0, 1.0]])
    state = KVGradientState(torch.tensor([6]), torch.tensor([3]), cells.clone(), values.clone())
    found = made.learn(state, items([[0, 2], [2, 1], [1, 0]], [6, 6, 6]))
    assert (found.images.tolist(), found.cells.tolist()) == ([6], [0, 1, 2, 3, 4, 5])
    zero = [0.0, 0.0]
    assert found.values.tolist() == [zero, [2.0, -4.0], zero, zero, [7.0, 1.0], zero]
    assert torch.equal(state.cells, cells)
    assert torch.equal(state.values, values)


@pytest.mark.parametrize(("outputs", "expected"), [(4, [3 / 6, 1 / 6, 1 / 6]), (2, [3 / 4, 1 / 4, 0.0])])
def test_probabilities_are_of_each_told_class_and_of_one_never_told(outputs: int, expected: list[float]) -> None:
    """Logits are the mean of log 9 and 0 for the first class, and 0 for all others: e^(½ log 9) = 3 against 1 each."""
    made = head(outputs=outputs)
    state = KVGradientState(
        torch.tensor([1, 4]),
        torch.tensor([1, 1]),
        torch.tensor([2, 3], dtype=torch.int32),
        torch.tensor([[math.log(9), 0.0, 0.0], [0.0, 0.0, 0.0]]),
    )
    close(made.probabilities(state, items([[2, 1], [2, 0]], [1, 1]).codes), [expected] * 2)
