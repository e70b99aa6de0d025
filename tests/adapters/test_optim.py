import pytest
import torch
from torch import Tensor

from adapters import optim, tree

GRADS = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 0.5, 1e-3], [0.25, 0.0, -1e-3], [3.0, -2.0, 0.0], [-4.0, 1.0, 2.0]])


def table(name: optim.OptimizerName, params: Tensor) -> optim.OptimizerState:
    return tree.stack([optim.init(name, each) for each in params])


def test_init_remembers_nothing() -> None:
    params = torch.tensor([1.0, 2.0])
    adam, sgd = optim.init("adam", params), optim.init("sgd", params)
    assert (adam.step.item(), adam.first.tolist(), adam.second.tolist()) == (0, [0, 0], [0, 0])
    assert (sgd.step.item(), sgd.first.tolist(), sgd.second.tolist()) == (0, [0, 0], [])


def test_adam_by_hand() -> None:
    params = torch.zeros(1, 1)
    state = table("adam", params)
    params, state = optim.adam(state, params, torch.tensor([[1.0]]), learning_rate=0.5)
    # m = 0.1, v = 0.001; corrected, both are 1: the step is the learning rate
    assert params.item() == pytest.approx(-0.5, abs=1e-6)
    assert (state.step.item(), state.first.item()) == (1, pytest.approx(0.1))
    assert state.second.item() == pytest.approx(0.001)
    params, state = optim.adam(state, params, torch.tensor([[-1.0]]), learning_rate=0.5)
    # m = 0.09 − 0.1 = −0.01, by 0.19: −0.0526316; v = 0.001999, by 0.001999: 1
    assert params.item() == pytest.approx(-0.5 + 0.5 * 0.0526316, abs=1e-6)
    assert (state.step.item(), state.first.item()) == (2, pytest.approx(-0.01))
    assert state.second.item() == pytest.approx(0.001999)


def test_sgd_by_hand() -> None:
    params = torch.tensor([[1.0]])
    state = table("sgd", params)
    for grad, expected in ((2.0, 0.8), (2.0, 0.42), (0.0, 0.078)):  # buffers 2, 3.8, 3.42; rate 0.1
        params, state = optim.sgd(state, params, torch.tensor([[grad]]), learning_rate=0.1, momentum=0.9)
        assert params.item() == pytest.approx(expected, abs=1e-6)
    assert state.step.item() == 3


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_same_path_as_torch_from_any_row(name: optim.OptimizerName) -> None:
    """Row 0 takes all steps; row 1 starts two steps later: its corrections are its own."""
    start = torch.tensor([0.5, -1.0, 2.0])
    theirs = []
    for first in (0, 2):
        param = start.clone().requires_grad_()
        optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([param], lr=0.01) if name == "adam" else torch.optim.SGD([param], lr=0.01, momentum=0.9)
        )
        for grad in GRADS[first:]:
            param.grad = grad.clone()
            optimizer.step()
        theirs.append(param.detach())
    params = torch.stack([start, start])
    state = table(name, params)
    for number, grad in enumerate(GRADS):
        step = optim.adam if name == "adam" else optim.sgd
        new_params, new_state = step(state, params, torch.stack([grad, grad]), learning_rate=0.01)
        mask = torch.tensor([True, number >= 2])
        params, state = tree.where(mask, (new_params, new_state), (params, state))
    torch.testing.assert_close(params, torch.stack(theirs), atol=1e-6, rtol=0)
    assert state.step.tolist() == [5, 3]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_arguments_are_left_alone(name: optim.OptimizerName) -> None:
    params = torch.tensor([[1.0, 2.0]])
    state = table(name, params)
    before = [leaf.clone() for _, leaf in tree.leaves((state, params))]
    (optim.adam if name == "adam" else optim.sgd)(state, params, torch.ones(1, 2), learning_rate=0.1)
    assert all(torch.equal(now, then) for (_, now), then in zip(tree.leaves((state, params)), before, strict=True))


def test_no_gradient_no_step_of_adam() -> None:
    params = torch.tensor([[1.0, -3.0]])
    new, _ = optim.adam(table("adam", params), params, torch.zeros(1, 2), learning_rate=0.1)
    assert torch.equal(new, params)
