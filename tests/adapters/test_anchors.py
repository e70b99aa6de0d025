import pytest
import torch
from torch import Tensor, nn

from adapters import Network, anchors


def test_gradient_by_hand() -> None:
    params = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    source, fisher = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 3.0])
    found = anchors.gradient(params, source, fisher, weight=10.0)
    assert found.tolist() == [[10.0, 60.0], [0.0, -60.0]]


def test_gradient_is_that_of_the_pull() -> None:
    params = torch.tensor([[1.0, 2.0], [-1.5, 0.25]], requires_grad=True)
    source, fisher = torch.tensor([0.3, 1.0]), torch.tensor([0.5, 3.0])
    (7.0 * (fisher * (params - source) ** 2).sum()).backward()
    torch.testing.assert_close(anchors.gradient(params.detach(), source, fisher, 7.0), params.grad)


def test_l2_pulls_all_parameters_alike() -> None:
    found = anchors.gradient(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0, 1.0]), 1.0, weight=0.5)
    assert found.tolist() == [[1.0, 2.0]]


def bare_batch_norm() -> Network:
    """Logits are the normalised inputs."""
    return Network(nn.Sequential(nn.BatchNorm1d(2, eps=1e-12)))


# Normalised by its own statistics: (1, −1), (−1, 1), (1, −1), (−1, 1).
OPPOSITE = torch.tensor([[3.0, -1.0], [1.0, 1.0], [3.0, -1.0], [1.0, 1.0]])
# Normalised: (1, 1), (−1, −1): every row is undecided.
ALIKE = torch.tensor([[3.0, 3.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        # p = σ(2) = 0.880797, so ∂CE/∂z = ∓0.119203 with the sign of −x̂: its square for both γ, nothing for β
        ([OPPOSITE], [0.0142093, 0.0142093, 0.0, 0.0]),
        # p = 1/2: ∂CE/∂z = ∓0.5 whatever x̂ is: nothing for γ, its square for both β
        ([ALIKE], [0.0, 0.0, 0.25, 0.25]),
        # the mean of the squares
        ([OPPOSITE, ALIKE], [0.0071047, 0.0071047, 0.125, 0.125]),
    ],
    ids=["sure", "undecided", "both"],
)
def test_fisher_diagonal_by_hand(batches: list[Tensor], expected: list[float]) -> None:
    found = anchors.fisher_diagonal(bare_batch_norm(), batches)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_fisher_diagonal_leaves_the_network_alone_and_works_without_gradients() -> None:
    network = bare_batch_norm()
    before = [tensor.clone() for tensor in (network.scale, network.shift, network.mean, network.var)]
    with torch.no_grad():
        fisher = anchors.fisher_diagonal(network, iter([OPPOSITE]))
    assert not fisher.requires_grad
    for now, then in zip((network.scale, network.shift, network.mean, network.var), before, strict=True):
        assert torch.equal(now, then)
        assert not now.requires_grad


def test_fisher_diagonal_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        anchors.fisher_diagonal(bare_batch_norm(), [])
