import pytest
import torch
from torch import Tensor

from adapters.class_sums import added, subtracted, sums_of, unit_codes, unit_vectors
from adapters.heads import Items, NeverLearned


def items(rows: list[list[int]], classes: list[int]) -> Items:
    width = len(rows[0]) if rows else 2
    codes = torch.tensor(rows, dtype=torch.int16).reshape(-1, width)
    return Items(codes, torch.tensor(classes, dtype=torch.int64))


def plain(sums: tuple[tuple[Tensor, Tensor, Tensor], ...]) -> list[tuple[int, int, list[int]]]:
    return [(int(number), int(count), total.tolist()) for number, count, total in sums]


def test_codes_are_directions_on_a_grid_by_hand() -> None:
    codes = unit_codes(torch.tensor([[3.0, 4.0], [-2.0, 0.0]]))
    assert codes.dtype == torch.int16
    assert codes.tolist() == [[9830, 13107], [-16384, 0]]  # 0.6 · 16,384 = 9,830.4, 0.8 · 16,384 = 13,107.2
    assert unit_vectors(codes)[1].tolist() == [-1.0, 0.0]


def test_what_has_no_direction_is_coded_as_zero() -> None:
    nan, inf = float("nan"), float("inf")
    assert unit_codes(torch.tensor([[0.0, 0.0], [nan, 1.0], [inf, 1.0], [-inf, inf]])).tolist() == [[0, 0]] * 4


def test_sums_by_hand() -> None:
    told = items([[1, 2], [10, 20], [3, 4]], [5, 2, 5])
    assert plain(sums_of(told)) == [(2, 1, [10, 20]), (5, 2, [4, 6])]
    assert sums_of(items([], [])) == ()


def test_sums_are_wider_than_codes() -> None:
    assert plain(sums_of(items([[16384]] * 5, [0] * 5))) == [(0, 5, [81920])]


def test_adding_shares_the_classes_that_stay() -> None:
    old = sums_of(items([[1], [2]], [0, 3]))
    new = added(old, sums_of(items([[7], [8]], [3, 1])))
    assert plain(new) == [(0, 1, [1]), (1, 1, [8]), (3, 2, [9])]
    assert new[0] is old[0]
    assert plain(old) == [(0, 1, [1]), (3, 1, [2])]


def test_subtracting_takes_out_a_class_without_items() -> None:
    old = sums_of(items([[1], [2], [4]], [0, 3, 3]))
    assert plain(subtracted(old, sums_of(items([[1], [4]], [0, 3])))) == [(3, 1, [2])]


@pytest.mark.parametrize(
    ("gone", "found"),
    [
        (items([[1]], [9]), "class 9 has 0 items; 1 cannot"),
        (items([[1], [1]], [0, 0]), "class 0 has 1 items; 2 cannot"),
        (items([[2]], [0]), "no sum of codes"),  # class 0 would have a sum without an item
        (items([[-16384]], [3]), "no sum of codes"),  # 16,390 is more than one code can be
    ],
)
def test_what_was_not_learned_is_not_taken_out(gone: Items, found: str) -> None:
    old = sums_of(items([[1], [2], [4]], [0, 3, 3]))
    with pytest.raises(NeverLearned, match=found):
        subtracted(old, sums_of(gone))
