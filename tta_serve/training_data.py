"""What a translator is trained on: parts of the data, the order of their images, and batches of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.detection import Boxes
from adapters.translator import with_channels
from tta_serve import coco
from tta_serve.coco import Example
from tta_serve.detectors import Detector, scale_boxes
from tta_serve.errors import ConfigError
from tta_serve.training import ORDER, SPLIT, TrainSettings, seed_of


class Parts(NamedTuple):
    """What is learned from, what decides when to stop, and what is reported on."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]  # the validation part where there is no other
    rgb: tuple[Example, ...]  # in the detector's own modality; none: not measured


def read_parts(
    data: Path,
    validation: Path | None,
    test: Path | None,
    rgb: Path | None,
    labels: Sequence[str],
    settings: TrainSettings,
) -> Parts:
    """Read all folders; `data` is split where there is none for validation.

    Raises:
        ConfigError: something is wrong with one of them, or nothing is left to validate on.
    """
    examples = coco.read(data, labels).examples
    if validation:
        held_out = coco.read(validation, labels).examples
    else:
        examples, held_out = split(examples, settings)
    if not any(len(example.truth.boxes) for example in held_out):
        raise ConfigError(
            f"{validation or data}: none of the {len(held_out)} validation images has a box; use more, or another --val"
        )
    tested = coco.read(test, labels).examples if test else held_out
    return Parts(examples, held_out, tested, coco.read(rgb, labels).examples if rgb else ())


def split(examples: tuple[Example, ...], settings: TrainSettings) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """What to train on, and the share that is held out, both in their first order.

    Raises:
        ConfigError: fewer than two images.
    """
    if len(examples) < 2:
        raise ConfigError(
            f"{len(examples)} image cannot be split into training and validation; use more, or give --val"
        )
    count = min(max(1, round(settings.validation_share * len(examples))), len(examples) - 1)
    generator = torch.Generator().manual_seed(seed_of(SPLIT, settings.seed, 0))
    held_out = set(torch.randperm(len(examples), generator=generator)[:count].tolist())
    return (
        tuple(example for number, example in enumerate(examples) if number not in held_out),
        tuple(example for number, example in enumerate(examples) if number in held_out),
    )


def order(count: int, settings: TrainSettings, epoch: int) -> list[list[tuple[int, bool]]]:
    """The batches of an epoch: numbers of images, and whether each is mirrored."""
    generator = torch.Generator().manual_seed(seed_of(ORDER, settings.seed, epoch))
    numbers = torch.randperm(count, generator=generator).tolist()
    mirrored = (torch.rand(count, generator=generator) < (0.5 if settings.flips else 0.0)).tolist()
    drawn = list(zip(numbers, mirrored, strict=True))
    return [drawn[first : first + settings.batch_images] for first in range(0, count, settings.batch_images)]


def read_batch(
    examples: Sequence[Example], batch: Sequence[tuple[int, bool]], detector: Detector, channels: int
) -> tuple[list[Tensor], list[Boxes]]:
    """Prepared images [C, h, w] and their boxes, some mirrored."""
    images, truths = [], []
    for number, mirrored in batch:
        example = examples[number]
        image = with_channels(prepared(detector, coco.read_image(example.file)), channels)
        boxes, labels = scale_boxes(example.truth, example.size, (image.shape[-2], image.shape[-1]))
        if mirrored:
            image, boxes = mirror(image, boxes)
        images.append(image)
        truths.append(Boxes(boxes.to(detector.device), labels.to(detector.device)))
    return images, truths


def mirror(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """An image [C, h, w] and its boxes [N, 4], left to right."""
    left, top, right, bottom = boxes.unbind(1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - right, top, width - left, bottom], dim=1)


def prepared(detector: Detector, image: Tensor) -> Tensor:
    """An image as it was read, uint8 [C, H, W], at the detector's resolution, where the detector is."""
    return detector.prepare(image.to(detector.device).float() / 255)
