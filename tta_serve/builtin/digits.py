"""The built-in model: a small convolutional classifier of handwritten digits, and the images that it was trained on.

The images are scikit-learn's `load_digits` (1,797 of 8×8 grey pixels, 0 … 16; E. Alpaydin & C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998), enlarged to 32×32 by bilinear interpolation
(pixel centres, no corner alignment) and repeated over red, green and blue. `tta_serve/train_digits.py` makes
the files beside this one.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

LABELS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
IMAGE_SIZE = 32  # pixels, both ways
MEAN = (0.305, 0.305, 0.305)  # of the training images in [0, 1], red, green, blue
STD = (0.324, 0.324, 0.324)

HELD_OUT = 500  # images
SPLIT_SEED = 0

HERE = Path(__file__).parent
WEIGHTS = HERE / "digits.safetensors"
PRIOR = HERE / "digits_prior.safetensors"
PROBE = HERE / "digits_probe.npz"
TRAINING_LOG = HERE / "digits_training.json"


class Split(NamedTuple):
    """Images as uint8 [N, 32, 32, 3] and labels as int64 [N]."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    held_out_images: NDArray[np.uint8]
    held_out_labels: NDArray[np.int64]


class Digits(nn.Module):
    """Five convolutions with batch normalisation and one linear layer; 70,000 parameters.

    The first stage rectifies with the absolute value, the others with ReLU: an edge counts whether it goes from dark to
    bright or back. That alone does not make the model blind to polarity, since its statistics are those of bright
    strokes on black; with statistics that fit, dark strokes on white look much the same to it. The absolute value was
    chosen so that the demo's inverted phase can be won back; with plain ReLU, adapting recovered nothing there.

    Input: [B, 3, 32, 32], normalised with `MEAN` and `STD`. Output: logits [B, 10], in the order of `LABELS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            _stage(3, 16, stride=2, rectifier=Magnitude(), padding_mode="replicate"),  # 16×16
            _stage(16, 32, stride=1),
            _stage(32, 32, stride=2),  # 8×8
            _stage(32, 64, stride=2),  # 4×4
            _stage(64, 64, stride=1),
        )
        self.head = nn.Linear(64, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(x).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


class Magnitude(nn.Module):
    """`|x|`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def _stage(
    channels_in: int,
    channels_out: int,
    stride: int,
    rectifier: nn.Module | None = None,
    padding_mode: Literal["zeros", "replicate"] = "zeros",
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False, padding_mode=padding_mode),
        nn.BatchNorm2d(channels_out),
        rectifier or nn.ReLU(),
    )


def load() -> Digits:
    """The trained model, in evaluation mode."""
    model = Digits()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def prepare(images: NDArray[np.uint8]) -> Tensor:
    """From uint8 [N, 32, 32, 3] to what the model takes: float32 [N, 3, 32, 32], normalised."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def split() -> Split:
    """1,297 images to train on and 500 held out, in the same proportion of every class; always the same ones."""
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)
    # interpolated before it is scaled: multiples of 1/64 are exact in float32, so the bytes are the same everywhere
    large = functional.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    grey = (large * (255 / 16)).round().to(torch.uint8)
    images = grey.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    train_images, held_out_images, train_labels, held_out_labels = train_test_split(
        images, labels.astype(np.int64), test_size=HELD_OUT, stratify=labels, random_state=SPLIT_SEED
    )
    return Split(train_images, train_labels, held_out_images, held_out_labels)
