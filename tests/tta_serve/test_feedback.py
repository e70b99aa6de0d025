"""What clients may say is in an image."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tta_serve.errors import InvalidInput
from tta_serve.feedback import Feedback, check_boxes, class_of

LABELS = ("__background__", "car", "bus", "car")
SIZE = (20, 30)  # pixels, height and width


def feedback(boxes: Sequence[Sequence[float]], labels: Sequence[Any]) -> Feedback:
    return Feedback(np.array(boxes, dtype=np.float64).reshape(-1, 4), tuple(labels), "id", 0, None)


def refusal(*boxes: Sequence[float], labels: Sequence[Any] | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_boxes(feedback(boxes, ["car"] * len(boxes) if labels is None else labels), SIZE, LABELS)
    return str(caught.value)


def test_boxes_and_labels_as_the_detector_has_them() -> None:
    boxes = check_boxes(feedback([[0, 0, 30, 20], [1.5, 2, 3, 4]], ["bus", 1]), SIZE, LABELS)
    assert boxes.boxes.dtype == torch.float32
    assert boxes.boxes.tolist() == [[0, 0, 30, 20], [1.5, 2, 3, 4]]
    assert boxes.labels.dtype == torch.int64
    assert boxes.labels.tolist() == [2, 1]


def test_an_image_may_hold_nothing() -> None:
    boxes = check_boxes(feedback([], []), SIZE, LABELS)
    assert boxes.boxes.shape == (0, 4)
    assert (boxes.labels.shape, boxes.labels.dtype) == ((0,), torch.int64)


def test_what_rounding_put_outside_is_clipped() -> None:
    boxes = check_boxes(feedback([[-0.5, -0.4, 30.5, 20.1]], ["car"]), SIZE, LABELS)
    assert boxes.boxes.tolist() == [[0, 0, 30, 20]]


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([-1, 0, 5, 5], "[-1.0, 0.0, 5.0, 5.0], which is not within the image, 30×20 pixels"),
        ([0, -0.6, 5, 5], "which is not within the image, 30×20 pixels"),
        ([0, 0, 30.6, 5], "[0.0, 0.0, 30.6, 5.0], which is not within"),
        ([0, 0, 5, 21], "which is not within"),
        ([40, 40, 50, 50], "which is not within"),
        ([0, 0, 1e300, 5], "1e+300, 5.0], which is not within"),
        ([math.nan, 0, 5, 5], "[nan, 0.0, 5.0, 5.0]; its sides must be finite"),
        ([0, 0, 5, math.inf], "inf]; its sides must be finite"),
        ([-math.inf, 0, 5, 5], "finite"),
        ([5, 0, 5, 5], "[5.0, 0.0, 5.0, 5.0], which is empty; it must be [x1, y1, x2, y2], x1 < x2, y1 < y2"),
        ([6, 0, 5, 5], "which is empty"),
        ([0, 5, 5, 1], "which is empty"),
        # empty only once they are clipped, or in the float32 that the detector gets
        ([-0.4, 0, -0.1, 5], "[-0.4, 0.0, -0.1, 5.0], which is empty"),
        ([30.1, 0, 30.4, 5], "which is empty"),
        ([0, 20.1, 5, 20.2], "which is empty"),
        ([5, 0, 5 + 1e-9, 5], "which is empty"),
        ([5, 0, 5.0001, 5], "which is empty"),  # and here once it is resized
    ],
)
def test_bad_boxes(box: list[float], said: str) -> None:
    message = refusal([0, 0, 1, 1], box)
    assert message.startswith("box 1 is [")
    assert said in message


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("tram", "there is no class 'tram'; give a name (car, bus, car …) or an index, 1 … 3"),
        ("__background__", "'__background__'"),
        (0, "there is no class 0;"),
        (4, "there is no class 4;"),
        (-1, "-1"),
        (10**4000, "there is no class 1000"),
        (True, "True"),
        (1.0, "1.0"),
        ("", "''"),
        ("x" * 10_000, "there is no class 'xxx"),
    ],
)
def test_bad_labels(label: Any, said: str) -> None:
    message = refusal([0, 0, 1, 1], labels=[label])
    assert said in message
    assert len(message) < 300


def test_each_box_needs_a_label() -> None:
    assert refusal([0, 0, 1, 1], labels=[]) == "1 boxes and 0 labels; each box needs one"
    assert refusal(labels=["car", "bus"]) == "0 boxes and 2 labels; each box needs one"


def test_a_detector_without_background() -> None:
    assert [class_of(label, ("a", "b")) for label in ("a", 0, "b", 1)] == [0, 0, 1, 1]
    with pytest.raises(InvalidInput, match=r"index, 0 … 1"):
        class_of(2, ("a", "b"))


sides = st.floats(-3, 40) | st.floats() | st.sampled_from([0.0, 20.0, 30.0, 1e-320])


@given(st.lists(st.tuples(sides, sides, sides, sides), max_size=3))
def test_whatever_is_accepted_has_room_within_the_image(boxes: list[tuple[float, ...]]) -> None:
    try:
        checked = check_boxes(feedback(boxes, ["car"] * len(boxes)), SIZE, LABELS)
    except InvalidInput:
        return
    assert len(checked.boxes) == len(boxes)
    x1, y1, x2, y2 = checked.boxes.unbind(dim=1)
    assert bool(((x1 >= 0) & (y1 >= 0) & (x2 <= 30) & (y2 <= 20)).all())
    assert bool(((x2 - x1 > 0.0999) & (y2 - y1 > 0.0999)).all())
