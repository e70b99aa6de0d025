"""Draws what a detector found: scenes in rows, ways of looking at them in columns, boxes with label and score."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageDraw import ImageDraw as Draw
from torchvision.ops import box_iou

from adapters.detection import Boxes, Detections

SCALE = 3  # pixels of the picture for one of a scene
LEAST_SCORE = 0.4  # of the boxes that are drawn
OVERLAP = 0.5  # intersection over union with a true box of the same label, at least, to be right: that of AP50

MARGIN, GAP = 28, 14  # pixels, around everything and between scenes
TITLE, CAPTION, NOTE, TAG = 30, 22, 18, 17  # pixels, heights of letters
LINE = 1.35  # of a letter's height
BOX_WIDTH, TRUE_WIDTH = 3, 1  # pixels

PAPER, INK, FAINT_INK = "#ffffff", "#1a1a1a", "#5c5c5c"
RIGHT, WRONG, TRUE = "#0f9d76", "#d1420b", "#ffffff"  # the first two differ for the colour-blind too
TRUE_EDGE = "#000000"  # beside the thin line, so that it shows on bright ground
TAG_INK = "#ffffff"


class View(NamedTuple):
    """One scene, and what was found in it."""

    image: NDArray[np.uint8]  # [H, W, 3] or [H, W, 1]
    truth: Boxes  # in its pixels
    found: Detections  # best first


class Column(NamedTuple):
    """One way of looking."""

    caption: str
    note: str  # a line below it
    views: tuple[View, ...]  # from top to bottom; all of one size, and as many in every column


def draw(title: str, columns: Sequence[Column], labels: Sequence[str]) -> Image.Image:
    """The whole picture.

    Args:
        title: its first line.
        columns: from left to right, at least one with at least one view.
        labels: by class index.
    """
    height, width = (SCALE * side for side in columns[0].views[0].image.shape[:2])
    rows = len(columns[0].views)
    legend_top = MARGIN + round(LINE * TITLE)
    captions_top = legend_top + round(LINE * NOTE) + MARGIN
    scenes_top = captions_top + round(LINE * CAPTION) + round(LINE * NOTE) + GAP // 2
    size = (
        2 * MARGIN + len(columns) * width + (len(columns) - 1) * GAP,
        scenes_top + rows * height + (rows - 1) * GAP + MARGIN,
    )
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), title, INK, _font(TITLE), anchor="lt")
    _draw_legend(pen, legend_top + GAP // 2)
    for i, column in enumerate(columns):
        left = MARGIN + i * (width + GAP)
        pen.text((left, captions_top), column.caption, INK, _font(CAPTION), anchor="lt")
        pen.text((left, captions_top + round(LINE * CAPTION)), column.note, FAINT_INK, _font(NOTE), anchor="lt")
        for j, view in enumerate(column.views):
            picture.paste(draw_view(view, labels), (left, scenes_top + j * (height + GAP)))
    return picture


def draw_view(view: View, labels: Sequence[str]) -> Image.Image:
    """One scene, enlarged, with its boxes: [SCALE · H, SCALE · W]."""
    image = Image.fromarray(view.image[..., 0] if view.image.shape[2] == 1 else view.image).convert("RGB")
    picture = image.resize((SCALE * image.width, SCALE * image.height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box in view.truth.boxes.tolist():
        left, top, right, bottom = _scaled(box)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=TRUE_EDGE, width=TRUE_WIDTH)
        pen.rectangle((left, top, right, bottom), outline=TRUE, width=TRUE_WIDTH)
    shown = sure(view.found)
    drawn = zip(
        shown.boxes.tolist(), shown.labels.tolist(), shown.scores.tolist(), hits(shown, view.truth), strict=True
    )
    for box, label, score, good in reversed(list(drawn)):  # the surest on top
        place, colour = _scaled(box), RIGHT if good else WRONG
        pen.rectangle(place, outline=colour, width=BOX_WIDTH)
        _draw_tag(pen, picture.size, place, f"{labels[label]}  {score:.2f}", colour)
    if not len(shown.scores):
        _draw_tag(pen, picture.size, (GAP, GAP, GAP, GAP), f"nothing above {LEAST_SCORE}", FAINT_INK)
    return picture


def sure(found: Detections) -> Detections:
    """Those that are drawn."""
    chosen = found.scores >= LEAST_SCORE
    return Detections(*(each[chosen] for each in found))


def hits(found: Detections, truth: Boxes) -> list[bool]:
    """Whether each detection is of a true box that no better one is of.

    Args:
        found: best first.
        truth: in the same pixels.

    >>> import torch
    >>> truth = Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([4]))
    >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 6.0], [0.0, 0.0, 8.0, 8.0]])
    >>> hits(Detections(boxes, torch.tensor([4, 4]), torch.tensor([0.9, 0.8])), truth)
    [True, False]
    """
    overlaps = box_iou(found.boxes, truth.boxes)  # [N, M]
    overlaps[found.labels[:, None] != truth.labels[None]] = 0
    answers: list[bool] = []
    for i in range(len(overlaps)):
        best = overlaps[i].max(0) if overlaps.shape[1] else None
        answers.append(best is not None and best.values.item() >= OVERLAP)
        if answers[-1] and best is not None:
            overlaps[:, best.indices] = 0  # taken
    return answers


def _draw_legend(pen: Draw, top: int) -> None:
    left = float(MARGIN)
    for colour, width, words in (
        (RIGHT, BOX_WIDTH, "found, and right"),
        (WRONG, BOX_WIDTH, "found, and wrong"),
        (TRUE, TRUE_WIDTH, "what is really there"),
    ):
        side = round(0.9 * NOTE)
        if colour == TRUE:
            pen.rectangle((left, top, left + side, top + side), fill=FAINT_INK, outline=TRUE_EDGE, width=1)
            pen.rectangle((left + 1, top + 1, left + side - 1, top + side - 1), outline=TRUE, width=width)
        else:
            pen.rectangle((left, top, left + side, top + side), outline=colour, width=width)
        left += side + GAP // 2
        pen.text((left, top + side / 2), words, FAINT_INK, _font(NOTE), anchor="lm")
        left += pen.textlength(words, _font(NOTE)) + 2 * GAP
    words = f"numbers: the digit, and how sure the detector is (below {LEAST_SCORE} it is left out)"
    pen.text((left, top + round(0.45 * NOTE)), words, FAINT_INK, _font(NOTE), anchor="lm")


def _draw_tag(pen: Draw, size: tuple[int, int], box: tuple[int, int, int, int], words: str, colour: str) -> None:
    """Words on a coloured ground: above the box, or within it where there is no room above."""
    width, height = round(pen.textlength(words, _font(TAG))) + 8, round(LINE * TAG)
    left = min(max(box[0], 0), size[0] - width)
    top = box[1] - height if box[1] >= height else box[1]
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    pen.text((left + 4, top + height / 2), words, TAG_INK, _font(TAG), anchor="lm")


def _scaled(box: Sequence[float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(SCALE * side) for side in box)
    return left, top, right, bottom


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
