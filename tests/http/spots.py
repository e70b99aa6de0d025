"""A detector with torchvision's interface that finds what is bright, and what to show it; all of it made by hand.

A colour picture has one coloured spot on dark ground. In the modality `ir` it is a grey one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from adapters.translator import Translator, TranslatorConfig
from tta_serve.models import digest_of
from tta_serve.router import FEATURES, Router
from tta_serve.translators import TranslatorFile

LABELS = ("__background__", "red", "green", "blue")
LEVEL = 0.25  # brighter than that is a spot
GROUND = 20  # of 255
CONFIG = TranslatorConfig(in_channels=1, width=2, depth=1)

Box = tuple[int, int, int, int]


class Spots(nn.Module):
    """One box around all that is bright; its label is the strongest colour, its score the mean brightness in it.

    Brightness is the strongest channel's. The loss is the mean of (brightness − 1 within the boxes, 0 outside)².

    Args:
        min_size: to resize to as torchvision does; None: images are looked at as they come.
    """

    def __init__(self, min_size: int | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, eps=0.0)  # the identity, while it keeps its statistics
        self.register_buffer("factor", torch.ones(()))  # of the loss; NaN where a test wants one that is not finite
        if min_size:
            self.transform = GeneralizedRCNNTransform(min_size, 4 * min_size, [0.0] * 3, [1.0] * 3, size_divisible=8)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        before = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = before
        if hasattr(self, "transform"):
            batch, targets = self.transform(images, targets)
            sizes = batch.image_sizes
            images = [image[:, :height, :width] for image, (height, width) in zip(batch.tensors, sizes, strict=True)]
        images = [self.norm(image[None])[0] for image in images]
        if self.training:
            assert targets is not None
            errors = [self._error(image, target["boxes"]) for image, target in zip(images, targets, strict=True)]
            return {"brightness": self.factor * torch.stack(errors).mean()}
        found = [self._find(image) for image in images]
        return self.transform.postprocess(found, sizes, before) if hasattr(self, "transform") else found

    def _error(self, image: Tensor, boxes: Tensor) -> Tensor:
        truth = torch.zeros(image.shape[1:])
        for left, top, right, bottom in boxes.round().int().tolist():
            truth[top:bottom, left:right] = 1
        return (image.amax(0) - truth).square().mean()

    def _find(self, image: Tensor) -> dict[str, Tensor]:
        bright = image.amax(0)
        ys, xs = torch.nonzero(bright > LEVEL, as_tuple=True)
        if not len(xs):
            return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
        left, top, right, bottom = (int(side) for side in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        inside = image[:, top:bottom, left:right]
        return {
            "boxes": torch.tensor([[left, top, right, bottom]], dtype=torch.float32),
            "labels": 1 + inside.sum((1, 2)).argmax().reshape(1),
            "scores": inside.amax(0).mean().reshape(1),
        }


def build() -> nn.Module:
    return Spots()


def build_resizing() -> nn.Module:
    """Its shorter side has 16 pixels."""
    return Spots(16)


def scene(
    box: Box = (4, 2, 10, 8), colour: int = 0, size: tuple[int, int] = (12, 16), level: int = 200
) -> NDArray[np.uint8]:
    """A picture in colour, [H, W, 3]: a spot of red (0), green (1) or blue (2)."""
    image = np.full((*size, 3), GROUND, np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right, colour] = level
    return image


def infrared(box: Box = (4, 2, 10, 8), size: tuple[int, int] = (12, 16), level: int = 200) -> NDArray[np.uint8]:
    """The same as the modality `ir` has it, [H, W, 1]."""
    return scene(box, 0, size, level)[..., :1].copy()


def tensor(image: NDArray[np.uint8]) -> Tensor:
    """[H, W, C] → [C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def translator_file(
    modality: str = "ir",
    config: TranslatorConfig = CONFIG,
    *,
    routed: bool = True,
    detector: nn.Module | None = None,
    plain: bool = False,
) -> TranslatorFile:
    """A translator for `Spots`.

    Args:
        modality: its name.
        config: of the network.
        routed: whether it is recognised: by having no colour.
        detector: that it is for; `Spots()` unless given. Resizing changes no weight.
        plain: whether it is as one begins: the same everywhere, and nearly the identity. Else h is around ½, where a
            step moves it most.
    """
    translator = Translator(config, torch.Generator().manual_seed(0)).eval()
    if not plain:
        waves = torch.arange(float(config.width)).add(1).mul(2.399).sin().abs().div(5)
        translator.head.bias.data.copy_(torch.tensor([0.0, -0.02, -0.04]))  # a little more red than anything else
        translator.head.weight.data.copy_(waves.reshape(1, config.width, 1, 1).expand(3, -1, -1, -1))
    return TranslatorFile(
        modality, digest_of(detector or Spots()), config, translator.state_dict(), grey_router() if routed else None, {}
    )


def grey_router() -> Router:
    """Confident, σ(5) = 0.9933, of images whose channels are equal; of those in colour, the less the more of it."""
    count = len(FEATURES)
    weights = np.zeros(count)
    weights[FEATURES.index("channel_spread")] = -1000
    zeros, ones = np.zeros(count), np.ones(count)
    return Router(zeros, ones, weights, 5.0, zeros, np.eye(count) / 1000, 1.0)
