"""The methods that the server is compared with: the frozen model, batch statistics, and EATA as published.

Each answers a round of requests and then learns from it. EATA keeps one state for each stream name that it is given, so
"a state per stream id" is the same method that is told the ids.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from adapters import (
    EATA,
    Batch,
    EATAPrior,
    Groups,
    Modulation,
    Network,
    Pipeline,
    PipelineState,
    anchors,
    tree,
)
from adapters.norm import Statistics
from loadtests import cifar, resnet20
from loadtests.protocol_images import Images
from loadtests.protocol_orders import Round
from loadtests.replay_eata import CONFIG, normalised

Labels = NDArray[np.int64]


class Method(Protocol):
    """What plays a protocol."""

    def answer(self, requests: Round) -> list[Labels]:
        """Labels of each request; they may come in one forward, since no answer depends on another request."""
        ...

    def learn(self, requests: Round) -> None:
        """Learn from the requests that were answered last."""
        ...


class Frozen:
    """The network as it was trained."""

    def __init__(self, network: Network, images: Images) -> None:
        self.network = network
        self.images = images

    @torch.no_grad()
    def answer(self, requests: Round) -> list[Labels]:
        x, groups = batch(requests, self.images)
        return _split(self.network(x).logits, groups)

    def learn(self, requests: Round) -> None:
        """Nothing to learn."""


class BatchStatistics:
    """The source's scale and shift under each request's own statistics."""

    def __init__(self, network: Network, images: Images) -> None:
        self.network = network
        self.images = images
        self._params = torch.cat([network.scale, network.shift])

    def answer(self, requests: Round) -> list[Labels]:
        x, groups = batch(requests, self.images)
        return _split(under_own_statistics(self.network, self._params, x, groups), groups)

    def learn(self, requests: Round) -> None:
        """Nothing to learn."""


class FaithfulEATA:
    """EATA as published (Niu et al., arXiv 2204.02610): one request, one batch, one step, and one state a stream.

    Args:
        pipeline: with `adapters.EATA` in the authors' configuration.
        images: where requests find their rows.
    """

    def __init__(self, pipeline: Pipeline, images: Images) -> None:
        self.pipeline = pipeline
        self.images = images
        self.states: dict[str, PipelineState] = {}

    @torch.no_grad()
    def answer(self, requests: Round) -> list[Labels]:
        x, groups = batch(requests, self.images)
        return _split(self.pipeline.predict(self._table(requests), groups.index, groups, x).logits, groups)

    @torch.no_grad()
    def learn(self, requests: Round) -> None:
        """A step of every stream, in one backward: each ends where it would end alone (law 2 of adapters/base.py)."""
        x, groups = batch(requests, self.images)
        new, _ = self.pipeline.adapt(self._table(requests), groups.index, Batch(x, groups, torch.ones(len(x))))
        for number, request in enumerate(requests):
            self.states[request.stream] = tree.row(new, number)

    def _table(self, requests: Round) -> PipelineState:
        """One row a request: the requests of a round are of different streams."""
        return tree.stack([self.states.get(request.stream) or self.pipeline.init() for request in requests])


def batch(requests: Round, images: Images) -> tuple[Tensor, Groups]:
    """The rows of a round, [B, 3, H, W] as the network reads them."""
    x = normalised(np.concatenate([images.at(request.places) for request in requests]))
    return x, Groups.of(tuple(len(request.places) for request in requests))


@torch.no_grad()
def under_own_statistics(network: Network, params: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """Logits [B, C] with the scales and shifts `params` [2 P], every request normalised by its own statistics."""
    scale, shift = params.unsqueeze(0).chunk(2, dim=1)
    rows = torch.zeros_like(groups.index)
    return network(x, Modulation(scale, shift, scale, shift, rows, groups, Statistics.OWN)).logits


def faithful_pipeline(data: Path) -> Pipeline:
    """ResNet-20 with EATA and the Fisher diagonal of its first source images, as the authors' code was run."""
    model = resnet20.build()
    model.load_state_dict(load_file(cifar.existing(data, "resnet20.safetensors")))
    network = Network(model)
    source = torch.split(normalised(cifar.images(data, "source")[: cifar.FISHER_IMAGES]), cifar.FISHER_BATCH)
    prior = EATAPrior(anchors.fisher_diagonal(network, source))
    return Pipeline(network, norm=EATA(network, len(cifar.LABELS), prior, CONFIG))


def play(method: Method, rounds: Iterable[Round], places: int) -> Labels:
    """Answer and learn, round after round.

    Args:
        method: what plays.
        rounds: in order.
        places: number of places, V·K·N.

    Returns:
        The answer at each place, −1 where none was asked for.
    """
    answers = np.full(places, -1)
    for requests in rounds:
        keep(answers, requests, method.answer(requests))
        method.learn(requests)
    return answers


def keep(answers: Labels, requests: Round, given: Sequence[Labels]) -> None:
    """Put what was answered at its places."""
    for request, labels in zip(requests, given, strict=True):
        answers[request.places] = labels


def _split(logits: Tensor, groups: Groups) -> list[Labels]:
    labels = logits.argmax(dim=1).numpy()
    return np.split(labels, np.cumsum(groups.sizes)[:-1])
