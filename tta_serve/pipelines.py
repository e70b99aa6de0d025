"""From settings to a pipeline: the network, the adapter that the configuration names, and its prior."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor
from torch.nn import functional

from adapters import EATA, AdapterError, EATAConfig, EATAPrior, Guarded, Network, Pipeline, Source
from adapters.anchors import fisher_diagonal
from tta_serve.config import EATASettings, ModelSettings
from tta_serve.errors import ConfigError
from tta_serve.models import InputSpec, LoadedModel

T = TypeVar("T")

FISHER_IMAGES = 2000  # the paper's number of source samples (section 5)
FISHER_BATCH = 200
FISHER_BATCH_LARGE = 64  # as the authors take for ImageNet: above 64×64 pixels, a backward over 200 needs tens of GB


def build(settings: ModelSettings, model: LoadedModel, device: torch.device) -> Pipeline:
    """Build the pipeline of one model; takes the model's module over.

    Raises:
        ConfigError: the adapter does not fit the model, or its prior is missing or wrong.
    """
    try:
        network = Network(model.module.to(device))
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
        raise ConfigError(f"models.{settings.name}.device: {device}: {str(error).splitlines()[0]}") from None
    if settings.adapter.eata is None:
        return Pipeline(network, norm=Source(network))
    config = _eata_config(settings.adapter.eata, settings.adaptation.mode)
    try:
        needs_prior = config.anchor == "fisher" and config.anchor_weight > 0
        prior = _eata_prior(settings, model, network) if needs_prior else None
        return Pipeline(network, norm=Guarded(EATA(network, len(model.labels), prior, config)))
    except AdapterError as error:
        raise ConfigError(f"models.{settings.name}.adapter: {error}") from None


def _eata_config(settings: EATASettings, mode: str) -> EATAConfig:
    published = mode == "sync"

    def auto(value: T | Literal["auto"], otherwise: T) -> T:
        return otherwise if value == "auto" else value

    return EATAConfig(
        entropy_margin=auto(settings.entropy_margin, None),
        redundancy_margin=auto(settings.redundancy_margin, None),
        anchor=settings.anchor,
        anchor_weight=settings.anchor_weight,
        optimizer=settings.optimizer,
        learning_rate=auto(settings.learning_rate, 1e-3 if published else 4e-3),
        momentum=settings.momentum,
        source_pull=auto(settings.source_pull, 0.0 if published else 0.02),
        full_step_rows=auto(settings.full_step_rows, None if published else 64),
        statistics="batch" if published else "evidence",
        source_images=settings.source_images,
        stream_images_max=settings.stream_images_max,
        class_mix=settings.class_mix,
        class_mix_rate=settings.class_mix_rate,
    )


def _eata_prior(settings: ModelSettings, model: LoadedModel, network: Network) -> EATAPrior | None:
    if not network.channels:
        return None  # EATA itself says what is wrong
    path = model.prior
    if path is None:
        raise ConfigError(
            f"models.{settings.name}: eata's Fisher anchor needs `prior:` (an .npz with source `images`, uint8 "
            "[N, height, width, 3], or a .safetensors with `fisher`); without source images set `anchor: l2`"
        )
    if path.suffix == ".npz":
        images = read_images(path, model.input, "prior")
        return EATAPrior(fisher_diagonal(network, _batches(images, network.scale.device)))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            fisher, header = file.get_tensor("fisher"), file.metadata() or {}
    except Exception as error:
        raise ConfigError(f"models.{settings.name}.prior: {path} holds no readable `fisher`: {error}") from error
    if header.get("digest", model.digest) != model.digest:
        raise ConfigError(
            f"models.{settings.name}.prior: {path} was made for the weights {header['digest']}, "
            f"and these are {model.digest}; make it anew, or give source images (.npz)"
        )
    return EATAPrior(fisher.to(network.scale.device))


def read_images(path: Path, spec: InputSpec, what: str) -> Tensor:
    """Images of an .npz file as the model reads them: uint8 [N, 3, H, W], at most the first 2,000.

    Args:
        path: of the file.
        spec: what the model reads.
        what: the file is for, in messages.

    Raises:
        ConfigError: it holds no such images.
    """
    x = read_raw_images(path, what)
    if x.shape[2:] != (spec.height, spec.width):
        smooth = spec.interpolation != "nearest"  # as requests are resized, as far as torch does what Pillow does
        size = (spec.height, spec.width)
        resized = functional.interpolate(x.float(), size, mode=spec.interpolation, antialias=smooth)
        x = resized.round().clamp(0, 255).to(torch.uint8)  # bicubic overshoots
    return x


def read_raw_images(path: Path, what: str) -> Tensor:
    """Images of an .npz file in their own size: uint8 [N, 3, H, W], at most the first 2,000.

    Args:
        path: of the file.
        what: the file is for, in messages.

    Raises:
        ConfigError: it holds no such images.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images = archive["images"]
    except Exception as error:
        raise ConfigError(f"{what}: {path} holds no readable array `images`: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) < 2 or not images.size:
        raise ConfigError(
            f"{what}: `images` of {path} is {images.dtype} {list(images.shape)}, not uint8 [N ≥ 2, H, W, 3]"
        )
    return torch.from_numpy(images[:FISHER_IMAGES]).permute(0, 3, 1, 2)


def _batches(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    large = images.shape[2] * images.shape[3] > 64 * 64
    # of nearly the same size: a last batch of one image would weigh as much as one of 200
    for batch in torch.tensor_split(images, math.ceil(len(images) / (FISHER_BATCH_LARGE if large else FISHER_BATCH))):
        yield batch.to(device).float() / 255
