"""The frozen model as an adapter: it changes nothing and learns nothing. What every adapter is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

from adapters.base import Batch, Groups, Moments, Report, Site
from adapters.merging import Merging
from adapters.norm import Modulation, Network, Statistics


class SourceState(NamedTuple):
    """Nothing: a stream of the frozen model leaves no trace."""


class Source:
    """The frozen model.

    Args:
        network: any network, with or without normalisation layers.
    """

    site: Site = "norm"
    classes = 0  # it reports no probabilities

    def __init__(self, network: Network) -> None:
        self.network = network
        self.source_params = network.scale.new_zeros(0)

    def init(self) -> SourceState:
        return SourceState()

    def params(self, states: SourceState) -> Tensor:  # noqa: ARG002
        """Nothing is learned, [1, 0]: a table of empty states cannot say how many they are."""
        return self.source_params.unsqueeze(0)

    def with_params(self, states: SourceState, params: Tensor) -> SourceState:  # noqa: ARG002
        return states

    def modulate(self, states: SourceState, rows: Tensor, groups: Groups) -> Modulation:  # noqa: ARG002
        source = (self.network.scale, self.network.shift, self.network.mean, self.network.var)
        scale, shift, mean, var = (tensor.unsqueeze(0) for tensor in source)
        return Modulation(scale, shift, mean, var, torch.zeros_like(rows), groups, Statistics.KNOWN)

    def absorb(self, states: SourceState, rows: Tensor, groups: Groups, moments: Moments) -> SourceState:  # noqa: ARG002
        return states

    def merging(self) -> Merging:
        """Nothing is learned, and nothing merged."""
        return Merging()

    def adapt(self, states: SourceState, rows: Tensor, batch: Batch) -> tuple[SourceState, Report]:  # noqa: ARG002
        return states, Report.empty(int(rows.max()) + 1 if rows.numel() else 0, rows.device)
