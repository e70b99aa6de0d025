import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from tta_serve.builtin import scenes
from tta_serve.router import FEATURES, IMAGES_MIN, Routed, Router, features, fit, route

SIZE = len(FEATURES)


def tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """[H, W, C] → [C, H, W]"""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def without_colour(image: Tensor) -> Tensor:
    return tensor(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))[..., None])


def resized(image: Tensor, width: int, height: int) -> Tensor:
    size = width, height
    return tensor(np.asarray(Image.fromarray(image[0].numpy()).resize(size, Image.Resampling.BILINEAR))[..., None])


def through_jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(buffer, "JPEG", quality=quality)
    return tensor(np.asarray(Image.open(buffer))[..., None])


def share(modality: str, images: Sequence[Tensor], router: Router) -> float:
    return sum(route(image, {"ir": router}).modality == modality for image in images) / len(images)


def of_scenes(count: int, seed: int, held_out: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The same scenes in infrared and in colour."""
    infrared = [tensor(each.image) for each in scenes.infrared_scenes(count, seed, held_out)]
    return infrared, [tensor(each.image) for each in scenes.scenes(count, seed, held_out)]


@pytest.fixture(scope="module")
def router() -> Router:
    """Fitted on 100 scenes of either kind."""
    return fit(*of_scenes(100, seed=1, held_out=False), seed=0)


@pytest.fixture(scope="module")
def held_out() -> tuple[list[Tensor], list[Tensor]]:
    return of_scenes(200, seed=2, held_out=True)


@pytest.fixture(scope="module")
def patches() -> list[Tensor]:
    """300 patches of two photographs, 16 pixels to the whole picture high and wide, without colour."""
    photographs, draw, cut = [tensor(image) for image in load_sample_images().images], np.random.default_rng(0), []
    for _ in range(300):
        photograph = photographs[draw.integers(2)]
        height, width = (int(draw.integers(16, side, endpoint=True)) for side in photograph.shape[1:])
        top = int(draw.integers(photograph.shape[1] - height, endpoint=True))
        left = int(draw.integers(photograph.shape[2] - width, endpoint=True))
        cut.append(without_colour(photograph[:, top : top + height, left : left + width]))
    return cut


@pytest.fixture(scope="module")
def cifar() -> list[Tensor]:
    """2,000 colour photographs of 32×32."""
    data = Path(os.environ.get("TTA_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar")
    if not (data / "clean.npz").exists():
        pytest.skip("the CIFAR files are not here; TTA_DATA names their folder")
    with np.load(data / "clean.npz") as arrays:
        return [tensor(image) for image in arrays["images"]]


def known(**changed: Any) -> Router:
    """Says ½ of an image whose features are all 0, with a distance of 1 for each √F away from there."""
    zero, one = np.zeros(SIZE), np.ones(SIZE)
    return Router(zero, one, zero, 0.0, zero, np.eye(SIZE), 1.0)._replace(**changed)


# Features


def described(pixels: Sequence[Any]) -> dict[str, float]:
    return dict(zip(FEATURES, features(torch.tensor(pixels, dtype=torch.uint8)).tolist(), strict=True))


def test_one_coloured_pixel_by_hand() -> None:
    seen = described([[[200]], [[100]], [[50]]])
    luminance = 0.299 * 200 + 0.587 * 100 + 0.114 * 50  # 124.2: bin 7 of 16
    assert seen["channel_spread"] == pytest.approx(150 / 255)
    assert seen["saturation"] == pytest.approx(150 / 200)
    assert [seen[name] for name in FEATURES if name.startswith("histogram")] == [0] * 7 + [1] + [0] * 8
    assert seen["mean"] == pytest.approx(luminance / 255)
    assert (seen["deviation"], seen["skew"], seen["entropy"]) == (0, 0, 0)
    assert seen["gradient"] == pytest.approx(math.log10(1 / 12))  # nothing but what rounding may have hidden
    assert seen["residual_share"] == pytest.approx(math.log10(36))
    assert seen["residual_tail"] == pytest.approx(math.log10(3))
    assert (seen["octave"], seen["noise"], seen["residual_correlation"]) == (0, 0, 0)


def test_tones_by_hand() -> None:
    halves = described([[[0, 255], [255, 0]]])
    assert halves["histogram_00"] == halves["histogram_15"] == pytest.approx(math.sqrt(0.5))
    assert (halves["mean"], halves["deviation"], halves["skew"]) == (0.5, 0.5, 0)
    assert halves["entropy"] == 0.25  # one bit of four
    lopsided = described([[[0, 0], [0, 240]]])  # mean 60, variance 10,800, third moment 1,296,000
    assert lopsided["skew"] == pytest.approx(1_296_000 / 10_800**1.5, rel=1e-4)


def test_texture_by_hand() -> None:
    stripes = described([[[0, 240] * 4] * 8])
    assert stripes["gradient"] == pytest.approx(math.log10(240**2), abs=1e-5)
    assert stripes["octave"] == pytest.approx(math.log10(1 / 12 / 240**2), abs=1e-5)  # flat in means of 2×2
    assert stripes["noise"] == 0  # edges along the axes are no noise


def test_white_noise_is_recognised() -> None:
    noise = 128 + 8 * torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
    seen = described(noise.round().to(torch.uint8).tolist())
    assert seen["noise"] == pytest.approx(math.log10(0.6745 * 6 * 8 + 1), abs=0.02)  # 0.6745 σ is the median of |N|
    assert seen["residual_share"] == pytest.approx(math.log10(36), abs=0.02)
    assert seen["residual_tail"] == pytest.approx(math.log10(3), abs=0.05)
    assert seen["residual_correlation"] == pytest.approx(-2 / 3, abs=0.02)
    assert seen["octave"] == pytest.approx(math.log10(1 / 4), abs=0.05)


def test_three_equal_channels_are_one(held_out: tuple[list[Tensor], list[Tensor]]) -> None:
    for image in held_out[0][:20]:
        assert (features(image) == features(image.expand(3, -1, -1))).all()
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert (features(every) == features(every.expand(3, -1, -1))).all()


@settings(deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 20),
    width=st.one_of(st.integers(1, 20), st.integers(120, 300)),
    content=st.one_of(st.just("random"), st.integers(0, 255)),
)
def test_features_are_finite_and_of_the_order_of_one(
    channels: int, height: int, width: int, content: int | str
) -> None:
    image = torch.randint(0, 256, (channels, height, width), generator=torch.Generator().manual_seed(height))
    image = image.to(torch.uint8) if content == "random" else torch.full_like(image, content, dtype=torch.uint8)
    seen = features(image)
    assert seen.shape == (SIZE,)
    assert (np.abs(seen) < 10).all()


def test_a_large_image_is_described_by_a_part_of_it() -> None:
    draw = torch.Generator().manual_seed(0)
    large = torch.randint(0, 256, (3, 720, 1280), generator=draw, dtype=torch.uint8)
    small = torch.randint(0, 256, (3, 128, 128), generator=draw, dtype=torch.uint8)
    np.testing.assert_allclose(features(large), features(small), atol=0.06)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 4, 4),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 0, 4, dtype=torch.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match=r"an image is uint8 \[1 or 3, H, W\], not"):
        features(image)
    with pytest.raises(ValueError, match="an image is uint8"):
        fit([image] * IMAGES_MIN, [], seed=0)


# Routing


def test_confidence_by_hand() -> None:
    at_home, away = np.zeros(SIZE), np.zeros(SIZE)
    away[3] = 2 * math.sqrt(SIZE)  # a distance of 2
    assert known().confidence(at_home) == 0.5
    assert known(bias=math.log(9)).confidence(at_home) == pytest.approx(0.9)
    assert known(bias=-math.log(9)).confidence(at_home) == pytest.approx(0.1)
    assert known().confidence(away) == pytest.approx(0.5 / 2**4)
    assert known(limit=2.0).confidence(away) == pytest.approx(0.5)
    weighed = known(limit=2.0, weights=away / away[3], mean=away / 2, deviation=np.full(SIZE, away[3] / 2))
    assert weighed.confidence(away) == pytest.approx(1 / (1 + math.exp(-1)))  # one deviation above the mean


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_confidence_of_the_largest_numbers_that_can_be_read(sign: float) -> None:
    large = np.full(SIZE, 1e6)
    extreme = known(mean=-sign * large, deviation=np.full(SIZE, 1e-6), weights=large, centre=large, limit=1e-6)
    for whitening in (np.eye(SIZE), np.full((SIZE, SIZE), 1e6)):
        assert 0 <= extreme._replace(whitening=whitening).confidence(np.zeros(SIZE)) <= 1


def test_the_surest_router_wins_and_nobody_below_the_threshold() -> None:
    image = torch.zeros(1, 1, 1, dtype=torch.uint8)
    sure, surer = known(bias=3.0, limit=1e6), known(bias=4.0, limit=1e6)
    three, four = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-4))
    for routers in ({"a": sure, "b": surer}, {"b": surer, "a": sure}):
        modality, confidence = route(image, routers)
        assert (modality, confidence) == ("b", pytest.approx(four))
    assert route(image, {"b": sure, "a": sure}).modality == "a"  # ties: by name
    assert route(image, {"a": sure}, min_confidence=0.95) == ("a", pytest.approx(three))
    assert route(image, {"a": sure}, min_confidence=0.96) == ("rgb", pytest.approx(1 - three))
    assert route(image, {}) == Routed("rgb", 1.0)


def test_held_out_scenes_are_told_apart(router: Router, held_out: tuple[list[Tensor], list[Tensor]]) -> None:
    infrared, colour = held_out
    assert share("ir", infrared, router) >= 0.99
    assert share("rgb", colour, router) == 1
    assert share("rgb", [without_colour(image) for image in colour], router) == 1
    assert share("ir", [image.expand(3, -1, -1) for image in infrared], router) >= 0.99


def test_a_router_needs_few_images(held_out: tuple[list[Tensor], list[Tensor]]) -> None:
    infrared, colour = held_out
    router = fit(*of_scenes(20, seed=1, held_out=False), seed=0)
    assert share("ir", infrared, router) >= 0.99
    assert share("rgb", [*colour, *map(without_colour, colour)], router) == 1


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "quarter": lambda image: resized(image, 32, 32),
    "half": lambda image: resized(image, 64, 64),
    "three quarters": lambda image: resized(image, 96, 96),
    "double": lambda image: resized(image, 256, 256),
    "stretched": lambda image: resized(image, 160, 96),
    "JPEG 90": lambda image: through_jpeg(image, 90),
    "JPEG 60": lambda image: through_jpeg(image, 60),
    "cropped": lambda image: image[:, 10:90, 30:100],
}


@pytest.mark.parametrize("change", CHANGES)
def test_infrared_is_recognised_at_other_sizes_and_through_jpeg(
    change: str, router: Router, held_out: tuple[list[Tensor], list[Tensor]]
) -> None:
    assert share("ir", [CHANGES[change](image) for image in held_out[0][:100]], router) >= 0.97


@pytest.mark.parametrize("noise_std", [0, 5])
@pytest.mark.parametrize("light", [1.0, 0.3])
def test_grey_photographs_are_not_infrared(light: float, noise_std: int, router: Router, patches: list[Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    seen = [light * image + noise_std * torch.randn(image.shape, generator=draw) for image in patches]
    images = [each.clamp(0, 255).round().to(torch.uint8) for each in seen]
    assert share("rgb", images, router) == 1
    assert share("rgb", [through_jpeg(image, 50) for image in images], router) == 1
    assert share("rgb", [image.expand(3, -1, -1) for image in images], router) == 1


@pytest.mark.slow
def test_two_thousand_grey_photographs_are_not_infrared(router: Router, cifar: list[Tensor]) -> None:
    grey = [without_colour(image) for image in cifar]
    assert len(grey) == 2000
    assert share("rgb", cifar, router) == 1
    assert share("rgb", grey, router) == 1
    assert share("rgb", [resized(image, 128, 128) for image in grey[:500]], router) == 1


@pytest.mark.slow
def test_likeness_alone_tells_infrared_from_photographs(
    held_out: tuple[list[Tensor], list[Tensor]], patches: list[Tensor]
) -> None:
    infrared, colour = held_out
    alone = fit(of_scenes(100, seed=1, held_out=False)[0], [], seed=0)
    assert share("ir", infrared, alone) >= 0.99
    assert share("rgb", [*colour, *map(without_colour, colour), *patches], alone) == 1


def test_two_modalities(router: Router, held_out: tuple[list[Tensor], list[Tensor]]) -> None:
    def outlined(image: Tensor) -> Tensor:
        return torch.where(without_colour(image) > 128, 255, 0).to(torch.uint8)

    infrared, colour = of_scenes(50, seed=3, held_out=False)
    routers = {"ir": router, "outline": fit(list(map(outlined, colour)), [*colour, *infrared], seed=0)}
    seen = {
        "ir": [route(image, routers).modality for image in held_out[0][:50]],
        "outline": [route(outlined(image), routers).modality for image in held_out[1][:50]],
        "rgb": [route(image, routers).modality for image in held_out[1][:50]],
    }
    for modality, answers in seen.items():
        assert answers.count(modality) >= 49, modality


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_flat_images_and_single_pixels_are_ordinary(value: int, router: Router) -> None:
    for shape in ((1, 1, 1), (3, 1, 1), (1, 128, 128), (3, 1, 300)):
        modality, confidence = route(torch.full(shape, value, dtype=torch.uint8), {"ir": router})
        assert modality == "rgb"
        assert 0.9 < confidence <= 1


def test_fitting_is_reproducible_and_leaves_its_images_alone() -> None:
    infrared, colour = of_scenes(12, seed=1, held_out=False)
    before = [image.clone() for image in (*infrared, *colour)]
    first, second = fit(infrared, colour, seed=0), fit(infrared, colour, seed=0)
    assert first.to_json() == second.to_json()
    assert first.to_json() != fit(infrared, colour, seed=1).to_json()
    assert all(map(torch.equal, before, (*infrared, *colour)))


def test_too_few_images_are_refused() -> None:
    infrared, colour = of_scenes(9, seed=1, held_out=False)
    with pytest.raises(ValueError, match="9 images of the modality; a router needs at least 10"):
        fit(infrared, colour, seed=0)


# As JSON


def test_a_router_comes_back_from_json_to_the_last_bit(router: Router) -> None:
    read = Router.from_json(router.to_json())
    for name, value, again in zip(Router._fields, router, read, strict=True):
        assert np.asarray(value).tobytes() == np.asarray(again).tobytes(), name
        assert np.asarray(value).shape == np.asarray(again).shape
        assert type(value) is type(again)


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(known().to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "an object with"),
        ("null", "an object with"),
        (changed(more=1), "and nothing else"),
        (changed(version=2), "of version 2; this server reads version 1"),
        (changed(version=True), "of version True"),
        (changed(features=["mean"]), "features are not those of this server"),
        (changed(features=None), "features are not those of this server"),
        (changed(weights=[0.0]), rf"weights must be numbers of shape \[{SIZE}\]"),
        (changed(weights=[[0.0], 1.0]), "weights must be numbers"),
        (changed(weights=["1"] * SIZE), "weights must be numbers"),
        (changed(weights=[10**30] * SIZE), "weights must be numbers"),
        (changed(weights=None), "weights must be numbers"),
        (changed(centre=[math.nan] * SIZE), "centre must be finite"),
        (changed(mean=[math.inf] * SIZE), "mean must be finite"),
        (changed(mean=[2e6] * SIZE), "at most 1e\\+06"),
        (changed(whitening=[0.0] * SIZE), rf"whitening must be numbers of shape \[{SIZE}, {SIZE}\]"),
        (changed(bias=[0.0]), r"bias must be numbers of shape \[\]"),
        (changed(bias=True), "bias must be numbers"),
        (changed(deviation=[0.0] * SIZE), "deviation must be at least"),
        (changed(limit=-1.0), "limit must be at least"),
        (changed(limit=0), "limit must be at least"),
    ],
)
def test_json_that_is_no_router_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Router.from_json(text)


@pytest.mark.parametrize("name", ["version", "features", *Router._fields])
def test_a_router_without_one_of_its_fields_is_refused(name: str) -> None:
    fields = json.loads(known().to_json())
    del fields[name]
    with pytest.raises(ValueError, match="must be an object with"):
        Router.from_json(json.dumps(fields))
