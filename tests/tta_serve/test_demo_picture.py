import numpy as np
import pytest
import torch
from PIL import ImageColor

from adapters.detection import Boxes, Detections
from tta_serve.demo_picture import (
    BOX_WIDTH,
    GAP,
    MARGIN,
    RIGHT,
    SCALE,
    TRUE,
    TRUE_EDGE,
    WRONG,
    Column,
    View,
    draw,
    draw_view,
    hits,
    sure,
)

LABELS = ("__background__", "0", "1")
GREY = 90


def found(*listed: tuple[list[float], int, float]) -> Detections:
    boxes, labels, scores = zip(*listed, strict=True) if listed else ((), (), ())
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float32),
    )


def truth(*listed: tuple[list[float], int]) -> Boxes:
    return Boxes(*found(*((box, label, 1.0) for box, label in listed))[:2])


def view(seen: Detections, real: Boxes, channels: int = 1) -> View:
    return View(np.full((60, 80, channels), GREY, np.uint8), real, seen)


SQUARE = [0.0, 0.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("seen", "real", "expected"),
    [
        ([(SQUARE, 1, 0.9)], [(SQUARE, 1)], [True]),
        ([(SQUARE, 2, 0.9)], [(SQUARE, 1)], [False]),  # another digit
        ([([0.0, 0.0, 10.0, 5.0], 1, 0.9)], [(SQUARE, 1)], [True]),  # overlap 50 / 100
        ([([0.0, 0.0, 10.0, 4.9], 1, 0.9)], [(SQUARE, 1)], [False]),  # 49 / 100
        ([(SQUARE, 1, 0.9), (SQUARE, 1, 0.8)], [(SQUARE, 1)], [True, False]),  # found twice
        ([(SQUARE, 2, 0.9), (SQUARE, 1, 0.8)], [(SQUARE, 1)], [False, True]),
        ([(SQUARE, 1, 0.9)], [], [False]),
        ([], [(SQUARE, 1)], []),
    ],
)
def test_right_is_the_best_of_its_digit_with_half_the_overlap(seen, real, expected):
    assert hits(found(*seen), truth(*real)) == expected


def test_of_two_true_boxes_the_nearer_one_is_taken():
    real = truth(([0.0, 0.0, 10.0, 10.0], 1), ([2.0, 0.0, 12.0, 10.0], 1))
    seen = found(([2.0, 0.0, 12.0, 10.0], 1, 0.9), ([0.0, 0.0, 10.0, 10.0], 1, 0.8))
    assert hits(seen, real) == [True, True]


def test_what_is_hardly_sure_is_not_drawn():
    assert sure(found((SQUARE, 1, 0.5), (SQUARE, 2, 0.4), (SQUARE, 1, 0.39))).labels.tolist() == [1, 2]


@pytest.mark.parametrize(("label", "colour"), [(1, RIGHT), (2, WRONG)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_has_the_colour_of_what_it_is(label, colour, channels):
    seen = found(([20.0, 30.0, 40.0, 50.0], label, 0.9))
    picture = draw_view(view(seen, truth(([22.0, 30.0, 42.0, 50.0], 1)), channels), LABELS)
    assert picture.size == (80 * SCALE, 60 * SCALE)
    pixel = picture.getpixel
    assert pixel((20 * SCALE, 45 * SCALE)) == ImageColor.getrgb(colour)  # its left side
    assert pixel((20 * SCALE + BOX_WIDTH - 1, 45 * SCALE)) == ImageColor.getrgb(colour)
    assert pixel((20 * SCALE + BOX_WIDTH, 45 * SCALE)) == (GREY,) * 3
    assert pixel((42 * SCALE, 45 * SCALE)) == ImageColor.getrgb(TRUE)  # right side of the true box, thin
    assert pixel((42 * SCALE + 1, 45 * SCALE)) == ImageColor.getrgb(TRUE_EDGE)
    assert pixel((42 * SCALE + 2, 45 * SCALE)) == (GREY,) * 3
    assert pixel((20 * SCALE + 1, 30 * SCALE - 5)) == ImageColor.getrgb(colour)  # its tag stands on it


def test_the_surest_box_is_on_top():
    seen = found(([20.0, 30.0, 40.0, 50.0], 1, 0.9), ([20.0, 30.0, 40.0, 50.0], 2, 0.8))
    picture = draw_view(view(seen, truth(([20.0, 30.0, 40.0, 50.0], 1))), LABELS)
    assert picture.getpixel((20 * SCALE, 45 * SCALE)) == ImageColor.getrgb(RIGHT)


@pytest.mark.parametrize("box", [[0.0, 0.0, 20.0, 20.0], [70.0, 1.0, 80.0, 10.0]])
def test_a_tag_stays_within_the_scene(box):
    plain = draw_view(view(found(([20.0, 30.0, 40.0, 50.0], 1, 0.9)), truth()), LABELS)
    picture = draw_view(view(found((box, 1, 0.9)), truth()), LABELS)

    def coloured(image):
        # pixels of the tag and the box
        return int((np.asarray(image) == ImageColor.getrgb(WRONG)).all(axis=2).sum())

    outline = 2 * BOX_WIDTH * SCALE * 20  # less than what the tag's ground has
    assert coloured(picture) > coloured(plain) / 2 > outline / 2


def test_nothing_is_said_where_nothing_is_sure():
    empty = draw_view(view(found((SQUARE, 1, 0.1)), truth()), LABELS)
    assert len(empty.getcolors()) > 1  # words
    assert draw_view(view(found((SQUARE, 1, 0.1)), truth()), LABELS).tobytes() == empty.tobytes()
    assert empty.getpixel((SCALE * 80 - 1, SCALE * 60 - 1)) == (GREY,) * 3


def test_columns_stand_beside_each_other():
    seen, real = found(([20.0, 30.0, 40.0, 50.0], 1, 0.9)), truth(([20.0, 30.0, 40.0, 50.0], 1))
    one = Column("one", "AP50 1.000", (view(seen, real), view(seen, real)))
    other = Column("other", "AP50 0.000", (view(found(), real), view(found(), real)))
    picture = draw("two", [one, other], LABELS)
    assert picture.width == 2 * MARGIN + 2 * 80 * SCALE + GAP
    bottom = picture.height - MARGIN
    left, right = (
        picture.crop((start, bottom - 60 * SCALE, start + 80 * SCALE, bottom))
        for start in (MARGIN, MARGIN + 80 * SCALE + GAP)
    )
    assert left.tobytes() == draw_view(one.views[1], LABELS).tobytes()
    assert right.tobytes() == draw_view(other.views[1], LABELS).tobytes()
