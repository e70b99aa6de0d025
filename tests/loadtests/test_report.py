import json
import math
from datetime import datetime

import pytest

from loadtests import report
from loadtests.errors import MissingFile, MissingTool


def test_form(tmp_path):
    file = tmp_path / "out.json"
    report.write_json(file, "shift", {"error/continual/default": 23.71, "share_learned/noop/1": math.nan})
    told = json.loads(file.read_text())
    assert list(told) == ["script", "commit", "machine", "date", "figures"]
    assert told["script"] == "shift"
    assert told["figures"] == {"error/continual/default": 23.71}
    assert datetime.fromisoformat(told["date"]).utcoffset().total_seconds() == 0


def test_machine_tells_what_figures_depend_on():
    told = report.machine()
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0
    assert {"cpu", "python", "torch", "ray"} <= set(told)
    assert f"{told['cores']} cores" in report.machine_line()


def test_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setattr(report.shutil, "which", lambda _: None)
    assert report.commit() == "unknown"


def test_outputs_are_checked_before_the_run(tmp_path, monkeypatch):
    report.check_outputs(None)
    report.check_outputs(tmp_path / "new.json")
    with pytest.raises(MissingFile, match="folder of"):
        report.check_outputs(tmp_path / "absent" / "new.json")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingTool, match="pip install matplotlib"):
        report.check_outputs(None, tmp_path / "new.png")
