"""A head beside a network: who answers what."""

from math import log
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from adapters.base import AdapterError, Batch, Groups, Output
from adapters.fusion import ABSENT, Fusion
from adapters.heads import Items


class Table(NamedTuple):
    classes: tuple[int, ...]
    images: tuple[int, ...]
    scores: tuple[float, ...]  # of every image


class Fixed:
    """A head whose scores are told; its state is the classes that it learned."""

    order_free = True

    def init(self) -> tuple[int, ...]:
        return ()

    def encode(self, features: Tensor) -> Tensor:
        return features.to(torch.int16)

    def learn(self, state: tuple[int, ...], items: Items) -> tuple[int, ...]:
        return (*state, *items.classes.tolist())

    def unlearn(self, state: tuple[int, ...], items: Items, rest: Items) -> tuple[int, ...]:
        raise NotImplementedError

    def merge(self, base: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
        return (*base, *own)

    def read(self, state: tuple[int, ...], before: Table | None = None) -> Table:
        return Table((), (), ())

    def score(self, table: Table, codes: Tensor) -> Tensor:
        return torch.tensor(table.scores).expand(len(codes), -1)


NOTHING = Table((), (), ())
ROWS = torch.tensor([0])
FEATURES = torch.zeros(1, 2)
LOGITS = torch.tensor([[log(3.0), log(1.0)]])  # ¾ and ¼


def test_a_head_that_was_told_nothing_changes_no_bit() -> None:
    fused = Fusion(Fixed(), 2).score((NOTHING,), ROWS, FEATURES, LOGITS)
    assert torch.equal(fused, LOGITS)


def test_an_added_class_by_hand() -> None:
    # one label: e = ½ · exp(log 4) = 2, P(none) = 1/3
    fused = Fusion(Fixed(), 2).score((Table((5,), (1,), (log(4.0),)),), ROWS, FEATURES, LOGITS)
    assert fused.softmax(1).tolist() == [pytest.approx([0.25, 1 / 12, 2 / 3])]


def test_a_class_that_the_network_knows_gets_both() -> None:
    # three labels: e = ¾ · 4 = 3, P(none) = ¼
    fused = Fusion(Fixed(), 2).score((Table((1,), (3,), (log(4.0),)),), ROWS, FEATURES, LOGITS)
    assert fused.softmax(1).tolist() == [pytest.approx([0.75 / 4, (0.25 + 3) / 4])]


def test_logits_keep_the_network_s_scale() -> None:
    """Where the head says that it is none of its classes, the logits stay what they were."""
    table = Table((5,), (1,), (-100.0,))
    fused = Fusion(Fixed(), 2).score((table,), ROWS, FEATURES, LOGITS + 17)
    assert fused[:, :2].tolist() == [pytest.approx((LOGITS + 17).flatten().tolist())]


def test_the_head_alone() -> None:
    head = Fusion(Fixed(), 2, "head")
    fused = head.score((Table((1, 5), (99, 99), (0.0, log(3.0))),), ROWS, FEATURES, LOGITS)
    assert fused.softmax(1).tolist() == [pytest.approx([0.0, 0.25, 0.75])]
    assert torch.equal(head.score((NOTHING,), ROWS, FEATURES, LOGITS), LOGITS)


def test_streams_of_one_batch_have_each_its_own_classes() -> None:
    tables = (NOTHING, Table((5,), (1,), (0.0,)), Table((3, 4), (1, 1), (0.0, 0.0)))
    rows = torch.tensor([2, 0, 1])
    fused = Fusion(Fixed(), 2).score(tables, rows, torch.zeros(3, 2), LOGITS.expand(3, -1))
    assert fused.shape == (3, 4)
    assert (fused == ABSENT).tolist() == [[False] * 4, [False, False, True, True], [False, False, False, True]]
    assert torch.equal(fused[1, :2], LOGITS[0])
    for place, row in enumerate(rows.tolist()):
        alone = Fusion(Fixed(), 2).score((tables[row],), ROWS, FEATURES, LOGITS)
        assert torch.equal(fused[place : place + 1, : alone.shape[1]], alone)


def test_a_network_without_features_cannot_have_a_head() -> None:
    with pytest.raises(AdapterError, match="features"):
        Fusion(Fixed(), 2).score((NOTHING,), ROWS, None, LOGITS)


def batch(targets: Tensor | None, weights: Tensor) -> Batch:
    output = Output(LOGITS.expand(3, -1), torch.zeros(3, 2), None)
    return Batch(torch.zeros(3, 1), Groups.of((2, 1)), weights, output, targets=targets)


def test_labels_of_a_batch_teach_each_its_own_stream() -> None:
    rows = torch.tensor([1, 1, 0])
    states, report = Fusion(Fixed(), 2).adapt(((), ()), rows, batch(torch.tensor([4, 5, 6]), torch.tensor([1.0, 0, 1])))
    assert states == ((6,), (4,))
    assert report.seen.tolist() == [1, 1]
    assert report.applied.tolist() == [True, True]


def test_without_labels_nothing_is_learned() -> None:
    states, report = Fusion(Fixed(), 2).adapt(((), ()), torch.tensor([1, 1, 0]), batch(None, torch.ones(3)))
    assert states == ((), ())
    assert report.seen.tolist() == [0, 0]


def test_how_likely_an_image_is_none_of_the_head_s() -> None:
    # one label: e = ½ · exp(log 4) = 2, P(none) = 1/3; three: ¾ · 4 = 3 each, 1/7
    tables = (NOTHING, Table((5,), (1,), (log(4.0),)), Table((1, 5), (3, 3), (log(4.0), log(4.0))))
    none = Fusion(Fixed(), 2).none(tables, torch.tensor([1, 0, 2]), torch.zeros(3, 2))
    assert none.tolist() == pytest.approx([1 / 3, 1.0, 1 / 7])
