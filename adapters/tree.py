"""Arithmetic on states: nested named tuples whose leaves are tensors.

A *state* has leaves without a batch dimension; *states* (a stacked table) have the same structure with one more
dimension in front, one row a stream.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def apply(fn: Callable[..., Tensor], tree: T, *others: T) -> T:
    """Call `fn` on the matching leaves of all trees; the result has the structure of the first.

    >>> from typing import NamedTuple
    >>> class S(NamedTuple):
    ...     a: Tensor
    >>> apply(torch.add, S(torch.tensor(1)), S(torch.tensor(2)))
    S(a=tensor(3))
    """
    if isinstance(tree, Tensor):
        return cast(T, fn(tree, *others))
    if not isinstance(tree, tuple):
        raise TypeError(f"a state holds tensors and named tuples only, not {type(tree).__name__}")
    children = [apply(fn, *parts) for parts in zip(tree, *cast(Sequence[Any], others), strict=True)]
    return cast(T, _like(tree, children))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield `(dotted name, tensor)` for every leaf, in the order of the fields."""
    if isinstance(tree, Tensor):
        yield prefix, tree
        return
    names = getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))]
    for name, child in zip(names, tree, strict=True):
        yield from leaves(child, f"{prefix}.{name}" if prefix else name)


def stack(states: Sequence[T]) -> T:
    """Stack single states into a table: every leaf gains a leading dimension of `len(states)`."""
    return apply(lambda *parts: torch.stack(parts), states[0], *states[1:])


def row(states: T, index: int) -> T:
    """Take one state out of a table. The leaves are copies: they share no memory with the table."""
    return apply(lambda leaf: leaf[index].clone(), states)


def where(mask: Tensor, new: T, old: T) -> T:
    """Choose per row of a table: `new` where `mask` [S] is true, else `old`."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)

    return apply(choose, new, old)


def finite_rows(states: Any, rows: int, device: torch.device) -> Tensor:
    """[rows] bool: whether every floating-point leaf of that row of a table is finite."""
    finite = torch.ones(rows, dtype=torch.bool, device=device)
    for _, leaf in leaves(states):
        if leaf.is_floating_point():
            finite &= torch.isfinite(leaf).reshape(rows, -1).all(dim=1)
    return finite


def encode(state: Any) -> dict[str, Tensor]:
    """Flatten a state into named tensors, ready for safetensors."""
    return {name: leaf.detach().contiguous().cpu() for name, leaf in leaves(state)}


def decode(like: T, tensors: dict[str, Tensor]) -> T:
    """Rebuild a state from `encode`'s tensors; `like` (for example `init()`) gives the structure.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype; every such name is listed.
    """
    expected = dict(leaves(like))
    wrong = sorted(set(expected) ^ set(tensors))
    wrong += [
        name
        for name, leaf in expected.items()
        if name in tensors and (tensors[name].shape, tensors[name].dtype) != (leaf.shape, leaf.dtype)
    ]
    if wrong:
        raise ValueError(f"these tensors do not fit the state: {', '.join(wrong)}")
    names = iter(expected)
    return apply(lambda leaf: tensors[next(names)].to(leaf.device), like)


def digest(state: Any) -> str:
    """A name for a state's value, 64 hexadecimal digits (SHA-256): equal for states that are equal bit for bit.

    >>> one = digest((torch.tensor(1),))
    >>> one == digest((torch.tensor(1),)), one == digest((torch.tensor(1.0),))
    (True, False)
    """
    sha = hashlib.sha256()
    for name, leaf in encode(state).items():
        sha.update(f"{name} {leaf.dtype} {list(leaf.shape)}\n".encode())
        sha.update(leaf.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def nbytes(tree: Any) -> int:
    """Bytes held by all leaves."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(tree))


def _like(tree: tuple[Any, ...], children: list[Any]) -> tuple[Any, ...]:
    make = getattr(type(tree), "_make", tuple)
    return cast(tuple[Any, ...], make(children))
