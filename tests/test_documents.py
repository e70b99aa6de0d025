"""What the documents promise: every example is valid, every setting is described, every command exists."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from pydantic import BaseModel

from tta_serve import config, metrics
from tta_serve.http import ModelRoutes
from tta_serve.http_detection import DetectionRoutes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
HTTP = (ROOT / "docs" / "http.md").read_text()
TRANSLATORS = (ROOT / "docs" / "translators.md").read_text()
LABELS = (ROOT / "docs" / "labels.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "example",
    [*blocks(README, "yaml"), *blocks(CONFIGURATION, "yaml"), *blocks(TRANSLATORS, "yaml"), *blocks(LABELS, "yaml")],
)
def test_every_configuration_shown_is_valid(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("weights", "street-ir", "ir"):
        (tmp_path / f"{name}.safetensors").touch()
    np.savez(tmp_path / "source-images.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "shown.yaml").write_text(example)
    assert config.load(tmp_path / "shown.yaml").models


def settings(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """All models of settings below one, by name."""
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for kind in re.findall(r"\w+Settings", str(field.annotation)):
            found |= settings(getattr(config, kind))
    return found


ALL_SETTINGS = settings(config.Config)
KEYS = [(name, key) for name, model in ALL_SETTINGS.items() for key in model.model_fields]


def test_the_settings_are_found() -> None:
    assert len(ALL_SETTINGS) == 20
    assert ("EATASettings", "class_mix") in KEYS


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_every_setting_is_described(name: str, key: str) -> None:
    assert re.search(rf"`[^`]*\b{key}\b[^`]*`", CONFIGURATION), f"{name}.{key} is not in docs/configuration.md"


@pytest.mark.parametrize("default", re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", CONFIGURATION, flags=re.MULTILINE))
def test_every_default_shown_is_the_one_in_force(default: tuple[str, str]) -> None:
    key, shown = default
    actual = {str(model.model_fields[key].default) for model in ALL_SETTINGS.values() if key in model.model_fields}
    written = {
        "32MiB": str(32 * 2**20),
        "64MiB": str(64 * 2**20),
        "25e6": "25000000",
        "100e6": "100000000",
        "true": "True",
        "[16, 4, 4]": "(16, 4, 4)",
    }
    same = {shown, written.get(shown, shown), f"{shown}.0"}
    assert same & actual or key == "adapter", f"{key}: documented {shown}, in force {sorted(actual)}"


def test_every_route_is_described() -> None:
    def no_service() -> NoReturn:
        raise AssertionError

    tokens = config.Tokens(infer=None, admin=None)
    classifiers, detectors = ModelRoutes("m", no_service, tokens).table, DetectionRoutes("m", no_service, tokens).table
    assert (len(classifiers), len(detectors)) == (15, 16)
    for route in (*classifiers, *detectors):
        path = f"/v2/models/{{m}}{route.path}".removesuffix("/")
        assert re.search(rf"{re.escape(path)}[`?]", HTTP), f"{route.method} {path} is not in docs/http.md"


def test_every_target_that_the_documents_name_exists() -> None:
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", documents))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "test-all", "check"} <= named <= targets


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"tta-serve ([a-z-]+)\b", README + TRANSLATORS)) - {"is", "up"}
    assert {"check", "status", "down"} <= named
    for command in sorted({*named, "up"}):
        done = subprocess.run(
            [sys.executable, "-m", "tta_serve", command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_nothing_is_left_to_fill_in() -> None:
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", path.read_text()), path


def test_every_script_that_the_readme_names_exists() -> None:
    for name in set(re.findall(r"loadtests/\w+\.py", README)):
        assert (ROOT / name).is_file()


def test_metrics_are_named_as_prometheus_asks() -> None:
    for name, kind, _, text in metrics.TABLE:
        assert name.startswith("tta_")
        assert name.endswith("_total") == (kind.__name__ == "Counter")
        assert text.endswith(".")


def test_every_option_of_training_that_the_documents_name_exists() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tta_serve", "train-translator", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "300"},
    )
    named = set(re.findall(r"(--[a-z][a-z-]+)", TRANSLATORS)) - {"--data-binary", "--modality", "--count"}
    assert len(named) > 15
    assert not {option for option in named if option not in done.stdout}
