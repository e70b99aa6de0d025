"""What one label costs the counting head beyond the encoder, in process: no server, no disk."""

import time

import numpy as np
import torch
from torch import Tensor

from adapters.heads import Items
from adapters.keys import Keys, KeysConfig, fit_keys
from adapters.kv_bottleneck import Counts, CountsState

CONFIG = KeysConfig(codebooks=256, branches=(16, 4, 4, 4))  # 1,024 keys a codebook
STEPS = ("encode", "learn", "read", "score")


def one_label(taught: Tensor, labels: Tensor, more: Tensor, more_labels: Tensor) -> dict[str, float]:
    """Teach all images one by one, and then time some more.

    Args:
        taught: features of training images, [N, F].
        labels: of these, int64 [N].
        more: features of images that are timed, [M, F]. Keys are made of both, without labels.
        more_labels: of these, int64 [M].

    Returns:
        `one_label_ms/p50`, `one_label_ms/p99`: to encode, learn, read and score one label, in ms; of each of the four
        the median. `pairs_per_label_max`: by how many (codebook, key) pairs with a count one label made a state grow at
        most.
    """
    head = Counts(Keys(fit_keys(torch.cat([taught, more]), CONFIG), CONFIG))
    codes = head.encode(taught)
    state, growth = head.init(), 0
    for place in range(len(taught)):
        before = pairs(state)
        state = head.learn(state, Items(codes[place : place + 1], labels[place : place + 1]))
        growth = max(growth, pairs(state) - before)
    table = head.read(state)
    head.score(table, head.encode(more[:1]))  # what torch prepares at its first call
    steps_s = []
    for place in range(len(more)):
        times_s = [time.perf_counter()]
        code = head.encode(more[place : place + 1])
        times_s.append(time.perf_counter())
        state = head.learn(state, Items(code, more_labels[place : place + 1]))
        times_s.append(time.perf_counter())
        table = head.read(state, table)
        times_s.append(time.perf_counter())
        head.score(table, code)
        times_s.append(time.perf_counter())
        steps_s.append(np.diff(times_s))
    steps_ms = 1000 * np.array(steps_s)  # [M, 4]
    found = {f"one_label_ms/{step}": float(np.median(ms)) for step, ms in zip(STEPS, steps_ms.T, strict=True)}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        found[f"one_label_ms/{name}"] = float(np.quantile(steps_ms.sum(axis=1), quantile))
    return found | {"pairs_per_label_max": float(growth)}


def pairs(state: CountsState) -> int:
    """Counts that are not zero: of all classes, how many (codebook, key) pairs each of them has met."""
    return sum(len(each.cells) for each in state.classes)
