"""Tiny models, pictures and settings: factories, the same on every machine."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adapters import EATA, EATAConfig, Guarded, Network, Pipeline
from tta_serve import models
from tta_serve.config import ModelSettings
from tta_serve.models import LoadedModel

torch.set_num_threads(1)

CLASSES = 3


def build_tiny(classes: int = CLASSES) -> nn.Module:
    """A network of one batch-norm with numbers from a formula: reads [B, 3, 4, 4], knows what a bright row is."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, classes))
    for number, tensor in enumerate(model.parameters()):
        waves = (number + 1.7 * torch.arange(tensor.numel(), dtype=torch.float64)).sin().float()
        tensor.data.copy_(waves.reshape(tensor.shape))
    model[1].weight.data.abs_()
    return model.eval()


def build_rows(rows: int, start: float = 0.0) -> Tensor:
    """[rows, 3, 4, 4] in [0, 1], no two rows alike."""
    count = rows * 3 * 4 * 4
    waves = (start + 2.399 * torch.arange(count, dtype=torch.float64)).sin().float()
    return (waves.reshape(rows, 3, 4, 4) + 1) / 2


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """`tiny(classes=3)`: a new small network, always with the same numbers."""
    return build_tiny


@pytest.fixture
def rows() -> Callable[..., Tensor]:
    """`rows(n, start=0.0)`: [n, 3, 4, 4] in [0, 1]."""
    return build_rows


@pytest.fixture
def pipeline() -> Callable[..., Pipeline]:
    """`pipeline(**config)`: EATA around the small network, which selects every row unless told otherwise."""

    def make(module: nn.Module | None = None, **config: Any) -> Pipeline:
        network = Network(module or build_tiny())
        settings = {"anchor": "none", "entropy_margin": 10.0, "redundancy_margin": 2.0, "learning_rate": 0.01}
        eata = EATA(network, CLASSES, config=EATAConfig(**{**settings, "statistics": "evidence", **config}))
        return Pipeline(network, norm=Guarded(eata))

    return make


@pytest.fixture
def model_settings() -> Callable[..., ModelSettings]:
    """`model_settings(source=…, **others)`: validated; the built-in digits unless told otherwise."""

    def make(source: Any = "builtin/digits", **others: Any) -> ModelSettings:
        return ModelSettings.model_validate({"name": "m", "source": source, **others})

    return make


@pytest.fixture(scope="session")
def digits_model() -> LoadedModel:
    """The built-in model; read only (a `Network` takes a module over: give it a copy)."""
    return models.load(ModelSettings.model_validate({"name": "digits", "source": "builtin/digits"}))


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """`picture(image, "PNG", **options)`: the bytes of an image file; of a grey 4×4 one unless given."""

    def make(image: Image.Image | np.ndarray | None = None, kind: str = "PNG", **options: Any) -> bytes:
        if image is None:
            image = np.full((4, 4, 3), 128, np.uint8)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return make
