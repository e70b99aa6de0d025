import math

import torch

from adapters import losses


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [math.log(9), math.log(1)]])
    expected = [0.693147, 0.562335, 0.325083]  # of probabilities 1/2; 3/4 and 1/4; 9/10 and 1/10
    torch.testing.assert_close(losses.entropy(logits), torch.tensor(expected), atol=1e-6, rtol=0)


def test_entropy_is_unmoved_by_a_constant_and_by_huge_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(losses.entropy(logits + 100), losses.entropy(logits))
    assert losses.entropy(torch.tensor([[1e4, 0.0, -1e4]])).item() == 0.0


def test_entropy_of_nan_is_nan_in_its_own_row_only() -> None:
    entropy = losses.entropy(torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]))
    assert entropy.isnan().tolist() == [True, False]


def test_gradient_by_hand() -> None:
    # ∂H/∂z_k = −p_k (ln p_k + H); p = (3/4, 1/4): −0.75 (−0.287682 + 0.562335)
    logits = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    losses.entropy(logits).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.205990, 0.205990]]), atol=1e-6, rtol=0)
