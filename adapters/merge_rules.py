"""What a leaf of a state means when two replicas have changed it: rules, of which an adapter chooses.

Replicas that learn from the same state leave it in different directions. What one has learned is taken apart, rule by
rule, into *parts*: what is new, free of what it stood on. Parts of one round are brought together, and put onto what
the state is by then. States are encoded (`tree.encode`), on the CPU; sums are in float64, parts in their leaf's dtype.

    rule       leaves                            together                          onto a state x
    Steps      parameters                        δ = Σ nᵢδᵢ / Σ nᵢ                 x + δ
    Averages   moving means                      v = Σ nᵢvᵢ / Σ nᵢ                 v
    Totals     counts                            Σ growthᵢ                         x + growth
    Pooled     moments, and the images behind    discounts add, new images pool    x discounted, and new images pooled
    Fading     moving means with known weights   Σ (1 − kᵢ) fᵢ / Σ (1 − kᵢ)        K x + (1 − K) f,  K = Π kᵢ
    Latest     everything else                   the largest replica's name        its value

References:
    Chan, Golub & LeVeque 1979 for the pooling of means and variances.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

State = Mapping[str, Tensor]

DISCOUNT_MAX = 64.0  # nats a step: of an image so discounted, 1e-28 is left
ROUNDING = 1e-4  # share of a fading mean that float32 may lose in many small steps
NEW_SHARE_MIN = 1e-5  # new images below this share of all are the rounding of float32 and no images


def discount(images: Tensor, left: Tensor) -> Tensor:
    """By how much the images behind some moments were discounted, −ln(left/images), nats, float64; 0 where none were.

    >>> discount(torch.tensor([8.0, 8.0, 0.0]), torch.tensor([8.0, 4.0, 0.0]))
    tensor([0.0000, 0.6931, 0.0000], dtype=torch.float64)
    """
    loss = images.double().log() - left.double().log()
    return torch.where(images > 0, loss, 0.0).clamp(min=0, max=DISCOUNT_MAX)


class Part(NamedTuple):
    """What was learned about the leaves of one rule, free of what it was learned from."""

    replica: str  # whose it is; of several: the largest name
    tensors: State  # by leaf, in the leaf's dtype
    numbers: Mapping[str, float]  # by leaf: what the rule weighs its tensors by


class Rule(Protocol):
    """What some leaves mean; three pure functions, of which `together` may take its arguments in either order."""

    @property
    def leaves(self) -> tuple[str, ...]: ...

    def below(self, prefix: str) -> "Rule":
        """The same rule where the state is the field `prefix` of another."""
        ...

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        """What lies between two states; None where it is nothing."""
        ...

    def together(self, a: Part, b: Part) -> Part:
        """What two replicas learned at the same time, as one part."""
        ...

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:
        """The new values of the rule's leaves."""
        ...


class Steps(NamedTuple):
    """Parameters: replicas' steps are averaged by the rows they were taken on, so that nobody goes twice the way.

    >>> rule = Steps(("w",), by="n")
    >>> base = {"w": torch.tensor(1.0), "n": torch.tensor(0)}
    >>> a = rule.learned("a", base, {"w": torch.tensor(2.0), "n": torch.tensor(30)})
    >>> b = rule.learned("b", base, {"w": torch.tensor(5.0), "n": torch.tensor(10)})
    >>> rule.onto(base, rule.together(a, b))  # 1 + (30 · 1 + 10 · 4) / 40
    {'w': tensor(2.7500)}
    """

    names: tuple[str, ...]
    by: str  # the counter whose growth weighs; where it did not grow and a parameter did, that counts as 1

    @property
    def leaves(self) -> tuple[str, ...]:
        return self.names

    def below(self, prefix: str) -> "Steps":
        return Steps(below(prefix, self.names), f"{prefix}.{self.by}")

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        rows = _growth(self.by, base, state)
        if not rows and not changed(self.names, base, state):
            return None
        steps = {name: _as(base[name], state[name].double() - base[name].double()) for name in self.names}
        return Part(replica, steps, {self.names[0]: max(rows, 1.0)})

    def together(self, a: Part, b: Part) -> Part:
        first = self.names[0]
        return Part(
            max(a.replica, b.replica),
            {name: _mean(a.tensors[name], a.numbers[first], b.tensors[name], b.numbers[first]) for name in self.names},
            {first: a.numbers[first] + b.numbers[first]},
        )

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:
        return {name: _as(state[name], state[name].double() + part.tensors[name].double()) for name in self.names}


class Averages(NamedTuple):
    """Moving means: of one round, the mean of those that moved; of several rounds, the latest.

    A mean that did not move does not weigh, whatever was seen: it may be unknown (zeros). Values are averaged and not
    differences, so that probabilities stay probabilities.

    >>> rule = Averages(("p",), by="n")
    >>> base = {"p": torch.zeros(2), "n": torch.tensor(0)}
    >>> a = rule.learned("a", base, {"p": torch.tensor([0.25, 0.75]), "n": torch.tensor(30)})
    >>> rule.learned("b", base, {"p": torch.zeros(2), "n": torch.tensor(10)}) is None
    True
    >>> rule.onto(base, a)
    {'p': tensor([0.2500, 0.7500])}
    """

    names: tuple[str, ...]
    by: str  # as of `Steps`

    @property
    def leaves(self) -> tuple[str, ...]:
        return self.names

    def below(self, prefix: str) -> "Averages":
        return Averages(below(prefix, self.names), f"{prefix}.{self.by}")

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        rows = max(_growth(self.by, base, state), 1.0)
        moved = [name for name in self.names if changed((name,), base, state)]
        return Part(replica, {name: state[name] for name in moved}, dict.fromkeys(moved, rows)) if moved else None

    def together(self, a: Part, b: Part) -> Part:
        means = {**a.tensors, **b.tensors}
        for name in a.tensors.keys() & b.tensors.keys():
            means[name] = _mean(a.tensors[name], a.numbers[name], b.tensors[name], b.numbers[name])
        return Part(max(a.replica, b.replica), means, {n: a.numbers.get(n, 0) + b.numbers.get(n, 0) for n in means})

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:
        return {name: _as(state[name], mean.double()) for name, mean in part.tensors.items()}


class Totals(NamedTuple):
    """Counts: what each replica has counted adds up, exactly.

    >>> rule = Totals(("n",))
    >>> a = rule.learned("a", {"n": torch.tensor(5)}, {"n": torch.tensor(7)})
    >>> rule.onto({"n": torch.tensor(100)}, rule.together(a, a))
    {'n': tensor(104)}
    """

    names: tuple[str, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        return self.names

    def below(self, prefix: str) -> "Totals":
        return Totals(below(prefix, self.names))

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        if not changed(self.names, base, state):
            return None
        return Part(replica, {name: state[name] - base[name] for name in self.names}, {})

    def together(self, a: Part, b: Part) -> Part:
        return Part(max(a.replica, b.replica), {name: a.tensors[name] + b.tensors[name] for name in self.names}, {})

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:
        return {name: state[name] + part.tensors[name] for name in self.names}


class Pooled(NamedTuple):
    """Moments of images, where the past may be discounted, and never counts for more than `images_max`.

    Of a base's N0 images a state of N has kept k·N0, with −ln k the growth of its `discount`; the others are new:

        F = N − k N0     F·mean = N·mean₁ − k N0·mean₀     and so for the squares.

    Replicas' new images are pooled, their discounts multiply (each has seen evidence against the past that the others
    have not), and the cap comes last. The discount grows by what the cap takes as well, as it does in the adapter.
    """

    mean: str
    var: str  # biased
    images: str  # behind the two, N; a scalar
    discount: str  # of the images so far, Σ −ln of all factors, nats, float64; a scalar: see `discount` above
    images_max: float

    @property
    def leaves(self) -> tuple[str, ...]:
        return (self.mean, self.var, self.images, self.discount)

    def below(self, prefix: str) -> "Pooled":
        mean, var, images, discounted = below(prefix, self.leaves)
        return Pooled(mean, var, images, discounted, self.images_max)

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        if not changed(self.leaves, base, state):
            return None
        loss = max(0.0, float(state[self.discount]) - float(base[self.discount]))
        before, after = float(base[self.images]), float(state[self.images])
        past = math.exp(-loss) * before
        new = after - past
        old = base[self.mean].double()
        mean, var = old, torch.zeros_like(base[self.var].double())
        if new > NEW_SHARE_MIN * after:
            # about the base's mean, which is near: sums about 0 would cancel
            moved = state[self.mean].double() - old
            shift = after * moved / new
            squares = after * (state[self.var].double() + moved.square()) - past * base[self.var].double()
            mean, var = old + shift, squares / new - shift.square()
        else:
            new = 0.0
        tensors = {self.mean: _as(base[self.mean], mean), self.var: _as(base[self.var], var)}
        return Part(replica, tensors, {self.images: new, self.discount: loss})

    def together(self, a: Part, b: Part) -> Part:
        images = a.numbers[self.images] + b.numbers[self.images]
        mean, var = self._pool(a.tensors, a.numbers[self.images], b.tensors, b.numbers[self.images])
        loss = a.numbers[self.discount] + b.numbers[self.discount]
        tensors = {self.mean: _as(a.tensors[self.mean], mean), self.var: _as(a.tensors[self.var], var)}
        return Part(max(a.replica, b.replica), tensors, {self.images: images, self.discount: loss})

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:
        loss, new = part.numbers[self.discount], part.numbers[self.images]
        past = math.exp(-loss) * float(state[self.images])
        total = past + new
        kept = min(total, self.images_max)
        if total > 0:
            loss += min(-math.log(kept / total) if kept > 0 else DISCOUNT_MAX, DISCOUNT_MAX)
        mean, var = self._pool(state, past, part.tensors, new)
        values = {self.mean: mean, self.var: var.clamp(min=0)}  # rounding
        values[self.images] = torch.tensor(kept, dtype=torch.float64)
        values[self.discount] = state[self.discount].double() + loss
        return {name: _as(state[name], value) for name, value in values.items()}

    def _pool(self, a: State, a_images: float, b: State, b_images: float) -> tuple[Tensor, Tensor]:
        share = b_images / (a_images + b_images) if a_images + b_images else 0.0
        mean, var = a[self.mean].double(), a[self.var].double()
        between = b[self.mean].double() - mean
        pooled = (1 - share) * var + share * b[self.var].double() + share * (1 - share) * between.square()
        return mean + share * between, pooled


class Fading(NamedTuple):
    """Moving means, from zeros, of what is never negative, which n more rows let fade by `k = exp(−n/memory_rows)`.

    So what a replica took in is `f = (v₁ − k v₀) / (1 − k)`, and merged means weigh `1 − exp(−rows/memory_rows)` as one
    replica's do. Means that changed while their count has not grown, and means below what fading leaves of them, were
    begun anew, from zeros: then all that was before is forgotten.
    """

    names: tuple[str, ...]
    rows: str  # how many were taken in since zeros; int64, a scalar
    memory_rows: float

    @property
    def leaves(self) -> tuple[str, ...]:
        return (self.rows, *self.names)

    def below(self, prefix: str) -> "Fading":
        return Fading(below(prefix, self.names), f"{prefix}.{self.rows}", self.memory_rows)

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        if not changed(self.leaves, base, state):
            return None
        before, after = int(base[self.rows]), int(state[self.rows])
        kept = math.exp(-max(after - before, 0) / self.memory_rows)
        less = (state[name].double() < kept * (1 - ROUNDING) * base[name].double() for name in self.names)
        anew = after <= before or any(bool(each.any()) for each in less)
        rows, kept = (after, 0.0) if anew else (after - before, kept)
        weight, tensors = self._weight(rows), {}
        for name in self.names:
            taken = state[name].double() - kept * base[name].double()
            tensors[name] = _as(base[name], taken / weight if weight else torch.zeros_like(taken))
        return Part(replica, tensors, {self.rows: rows, "weight": weight, "anew": float(anew)})

    def together(self, a: Part, b: Part) -> Part:
        of_a, of_b = a.numbers["weight"], b.numbers["weight"]
        tensors = {name: _mean(a.tensors[name], of_a, b.tensors[name], of_b) for name in self.names}
        rows, anew = a.numbers[self.rows] + b.numbers[self.rows], max(a.numbers["anew"], b.numbers["anew"])
        return Part(max(a.replica, b.replica), tensors, {self.rows: rows, "weight": of_a + of_b, "anew": anew})

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:
        rows, anew = part.numbers[self.rows], bool(part.numbers["anew"])
        weight = self._weight(rows)
        kept = 0.0 if anew else 1 - weight
        values = {name: kept * state[name].double() + weight * part.tensors[name].double() for name in self.names}
        count = int(rows) + (0 if anew else int(state[self.rows]))
        found = {name: _as(state[name], value.clamp(min=0)) for name, value in values.items()}
        return {self.rows: torch.full_like(state[self.rows], count), **found}

    def _weight(self, rows: float) -> float:
        return -math.expm1(-rows / self.memory_rows)


class Latest(NamedTuple):
    """A value that stands for itself: of the latest contribution that changed it; in one round, of the largest name."""

    name: str

    @property
    def leaves(self) -> tuple[str, ...]:
        return (self.name,)

    def below(self, prefix: str) -> "Latest":
        return Latest(f"{prefix}.{self.name}")

    def learned(self, replica: str, base: State, state: State) -> Part | None:
        return Part(replica, {self.name: state[self.name]}, {}) if changed((self.name,), base, state) else None

    def together(self, a: Part, b: Part) -> Part:
        return max(a, b, key=lambda part: part.replica)

    def onto(self, state: State, part: Part) -> dict[str, Tensor]:  # noqa: ARG002
        return dict(part.tensors)


def below(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def changed(names: Iterable[str], base: State, state: State) -> bool:
    """Whether any of these leaves differs between two states."""
    return any(base[n].dtype != state[n].dtype or not torch.equal(base[n], state[n]) for n in names)


def _growth(counter: str, base: State, state: State) -> float:
    """What a count has grown by; 0 where it was begun anew."""
    return max(0.0, float(state[counter]) - float(base[counter]))


def _mean(a: Tensor, of_a: float, b: Tensor, of_b: float) -> Tensor:
    """The weighted mean, in the tensors' dtype; zeros weigh nothing, and two of weight 0 give `a`."""
    share = of_b / (of_a + of_b) if of_a + of_b else 0.0
    return _as(a, a.double() * (1 - share) + b.double() * share)


def _as(like: Tensor, value: Tensor) -> Tensor:
    return value.to(like.dtype)
