"""The CIFAR ResNet-20: 3 stages of 3 blocks, widths 16, 32, 64, shortcuts without parameters.

He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2. A server loads it
by `source: {python: loadtests.resnet20:build}` and `weights: <file>`.
"""

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut of type A: where channels double, subsample by 2 and pad with zero channels.

    Args:
        channels_in, channels_out: equal, or the second is twice the first.
        stride: 1, or 2 where channels double.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            half = self.new_channels // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """Maps normalised images [B, 3, 32, 32] to logits [B, classes]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        # not .mean((2, 3)): it sums in another order, and a replay would differ from its record in the last digits
        logits: Tensor = self.linear(functional.avg_pool2d(x, 8).flatten(1))
        return logits


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels_out, stride)
    return nn.Sequential(first, Block(channels_out, channels_out, 1), Block(channels_out, channels_out, 1))


def build() -> nn.Module:
    """The network without weights."""
    return ResNet20()
