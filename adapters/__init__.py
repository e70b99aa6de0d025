"""Test-time adapters for frozen vision models: pure torch, no server.

Read `base.py` (the contract in prose) first, then `eata.py`.
"""

from adapters.alignment import Alignment, AlignmentConfig, AlignmentPrior, AlignmentState, alignment_prior
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
from adapters.detection import Boxes, DetectionLoss, Detections
from adapters.drift import Drift, DriftPrior, DriftReading, drift_prior
from adapters.eata import EATA, EATAConfig, EATAPrior, EATAState
from adapters.forgetting import Forgetting, Forgot, Probe
from adapters.guards import GuardConfig, Guarded, GuardedState, Trip, trip_names
from adapters.modtr import ModTr, ModTrConfig, ModTrState, SharedConfig, SharedState, SharedWeights, Taught
from adapters.norm import Modulation, Network, Statistics
from adapters.source import Source
from adapters.translator import SIZES, Translator, TranslatorConfig, folded

__all__ = [
    "EATA",
    "SIZES",
    "Adapter",
    "AdapterError",
    "Alignment",
    "AlignmentConfig",
    "AlignmentPrior",
    "AlignmentState",
    "Batch",
    "Boxes",
    "DetectionLoss",
    "Detections",
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
    "ModTr",
    "ModTrConfig",
    "ModTrState",
    "Modulation",
    "Moments",
    "Network",
    "Output",
    "Pipeline",
    "PipelineState",
    "Probe",
    "Report",
    "SharedConfig",
    "SharedState",
    "SharedWeights",
    "Source",
    "Statistics",
    "Taught",
    "Translator",
    "TranslatorConfig",
    "Trip",
    "UnsupportedModel",
    "alignment_prior",
    "drift_prior",
    "folded",
    "trip_names",
]
