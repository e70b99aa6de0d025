"""Several replicas learn about one stream: their contributions, and the state that comes of them.

A *contribution* is what a replica has made of a state in one interval: (replica, sequence, base, state), `sequence`
being the interval's number. Those of one sequence come from replicas that learned side by side, and are averaged; those
of different sequences add up. The last few sequences are remembered as *rounds*, each with the state before it, so that
what comes late is taken as if it had come in time.

Laws, which `checks.check_adapter` proves for each adapter:

1. A (replica, sequence) that comes again changes nothing, bit for bit.
2. The order of arrival changes nothing, within the window: counts exactly, floats to 1e-6.
3. A contribution that learned nothing is the identity, bit for bit; and so is it to `rebase`.
4. Alone is exact: where a contribution's base is the merged state and nobody else contributed in its sequence or later,
   the merged state is the contribution's, bit for bit.
5. No overshoot: two replicas that learn the same from the same state arrive where one does; images and counts add.

A stream's merged state comes from that stream's contributions alone, for nothing else is an argument.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.merge_rules import Latest, Part, Rule, State, below, changed


class Merging(NamedTuple):
    """The rules of an adapter's state. Leaves that none names are `Latest`.

    >>> Merging((Latest("seen"),), local=("optimizer.step",)).below("norm")
    Merging(rules=(Latest(name='norm.seen'),), local=('norm.optimizer.step',))
    """

    rules: tuple[Rule, ...] = ()
    local: tuple[str, ...] = ()  # leaves that mean something to one replica only: a change of them teaches nothing

    def below(self, prefix: str) -> "Merging":
        """The same for a state in which this one is the field `prefix`."""
        return Merging(tuple(rule.below(prefix) for rule in self.rules), below(prefix, self.local))

    def joined(self, other: "Merging") -> "Merging":
        """The rules of both."""
        return Merging(self.rules + other.rules, self.local + other.local)

    def check(self, *states: State) -> None:
        """Look whether states fit each other and the rules, and are finite.

        Raises:
            ValueError: they do not; the message names the leaves.
        """
        named = [leaf for rule in self.rules for leaf in rule.leaves]
        if twice := sorted({leaf for leaf in named if named.count(leaf) > 1}):
            raise ValueError(f"several rules name the same leaves: {', '.join(twice)}")
        all_of = {*named, *self.local}.union(*states)
        if absent := sorted(leaf for leaf in all_of if any(leaf not in state for state in states)):
            raise ValueError(f"these leaves are not in every state: {', '.join(absent)}")
        if unlike := sorted(n for n in named if len({(state[n].shape, state[n].dtype) for state in states}) > 1):
            raise ValueError(f"these leaves have several shapes or dtypes: {', '.join(unlike)}")
        leaves = [leaf for state in states for leaf in state.items()]
        if wild := sorted({n for n, leaf in leaves if leaf.is_floating_point() and not leaf.isfinite().all()}):
            raise ValueError(f"these leaves are not finite: {', '.join(wild)}")

    def learned(self, replica: str, base: State, state: State) -> dict[str, Part]:
        """What lies between two states, by the first leaf of each rule; empty where it is nothing."""
        found = {key: rule.learned(replica, base, state) for key, rule in self._by_leaf(base).items()}
        parts = {key: part for key, part in found.items() if part is not None}
        return parts if parts.keys() - set(self.local) else {}

    def together(self, like: State, a: Mapping[str, Part], b: Mapping[str, Part]) -> dict[str, Part]:
        """What two replicas learned in the same round; `like` is any state."""
        rules = self._by_leaf(like)
        both = {key: rules[key].together(a[key], b[key]) for key in a.keys() & b.keys()}
        return {**a, **b, **both}

    def onto(self, state: State, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """The state with what was learned put onto it. Leaves about which nothing was learned are the state's own."""
        rules, new = self._by_leaf(state), dict(state)
        for key, part in parts.items():
            new.update(rules[key].onto(state, part))
        return new

    def equal(self, a: State, b: State) -> bool:
        """Whether two states are the same to every replica, bit for bit."""
        return a.keys() == b.keys() and not changed(a.keys() - set(self.local), a, b)

    def _by_leaf(self, state: State) -> dict[str, Rule]:
        rules = {rule.leaves[0]: rule for rule in self.rules}
        named = {leaf for rule in self.rules for leaf in rule.leaves}
        return rules | {name: Latest(name) for name in state if name not in named}


class Contribution(NamedTuple):
    """What a replica has made of a state in one interval."""

    replica: str
    sequence: int  # the interval's number: the same for replicas that learned at the same time
    base: State  # what it learned from, encoded
    state: State  # what came of it, encoded


class Round(NamedTuple):
    """What is remembered of one sequence."""

    sequence: int
    replicas: tuple[str, ...]  # who has contributed, by name
    before: State  # the merged state without this and later rounds
    learned: Mapping[str, Part]  # by all of them together


class Merged(NamedTuple):
    """A stream's state, and what is remembered of how it came about."""

    state: State
    rounds: tuple[Round, ...] = ()  # by sequence

    @property
    def newest(self) -> int | None:
        """The last sequence that is remembered."""
        return self.rounds[-1].sequence if self.rounds else None

    def encode(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors and JSON. The state's leaves keep their names; those of rounds have a slash in them.

        A round's leaves lie end to end, in one tensor for each dtype: a state is many small ones, and each costs time.
        """
        tensors, rounds = dict(self.state), []
        for each in self.rounds:
            where = f"rounds/{each.sequence}"
            tensors |= _packed(f"{where}/before", each.before)
            parts = {}
            for place, (key, part) in enumerate(each.learned.items()):
                tensors |= _packed(f"{where}/learned{place}", part.tensors)
                leaves = {
                    name: [str(leaf.dtype).removeprefix("torch."), *leaf.shape] for name, leaf in part.tensors.items()
                }
                parts[key] = {"replica": part.replica, "leaves": leaves, "numbers": dict(part.numbers)}
            rounds.append({"sequence": each.sequence, "replicas": list(each.replicas), "learned": parts})
        return tensors, {"rounds": rounds}

    @classmethod
    def decode(cls, tensors: State, record: Mapping[str, Any]) -> "Merged":
        """What `encode` gave.

        Raises:
            ValueError: the tensors are not those that the record speaks of.
        """
        state = {name: leaf for name, leaf in tensors.items() if "/" not in name}
        try:
            rounds = tuple(_round(tensors, state, each) for each in record["rounds"])
        except (KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            raise ValueError(f"this is no merged state: {error!r}") from error
        return cls(state, rounds)


def contribute(merging: Merging, merged: Merged, contribution: Contribution, *, window: int) -> Merged:
    """Take a contribution in.

    Args:
        merging: what the leaves mean.
        merged: is left alone.
        contribution: of a sequence that is newer than `newest − window`; an older one is dropped, with what it learned.
        window: sequences that are remembered, the newest included. With 0 only the state is kept: each contribution
            adds up with all others, and the caller must see to it that none comes twice.

    Returns:
        The new merged state; `merged` itself (the same object) where the contribution taught nothing, had been taken
        before or is too old.

    Raises:
        ValueError: the contribution holds NaN or an infinity, or leaves that do not fit; the message names them.
    """
    replica, sequence, base, state = contribution
    merging.check(merged.state, base, state)
    learned = merging.learned(replica, base, state)
    newest = merged.newest
    same = next((each for each in merged.rounds if each.sequence == sequence), None)
    too_old = bool(window) and newest is not None and sequence <= newest - window
    if not learned or too_old or (same and replica in same.replicas):
        return merged
    later = [each for each in merged.rounds if each.sequence > sequence]
    if same:
        both = merging.together(same.before, same.learned, learned)
        new = Round(sequence, tuple(sorted((*same.replicas, replica))), same.before, both)
    else:
        new = Round(sequence, (replica,), later[0].before if later else merged.state, learned)
    if not same and not later and merging.equal(base, merged.state):
        after: State = dict(state)
    else:
        after = merging.onto(new.before, new.learned)
    rounds = [each for each in merged.rounds if each.sequence < sequence] + [new]
    for each in later:
        rounds.append(each._replace(before=after))
        after = merging.onto(after, each.learned)
    last = rounds[-1].sequence
    return Merged(after, tuple(each for each in rounds if each.sequence > last - window))


def rebase(merging: Merging, onto: State, base: State, state: State) -> dict[str, Tensor]:
    """What was learned from `base` to `state`, put onto another state: sums, no averaging.

    Bit for bit `onto` where nothing was learned, and `state` where `onto` is the base.

    Raises:
        ValueError: as of `contribute`.
    """
    merging.check(onto, base, state)
    learned = merging.learned("", base, state)
    if not learned:
        return dict(onto)
    return dict(state) if merging.equal(onto, base) else merging.onto(onto, learned)


def _packed(where: str, leaves: State) -> dict[str, Tensor]:
    """Leaves end to end by name, in one tensor for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for _, leaf in sorted(leaves.items()):  # what is read back comes in another order
        by_dtype.setdefault(leaf.dtype, []).append(leaf.reshape(-1))
    return {f"{where}/{str(dtype).removeprefix('torch.')}": torch.cat(parts) for dtype, parts in by_dtype.items()}


def _unpacked(tensors: State, where: str, like: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
    """What `_packed` laid end to end, by name; `like` gives each dtype and shape."""
    places: dict[str, int] = {}
    found = {}
    for name, (dtype, shape) in sorted(like.items()):
        first = places.get(dtype, 0)
        places[dtype] = first + math.prod(shape)
        found[name] = tensors[f"{where}/{dtype}"][first : places[dtype]].reshape(tuple(shape))
    return found


def _round(tensors: State, state: State, record: Mapping[str, Any]) -> Round:
    where = f"rounds/{record['sequence']}"
    like = {name: (str(leaf.dtype).removeprefix("torch."), leaf.shape) for name, leaf in state.items()}
    learned = {}
    for place, (key, part) in enumerate(record["learned"].items()):
        leaves = {name: (dtype, shape) for name, (dtype, *shape) in part["leaves"].items()}
        unpacked = _unpacked(tensors, f"{where}/learned{place}", leaves)
        learned[key] = Part(part["replica"], unpacked, dict(part["numbers"]))
    return Round(record["sequence"], tuple(record["replicas"]), _unpacked(tensors, f"{where}/before", like), learned)
