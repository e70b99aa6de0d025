"""What a law can claim of tensors, states and objects; an `AssertionError` says what does not hold."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapters import tree


def require(holds: bool, otherwise: str) -> None:
    if not holds:  # not `assert`: the suite must also find faults under `python -O`
        raise AssertionError(otherwise)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(*(each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (a, b)))


def pairs(what: str, found: Any, expected: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    left, right = dict(tree.leaves(found)), dict(tree.leaves(expected))
    require(left.keys() == right.keys(), f"{what} has leaves {list(left)}, not {list(right)}")
    for name in left:
        yield f"{what}.{name}" if name else what, left[name], right[name]


def same(what: str, found: Any, expected: Any) -> None:
    for name, a, b in pairs(what, found, expected):
        require(equal_bits(a, b), f"{name} is {a}, not {b}")


def near(what: str, found: Any, expected: Any, tolerance: float) -> None:
    for name, a, b in pairs(what, found, expected):
        is_near = a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)
        require(is_near, f"{name} is {a}, not {b}")


def reachable(root: object) -> Iterator[tuple[str, Tensor | str]]:
    """Every tensor (copied) and plain value reachable through attributes and containers, by path; None is as absent."""
    visited: set[int] = set()

    def visit(path: str, thing: object) -> Iterator[tuple[str, Tensor | str]]:
        if isinstance(thing, Tensor):
            yield path, thing.detach().clone()
            yield f"{path}.requires_grad", str(thing.requires_grad)
            if thing.is_leaf and thing.grad is not None:
                yield f"{path}.grad", thing.grad.clone()
        elif isinstance(thing, torch.Generator):
            yield path, thing.get_state()
        elif isinstance(thing, bool | int | float | complex | str | bytes):
            yield path, repr(thing)
        elif thing is not None and not isinstance(thing, type) and id(thing) not in visited:
            visited.add(id(thing))
            for name, part in _parts(thing):
                yield from visit(f"{path}.{name}", part)

    return visit("", root)


def _parts(thing: object) -> Iterator[tuple[str, object]]:
    if isinstance(thing, Mapping):
        yield from ((str(key), value) for key, value in thing.items())
    elif isinstance(thing, tuple | list):
        yield from zip(getattr(thing, "_fields", map(str, range(len(thing)))), thing, strict=True)
    elif isinstance(thing, set | frozenset):
        yield "members", repr(sorted(map(repr, thing)))
    if hasattr(thing, "__dict__"):
        yield from vars(thing).items()
    for name in getattr(type(thing), "__slots__", ()):
        if hasattr(thing, name):
            yield name, getattr(thing, name)


def unchanged(before: dict[str, Tensor | str], after: dict[str, Tensor | str]) -> None:
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path), after.get(path)
        is_same = equal_bits(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        require(is_same, f"{path.removeprefix('.')} was {a}, is {b}")
