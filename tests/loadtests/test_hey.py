import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from loadtests import hey
from loadtests.client import encode
from loadtests.errors import LoadTestError, MissingTool

HEAD = "response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset\n"


def requests(count=2):
    return [encode(np.full((1, 3, 2, 2), value, np.uint8), stream="a") for value in range(count)]


def line(took_s, code, offset_s):
    return f"{took_s:.4f},0.0001,0.0000,0.0001,0.0010,0.0001,{code},{offset_s:.4f}\n"


def test_figures_are_of_all_connections():
    first = HEAD + line(0.010, 200, 0.1) + line(0.040, 200, 0.3) + " \n"  # hey ends with a blank
    second = HEAD + line(0.020, 429, 0.2) + line(0.030, 500, 0.47) + " \n"
    found = hey.parse([first, second], sent=7)
    assert found[:3] == (2, 1, 4)  # failed: one with 500, and three without an answer
    assert found.duration_s == pytest.approx(0.5)  # 0.47 + 0.03
    assert found.rps == pytest.approx(4)
    assert (found.p50_ms, found.p99_ms) == (20, 40)


def test_p99_is_the_nearest_rank():
    lines = [line(0.001 * n, 200, n) for n in range(1, 201)]
    assert hey.parse([HEAD + "".join(lines)], sent=200).p99_ms == pytest.approx(198)  # of 200, two are above it


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(LoadTestError, match="none of hey's 9 requests was answered"):
        hey.parse([HEAD], sent=9)
    with pytest.raises(LoadTestError, match=r"other columns than expected.*'status-code'"):
        hey.parse(["response-time\n0.01\n"], sent=1)
    with pytest.raises(LoadTestError, match="other columns"):
        hey.parse([HEAD + "0.01,0\n"], sent=1)


def test_a_missing_program_names_its_package(monkeypatch):
    monkeypatch.setattr(hey.shutil, "which", lambda _: None)
    with pytest.raises(MissingTool, match="apt install hey"):
        hey.load("http://127.0.0.1:9", requests(), rate=10, seconds=1)


def test_a_program_that_fails_or_hangs_is_an_error(monkeypatch, tmp_path):
    program = tmp_path / "hey"
    program.write_text("#!/bin/sh\necho wrong option >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(hey.shutil, "which", lambda _: str(program))
    with pytest.raises(LoadTestError, match="exit code 3: wrong option"):
        hey.load("http://127.0.0.1:9", requests(), rate=10, seconds=1)
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setattr(hey, "TIMEOUT_S", 0)
    with pytest.raises(LoadTestError, match="did not end"):
        hey.load("http://127.0.0.1:9", requests(), rate=10, seconds=0.01)


def test_all_connections_together_have_the_rate(monkeypatch, tmp_path):
    """A program in hey's place that answers with its own options."""
    program = tmp_path / "hey"
    program.write_text(f'#!/bin/sh\nprintf %s "{HEAD}{line(0.01, 200, 0.1)}"\necho "$@" >> "{tmp_path}/called"\n')
    program.chmod(0o755)
    monkeypatch.setattr(hey.shutil, "which", lambda _: str(program))
    found = hey.load("http://127.0.0.1:9/infer", requests(4), rate=100, seconds=2)
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == 4
    assert all(" -c=1 -q=25.0 " in each and each.startswith("-n=50 ") for each in called)
    assert all(each.endswith("x-session-id: a http://127.0.0.1:9/infer") for each in called)
    assert (found.answered, found.failed) == (4, 196)


@pytest.mark.skipif(shutil.which("hey") is None, reason="the load generator hey is not installed")
def test_the_program_posts_each_body_and_counts_the_answers():
    codes = {3: 429, 5: 500}
    lock = threading.Lock()
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                bodies.append((body, self.headers["x-session-id"], self.headers["Content-Type"]))
                code = codes.get(len(bodies), 200)
                hang_up = len(bodies) == 7
            if hang_up:
                self.close_connection = True  # without an answer
                return
            self.send_response(code)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        found = hey.load(f"http://127.0.0.1:{server.server_port}/infer", requests(), rate=40, seconds=0.5)
        server.shutdown()
        serving.join()
    assert (found.answered, found.refused, found.failed) == (17, 1, 2)
    counted = Counter(body for body, _, _ in bodies)
    assert counted == {each.body: 10 for each in requests()}
    assert {(stream, kind) for _, stream, kind in bodies} == {("a", "application/octet-stream")}
    assert found.duration_s >= 0.4  # ten ticks of 50 ms, of which the first may come at once
    assert 0 < found.p50_ms <= found.p99_ms
