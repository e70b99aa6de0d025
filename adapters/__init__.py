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
from adapters.drift import Drift, DriftPrior, DriftReading, drift_prior
from adapters.eata import EATA, EATAConfig, EATAPrior, EATAState
from adapters.forgetting import Forgetting, Forgot, Probe
from adapters.guards import GuardConfig, Guarded, GuardedState, Trip, trip_names
from adapters.norm import Modulation, Network, Statistics
from adapters.source import Source

__all__ = [
    "EATA",
    "Adapter",
    "AdapterError",
    "Batch",
    "Drift",
    "DriftPrior",
    "DriftReading",
    "EATAConfig",
    "EATAPrior",
    "EATAState",
    "Forgetting",
    "Forgot",
    "Groups",
    "GuardConfig",
    "Guarded",
    "GuardedState",
    "Modulation",
    "Moments",
    "Network",
    "Output",
    "Pipeline",
    "PipelineState",
    "Probe",
    "Report",
    "Source",
    "Statistics",
    "Trip",
    "UnsupportedModel",
    "drift_prior",
    "trip_names",
]
