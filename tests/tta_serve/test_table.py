"""The stacked states and the optimizer moments beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapters import Pipeline, optim, tree
from tta_serve import table as module
from tta_serve.table import Table

Make = Callable[..., tuple[Any, Table]]


@pytest.fixture
def table(pipeline: Callable[..., Pipeline]) -> Make:
    """`table(rows=8)`: `init()` of the small network's pipeline, and a table for it."""

    def make(rows: int = 8, **config: Any) -> tuple[Any, Table]:
        init = pipeline(**config).init()
        return init, Table(init, rows)

    return make


def filled(init: Any, number: float) -> Any:
    """A state like `init` with the same number everywhere."""
    return tree.apply(lambda leaf: torch.full_like(leaf, number), init)


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)


def test_row_0_is_the_first_state_at_rest(table: Make) -> None:
    init, mine = table()
    assert same(tree.row(mine.read([0]), 0), optim.rest(init))
    assert mine.row_bytes == tree.nbytes(optim.rest(init)) < tree.nbytes(init)


def test_what_is_written_is_read_in_any_order(table: Make) -> None:
    init, mine = table()
    resting = optim.rest(init)
    mine.write([5, 2], tree.stack([filled(resting, 5), filled(resting, 2)]))
    found = mine.read([2, 0, 5, 2])
    for i, expected in enumerate((filled(resting, 2), resting, filled(resting, 5), filled(resting, 2))):
        assert same(tree.row(found, i), expected)


def test_a_view_of_one_row_may_be_written_to_another(table: Make) -> None:
    """What a step left alone is still the view that was read."""
    init, mine = table()
    resting = optim.rest(init)
    mine.write([3], tree.stack([filled(resting, 3)]))
    mine.write([4], mine.read([3]))
    assert same(tree.row(mine.read([4]), 0), filled(resting, 3))
    assert same(tree.row(mine.read([3]), 0), filled(resting, 3))


def test_writing_no_row_changes_nothing(table: Make) -> None:
    init, mine = table()
    mine.write([], tree.apply(lambda leaf: leaf[[]], mine.read([0])))
    assert same(tree.row(mine.read([0]), 0), optim.rest(init))


def test_a_state_of_nothing_has_a_table_too() -> None:
    mine = Table((), 4)
    mine.write([1], ())
    assert (mine.read([1, 2]), mine.wake((), [("a", 1)]), mine.row_bytes, mine.working_bytes) == ((), (), 0, 0)
    mine.keep_moments((), [("a", 1)])
    assert mine.bytes_of(("a", 1)) == 0


def test_moments_are_those_that_were_kept_or_fresh(table: Make) -> None:
    init, mine = table()
    full = tree.stack([filled(init, 1), filled(init, 2)])
    mine.keep_moments(full, [("a", 1), None])
    woken = mine.wake(mine.read([0, 0, 0]), [("a", 1), ("b", 1), ("a", 2)])
    assert [each.item() for each in woken.norm.inner.optimizer.step] == [1, 0, 0]
    assert same(tree.row(woken, 1), init)
    assert same(tree.row(woken, 2), init)
    assert torch.equal(woken.norm.inner.optimizer.first[0], torch.ones_like(init.norm.inner.params))
    assert torch.equal(woken.norm.inner.params[0], init.norm.inner.params)  # nothing but moments was kept


def test_kept_moments_are_copies(table: Make) -> None:
    init, mine = table()
    states = tree.stack([filled(init, 1)])
    mine.keep_moments(states, [("a", 1)])
    tree.apply(lambda leaf: leaf.zero_(), states)
    woken = mine.wake(mine.read([0]), [("a", 1)])
    assert woken.norm.inner.optimizer.step.tolist() == [1]


def test_states_at_rest_leave_alone_what_is_kept(table: Make) -> None:
    init, mine = table()
    mine.keep_moments(tree.stack([filled(init, 1)]), [("a", 1)])
    mine.keep_moments(mine.read([0]), [("a", 1)])
    mine.keep_moments(mine.read([0]), [("b", 1)])
    woken = mine.wake(mine.read([0, 0]), [("a", 1), ("b", 1)])
    assert woken.norm.inner.optimizer.step.tolist() == [1, 0]
    assert mine.working_bytes == mine.bytes_of(("a", 1)) - mine.row_bytes > 0


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_bytes_follow_what_is_kept(table: Make, optimizer: str) -> None:
    init, mine = table(optimizer=optimizer)
    each = sum(tree.nbytes(moments) for moments in optim.moments(init))
    mine.keep_moments(tree.stack([init, init]), [("a", 1), ("b", 1)])
    assert (mine.working_bytes, mine.bytes_of(("a", 1))) == (2 * each, mine.row_bytes + each)
    mine.forget_moments(("a", 1))
    mine.forget_moments(("a", 1))
    assert (mine.working_bytes, mine.bytes_of(("a", 1))) == (each, mine.row_bytes)


def test_so_many_streams_keep_their_moments_and_no_more(table: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKING_MAX", 3)
    init, mine = table()
    one = tree.stack([filled(init, 1)])
    for stream in "abcad":
        mine.keep_moments(one, [(stream, 1)])
    woken = mine.wake(mine.read([0] * 4), [(stream, 1) for stream in "abcd"])
    assert woken.norm.inner.optimizer.step.tolist() == [1, 0, 1, 1]  # b was at work longest ago
