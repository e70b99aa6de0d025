"""A detector with torchvision's interface, opened between its resizing and its normalisation.

torchvision's models resize, normalise, pad, look, and scale their boxes back, all in one call. A translator belongs
after the resizing, where images have the resolution that the detector looks at, so these are apart here. And what
adapts the backbone's normalisation layers reaches it from here: by a modulation for the images of each forward.
"""

import copy
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops.misc import FrozenBatchNorm2d

from adapters.base import UnsupportedModel
from adapters.detection import Boxes, Detections
from adapters.norm import Modulation, Network

BACKGROUND = "__background__"  # torchvision's name of the class that is nothing
TRIAL_PIXELS = 64  # height and width of what is looked at before anything is served
SIZE_DIVISIBLE = 32  # of a model without torchvision's transform: what it is taken to pad to
NO_BACKBONE = "this detector has no `backbone` behind torchvision's transform: there is nothing to modulate"

Size = tuple[int, int]  # height, width

# What the backbone of the forward that runs in this thread shall do. Models call it themselves, and pass nothing on.
_MODULATION: ContextVar[Modulation | None] = ContextVar("modulation", default=None)


class Detector:
    """Detects, and gives the loss that a translator learns through.

    `detect` and `loss` may run in two threads at once: the model is kept once set to detect, once to give its losses
    and once with a backbone that takes a modulation, and all share every tensor.

    Args:
        model: takes a list of images [3, H, W] in [0, 1] and gives, in training mode, with targets of `boxes` and
            `labels`, a dict of losses; else, for each image, `boxes` (pixels), `labels` and `scores`. As
            `torchvision.models.detection` has them. Taken over: it is put in evaluation mode.

    Attributes:
        network: the backbone, as adapters of the site "norm" take it: maps `pixels` to the feature maps that the
            detector looks at. None where the model has no `backbone` behind a transform of torchvision's. Its source
            numbers are those of when the detector was made.
    """

    network: Network | None

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self._transform: GeneralizedRCNNTransform | None = None
        transform = getattr(model, "transform", None)
        if isinstance(transform, GeneralizedRCNNTransform):
            self._transform = transform
            model.transform = _Prepared(transform).eval()
        self._make_twins()

    def _make_twins(self) -> None:
        self._teaching = _losing(self.model)
        self._adapting = self.network = None
        if self._transform is not None and isinstance(getattr(self.model, "backbone", None), nn.Module):
            self._adapting, self.network = _adapting(self.model)

    @property
    def device(self) -> torch.device:
        return next(iter([*self.model.parameters(), *self.model.buffers()]), torch.zeros(0)).device

    def to(self, device: torch.device) -> "Detector":
        """The same detector elsewhere."""
        self.model.to(device)
        self._make_twins()
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
        height, width = _size(image)
        scale = min(self._transform.min_size[-1] / min(height, width), self._transform.max_size / max(height, width))
        if self._transform.fixed_size is None and scale * min(height, width) < 1:
            # a strip, whose shorter side torchvision would round down to nothing
            size = max(1, int(scale * height)), max(1, int(scale * width))
            return functional.interpolate(image[None], size, mode="bilinear")[0]
        resized: Tensor = self._transform.resize(image)[0]
        return resized

    def canvas(self, size: Size) -> Size:
        """The padded size at which a prepared image of this size is looked at when it is alone."""
        every = self._transform.size_divisible if self._transform else SIZE_DIVISIBLE
        return -(-size[0] // every) * every, -(-size[1] // every) * every

    @torch.no_grad()
    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """What the backbone reads of images that share a canvas: normalised, and padded with zeros.

        Args:
            images: prepared, [3, h, w] each.

        Returns:
            [B, 3, h', w'].

        Raises:
            UnsupportedModel: there is no `network` that would read it.
        """
        if self.network is None:
            raise UnsupportedModel(NO_BACKBONE)
        transform = cast(nn.Module, self.model.transform)
        return cast(Tensor, transform(list(images))[0].tensors)

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[Size],
        modulation: Callable[[Sequence[int]], Modulation] | None = None,
    ) -> list[Detections]:
        """What is in each image.

        Images that are padded to the same canvas share a forward. Those of others do not: their padding would change
        the answer, and no answer may depend on its neighbours.

        Args:
            images: prepared, [3, h, w].
            sizes: of the images before they were prepared.
            modulation: called for each forward with the places of its images in the list; what the normalisation layers
                of the backbone shall do at them. None: what they were trained to do.

        Returns:
            For each image its detections, boxes in pixels of the image before it was prepared.

        Raises:
            UnsupportedModel: there is a modulation, and no `network` that would take it.
        """
        canvases: dict[Size, list[int]] = {}
        for number, image in enumerate(images):
            canvases.setdefault(self.canvas(_size(image)), []).append(number)
        found: dict[int, Detections] = {}
        for numbers in canvases.values():
            together = [images[number] for number in numbers]
            answers = self._look(together, modulation(numbers)) if modulation else self.model(together)
            for number, answer in zip(numbers, answers, strict=True):
                boxes = resize_boxes(answer["boxes"], list(_size(images[number])), list(sizes[number]))
                found[number] = Detections(boxes, answer["labels"], answer["scores"])
        return [found[number] for number in range(len(images))]

    def _look(self, images: list[Tensor], told: Modulation) -> Any:
        if self._adapting is None:
            raise UnsupportedModel(NO_BACKBONE)
        before = _MODULATION.set(told)
        try:
            return self._adapting(images)
        finally:
            _MODULATION.reset(before)

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


def _adapting(model: nn.Module) -> tuple[nn.Module, Network]:
    """The same tensors in a model whose backbone does what `_MODULATION` says, and that backbone."""
    # other `Parameter`s on the same memory: a network freezes its own, and the model may be there to be trained
    frozen = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    twin = copy.deepcopy(model, {**frozen, **{id(each): each for each in model.buffers()}})
    backbone = cast(nn.Module, twin.backbone)
    _thaw(backbone)
    network = Network(backbone)
    twin.backbone = _Backbone(network)
    return twin.eval(), network


class _Backbone(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x, _MODULATION.get()).logits


def _thaw(backbone: nn.Module) -> None:
    """Put batch norms that compute the same in the place of torchvision's frozen ones, on the same memory."""
    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                thawed = nn.BatchNorm2d(len(child.weight), eps=child.eps, device="meta").eval()
                thawed.weight = nn.Parameter(child.weight, requires_grad=False)
                thawed.bias = nn.Parameter(child.bias, requires_grad=False)
                thawed.running_mean, thawed.running_var = child.running_mean, child.running_var
                setattr(parent, name, thawed)


def _size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]
