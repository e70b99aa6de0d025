"""The built-in detection model: a small FCOS that finds the handwritten digits of `tta_serve.builtin.scenes`.

FCOS: "Fully Convolutional One-Stage Object Detection", Tian et al., ICCV 2019, arXiv 1904.01355, in torchvision's
implementation, on a backbone and a feature pyramid with batch normalisation. `tta_serve/train_scenes.py` makes the
weights beside this file.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import FeaturePyramidNetwork

from tta_serve.builtin import scenes

LABELS = scenes.LABELS
MEAN = (0.29, 0.29, 0.29)  # of scenes in [0, 1], red, green, blue
STD = (0.24, 0.24, 0.24)

MIN_SIZE, MAX_SIZE = 128, 512  # pixels that an image's shorter side is resized to, and its longer side at most
CHANNELS = 64  # of every pyramid level; the head's group normalisation wants a multiple of 32
HEAD_CONVOLUTIONS = 2  # of each of the two branches

# FCOS as torchvision has it knows a level's reach by its anchors: it answers for digits with a corner up to 8 of them
# away, and from the second level on, 4 of them at least. Both levels see a digit that is 24 to 32 pixels away.
ANCHOR_SIDES = ((4,), (6,))  # pixels, at strides 8 and 16

FAINTEST_SCORE = 0.1
MOST_DETECTIONS = 30  # of an image

HERE = Path(__file__).parent
WEIGHTS = HERE / "scenes.safetensors"
TRAINING_LOG = HERE / "scenes_training.json"


class Backbone(nn.Module):
    """Four stages of convolutions with batch normalisation, and a feature pyramid on the last two.

    Input: [B, 3, H, W], normalised. Output: `{"8": [B, C, H/8, W/8], "16": [B, C, H/16, W/16]}` with C `CHANNELS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = CHANNELS  # torchvision's detectors ask for it
        self.stem = nn.Sequential(_convolution(3, 24, stride=2), _convolution(24, 32, stride=2))
        self.stage_8 = nn.Sequential(_convolution(32, 64, stride=2), Residual(64))
        self.stage_16 = nn.Sequential(_convolution(64, 96, stride=2), Residual(96))
        self.pyramid = FeaturePyramidNetwork([64, 96], CHANNELS, norm_layer=nn.BatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        at_8 = self.stage_8(self.stem(x))
        levels: dict[str, Tensor] = self.pyramid({"8": at_8, "16": self.stage_16(at_8)})
        return levels


class Residual(nn.Module):
    """`relu(x + f(x))` with two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.second(self.first(x)))


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """The detector with new weights (from torch's global generator), in training mode, with torchvision's interface.

    Takes a list of images, float32 [3, H, W] in [0, 1], and normalises them itself. In training mode it also takes a
    list of targets (`boxes` [N, 4], `labels` [N]) and gives a dict of losses; otherwise a list of `boxes`, `labels`
    (indices of `LABELS`) and `scores`, in the pixels of the images given.
    """
    model: nn.Module = FCOS(
        Backbone(),
        num_classes=len(LABELS),
        min_size=MIN_SIZE,
        max_size=MAX_SIZE,
        image_mean=list(MEAN),
        image_std=list(STD),
        anchor_generator=AnchorGenerator(ANCHOR_SIDES, ((1.0,),) * len(ANCHOR_SIDES)),
        head=FCOSHead(CHANNELS, 1, len(LABELS), HEAD_CONVOLUTIONS),
        score_thresh=FAINTEST_SCORE,
        detections_per_img=MOST_DETECTIONS,
    )
    return model


def load() -> nn.Module:
    """The trained detector, in evaluation mode."""
    model = build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
