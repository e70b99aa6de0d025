"""Against torchvision's own models with weights drawn at random, and the trained one where it must find something."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import spots
import torch
from torch import Tensor, nn
from torchvision.models import detection

from adapters.detection import Boxes, Detections
from tta_serve.builtin import scene_detector, scenes
from tta_serve.detectors import Detector, scale_boxes

CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # boxes are in pixels
SIZES = ((30, 41), (64, 20), (25, 25))

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "faster r-cnn": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=4,
        min_size=64,
        box_score_thresh=0.01,
        rpn_pre_nms_top_n_test=50,
        box_detections_per_img=10,
    ),
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4, score_thresh=0.01, detections_per_img=10
    ),
}


def one_box(x1: float, y1: float, x2: float, y2: float, label: int = 1) -> Boxes:
    return Boxes(torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32), torch.tensor([label]))


def picture(height: int, width: int) -> Tensor:
    """[3, H, W] in [0, 1], in waves."""
    waves = torch.arange(3 * height * width, dtype=torch.float64).mul(0.37).sin()
    return ((waves + 1) / 2).float().reshape(3, height, width)


def same(one: Detections, other: Any, **tolerance: float) -> None:
    other = other._asdict() if isinstance(other, Detections) else other
    for name, tensor in one._asdict().items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0, "atol": 0}))


def look(detector: Detector, images: list[Tensor]) -> list[Detections]:
    prepared = [detector.prepare(image) for image in images]
    return detector.detect(prepared, [(image.shape[1], image.shape[2]) for image in images])


@pytest.fixture(scope="module", params=list(BUILDERS))
def plain(request: pytest.FixtureRequest) -> nn.Module:
    """A model of torchvision's as it comes."""
    torch.manual_seed(0)
    return BUILDERS[request.param]().eval()


@pytest.fixture(scope="module")
def found(plain: nn.Module) -> list[dict[str, Tensor]]:
    """What torchvision itself finds, image by image."""
    with torch.no_grad():
        return [plain([picture(*size)])[0] for size in SIZES]


@pytest.fixture(scope="module")
def detector(plain: nn.Module, found: Any) -> Detector:  # `found` first: the model is taken over
    return Detector(plain)


def test_it_finds_what_torchvision_finds(detector: Detector, found: list[dict[str, Tensor]]) -> None:
    for size, own in zip(SIZES, found, strict=True):
        (mine,) = look(detector, [picture(*size)])
        assert len(mine.scores) == 10
        same(mine, own, **CLOSE)


def test_images_of_several_sizes_in_one_call(detector: Detector) -> None:
    images = [picture(*size) for size in SIZES]
    for mine, image in zip(look(detector, images), images, strict=True):
        same(mine, look(detector, [image])[0], **CLOSE)


def test_images_of_one_canvas_share_a_forward(scene: Detector) -> None:
    shown = [torch.from_numpy(each.image).permute(2, 0, 1) / 255 for each in scenes.scenes(4, 3, True)]
    shown[1] = shown[1][:, :, :120]  # prepared it has 128×136, and 160 with its padding
    calls: list[int] = []
    handle = scene.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    together = look(scene, shown)
    handle.remove()
    assert sorted(calls) == [1, 3]
    for mine, image in zip(together, shown, strict=True):
        assert len(mine.scores)
        same(mine, look(scene, [image])[0], **CLOSE)


def test_nothing_to_look_at(detector: Detector) -> None:
    assert detector.detect([], []) == []


@pytest.fixture(scope="module")
def scene() -> Detector:
    return Detector(scene_detector.load()).freeze()


@pytest.fixture
def shown() -> tuple[Tensor, Boxes]:
    """A scene and what is in it."""
    made = scenes.scene(0, 5, True)
    return torch.from_numpy(made.image).permute(2, 0, 1) / 255, Boxes(*map(torch.from_numpy, (made.boxes, made.labels)))


def test_the_loss_is_the_models_own(scene: Detector, shown: tuple[Tensor, Boxes]) -> None:
    """64×96 pixels are made 128×192, and the boxes with them."""
    image, truth = shown[0][:, :64, :96], one_box(10, 20, 30, 60, 3)
    own = scene_detector.load().train()
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected = sum(own([image], [truth._asdict()]).values())
    prepared = scene.prepare(image)
    assert prepared.shape == (3, 128, 192)
    moved = scale_boxes(truth, (64, 96), (128, 192))
    assert moved.boxes.tolist() == [[20, 40, 60, 120]]
    torch.testing.assert_close(scene.loss([prepared], [moved]), expected, rtol=1e-5, atol=1e-6)


def test_an_image_without_anything_has_a_loss_too(scene: Detector, shown: tuple[Tensor, Boxes]) -> None:
    nothing = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert scene.loss([shown[0]], [nothing]).isfinite()


def test_a_wrong_answer_costs_more(scene: Detector, shown: tuple[Tensor, Boxes]) -> None:
    image, truth = shown
    wrong = truth._replace(labels=truth.labels % 10 + 1)
    assert scene.loss([image], [wrong]) > 1.5 * scene.loss([image], [truth])


def test_losses_leave_the_model_as_it_was(detector: Detector) -> None:
    before = {name: tensor.clone() for name, tensor in detector.model.state_dict().items()}
    torch.manual_seed(0)
    loss = detector.loss([picture(64, 64)], [one_box(5, 5, 30, 40)])
    assert loss.isfinite()
    assert loss > 0
    assert not any(module.training for module in detector.model.modules())
    for name, tensor in detector.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_gradients_reach_the_image_and_no_frozen_parameter(scene: Detector, shown: tuple[Tensor, Boxes]) -> None:
    image = shown[0].clone().requires_grad_()
    scene.loss([image], [shown[1]]).backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert all(each.grad is None for each in scene.model.parameters())


def test_gradients_reach_parameters_that_are_not_frozen() -> None:
    detector = Detector(spots.Spots())
    detector.loss([torch.zeros(3, 2, 2)], [one_box(0, 0, 1, 1)]).backward()
    assert detector.model.norm.bias.grad.abs().sum() > 0  # the twin's tensors are the model's


def test_what_it_finds_needs_no_gradient(detector: Detector) -> None:
    (found,) = look(detector, [picture(30, 30).requires_grad_()])
    assert not found.boxes.requires_grad
    assert not found.scores.requires_grad


def test_detecting_while_another_thread_asks_for_losses(scene: Detector, shown: tuple[Tensor, Boxes]) -> None:
    image, truth = shown
    (before,) = look(scene, [image])
    expected = scene.loss([image], [truth])
    losses: list[Tensor] = []
    thread = threading.Thread(target=lambda: losses.extend(scene.loss([image], [truth]) for _ in range(10)))
    thread.start()
    while thread.is_alive():
        same(look(scene, [image])[0], before)
    thread.join()
    assert [loss.item() for loss in losses] == pytest.approx([expected.item()] * 10, rel=1e-6)


# -- a module of one's own --------------------------------------------------------------------------------------------


def test_a_module_without_torchvisions_transform() -> None:
    detector = Detector(spots.build()).freeze()
    image = spots.tensor(spots.scene((4, 2, 10, 8), colour=1)).float() / 255
    assert detector.prepare(image) is image
    assert detector.canvas((12, 33)) == (32, 64)
    found = detector.detect([image, image[:, :6]], [(12, 16), (6, 16)])
    assert [each.boxes.tolist() for each in found] == [[[4, 2, 10, 8]], [[4, 2, 10, 6]]]
    assert [each.labels.tolist() for each in found] == [[2], [2]]
    np.testing.assert_allclose(found[0].scores, [200 / 255], rtol=1e-6)


def test_the_loss_of_four_pixels_by_hand() -> None:
    """Brightness 0, ½, 0, 0 and the truth 1, 1, 0, 0: (1 + ¼) / 4."""
    detector = Detector(spots.build())
    image = torch.zeros(3, 2, 2)
    image[1, 0, 1] = 0.5
    assert detector.loss([image], [one_box(0, 0, 2, 1)]).item() == pytest.approx(1.25 / 4)
    assert detector.loss([image] * 2, [one_box(0, 0, 2, 1)] * 2).item() == pytest.approx(1.25 / 4)


def test_boxes_come_back_in_the_images_own_pixels() -> None:
    """12×16 is made 16×21, so a column is 21/16 of one: from 5.25 on, seen from 5; 12.25 up to 13."""
    detector = Detector(spots.build_resizing())
    for times in (1, 2):
        image = spots.scene().repeat(times, axis=0).repeat(times, axis=1)
        (found,) = look(detector, [spots.tensor(image).float() / 255])
        np.testing.assert_allclose(found.boxes[0] / times, [4, 2, 10, 8], atol=0.8)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
@pytest.mark.parametrize("build", [spots.build_resizing, scene_detector.load])
def test_a_strip_is_looked_at(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    """Its longer side alone would leave the shorter one less than a pixel."""
    detector = Detector(build()).freeze()
    prepared = detector.prepare(torch.zeros(3, *size))
    assert min(prepared.shape) >= 1
    assert len(detector.detect([prepared], [size])) == 1


def test_moving_keeps_both_models_together() -> None:
    detector = Detector(spots.build()).to(torch.device("cpu"))
    detector.model.factor.fill_(2.0)
    assert detector.loss([torch.zeros(3, 2, 2)], [one_box(0, 0, 1, 1)]).item() == 0.5
    assert detector.device == torch.device("cpu")


class Forgetful(nn.Module):
    """Drops half of what it sees while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, images: list[Tensor], targets: Any) -> Any:
        assert self.training
        assert len(images) == len(targets)
        return {"mean": self.drop(torch.stack(images)).mean()}


def test_losses_are_not_random_for_dropout() -> None:
    detector = Detector(Forgetful())
    assert detector.loss([torch.ones(3, 8, 8)], [one_box(0, 0, 1, 1)]).item() == 1.0
    assert detector.device == torch.device("cpu")  # a model without a tensor
