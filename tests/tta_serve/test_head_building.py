"""From settings to heads: what codes hang on is made once, kept, and never mistaken for another."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adapters import Network, tree
from adapters.class_means import ClassMeans
from adapters.fusion import Fusion
from adapters.keys import KeysConfig, fit_keys
from adapters.kv_bottleneck import Counts
from adapters.kv_gradient import KVGradient
from adapters.ridge import Ridge
from tta_serve import head_building
from tta_serve.building import build_engine
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.errors import ConfigError
from tta_serve.head_building import build_heads
from tta_serve.heads import Heads, Told
from tta_serve.models import InputSpec, LoadedModel

SMALL: dict[str, Any] = {"codebooks": 4, "branches": [2, 2]}
HEADS = {"counts": Counts, "ridge": Ridge, "class_means": ClassMeans, "gradient": KVGradient}
Build = Callable[..., tuple[Fusion, Heads]]


def images(path: Path, start: int = 0, count: int = 40) -> Path:
    """[count, 4, 4, 3] from a formula, no two alike."""
    waves = (start + 2.399 * np.arange(count * 4 * 4 * 3)).reshape(count, 4, 4, 3)
    np.savez(path, images=(127.5 * (np.sin(waves) + 1)).astype(np.uint8))
    return path


@pytest.fixture
def build(tmp_path: Path, tiny: Callable[..., nn.Module]) -> Build:
    """`build("counts", prior=path, module=None, digest="weights-1", folder=…, **settings)`."""
    opened: list[Heads] = []

    def make(
        head: str = "counts",
        prior: Path | None = None,
        module: nn.Module | None = None,
        digest: str = "weights-1",
        folder: Path = tmp_path / "store" / "m",
        **settings: Any,
    ) -> tuple[Fusion, Heads]:
        while opened:  # as a process that ends
            opened.pop().close()
        prior = prior or images(tmp_path / "prior.npz")
        chosen = ModelSettings.model_validate(
            {
                "name": "m",
                "source": {"python": "tests:build"},
                "labels": ["a", "b", "c"],
                "input": {"size": [4, 4], "mean": [0, 0, 0], "std": [1, 1, 1]},
                "prior": str(prior),
                "adapter": {"kv_bottleneck": {**SMALL, "head": head, **settings}},
            }
        )
        network = module or tiny()
        model = LoadedModel(network, InputSpec(4, 4, None), ("a", "b", "c"), digest, prior)
        found = build_heads(chosen, model, Network(network), folder, frozenset({"acme"}))
        opened.append(found[1])
        return found

    return make


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def head_number(heads: Heads) -> int:
    return heads.feedback._head


def features(count: int = 6) -> Tensor:
    return (2.399 * torch.arange(count * 16, dtype=torch.float64)).cos().float().view(count, 16)


def tell(heads: Heads) -> None:
    heads.learn("x", "stream", [Told("1", 0, "glyph", heads.head.encode(features(1))[0], None)])


@pytest.mark.parametrize("head", HEADS)
def test_what_a_head_hangs_on_is_made_once(build: Build, tmp_path: Path, head: str) -> None:
    fusion, heads = build(head)
    assert type(heads.head) is HEADS[head]
    assert (fusion.head, fusion.labels) == (heads.head, 3)
    codes = heads.head.encode(features())
    tell(heads)
    told = heads.head.score(heads.view("x").table, codes)
    bytes_before = file_of(tmp_path / "store" / "m").read_bytes()
    _, again = build(head, prior=images(tmp_path / "others.npz", start=77))
    assert torch.equal(again.head.encode(features()), codes)
    assert torch.equal(again.head.score(again.view("x").table, codes), told)
    assert again.feedback.foreign() == 0
    assert file_of(tmp_path / "store" / "m").read_bytes() == bytes_before


def test_settings_reach_what_they_are_for(build: Build) -> None:
    fusion, heads = build(answers="head", classes_max=7, labels_per_class=9)
    assert fusion.answers == "head"
    assert (heads._classes_max, heads._labels_per_class) == (7, 9)
    assert (heads.namespace("acme:x"), heads.namespace("x")) == ("acme", "")
    assert heads.head.encode(features()).shape == (6, 4)


@pytest.mark.parametrize("other", [{"head": "ridge"}, {"codebooks": 5}, {"branches": [4, 2]}, {"digest": "weights-2"}])
def test_what_was_told_for_other_keys_waits_for_them(build: Build, other: dict[str, Any]) -> None:
    _, heads = build()
    tell(heads)
    _, changed = build(**other)
    assert changed.view("x") is changed.untold
    assert changed.feedback.foreign() == 1
    _, back = build()
    assert back.labels_of("x") == ("a", "b", "c", "glyph")


def test_settings_that_change_no_code_change_nothing(build: Build) -> None:
    _, heads = build()
    number = head_number(heads)
    assert head_number(build(answers="head", classes_max=1, labels_per_class=1)[1]) == number


def test_the_same_images_make_the_same_keys(build: Build, tmp_path: Path) -> None:
    _, heads = build()
    tell(heads)
    file_of(tmp_path / "store" / "m").unlink()
    _, again = build()
    assert again.labels_of("x") == ("a", "b", "c", "glyph")
    file_of(tmp_path / "store" / "m").unlink()
    _, changed = build(prior=images(tmp_path / "others.npz", start=77))
    assert changed.labels_of("x") == ("a", "b", "c")
    assert changed.feedback.foreign() == 1


def test_keys_are_made_from_the_features_of_the_model(
    build: Build, tmp_path: Path, tiny: Callable[..., nn.Module]
) -> None:
    _, heads = build()
    with np.load(images(tmp_path / "prior.npz")) as archive:
        x = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = Network(tiny())(x).features
    assert expected is not None
    prior = fit_keys(expected, KeysConfig(codebooks=4, branches=(2, 2)))
    assert isinstance(heads.head, Counts)
    assert tree.digest(heads.head.keys.prior) == tree.digest(prior)


def test_the_store_is_this_users_alone(build: Build, tmp_path: Path) -> None:
    build()
    assert stat.S_IMODE((tmp_path / "store" / "m").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "store" / "m" / "feedback.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("broken", [b"", b"no keys", None])
def test_keys_that_are_damaged(build: Build, tmp_path: Path, broken: bytes | None) -> None:
    build()
    file = file_of(tmp_path / "store" / "m")
    file.write_bytes(file.read_bytes()[:-1] if broken is None else broken)
    with pytest.raises(ConfigError, match=r"is damaged .* the labels that were told hang on it; put a copy"):
        build()
    file.unlink()
    build()


def test_keys_of_another_kind_in_their_place(build: Build, tmp_path: Path) -> None:
    build("ridge")
    other = file_of(tmp_path / "store" / "m").read_bytes()
    file_of(tmp_path / "store" / "m").unlink()
    build()
    file_of(tmp_path / "store" / "m").write_bytes(other)
    with pytest.raises(ConfigError, match="is damaged"):
        build()


def test_a_store_that_cannot_be_used(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^store\.path: .*/file/m cannot be used: Not a directory$"):
        build(folder=tmp_path / "file" / "m")
    (tmp_path / "store" / "m").mkdir(parents=True)
    (tmp_path / "store" / "m" / "feedback.db").write_bytes(b"no database, but something that somebody wants to keep")
    with pytest.raises(ConfigError, match=r"feedback\.db"):
        build()


def test_a_disk_that_is_full_leaves_no_half_of_the_keys(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(Path, "replace", full)
        with pytest.raises(ConfigError, match=r"store\.path: .* cannot be used: No space left on device"):
            build()
    assert list((tmp_path / "store" / "m").iterdir()) == []
    build()


def test_a_model_without_a_last_linear_layer(build: Build) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 4), nn.Flatten()).eval()
    with pytest.raises(
        ConfigError, match=r"models\.m\.adapter: kv_bottleneck reads what the model's last linear layer"
    ):
        build(module=module)


def test_a_model_whose_last_linear_layer_reads_no_rows(build: Build) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Flatten()).eval()
    with pytest.raises(
        ConfigError, match=r"reads features \[images, width\], and this model's last layer reads \[40, 3, 4, 4\]"
    ):
        build(module=module)


@pytest.mark.parametrize("head", HEADS)
def test_too_few_images(build: Build, tmp_path: Path, head: str) -> None:
    with pytest.raises(ConfigError, match=r"prior: .*one\.npz"):
        build(head, prior=images(tmp_path / "one.npz", count=1))
    assert list((tmp_path / "store" / "m").iterdir()) == []


def test_images_are_looked_at_a_few_at_a_time(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = build()
    monkeypatch.setattr(head_building, "BATCH_PIXELS", 3 * 4 * 4)
    _, parts = build(folder=tmp_path / "other")
    assert isinstance(whole.head, Counts)
    assert isinstance(parts.head, Counts)
    for one, other in zip(whole.head.keys.prior.centres, parts.head.keys.prior.centres, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def test_digits_bring_their_own_images(model_settings: Callable[..., ModelSettings], tmp_path: Path) -> None:
    settings = model_settings(adapter={"kv_bottleneck": SMALL})
    engine, _ = build_engine(settings, store=StoreSettings(path=str(tmp_path)))
    assert engine.heads is not None
    assert engine.heads.view("s") is engine.heads.untold
    engine.heads.close()
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {"feedback.db"}
    with pytest.raises(ConfigError, match=r"models\.m: kv_bottleneck needs store\.path"):
        build_engine(settings)
