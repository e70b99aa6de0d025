"""Keys: a tree of cells in many codebooks, made from features without labels."""

import pytest
import torch
from torch import Tensor

from adapters import tree
from adapters.components import Components
from adapters.keys import Keys, KeysConfig, KeysPrior, fit_keys, levels_of


def line(*centres: tuple[float, ...]) -> Keys:
    """One codebook that sees one feature as it is, with these centres, level by level."""
    config = KeysConfig(codebooks=1, branches=(2, 2), key_dim=1, components=1)
    seen = Keys(_prior(centres), config).projection.item()  # of its only feature
    return Keys(_prior([tuple(seen * c for c in level) for level in centres]), config)


def _prior(centres: object) -> KeysPrior:
    levels = tuple(torch.tensor(level).view(1, -1, 1) for level in centres)  # type: ignore[attr-defined]
    one = Components(torch.zeros(1), torch.ones(1, 1))
    return KeysPrior(one, levels, torch.ones(1, 4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("feature", "key"),
    [(-9.0, 0), (-6.1, 0), (-5.9, 1), (-0.1, 1), (0.1, 2), (5.9, 2), (6.1, 3), (50.0, 3)],
)
def test_a_key_is_the_nearest_child_of_the_nearest_cell(feature: float, key: int) -> None:
    keys = line((-5.0, 5.0), (-8.0, -4.0, 4.0, 8.0))
    assert keys.encode(torch.tensor([[feature]])).tolist() == [[key]]


def test_a_cell_is_chosen_before_its_children() -> None:
    # 0.5 lies nearest to the child at 0.4, but that is a child of the other cell
    keys = line((-5.0, 5.0), (-8.0, 0.4, 4.0, 8.0))
    assert keys.encode(torch.tensor([[0.5]])).tolist() == [[2]]


CONFIG = KeysConfig(codebooks=5, branches=(4, 3, 2), key_dim=3, components=6)


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(300, 8, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, 9.0)


@pytest.fixture(scope="module")
def prior(features: Tensor) -> KeysPrior:
    return fit_keys(features, CONFIG)


def test_all_keys_are_used(prior: KeysPrior, features: Tensor) -> None:
    assert prior.usage.shape == (5, 24)
    assert prior.usage.sum(dim=1).tolist() == [300] * 5
    assert int(prior.usage.min()) > 0  # 12.5 features a key, and the empty ones are revived


def test_usage_is_what_encoding_gives(prior: KeysPrior, features: Tensor) -> None:
    ids = Keys(prior, CONFIG).encode(features)
    assert ids.dtype == torch.int16
    for book in range(5):
        assert torch.bincount(ids[:, book].long(), minlength=24).tolist() == prior.usage[book].tolist()


def test_the_same_features_give_the_same_keys(prior: KeysPrior, features: Tensor) -> None:
    again = fit_keys(features, CONFIG)
    assert tree.digest(again) == tree.digest(prior)


def test_another_seed_gives_others(prior: KeysPrior, features: Tensor) -> None:
    other = KeysConfig(codebooks=5, branches=(4, 3, 2), key_dim=3, components=6, seed=7)
    assert not torch.equal(fit_keys(features, other).centres[0], prior.centres[0])


def test_an_image_s_keys_are_its_own(prior: KeysPrior, features: Tensor) -> None:
    keys = Keys(prior, CONFIG)
    together = keys.encode(features[:17])
    assert torch.equal(together, torch.cat([keys.encode(row) for row in features[:17].split(1)]))
    assert keys.encode(features[:0]).shape == (0, 5)


def test_near_images_share_cells_more_often_than_far_ones(prior: KeysPrior, features: Tensor) -> None:
    keys = Keys(prior, CONFIG)
    ids, near = keys.encode(features), keys.encode(features + 0.01)
    assert (ids == near).float().mean() > 0.95
    assert (ids == ids.roll(1, 0)).float().mean() < 0.15


def test_features_that_are_all_the_same_have_no_keys() -> None:
    with pytest.raises(ValueError, match="all the same"):
        fit_keys(torch.ones(20, 4), CONFIG)


def test_fewer_features_than_keys_are_enough() -> None:
    few = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    prior = fit_keys(few, CONFIG)
    assert all(centres.isfinite().all() for centres in prior.centres)
    assert prior.usage.sum(dim=1).tolist() == [6] * 5


@pytest.mark.parametrize("branches", [(), (1, 4), (256, 256)])
def test_branches_that_cannot_be(branches: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="branches"):
        KeysConfig(branches=branches)


def test_levels() -> None:
    assert list(levels_of(KeysConfig(branches=(16, 4, 4, 4)))) == [(16, 64), (64, 16), (256, 4), (1024, 1)]
