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
from adapters.class_means import ClassMeans, ClassMeansConfig, ClassMeansPrior, fit_class_means
from adapters.components import Components, fit_components
from adapters.detection import Boxes, DetectionLoss, Detections
from adapters.drift import Drift, DriftPrior, DriftReading, drift_prior
from adapters.eata import EATA, EATAConfig, EATAPrior, EATAState
from adapters.flat_keys import FlatKeys, FlatKeysConfig, fit_flat_keys
from adapters.forgetting import Forgetting, Forgot, Probe
from adapters.fusion import Fusion
from adapters.guards import GuardConfig, Guarded, GuardedState, Trip, trip_names
from adapters.heads import Head, Items, NeverLearned
from adapters.keys import Keys, KeysConfig, KeysPrior, fit_keys
from adapters.kv_bottleneck import Counts, CountsConfig
from adapters.kv_gradient import KVGradient, KVGradientConfig
from adapters.merge_rules import Averages, Fading, Latest, Pooled, Steps, Totals
from adapters.merging import Contribution, Merged, Merging, Round, contribute, rebase
from adapters.modtr import ModTr, ModTrConfig, ModTrState, SharedConfig, SharedState, SharedWeights, Taught
from adapters.norm import Modulation, Network, Statistics
from adapters.ridge import Ridge, RidgeConfig, fit_ridge
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
    "Averages",
    "Batch",
    "Boxes",
    "ClassMeans",
    "ClassMeansConfig",
    "ClassMeansPrior",
    "Components",
    "Contribution",
    "Counts",
    "CountsConfig",
    "DetectionLoss",
    "Detections",
    "Drift",
    "DriftPrior",
    "DriftReading",
    "EATAConfig",
    "EATAPrior",
    "EATAState",
    "Fading",
    "FlatKeys",
    "FlatKeysConfig",
    "Forgetting",
    "Forgot",
    "Fusion",
    "Groups",
    "GuardConfig",
    "Guarded",
    "GuardedState",
    "Head",
    "Items",
    "KVGradient",
    "KVGradientConfig",
    "Keys",
    "KeysConfig",
    "KeysPrior",
    "Latest",
    "Merged",
    "Merging",
    "ModTr",
    "ModTrConfig",
    "ModTrState",
    "Modulation",
    "Moments",
    "Network",
    "NeverLearned",
    "Output",
    "Pipeline",
    "PipelineState",
    "Pooled",
    "Probe",
    "Report",
    "Ridge",
    "RidgeConfig",
    "Round",
    "SharedConfig",
    "SharedState",
    "SharedWeights",
    "Source",
    "Statistics",
    "Steps",
    "Taught",
    "Totals",
    "Translator",
    "TranslatorConfig",
    "Trip",
    "UnsupportedModel",
    "alignment_prior",
    "contribute",
    "drift_prior",
    "fit_class_means",
    "fit_components",
    "fit_flat_keys",
    "fit_keys",
    "fit_ridge",
    "folded",
    "rebase",
    "trip_names",
]
