import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import spots
import torch
from PIL import Image
from torch import nn

from tta_serve import detector_models, translators
from tta_serve.builtin import scene_detector, scenes
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.detection import DetectionEngine, Sight
from tta_serve.detection_building import build_detection_engine
from tta_serve.errors import ConfigError
from tta_serve.models import digest_of

SPOTS = {"python": "spots:build"}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved("ir", detector=…)`: the path of a translator's file."""

    def make(modality: str = "ir", **others: Any) -> Path:
        path = tmp_path / f"{modality}.safetensors"
        translators.save(path, spots.translator_file(modality, **others))
        return path

    return make


@pytest.fixture
def settings(model_settings: Callable[..., ModelSettings]) -> Callable[..., ModelSettings]:
    """As `model_settings`, of the detector of spots."""

    def make(source: Any = None, **others: Any) -> ModelSettings:
        known = {"task": "detection", "labels": spots.LABELS, "device": "cpu"}
        return model_settings(source or SPOTS, **{**known, **others})

    return make


def refusal(settings: ModelSettings) -> str:
    with pytest.raises(ConfigError) as caught:
        build_detection_engine(settings)
    return str(caught.value)


def names(engine: DetectionEngine) -> list[str]:
    return list(engine.modalities)


def test_a_detector_behind_its_translators(settings: Any, saved: Any, tmp_path: Path) -> None:
    known = {"ir": str(saved("ir")), "uv": {"file": str(saved("uv"))}}
    modtr = {"stream_learning_rate": 0.02, "modality_learning_rate": 0.004}
    asked = settings(translators=known, adapter={"modtr": modtr}, streams={"max": 7, "resident": 3}, threads=1)
    engine, loaded = build_detection_engine(asked, store=StoreSettings(path=str(tmp_path / "states")))
    assert names(engine) == ["ir", "uv"]
    assert engine.digest == loaded.digest == spots.translator_file().detector
    assert loaded.labels == spots.LABELS
    ir = engine.modalities["ir"]
    assert (ir.modtr.config.learning_rate, ir.shared.config.learning_rate, ir.probe) == (0.02, 0.004, None)
    assert (engine.streams.streams_max, engine.streams.resident, engine.threads) == (7, 3, 1)
    assert engine.streams.names() == []  # nothing is left of the trial
    assert (tmp_path / "states" / asked.name).stat().st_mode & 0o077 == 0
    assert engine.streams.durable.store.count() == 0  # nor in the store
    (found,) = engine.predict([Sight((spots.tensor(spots.infrared()),), ("ir",), "a")])
    assert found.detections is not None
    assert found.detections[0].boxes.tolist() == [[4, 2, 10, 8]]
    engine.streams.durable.store.close()


def test_without_translators(settings: Any) -> None:
    for others in ({}, {"adapter": "source"}):
        engine, _ = build_detection_engine(settings(**others))
        assert names(engine) == []
        assert engine.settings.learns == ("nothing" if others else "both")


def test_the_built_in_model_brings_its_own(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, mine = tmp_path / "own.safetensors", tmp_path / "mine.safetensors"
    translators.save(own, spots.translator_file("ir", detector=scene_detector.load()))
    translators.save(mine, spots.translator_file("uv", detector=scene_detector.load()))
    monkeypatch.setattr(detector_models, "BUILTIN_TRANSLATORS", {"ir": own})
    scene = {"source": "builtin/digit-scenes", "labels": None}
    assert names(build_detection_engine(settings(**scene))[0]) == ["ir"]
    assert names(build_detection_engine(settings(**scene, adapter="source"))[0]) == []
    assert names(build_detection_engine(settings(**scene, translators={"uv": str(mine)}))[0]) == ["uv"]


def test_a_translator_for_another_detector(settings: Any, saved: Any) -> None:
    other = spots.Spots()
    other.norm.bias.data.fill_(0.1)
    message = refusal(settings(translators={"ir": str(saved("ir", detector=other))}))
    assert message.startswith("models.m.translators.ir: ")
    assert f"was made for the detector {digest_of(other)}, this one is {digest_of(spots.Spots())}" in message
    assert "train-translator" in message


def test_a_translator_of_another_name(settings: Any, saved: Any) -> None:
    message = refusal(settings(translators={"uv": str(saved("ir"))}))
    assert "models.m.translators.uv: " in message
    assert "is for the modality 'ir', not 'uv'" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100])
def test_a_file_that_is_no_translator(settings: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ir.safetensors").write_bytes(content)
    message = refusal(settings(translators={"ir": str(tmp_path / "ir.safetensors")}))
    assert message.startswith(f"models.m.translators.ir: {tmp_path}/ir.safetensors: {len(content)} bytes that are no")


def test_a_file_that_is_gone(settings: Any, saved: Any) -> None:
    path = saved("ir")
    asked = settings(translators={"ir": str(path)})
    path.unlink()
    message = refusal(asked)
    assert message.startswith("models.m.translators.ir: ")
    assert str(path) in message


def test_the_file_of_a_translator_called_rgb(settings: Any, saved: Any) -> None:
    path = saved("ir")
    content = path.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(content), {**metadata, "modality": "rgb"}))
    assert "'rgb' is the name of images that are not translated" in refusal(settings(translators={"ir": str(path)}))


def coco_folder(folder: Path, *, boxes: bool = True) -> Path:
    """Two pictures of a red spot, as an annotation tool would write them."""
    folder.mkdir()
    for number in range(2):
        Image.fromarray(spots.infrared()[..., 0]).save(folder / f"{number}.png")
    box = {"category_id": 3, "bbox": [4, 2, 6, 6], "area": 36, "iscrowd": 0}
    annotations = {
        "images": [{"id": number, "file_name": f"{number}.png", "width": 16, "height": 12} for number in range(2)],
        "categories": [{"id": 3, "name": "red"}],
        "annotations": [{"id": number + 1, "image_id": number, **box} for number in range(2)] if boxes else [],
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def test_a_probe(settings: Any, saved: Any, tmp_path: Path) -> None:
    known = {"ir": {"file": str(saved("ir")), "probe": str(coco_folder(tmp_path / "probe"))}}
    engine, _ = build_detection_engine(settings(translators=known))
    assert engine.modalities["ir"].ap50 == 1.0


@pytest.mark.parametrize("what", ["empty", "no boxes", "broken picture"])
def test_a_probe_that_cannot_be_used(settings: Any, saved: Any, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "probe"
    if what == "empty":
        folder.mkdir()
    else:
        coco_folder(folder, boxes=what != "no boxes")
    if what == "broken picture":
        content = (folder / "0.png").read_bytes()
        (folder / "0.png").write_bytes(content[:-30])
    known = {"ir": {"file": str(saved("ir")), "probe": str(folder)}}
    assert refusal(settings(translators=known)).startswith("models.m.translators.ir: ")


def test_a_device_that_is_not_there(settings: Any) -> None:
    assert refusal(settings(device="cuda:99")).startswith("models.m.device: cuda:99: ")


class Fainting(spots.Spots):
    """Sees grey and nothing else."""

    def forward(self, images: Any, targets: Any = None) -> Any:
        if len(images) > 1:
            raise RuntimeError("too many images")
        return super().forward(images, targets)


def test_what_cannot_look_is_refused_at_once(settings: Any, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spots, "build", Fainting)
    message = refusal(settings(translators={"ir": str(saved("ir"))}))
    assert message == "models.m: the model loads, but a trial of looking fails: RuntimeError: too many images"


def test_threads_are_as_before(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    with caplog.at_level(logging.WARNING):
        build_detection_engine(settings(threads=2))
    assert torch.get_num_threads() == before
    assert not caplog.records
    assert isinstance(build_detection_engine(settings())[1].detector.model, nn.Module)


def test_alignment_of_the_built_in_model_brings_its_source(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tta_serve.detection_building.SOURCE_IMAGES", 32)
    asked = settings(source="builtin/digit-scenes", labels=None, adapter={"alignment": {"drift_max": 1.5}})
    engine, _ = build_detection_engine(asked)
    assert engine.aligner is not None
    assert engine.aligner.norm.adapter.config.drift_max == 1.5
    assert (names(engine), engine.settings.learns) == ([], "nothing")  # alignment alone


def test_alignment_from_an_npz(settings: Any, tmp_path: Path) -> None:
    made = np.stack([scene.image for scene in scenes.scenes(16, seed=33, held_out=False)])
    np.savez(tmp_path / "source.npz", images=made)
    known: dict[str, Any] = {
        "source": {"python": "tta_serve.builtin.scene_detector:build"},
        "labels": scene_detector.LABELS,
        "adapter": "alignment",
    }
    engine, _ = build_detection_engine(settings(**known, prior=tmp_path / "source.npz"))
    assert engine.aligner is not None
    np.savez(tmp_path / "few.npz", images=made[:2])
    assert "at least 4 source images" in refusal(settings(**known, prior=tmp_path / "few.npz"))


def test_alignment_needs_a_backbone(settings: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "source.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    message = refusal(settings(adapter="alignment", prior=tmp_path / "source.npz"))
    assert message.startswith("models.m.adapter.alignment: this detector has no `backbone`")
