"""What adapters know of a detector: boxes, and its own loss. Any detector will do."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Boxes(NamedTuple):
    """What is in an image, as somebody who knows says."""

    boxes: Tensor  # x1, y1, x2, y2 in pixels of its image, x1 < x2, y1 < y2; float32 [N, 4]
    labels: Tensor  # int64 [N]


class Detections(NamedTuple):
    """What a detector found in an image, the surest first."""

    boxes: Tensor  # as in `Boxes`, float32 [N, 4]
    labels: Tensor  # int64 [N]
    scores: Tensor  # in 0 … 1, float32 [N]


class DetectionLoss(Protocol):
    """A frozen detector's own training loss, through which its input can learn."""

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Boxes]) -> Tensor:
        """The sum of the detector's losses, mean over the images; one forward.

        Args:
            images: [3, h, w] each, float32 in [0, 1], at the resolution at which the detector looks.
            targets: of each image, in its pixels; an image without anything has [0, 4].

        Returns:
            A scalar through which gradients flow to the images.
        """
        ...
