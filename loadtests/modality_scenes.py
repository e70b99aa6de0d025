"""The built-in detector's scenes in both modalities, and COCO's average precision of what was found in them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.detection import Boxes, Detections
from loadtests.modality_client import Detected
from tta_serve import coco
from tta_serve.builtin import scenes

LABELS = scenes.LABELS
AP = coco.AP


class Scenes(NamedTuple):
    """The same scenes as two cameras see them."""

    rgb: tuple[NDArray[np.uint8], ...]  # [3, H, W] each
    infrared: tuple[NDArray[np.uint8], ...]  # [1, H, W] each
    truth: tuple[Boxes, ...]  # in both


def make(count: int, seed: int, *, held_out: bool) -> Scenes:
    """The first scenes of a seed.

    Args:
        count: how many.
        seed: of the scenes.
        held_out: made of the digits that nothing was trained on.
    """
    visible = list(scenes.scenes(count, seed, held_out))
    return Scenes(
        tuple(_channels_first(scene.image) for scene in visible),
        tuple(_channels_first(scene.image) for scene in scenes.infrared_scenes(count, seed, held_out)),
        tuple(Boxes(torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels)) for scene in visible),
    )


def average_precision(made: Scenes, found: Sequence[Detected]) -> AP:
    """AP and AP50 of what was found in each scene, in either modality; both in 0 … 1."""
    detections = [
        Detections(*(torch.tensor(array) for array in (each.boxes, each.labels, each.scores))) for each in found
    ]
    return coco.average_precision(made.truth, detections, [(image.shape[1], image.shape[2]) for image in made.rgb])


def _channels_first(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image.transpose(2, 0, 1))
