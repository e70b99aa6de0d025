"""10,000 streams in process: they learn, and are attached from the working set and from the store.

The engine is the server's own, as `tta_serve.building` makes it from a configuration.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tta_serve.building import build_engine
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.engine import Engine, Query
from tta_serve.states import States
from tta_serve.store_building import STATES_FILE

FORWARD_STREAMS = 64  # of one forward, and of one step
ROWS = 2  # images that each stream learned from


class Attached(NamedTuple):
    """Seconds of each attaching."""

    working_set: NDArray[np.float64]
    store: NDArray[np.float64]


class Memory(NamedTuple):
    """What a stream costs."""

    state_bytes: float  # of its state in the table
    records: int  # streams that the process has at hand, after all were attached once


class Disk(NamedTuple):
    """The database, with its log."""

    bytes: int
    learned: int  # streams in it that have learned something


def settings(name: str, resident: int, streams_max: int) -> dict[str, Any]:
    """One entry of `models:`: the built-in digits model, whose every image teaches."""
    return {
        "name": name,
        "source": {"builtin": "digits"},
        "adaptation": {"gate": False},
        "streams": {"max": streams_max, "resident": resident, "new_per_minute": 10**9},
    }


def open_engine(model: dict[str, Any], folder: Path) -> Engine:
    """The engine over the store in this folder."""
    engine, _ = build_engine(ModelSettings.model_validate(model), store=StoreSettings(path=str(folder)))
    return engine


def database(folder: Path, model: str) -> Path:
    return folder / model / STATES_FILE


def names(count: int) -> list[str]:
    """Of the streams."""
    return [f"camera-{number:05}" for number in range(count)]


def populate(engine: Engine, streams: Sequence[str], images: NDArray[np.uint8], told: Callable[[int], None]) -> None:
    """Let every stream learn from images of its own choice, and give it to the store.

    Args:
        engine: over a store.
        streams: their names.
        images: to choose from, [N, 3, H, W].
        told: how many are done.
    """
    generator = np.random.default_rng(0)
    for first in range(0, len(streams), FORWARD_STREAMS):
        several = streams[first : first + FORWARD_STREAMS]
        queries = [
            Query(torch.from_numpy(images[generator.choice(len(images), ROWS, replace=False)]), stream)
            for stream in several
        ]
        engine.learn([lesson for _, lesson in engine.predict(queries)])
        engine.streams.flush()
        told(first + len(several))


def attach(states: States, streams: Sequence[str]) -> NDArray[np.float64]:
    """Seconds from a stream's name to its row being held for an answer, for each."""
    took_s = []
    for stream in streams:
        began_s = time.perf_counter()
        states.begin(stream)
        with states.answering([stream]):
            took_s.append(time.perf_counter() - began_s)
    return np.array(took_s)


def measure(states: States, streams: Sequence[str], seed: int = 0) -> tuple[Attached, Memory]:
    """Attach all streams in a random order, and those that came last once more.

    Args:
        states: nothing of which is at hand.
        streams: that the store has.
        seed: of the order.
    """
    shuffled = random.Random(seed).sample(list(streams), len(streams))
    first, rest = shuffled[: states.resident], shuffled[states.resident :]
    from_store = attach(states, first)
    state_bytes = states.bytes() / len(first)
    from_store = np.concatenate([from_store, attach(states, rest)])  # each makes room for itself
    at_hand = shuffled[-states.resident // 2 :]
    missing = [stream for stream in at_hand if states.find(stream) is None]
    assert not missing  # the last half of what fits
    repeated = at_hand * -(-len(streams) // len(at_hand))
    attached = Attached(attach(states, repeated[: len(streams)]), from_store)
    return attached, Memory(state_bytes, len(states.names()))


def disk(folder: Path, model: str, engine: Engine, streams: Sequence[str]) -> Disk:
    """What lies on the disk; each stream is asked for in the store itself."""
    found = sum(path.stat().st_size for path in database(folder, model).parent.glob(f"{STATES_FILE}*"))
    heads = (engine.streams.durable.store.load(stream) for stream in streams)
    return Disk(found, sum(head is not None and head.snapshot is not None for head in heads))
