"""The counting head: hand-computed values, and a state that is a multiset."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import tree
from adapters.components import Components
from adapters.heads import Items, NeverLearned
from adapters.keys import Keys, KeysConfig, KeysPrior
from adapters.kv_bottleneck import Counts, CountsConfig

BOOKS = 2
CONFIG = KeysConfig(codebooks=BOOKS, branches=(2, 2), key_dim=1, components=1)
USAGE = torch.tensor([[3, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.int32)  # of 4 features without labels


@pytest.fixture(scope="module")
def head() -> Counts:
    centres = (torch.zeros(BOOKS, 2, 1), torch.zeros(BOOKS, 4, 1))
    prior = KeysPrior(Components(torch.zeros(1), torch.ones(1, 1)), centres, USAGE)
    return Counts(Keys(prior, CONFIG), CountsConfig(pseudo_counts=(0.5, 1.0), scale=8.0))


def items(*told: tuple[int, int, int]) -> Items:
    """Class, and the key of each of the two codebooks."""
    rows = torch.tensor(told).view(-1, 3)
    return Items(rows[:, 1:].to(torch.int16), rows[:, 0])


def test_a_value_by_hand(head: Counts) -> None:
    table = head.read(head.learn(head.init(), items((7, 0, 3), (7, 1, 3))))
    # codebook 0: q of the halves 4½/5 and ½/5; within the first 3½/5 and 1½/5
    first = log((2 / 0.9 + 1) / (2 + 1)) + log((1 / (3.5 / 5) + 2) / (2 + 2))
    # codebook 1: q = ½ everywhere
    second = log((2 / 0.5 + 1) / (2 + 1)) + log((2 / 0.5 + 2) / (2 + 2))
    assert table.classes == (7,)
    assert table.images == (2,)
    scores = head.score(table, torch.tensor([[0, 3]], dtype=torch.int16))
    assert scores.tolist() == [[pytest.approx(8 * (first + second) / 2, rel=1e-5)]]


def test_a_key_that_was_never_met_speaks_against_its_class(head: Counts) -> None:
    table = head.read(head.learn(head.init(), items((7, 0, 3), (7, 0, 3))))
    met, unmet = head.score(table, torch.tensor([[0, 3], [2, 0]], dtype=torch.int16)).flatten().tolist()
    assert met > 0 > unmet


def test_nothing_told_scores_nothing(head: Counts) -> None:
    assert head.score(head.read(head.init()), torch.zeros(3, BOOKS, dtype=torch.int16)).shape == (3, 0)


def test_how_many_labels_a_class_has_is_no_vote(head: Counts) -> None:
    """100 images of one class, 2 of another, on the same keys in the same shares: the same answer but for shrinkage."""
    many = head.learn(head.init(), items(*[(1, 0, 1)] * 100, (2, 2, 2), (2, 2, 2)))
    scores = head.score(head.read(many), torch.tensor([[0, 1], [2, 2]], dtype=torch.int16))
    assert scores.argmax(dim=1).tolist() == [0, 1]


def test_values_of_classes_that_did_not_change_are_used_again(head: Counts) -> None:
    one = head.learn(head.init(), items((1, 0, 0), (2, 3, 3)))
    before = head.read(one)
    after = head.read(head.learn(one, items((2, 1, 1))), before)
    assert after.values[0] is before.values[0]
    assert after.values[1] is not before.values[1]
    fresh = head.read(head.learn(one, items((2, 1, 1))))
    assert all(torch.equal(a, b) for a, b in zip(after.values, fresh.values, strict=True))


def test_a_state_holds_what_it_has_touched(head: Counts) -> None:
    state = head.learn(head.init(), items((1, 0, 0), (1, 0, 2)))
    (part,) = state.classes
    assert part.cells.tolist() == [0, 4, 6]
    assert part.counts.tolist() == [2, 1, 1]
    assert int(part.images) == 2


@pytest.mark.parametrize("stranger", [(9, 0, 0), (1, 3, 3), (1, 0, 0)])
def test_what_was_never_counted_cannot_be_taken_out(head: Counts, stranger: tuple[int, int, int]) -> None:
    state = head.learn(head.init(), items((1, 0, 0)))
    twice = items(stranger, stranger)
    with pytest.raises(NeverLearned):
        head.unlearn(state, twice, twice)


ITEM = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))


def shuffled(told: list[tuple[int, int, int]], seed: int) -> list[tuple[int, int, int]]:
    order = torch.randperm(len(told), generator=torch.Generator().manual_seed(seed))
    return [told[i] for i in order.tolist()]


@settings(max_examples=50, deadline=None)
@given(told=st.lists(ITEM, max_size=20), parts=st.integers(1, 5), seed=st.integers(0, 2**30))
def test_neither_order_nor_parts_leave_a_trace(
    head: Counts, told: list[tuple[int, int, int]], parts: int, seed: int
) -> None:
    whole = head.learn(head.init(), items(*told))
    state = head.init()
    mixed = shuffled(told, seed)
    for start in range(parts):
        state = head.learn(state, items(*mixed[start::parts]))
    assert tree.digest(state) == tree.digest(whole)


@settings(max_examples=50, deadline=None)
@given(told=st.lists(ITEM, max_size=20), seed=st.integers(0, 2**30), forgotten=st.integers(0, 3))
def test_a_class_that_is_forgotten_was_never_seen(
    head: Counts, told: list[tuple[int, int, int]], seed: int, forgotten: int
) -> None:
    gone = [each for each in told if each[0] == forgotten]
    rest = [each for each in told if each[0] != forgotten]
    state = head.learn(head.init(), items(*shuffled(told, seed)))
    left = head.unlearn(state, items(*shuffled(gone, seed + 1)), items(*rest))
    never = head.learn(head.init(), items(*rest))
    assert tree.digest(left) == tree.digest(never)
    assert forgotten not in head.read(left).classes


@settings(max_examples=40, deadline=None)
@given(base=st.lists(ITEM, max_size=10), own=st.lists(ITEM, max_size=10))
def test_merging_is_having_learned_both(
    head: Counts, base: list[tuple[int, int, int]], own: list[tuple[int, int, int]]
) -> None:
    merged = head.merge(head.learn(head.init(), items(*base)), head.learn(head.init(), items(*own)))
    assert tree.digest(merged) == tree.digest(head.learn(head.init(), items(*base, *own)))


def test_scores_are_each_image_s_own(head: Counts) -> None:
    table = head.read(head.learn(head.init(), items((1, 0, 0), (2, 3, 1), (2, 2, 2))))
    codes: Tensor = torch.tensor([[0, 0], [3, 3], [1, 2]], dtype=torch.int16)
    alone = torch.cat([head.score(table, code) for code in codes.split(1)])
    assert torch.equal(head.score(table, codes), alone)
