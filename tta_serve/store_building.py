"""From settings to the store of one model: which kind it is, and which generation of states belongs to the model."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from adapters import PipelineState, optim, tree
from adapters.merging import Merging
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.durable import Durable
from tta_serve.memory_store import MemoryStore
from tta_serve.metrics import Metrics
from tta_serve.object_store import ObjectStore
from tta_serve.private import make_private
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.states import States
from tta_serve.store import Store
from tta_serve.sync import TICK_S, Sync

log = logging.getLogger(__name__)

URL_TICK_S = 1.0  # between two looks at an object store
STATES_FILE = "states.db"  # below a folder of the model's name


def build_durable(
    settings: ModelSettings,
    store: StoreSettings | None,
    metrics: Metrics,
    generation: str,
    init: PipelineState,
    merging: Merging,
) -> Durable:
    """One replica's side of the store of its model.

    Args:
        settings: of the model.
        store: where states live; None: in this process's memory.
        metrics: of the replica.
        generation: see `generation_of`.
        init: the state of a stream that has learned nothing.
        merging: what its leaves mean.
    """
    return Durable(
        MemoryStore(generation) if store is None else open_store(store, settings.name, generation),
        model=settings.name,
        generation=generation,
        replica=metrics.replica,
        merging=merging,
        init=tree.encode(optim.rest(init)),
        on_refused=lambda _: metrics.count("tta_snapshots_refused_total"),
    )


def build_sync(
    states: States, store: StoreSettings | None, metrics: Metrics, refresh: Callable[[], object] | None = None
) -> Sync | None:
    """What keeps a replica in step with the store; None where states live in memory."""
    if store is None:
        return None
    # an object store wants a fee for each look
    tick_s = min(store.sync_interval_s, URL_TICK_S) if store.is_url else TICK_S
    return Sync(states, store.sync_interval_s, metrics, tick_s=tick_s, refresh=refresh)


def open_store(store: StoreSettings, model: str, generation: str) -> Store:
    """The store of a model. It may be out of reach now: each call tries again.

    Raises:
        ConfigError: states cannot live there.
    """
    if store.is_url:
        return ObjectStore(store.path, model, generation)
    folder = store.folder / model
    try:
        make_private(folder)
    except OSError:
        log.exception("the store's folder %s cannot be made", folder)
    return SQLiteStore(folder / STATES_FILE, model, generation)


def generation_of(tensors: Mapping[str, Tensor], *meaning: object) -> str:
    """A name for all that gives a state its meaning: 16 hexadecimal digits of SHA-256.

    Args:
        tensors: the model's.
        meaning: settings of its adapters, as JSON can write them.
    """
    sha = hashlib.sha256(tree.digest(tuple(tensors[name] for name in sorted(tensors))).encode())
    sha.update(json.dumps([sorted(tensors), *meaning], sort_keys=True, default=str).encode())
    return sha.hexdigest()[:16]


def label_folder(store: StoreSettings, model: str) -> Path:
    """Where what a model was told lies."""
    return store.folder / model
