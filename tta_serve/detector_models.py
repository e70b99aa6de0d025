"""Loading a frozen detector: as `models.py`, for models with torchvision's detection interface."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tta_serve import models
from tta_serve.builtin import scene_detector
from tta_serve.config import ModelSettings
from tta_serve.detectors import TRIAL_PIXELS, Detector
from tta_serve.errors import ConfigError

BUILTIN_TRANSLATORS = {"ir": models.BUILTIN_FOLDER / "scenes_ir.safetensors"}  # of digit-scenes


@dataclass(frozen=True)
class LoadedDetector:
    """A detector ready to be served."""

    detector: Detector
    labels: tuple[str, ...]  # by the indices that it answers; the first may be its background
    digest: str  # of the weights, hexadecimal


def load(settings: ModelSettings) -> LoadedDetector:
    """Load the detector that the settings describe.

    Raises:
        ConfigError: code or weights are missing or do not fit, or the module does not behave as a detector; the message
            says which and what to do.
    """
    labels: tuple[str, ...] = ()
    if settings.source.builtin:
        module, labels = scene_detector.load(), scene_detector.LABELS
    elif settings.source.torchvision:
        module, labels = _torchvision(settings)
    else:
        module = models.from_python(settings)
    digest = models.digest_of(module)
    detector = Detector(module).freeze()
    _try(settings, detector)
    return LoadedDetector(detector, settings.labels or labels, digest)


def _torchvision(settings: ModelSettings) -> tuple[nn.Module, tuple[str, ...]]:
    builder, known = models.builder_of(settings)
    if not Path(settings.weights or "").is_file():
        module, weights = models.with_named_weights(settings, builder, known, weights_backbone=None)
        return module, tuple(weights.meta.get("categories", ()))
    state = models.read_state(Path(settings.weights or ""))
    classes = len(settings.labels) if settings.labels else None  # None: COCO's
    module = cast(nn.Module, builder(weights=None, weights_backbone=None, num_classes=classes))
    try:
        models.fit(module, state, settings)
    except ConfigError as error:
        hint = "" if settings.labels else "; a detector of other classes than COCO's needs `labels`, background first"
        raise ConfigError(f"{error}{hint}") from None
    return module, () if settings.labels else _categories(known)


def _categories(known: Any) -> tuple[str, ...]:
    """COCO's, which all of torchvision's detectors were trained on."""
    return tuple(next(iter(known)).meta["categories"])


def _try(settings: ModelSettings, detector: Detector) -> None:
    """Look at one blank image, so that what is no detector fails here."""
    image = detector.prepare(torch.zeros(3, TRIAL_PIXELS, TRIAL_PIXELS))
    try:
        (found,) = detector.detect([image], [(TRIAL_PIXELS, TRIAL_PIXELS)])
    except Exception as error:
        raise ConfigError(
            f"models.{settings.name}: looking at one blank image fails: {type(error).__name__}: {error} (a detector "
            "takes a list of images [3, H, W] and gives a list of dicts with boxes, labels and scores)"
        ) from error
    if found.boxes.shape != (len(found.scores), 4) or len(found.labels) != len(found.scores):
        raise ConfigError(
            f"models.{settings.name}: for one image the model gives boxes {list(found.boxes.shape)}, labels "
            f"{list(found.labels.shape)} and scores {list(found.scores.shape)}; they must be [n, 4], [n] and [n]"
        )
