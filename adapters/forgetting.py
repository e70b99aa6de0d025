"""Forgetting: what the learned parameters lost on images of the source, by themselves.

The stream's statistics take no part in it, for they are *meant* to be another distribution's: learned and source
parameters see the same batches of a probe, each under the batch's own statistics. The error of the whole stream state
on the probe is `source_mismatch`, naturally large, and no guard.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters import tree
from adapters.base import Groups, NormAdapter, Pipeline
from adapters.norm import Network, Statistics
from adapters.source import Source, SourceState


class Probe(NamedTuple):
    """Images of the source whose answers are known."""

    x: Tensor  # [N, …]
    labels: Tensor  # int64 [N]


def unlabelled_probe(network: Network, x: Tensor, batch_rows: int = 200) -> Probe:
    """A probe of images without labels: the frozen network's own answers count as right.

    Forgetting is then how much less the learned parameters agree with it than the source's do, under the same batch
    statistics.
    """
    with torch.no_grad():
        return Probe(x, torch.cat([network(part).logits.argmax(dim=1) for part in _parts(x, batch_rows)]))


class Forgot(NamedTuple):
    """What learned parameters lost on the probe, for each of S states."""

    points: Tensor  # error added, as a share: 0.01 is one point in a hundred; below 0 where they are better, [S]
    standard_error: Tensor  # of `points`, from the differences of single images, [S]


class Forgetting:
    """Error of the learned parameters on the probe, less that of the source's, under the probe's own batch statistics.

    Both see the same batches, so the difference is paired; the stream's statistics take no part in it. The source's
    answers are computed once, here; the forwards hold one batch at a time, one stream after the other.

    Args:
        network: the frozen network.
        probe: at least two images.
        batch_rows: of one forward, about; batches are of nearly the same size.

    Raises:
        ValueError: the probe has fewer than two images.
    """

    def __init__(self, network: Network, probe: Probe, batch_rows: int = 200) -> None:
        if len(probe.x) < 2:
            raise ValueError(f"a probe needs at least two images, not {len(probe.x)}")
        self.network = network
        self.probe = probe
        self.batch_rows = batch_rows
        self.source_wrong = self._wrong(Source(network), SourceState())

    @torch.no_grad()
    def measure(self, adapter: NormAdapter[Any], states: Any) -> Forgot:
        """One pass over the probe for each state of the table; a table without tensors counts as one state."""
        lengths = [len(leaf) for _, leaf in tree.leaves(states)]
        count = lengths[0] if lengths else 1
        found = [self._wrong(adapter, _row_as_table(states, number)) for number in range(count)]
        return paired_difference(torch.stack(found), self.source_wrong)

    @torch.no_grad()
    def _wrong(self, adapter: NormAdapter[Any], state: Any) -> Tensor:
        """Which of the probe's images a state, a table of one, answers wrongly; bool [N]."""
        answers = []
        for x in _parts(self.probe.x, self.batch_rows):
            rows, groups = torch.zeros(len(x), dtype=torch.int64, device=x.device), Groups.of((len(x),), x.device)
            told = adapter.modulate(state, rows, groups)._replace(statistics=Statistics.OWN, evidence=None)
            answers.append(self.network(x, told).logits.argmax(dim=1))
        return torch.cat(answers) != self.probe.labels


def paired_difference(wrong: Tensor, source_wrong: Tensor) -> Forgot:
    """The difference of two errors on the same N images, and its standard error.

    Args:
        wrong: bool [S, N].
        source_wrong: bool [N].

    >>> paired_difference(torch.tensor([[True, True, False, False]]), torch.tensor([True, False, False, False]))
    Forgot(points=tensor([0.2500]), standard_error=tensor([0.2500]))
    """
    difference = wrong.to(torch.float32) - source_wrong.to(torch.float32)
    return Forgot(difference.mean(dim=1), difference.std(dim=1) / math.sqrt(difference.shape[1]))


def forgets(forgot: Forgot, forgetting_max: float) -> Tensor:
    """Whether the guard `FORGETTING` trips, bool [S]: the lower 95 % bound of what was lost lies above the limit."""
    return forgot.points - 1.645 * forgot.standard_error > forgetting_max


@torch.no_grad()
def source_mismatch(pipeline: Pipeline, states: Any, probe: Probe, batch_rows: int = 200) -> Tensor:
    """Error of whole stream states on the probe: their statistics are taken as known, and the probe's own unused.

    Large where adaptation works; a figure, never a guard.

    Returns:
        A share between 0 and 1, [S]; a table without tensors counts as one state.
    """
    lengths = [len(leaf) for _, leaf in tree.leaves(states)]
    errors = []
    for number in range(lengths[0] if lengths else 1):
        state, wrong = _row_as_table(states, number), []
        for x, labels in zip(_parts(probe.x, batch_rows), _parts(probe.labels, batch_rows), strict=True):
            rows, groups = torch.zeros_like(labels), Groups.of((len(x),), x.device)
            seen = pipeline.input.transform(state.input, rows, x) if pipeline.input else x
            told = pipeline.norm.modulate(state.norm, rows, groups) if pipeline.norm else None
            known = told._replace(statistics=Statistics.KNOWN, evidence=None) if told else None
            output = pipeline.network(seen, known)
            logits = output.logits
            if pipeline.head:
                logits = pipeline.head.score(state.head, rows, output.features, logits)
            wrong.append(logits.argmax(dim=1) != labels)
        errors.append(torch.cat(wrong).to(torch.float32).mean())
    return torch.stack(errors)


def _parts(x: Tensor, batch_rows: int) -> Sequence[Tensor]:
    """Of nearly the same size: a last batch of one image would have no statistics of its own."""
    return torch.tensor_split(x, math.ceil(len(x) / batch_rows))


def _row_as_table(states: Any, number: int) -> Any:
    return tree.apply(lambda leaf: leaf[number : number + 1], states)
