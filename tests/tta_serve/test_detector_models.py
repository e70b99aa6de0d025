import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spots
import torch
from safetensors.torch import save_file
from torchvision.models import detection

from tta_serve import detector_models, models
from tta_serve.builtin import scene_detector
from tta_serve.config import ModelSettings
from tta_serve.detector_models import LoadedDetector
from tta_serve.errors import ConfigError

LABELS = ["__background__", "cat", "dog"]
SSDLITE = "torchvision/ssdlite320_mobilenet_v3_large"

FACTORIES = """
import torch
from torch import nn

class Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images, targets=None):
        return [self.answer for _ in images]

def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3))

def a_row_short():
    return Answers({"boxes": torch.zeros(2, 4), "labels": torch.zeros(1), "scores": torch.zeros(2)})

def without_scores():
    return Answers({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)})

def nothing():
    return None
"""


@pytest.fixture
def load(model_settings: Callable[..., ModelSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load(source, **settings)`; modules of factories can be imported."""
    (tmp_path / "tta_test_detectors.py").write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tta_test_detectors", raising=False)

    def make(source: Any, **others: Any) -> LoadedDetector:
        labels = {"labels": spots.LABELS} if "python" in source else {}  # a source without names of its own
        return detector_models.load(model_settings(source, **{"task": "detection", **labels, **others}))

    return make


def test_the_built_in_detector(load: Any) -> None:
    loaded = load("builtin/digit-scenes")
    assert loaded.labels == scene_detector.LABELS
    assert loaded.digest == models.digest_of(scene_detector.load())
    assert not any(each.requires_grad for each in loaded.detector.model.parameters())
    assert not loaded.detector.model.training


def test_a_module_of_ones_own(load: Any) -> None:
    loaded = load({"python": "spots:build"}, labels=spots.LABELS)
    assert isinstance(loaded.detector.model, spots.Spots)
    assert (loaded.labels, loaded.digest) == (spots.LABELS, spots.translator_file().detector)


def test_with_weights_from_a_file(load: Any, tmp_path: Path) -> None:
    changed = spots.build()
    changed.norm.bias.data.fill_(0.5)
    save_file(changed.state_dict(), tmp_path / "spots.safetensors")
    loaded = load({"python": "spots:build"}, weights=str(tmp_path / "spots.safetensors"))
    assert loaded.detector.model.norm.bias.tolist() == [0.5] * 3
    assert loaded.digest == models.digest_of(changed) != spots.translator_file().detector


@pytest.fixture(scope="module")
def ssdlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a small torchvision model of three classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "ssdlite.pt"
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), path)
    return str(path)


def test_a_model_of_torchvisions_from_a_file(load: Any, ssdlite: str) -> None:
    loaded = load(SSDLITE, weights=ssdlite, labels=LABELS)
    assert loaded.labels == tuple(LABELS)
    saved = torch.load(ssdlite, weights_only=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.detector.model.state_dict().items())


@pytest.mark.parametrize(
    ("labels", "hint"), [(None, "of other classes than COCO's needs `labels`, background first"), (["a", "b"], "")]
)
def test_weights_of_other_classes(load: Any, ssdlite: str, labels: Any, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SSDLITE, weights=ssdlite, labels=labels)
    assert str(caught.value).startswith(f"models.m.weights: {ssdlite} does not fit SSD: size mismatch")
    assert hint in str(caught.value)
    assert ("`labels`" in str(caught.value)) == bool(hint)


@pytest.mark.parametrize(
    ("source", "others", "said"),
    [
        (SSDLITE, {}, "models.m.weights: give a file, or one of COCO_V1"),
        (SSDLITE, {"weights": "V9"}, "has no weights named 'V9'; it has COCO_V1 (a file needs a path to it)"),
        ("torchvision/fcos_resnet18_fpn", {"weights": "V1"}, "torchvision has no model named 'fcos_resnet18_fpn'"),
        ({"python": "tta_test_detectors:missing"}, {}, "models.m.source: tta_test_detectors:missing: AttributeError"),
        ({"python": "tta_test_detectors:nothing"}, {}, "gives a NoneType, not a torch.nn.Module"),
        ({"python": "tta_test_detectors:classifier"}, {}, "models.m: looking at one blank image fails: "),
        ({"python": "tta_test_detectors:without_scores"}, {}, "fails: KeyError: 'scores' (a detector takes a list"),
        (
            {"python": "tta_test_detectors:a_row_short"},
            {},
            "for one image the model gives boxes [2, 4], labels [1] and scores [2]; they must be [n, 4], [n] and [n]",
        ),
    ],
)
def test_what_is_no_detector(load: Any, source: Any, others: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(source, **others)
    assert said in str(caught.value)
