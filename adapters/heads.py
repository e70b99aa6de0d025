"""Heads that learn classes from labels: what they share, and what every one of them promises.

A *head* reads the features of a frozen encoder. What it has learned is a *state*, a value as everywhere else; but it
grows with what it is told, so that a table of heads is a tuple of states and no stack of tensors.

    codes  = head.encode(features)              what is kept of an image beside its label: small, and never recomputed
    state' = head.learn(state, items)           leaves the old state alone
    state' = head.unlearn(state', some, rest)   exactly the state that never saw them
    table  = head.read(state)                   made ready to be read: a state changes seldom and is read often
    scores = head.score(table, codes)           a column for each class that has a label

Scores are on a scale of log-probabilities on which 0 is neutral: what an image gets from a class of which the head
knows nothing. `fusion.py` joins them with the network's own logits. `head_checks.py` proves the laws:

1. Nothing changes its arguments.
2. `init()` scores no class at all.
3. An image's scores depend on its own code and the table alone.
4. Where `order_free`, the order of the items and how they are parted changes no bit of the state.
5. `unlearn` gives, bit for bit, the state that never saw the items.
6. Two states merged are the state that learned the items of both (where `order_free`: bit for bit).
7. A state and a code survive encoding bit for bit.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from adapters.base import AdapterError

S = TypeVar("S")
T = TypeVar("T", bound="Readable")


class NeverLearned(AdapterError):
    """What shall be unlearned is not in the state."""


class Items(NamedTuple):
    """Images whose classes are known, in the order in which they were told."""

    codes: Tensor  # what `encode` made of each, [N, …]
    classes: Tensor  # int64 [N], each ≥ 0

    @property
    def rows(self) -> int:
        """N."""
        return len(self.classes)


class Readable(Protocol):
    """What `read` gives."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Those that have a label, ascending: the columns of `score`."""
        ...

    @property
    def images(self) -> tuple[int, ...]:
        """How many labels each of them has."""
        ...


class Head(Protocol[S, T]):
    """What every head has. Immutable once built: nothing on `self` ever changes."""

    @property
    def order_free(self) -> bool:
        """Whether a state depends on the items alone and not on their order."""
        ...

    def init(self) -> S:
        """The state that was told nothing."""
        ...

    def encode(self, features: Tensor) -> Tensor:
        """What is kept of images, and read of them.

        Args:
            features: [B, F], of the network as adapted at that moment.

        Returns:
            Codes [B, …] of a dtype and shape that are the head's alone.
        """
        ...

    def learn(self, state: S, items: Items) -> S:
        """The state after some more items."""
        ...

    def unlearn(self, state: S, items: Items, rest: Items) -> S:
        """The state without some of its items.

        Args:
            state: that learned `items` and `rest`.
            items: to take out.
            rest: all others, in the order in which they were told. Heads that are `order_free` need none of it.

        Raises:
            NeverLearned: the state has not learned all of these; only where that can be told.
        """
        ...

    def merge(self, base: S, own: S) -> S:
        """What a stream reads: what all streams share, and its own."""
        ...

    def read(self, state: S, before: T | None = None) -> T:
        """Make a state ready to be read.

        Args:
            state: any.
            before: the table of another state, of which parts may be used again; it changes nothing but the time taken.
        """
        ...

    def score(self, table: T, codes: Tensor) -> Tensor:
        """Score images against each class.

        Args:
            table: of one state, K classes.
            codes: [B, …].

        Returns:
            [B, K], in the order of `table.classes`; 0 is neutral.
        """
        ...


AnyHead = Head[Any, Any]
