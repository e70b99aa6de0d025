"""How a server begins and ends: interrupted, refused, and with a model that cannot be had."""

import os
import signal
import socket
import subprocess

import httpx
import pytest
from servers import COMMAND, START_S, STOP_S, session, tta_serve, until

from tta_serve.runfolder import RunFolder

pytestmark = pytest.mark.real


@pytest.fixture
def foreground():
    """Starts `tta-serve up` as a terminal does: in a session of its own, whose processes all get the Ctrl-C."""
    started = []

    def start(path, log):
        with log.open("w") as file:
            process = subprocess.Popen(
                [COMMAND, "up", path], stdout=file, stderr=subprocess.STDOUT, cwd=path.parent, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=STOP_S)


@pytest.mark.parametrize("when", ["ready", "starting"])
def test_ctrl_c_stops_it_cleanly(foreground, write_config, tmp_path, when):
    path, port = write_config()
    log = tmp_path / "said"
    process = foreground(path, log)
    folder = RunFolder(port)

    def reached() -> bool:
        assert process.poll() is None, log.read_text()
        if when == "ready":
            return "Ctrl-C stops it." in log.read_text()
        return any("gcs_server" in command for command in session(process.pid).values())

    until(reached, START_S, when)
    if when == "ready":
        assert f"ready http://127.0.0.1:{port}" in log.read_text()
        assert httpx.get(f"http://127.0.0.1:{port}/v2/models/digits/ready", timeout=30).status_code == 200
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=STOP_S) == 0, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert "rror" not in said
    assert not folder.alive()
    assert not folder.path.exists()
    until(lambda: not session(process.pid), 15, f"the session is empty: {session(process.pid)}")


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["foreground", "detached"])
def test_a_port_in_use_is_told_in_one_line(write_config, detach):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        path, port = write_config(port=other.getsockname()[1])
        ended = tta_serve("up", path, *detach, folder=path.parent)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error port {port} on 127.0.0.1 cannot be used (Address already in use)")
    assert ended.stderr.count("\n") == 1
    assert not RunFolder(port).alive()


def test_an_update_from_another_folder_is_refused(live, write_config):
    path, _ = write_config(port=live.port)
    ended = tta_serve("up", path, "--detach", folder=path.parent)
    assert ended.returncode == 2
    assert "paths would mean others" in ended.stderr
    assert httpx.get(f"{live.url}/v2/health/ready", timeout=30).status_code == 200


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["foreground", "detached"])
def test_a_bad_configuration_is_told_with_its_lines(tmp_path, detach):
    path = tmp_path / "config.yaml"
    path.write_text(
        "models:\n"
        "  - name: digits\n"
        "    source: {builtin: digits}\n"
        "    threads: none\n"
        "  - name: other\n"
        "    source: torchvision/resnet18\n"
        "    weights: ./nowhere.safetensors\n"
    )
    ended = tta_serve("up", path.name, *detach, folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = ended.stderr.removeprefix("error ").splitlines()
    assert all(line.startswith("config.yaml:") for line in lines)
    assert any(line.startswith("config.yaml:4: models.0.threads") for line in lines)
    assert any("./nowhere.safetensors is not a file" in line for line in lines)


def test_a_model_that_cannot_be_built_ends_the_start_with_its_reason(write_config):
    path, port = write_config(source={"python": "broken:build"}, input={"size": [32, 32]})
    (path.parent / "broken.py").write_text("def build():\n    raise FileNotFoundError('no weights in /nowhere')\n")
    ended = tta_serve("up", path, "--detach", folder=path.parent, seconds=120)
    assert ended.returncode == 2
    assert ended.stdout == ""
    reason = "models.digits.source: broken:build: FileNotFoundError: no weights in /nowhere"
    assert ended.stderr.splitlines()[-1] == f"error {reason}"
    assert "Traceback" not in ended.stderr
    assert not RunFolder(port).alive()
    status = RunFolder(port).read()
    assert status
    assert (status.phase, status.message) == ("failed", reason)
    until(lambda: not session(status.pid), 15, "the session is empty")
