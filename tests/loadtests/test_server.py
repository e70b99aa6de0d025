"""Starting and stopping, with a stand-in for the command: a script that answers every GET on the configured port."""

import os
import stat
import sys
from pathlib import Path

import httpx
import pytest

from loadtests import server
from loadtests.errors import MissingTool, ServerFailed

STAND_IN = """\
#!{python}
import http.server, os, sys, yaml
assert sys.argv[1] == "up"
config = yaml.safe_load(open(sys.argv[2]))
{extra}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (os.environ["PYTHONPATH"] + "|" + os.getcwd() + "|" + str(os.getpid())).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer((config["http"]["host"], config["http"]["port"]), Handler).serve_forever()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    def write(extra=""):
        command = tmp_path / "tta-serve"
        command.write_text(STAND_IN.format(python=sys.executable, extra=extra))
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(server.sys, "executable", str(tmp_path / "python"))

    return write


def test_it_runs_for_the_block_and_leaves_nothing(install):
    install()
    with server.own_server([{"name": "digits"}], start_max_s=60) as url:
        path, folder, pid = httpx.get(f"{url}/v2/health/ready").text.split("|")
        assert path.split(os.pathsep)[0] == str(server.ROOT)
        assert (Path(folder) / "config.yaml").is_file()
    assert not Path(folder).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_it_is_stopped_when_the_block_fails(install):
    install()

    def fail():
        with server.own_server([{"name": "digits"}], start_max_s=60) as url:
            pids.append(int(httpx.get(f"{url}/").text.split("|")[2]))
            raise RuntimeError("in the middle")

    pids = []
    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_server_that_ends_shows_its_log(install):
    install(extra="sys.exit('config.yaml:3: there is no such key')")
    with pytest.raises(ServerFailed, match=r"exit code 1:\n.*no such key"), server.own_server([{"name": "digits"}]):
        pass


def test_a_server_that_is_never_ready_is_stopped(install):
    install(extra="import time; time.sleep(600)")
    with pytest.raises(ServerFailed, match="not ready after"), server.own_server([{"name": "a"}], start_max_s=0.5):
        pass


def test_a_missing_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(server.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingTool, match="pip install -e"), server.own_server([{"name": "digits"}]):
        pass
