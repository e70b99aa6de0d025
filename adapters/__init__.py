"""Test-time adapters for frozen vision models: pure torch, no server.

Read `base.py` (the contract in prose) first, then `eata.py`.
"""

from adapters.base import (
    Adapter,
    AdapterError,
    Batch,
    Groups,
    Moments,
    Output,
    Pipeline,
    PipelineState,
    Report,
    UnsupportedModel,
)
from adapters.eata import EATA, EATAConfig, EATAPrior, EATAState
from adapters.guards import KeepFinite
from adapters.norm import Modulation, Network, Statistics
from adapters.source import Source

__all__ = [
    "EATA",
    "Adapter",
    "AdapterError",
    "Batch",
    "EATAConfig",
    "EATAPrior",
    "EATAState",
    "Groups",
    "KeepFinite",
    "Modulation",
    "Moments",
    "Network",
    "Output",
    "Pipeline",
    "PipelineState",
    "Report",
    "Source",
    "Statistics",
    "UnsupportedModel",
]
