"""A network as one stream has it, as a plain module: what a stream changed stands in it as constants.

A file for other devices knows no streams and no requests: each normalisation layer gets the stream's own scale, shift
and known statistics, as if they were what the network had been trained with. That is the *folded* answer, which
requests of a few rows get; see `adapters/norm.py`.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters import Groups, Modulation, Network, Pipeline, PipelineState, Statistics, tree
from tta_serve.errors import InvalidInput


class FixedNetwork(nn.Module):
    """A network whose normalisation is fixed; on the CPU, where it shares the memory of what is there already.

    Args:
        network: stays as it is.
        modulation: of one state, S = 1, with KNOWN statistics; None: the frozen network's own.

    Raises:
        InvalidInput: the model cannot be copied.

    >>> network = Network(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    >>> logits, features = FixedNetwork(network, None)(torch.ones(1, 3, 1, 1))
    >>> logits.shape, features.shape
    (torch.Size([1, 2]), torch.Size([1, 3]))
    """

    def __init__(self, network: Network, modulation: Modulation | None) -> None:
        super().__init__()
        self._read = read = _Read()
        memo: dict[int, Any] = {id(each): _on_host(each) for each in network.model.parameters()}
        memo |= {id(each): each.detach().cpu() for each in network.model.buffers()}
        memo |= {id(layer): _fixed(layer, modulation) for layer in network.layers}
        if network.head is not None:
            memo[id(network.head)] = _Head(network.head, read)
        try:
            self.model = copy.deepcopy(network.model, memo)
        except (TypeError, RuntimeError) as error:  # a lock, an open file, a tensor that was computed
            raise InvalidInput(
                f"the model holds something that cannot be copied, so that it stays here: {error}"
            ) from None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, C], and features [n, F] where the network has a last linear layer."""
        self._read.features = None
        logits = self.model(images)
        features, self._read.features = self._read.features, None
        return logits, features


def modulation_of(pipeline: Pipeline, state: PipelineState) -> Modulation | None:
    """What a state tells the normalisation layers for one image alone; None where there is nothing to tell.

    Args:
        pipeline: whose norm adapter is asked.
        state: of one stream.

    Raises:
        InvalidInput: the adapter normalises by the request's own rows, whatever its size.
    """
    if pipeline.norm is None:
        return None
    rows = torch.zeros(1, dtype=torch.int64, device=pipeline.network.scale.device)
    told = pipeline.norm.modulate(tree.stack([state.norm]), rows, Groups.of((1,), rows.device))
    if told.statistics is not Statistics.KNOWN and pipeline.network.has_statistics:
        raise InvalidInput(
            "a file has one set of statistics for all images, and this model is normalised by each request's own "
            "(adaptation: {mode: sync}); export it from a server that runs with `mode: async`"
        )
    return told


class _Read:
    """What the last linear layer read in the forward that runs. No part of the module: a trace takes no notice."""

    features: Tensor | None = None


class _Quiet:
    """Stands where a layer looks for what the forward was told: nothing, ever."""

    modulation = None
    moments = None


class _Head(nn.Module):
    """The last linear layer; what it reads are the features."""

    def __init__(self, head: nn.Linear, read: _Read) -> None:
        super().__init__()
        self.weight = _on_host(head.weight)
        self.bias = None if head.bias is None else _on_host(head.bias)
        self._read = read

    def forward(self, x: Tensor) -> Tensor:
        self._read.features = x
        return functional.linear(x, self.weight, self.bias)


def _fixed(layer: Any, modulation: Modulation | None) -> nn.Module:
    """A copy of a layer that has the stream's values where it had the source's, and is told nothing."""
    twin = copy.deepcopy(layer, {id(layer.slot): _Quiet()}).cpu()
    if modulation is not None:
        row = int(modulation.rows[0])
        for name in ("scale", "shift", "mean", "var"):
            setattr(twin, name, getattr(modulation, name)[row, layer.slice].detach().cpu().clone())
    return cast(nn.Module, twin)


def _on_host(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().cpu(), requires_grad=False)
