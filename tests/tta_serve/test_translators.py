import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.translator import Translator, TranslatorConfig
from tta_serve import translators
from tta_serve.errors import InvalidInput
from tta_serve.router import FEATURES, Router
from tta_serve.translators import FILE_BYTES_MAX, TranslatorFile, build, check_modality, load, parse, save

DETECTOR = "0123456789abcdef"
CONFIG = TranslatorConfig(in_channels=1, width=2, depth=1)


def make(config: TranslatorConfig = CONFIG, **changed: Any) -> TranslatorFile:
    """A small translator that has seen an image, so that none of its numbers are where they began."""
    translator = Translator(config, torch.Generator().manual_seed(0))
    translator(torch.linspace(0, 1, 2 * config.in_channels * 64).reshape(2, config.in_channels, 8, 8))
    with torch.no_grad():
        translator.head.weight.copy_(torch.linspace(-1, 1, 6).reshape(3, 2, 1, 1))
    size = len(FEATURES)
    router = Router(np.full(size, 0.1), np.ones(size), np.zeros(size), 0.5, np.zeros(size), np.eye(size) / 3, 1.5)
    metrics = {"ap50/ir/modtr": 0.875, "seed": 0, "history": [0.25, None]}
    return TranslatorFile("ir", DETECTOR, config, translator.state_dict(), router, metrics)._replace(**changed)


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    save(tmp_path / "ir.safetensors", make())
    return (tmp_path / "ir.safetensors").read_bytes()


def rewritten(content: bytes, weights: dict[str, Tensor] | None = None, **header: str | None) -> bytes:
    """The file with other weights or entries in its header; None takes an entry out."""
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    metadata = {name: value for name, value in {**metadata, **header}.items() if value is not None}
    return safetensors.torch.save(weights or safetensors.torch.load(content), metadata=metadata)


def refusal(content: bytes, detector: str = DETECTOR, modality: str | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse(content, detector, modality)
    return str(caught.value)


# There and back


@pytest.mark.parametrize("fusion", ["multiply", "add", "none"])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_a_file_comes_back_bit_for_bit(fusion: Any, in_channels: int, tmp_path: Path) -> None:
    file = make(TranslatorConfig(in_channels, width=2, depth=1, fusion=fusion))
    save(tmp_path / "ir.safetensors", file)
    read = load(tmp_path / "ir.safetensors", DETECTOR, "ir")
    assert (read.modality, read.detector, read.config, read.metrics) == (
        file.modality,
        file.detector,
        file.config,
        file.metrics,
    )
    assert read.weights.keys() == file.weights.keys()
    for name, tensor in file.weights.items():
        assert read.weights[name].dtype == tensor.dtype
        assert read.weights[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    assert read.router is not None
    assert file.router is not None
    assert read.router.to_json() == file.router.to_json()


def test_the_same_translator_is_the_same_bytes(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / str(number), make())
    assert len({(tmp_path / str(number)).read_bytes() for number in range(5)}) == 1


def test_a_file_without_a_router_and_of_any_modality(tmp_path: Path) -> None:
    save(tmp_path / "file", make(router=None, modality="sar-2_b"))
    read = load(tmp_path / "file", DETECTOR)
    assert read.router is None
    assert read.modality == "sar-2_b"


def test_the_built_translator_answers_as_the_saved_one(written: bytes) -> None:
    file = make()
    original = Translator(CONFIG)
    original.load_state_dict(file.weights)
    x = torch.linspace(0, 1, 1 * 1 * 7 * 9).reshape(1, 1, 7, 9)
    built = build(parse(written, DETECTOR))
    assert not built.training
    with torch.no_grad():
        answer = built(x)
        assert torch.equal(answer, original.eval()(x))
    assert answer.std() > 0.01


def test_a_built_translator_does_not_change_the_file(written: bytes) -> None:
    file = parse(written, DETECTOR)
    before = {name: tensor.clone() for name, tensor in file.weights.items()}
    with torch.no_grad():
        for tensor in build(file).parameters():
            tensor.zero_()
    assert all(torch.equal(file.weights[name], tensor) for name, tensor in before.items())


def test_saving_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "ir.safetensors"
    path.write_bytes(b"what was there before")
    save(path, make())
    assert load(path, DETECTOR).modality == "ir"
    assert [each.name for each in tmp_path.iterdir()] == ["ir.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_saving_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ir.safetensors"
    path.write_bytes(b"what was there before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, make())
    assert path.read_bytes() == b"what was there before"
    assert [each.name for each in tmp_path.iterdir()] == ["ir.safetensors"]


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    for changed in ({"modality": "IR"}, {"detector": "none"}, {"weights": {"a": torch.zeros(1)}}):
        with pytest.raises(InvalidInput):
            save(tmp_path / "file", make(**changed))
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "file", make(metrics={"ap": float("nan")}))
    assert list(tmp_path.iterdir()) == []


# What is refused


@pytest.mark.parametrize("name", ["ir", "0", "a" * 32, "near-infrared_2", "rgb2"])
def test_names_of_modalities(name: str) -> None:
    assert check_modality(name) == name


@pytest.mark.parametrize("name", ["", "IR", "-ir", "_ir", "a" * 33, "i r", "ir\n", "ïr", "ir/..", "None;"])
def test_names_that_no_modality_has(name: str, written: bytes) -> None:
    says = f"{name!r} cannot name a modality; use 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or digit"
    with pytest.raises(InvalidInput) as caught:
        check_modality(name)
    assert str(caught.value) == says
    assert refusal(rewritten(written, modality=name)) == says


def test_rgb_is_not_translated(written: bytes) -> None:
    assert refusal(rewritten(written, modality="rgb")) == (
        "'rgb' is the name of images that are not translated; give the modality another name"
    )


def test_a_path_is_named_in_the_refusal(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"hello")
    with pytest.raises(InvalidInput, match=r"broken\.safetensors: 5 bytes that are no safetensors file"):
        load(path, DETECTOR)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", DETECTOR)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_file_cut_short(kept: int, written: bytes) -> None:
    assert "no safetensors file" in refusal(written[:kept])
    assert "was the file cut short?" in refusal(written[:kept])


def test_a_file_of_a_type_that_torch_does_not_have() -> None:
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    assert "no safetensors file" in refusal(len(header).to_bytes(8, "little") + header + bytes(3))


def test_a_file_that_is_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: bytes) -> None:
    monkeypatch.setattr(translators, "FILE_BYTES_MAX", len(written))
    assert parse(written, DETECTOR).modality == "ir"
    assert refusal(written + b" ") == f"the translator's file has more than {len(written)} bytes, which is the limit"
    (tmp_path / "file").write_bytes(written * 3)
    with pytest.raises(InvalidInput, match="which is the limit"):
        load(tmp_path / "file", DETECTOR)


@pytest.mark.parametrize("name", ["format", "format_version"])
@pytest.mark.parametrize("value", [None, "", "2", "tta-serve"])
def test_another_format_or_version(name: str, value: str | None, written: bytes) -> None:
    said = refusal(rewritten(written, **{name: value}))
    assert said.startswith(f"the file's {name} is {value!r}, not ")
    assert "tta-serve train-translator" in said


def test_safetensors_of_something_else() -> None:
    assert "the file's format is None" in refusal(safetensors.torch.save({"w": torch.zeros(2)}))
    assert "the file's format is 'pt'" in refusal(safetensors.torch.save({}, metadata={"format": "pt"}))


@pytest.mark.parametrize("name", ["modality", "detector", "config", "router", "metrics"])
def test_a_header_that_lacks_an_entry(name: str, written: bytes) -> None:
    assert refusal(rewritten(written, **{name: None})) == (
        f"the file's header has no {name}; is it a translator's file?"
    )


def test_another_detectors(written: bytes) -> None:
    assert refusal(written, detector="f" * 16) == (
        f"the translator was made for the detector {DETECTOR}, this one is {'f' * 16}; "
        "train one through this detector with `tta-serve train-translator`"
    )
    for odd in ("", "0123", "0123456789ABCDEF", "x" * 10_000):
        said = refusal(rewritten(written, detector=odd), detector=odd)
        assert said.endswith("is no digest of 16 hexadecimal digits")
        assert len(said) < 200


def test_another_modalitys(written: bytes) -> None:
    assert refusal(written, modality="depth") == (
        "the translator is for the modality 'ir', not 'depth'; give it under 'ir'"
    )


def other_config(**changed: Any) -> str:
    return json.dumps({**dataclasses.asdict(CONFIG), **changed})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("", "the file's config is not JSON"),
        ("[" * 100_000, "the file's config is not JSON"),
        ('{"width": NaN}', "finite numbers only"),
        ("[]", "must be an object with in_channels, width, depth, fusion and nothing else"),
        ("{}", "must be an object with"),
        (other_config(more=1), "and nothing else"),
        (other_config(width=2.0), "width must be of type int, not 2.0"),
        (other_config(width=True), "width must be of type int, not True"),
        (other_config(fusion=None), "fusion must be of type str, not None"),
        (other_config(fusion="x" * 10_000), "fusion must be one of"),
        (other_config(width=65), "width is 65; at most 64 is served"),
        (other_config(depth=7), "depth is 7; at most 6 is served"),
        (other_config(depth=10**30), "at most 6 is served"),
        (other_config(width=0), "config cannot be used: width and depth must be at least 1"),
        (other_config(depth=-1), "config cannot be used: width and depth must be at least 1"),
        (other_config(in_channels=2), "config cannot be used: a translator's images have 1 or 3 channels, not 2"),
        (other_config(in_channels=3), r"the weight stem.0.weight is torch.float32 [2, 1, 3, 3]"),
        (other_config(width=64, depth=6), "the translator's weights lack "),
        (other_config(depth=2), "the translator's weights lack down.1."),
        (other_config(width=3), "it must be torch.float32 [3"),
    ],
)
def test_a_config_that_is_absurd_or_does_not_fit(config: str, says: str, written: bytes) -> None:
    assert says in refusal(rewritten(written, config=config))


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def with_weight(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {**weights, name: change(weights.get(name, torch.zeros(1)))}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("head.bias"), "the translator's weights lack head.bias;"),
        (with_weight("tail.bias", torch.clone), "the translator's weights have tail.bias;"),
        (with_weight("x" * 10_000, torch.clone), "the translator's weights have xxx"),
        (with_weight("head.bias", lambda bias: bias[:2].clone()), "the weight head.bias is torch.float32 [2];"),
        (with_weight("head.bias", Tensor.double), "the weight head.bias is torch.float64 [3];"),
        (with_weight("head.bias", lambda bias: bias / 0), "the weight head.bias has values that are not finite"),
        (with_weight("head.bias", lambda bias: bias * torch.nan), "head.bias has values that are not finite"),
        (with_weight("stem.1.running_var", torch.neg), "the variance stem.1.running_var has values below 0"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str, written: bytes
) -> None:
    said = refusal(rewritten(written, change(safetensors.torch.load(written))))
    assert says in said
    assert len(said) < 600


@pytest.mark.parametrize("router", ["", "{}", '"ir"', '{"version": 1}'])
def test_a_router_that_cannot_be_read(router: str, written: bytes) -> None:
    said = refusal(rewritten(written, router=router))
    assert said.startswith("the router ")
    assert said.endswith("; train the translator again to have it fitted")


@pytest.mark.parametrize(
    ("metrics", "says"),
    [("[]", "must be a JSON object"), ("{", "metrics is not JSON"), ('{"ap": NaN}', "finite numbers only")],
)
def test_metrics_that_cannot_be_read(metrics: str, says: str, written: bytes) -> None:
    assert says in refusal(rewritten(written, metrics=metrics))


def test_the_bounds_admit_the_largest_translator_of_the_paper() -> None:
    sizes = [TranslatorConfig(3, *size) for size in ((31, 4), (8, 3))]
    for config in sizes:
        assert config.width <= translators.WIDTH_MAX
        assert config.depth <= translators.DEPTH_MAX
        with torch.device("meta"):
            parameters = sum(each.numel() for each in Translator(config).parameters())
        assert parameters * 4 < FILE_BYTES_MAX / 2


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_bytes_come_they_are_a_translator_or_refused(data: st.DataObject) -> None:
    weights = {name: tensor.clone() for name, tensor in make().weights.items()}
    header = {
        "format": translators.FORMAT,
        "format_version": translators.FORMAT_VERSION,
        "modality": "ir",
        "detector": DETECTOR,
        "config": json.dumps(dataclasses.asdict(CONFIG)),
        "router": "null",
        "metrics": "{}",
    }
    content = bytearray(safetensors.torch.save(weights, metadata=header))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        file = parse(bytes(content), DETECTOR)
    except InvalidInput:
        return  # any other error fails the test
    assert build(file)(torch.zeros(1, 1, 3, 3)).shape == (1, 3, 3, 3)
