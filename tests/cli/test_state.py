"""`tta-serve state`, on the store of a server that has ended."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tta_serve import cli
from tta_serve.building import build_engine
from tta_serve.builtin import digits
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.engine import Engine, Query
from tta_serve.errors import ConfigError, NotFound

SETTINGS = {"name": "digits", "source": {"builtin": "digits"}}
CONFIG = "models:\n  - {name: digits, source: {builtin: digits}}\n"


def inputs(count: int) -> torch.Tensor:
    return torch.from_numpy(255 - digits.split().held_out_images[:count]).permute(0, 3, 1, 2)


def begin(folder: Path) -> Engine:
    engine, _ = build_engine(ModelSettings.model_validate(SETTINGS), store=StoreSettings(path=str(folder)))
    return engine


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder whose store has two streams, and what `cam` answers."""
    folder = tmp_path_factory.mktemp("store")
    engine = begin(folder)
    for start in range(0, 64, 16):
        for stream in ("cam", "door"):
            ((_, lesson),) = engine.predict([Query(inputs(64)[start : start + 16], stream)])
            engine.learn([lesson])
    engine.streams.keep_good("cam", engine.streams.record("cam"), engine.streams.state("cam"))
    engine.streams.flush()
    answers = [engine.predict([Query(image[None], "cam")])[0][0].logits for image in inputs(50)]
    return folder, np.concatenate([each for each in answers if each is not None])


@pytest.fixture
def command(taught, monkeypatch, capsys):
    """Runs `tta-serve …` in the folder of the store's; gives what it said."""
    folder, _ = taught

    def run(*words: str | Path) -> str:
        monkeypatch.setattr("sys.argv", ["tta-serve", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.app(standalone_mode=True)
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    monkeypatch.chdir(folder.parent)
    return run


def test_list_and_show(taught, command):
    said = command("state", "list", "--store", taught[0])
    assert "digits, generation " in said
    assert "2 streams" in said
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["cam", "door"]
    shown = command("state", "show", "cam", "--store", taught[0])
    head, _, snapshot = shown.partition("}\n{")
    found = json.loads(head + "}")
    assert (found["stream"], found["incarnation"], found["kept"]) == ("cam", 1, [found["version"]])
    assert json.loads("{" + snapshot)["format"] == 1


def test_a_snapshot_goes_out_and_comes_back_in_a_new_life(taught, command, tmp_path):
    file = tmp_path / "door.safetensors"
    assert "version" in command("state", "export", "door", "--store", taught[0], "--file", file)
    before = begin(taught[0]).streams.state("door")
    engine = begin(taught[0])
    engine.streams.reset("door")
    assert "its life 3" in command("state", "import", file, "--store", taught[0])
    after = begin(taught[0]).streams.state("door")
    assert torch.equal(after.norm.inner.params, before.norm.inner.params)
    assert "nothing to throw away" in command("state", "prune", "--store", taught[0])


def test_the_adapted_model_answers_as_the_server_does(taught, command, tmp_path):
    config, file = tmp_path / "config.yaml", tmp_path / "cam.onnx"
    config.write_text(f"store: {{path: {taught[0]}}}\n{CONFIG}")
    said = command("state", "export", "cam", "--onnx", file, "--config", config)
    assert "differ from the server's by at most" in said
    session = onnxruntime.InferenceSession(file)
    logits = session.run(["logits"], {"images": (inputs(50).float() / 255).numpy()})[0]
    assert (logits.argmax(1) == taught[1].argmax(1)).all()
    np.testing.assert_allclose(logits, taught[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["list", "--store", "nowhere"], NotFound, "there are no states in nowhere"),
        (["show", "nobody", "--store", "STORE"], NotFound, "there is no stream 'nobody'"),
        (["export", "cam", "--store", "STORE"], ConfigError, "give either --file FILE"),
        (["export", "cam", "--onnx", "x.onnx"], ConfigError, "--onnx needs --config"),
        (["import", "nothing.safetensors"], ConfigError, "nothing.safetensors cannot be read"),
        (["list", "--store", "s3://bucket/x"], ConfigError, "states in an object store are listed over HTTP"),
    ],
)
def test_what_cannot_be_done_is_said(taught, monkeypatch, words, kind, message):
    filled = [str(taught[0]) if word == "STORE" else word for word in words]
    monkeypatch.setattr("sys.argv", ["tta-serve", "state", *filled])
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        cli.app(standalone_mode=False)
