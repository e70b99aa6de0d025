"""A detector with torchvision's interface, opened between its resizing and its normalisation.

torchvision's models resize, normalise, pad, look, and scale their boxes back, all in one call. A translator belongs
after the resizing, where images have the resolution that the detector looks at, so these are apart here.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from adapters.detection import Boxes, Detections

BACKGROUND = "__background__"  # torchvision's name of the class that is nothing
SIZE_DIVISIBLE = 32  # of a model without torchvision's transform: what it is taken to pad to

Size = tuple[int, int]  # height, width


class Detector:
    """Detects, and gives the loss that a translator learns through.

    `detect` and `loss` may run in two threads at once: the model is kept twice, once set to detect and once to give its
    losses, and both share every tensor.

    Args:
        model: takes a list of images [3, H, W] in [0, 1] and gives, in training mode, with targets of `boxes` and
            `labels`, a dict of losses; else, for each image, `boxes` (pixels), `labels` and `scores`. As
            `torchvision.models.detection` has them. Taken over: it is put in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self._transform: GeneralizedRCNNTransform | None = None
        transform = getattr(model, "transform", None)
        if isinstance(transform, GeneralizedRCNNTransform):
            self._transform = transform
            model.transform = _Prepared(transform)
        self._teaching = _losing(model)

    @property
    def device(self) -> torch.device:
        return next(iter([*self.model.parameters(), *self.model.buffers()]), torch.zeros(0)).device

    def to(self, device: torch.device) -> "Detector":
        """The same detector elsewhere."""
        self.model.to(device)
        self._teaching = _losing(self.model)
        return self

    def freeze(self) -> "Detector":
        """Let no gradient reach its parameters."""
        self.model.requires_grad_(False)
        return self

    def prepare(self, image: Tensor) -> Tensor:
        """Resize an image to what the detector looks at.

        Args:
            image: [C, H, W], float32 in [0, 1]; any number of channels.

        Returns:
            [C, h, w].
        """
        if self._transform is None:
            return image
        resized: Tensor = self._transform.resize(image)[0]
        return resized

    def canvas(self, size: Size) -> Size:
        """The padded size at which a prepared image of this size is looked at when it is alone."""
        every = self._transform.size_divisible if self._transform else SIZE_DIVISIBLE
        return -(-size[0] // every) * every, -(-size[1] // every) * every

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], sizes: Sequence[Size]) -> list[Detections]:
        """What is in each image.

        Images that are padded to the same canvas share a forward. Those of others do not: their padding would change
        the answer, and no answer may depend on its neighbours.

        Args:
            images: prepared, [3, h, w].
            sizes: of the images before they were prepared.

        Returns:
            For each image its detections, boxes in pixels of the image before it was prepared.
        """
        canvases: dict[Size, list[int]] = {}
        for number, image in enumerate(images):
            canvases.setdefault(self.canvas(_size(image)), []).append(number)
        found: dict[int, Detections] = {}
        for numbers in canvases.values():
            answers = self.model([images[number] for number in numbers])
            for number, answer in zip(numbers, answers, strict=True):
                boxes = resize_boxes(answer["boxes"], list(_size(images[number])), list(sizes[number]))
                found[number] = Detections(boxes, answer["labels"], answer["scores"])
        return [found[number] for number in range(len(images))]

    def loss(self, images: Sequence[Tensor], targets: Sequence[Boxes]) -> Tensor:
        """See `adapters.detection.DetectionLoss`.

        Normalisation layers keep the statistics that they were trained with. Detectors that sample proposals
        (Faster R-CNN) draw from torch's global generator.
        """
        losses = self._teaching(list(images), [target._asdict() for target in targets])
        return cast(Tensor, sum(losses.values()))


class _Prepared(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's transform for images that have their size already."""

    def __init__(self, inner: GeneralizedRCNNTransform) -> None:
        super().__init__(
            inner.min_size, inner.max_size, inner.image_mean, inner.image_std, inner.size_divisible, inner.fixed_size
        )

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


def scale_boxes(targets: Boxes, size: Size, prepared: Size) -> Boxes:
    """The same boxes in an image of another size.

    >>> scale_boxes(Boxes(torch.tensor([[2.0, 4.0, 6.0, 8.0]]), torch.tensor([1])), (10, 20), (20, 10)).boxes
    tensor([[ 1.,  8.,  3., 16.]])
    """
    return targets._replace(boxes=resize_boxes(targets.boxes, list(size), list(prepared)))


def _losing(model: nn.Module) -> nn.Module:
    """The same tensors in a model that gives its losses: in training mode but for what training would change."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared).train()
    for module in twin.modules():
        # whatever keeps running statistics, and what answers at random
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
            module.eval()
    return twin


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]
