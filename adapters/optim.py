"""Optimizers as pure functions: everything that they remember is a field of the state."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
OptimizerName = Literal["adam", "sgd"]


class OptimizerState(NamedTuple):
    """What an optimizer remembers of one parameter vector of D numbers. A table has a leading dimension S."""

    step: Tensor  # updates taken, t, int64 []
    first: Tensor  # Adam: mean of the gradients, m_t; SGD: the momentum buffer; float32 [D]
    second: Tensor  # Adam: mean of the squared gradients, v_t; SGD: empty; float32 [D] or [0]


def init(name: OptimizerName, params: Tensor) -> OptimizerState:
    """The state before the first step, for parameters [D]."""
    zeros = torch.zeros_like(params)
    step = torch.zeros((), dtype=torch.int64, device=params.device)
    return OptimizerState(step, zeros, zeros.clone() if name == "adam" else params.new_zeros(0))


def adam(
    state: OptimizerState,
    params: Tensor,
    grad: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, OptimizerState]:
    """One step of Adam on every row of a table of parameters.

    Args:
        state: table of S rows.
        params: θ, [S, D].
        grad: [S, D].
        learning_rate: α; one for all rows, or [S].
        betas: β₁, β₂.
        eps: ε.

    Returns:
        The new parameters [S, D] and the new state; the arguments are left alone.

    >>> p = torch.zeros(1, 1)
    >>> s = OptimizerState(torch.tensor([0]), torch.zeros(1, 1), torch.zeros(1, 1))
    >>> round(adam(s, p, torch.ones(1, 1), learning_rate=0.5)[0].item(), 4)
    -0.5

    References:
        Kingma & Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, Algorithm 1.
    """
    step = state.step + 1
    first = torch.lerp(state.first, grad, 1 - betas[0])
    second = torch.addcmul(betas[1] * state.second, grad, grad, value=1 - betas[1])
    # the corrections in float64: in float32, 1 − 0.999 is off by 6e-5 of its value
    first_correction, second_correction = (1 - beta ** step.double() for beta in betas)
    rate = (learning_rate / first_correction).to(params.dtype).unsqueeze(1)
    denominator = second.sqrt() / second_correction.sqrt().to(params.dtype).unsqueeze(1) + eps
    new_params = params - rate * first / denominator
    return new_params, OptimizerState(step, first, second)


def sgd(
    state: OptimizerState, params: Tensor, grad: Tensor, *, learning_rate: float | Tensor, momentum: float = 0.9
) -> tuple[Tensor, OptimizerState]:
    """One step of SGD with (heavy-ball) momentum on every row of a table of parameters.

    Args:
        state: table of S rows.
        params: θ, [S, D].
        grad: [S, D].
        learning_rate: the length of a step; one for all rows, or [S].
        momentum: share of the last step that is taken again.

    Returns:
        The new parameters [S, D] and the new state; the arguments are left alone.

    >>> p = torch.zeros(1, 1)
    >>> s = OptimizerState(torch.tensor([0]), torch.zeros(1, 1), torch.zeros(1, 0))
    >>> p, s = sgd(s, p, torch.ones(1, 1), learning_rate=0.5)
    >>> p, s = sgd(s, p, torch.ones(1, 1), learning_rate=0.5)
    >>> round(p.item(), 4)  # -0.5, then -0.5 · 1.9
    -1.45
    """
    first = momentum * state.first + grad
    rate = learning_rate.unsqueeze(1) if isinstance(learning_rate, Tensor) else learning_rate
    return params - rate * first, OptimizerState(state.step + 1, first, state.second)


def rest(state: T) -> T:
    """A state or table without its optimizers' moments: what a stream that nobody teaches needs to keep.

    >>> zeros = torch.zeros(3)
    >>> rest((zeros, OptimizerState(torch.tensor(5), zeros, zeros)))
    (tensor([0., 0., 0.]), OptimizerState(step=tensor(0), first=tensor([]), second=tensor([])))
    """

    def emptied(found: OptimizerState) -> OptimizerState:
        return OptimizerState(torch.zeros_like(found.step), found.first[..., :0], found.second[..., :0])

    return _replace(state, emptied)


def moments(state: Any) -> list[OptimizerState]:
    """All optimizers' moments of a state or table, in the order of its fields."""
    found: list[OptimizerState] = []

    def note(each: OptimizerState) -> OptimizerState:
        found.append(each)
        return each

    _replace(state, note)
    return found


def with_moments(state: T, kept: Sequence[OptimizerState]) -> T:
    """A state or table with these moments, as `moments` gave them."""
    rest_of = iter(kept)
    return _replace(state, lambda _: next(rest_of))


def _replace(node: T, change: Callable[[OptimizerState], OptimizerState]) -> T:
    if isinstance(node, OptimizerState):
        return cast(T, change(node))
    if not isinstance(node, tuple):
        return node
    children = [_replace(child, change) for child in node]
    return cast(T, getattr(type(node), "_make", tuple)(children))
