"""What a run did to the model's answers on clean images: forgetting and source mismatch.

*Forgetting* is the error of the learned scales and shifts on the probe minus that of the source's, both under the
probe's own batch statistics in the same batches: what the parameters lost, whatever the statistics are. *Source
mismatch* is the error of the whole state on the probe; it is large where a state fits another distribution well.
Both are means over the streams that a run leaves behind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapters import Groups, Network
from loadtests.protocol_methods import FaithfulEATA, under_own_statistics
from loadtests.protocol_served import Served
from loadtests.replay_eata import normalised

PROBE_BATCH = 200  # images whose statistics are taken together

Wrong = NDArray[np.float64]  # by image of the probe, [N]: 1 where wrong; of several streams, the share that is


class Probe(NamedTuple):
    """Answers to the clean images, after a run."""

    learned: Wrong  # with what was learned, mean over the streams
    source: Wrong  # with the source's parameters
    state: Wrong  # with the whole state, mean over the streams


def of_eata(run: FaithfulEATA, labels: NDArray[np.int64]) -> Probe:
    """EATA keeps no statistics: with the probe's own, its whole state is its parameters."""
    network = run.pipeline.network
    batches = _batches(normalised(run.images.clean))
    learned = _mean([wrong(network, state.norm.params, batches, labels) for state in run.states.values()])
    return Probe(learned, wrong(network, source_params(network), batches, labels), learned)


def of_served(run: Served, streams: Sequence[str], labels: NDArray[np.int64]) -> Probe:
    """The default after a run of these streams."""
    network = run.network
    batches = _batches(run.inputs(run.images.clean))
    by_state = [np.concatenate([run.label_by_state(stream, x) for x in batches]) for stream in streams]
    return Probe(
        learned=_mean([wrong(network, run.params(stream), batches, labels) for stream in streams]),
        source=wrong(network, source_params(network), batches, labels),
        state=_mean([(answers != labels).astype(float) for answers in by_state]),
    )


def wrong(network: Network, params: Tensor, batches: Sequence[Tensor], labels: NDArray[np.int64]) -> Wrong:
    """Which images scales and shifts get wrong, each batch under its own statistics."""
    answers = [under_own_statistics(network, params, x, Groups.of((len(x),))).argmax(1).numpy() for x in batches]
    return (np.concatenate(answers) != labels).astype(float)


def source_params(network: Network) -> Tensor:
    return torch.cat([network.scale, network.shift])


def _batches(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, PROBE_BATCH)


def _mean(by_stream: Sequence[Wrong]) -> Wrong:
    mean: Wrong = np.mean(by_stream, axis=0)
    return mean
