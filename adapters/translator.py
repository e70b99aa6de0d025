"""A small image-to-image network in front of a frozen detector: it translates a modality into what the detector knows.

Medeiros, Aminbeidokhti, Peña, Latortue, Granger & Pedersoli, "Modality Translation for Object Detection Adaptation
Without Forgetting Prior Knowledge", ECCV 2024, arXiv 2404.01492, section 3. The network `h(x)` is shaped like a U-Net
(Ronneberger, Fischer & Brox, arXiv 1505.04597) whose shortcuts are added, not concatenated (Chaurasia & Culurciello,
"LinkNet", arXiv 1707.03718): that halves the work at full resolution.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

Fusion = Literal["multiply", "add", "none"]

START_LOGIT = 5.0  # "multiply": σ(5) = 0.9933, so an untrained translator darkens white by 0.0067
HEAD_GAIN = 10.0  # of the last layer: Adam moves a weight by its rate whatever the gradient, and from 5 to 0 is far


@dataclass(frozen=True)
class TranslatorConfig:
    """What a translator's network looks like; part of its file.

    Raises:
        ValueError: a value that no network can have; says which.
    """

    in_channels: int = 3  # of the modality's images: 1 or 3
    width: int = 8  # channels at full resolution; each level below has twice those of the one above
    depth: int = 3  # levels below full resolution, each half as high and wide
    fusion: Fusion = "multiply"  # how h and x become an image

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"a translator's images have 1 or 3 channels, not {self.in_channels}")
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"width and depth must be at least 1, not {self.width} and {self.depth}")
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"fusion must be one of {', '.join(get_args(Fusion))}, not {self.fusion!r}")


SIZES: dict[str, tuple[int, int]] = {  # (width, depth)
    "tiny": (8, 3),  # 0.11 M parameters
    "small": (16, 3),  # 0.44 M
    "base": (16, 4),  # 1.77 M
    "large": (31, 4),  # 6.62 M
}


class Translator(nn.Module):
    """`x' = fuse(x, h(x))`, always three channels in 0 … 1; a grey x is repeated.

    - `multiply`: `x' = clip(x · h, 0, 1)`, the paper's. It only darkens, and what matters to a detector is contrast:
      an h that falls where x is bright inverts it. Starts as the identity (to 0.01).
    - `add`: `x' = clip(x + 2h − 1, 0, 1)`. It can brighten too. Starts as the identity (to 0.01), at h = ½.
    - `none`: `x' = h`. Nothing of x is handed on, so there is no identity to start from: it starts as plain grey, ½.

    With c the `width`, level i of 0 … `depth` has `c · 2^i` channels at `2^−i` of the resolution. On the way down, a
    convolution with stride 2 and another; on the way up, one to fewer channels, doubling by nearest neighbours, the
    shortcut from the way down added, and another. All are 3 × 3, with batch norm and ReLU; the last is 1 × 1.

    Args:
        config: sizes and fusion.
        generator: draws the first weights (He et al., arXiv 1502.01852, Eq. 10); None: torch's global one.

    Deviations from the authors' code, which takes a ResNet encoder with ImageNet's weights: this network is its own,
    trained from the start; `add` there has no `− 1`, and so cannot start as the identity.

    >>> translator = Translator(TranslatorConfig(1, *SIZES["tiny"])).eval()
    >>> sum(each.numel() for each in translator.parameters())
    109651
    >>> with torch.no_grad():
    ...     translator(torch.ones(2, 1, 33, 47)).shape
    torch.Size([2, 3, 33, 47])
    """

    def __init__(self, config: TranslatorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        channels = [config.width * 2**level for level in range(config.depth + 1)]
        self.stem = _block(config.in_channels, channels[0])
        self.down = nn.ModuleList(
            nn.Sequential(_block(above, below, stride=2), _block(below, below))
            for above, below in itertools.pairwise(channels)
        )
        upwards = channels[::-1]
        self.narrow = nn.ModuleList(_block(*pair) for pair in itertools.pairwise(upwards))
        self.refine = nn.ModuleList(_block(each, each) for each in upwards[1:])
        self.head = nn.Conv2d(channels[0], 3, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(self.head.weight)  # h is the same everywhere, until it learns
        nn.init.constant_(cast(Tensor, self.head.bias), START_LOGIT / HEAD_GAIN if config.fusion == "multiply" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Translate images.

        Args:
            x: float in [0, 1], [B, C, h, w]; C is the config's `in_channels`, h and w are at least 1.

        Returns:
            [B, 3, h, w], in [0, 1].
        """
        h = self.h(x)
        if self.config.fusion == "multiply":
            return (x * h).clamp(0, 1)
        if self.config.fusion == "add":
            return (x + (2 * h - 1)).clamp(0, 1)
        return h

    def h(self, x: Tensor) -> Tensor:
        """What x is fused with: `h(x)`, in (0, 1), [B, 3, h, w]."""
        height, width = x.shape[-2:]
        multiple = 2**self.config.depth
        # channels last: the layers follow their input, and on a CPU with few channels that is half as long again faster
        y = _padded(x, -height % multiple, -width % multiple).contiguous(memory_format=torch.channels_last)
        y = self.stem(y).contiguous(memory_format=torch.channels_last)  # one channel in: both layouts are the same one
        shortcuts = []
        for down in self.down:
            shortcuts.append(y)
            y = down(y)
        for narrow, refine in zip(self.narrow, self.refine, strict=True):
            y = refine(functional.interpolate(narrow(y), scale_factor=2.0) + shortcuts.pop())
        logits: Tensor = HEAD_GAIN * self.head(y)
        return logits[..., :height, :width].contiguous().sigmoid()


def folded(translator: Translator) -> nn.Module:
    """A frozen copy for serving: evaluation mode, batch norm folded into the convolutions; the same answers to 1e-5.

    >>> serving = folded(Translator(TranslatorConfig(width=4, depth=1)))
    >>> any(isinstance(each, nn.BatchNorm2d) for each in serving.modules())
    False
    """
    copied = copy.deepcopy(translator).eval().requires_grad_(False)
    for block in copied.modules():
        if isinstance(block, _Block):
            block[0] = fuse_conv_bn_eval(cast(nn.Conv2d, block[0]), cast(nn.BatchNorm2d, block[1]))
            block[1] = nn.Identity()
    return copied.to(memory_format=torch.channels_last).requires_grad_(False)


def weights(translator: Translator) -> list[nn.Parameter]:
    """What a modality's streams share: all parameters but the scale and shift of the norm layers."""
    return [
        parameter
        for module in translator.modules()
        if not isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    ]


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Images with 1 or 3 channels as a translator or detector wants them: grey repeated, or colours averaged.

    Args:
        x: [..., C, h, w], C 1 or 3.
        channels: 1 or 3.

    >>> with_channels(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1), 1)
    tensor([[[0.5000]]])
    """
    if x.shape[-3] == channels:
        return x
    if channels == 1:
        return x.mean(dim=-3, keepdim=True)
    return x.expand(*x.shape[:-3], channels, *x.shape[-2:])


class _Block(nn.Sequential):
    """Convolution, batch norm, ReLU: the unit that `folded` folds."""


def _block(channels_in: int, channels_out: int, stride: int = 1) -> _Block:
    return _Block(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def _padded(x: Tensor, below: int, right: int) -> Tensor:
    """Repeat the last row and the last column: nothing that was not in the image comes in."""
    return functional.pad(x, (0, right, 0, below), mode="replicate") if below or right else x
