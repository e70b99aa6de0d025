"""Drift on windows whose moments are known by heart, its limits on noise, and all of it on real images."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from adapters import Drift, DriftPrior, Groups, Moments, Network, drift, drift_prior

Build = Callable[..., nn.Module]
Images = Callable[..., Tensor]
NAN = float("nan")


def two_layers() -> Network:
    """Two batch-norms in a row whose statistics are mean 0 and variance 1: the second sees what the first saw."""
    model = nn.Sequential(
        nn.BatchNorm2d(1, eps=1e-12), nn.BatchNorm2d(1, eps=1e-12), nn.Flatten(), nn.Linear(2, 2, bias=False)
    )
    model[3].weight.data.copy_(torch.eye(2))
    return Network(model)


def prior(mean: list[float], var: list[float], limit: float = 0.5) -> DriftPrior:
    return DriftPrior(torch.tensor(mean), torch.tensor(var), torch.tensor([2]), torch.tensor([limit]))


def images_of(*values: tuple[float, float]) -> Tensor:
    """Images of one channel and two pixels."""
    return torch.tensor(values).view(-1, 1, 1, 2)


def test_drift_by_hand() -> None:
    """Images (0, 0) and (4, 4) have mean 2 and variance 4: 3.625 from mean 0 and variance 1."""
    x = images_of((0.0, 0.0), (4.0, 4.0))
    found = Drift(two_layers(), prior([0.0, 0.0], [1.0, 1.0])).measure(x, Groups.of((2,)))
    torch.testing.assert_close(found.by_layer, torch.tensor([[7.25, 7.25]]))
    torch.testing.assert_close(found.drift, torch.tensor([7.25]))
    torch.testing.assert_close(found.frozen_logits, torch.tensor([[0.0, 0.0], [4.0, 4.0]]))


def test_the_median_over_the_layers_counts() -> None:
    x = images_of((0.0, 0.0), (4.0, 4.0))
    found = Drift(two_layers(), prior([0.0, 2.0], [1.0, 4.0])).measure(x, Groups.of((2,)))
    torch.testing.assert_close(found.by_layer, torch.tensor([[7.25, 0.0]]))
    torch.testing.assert_close(found.drift, torch.tensor([3.625]))


def test_the_frozen_forward_hides_no_shift_from_later_layers() -> None:
    """All images moved by 3: with its own statistics the first layer would give the second one mean 0."""
    x = images_of((2.0, 4.0), (4.0, 2.0))
    found = Drift(two_layers(), prior([0.0, 0.0], [1.0, 1.0], limit=1.0)).measure(x, Groups.of((2,)))
    torch.testing.assert_close(found.by_layer, torch.tensor([[9.0, 9.0]]))  # ½ · 9 · 2


def test_variances_have_a_floor() -> None:
    """Blank images: a hundredth of the source's variance. ½ (1/100 + 100) − 1 = 49.005."""
    found = Drift(two_layers(), prior([0.0, 0.0], [1.0, 1.0], limit=1.0)).measure(images_of((0, 0)), Groups.of((1,)))
    torch.testing.assert_close(found.drift, torch.tensor([49.005]))


def test_a_channel_that_is_always_zero_says_nothing() -> None:
    network = Network(nn.Sequential(nn.BatchNorm2d(2, eps=1e-12), nn.Flatten(), nn.Linear(2, 2)))
    window = Moments(torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]]))
    found = drift.divergence_by_layer(network, window, prior([0.0, 0.0], [1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([[3.625 / 2]]))
    dead = drift.divergence_by_layer(network, Moments(window.mean * 0, window.var * 0), prior([0.0, 0.0], [0.0, 0.0]))
    assert dead.tolist() == [[0.0]]


def test_windows_do_not_see_each_other_and_nan_stays_where_it_is(build: Build, images: Images) -> None:
    network = Network(build("batch_norm_2d"))
    measure = Drift(network, drift_prior(network, [images(64)])).measure
    x = images(12, start=2.0)
    mixed = measure(x, Groups(torch.tensor([0, 1] * 6), (6, 6)))
    for window in (0, 1):
        alone = measure(x[window::2], Groups.of((6,)))
        torch.testing.assert_close(mixed.drift[window], alone.drift[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed.by_layer[window], alone.by_layer[0], atol=1e-5, rtol=1e-4)
    x[1] = NAN
    poisoned = measure(x, Groups(torch.tensor([0, 1] * 6), (6, 6)))
    torch.testing.assert_close(poisoned.drift[0], mixed.drift[0])
    assert poisoned.drift[1].isnan()


@pytest.mark.parametrize("kind", ["batch_norm_2d", "batch_norm_1d"])
def test_the_answers_are_the_frozen_networks(kind: str, build: Build, images: Images) -> None:
    network = Network(build(kind))
    x = images(9)
    found = Drift(network, drift_prior(network, [images(16)])).measure(x, Groups.of((8, 1)))
    torch.testing.assert_close(found.frozen_logits, network(x).logits, atol=1e-5, rtol=1e-5)
    assert found.by_layer.shape == (2, 2)


@pytest.mark.parametrize("kind", ["group_norm", "layer_norm"])
def test_without_batch_norm_there_is_no_figure(kind: str, build: Build, images: Images) -> None:
    network = Network(build(kind))
    made = drift_prior(network, [images(16)])
    assert made.sizes.shape == made.limits.shape == (0,)
    found = Drift(network, made).measure(images(5), Groups.of((3, 2)))
    assert found.drift.isnan().tolist() == [True, True]
    assert found.by_layer.shape == (2, 0)
    assert torch.equal(found.frozen_logits, network(images(5)).logits)


@pytest.mark.parametrize("kind", ["batch_norm_2d", "batch_norm_1d"])
def test_windows_pooled_from_single_images_are_windows(kind: str, build: Build, images: Images) -> None:
    network = Network(build(kind))
    x = images(12)
    single = drift.frozen_forward(network, x, Groups.of((1,) * 12)).moments
    whole = drift.frozen_forward(network, x, Groups.of((5, 7))).moments
    assert single is not None
    assert whole is not None
    windows = torch.tensor([[1.0] * 5 + [0.0] * 7, [0.0] * 5 + [1.0] * 7])
    pooled = drift.pool_images(single, windows)
    torch.testing.assert_close(pooled.mean, whole.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled.var, whole.var, atol=1e-5, rtol=1e-4)


def test_the_prior_is_the_same_each_time_whatever_the_batches_and_leaves_the_generator_alone(
    build: Build, images: Images
) -> None:
    network = Network(build("batch_norm_2d"))
    x, state = images(64), torch.get_rng_state()
    one, other = drift_prior(network, [x]), drift_prior(network, torch.split(x, 13))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not torch.equal(drift_prior(network, [x], seed=1).limits, one.limits)
    assert one.sizes.tolist() == [1, 2, 4, 8, 16]  # at most a quarter of the images
    assert (one.limits.diff() < 0).all()
    again = DriftPrior(**load(save(one._asdict())))
    measured = [Drift(network, each).measure(x[:8], Groups.of((8,))).drift for each in (one, again)]
    assert torch.equal(*measured)


def test_too_few_source_images_and_anothers_prior_are_refused(build: Build, images: Images) -> None:
    network = Network(build("batch_norm_2d"))
    with pytest.raises(ValueError, match="at least 4 source images to compare with, not 3"):
        drift_prior(network, [images(3)])
    with pytest.raises(ValueError, match="not 0"):
        drift_prior(network, [])
    with pytest.raises(ValueError, match="is for 2 normalised channels, and this network has 10"):
        Drift(network, prior([0.0, 0.0], [1.0, 1.0]))


def test_a_prior_of_one_size_has_one_limit() -> None:
    limits = drift.limit(prior([0.0], [1.0], limit=0.25), torch.tensor([1, 2, 999]))
    torch.testing.assert_close(limits, torch.tensor([0.25, 0.25, 0.25]))


def noise(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_one_in_a_hundred_fresh_windows_of_the_source_is_above_the_line(build: Build) -> None:
    """Of 400 fresh windows 4 are expected; a window of 64 is a third of what the prior was drawn from."""
    network = Network(build("batch_norm_2d"))
    measure = Drift(network, drift_prior(network, [noise(256, seed=0)])).measure
    for size in (8, 64):
        fresh = noise(400 * size, seed=size)
        above = (measure(fresh, Groups.of((size,) * 400)).drift > 1).sum().item()
        assert 1 <= above <= 12, size
        louder = measure(3 * fresh[: 40 * size], Groups.of((size,) * 40)).drift
        assert (louder > 1).all(), size


# Beside drift.


def test_flips_are_counted_by_group() -> None:
    adapted = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    frozen = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    found = drift.flip_rate(adapted, frozen, Groups(torch.tensor([0, 1, 0, 1]), (2, 2)))
    assert found.tolist() == [0.5, 0.5]
    assert drift.flip_rate(adapted, adapted, Groups.of((4,))).tolist() == [0.0]


def test_marginals_differ_by_at_most_one_bit() -> None:
    """Half way between (1, 0) and (½, ½) lies (¾, ¼): H(¾) − ½ bits."""
    adapted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    frozen = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
    half_way = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    torch.testing.assert_close(drift.marginal_divergence(adapted, frozen), torch.tensor([half_way, 1.0, 0.0]))


def test_a_marginal_is_the_mean_of_probabilities() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])
    torch.testing.assert_close(drift.mean_probs(logits, Groups.of((2, 1))), torch.tensor([[0.75, 0.25], [0.0, 1.0]]))


# Real images.


@pytest.fixture(scope="module")
def cifar() -> Callable[[str, int, int], Tensor]:
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("TTA_DATA") or root.parent / "shared" / "data" / "cifar")
    if not (data / "source.npz").exists():
        pytest.skip("the CIFAR files are not here; TTA_DATA names their folder")

    def images(name: str, first: int, last: int) -> Tensor:
        with np.load(data / f"{name}.npz") as arrays:
            x = torch.from_numpy(arrays["images"][first:last]).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    images.weights = load_file(data / "resnet20.safetensors")  # type: ignore[attr-defined]
    return images


@pytest.mark.slow
def test_real_images_drift_where_they_are_corrupted(cifar: Callable[[str, int, int], Tensor]) -> None:
    resnet20 = pytest.importorskip("loadtests.resnet20", reason="loadtests is no part of what is installed")
    model = resnet20.build()
    model.load_state_dict(cifar.weights)  # type: ignore[attr-defined]
    network = Network(model)
    measure = Drift(network, drift_prior(network, cifar("source", 0, 600).split(100))).measure
    two = Groups.of((64, 64))
    for kind, first in (("source", 2000), ("source", 2128), ("clean", 0)):
        assert measure(cifar(kind, first, first + 128), two).drift.max() < 1, kind
    readings = {
        kind: measure(cifar(kind, 0, 128), two).drift.min().item()
        for kind in ("gaussian_noise", "defocus_blur", "frost", "contrast", "elastic_transform")
    }
    assert min(readings.values()) > 2, readings
    assert readings["contrast"] > readings["gaussian_noise"] > readings["elastic_transform"]
