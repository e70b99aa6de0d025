"""In what order each protocol plays the images, and how they are grouped into requests. Pure; no model, no files.

Images are numbered corruption by corruption: image i of corruption k is `k·N + i`. A *place* is one answer of a run: as
places, a second visit to an image is `K·N` further on, so that every protocol has one answer a place and two methods
can be compared answer by answer, whatever the order in which each was asked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Protocol = Literal[
    "per_shift", "continual", "interleaved", "mixed", "correlated", "batch_of_one", "recurring", "full_rate"
]
Places = NDArray[np.int64]

ONE_STREAM = "all"
VISITS = 3  # of each corruption in `recurring`
RECURRING = ("gaussian_noise", "defocus_blur", "snow")  # the first of noise, of blur and of weather


class Request(NamedTuple):
    """Images that are sent together."""

    stream: str
    places: Places


Round = tuple[Request, ...]  # requests of different streams, all answered before any of them is learned from


class Plan(NamedTuple):
    """What one protocol plays."""

    rounds: list[Round]  # for methods that know no stream ids; a fresh state is a new stream
    rounds_with_ids: list[Round]


class Orders(NamedTuple):
    """What the protocols are made of."""

    corruptions: tuple[str, ...]  # K names
    images: int  # N of each
    batch: int  # images a request, and of a batch of `mixed`
    mixed: Places  # every image once
    correlated: Places  # [N], the order within a corruption


def plan(protocol: Protocol, orders: Orders) -> Plan:
    """The requests of one protocol, in order.

    >>> orders = Orders(("fog", "snow"), images=2, batch=2, mixed=np.array([3, 0, 1, 2]), correlated=np.array([1, 0]))
    >>> [[(r.stream, r.places.tolist()) for r in each] for each in plan("interleaved", orders).rounds_with_ids]
    [[('fog', [0, 1])], [('snow', [2, 3])]]
    >>> [[(r.stream, r.places.tolist()) for r in each] for each in plan("mixed", orders).rounds_with_ids]
    [[('fog', [0]), ('snow', [3])], [('fog', [1]), ('snow', [2])]]
    """
    return _PLANS[protocol](orders)


def places_asked(rounds: Sequence[Round]) -> Places:
    """All places that a run asks for, ascending."""
    return np.sort(np.concatenate([request.places for each in rounds for request in each]))


def by_stream(rounds: Sequence[Round]) -> dict[str, list[list[int]]]:
    """The requests that each stream makes, in its own order."""
    found: dict[str, list[list[int]]] = {}
    for each in rounds:
        for request in each:
            found.setdefault(request.stream, []).append(request.places.tolist())
    return found


def chosen(orders: Orders, corruptions: Sequence[str]) -> Orders:
    """The same orders without the other corruptions, whose images leave gaps that are closed."""
    kept = [k for k, name in enumerate(orders.corruptions) if name in corruptions]
    position = {k: new for new, k in enumerate(kept)}
    mixed = [
        position[k] * orders.images + i
        for k, i in (divmod(int(p), orders.images) for p in orders.mixed)
        if k in position
    ]
    return orders._replace(
        corruptions=tuple(orders.corruptions[k] for k in kept), mixed=np.array(mixed, dtype=np.int64)
    )


def recurring(corruptions: Sequence[str]) -> tuple[str, ...]:
    """A, B and C: `RECURRING`, or the first three where those are not all there."""
    return RECURRING if set(RECURRING) <= set(corruptions) else tuple(corruptions[:3])


def _blocks(orders: Orders) -> dict[str, list[Places]]:
    """The requests of each corruption, its images in order."""
    return {name: _split(_numbers(orders, k), orders.batch) for k, name in enumerate(orders.corruptions)}


def _numbers(orders: Orders, corruption: int) -> Places:
    return corruption * orders.images + np.arange(orders.images)


def _split(places: Places, batch: int) -> list[Places]:
    return np.split(places, range(batch, len(places), batch))


def _same(rounds: list[Round]) -> Plan:
    """Where ids tell no more than the protocol itself does."""
    return Plan(rounds, rounds)


def _per_shift(orders: Orders) -> Plan:
    return _same([(Request(name, places),) for name, several in _blocks(orders).items() for places in several])


def _continual(orders: Orders) -> Plan:
    return _same([(Request(ONE_STREAM, places),) for several in _blocks(orders).values() for places in several])


def _interleaved(orders: Orders) -> Plan:
    """Batch 1 of each corruption in turn, then batch 2 …"""
    turns = list(zip(*_blocks(orders).values(), strict=True))
    names = orders.corruptions
    return Plan(
        [(Request(ONE_STREAM, places),) for turn in turns for places in turn],
        [(Request(name, places),) for turn in turns for name, places in zip(names, turn, strict=True)],
    )


def _mixed(orders: Orders) -> Plan:
    """With ids, each batch falls into one request for every corruption in it, its rows in the batch's order."""
    batches = _split(orders.mixed, orders.batch)
    return Plan(
        [(Request(ONE_STREAM, batch),) for batch in batches], [_by_corruption(batch, orders) for batch in batches]
    )


def _by_corruption(batch: Places, orders: Orders) -> Round:
    of = batch // orders.images
    return tuple(Request(orders.corruptions[k], batch[of == k]) for k in np.unique(of))


def _correlated(orders: Orders) -> Plan:
    return _same(
        [
            (Request(name, places),)
            for k, name in enumerate(orders.corruptions)
            for places in _split(_numbers(orders, k)[orders.correlated], orders.batch)
        ]
    )


def _batch_of_one(orders: Orders) -> Plan:
    """The corruptions side by side, an image of each: they are streams that never meet, and one forward holds them."""
    numbers = [_numbers(orders, k) for k in range(len(orders.corruptions))]
    return _same(
        [
            tuple(Request(name, of[i : i + 1]) for name, of in zip(orders.corruptions, numbers, strict=True))
            for i in range(orders.images)
        ]
    )


def _recurring(orders: Orders) -> Plan:
    blocks, visit = _blocks(orders), len(orders.corruptions) * orders.images
    return _same(
        [
            (Request(ONE_STREAM, places + number * visit),)
            for number in range(VISITS)
            for name in recurring(orders.corruptions)
            for places in blocks[name]
        ]
    )


_PLANS: Mapping[Protocol, Callable[[Orders], Plan]] = {
    "per_shift": _per_shift,
    "continual": _continual,
    "interleaved": _interleaved,
    "mixed": _mixed,
    "correlated": _correlated,
    "batch_of_one": _batch_of_one,
    "recurring": _recurring,
    "full_rate": _continual,
}
PROTOCOLS: tuple[Protocol, ...] = tuple(_PLANS)
