import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tta_serve import models
from tta_serve.builtin import digits
from tta_serve.config import ModelSettings
from tta_serve.errors import ConfigError
from tta_serve.models import InputSpec, LoadedModel, Normalised

Settings = Callable[..., ModelSettings]
Tiny = Callable[..., nn.Module]
Load = Callable[..., LoadedModel]

FACTORIES = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

class Shop:
    build = staticmethod(build)

def broken():
    raise RuntimeError("out of bricks")

def nothing():
    return None

def three_numbers():
    return nn.Flatten(0)

def many():
    class Many(nn.Module):
        def forward(self, x):
            return [x]
    return Many()

not_callable = 3
"""


@pytest.fixture
def python(settings: Settings) -> Load:
    """`python("build", **others)`: the model that this factory makes; it reads 4×4."""

    def load(factory: str, **others: Any) -> LoadedModel:
        size = {"input": {"size": [4, 4]}}
        return models.load(settings({"python": f"{NAME}:{factory}"}, **{**size, **others}))

    return load


NAME = "tta_test_factories"


@pytest.fixture
def settings(model_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As `model_settings`, with a module of factories that can be imported."""
    (tmp_path / f"{NAME}.py").write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return model_settings


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any, str], str]:
    """`save(state, "w.pt")`: the path of a file that holds it."""

    def make(state: Any, name: str) -> str:
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(state, path)
        else:
            torch.save(state, path)
        return str(path)

    return make


def error(load: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load()
    return str(caught.value)


def forward(model: LoadedModel, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.module(x)


def test_digits_read_the_probe(digits_model: LoadedModel) -> None:
    with np.load(digits.PROBE) as probe:
        x, labels = torch.from_numpy(probe["images"]).permute(0, 3, 1, 2) / 255, torch.from_numpy(probe["labels"])
    accuracy = (forward(digits_model, x).argmax(dim=1) == labels).float().mean().item()
    assert accuracy >= 0.97
    assert digits_model.input == InputSpec(32, 32, None)
    assert digits_model.input.shape == (3, 32, 32)
    assert digits_model.labels == digits.LABELS
    assert digits_model.prior == digits.PRIOR


def test_digits_take_labels_and_a_prior_of_ones_own(model_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "prior.npz").touch()
    own = models.load(model_settings(labels=list("abcdefghij"), prior=str(tmp_path / "prior.npz")))
    assert own.labels == tuple("abcdefghij")
    assert own.prior == tmp_path / "prior.npz"


def test_noop_answers_without_looking(model_settings: Settings) -> None:
    noop = models.load(model_settings("builtin/noop"))
    assert forward(noop, torch.rand(5, 3, 32, 32)).tolist() == [[0.0] * 10] * 5
    assert noop.labels == tuple("0123456789")
    assert (noop.prior, noop.digest) == (None, "")


@pytest.mark.parametrize("name", ["digits", "noop"])
def test_a_builtin_with_another_number_of_labels(model_settings: Settings, name: str) -> None:
    assert error(lambda: models.load(model_settings(f"builtin/{name}", labels=["a", "b"]))) == (
        "models.m.labels: 2 labels for a model of 10 classes"
    )


def test_normalised_by_hand() -> None:
    module = Normalised(nn.Identity(), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    x = torch.ones(1, 3, 1, 1)
    assert module(x).flatten().tolist() == [1.0, 3.0, 0.5]


def test_a_factory_of_ones_own(python: Load) -> None:
    model = python("build")
    assert not model.module.training
    assert model.input == InputSpec(4, 4, None)
    assert model.labels == ("0", "1", "2")
    assert model.prior is None
    assert forward(model, torch.zeros(2, 3, 4, 4)).shape == (2, 3)
    assert python("Shop.build").labels == ("0", "1", "2")


def test_mean_std_and_resize_come_from_the_settings(python: Load, tiny: Tiny, save: Callable[..., str]) -> None:
    path = save(tiny().state_dict(), "w.pt")
    described = {"size": [4, 4], "resize": 6, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    model = python("build", weights=path, input=described)
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert model.input == InputSpec(4, 4, 6)
    torch.testing.assert_close(forward(model, x), tiny()((x - 0.5) / 0.25))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_from_a_file(python: Load, tiny: Tiny, save: Callable[..., str], name: str, wrapped: bool) -> None:
    state = tiny().state_dict()
    if wrapped and name.endswith(".safetensors"):
        del state["1.num_batches_tracked"]  # often left out, and never read again
    elif wrapped:
        state = {"state_dict": state, "epoch": 3}
    model = python("build", weights=save(state, name), labels=["cat", "dog", "cow"])
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(forward(model, x), tiny()(x))
    assert model.labels == ("cat", "dog", "cow")


def test_the_digest_is_that_of_the_weights(python: Load, tiny: Tiny, save: Callable[..., str]) -> None:
    one, other = tiny().state_dict(), tiny().state_dict()
    other["4.bias"] = other["4.bias"] + 1e-3
    digests = [python("build", weights=save(state, "w.pt")).digest for state in (one, one, other)]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 16
    assert set(digests[0]) <= set("0123456789abcdef")


def test_keys_that_are_missing_or_too_many(python: Load, tiny: Tiny, save: Callable[..., str]) -> None:
    state = tiny().state_dict()
    state["5.bias"] = state.pop("4.bias")
    path = save(state, "w.pt")
    assert error(lambda: python("build", weights=path)) == (
        f"models.m.weights: {path} does not fit Sequential: missing ['4.bias'], unexpected ['5.bias']"
    )


def test_weights_of_another_size(python: Load, tiny: Tiny, save: Callable[..., str]) -> None:
    path = save(tiny(classes=5).state_dict(), "w.safetensors")
    said = error(lambda: python("build", weights=path))
    assert said.startswith(f"models.m.weights: {path} does not fit Sequential: size mismatch for 4.bias")
    assert "\n" not in said


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("exploded"),)  # type: ignore[return-value]


def test_pickled_code_is_never_run(python: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps({"a": Bomb()}))
    said = error(lambda: python("build", weights=str(path)))
    assert said.startswith(f"{path}: not a readable state dict: ")
    assert "\n" not in said
    torch.save({"a": Bomb()}, path)
    said = error(lambda: python("build", weights=str(path)))
    assert said.startswith(f"{path}: not a readable state dict: ")
    assert "\n" not in said
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_files_that_hold_no_weights(python: Load, tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert error(lambda: python("build", weights=str(path))).startswith(f"{path}: not a readable state dict: ")


@pytest.mark.parametrize(("content", "kind"), [([1, 2], "list"), ({"a": 1}, "dict"), ({"state_dict": 3}, "int")])
def test_files_that_hold_something_else(python: Load, save: Callable[..., str], content: Any, kind: str) -> None:
    path = save(content, "w.pt")
    assert error(lambda: python("build", weights=path)) == (
        f"{path}: holds {kind}, not a state dict (names and tensors)"
    )


def test_a_wrong_number_of_labels(python: Load) -> None:
    assert error(lambda: python("build", labels=["cat"])) == "models.m.labels: 1 labels for a model of 3 classes"


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("broken", f"models.m.source: {NAME}:broken: RuntimeError: out of bricks"),
        ("absent", f"models.m.source: {NAME}:absent: AttributeError: module"),
        ("Shop.absent", f"models.m.source: {NAME}:Shop.absent: AttributeError"),
        ("not_callable", f"models.m.source: {NAME}:not_callable: TypeError: 'int' object is not callable"),
        ("nothing", f"models.m.source: {NAME}:nothing() gives a NoneType, not a torch.nn.Module"),
        ("three_numbers", "models.m: the model gives [48] for one image, not logits [1, classes]"),
        ("many", "models.m: the model gives list for one image, not logits [1, classes]"),
    ],
)
def test_factories_that_do_not_work(python: Load, factory: str, said: str) -> None:
    assert error(lambda: python(factory)).startswith(said)


def test_a_module_that_does_not_exist(settings: Settings) -> None:
    wanted = settings({"python": "tta_no_such_module:build"}, input={"size": [4, 4]})
    assert error(lambda: models.load(wanted)) == (
        "models.m.source: tta_no_such_module:build: ModuleNotFoundError: No module named 'tta_no_such_module'"
    )


def test_modules_of_the_current_folder_are_found(
    model_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tta_test_here.py").write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert models.load(model_settings({"python": "tta_test_here:build"}, input={"size": [4, 4]})).labels == (
        "0",
        "1",
        "2",
    )


def test_a_size_that_the_model_cannot_read(python: Load) -> None:
    said = error(lambda: python("build", input={"size": [9, 9]}))
    assert said.startswith("models.m: a forward of one image of [3, 9, 9] fails: RuntimeError: ")


def test_torchvision_from_a_file(model_settings: Settings, save: Callable[..., str]) -> None:
    """The number of classes is the file's; nothing is downloaded."""
    original = torchvision.models.resnet18(num_classes=7).eval()
    path = save(original.state_dict(), "resnet.safetensors")
    model = models.load(model_settings("torchvision/resnet18", weights=path, input={"size": [32, 32]}))
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model.labels == tuple("0123456")
    with torch.inference_mode():
        torch.testing.assert_close(forward(model, x), original(x))
    said = error(lambda: models.load(model_settings("torchvision/resnet34", weights=path, input={"size": [32, 32]})))
    assert said.startswith(f"models.m.weights: {path} does not fit ResNet: missing ['layer1.2.conv1.weight', ")


def test_torchvision_with_weights_by_name(model_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be downloaded is made on the spot; size, mean, std and labels are those of the weights."""
    monkeypatch.setattr(
        torchvision.models.ShuffleNet_V2_X0_5_Weights,
        "get_state_dict",
        lambda *_, **__: torchvision.models.shufflenet_v2_x0_5().state_dict(),
    )
    model = models.load(model_settings("torchvision/shufflenet_v2_x0_5", weights="IMAGENET1K_V1"))
    assert model.input == InputSpec(224, 224, 256)
    assert isinstance(model.module, Normalised)
    assert model.module.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert len(model.labels) == 1000
    assert model.labels[0] == "tench"


def test_torchvision_names(model_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **others: Any) -> Callable[[], LoadedModel]:
        return lambda: models.load(model_settings(f"torchvision/{name}", **others))

    assert error(load("resnet19", weights="X")) == "models.m.source: torchvision has no model named 'resnet19'"
    assert error(load("resnet18")) == "models.m.weights: give a file, or one of IMAGENET1K_V1"
    assert error(load("resnet18", weights="BEST")) == (
        "models.m.weights: resnet18 has no weights named 'BEST'; it has IMAGENET1K_V1 (a file needs a path to it)"
    )

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    assert error(load("resnet18", weights="IMAGENET1K_V1")) == (
        "models.m.weights: IMAGENET1K_V1 could not be downloaded (no route to host); "
        "download it elsewhere and give the file's path"
    )
