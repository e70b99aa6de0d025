"""Which faults befall the server, in which order and for how long: drawn from a seed."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Kind = Literal["replica", "full_disk", "no_folder", "locked", "haproxy", "node"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KILLS: tuple[Kind, ...] = ("replica", "haproxy", "node")
OUTAGES: tuple[Kind, ...] = ("haproxy", "node")  # nobody can answer meanwhile: printed, not counted as failure
LEARNING_ENDS: tuple[Kind, ...] = ("replica", "node")  # what was not yet stored is lost

WEIGHTS: dict[Kind, int] = {"replica": 10, "full_disk": 6, "no_folder": 5, "locked": 5, "haproxy": 3, "node": 1}
LASTS_S = (4.0, 7.0)  # a fault of the store: beyond what a replica waits for it, and within its lease
PAUSE_S = (2.0, 5.0)  # before a fault: more than a sync interval, so that each is judged for itself


class Fault(NamedTuple):
    """What is done to the server."""

    kind: Kind
    pause_s: float  # of undisturbed traffic before it
    lasts_s: float  # 0: a kill
    chance: float  # 0 … 1: whom it hits


def draw(count: int, seed: int, kinds: Sequence[Kind] = KINDS) -> list[Fault]:
    """Faults in the order in which they come. Each kind has its share by weight, to the nearest whole number.

    Args:
        count: how many.
        seed: same seed, same faults.
        kinds: to draw from.

    >>> [fault.kind for fault in draw(4, 0, ["replica", "locked"])].count("replica")
    3
    """
    generator = np.random.default_rng(seed)
    drawn = [kind for kind, each in shares(count, kinds).items() for _ in range(each)]
    faults = []
    for place in generator.permutation(len(drawn)):
        kind = drawn[place]
        pause_s, lasts_s, chance = generator.uniform(*PAUSE_S), generator.uniform(*LASTS_S), generator.uniform()
        faults.append(Fault(kind, float(pause_s), 0.0 if kind in KILLS else float(lasts_s), float(chance)))
    return faults


def shares(count: int, kinds: Sequence[Kind] = KINDS) -> dict[Kind, int]:
    """How many of each kind: by the largest remainders.

    >>> shares(30)
    {'replica': 10, 'full_disk': 6, 'no_folder': 5, 'locked': 5, 'haproxy': 3, 'node': 1}
    """
    total = sum(WEIGHTS[kind] for kind in kinds)
    whole: dict[Kind, int] = {kind: count * WEIGHTS[kind] // total for kind in kinds}
    remainders = sorted(kinds, key=lambda kind: count * WEIGHTS[kind] % total, reverse=True)
    for kind in remainders[: count - sum(whole.values())]:
        whole[kind] += 1
    return whole
