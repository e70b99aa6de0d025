import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tta_serve.errors import InvalidInput, TooLarge
from tta_serve.images import checked_range, decode, decode_whole
from tta_serve.models import InputSpec

Picture = Callable[..., bytes]

LIMIT = 1_000_000
SIX = InputSpec(2, 3, None)  # height 2, width 3
ORIENTATION = 0x0112

# 2 rows, 3 columns, no two pixels alike
PIXELS = np.array([[[10, 0, 5], [20, 1, 6], [30, 2, 7]], [[40, 3, 8], [50, 4, 9], [60, 5, 10]]], np.uint8)


def red(content: bytes, spec: InputSpec = SIX) -> list[list[int]]:
    tensor = decode(content, spec, LIMIT)
    assert tensor.shape == spec.shape
    assert str(tensor.dtype) == "torch.uint8"
    return tensor[0].tolist()


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_pixels_come_through_in_order(picture: Picture, kind: str, options: dict[str, bool]) -> None:
    got = decode(picture(PIXELS, kind, **options), SIX, LIMIT)
    assert got.permute(1, 2, 0).tolist() == PIXELS.tolist()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_pixels_come_through_nearly(picture: Picture, kind: str) -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    got = decode(picture(flat, kind), InputSpec(16, 16, None), LIMIT)
    assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - flat).max() <= 4


def test_grey_is_repeated_over_the_channels(picture: Picture) -> None:
    got = decode(picture(PIXELS[:, :, 0]), SIX, LIMIT)
    assert (got == got[0]).all()
    assert got[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_black_and_white(picture: Picture) -> None:
    image = Image.fromarray(np.array([[0, 255, 0], [255, 0, 255]], np.uint8)).convert("1")
    assert red(picture(image)) == [[0, 255, 0], [255, 0, 255]]


def test_a_palette_becomes_its_colours(picture: Picture) -> None:
    image = Image.new("P", (3, 2))
    image.putpalette([7, 8, 9, 70, 80, 90])
    image.putdata([0, 1, 0, 1, 0, 1])
    assert decode(picture(image), SIX, LIMIT)[:, 0, :2].tolist() == [[7, 70], [8, 80], [9, 90]]


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_a_palette_with_transparency_keeps_its_colours(picture: Picture, transparency: int | bytes) -> None:
    image = Image.new("P", (3, 2))
    image.putpalette([7, 8, 9, 70, 80, 90])
    image.putdata([0, 1, 0, 1, 0, 1])
    assert red(picture(image, transparency=transparency)) == [[7, 70, 7], [70, 7, 70]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_left_out(picture: Picture, kind: str) -> None:
    rgba = np.dstack([PIXELS, np.array([[255, 128, 1], [255, 255, 255]], np.uint8)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert decode(picture(rgba, kind, **options), SIX, LIMIT).permute(1, 2, 0).tolist() == PIXELS.tolist()


def test_grey_with_transparency(picture: Picture) -> None:
    grey = Image.fromarray(PIXELS[:, :, 0])
    alpha = Image.fromarray(np.full((2, 3), 128, np.uint8))
    assert red(picture(Image.merge("LA", (grey, alpha)))) == [[10, 20, 30], [40, 50, 60]]
    assert red(picture(grey, transparency=10)) == [[10, 20, 30], [40, 50, 60]]


def test_a_cmyk_jpeg(picture: Picture) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK")
    got = decode(picture(image, "JPEG"), InputSpec(16, 16, None), LIMIT)[:, 8, 8]
    assert (got.int() - got.new_tensor([200, 100, 50]).int()).abs().max() <= 6


def test_sixteen_bits_are_scaled_not_clipped(picture: Picture) -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    assert red(picture(values)) == [[0, 0, 1], [128, 254, 255]]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, [[10, 20, 30], [40, 50, 60]]),
        (2, [[30, 20, 10], [60, 50, 40]]),
        (3, [[60, 50, 40], [30, 20, 10]]),
        (4, [[40, 50, 60], [10, 20, 30]]),
        (5, [[10, 40], [20, 50], [30, 60]]),
        (6, [[40, 10], [50, 20], [60, 30]]),
        (7, [[60, 30], [50, 20], [40, 10]]),
        (8, [[30, 60], [20, 50], [10, 40]]),
        (9, [[10, 20, 30], [40, 50, 60]]),
        (0, [[10, 20, 30], [40, 50, 60]]),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_pictures_are_turned_upright(picture: Picture, kind: str, orientation: int, upright: list[list[int]]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = picture(PIXELS, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert red(content, InputSpec(len(upright), len(upright[0]), None)) == upright


def test_a_camera_that_writes_a_number_as_text_is_still_turned(picture: Picture) -> None:
    """Pillow reads such a tag, and cannot write it back: `ImageOps.exif_transpose` fails on it."""
    compression = b"\x01\x03\x00\x02\x00\x00\x00\x06\x00\x00\x00\x26"  # a number by the standard; here text, at 38
    orientation = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"  # 6
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + compression + orientation + bytes(4) + b"hello\x00"
    assert red(picture(PIXELS, exif=exif), InputSpec(3, 2, None)) == [[40, 10], [50, 20], [60, 30]]


def test_an_animation_gives_its_first_frame(picture: Picture) -> None:
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = picture(first, kind, save_all=True, append_images=[second], **options)
        assert red(content) == [[10, 20, 30], [40, 50, 60]]


def test_an_empty_body() -> None:
    with pytest.raises(InvalidInput, match=r"the image is empty \(0 bytes\)"):
        decode(b"", SIX, LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO"])
def test_other_formats_are_refused(picture: Picture, kind: str) -> None:
    content = picture(np.zeros((16, 16, 3), np.uint8), kind)
    with pytest.raises(InvalidInput, match=f"^{len(content)} bytes that are no JPEG, PNG, WEBP image$"):
        decode(content, SIX, LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(picture: Picture, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    content = picture(noise, kind)
    with pytest.raises(InvalidInput, match="bytes"):
        decode(content[: int(share * len(content))], SIX, LIMIT)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
)
@pytest.mark.filterwarnings("ignore")  # what Pillow says of broken metadata
def test_broken_bytes_raise_nothing_but_invalid_input(kind: str, changes: list[tuple[int, int]]) -> None:
    content = bytearray(FILES[kind])
    for at, value in changes:
        content[at % len(content)] = value
    try:
        got = decode(bytes(content), SIX, LIMIT)
    except InvalidInput:
        return
    assert got.shape == SIX.shape


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=100))
def test_arbitrary_bytes_are_no_picture(content: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode(content, SIX, LIMIT)


def _file(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


FILES = {kind: _file(kind) for kind in ("PNG", "JPEG", "WEBP")}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claim(width: int, height: int) -> bytes:
    """A PNG of 1 bit a pixel that claims a size and holds no pixels: to unpack it would fail otherwise."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    with pytest.raises(TooLarge) as caught:
        decode(claim(30_000, 30_000), SIX, 25_000_000)
    assert str(caught.value) == (
        "the image is 30000×30000, 900000000 pixels; the limit is 25000000 (limits.image_pixels)"
    )


def test_the_limit_itself_is_allowed(picture: Picture) -> None:
    assert decode(picture(PIXELS), SIX, pixels_max=6).shape == (3, 2, 3)
    with pytest.raises(TooLarge, match="6 pixels; the limit is 5 "):
        decode(picture(PIXELS), SIX, pixels_max=5)


def test_a_strip_that_resizing_would_blow_up_is_refused() -> None:
    spec = InputSpec(224, 224, 256)
    for width, height in ((1, 50_000), (50_000, 1)):
        with pytest.raises(TooLarge, match=r"3276800000 pixels once its shorter side is 256; the limit is 25000000"):
            decode(claim(width, height), spec, 25_000_000)
    # straight to the model's size nothing grows, so here only the missing pixels are wrong
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        decode(claim(1, 50_000), InputSpec(224, 224, None), 25_000_000)


def test_a_small_picture_is_enlarged_whatever_the_limit(picture: Picture) -> None:
    assert decode(picture(np.zeros((2, 2, 3), np.uint8)), InputSpec(8, 8, 10), pixels_max=4).shape == (3, 8, 8)


def test_without_resize_the_whole_picture_is_squeezed(picture: Picture) -> None:
    """16 columns → 4: each is a weighted mean over its 4 and their neighbours; far from the border that is exact."""
    halves = np.zeros((8, 16, 3), np.uint8)
    halves[:, 8:] = 240
    for row in red(picture(halves), InputSpec(4, 4, None)):
        assert row[0] < 10
        assert row[3] > 230
        assert row[0] + row[3] == row[1] + row[2] == 240


def test_with_resize_the_middle_is_cropped(picture: Picture) -> None:
    """Height 8, width 24 → shorter side 4: 4 × 12 → the middle 4 columns, which are those of the middle third."""
    thirds = np.zeros((8, 24, 3), np.uint8)
    thirds[:, 8:16] = 100
    thirds[:, 16:] = 200
    got = np.array(red(picture(thirds), InputSpec(4, 4, 4)))
    assert (got[:, 1:3] == 100).all()
    assert (got[:, 0] < 100).all()  # antialiasing mixes in a little of the left third …
    assert (got[:, 3] > 100).all()  # … and of the right one
    assert np.abs(got - 100).max() < 25


def test_the_shorter_side_counts_either_way(picture: Picture) -> None:
    tall = np.zeros((24, 8, 3), np.uint8)
    tall[8:16] = 100
    got = np.array(red(picture(tall), InputSpec(2, 2, 4)))
    assert (got == 100).all()


def test_a_crop_of_the_same_scale_is_exact(picture: Picture) -> None:
    counted = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8)
    got = red(picture(counted), InputSpec(4, 4, 6))  # the shorter side is 6 already: nothing is resampled
    assert got == counted[1:5, 2:6].tolist()


# -- whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_picture_keeps_its_size_and_colours(picture: Picture, kind: str) -> None:
    image = np.zeros((5, 9, 3), np.uint8)
    image[...] = (200, 100, 50)
    options = {"lossless": True} if kind == "WEBP" else {}
    whole = decode_whole(picture(image, kind, **options), 45)
    assert (whole.shape, whole.dtype) == ((3, 5, 9), torch.uint8)
    np.testing.assert_allclose(whole.permute(1, 2, 0), image, atol=3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_grey_picture_has_one_channel(picture: Picture, kind: str) -> None:
    whole = decode_whole(picture(np.full((5, 9), 77, np.uint8), kind), 45)
    assert (whole.shape, whole.unique().tolist()) == ((1, 5, 9), [77])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((2, 3), 0x4D12, np.uint16)), [[0x4D]]),  # 16 bits
        (Image.new("1", (3, 2), 1), [[255]]),
        (Image.new("LA", (3, 2), (80, 10)), [[80]] * 3),
        (Image.new("RGBA", (3, 2), (1, 2, 3, 4)), [[1], [2], [3]]),
        (Image.new("P", (3, 2), 0), None),
    ],
)
def test_other_kinds_of_pixels(picture: Picture, image: Image.Image, expected: list[list[int]] | None) -> None:
    whole = decode_whole(picture(image), 6)
    assert whole.shape[1:] == (2, 3)
    assert whole.dtype == torch.uint8
    if expected is None:
        assert len(whole) == 3
    else:
        assert [channel.unique().tolist() for channel in whole] == expected


def test_a_picture_on_its_side_is_turned(picture: Picture) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = np.zeros((2, 4, 3), np.uint8)
    image[0, 0] = 255  # top left: top right once it is turned by a quarter
    whole = decode_whole(picture(image, exif=exif), 8)
    assert whole.shape == (3, 4, 2)
    assert whole[0].tolist() == [[0, 255], [0, 0], [0, 0], [0, 0]]


def test_pictures_that_are_not_decoded_whole(picture: Picture) -> None:
    with pytest.raises(TooLarge, match="45 pixels; the limit is 44 "):
        decode_whole(picture(np.zeros((5, 9, 3), np.uint8)), 44)
    with pytest.raises(InvalidInput, match="empty"):
        decode_whole(b"", 100)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        decode_whole(picture(noise)[:600], 400)


def test_numbers_of_tensors() -> None:
    bytes_ = np.array([0, 255], np.uint8)
    assert checked_range(bytes_) is bytes_
    frozen = np.frombuffer(b"\x00\xff", np.uint8)
    assert checked_range(frozen).flags.writeable
    for kind in (np.float16, np.float32, np.float64):
        checked = checked_range(np.array([0, 0.5, 1], kind))
        assert (checked.dtype, checked.tolist()) == (np.float32, [0, 0.5, 1])


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([1, 2]), "the input is int64; send UINT8"),
        (np.array([True]), "the input is bool"),
        (np.array([0, np.nan], np.float32), "NaN or infinite"),
        (np.array([0, np.inf], np.float32), "NaN or infinite"),
        (np.array([0, -np.inf], np.float16), "NaN or infinite"),
        (np.array([0, 255], np.float32), r"spans 0 … 255; floats must lie in 0 … 1 \(send UINT8"),
        (np.array([-0.01, 1], np.float64), "spans -0.01 … 1"),
    ],
)
def test_numbers_that_no_image_has(array: np.ndarray, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        checked_range(array)
