import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from adapters.norm import Network
from tta_serve import models, train_digits
from tta_serve.builtin import digits
from tta_serve.config import ModelSettings


@pytest.fixture(scope="module")
def split() -> digits.Split:
    return digits.split()


def test_split_is_stratified_and_always_the_same(split: digits.Split) -> None:
    again = digits.split()
    assert split.train_images.shape == (1297, 32, 32, 3)
    assert split.held_out_images.shape == (500, 32, 32, 3)
    assert split.train_images.dtype == split.held_out_images.dtype == np.uint8
    assert all((a == b).all() for a, b in zip(split, again, strict=True))
    for labels in (split.train_labels, split.held_out_labels):
        share = np.bincount(labels, minlength=10) / len(labels)
        assert share.min() > 0.09
        assert share.max() < 0.11


def test_images_are_grey_and_use_the_whole_range(split: digits.Split) -> None:
    images = split.train_images
    assert (images == images[..., :1]).all()
    assert (images.min(), images.max()) == (0, 255)


def test_mean_and_std_are_those_of_the_training_images(split: digits.Split) -> None:
    values = split.train_images / 255
    assert pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-3) == digits.MEAN
    assert pytest.approx(values.std(axis=(0, 1, 2)), abs=1e-3) == digits.STD


def test_weights_are_small() -> None:
    assert digits.WEIGHTS.stat().st_size < 400_000


def test_shipped_weights_classify_the_held_out_digits(split: digits.Split) -> None:
    accuracy = train_digits.accuracy(digits.load(), split.held_out_images, split.held_out_labels)
    log = json.loads(digits.TRAINING_LOG.read_text())
    assert accuracy >= 0.97
    # one image in 500 may fall otherwise on another processor
    assert accuracy == pytest.approx(log["held_out_accuracy"], abs=0.0021)
    assert log["held_out_accuracy"] == log["epochs"][-1]["held_out_accuracy"]
    assert len(log["epochs"]) == train_digits.EPOCHS


def test_log_and_prior_name_the_shipped_weights() -> None:
    shipped = models.load(ModelSettings.model_validate({"name": "digits", "source": "builtin/digits"})).digest
    with safe_open(digits.PRIOR, "pt") as prior:
        assert prior.metadata() == {"model": "digits", "digest": shipped}
    assert json.loads(digits.TRAINING_LOG.read_text())["digest"] == shipped


def test_prior_is_that_of_the_shipped_weights() -> None:
    network = Network(digits.load())
    prior = load_file(digits.PRIOR)
    fisher = prior["fisher"]
    assert fisher.shape == (2 * network.channels,)
    assert fisher.isfinite().all()
    assert (fisher >= 0).all()
    torch.testing.assert_close(fisher, train_digits.fisher(), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(prior["mean"], network.mean)
    torch.testing.assert_close(prior["var"], network.var)


def test_probe_holds_held_out_images(split: digits.Split) -> None:
    with np.load(digits.PROBE) as probe:
        images, labels = probe["images"], probe["labels"]
    assert images.dtype == np.uint8
    assert len(images) == len(labels) == train_digits.PROBE_IMAGES
    assert (images == split.held_out_images[: len(images)]).all()
    assert (labels == split.held_out_labels[: len(labels)]).all()


def test_moved_moves_little_and_keeps_the_range() -> None:
    x = torch.zeros(4, 3, 32, 32)
    x[:, :, 12:20, 12:20] = 1.0
    moved = train_digits.moved(x, torch.Generator().manual_seed(1))
    assert moved.shape == x.shape
    assert moved.min() >= 0
    assert moved.max() <= 1.0001
    assert not torch.equal(moved, x)
    assert (moved[:, :, 15:17, 15:17] > 0.9).all()  # the middle of the square is still inside it
