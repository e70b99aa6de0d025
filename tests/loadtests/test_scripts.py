"""Every script tells how to run it, both as a file and as a module, from anywhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests import errors
from loadtests.report import ROOT

SCRIPTS = (
    "alignment",
    "chaos",
    "deletes",
    "hot_stream",
    "incremental",
    "many_streams",
    "modality",
    "protocols",
    "replay_eata",
    "replicas",
    "runtime",
    "shift",
    "streams",
    "throughput",
)
IN_PROCESS = {
    "incremental_encoder.py",
    "many_streams_attach.py",
    "protocol_served.py",
    "runtime.py",
    "streams.py",
}  # measure the server's parts without HTTP
JUDGED = {"chaos_watch.py", "deletes_snapshots.py"}  # what a server would refuse is asked of its own check
MADE = {"modality_scenes.py"}  # what is sent is made there, and its measure is too; no part of the server runs here


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_as_a_file_from_another_folder(script, tmp_path):
    command = [sys.executable, str(ROOT / "loadtests" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"python loadtests/{script}.py" in done.stdout
    assert "--json FILE" in done.stdout


def test_as_a_module():
    command = [sys.executable, "-m", "loadtests.shift", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--protocol" in done.stdout


def test_an_error_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "loadtests" / "shift.py"), "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "--data names the folder" in done.stderr


def test_the_others_do_not_import_the_server():
    files = list(Path(errors.__file__).parent.glob("*.py"))
    assert len(files) >= 25
    for file in files:
        if file.name in IN_PROCESS | JUDGED | MADE:
            assert "from tta_serve" in file.read_text()
            continue
        assert "import tta_serve" not in file.read_text()
        assert "from tta_serve" not in file.read_text()


def test_a_termination_signal_unwinds(monkeypatch):
    kept = signal.getsignal(signal.SIGTERM)
    unwound = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            unwound.append(True)
        return 0

    try:
        with pytest.raises(SystemExit) as end:
            errors.run(main)
    finally:
        signal.signal(signal.SIGTERM, kept)
    assert end.value.code == 143
    assert unwound
