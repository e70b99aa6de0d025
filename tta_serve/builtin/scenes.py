"""Made scenes for the built-in detection model: real handwritten digits in colour on textured ground, boxes known.

The digits are those of `tta_serve.builtin.digits`, turned, stretched and resized a little; the digits that its split
holds out are only ever seen in held-out scenes. `infrared` renders a scene as another sensor would see it. Scene
`index` of a seed is the same bytes whatever else is made beside it.

Digits are always brighter than the ground around them. That is what lets an inverted rendering be a shift.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tta_serve.builtin import digits

LABELS = ("__background__", *digits.LABELS)  # class indices as torchvision's detectors count them
SIZE = (128, 128)  # pixels, height and width
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green, blue (ITU-R BT.601)

MOST_DIGITS = 6
DIGIT_SIDE = (16.0, 43.0)  # pixels of the square that a digit was written in; its ink is about as high
CANVAS = 1.4  # sides that a digit is drawn on: room for the corners of a turned and stretched square
TURN_DEGREES = 10.0
STRETCH = 0.12  # share of the width, narrower or wider
OVERLAP = 0.08  # of the smaller of two boxes, at most
PLACES = 25  # tried for a digit before it is left out

GROUND_LUMINANCE = (0.10, 0.38)
DIGIT_OVER_GROUND = 0.30  # luminance, at least
COARSE_TEXTURE, FINE_TEXTURE, SLOPE = 0.26, 0.14, 0.16  # from darkest to brightest, at most
DISTRACTORS = (3, 9)  # strokes and blobs, fewest and most

FAINTEST_INK, FULL_INK = 0.40, 0.70  # grey values of the digit images: below is ground, above is all ink

INFRARED_LEVEL = 0.42  # of the brightest visible spot; high, as of a warm sensor: what is dark still has a signal
INFRARED_CONTRAST = 0.30  # from the brightest visible spot to the darkest
INFRARED_BLUR = 1.3  # pixels, σ
COLUMN_NOISE, PIXEL_NOISE, TEMPORAL_NOISE = 0.010, 0.010, 0.016  # σ; the first two are the sensor's and never change
SENSOR_SEED = 1  # of the fixed pattern
INFRARED = 1  # ends a generator's seed. Not 0: numpy reads [1, 2] and [1, 2, 0] as the same seed


class Scene(NamedTuple):
    """A picture and the digits in it."""

    image: NDArray[np.uint8]  # [H, W, 3], RGB; [H, W, 1] when infrared
    boxes: NDArray[np.float32]  # [N, 4]: x1, y1, x2, y2 in pixels, around all ink of at least half opacity
    labels: NDArray[np.int64]  # [N], 1 … 10 for the digits 0 … 9


class _Glyphs(NamedTuple):
    images: tuple[Image.Image, ...]  # 32×32, grey, ink is bright
    labels: NDArray[np.int64]  # 0 … 9


def scenes(count: int, seed: int, held_out: bool, size: tuple[int, int] = SIZE) -> Iterator[Scene]:
    """The first `count` scenes of a seed, in colour.

    Args:
        count: how many.
        seed: at least 0.
        held_out: made of the held-out digits rather than of those to train on.
        size: height and width in pixels.

    Raises:
        ValueError: the size has no room for the largest digit.
    """
    return (scene(index, seed, held_out, size) for index in range(count))


def infrared_scenes(count: int, seed: int, held_out: bool, size: tuple[int, int] = SIZE) -> Iterator[Scene]:
    """The same scenes as the infrared sensor sees them; images are [H, W, 1]."""
    for index, visible in enumerate(scenes(count, seed, held_out, size)):
        generator = np.random.default_rng([seed, index, int(held_out), INFRARED])
        yield visible._replace(image=infrared(visible.image, generator))


def scene(index: int, seed: int, held_out: bool, size: tuple[int, int] = SIZE) -> Scene:
    """One scene in colour; see `scenes`."""
    smallest = math.ceil(CANVAS * DIGIT_SIDE[1])
    if min(size) < smallest:
        raise ValueError(f"a scene of {size[0]}×{size[1]} pixels has no room for a digit; both must be ≥ {smallest}")
    generator = np.random.default_rng([seed, index, int(held_out)])
    ground_luminance = generator.uniform(*GROUND_LUMINANCE)
    picture = _ground(ground_luminance, size, generator)
    glyphs = _glyphs(held_out)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(generator.integers(1, MOST_DIGITS, endpoint=True)):
        chosen = int(generator.integers(len(glyphs.labels)))
        opacity = _ink(glyphs.images[chosen], generator)
        colour = _colour(generator.uniform(max(0.5, ground_luminance + DIGIT_OVER_GROUND), 0.95), generator)
        place = _place(opacity, boxes, size, generator)
        if place is None:
            continue
        top, left, box = place
        patch = picture[top : top + opacity.shape[0], left : left + opacity.shape[1]]
        patch += opacity[..., None] * (colour - patch)
        boxes.append(box)
        labels.append(1 + int(glyphs.labels[chosen]))
    return Scene(_bytes(picture), np.array(boxes, dtype=np.float32), np.array(labels, dtype=np.int64))


def infrared(image: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
    """What the infrared sensor makes of a picture: inverted, blurred, of low contrast, noisy.

    `level + contrast · blur(1 − luminance) + fixed pattern + noise`, in [0, 1].

    Args:
        image: uint8 [H, W, 3], RGB.
        generator: of the noise that is new in every picture; the fixed pattern belongs to the sensor.

    Returns:
        uint8 [H, W, 1].
    """
    luminance = Image.fromarray(_bytes(image @ LUMINANCE / 255))
    blurred = luminance.filter(ImageFilter.GaussianBlur(INFRARED_BLUR))
    signal = INFRARED_LEVEL + INFRARED_CONTRAST * (1 - _shares(blurred))
    noise = TEMPORAL_NOISE * generator.standard_normal(signal.shape, dtype=np.float32)
    return _bytes(signal + _fixed_pattern(*signal.shape) + noise)[..., None]


def export(
    folder: Path,
    count: int,
    seed: int,
    held_out: bool,
    modality: Literal["rgb", "ir"],
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write scenes as a data set in COCO's format: `images/*.png` and `annotations.json` in the folder.

    Returns:
        The path of the annotations.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    make: Callable[..., Iterator[Scene]] = infrared_scenes if modality == "ir" else scenes
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, made in enumerate(make(count, seed, held_out, size)):
        name = f"{index:06d}.png"
        picture = made.image[..., 0] if modality == "ir" else made.image
        Image.fromarray(picture).save(folder / "images" / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        for box, label in zip(made.boxes.tolist(), made.labels.tolist(), strict=True):
            annotations.append(coco_annotation(len(annotations) + 1, index + 1, box, label))
    document = {"images": images, "annotations": annotations, "categories": coco_categories()}
    path = folder / "annotations.json"
    path.write_text(json.dumps(document) + "\n")
    return path


def coco_annotation(id: int, image_id: int, box: list[float], label: int) -> dict[str, Any]:
    """A box of x1, y1, x2, y2 as COCO writes it: x, y, width, height."""
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    return {
        "id": id,
        "image_id": image_id,
        "category_id": label,
        "bbox": [x1, y1, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def coco_categories() -> list[dict[str, Any]]:
    """The ten digits with the ids 1 … 10."""
    return [{"id": id, "name": name} for id, name in enumerate(LABELS) if id > 0]


@cache
def _glyphs(held_out: bool) -> _Glyphs:
    split = digits.split()
    images, labels = (
        (split.held_out_images, split.held_out_labels) if held_out else (split.train_images, split.train_labels)
    )
    return _Glyphs(tuple(Image.fromarray(np.ascontiguousarray(image[..., 0])) for image in images), labels)


def _ground(luminance: float, size: tuple[int, int], generator: np.random.Generator) -> NDArray[np.float32]:
    """Coloured ground with texture and distractors, float32 [H, W, 3] in [0, 1]."""
    height, width = size
    coarse = _smooth_noise(int(generator.integers(3, 6, endpoint=True)), size, generator)
    fine = _smooth_noise(int(generator.integers(10, 28, endpoint=True)), size, generator)
    down, across = (generator.uniform(-SLOPE / 2, SLOPE / 2, 2)).astype(np.float32)
    slope = (
        down * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        + across * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    )
    texture = COARSE_TEXTURE * (coarse - 0.5) + generator.uniform(0, FINE_TEXTURE) * (fine - 0.5)
    picture = Image.fromarray(_bytes(_colour(luminance, generator) + texture + slope[..., None]))
    _draw_distractors(picture, generator)
    return _shares(picture)


def _smooth_noise(cells: int, size: tuple[int, int], generator: np.random.Generator) -> NDArray[np.float32]:
    """A grid of random colours, interpolated: [H, W, 3] in [0, 1]."""
    grid = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return _shares(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _draw_distractors(picture: Image.Image, generator: np.random.Generator) -> None:
    """Strokes, arcs and blobs as bright as digits or as dark as the ground, drawn into the picture."""
    draw = ImageDraw.Draw(picture)
    for _ in range(generator.integers(*DISTRACTORS, endpoint=True)):
        colour = tuple(_bytes(_colour(generator.uniform(0.05, 0.95), generator)).tolist())
        x, y = generator.uniform(0, picture.width), generator.uniform(0, picture.height)
        width, height = generator.uniform(4, 30, 2)
        thickness = int(generator.integers(1, 4, endpoint=True))
        kind = generator.integers(3)
        if kind == 0:
            draw.line((x, y, x + width * generator.choice((-1, 1)), y + height), fill=colour, width=thickness)
        elif kind == 1:
            start = generator.uniform(0, 360)
            end = start + generator.uniform(60, 200)
            draw.arc((x, y, x + width, y + height), start, end, fill=colour, width=thickness)
        else:
            draw.ellipse((x, y, x + width / 2, y + height / 2), fill=colour)


def _colour(luminance: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """A random colour of this luminance (strictly between 0 and 1), float32 [3] in [0, 1]."""
    colour = generator.random(3, dtype=np.float32)
    chroma = colour - colour @ LUMINANCE
    # as much of it as leaves no channel below 0 or above 1; some channel is below its luminance and some above
    share = min(1.0, luminance / -chroma.min(), (1 - luminance) / chroma.max())
    return np.float32(luminance) + np.float32(share) * chroma


def _ink(glyph: Image.Image, generator: np.random.Generator) -> NDArray[np.float32]:
    """A digit turned, stretched and resized: its opacity, float32 [h, w] in [0, 1], cut to what is not transparent."""
    side = generator.uniform(*DIGIT_SIDE)
    angle = math.radians(generator.uniform(-TURN_DEGREES, TURN_DEGREES))
    across, down = glyph.width / (side * (1 + generator.uniform(-STRETCH, STRETCH))), glyph.height / side
    canvas = math.ceil(CANVAS * side)
    sine, cosine, centre, middle = math.sin(angle), math.cos(angle), canvas / 2, glyph.width / 2
    # from a pixel of the canvas to its place on the glyph: turned about the centre, then stretched
    matrix = (
        across * cosine,
        across * sine,
        middle - across * (cosine + sine) * centre,
        -down * sine,
        down * cosine,
        middle - down * (cosine - sine) * centre,
    )
    drawn = glyph.transform((canvas, canvas), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    opacity: NDArray[np.float32] = np.clip((_shares(drawn) - FAINTEST_INK) / (FULL_INK - FAINTEST_INK), 0, 1)
    x1, y1, x2, y2 = _bounds(opacity > 0)
    return opacity[y1:y2, x1:x2]


def _place(
    opacity: NDArray[np.float32],
    taken: list[tuple[int, int, int, int]],
    size: tuple[int, int],
    generator: np.random.Generator,
) -> tuple[int, int, tuple[int, int, int, int]] | None:
    """Top, left and box of a place inside the picture with hardly any overlap, if one is found."""
    x1, y1, x2, y2 = _bounds(opacity >= 0.5)
    for _ in range(PLACES):
        top = int(generator.integers(size[0] - opacity.shape[0], endpoint=True))
        left = int(generator.integers(size[1] - opacity.shape[1], endpoint=True))
        box = (left + x1, top + y1, left + x2, top + y2)
        if all(_overlap(box, other) <= OVERLAP for other in taken):
            return top, left, box
    return None


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """What two boxes share, as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0) * max(height, 0) / smaller


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around what is true."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@cache
def _fixed_pattern(height: int, width: int) -> NDArray[np.float32]:
    """The sensor's own offsets, of each column and of each pixel: float32 [H, W]."""
    generator = np.random.default_rng(SENSOR_SEED)
    columns = generator.standard_normal(width, dtype=np.float32)
    pixels = generator.standard_normal((height, width), dtype=np.float32)
    return COLUMN_NOISE * columns + PIXEL_NOISE * pixels


def _shares(picture: Image.Image) -> NDArray[np.float32]:
    """From 0 … 255 to [0, 1]."""
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _bytes(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """From [0, 1] to 0 … 255; what is outside is cut."""
    cut: NDArray[np.uint8] = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return cut
