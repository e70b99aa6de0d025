"""Numbers by hand: 10×20 pictures, two or three boxes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.detection import Boxes, Detections
from tta_serve import coco
from tta_serve.coco import AP, average_precision, read, read_image
from tta_serve.errors import ConfigError

LABELS = ("__background__", "person", "bicycle", "car")
GOOD: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "b.png", "width": 20, "height": 10},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [2, 1, 4, 3]},
        {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0.5, 0, 19.5, 10]},
    ],
    "categories": [{"id": 5, "name": "Car"}, {"id": 9, "name": "person"}],
}

Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """`folder(annotations, name="annotations.json", images="")`: with a.png and b.png, grey, 10 high and 20 wide."""

    def make(content: Any = GOOD, name: str = "annotations.json", images: str = "") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        (tmp_path / images).mkdir(exist_ok=True)
        for file in ("a.png", "b.png"):
            Image.fromarray(np.full((10, 20), 9, np.uint8)).save(tmp_path / images / file)
        return tmp_path

    return make


def changed(**replaced: Any) -> dict[str, Any]:
    """GOOD with one annotation that has these values."""
    return {**GOOD, "annotations": [{**GOOD["annotations"][0], **replaced}]}


def problems(path: Path, labels: tuple[str, ...] = LABELS) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(path, labels)
    return str(caught.value).replace(str(path), "DIR").splitlines()


def test_boxes_are_corners_and_categories_are_labels_of_the_same_name(folder: Make) -> None:
    path = folder()
    data = read(path, LABELS)
    assert data.file == path / "annotations.json"
    first, second = data.examples
    assert (first.file, first.size) == (path / "a.png", (10, 20))
    assert first.truth.boxes.tolist() == [[2, 1, 6, 4], [0.5, 0, 20, 10]]
    assert first.truth.boxes.dtype == torch.float32
    assert first.truth.labels.tolist() == [3, 1]
    assert first.truth.labels.dtype == torch.int64
    assert second.truth.boxes.shape == (0, 4)
    assert second.truth.labels.shape == (0,)


@pytest.mark.parametrize("name", ["annotations.json", "instances.json", "annotations/val.json"])
@pytest.mark.parametrize("images", ["", "images"])
def test_where_files_may_lie(folder: Make, name: str, images: str) -> None:
    path = folder(name=name, images=images)
    data = read(path, LABELS)
    assert data.file == path / name
    assert data.examples[0].file == path / images / "a.png"


def test_annotations_json_wins_over_others(folder: Make) -> None:
    path = folder()
    (path / "other.json").write_text("{}")
    assert read(path, LABELS).file.name == "annotations.json"


def test_no_annotations_or_too_many(folder: Make, tmp_path: Path) -> None:
    assert problems(tmp_path / "nothing") == ["DIR is not a folder"]
    assert problems(tmp_path) == [
        "DIR: expected annotations.json, or one *.json in it or in DIR/annotations; there is none"
    ]
    path = folder(name="one.json")
    (path / "two.json").write_text("{}")
    assert problems(path)[0].endswith("there are 2: one.json, two.json")


def test_what_is_no_coco_file(folder: Make) -> None:
    assert problems(folder("{"))[0].startswith("DIR/annotations.json: no JSON can be read: ")
    assert problems(folder([]))[0].endswith("images, annotations, categories missing")
    assert problems(folder({**GOOD, "images": {}}))[0].endswith("; images missing")


def test_ids_are_class_indices_where_no_category_has_a_label_s_name(folder: Make) -> None:
    content = {**GOOD, "categories": [{"id": 5, "name": "x"}, {"id": 9}], "annotations": GOOD["annotations"][:1]}
    labels = ("__background__", *"abcdefg")
    assert read(folder(content), labels).examples[0].truth.labels.tolist() == [5]
    (said,) = problems(folder(content), labels[:5])
    assert said == (
        "DIR/annotations.json: annotation 1 of image 7 (a.png): category 5 (named 'x') is none of the detector's "
        "4 labels: a, b, c, d"
    )


@pytest.mark.parametrize(("labels", "right"), [(("__background__", "a"), False), (("a", "b"), True)])
def test_index_zero_is_a_class_only_without_a_background(folder: Make, labels: tuple[str, ...], right: bool) -> None:
    content = {**changed(category_id=0), "categories": [{"id": 0, "name": "?"}]}
    if right:
        assert read(folder(content), labels).examples[0].truth.labels.tolist() == [0]
    else:
        assert "category 0 (named '?') is none of the detector's 1 labels: a" in problems(folder(content), labels)[0]


def test_a_detector_without_labels(folder: Make) -> None:
    assert problems(folder(), ()) == [
        "DIR: the detector has no labels that categories could mean; give them (`labels`)"
    ]


def test_a_number_makes_no_class_of_an_unknown_name(folder: Make) -> None:
    """Category 2 is a lorry; that the detector's class 2 is a bicycle must not make it one."""
    content = {**changed(category_id=2), "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "lorry"}]}
    assert "category 2 (named 'lorry') is none of the detector's 3 labels" in problems(folder(content))[0]


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([2, 1, 0, 3], "bbox [2.0, 1.0, 0.0, 3.0] is 0 wide and 3 high; both must be positive"),
        ([2, 1, 4, -3], "bbox [2.0, 1.0, 4.0, -3.0] is 4 wide and -3 high; both must be positive"),
        ([2, float("nan"), 4, 3], "bbox [2.0, nan, 4.0, 3.0] has a number that is not finite"),
        ([2, 1, float("inf"), 3], "bbox [2.0, 1.0, inf, 3.0] has a number that is not finite"),
        ([-2, 1, 4, 3], "bbox [-2.0, 1.0, 4.0, 3.0] lies outside the image of 20×10 pixels"),
        ([18, 1, 4, 3], "bbox [18.0, 1.0, 4.0, 3.0] lies outside the image of 20×10 pixels"),
        ([2, 9, 4, 3], "bbox [2.0, 9.0, 4.0, 3.0] lies outside the image of 20×10 pixels"),
        ([20, 1, 1, 3], "bbox [20.0, 1.0, 1.0, 3.0] lies outside the image of 20×10 pixels"),
        ([2, 1, 1e-12, 3], "bbox [2.0, 1.0, 1e-12, 3.0] has no size in float32"),
    ],
)
def test_wrong_boxes(folder: Make, box: list[float], said: str) -> None:
    assert problems(folder(changed(bbox=box))) == [f"DIR/annotations.json: annotation 1 of image 7 (a.png): {said}"]


def test_a_box_that_overhangs_by_a_pixel_is_clipped(folder: Make) -> None:
    path = folder(changed(bbox=[-0.5, 1, 21.25, 9.5]))
    assert read(path, LABELS).examples[0].truth.boxes.tolist() == [[0, 1, 20, 10]]


def test_entries_of_the_wrong_form(folder: Make) -> None:
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3]},
        {"image_id": 7, "category_id": "cat", "bbox": [1, 2, 3, 4]},
        "box",
        {"id": 4, "image_id": 8, "category_id": 5, "bbox": [1, 2, 3, 4]},
    ]
    said = problems(folder({**GOOD, "annotations": annotations}))
    assert [line.removeprefix("DIR/annotations.json: ") for line in said] == [
        "annotation 1 of image 7: bbox.3: Field required, not [1, 2, 3]",
        "annotation without id (number 1 of the list) of image 7: category_id: Input should be a valid integer, unable "
        "to parse string as an integer, not 'cat'",
        "annotation without id (number 2 of the list): Input should be a valid dictionary or instance of _Annotation, "
        "not 'box'",
        "annotation 4: there is no image 8",
    ]


def test_images_that_are_not_there_or_not_what_is_said(folder: Make) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": 21, "height": 10},
        {"id": 2, "file_name": "none.png"},
        {"id": 3, "file_name": "text.png"},
        {"id": 4, "file_name": "b.png"},
        {"id": 4, "file_name": "b.png"},
    ]
    path = folder({**GOOD, "images": images, "annotations": [{**GOOD["annotations"][0], "image_id": 2}]})
    (path / "text.png").write_text("no picture")
    said = [line.removeprefix("DIR/annotations.json: ") for line in problems(path)]
    assert said[0] == "image 1 (a.png): listed as 21×10 pixels; DIR/a.png has 20×10"
    assert said[1] == "image 2 (none.png): there is no file DIR/none.png, nor DIR/images/none.png"
    assert said[2].startswith("image 3 (text.png): DIR/text.png is no image that can be read")
    assert said[3:] == ["image 4: the id is taken by another image"]  # the box in image 2 is no second problem


def test_nothing_to_learn_from(folder: Make) -> None:
    assert problems(folder({**GOOD, "images": [], "annotations": []})) == ["DIR/annotations.json: no image is listed"]
    assert problems(folder({**GOOD, "annotations": []})) == ["DIR/annotations.json: no image has a box"]


def test_many_problems_are_counted(folder: Make) -> None:
    annotations = [{"id": id, "image_id": 8, "category_id": 5, "bbox": [1, 2, 3, 4]} for id in range(25)]
    said = problems(folder({**GOOD, "annotations": annotations}))
    assert len(said) == 21
    assert said[-1] == "… and 5 more problems"


def test_crowds_are_skipped(folder: Make) -> None:
    crowd = {**GOOD["annotations"][1], "iscrowd": 1, "bbox": [0, 0, -1, 99], "category_id": 77}
    path = folder({**GOOD, "annotations": [GOOD["annotations"][0], crowd]})
    assert len(read(path, LABELS).examples[0].truth.boxes) == 1


def test_a_picture_on_its_side_has_the_size_that_it_is_seen_in(folder: Make) -> None:
    content = {**GOOD, "images": [{"id": 7, "file_name": "a.png", "width": 10, "height": 20}]}
    path = folder({**content, "annotations": [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [0, 0, 5, 19]}]})
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((10, 20), np.uint8)
    pixels[0, 0] = 200  # turned clockwise: upper right
    Image.fromarray(pixels).save(path / "a.png", exif=exif)
    example = read(path, LABELS).examples[0]
    assert example.size == (20, 10)
    image = read_image(example.file)
    assert image.shape == (1, 20, 10)
    assert image[0, 0, 9] == 200


def test_images_are_read_late(folder: Make) -> None:
    path = folder()
    example = read(path, LABELS).examples[0]
    example.file.write_bytes(example.file.read_bytes()[:45])  # the header, and 4 bytes of pixels
    with pytest.raises(ConfigError, match=re.escape(f"{example.file}: the image cannot be decoded")):
        read_image(example.file)


@pytest.mark.parametrize(
    ("mode", "value", "channels"),
    [
        ("1", 1, [255]),
        ("L", 7, [7]),
        ("I;16", 513, [2]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 4), [1, 2, 3]),
        ("P", 0, [0, 0, 0]),
    ],
)
def test_grey_pictures_have_one_channel(tmp_path: Path, mode: str, value: Any, channels: list[int]) -> None:
    Image.new(mode, (3, 2), value).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.dtype == torch.uint8
    assert image.shape == (len(channels), 2, 3)
    assert image[:, 1, 2].tolist() == channels


def test_pictures_of_floating_point_numbers_are_refused(tmp_path: Path) -> None:
    Image.new("F", (3, 2), 0.5).save(tmp_path / "x.tiff")
    with pytest.raises(ConfigError, match="floating-point numbers of no known range"):
        read_image(tmp_path / "x.tiff")


def test_the_digest_changes_with_images_boxes_and_labels(folder: Make) -> None:
    digests = {
        coco.digest(read(folder(content), LABELS).examples)
        for content in (GOOD, changed(), changed(bbox=[2, 1, 4, 4]), changed(category_id=9))
    }
    assert len(digests) == 4
    examples = read(folder(), LABELS).examples
    assert coco.digest(examples) == coco.digest(read(folder(), LABELS).examples)
    assert coco.digest(examples) != coco.digest(examples[:1])
    examples[0].file.write_bytes(examples[0].file.read_bytes() + b" ")
    assert coco.digest(examples) not in digests


SIZES = [(100, 100), (100, 100)]
A, B, C = [10.0, 10, 50, 50], [60.0, 60, 90, 90], [0.0, 0, 9, 9]


def truth(*boxes: tuple[list[float], int]) -> Boxes:
    return Boxes(
        torch.tensor([box for box, _ in boxes]).reshape(-1, 4), torch.tensor([label for _, label in boxes]).long()
    )


def found(*boxes: tuple[list[float], int, float]) -> Detections:
    return Detections(*truth(*(box[:2] for box in boxes)), torch.tensor([score for *_, score in boxes]))


def test_all_found_is_one() -> None:
    got = average_precision([truth((A, 1), (B, 2)), truth()], [found((A, 1, 0.9), (B, 2, 0.3)), found()], SIZES)
    assert got == AP(1.0, 1.0)


def test_nothing_found_is_zero() -> None:
    assert average_precision([truth((A, 1)), truth()], [found(), found()], SIZES) == AP(0.0, 0.0)
    assert average_precision([truth((A, 1)), truth()], [found((C, 1, 1.0)), found()], SIZES) == AP(0.0, 0.0)


def test_half_of_the_boxes_is_half_of_the_recalls() -> None:
    """Precision 1 at the recalls 0.00 … 0.50, then 0: 51 of COCO's 101."""
    got = average_precision([truth((A, 1), (B, 1)), truth()], [found((A, 1, 0.9)), found()], SIZES)
    assert got == pytest.approx((51 / 101, 51 / 101))


def test_one_of_two_classes_is_half() -> None:
    got = average_precision([truth((A, 1)), truth((B, 2))], [found((A, 1, 0.9)), found()], SIZES)
    assert got == pytest.approx((0.5, 0.5))


def test_the_wrong_class_or_image_does_not_count() -> None:
    assert average_precision([truth((A, 1)), truth()], [found((A, 2, 0.9)), found()], SIZES) == AP(0.0, 0.0)
    assert average_precision([truth((A, 1)), truth()], [found(), found((A, 1, 0.9))], SIZES) == AP(0.0, 0.0)


def test_a_false_box_that_is_surer_halves_the_precision() -> None:
    got = average_precision([truth((A, 1)), truth()], [found((C, 1, 0.9), (A, 1, 0.5)), found()], SIZES)
    assert got == pytest.approx((0.5, 0.5))


def test_the_second_of_two_equal_boxes_is_false() -> None:
    """A, A again, B: precision at B's recall is 2 of 3, at A's 1."""
    boxes = found((A, 1, 0.9), (A, 1, 0.8), (B, 1, 0.7))
    got = average_precision([truth((A, 1), (B, 1)), truth()], [boxes, found()], SIZES)
    assert got == pytest.approx(((51 + 50 * 2 / 3) / 101,) * 2)


def test_ap_asks_for_more_overlap_than_ap50() -> None:
    """31 of 40 rows are an overlap of 0.775: right at 0.50, 0.55 … 0.75, which are 6 of 10."""
    near = [10.0, 10, 50, 41]
    got = average_precision([truth((A, 1)), truth()], [found((near, 1, 0.9)), found()], SIZES)
    assert got == pytest.approx((0.6, 1.0))


def test_a_class_that_no_image_has_is_left_out() -> None:
    got = average_precision([truth((A, 1)), truth()], [found((A, 1, 0.9), (B, 7, 0.99)), found()], SIZES)
    assert got == AP(1.0, 1.0)


def test_no_box_at_all_has_no_recall() -> None:
    with pytest.raises(ValueError, match="none of 2 images has a box"):
        average_precision([truth(), truth()], [found(), found()], SIZES)


def test_nothing_is_printed_or_written(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    average_precision([truth((A, 1))], [found((A, 1, 0.9))], SIZES[:1])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not list(tmp_path.iterdir())
