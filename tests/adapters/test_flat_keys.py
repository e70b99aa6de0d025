import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from adapters import flat_keys
from adapters.flat_keys import FlatKeysConfig, fit_flat_keys, nearest_keys, random_projections, squared_lengths


def test_projections_come_from_the_seed_alone() -> None:
    first = random_projections(3, 2, 5, 4)
    torch.manual_seed(9)
    assert torch.equal(random_projections(3, 2, 5, 4), first)
    assert not torch.equal(random_projections(4, 2, 5, 4), first)
    assert first.shape == (2, 5, 4)
    assert not torch.equal(first[0], first[1])


def test_projections_keep_lengths() -> None:
    """Variance 1 / F: the mean squared length of a unit vector's d = 14 coordinates is 14 / 1000."""
    projected = torch.eye(1000)[:1] @ random_projections(0, 500, 1000, 14)
    assert projected.square().sum(dim=-1).mean().item() == pytest.approx(0.014, rel=0.05)


PROJECTIONS = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])  # codebook 0 sees the first feature, 1 the second
KEYS = torch.tensor([[[0.0], [10.0], [4.0]], [[-1.0], [1.0], [3.0]]])
FEATURES = torch.tensor([[6.9, 0.1], [7.1, -9.0], [-3.0, 2.1]])
NEAREST = [[2, 1], [1, 0], [0, 2]]


def test_nearest_keys_by_hand() -> None:
    found = nearest_keys(PROJECTIONS, KEYS, squared_lengths(KEYS), FEATURES)
    assert (found.tolist(), found.dtype) == (NEAREST, torch.int16)


@pytest.mark.parametrize("chunk_bytes", [1, 12, 24, 36, 72])  # a row of one codebook has 3 distances of 4 bytes
def test_chunks_do_not_matter(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_keys, "CHUNK_BYTES", chunk_bytes)
    assert nearest_keys(PROJECTIONS, KEYS, squared_lengths(KEYS), FEATURES).tolist() == NEAREST


def test_no_features_have_no_keys() -> None:
    assert nearest_keys(PROJECTIONS, KEYS, squared_lengths(KEYS), FEATURES[:0]).shape == (0, 2)


def three_heaps() -> torch.Tensor:
    """Thirty points each at 0, at 100 and at 300."""
    return torch.tensor([0.0, 100.0, 300.0]).repeat(30).unsqueeze(1)


def test_keys_come_to_the_means_and_the_dead_are_revived() -> None:
    """Two of three keys that begin at one place are as near as each other: one of them starves, and is moved."""
    config = FlatKeysConfig(codebooks=8, keys=3, width=1, decay=0.5, epochs=60, batch=90, dead_below=0.5)
    fitted = fit_flat_keys(three_heaps(), config)
    projections = random_projections(0, 8, 1, 1)
    places = (fitted.keys[:, :, 0] / projections[:, 0]).sort(dim=1).values  # back on the features' axis
    torch.testing.assert_close(places, torch.tensor([0.0, 100.0, 300.0]).expand(8, 3), atol=0.1, rtol=0)
    never = fit_flat_keys(three_heaps(), replace(config, dead_below=0.0))
    assert not torch.allclose(never.keys, fitted.keys)


def test_one_step_by_hand() -> None:
    """γ = 1/2, keys on both points: N = ½·1 + ½·1 and m = ½ e + ½ z, so that keys stay where they are."""
    config = FlatKeysConfig(codebooks=1, keys=2, width=1, decay=0.5, epochs=1, batch=2)
    fitted = fit_flat_keys(torch.tensor([[1.0], [5.0]]), config)
    place = fitted.keys[0, :, 0] / random_projections(0, 1, 1, 1)[0, 0]
    torch.testing.assert_close(place.sort().values, torch.tensor([1.0, 5.0]))


def test_a_moving_average_by_hand() -> None:
    """One key over points 2 and 4, whichever it begins at, e: m = ½ e + ½ (2 + 4), N = ½ + ½ 2."""
    config = FlatKeysConfig(codebooks=1, keys=1, width=1, decay=0.5, epochs=1, batch=2)
    fitted = fit_flat_keys(torch.tensor([[2.0], [4.0]]), config)
    place = float(fitted.keys[0, 0, 0] / random_projections(0, 1, 1, 1)[0, 0, 0])
    assert place in (pytest.approx(4 / 1.5), pytest.approx(5 / 1.5))


def test_fitting_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    config = FlatKeysConfig(codebooks=3, keys=4, width=2, epochs=2, batch=16)
    before = torch.get_rng_state()
    first, second = fit_flat_keys(three_heaps(), config), fit_flat_keys(three_heaps(), config)
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_more_keys_than_features() -> None:
    fitted = fit_flat_keys(torch.eye(5), FlatKeysConfig(codebooks=2, keys=64, width=3, epochs=1))
    assert fitted.keys.shape == (2, 5, 3)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="there are none"):
        fit_flat_keys(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="40000 keys a codebook are more than 32768"):
        fit_flat_keys(torch.eye(4), FlatKeysConfig(keys=40000))


PAPER_SIZE = """
import torch
from adapters.flat_keys import FlatKeys
from adapters.kv_gradient import KVGradient

def held(field):  # in kB, of this program alone: getrusage would begin with the peak of the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

head = KVGradient(FlatKeys(torch.tensor(0), torch.randn(256, 4096, 14)), 1280)
features = torch.randn(256, 1280)
head.encode(features[:1])
before = held("VmRSS")
head.encode(features)
print((held("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
def test_a_batch_of_256_at_the_papers_size_takes_less_than_200_mb() -> None:
    """Distances at once would be 256 · 256 · 4,096 · 4 bytes = 1.07 GB."""
    ran = subprocess.run([sys.executable, "-c", PAPER_SIZE], capture_output=True, text=True, check=True)
    assert 0 < int(ran.stdout) < 200e6
