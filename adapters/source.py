"""The frozen model as an adapter: it changes nothing and learns nothing. What every adapter is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

from adapters.base import Batch, Groups, Report, Site
from adapters.norm import Modulation, Network, Statistics


class SourceState(NamedTuple):
    """Nothing: a stream of the frozen model leaves no trace."""


class Source:
    """The frozen model.

    Args:
        network: any network, with or without normalisation layers.
    """

    site: Site = "norm"

    def __init__(self, network: Network) -> None:
        self.network = network

    def init(self) -> SourceState:
        return SourceState()

    def modulate(self, states: SourceState, rows: Tensor, groups: Groups) -> Modulation:  # noqa: ARG002
        source = (self.network.scale, self.network.shift, self.network.mean, self.network.var)
        scale, shift, mean, var = (tensor.unsqueeze(0) for tensor in source)
        return Modulation(scale, shift, mean, var, torch.zeros_like(rows), groups, Statistics.KNOWN)

    def adapt(self, states: SourceState, rows: Tensor, batch: Batch) -> tuple[SourceState, Report]:  # noqa: ARG002
        return states, Report.empty(int(rows.max()) + 1 if rows.numel() else 0, rows.device)
