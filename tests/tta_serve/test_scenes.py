import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tta_serve import train_scenes
from tta_serve.builtin import digits, scene_detector, scenes
from tta_serve.builtin.scenes import Scene


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return scene_detector.load()


def same(one: Scene, other: Scene) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("make", [scenes.scenes, scenes.infrared_scenes])
def test_a_scene_depends_on_its_seed_and_index_alone(make: Callable[..., object]) -> None:
    five, two = list(make(5, 3, False)), list(make(2, 3, False))
    assert len(five) == 5
    assert all(same(a, b) for a, b in zip(five[:2], two, strict=True))
    assert not same(five[0], five[1])
    assert not same(five[0], next(iter(make(1, 4, False))))
    assert not same(five[0], next(iter(make(1, 3, True))))


def test_a_known_scene_stays_what_it_is() -> None:
    made = scenes.scene(3, 0, held_out=True)  # a 9, a 0 and a 3
    assert made.labels.tolist() == [10, 1, 4]
    assert made.boxes.tolist() == [[104, 57, 124, 90], [82, 32, 94, 50], [12, 43, 34, 83]]
    assert made.image.mean(axis=(0, 1)) == pytest.approx([14.997, 51.044, 45.430], abs=0.05)


@pytest.mark.parametrize("size", [(128, 128), (64, 200)])
def test_boxes_are_inside_the_picture_and_of_the_promised_size(size: tuple[int, int]) -> None:
    made = list(scenes.scenes(60, 0, held_out=False, size=size))
    assert all(each.image.shape == (*size, 3) and each.image.dtype == np.uint8 for each in made)
    assert {len(each.labels) for each in made} <= {1, 2, 3, 4, 5, 6}
    boxes, labels = np.concatenate([each.boxes for each in made]), np.concatenate([each.labels for each in made])
    assert boxes.dtype == np.float32
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(1, 11))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (size[1], size[0])).all()
    heights, widths = boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]
    assert heights.min() >= 12
    assert heights.max() <= 49
    assert widths.min() >= 3
    assert np.ptp(heights) > 20


def test_boxes_hardly_overlap() -> None:
    for made in scenes.scenes(60, 0, held_out=False):
        for i, (x1, y1, x2, y2) in enumerate(made.boxes.tolist()):
            for u1, v1, u2, v2 in made.boxes[:i].tolist():
                shared = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
                assert shared <= 0.08 * min((x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)) + 1e-6


def test_boxes_are_tight_around_the_ink_on_a_plain_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    """On black, with digits in pure white, half opaque ink has a value of 128."""

    def black(luminance: float, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        return np.zeros((*size, 3), dtype=np.float32)

    def white(luminance: float, generator: np.random.Generator) -> np.ndarray:
        return np.ones(3, dtype=np.float32)

    monkeypatch.setattr(scenes, "_ground", black)
    monkeypatch.setattr(scenes, "_colour", white)
    monkeypatch.setattr(scenes, "OVERLAP", 0.0)
    for made in scenes.scenes(20, 5, held_out=True):
        ink = made.image[..., 0] >= 128
        outside = ink.copy()
        for x1, y1, x2, y2 in made.boxes.astype(int).tolist():
            inside = ink[y1:y2, x1:x2]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            outside[y1:y2, x1:x2] = False
        assert not outside.any()


def test_held_out_digits_are_in_held_out_scenes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    split = digits.split()
    drawn: list[bytes] = []
    draw = scenes._ink

    def remember(glyph: Image.Image, generator: np.random.Generator) -> np.ndarray:
        drawn.append(glyph.tobytes())
        return draw(glyph, generator)

    monkeypatch.setattr(scenes, "_ink", remember)
    train, held_out = (
        {image[..., 0].tobytes() for image in images} for images in (split.train_images, split.held_out_images)
    )
    assert not train & held_out
    for_training = list(scenes.scenes(40, 0, held_out=False))
    assert len(drawn) >= sum(len(each.labels) for each in for_training)
    assert set(drawn) <= train
    drawn.clear()
    list(scenes.scenes(40, 0, held_out=True))
    assert len(set(drawn)) > 40
    assert set(drawn) <= held_out


def test_a_scene_too_small_for_a_digit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"60×128 pixels has no room for a digit; both must be ≥ 61"):
        scenes.scene(0, 0, held_out=False, size=(60, 128))
    assert scenes.scene(0, 0, held_out=False, size=(61, 61)).image.shape == (61, 61, 3)


def test_infrared_of_black_and_white_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_fixed_pattern", lambda height, width: np.zeros((height, width), dtype=np.float32))
    monkeypatch.setattr(scenes, "TEMPORAL_NOISE", 0.0)
    image = np.zeros((32, 64, 3), dtype=np.uint8)
    image[:, 32:] = 255
    seen = scenes.infrared(image, np.random.default_rng(0))
    assert seen.shape == (32, 64, 1)
    assert seen.dtype == np.uint8
    assert (seen[:, :24] == 184).all()  # black: 255 · (0.42 + 0.30) = 183.6
    assert (seen[:, 40:] == 107).all()  # white: 255 · 0.42 = 107.1
    assert (np.diff(seen[0, 24:40, 0].astype(int)) <= 0).all()  # the edge is blurred: it falls in more than one step
    assert len(np.unique(seen[0, 28:36])) >= 5


def test_infrared_inverts_and_lowers_the_contrast() -> None:
    for index in range(10):
        image = scenes.scene(index, 0, held_out=False).image
        seen = scenes.infrared(image, np.random.default_rng(index))[..., 0].astype(float)
        luminance = image @ scenes.LUMINANCE
        assert np.corrcoef(luminance.ravel(), seen.ravel())[0, 1] < -0.6
        assert seen.std() < 0.5 * luminance.std()


def test_infrared_noise_is_the_sensors_and_the_moments() -> None:
    image = np.full((128, 128, 3), 128, dtype=np.uint8)
    pictures = np.stack(
        [scenes.infrared(image, np.random.default_rng(seed))[..., 0].astype(float) for seed in range(60)]
    )
    assert pictures.std(axis=0).mean() == pytest.approx(255 * scenes.TEMPORAL_NOISE, rel=0.05)
    fixed = pictures.mean(axis=0)
    assert fixed.std() == pytest.approx(255 * math.hypot(scenes.COLUMN_NOISE, scenes.PIXEL_NOISE), rel=0.1)
    assert fixed.mean(axis=0).std() == pytest.approx(255 * scenes.COLUMN_NOISE, rel=0.2)  # of the columns
    again = scenes.infrared(image, np.random.default_rng(0))[..., 0]
    assert (again == pictures[0]).all()


@pytest.mark.parametrize(("modality", "mode"), [("rgb", "RGB"), ("ir", "L")])
def test_export_writes_a_data_set_in_cocos_format(tmp_path: Path, modality: str, mode: str) -> None:
    path = scenes.export(tmp_path / "out", 3, 7, held_out=True, modality=modality, size=(96, 112))  # type: ignore[arg-type]
    document = json.loads(path.read_text())
    assert path == tmp_path / "out" / "annotations.json"
    assert [each["name"] for each in document["categories"]] == list("0123456789")
    assert [each["id"] for each in document["categories"]] == list(range(1, 11))
    make = scenes.infrared_scenes if modality == "ir" else scenes.scenes
    made = list(make(3, 7, held_out=True, size=(96, 112)))
    assert len(document["images"]) == len(made)
    ids = [each["id"] for each in document["annotations"]]
    assert len(set(ids)) == len(ids) == sum(len(each.labels) for each in made)
    for written, scene in zip(document["images"], made, strict=True):
        assert (written["height"], written["width"]) == (96, 112)
        with Image.open(tmp_path / "out" / "images" / written["file_name"]) as picture:
            assert picture.mode == mode
            assert (np.asarray(picture).reshape(scene.image.shape) == scene.image).all()
        of_image = [each for each in document["annotations"] if each["image_id"] == written["id"]]
        assert [each["category_id"] for each in of_image] == scene.labels.tolist()
        boxes = np.array([each["bbox"] for each in of_image])
        assert (boxes[:, :2] == scene.boxes[:, :2]).all()
        assert (boxes[:, :2] + boxes[:, 2:] == scene.boxes[:, 2:]).all()
        assert [each["area"] for each in of_image] == (boxes[:, 2] * boxes[:, 3]).tolist()
        assert all(each["iscrowd"] == 0 for each in of_image)


def test_an_annotation_by_hand() -> None:
    assert scenes.coco_annotation(4, 2, [10.0, 20.0, 13.0, 24.0], 8) == {
        "id": 4, "image_id": 2, "category_id": 8, "bbox": [10.0, 20.0, 3.0, 4.0], "area": 12.0, "iscrowd": 0,
    }  # fmt: skip


class Oracle(nn.Module):
    """Answers with what it was told to, one image after the other."""

    def __init__(self, answers: list[tuple[list[list[float]], list[int], list[float]]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        assert [image.shape for image in images] == [(3, 64, 64)]
        boxes, labels, scores = next(self.answers)
        return [
            {
                "boxes": torch.tensor(boxes).view(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.tensor(scores),
            }
        ]


def test_average_precision_by_hand() -> None:
    """Two scenes with a digit each; the box of the second found is half as wide: right at IoU 0.5 only."""
    truth = [
        Scene(
            np.zeros((64, 64, 3), np.uint8),
            np.array([[8, 8, 28, 48]], dtype=np.float32),
            np.array([3], dtype=np.int64),
        )
    ] * 2
    answers = [([[8.0, 8.0, 28.0, 48.0]], [3], [0.9]), ([[8.0, 8.0, 18.0, 48.0]], [3], [0.8])]
    precision = train_scenes.measured(Oracle(answers), truth)
    assert precision.ap50 == pytest.approx(1.0)
    # at the nine higher thresholds: precision 1 up to a recall of 0.5, which is 51 of COCO's 101 points
    assert precision.ap == pytest.approx((1 + 9 * 51 / 101) / 10)


def test_average_precision_of_nothing_found_is_zero() -> None:
    truth = [scenes.scene(0, 0, held_out=True, size=(64, 64))]
    assert train_scenes.measured(Oracle([([], [], [])]), truth) == (0.0, 0.0)


def test_tinted_keeps_polarity_and_is_sometimes_grey() -> None:
    image = scenes.scene(0, 0, held_out=False).image
    luminance = (image @ scenes.LUMINANCE).ravel()
    without_hue = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        shown = train_scenes.tinted(image, generator)
        assert np.corrcoef(luminance, (shown @ scenes.LUMINANCE).ravel())[0, 1] > 0.95
        ratio = shown.reshape(-1, 3).astype(float).mean(axis=0)
        without_hue += bool(np.allclose(shown / ratio, (shown / ratio)[..., :1], atol=0.03))
    assert 3 <= without_hue <= 20


def test_grey_by_hand() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 10, 10]]], dtype=np.uint8)
    # 0.299 · 255 = 76.2; 0.587 · 255 = 149.7; 0.114 · 255 = 29.1
    assert train_scenes.grey(image)[0].tolist() == [[76] * 3, [150] * 3, [29] * 3, [10] * 3]


def test_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = [train_scenes.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / 100)
    assert rates[500] == pytest.approx(1e-3)  # the middle of the cosine
    assert max(rates) < 2e-3
    assert rates[-1] < 1e-7


def test_training_twice_gives_the_same_weights() -> None:
    one, progress = train_scenes.train(2)
    other, _ = train_scenes.train(2)
    assert [each["step"] for each in progress] == [2]
    assert not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_detector_has_torchvisions_interface() -> None:
    torch.manual_seed(0)
    model = scene_detector.build()
    made = list(scenes.scenes(2, 0, held_out=False))
    images = [train_scenes.to_tensor(each.image) for each in made]
    losses = model(images, train_scenes.targets(made))
    assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert len(scene_detector.LABELS) == 11


def test_detector_learns_statistics_in_backbone_and_pyramid() -> None:
    names = [name for name, module in scene_detector.build().named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(name.startswith("backbone.pyramid.") for name in names) == 4  # two lateral, two of the levels
    assert len(names) == 4 + 2 + 2 * 3


def test_shipped_weights_are_small_and_fit() -> None:
    assert scene_detector.WEIGHTS.stat().st_size < 4_000_000
    scene_detector.build().load_state_dict(load_file(scene_detector.WEIGHTS), strict=True)
    assert not scene_detector.load().training


def test_shipped_detector_does_not_resize_a_scene(detector: nn.Module) -> None:
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    prepared, _ = detector.transform([image])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (scene_detector.MEAN, scene_detector.STD))
    torch.testing.assert_close(prepared.tensors[0], (image - mean) / std)


def test_mean_and_std_are_about_those_of_the_scenes() -> None:
    values = np.stack([each.image for each in scenes.scenes(100, 0, held_out=False)]) / 255
    assert values.mean(axis=(0, 1, 2)) == pytest.approx(scene_detector.MEAN, abs=0.05)
    assert values.std(axis=(0, 1, 2)) == pytest.approx(scene_detector.STD, abs=0.05)


def test_shipped_detector_sees_colour_and_grey_but_not_infrared(detector: nn.Module) -> None:
    in_colour = list(scenes.scenes(60, 0, held_out=True))
    in_grey = [each._replace(image=train_scenes.grey(each.image)) for each in in_colour]
    assert train_scenes.measured(detector, in_colour).ap50 >= 0.8
    assert train_scenes.measured(detector, in_grey).ap50 >= 0.8
    infrared = scenes.infrared_scenes(60, 0, held_out=True)
    assert train_scenes.measured(detector, infrared).ap50 < 0.3


def test_log_names_the_shipped_weights_and_meets_the_goals() -> None:
    log = json.loads(scene_detector.TRAINING_LOG.read_text())
    assert log["sha256"] == hashlib.sha256(scene_detector.WEIGHTS.read_bytes()).hexdigest()
    assert log["seed"] == train_scenes.SEED
    assert log["held_out_scenes"] >= 500
    assert log["rgb"]["ap50"] >= 0.85
    assert log["rgb"]["ap50"] > log["rgb"]["ap"] > 0.5
    assert log["rgb_in_grey"]["ap50"] >= 0.8
    assert log["ir_zero_shot"]["ap50"] < 0.3
    assert log["seconds"] <= 20 * 60
    assert set(log["versions"]) == {"python", "torch", "torchvision", "numpy", "faster-coco-eval"}
    assert log["progress"][-1]["step"] == train_scenes.STEPS
