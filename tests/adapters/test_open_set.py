"""How unknown an image is, by rank among the source's."""

import pytest
import torch

from adapters.open_set import OpenSet


def test_the_score_is_the_share_of_the_source_that_is_better_known() -> None:
    known = OpenSet(torch.arange(40.0).flip(0))
    logits = torch.tensor([[-1.0], [0.0], [9.5], [39.0]])  # of one class, logsumexp is the logit
    assert known.unknown(logits).tolist() == pytest.approx([1.0, 39 / 40, 30 / 40, 0.0])


def test_logits_that_agree_are_evidence_together() -> None:
    """Two classes with logit 0 are worth as much as one with log 2."""
    known = OpenSet(torch.linspace(0, 1, 101))
    one, two = known.unknown(torch.tensor([[0.6931472, -100.0]])), known.unknown(torch.zeros(1, 2))
    assert one.tolist() == pytest.approx(two.tolist(), abs=0.01)
    assert two.tolist() == pytest.approx([31 / 101], abs=0.011)


@pytest.mark.parametrize("evidence", [torch.arange(19.0), torch.full((30,), torch.nan)])
def test_too_little_to_rank_by_is_refused(evidence: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 20"):
        OpenSet(evidence)
