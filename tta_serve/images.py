"""From the bytes of a picture to the tensor that a model reads."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional

from tta_serve.errors import InvalidInput, TooLarge
from tta_serve.models import InputSpec

FORMATS = ("JPEG", "PNG", "WEBP")

# EXIF's orientation → what turns the picture upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first, from the header alone


def decode(content: bytes, spec: InputSpec, pixels_max: int) -> Tensor:
    """Decode one JPEG, PNG or WebP, turn it upright, and fit it to the model's input.

    Args:
        content: the file.
        spec: what the model reads.
        pixels_max: a larger picture is refused before it is unpacked.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        TooLarge: more pixels than `pixels_max`.
        InvalidInput: not such a picture, or a truncated one.
    """
    with _opened(content, pixels_max) as image:
        _check_resized(*image.size, spec, pixels_max)
        image.load()
        return cast(Tensor, functional.pil_to_tensor(_fit(_to_rgb(upright(image)), spec)))


def decode_whole(content: bytes, pixels_max: int) -> Tensor:
    """Decode one JPEG, PNG or WebP and turn it upright, in its own size.

    Returns:
        uint8 [1, H, W] of a grey picture, else [3, H, W], RGB.

    Raises:
        TooLarge, InvalidInput: see `decode`.
    """
    with _opened(content, pixels_max) as image:
        image.load()
        return cast(Tensor, functional.pil_to_tensor(plain(upright(image))))


def pixels_of(content: bytes, pixels_max: int) -> int:
    """Pixels of a picture, from its header alone.

    Raises:
        TooLarge, InvalidInput: see `decode`.
    """
    with _opened(content, pixels_max) as image:
        return image.width * image.height


def plain(image: Image.Image) -> Image.Image:
    """In 8 bits: grey where it is grey, else RGB."""
    grey = image.mode in ("1", "L", "F") or image.mode.startswith("I")
    return _to_rgb(image).convert("L") if grey and "transparency" not in image.info else _to_rgb(image)


def checked_range(array: NDArray[Any]) -> NDArray[Any]:
    """Check the numbers of a client's images: uint8 as they are, floats as float32 in [0, 1].

    Raises:
        InvalidInput: another dtype or range, NaN or infinity; the message names value and limit.
    """
    if array.dtype == np.uint8:
        return array.copy() if not array.flags.writeable else array
    if array.dtype.kind != "f":
        raise InvalidInput(f"the input is {array.dtype}; send UINT8 (0 … 255) or FP32 (0 … 1)")
    low, high = float(array.min()), float(array.max())  # NaN if any is
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InvalidInput("the input holds NaN or infinite values; floats must lie in 0 … 1")
    if low < -1e-3 or high > 1 + 1e-3:
        raise InvalidInput(f"the input spans {low:g} … {high:g}; floats must lie in 0 … 1 (send UINT8 for 0 … 255)")
    return array.astype(np.float32)


@contextmanager
def _opened(content: bytes, pixels_max: int) -> Iterator[Image.Image]:
    """The picture, loaded; whatever is wrong with it, or goes wrong with it, is the client's to know."""
    if not content:
        raise InvalidInput("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > pixels_max:
                raise TooLarge(
                    f"the image is {width}×{height}, {width * height} pixels; the limit is {pixels_max} "
                    "(limits.image_pixels)"
                )
            yield image
    except InvalidInput:
        raise
    except UnidentifiedImageError:
        raise InvalidInput(f"{len(content)} bytes that are no {', '.join(FORMATS)} image") from None
    except Exception as error:  # noqa: BLE001  # Pillow's decoders raise nearly anything on broken files
        raise InvalidInput(f"the image of {len(content)} bytes cannot be decoded: {error}") from None


def _check_resized(width: int, height: int, spec: InputSpec, pixels_max: int) -> None:
    """A strip that is 1 pixel high is small, and huge once its shorter side has the model's size."""
    if spec.resize is None:
        return
    pixels = spec.resize * (spec.resize * max(width, height) // min(width, height))
    if pixels > max(pixels_max, spec.resize**2):
        raise TooLarge(
            f"the image is {width}×{height}, {pixels} pixels once its shorter side is {spec.resize}; "
            f"the limit is {pixels_max} (limits.image_pixels)"
        )


def upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; Pillow's `exif_transpose` writes all tags anew too, and fails on those of some cameras."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # Pillow warns of palettes with transparency that lose it on the way
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(image: Image.Image, spec: InputSpec) -> Image.Image:
    size = [spec.height, spec.width]
    interpolation = functional.InterpolationMode(spec.interpolation)
    if spec.resize is None:
        fits = image.size == (spec.width, spec.height)
        return image if fits else cast(Image.Image, functional.resize(image, size, interpolation))
    return cast(Image.Image, functional.center_crop(functional.resize(image, [spec.resize], interpolation), size))
