from collections.abc import Sequence

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapters import EATA, Batch, EATAConfig, EATAPrior, Groups, Network, tree
from tta_serve import shifts
from tta_serve.builtin import digits
from tta_serve.shifts import PHASES, Phase

ROWS = 32  # images in a request
DRAWS = 512  # in each phase


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def played() -> dict[str, tuple[float, float]]:
    """Accuracy of the frozen and of the adapting model in every phase: one continual run, without a reset."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _play()
    finally:
        torch.set_num_threads(threads)


def _play() -> dict[str, tuple[float, float]]:
    split, network, draw = digits.split(), Network(digits.load()), generator()
    config = EATAConfig(statistics="evidence", stream_images_max=16.0)
    eata = EATA(network, 10, EATAPrior(load_file(digits.PRIOR)["fisher"]), config)
    states, rows, groups = tree.stack([eata.init()]), torch.zeros(ROWS, dtype=torch.int64), Groups.of((ROWS,))
    accuracies = {}
    for phase in PHASES:
        frozen = adapting = 0
        for _ in range(DRAWS // ROWS):
            chosen = draw.integers(len(split.held_out_labels), size=ROWS)
            x = digits.prepare(phase.shift(split.held_out_images[chosen], draw))
            labels = torch.from_numpy(split.held_out_labels[chosen])
            frozen += _right(network(x).logits, labels)
            adapting += _right(network(x, eata.modulate(states, rows, groups)).logits, labels)
            states, _ = eata.adapt(states, rows, Batch(x, groups, torch.ones(ROWS)))
        accuracies[phase.name] = (frozen / DRAWS, adapting / DRAWS)
    return accuracies


def _right(logits: torch.Tensor, labels: torch.Tensor) -> int:
    return int((logits.argmax(dim=1) == labels).sum())


def _shifted() -> Sequence[Phase]:
    return [phase for phase in PHASES if phase.shifted]


def test_phases_begin_and_end_clean() -> None:
    assert [phase.name for phase in PHASES] == ["clean", "noise", "low contrast", "inverted", "blur", "clean again"]
    assert [phase.shifted for phase in PHASES] == [False, True, True, True, True, False]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_shift_keeps_shape_and_type_and_leaves_its_input_alone(phase: Phase) -> None:
    images = generator().integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    before = images.copy()
    shifted = phase.shift(images, generator())
    assert shifted.shape == images.shape
    assert shifted.dtype == np.uint8
    assert (images == before).all()
    assert (shifted == phase.shift(images, generator())).all()  # the same generator gives the same images
    assert (shifted != images).any() == phase.shifted


def test_low_contrast_and_inverted_by_hand() -> None:
    images = np.array([0, 128, 200, 255], np.uint8).reshape(1, 2, 2, 1).repeat(3, axis=3)
    assert shifts.low_contrast(images, generator())[0, :, :, 0].tolist() == [[64, 128], [164, 192]]
    assert shifts.inverted(images, generator())[0, :, :, 0].tolist() == [[255, 127], [55, 0]]


def test_noise_is_fresh_each_time_and_of_the_given_strength() -> None:
    grey, draw = np.full((8, 32, 32, 3), 128, np.uint8), generator()
    first, second = shifts.noise(grey, draw), shifts.noise(grey, draw)
    assert (first != second).any()
    assert first.std() == pytest.approx(shifts.NOISE_STD, rel=0.02)
    assert first.mean() == pytest.approx(128, abs=1)


def test_blur_spreads_a_point_evenly() -> None:
    image = np.zeros((1, 33, 33, 3), np.uint8)
    image[0, 16, 16] = 255
    wide = shifts.blur(image, generator())[0, :, :, 0].astype(int)
    assert wide.max() == wide[16, 16] == round(255 / (2 * np.pi * shifts.BLUR_STD_PIXELS**2))
    assert (wide == wide.T).all()
    assert (wide == wide[::-1]).all()


@pytest.mark.parametrize("phase", _shifted(), ids=lambda phase: phase.name)
def test_each_shift_costs_the_frozen_model_ten_points(phase: Phase, played: dict[str, tuple[float, float]]) -> None:
    assert played[phase.name][0] <= played["clean"][0] - 0.10


@pytest.mark.parametrize("phase", _shifted(), ids=lambda phase: phase.name)
def test_adapting_wins_back_what_a_shift_costs(phase: Phase, played: dict[str, tuple[float, float]]) -> None:
    frozen, adapting = played[phase.name]
    assert adapting > frozen + 0.03


def test_adapting_forgets_nothing_on_clean_images(played: dict[str, tuple[float, float]]) -> None:
    frozen, adapting = played["clean again"]
    assert adapting >= frozen - 0.02
