"""Images with boxes in COCO's format, and COCO's average precision.

A folder holds `annotations.json` (or one other `*.json`, in it or in `annotations/`) and the images, beside it or in
`images/`. Format and measure: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv 1405.0312,
https://cocodataset.org/#format-data and https://cocodataset.org/#detection-eval.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import ExifTags, Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torchvision.transforms import functional

from adapters.detection import Boxes, Detections
from tta_serve.detectors import BACKGROUND, Size
from tta_serve.errors import ConfigError
from tta_serve.images import plain, upright

PROBLEMS_SHOWN = 20
OVERHANG_PIXELS = 1.0  # by which a box may leave its image, and is clipped: rounding, and corners that count from 1

_ON_THEIR_SIDE = (5, 6, 7, 8)  # of EXIF's orientations: upright, width and height change places

Entry = TypeVar("Entry", bound=BaseModel)


class Example(NamedTuple):
    """An image that is not read yet, and what is in it."""

    file: Path
    size: Size  # upright
    truth: Boxes  # in its pixels; labels are the detector's class indices


class Dataset(NamedTuple):
    """A folder whose annotations are all right."""

    file: Path  # the annotations
    examples: tuple[Example, ...]  # in the file's order


class AP(NamedTuple):
    """Average precision over all recalls, mean over classes, at most 100 detections an image."""

    ap: float  # mean over the overlaps 0.50, 0.55 … 0.95
    ap50: float  # at overlap 0.50


class _Image(BaseModel):
    model_config = ConfigDict(frozen=True)
    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


class _Annotation(BaseModel):
    model_config = ConfigDict(frozen=True)
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]  # left, top, width, height
    iscrowd: int = 0


class _Category(BaseModel):
    model_config = ConfigDict(frozen=True)
    id: int
    name: str = ""


def read(folder: Path, labels: Sequence[str]) -> Dataset:
    """Read and check a folder. Of the images only the headers are read.

    A category means the label of the same name (case aside). Where no category has the name of a label, its id is taken
    for the class index. Crowd boxes are skipped; an image without boxes stays, as one that has nothing in it.

    Args:
        folder: see above.
        labels: the detector's, by class index; the first may be the background.

    Raises:
        ConfigError: what is wrong, each with file, image and annotation; nothing is left out silently.
    """
    if not labels:
        raise ConfigError(f"{folder}: the detector has no labels that categories could mean; give them (`labels`)")
    file = _annotation_file(folder)
    content = _parse(file)
    problems: list[str] = []
    categories = _entries(_Category, content["categories"], f"{file}: category", problems)
    classes = _classes([category for _, category in categories], labels)
    images: dict[int, tuple[Example, list[list[float]], list[int]]] = {}
    broken: set[int] = set()
    for name, image in _entries(_Image, content["images"], f"{file}: image", problems):
        if image.id in images or image.id in broken:
            problems.append(f"{name}: the id is taken by another image")
            continue
        try:
            images[image.id] = (_locate(folder, image), [], [])
        except ValueError as error:
            problems.append(f"{name} ({image.file_name}): {error}")
            broken.add(image.id)
    for name, annotation in _entries(_Annotation, content["annotations"], f"{file}: annotation", problems):
        if annotation.iscrowd or annotation.image_id in broken:
            continue
        if annotation.image_id not in images:
            problems.append(f"{name}: there is no image {annotation.image_id}")
            continue
        example, boxes, indices = images[annotation.image_id]
        try:
            boxes.append(_corners(annotation.bbox, example.size))
            indices.append(_class(annotation.category_id, classes, content["categories"], labels))
        except ValueError as error:
            problems.append(f"{name} of image {annotation.image_id} ({example.file.name}): {error}")
    if not content["images"]:
        problems.append(f"{file}: no image is listed")
    elif not problems and not any(boxes for _, boxes, _ in images.values()):
        problems.append(f"{file}: no image has a box")
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        raise ConfigError("\n".join(problems[:PROBLEMS_SHOWN] + ([f"… and {more} more problems"] if more > 0 else [])))
    return Dataset(
        file,
        tuple(
            example._replace(
                truth=Boxes(
                    torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(indices, dtype=torch.int64)
                )
            )
            for example, boxes, indices in images.values()
        ),
    )


def digest(examples: Sequence[Example]) -> str:
    """What tells one selection of images and boxes from another, 16 hexadecimal digits.

    Of an image, name and length count, so that nobody waits for gigabytes to be read.
    """
    sha = hashlib.sha256()
    for example in examples:
        sha.update(f"{example.file.name}\n{example.file.stat().st_size}\n{len(example.truth.boxes)}\n".encode())
        sha.update(example.truth.boxes.numpy().tobytes())
        sha.update(example.truth.labels.numpy().tobytes())
    return sha.hexdigest()[:16]


def read_image(file: Path) -> Tensor:
    """Decode an image as the server does, but of any format that Pillow reads.

    Returns:
        uint8 [1, H, W] of a grey image (16 bits are scaled to 8), else [3, H, W], RGB; upright.

    Raises:
        ConfigError: it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of no known range; save it as 8 or 16 bits")
            return cast(Tensor, functional.pil_to_tensor(plain(upright(image))))
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ConfigError(f"{file}: the image cannot be decoded: {error}") from error


def average_precision(truth: Sequence[Boxes], found: Sequence[Detections], sizes: Sequence[Size]) -> AP:
    """COCO's average precision of what was found in some images.

    Classes that no image has are left out of the mean, as COCO leaves them out.

    Args:
        truth: of each image.
        found: in each image; of each class the 100 best count.
        sizes: of the images, in whose pixels the boxes are.

    Raises:
        ValueError: no image has a box, so there is no recall.

    >>> box = Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([1]))
    >>> average_precision([box], [Detections(*box, torch.tensor([0.9]))], [(10, 10)])
    AP(ap=1.0, ap50=1.0)
    """
    classes = sorted({int(label) for boxes in truth for label in boxes.labels})
    if not classes:
        raise ValueError(f"none of {len(truth)} images has a box")
    listed = [
        {"image_id": image, "category_id": int(label), "bbox": _box(corners), "score": float(score)}
        for image, detections in enumerate(found)
        for corners, label, score in zip(*detections, strict=True)
        if int(label) in classes
    ]
    if not listed:  # COCO's own code fails on an empty list
        return AP(0.0, 0.0)
    known: list[dict[str, Any]] = [
        {"image_id": image, "category_id": int(label), "bbox": _box(corners), "iscrowd": 0}
        for image, boxes in enumerate(truth)
        for corners, label in zip(*boxes, strict=True)
    ]
    images = [{"id": number, "height": height, "width": width} for number, (height, width) in enumerate(sizes)]
    coco = COCO(
        {
            "images": images,
            "annotations": [
                {**box, "id": number, "area": box["bbox"][2] * box["bbox"][3]} for number, box in enumerate(known, 1)
            ],
            "categories": [{"id": label, "name": str(label)} for label in classes],
        }
    )
    evaluation = COCOeval_faster(coco, coco.loadRes(listed), "bbox", print_function=_silent)
    evaluation.run()
    figures = evaluation.stats_as_dict
    return AP(figures["AP_all"], figures["AP_50"])


def _silent(*_: object) -> None:
    """Where COCO's tables go: callers want two numbers."""


def _box(corners: Tensor) -> list[float]:
    left, top, right, bottom = corners.tolist()
    return [left, top, right - left, bottom - top]


def _annotation_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    if (folder / "annotations.json").is_file():
        return folder / "annotations.json"
    found = sorted(folder.glob("*.json")) or sorted((folder / "annotations").glob("*.json"))
    if len(found) != 1:
        said = f"there are {len(found)}: {', '.join(file.name for file in found[:5])}" if found else "there is none"
        raise ConfigError(
            f"{folder}: expected annotations.json, or one *.json in it or in {folder / 'annotations'}; {said}"
        )
    return found[0]


def _parse(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: no JSON can be read: {error}") from None
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ConfigError(f"{file}: COCO's format has lists of {', '.join(lists)}; {', '.join(missing)} missing")
    return {key: content[key] for key in lists}


def _entries(kind: type[Entry], entries: Sequence[Any], what: str, problems: list[str]) -> list[tuple[str, Entry]]:
    """The entries of a list that have the right form, each with its name in messages; the others go to `problems`."""
    good = []
    for number, entry in enumerate(entries):
        id_ = entry.get("id") if isinstance(entry, dict) else None
        name = f"{what} {id_}" if isinstance(id_, int | str) else f"{what} without id (number {number} of the list)"
        try:
            good.append((name, kind.model_validate(entry)))
        except ValidationError as error:
            of = f" of image {entry['image_id']}" if isinstance(entry, dict) and "image_id" in entry else ""
            for said in error.errors():
                where = ".".join(str(part) for part in said["loc"])
                problems.append(f"{name}{of}: {where + ': ' if where else ''}{said['msg']}, not {said['input']!r:.80}")
    return good


def _classes(categories: Sequence[_Category], labels: Sequence[str]) -> dict[int, int]:
    """The detector's class index of each category id that has one."""
    indices = {label.strip().casefold(): index for index, label in reversed(list(enumerate(labels)))}
    indices.pop(BACKGROUND, None)
    names = {category.id: category.name.strip().casefold() for category in categories}
    named = {id_: indices[name] for id_, name in names.items() if name in indices}
    if named:
        return named  # ids mean nothing then: a category that is none of the labels must not become one by its number
    first = 1 if labels[0] == BACKGROUND else 0
    return {id_: id_ for id_ in names if first <= id_ < len(labels)}


def _class(category: int, classes: dict[int, int], listed: Sequence[Any], labels: Sequence[str]) -> int:
    if category in classes:
        return classes[category]
    names = [entry.get("name") for entry in listed if isinstance(entry, dict) and entry.get("id") == category]
    known = [label for label in labels if label != BACKGROUND]
    raise ValueError(
        f"category {category} ({f'named {names[0]!r}' if names else 'not listed'}) is none of the detector's "
        f"{len(known)} labels: {', '.join(known[:10])}{', …' if len(known) > 10 else ''}"
    )


def _locate(folder: Path, image: _Image) -> Example:
    """The image's file, with its size and no boxes.

    Raises:
        ValueError: there is none, or it is not what the annotations say.
    """
    files = [folder / image.file_name, folder / "images" / image.file_name]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"there is no file {files[0]}, nor {files[1]}")
    try:
        with Image.open(file) as opened:
            width, height = opened.size
            if _orientation(opened) in _ON_THEIR_SIDE:
                width, height = height, width
    except Exception as error:  # Pillow raises nearly anything on broken headers
        raise ValueError(f"{file} is no image that can be read: {error}") from error
    listed = (image.width or width, image.height or height)
    if listed != (width, height):
        raise ValueError(f"listed as {listed[0]}×{listed[1]} pixels; {file} has {width}×{height}")
    return Example(file, (height, width), Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))


def _corners(box: tuple[float, float, float, float], size: Size) -> list[float]:
    """COCO's left, top, width, height as corners inside the image.

    Raises:
        ValueError: it is no box in this image.
    """
    left, top, width, height = box
    if not all(math.isfinite(number) for number in box):
        raise ValueError(f"bbox {list(box)} has a number that is not finite")
    if width <= 0 or height <= 0:
        raise ValueError(f"bbox {list(box)} is {width:g} wide and {height:g} high; both must be positive")
    over = max(-left, -top, left + width - size[1], top + height - size[0])
    corners = [max(left, 0.0), max(top, 0.0), min(left + width, size[1]), min(top + height, size[0])]
    if over > OVERHANG_PIXELS or corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise ValueError(f"bbox {list(box)} lies outside the image of {size[1]}×{size[0]} pixels")
    single = np.array(corners, dtype=np.float32)
    if (single[:2] == single[2:]).any():
        raise ValueError(f"bbox {list(box)} has no size in float32")
    return corners


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))
