"""What a client says is in an image."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.detection import Boxes
from tta_serve.detectors import BACKGROUND
from tta_serve.errors import InvalidInput

EDGE_PIXELS = 0.5  # a box may reach so far outside its image, and is clipped there: rounding, at the client
SIDE_PIXELS_MIN = 0.1  # of what is left then: less may be nothing in float32 once the image is resized


class Feedback(NamedTuple):
    """Boxes for one image: of an earlier prediction, or with the image itself."""

    boxes: NDArray[np.float64]  # x1, y1, x2, y2 in pixels of the image, as given; [N, 4]
    labels: tuple[str | int, ...]
    id: str | None  # of the prediction …
    place: int  # … and which of its images
    image: bytes | None  # or the picture


def check_boxes(item: Feedback, size: tuple[int, int], labels: Sequence[str]) -> Boxes:
    """The boxes that a client gives for an image.

    Args:
        item: as given.
        size: height and width of the image.
        labels: of the detector.

    Raises:
        InvalidInput: NaN, empty, turned over or outside boxes; an unknown label; the message names the box.
    """
    height, width = size
    if len(item.boxes) != len(item.labels):
        raise InvalidInput(f"{len(item.boxes)} boxes and {len(item.labels)} labels; each box needs one")
    for number, box in enumerate(item.boxes.tolist()):
        left, top, right, bottom = box
        if not all(math.isfinite(side) for side in box):
            raise InvalidInput(f"box {number} is {box}; its sides must be finite")
        if not (left < right and top < bottom):
            raise InvalidInput(f"box {number} is {box}, which is empty; it must be [x1, y1, x2, y2], x1 < x2, y1 < y2")
        if min(left, top) < -EDGE_PIXELS or right > width + EDGE_PIXELS or bottom > height + EDGE_PIXELS:
            raise InvalidInput(f"box {number} is {box}, which is not within the image, {width}×{height} pixels")
    sides = item.boxes.clip(0, [width, height, width, height])
    if thin := [number for number, side in enumerate((sides[:, 2:] - sides[:, :2]).min(1)) if side < SIDE_PIXELS_MIN]:
        raise InvalidInput(
            f"box {thin[0]} is {item.boxes[thin[0]].tolist()}, which is empty within the image; each side must have at "
            f"least {SIDE_PIXELS_MIN} pixels"
        )
    return Boxes(
        torch.from_numpy(sides.astype(np.float32)),
        torch.tensor([class_of(label, labels) for label in item.labels], dtype=torch.int64),
    )


def class_of(label: str | int, labels: Sequence[str]) -> int:
    """The index of a class given by name or index."""
    background = 1 if labels and labels[0] == BACKGROUND else 0
    if isinstance(label, str) and label in labels[background:]:
        return background + labels[background:].index(label)
    if isinstance(label, int) and not isinstance(label, bool) and background <= label < len(labels):
        return label
    shown = ", ".join(labels[background : background + 5])
    raise InvalidInput(
        f"there is no class {label!r:.100}; give a name ({shown} …) or an index, {background} … {len(labels) - 1}"
    )
