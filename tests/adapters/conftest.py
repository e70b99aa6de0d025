"""Small networks with numbers from a formula: the same on every machine, and any two of them different."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)


def wave(*shape: int, start: float = 0.0, step: float = 1.7) -> Tensor:
    """sin(start + step · i), i = 0, 1, …: between −1 and 1, no two values alike."""
    count = int(torch.tensor(shape).prod())
    return (start + step * torch.arange(count, dtype=torch.float64)).sin().float().reshape(shape)


def fill(model: nn.Module, confidence: float = 6.0) -> nn.Module:
    """Give every tensor of a model its values: scales around 1, others around 0, statistics those of some images."""
    norms = {name for name, part in model.named_modules() if hasattr(part, "eps")}
    for number, (name, tensor) in enumerate(model.named_parameters()):
        owner, kind = name.rsplit(".", 1)
        values = 0.3 * wave(*tensor.shape, start=number + 0.3)
        tensor.data.copy_(1 + values if owner in norms and kind == "weight" else values)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        model.train()(pictures(32, start=5.0))
    head = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    head.weight.data.mul_(confidence)  # high enough to be sure of some rows, and unsure of others
    return model


def pictures(rows: int, start: float = 0.0) -> Tensor:
    """[rows, 3, 6, 6], rows unlike each other."""
    strength = 1 + wave(rows, 1, 1, 1, start=start, step=0.9)
    return wave(rows, 3, 6, 6, start=start, step=2.399) * strength + 0.5 * wave(rows, 3, 1, 1, start=start + 1)


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def convolutional(norm: Callable[[int], nn.Module], classes: int) -> nn.Module:
    return fill(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            norm(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, bias=False),
            norm(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, classes),
        )
    )


def batch_norm_2d(classes: int = 4) -> nn.Module:
    return convolutional(nn.BatchNorm2d, classes)


def group_norm(classes: int = 4) -> nn.Module:
    return convolutional(lambda channels: nn.GroupNorm(2, channels), classes)


def batch_norm_1d(classes: int = 4) -> nn.Module:
    return fill(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * 6 * 6, 5, bias=False),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, classes),
        )
    )


def layer_norm(classes: int = 4) -> nn.Module:
    """Every colour is a token, until their mean is taken."""
    return fill(
        nn.Sequential(
            nn.Flatten(2),
            nn.Linear(36, 6, bias=False),
            nn.LayerNorm(6),
            nn.GELU(),
            nn.Linear(6, 5, bias=False),
            MeanToken(),
            nn.LayerNorm(5),
            nn.Linear(5, classes),
        )
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "batch_norm_2d": batch_norm_2d,
    "batch_norm_1d": batch_norm_1d,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """`build("batch_norm_2d", classes=10)`: a new model of that kind, always with the same numbers."""

    def make(kind: str, classes: int = 4) -> nn.Module:
        return MODELS[kind](classes)

    return make


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """`images(rows, start)`: [rows, 3, 6, 6], rows unlike each other."""
    return pictures
