"""The server that `incremental.py` starts where none is named."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.incremental_images import Material
from loadtests.server import own_server

START_MAX_S = 900.0  # each model makes its keys of 2,000 images first

# Of the server's memory allocator. A forward's tensors are too large for its pool by default: they are given back to
# the system after every layer and have to be zeroed again. Measured at 64 images of 128×128 pixels: 3 times faster.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


def own_models(heads: Sequence[str], material: Material, prior: Path | None) -> list[dict[str, Any]]:
    """The entries of `models:` of the script's own server.

    Args:
        heads: which.
        material: what they will see.
        prior: images without labels that keys are made of; None: digits, which the model brings along.
    """
    entry: dict[str, Any] = {"source": {"builtin": "digits"}}
    if prior:
        entry = {
            "source": {"builtin": "efficientnet-lite0"},
            "input": {"size": [material.side, material.side]},
            "prior": str(prior),
        }
    # one head is measured at a time, so that each may have all cores
    entry["threads"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"name": head, **entry, "adapter": {"kv_bottleneck": {"head": head, "answers": "head"}}} for head in heads]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that the block starts; those that are set already stay."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del os.environ[name]


@contextmanager
def server(models: Callable[[Path], Sequence[dict[str, Any]]], material: Material) -> Iterator[str]:
    """Run a server of the script's own, with the unlabelled images beside it.

    Args:
        models: the entries of `models:`, given the file of these.
        material: the images.
    """
    with tempfile.TemporaryDirectory(prefix="tta-loadtest-") as folder:
        prior = Path(folder) / "unlabelled.npz"
        np.savez(prior, images=material.unlabelled)
        with environment(MALLOC), own_server(models(prior), start_max_s=START_MAX_S) as url:
            yield url
