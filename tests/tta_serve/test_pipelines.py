import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapters import EATA, Groups, Guarded, Network, Pipeline, Source, tree
from adapters.anchors import fisher_diagonal
from tta_serve import pipelines
from tta_serve.builtin import digits
from tta_serve.config import ModelSettings
from tta_serve.errors import ConfigError
from tta_serve.models import InputSpec, LoadedModel

CPU = torch.device("cpu")
SPEC = InputSpec(4, 4, None)


@pytest.fixture
def build(tiny: Callable[..., nn.Module], model_settings: Callable[..., ModelSettings]) -> Callable[..., Pipeline]:
    """`build(adapter, prior=None, …)`: the pipeline around the small network of 3 classes."""

    def make(
        adapter: Any = "eata", prior: Path | None = None, module: nn.Module | None = None, **others: Any
    ) -> Pipeline:
        model = LoadedModel(module or tiny(), SPEC, ("a", "b", "c"), "", prior)
        return pipelines.build(model_settings(adapter=adapter, **others), model, CPU)

    return make


@pytest.fixture
def images() -> np.ndarray:
    """uint8 [250, 4, 4, 3]: more than one batch of the Fisher diagonal."""
    return np.random.default_rng(0).integers(0, 256, (250, 4, 4, 3), np.uint8)


def eata_of(pipeline: Pipeline) -> EATA:
    assert isinstance(pipeline.norm, Guarded)
    assert isinstance(pipeline.norm.adapter, EATA)
    return pipeline.norm.adapter


def error(build: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build()
    return str(caught.value)


def unit(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_a_prior_from_images_is_the_fisher_diagonal(
    build: Callable[..., Pipeline], tiny: Callable[..., nn.Module], images: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "prior.npz", images=images)
    importance = eata_of(build(prior=tmp_path / "prior.npz")).importance
    x = unit(images)
    torch.testing.assert_close(importance, fisher_diagonal(Network(tiny()), [x[:125], x[125:]]))


def test_no_more_images_than_the_paper_takes(images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "prior.npz", images=np.tile(images, (9, 1, 1, 1)))
    assert len(pipelines.read_images(tmp_path / "prior.npz", SPEC, "prior")) == 2000


def test_images_of_another_size_are_resized(
    build: Callable[..., Pipeline], tiny: Callable[..., nn.Module], tmp_path: Path
) -> None:
    large = np.random.default_rng(0).integers(0, 256, (20, 9, 7, 3), np.uint8)
    np.savez(tmp_path / "prior.npz", images=large)
    planes = torch.from_numpy(large).permute(0, 3, 1, 2).float()
    small = functional.interpolate(planes, (4, 4), mode="bilinear", antialias=True).round() / 255
    importance = eata_of(build(prior=tmp_path / "prior.npz")).importance
    torch.testing.assert_close(importance, fisher_diagonal(Network(tiny()), [small]))


def test_a_prior_from_safetensors(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    fisher = torch.arange(8.0)
    save_file({"fisher": fisher}, tmp_path / "prior.safetensors")
    importance = eata_of(build(prior=tmp_path / "prior.safetensors")).importance
    assert isinstance(importance, Tensor)
    assert importance.tolist() == fisher.tolist()


def test_digits_bring_their_prior(digits_model: LoadedModel, model_settings: Callable[..., ModelSettings]) -> None:
    model = LoadedModel(**{**vars(digits_model), "module": copy.deepcopy(digits_model.module)})
    eata = eata_of(pipelines.build(model_settings(), model, CPU))
    torch.testing.assert_close(eata.importance, load_file(digits.PRIOR)["fisher"])


def test_a_missing_prior_has_a_remedy(build: Callable[..., Pipeline]) -> None:
    said = error(build)
    assert said.startswith("models.m: eata's Fisher anchor needs `prior:` (an .npz with source `images`")
    assert said.endswith("without source images set `anchor: l2`")


@pytest.mark.parametrize("settings", [{"anchor": "l2"}, {"anchor": "none"}, {"anchor_weight": 0}])
def test_without_a_fisher_anchor_no_prior_is_needed(build: Callable[..., Pipeline], settings: dict[str, Any]) -> None:
    assert eata_of(build({"eata": settings})).importance == (1.0 if settings.get("anchor") == "l2" else 0.0)


def test_a_prior_of_another_model(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    save_file({"fisher": torch.zeros(416)}, path)
    assert error(lambda: build(prior=path)) == (
        "models.m.adapter: the prior holds 416 Fisher values, this model has 8 normalisation parameters: "
        "the prior belongs to another model"
    )


def test_a_prior_that_names_other_weights(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    save_file({"fisher": torch.zeros(8)}, path, metadata={"digest": "0123456789abcdef"})
    said = error(lambda: build(prior=path))
    assert said.startswith(f"models.m.prior: {path} was made for the weights 0123456789abcdef, ")


def test_a_prior_without_fisher(build: Callable[..., Pipeline], tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    save_file({"mean": torch.zeros(8)}, path)
    assert error(lambda: build(prior=path)).startswith(f"models.m.prior: {path} holds no readable `fisher`: ")
    path.write_bytes(b"junk")
    assert error(lambda: build(prior=path)).startswith(f"models.m.prior: {path} holds no readable `fisher`: ")


@pytest.mark.parametrize(
    "arrays",
    [
        {"other": np.zeros((4, 4, 4, 3), np.uint8)},
        {"images": np.zeros((4, 4, 4, 3), np.float32)},
        {"images": np.zeros((4, 3, 4, 4), np.uint8)},
        {"images": np.zeros((4, 4, 3), np.uint8)},
        {"images": np.zeros((1, 4, 4, 3), np.uint8)},
        {"images": np.zeros((4, 0, 4, 3), np.uint8)},
        {"images": np.array(3)},
        {"images": np.array([{}], dtype=object)},
    ],
)
def test_an_archive_without_images(build: Callable[..., Pipeline], tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "prior.npz"
    np.savez(path, **arrays)
    said = error(lambda: build(prior=path))
    assert said.startswith("prior: ")
    assert str(path) in said


def test_an_archive_that_is_none(build: Callable[..., Pipeline], images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "prior.npz"
    np.savez(path, images=images)
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[:200], whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert error(lambda: build(prior=path)).startswith(f"prior: {path} holds no readable array `images`: ")
    np.save(tmp_path / "plain.npy", images)
    (tmp_path / "plain.npy").rename(path)
    assert error(lambda: build(prior=path)).startswith(f"prior: {path} holds no readable array `images`: ")


@pytest.mark.parametrize("adapter", ["eata", {"eata": {"anchor": "l2"}}])
def test_a_model_without_normalisation_layers(build: Callable[..., Pipeline], adapter: Any) -> None:
    bare = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    said = error(lambda: build(adapter, module=bare))
    assert said.startswith("models.m.adapter: EATA adapts normalisation layers, and this model has none")


def test_source_gives_the_frozen_answers(
    build: Callable[..., Pipeline], tiny: Callable[..., nn.Module], rows: Callable[..., Tensor]
) -> None:
    pipeline = build("source")
    assert isinstance(pipeline.norm, Source)
    x = rows(5)
    states = tree.stack([pipeline.init()])
    got = pipeline.predict(states, torch.zeros(5, dtype=torch.int64), Groups.of((5,)), x).logits
    torch.testing.assert_close(got, tiny()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mode", "statistics"), [("sync", "batch"), ("async", "evidence")])
def test_the_mode_decides_on_the_statistics(build: Callable[..., Pipeline], mode: str, statistics: str) -> None:
    eata = eata_of(build({"eata": {"anchor": "l2"}}, adaptation={"mode": mode}))
    assert eata.config.statistics == statistics


def test_settings_reach_the_adapter(build: Callable[..., Pipeline]) -> None:
    given = {
        "entropy_margin": 0.5,
        "redundancy_margin": 0.2,
        "anchor": "l2",
        "anchor_weight": 3.0,
        "optimizer": "sgd",
        "learning_rate": 0.02,
        "momentum": 0.5,
        "source_images": 8.0,
        "stream_images_max": 64.0,
    }
    config = eata_of(build({"eata": given})).config
    assert {name: getattr(config, name) for name in given} == given


def test_auto_margins_follow_the_number_of_classes(build: Callable[..., Pipeline]) -> None:
    eata = eata_of(build({"eata": {"anchor": "none"}}))
    assert eata.entropy_margin == pytest.approx(0.4 * np.log(3))
    assert eata.classes == 3
