import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from loadtests import wrk
from loadtests.client import encode
from loadtests.errors import LoadTestError, MissingTool


def requests(count=2):
    return [encode(np.full((1, 3, 2, 2), value, np.uint8), stream="a") for value in range(count)]


def test_script_holds_the_bytes_and_headers():
    text = wrk.script(requests())
    strings = [
        bytes(int(code) for code in re.findall(r"\\(\d{3})", each)) for each in re.findall(r'"((?:\\\d{3})+)"', text)
    ]
    assert [each.body for each in requests()] == strings[:2]
    assert strings[2:] == [part.encode() for pair in requests()[0].headers.items() for part in pair]
    assert "%" not in text.replace("%d", "").replace("turn % #requests", "")


def test_script_refuses_other_headers():
    with pytest.raises(ValueError, match="same headers"):
        wrk.script([*requests(), encode(np.zeros((1, 3, 2, 2), np.uint8), stream="b")])
    with pytest.raises(ValueError, match="one request"):
        wrk.script([])


def test_figures_are_read_from_the_marked_line():
    line = '{"answered": 300, "refused": 2, "failed": 1, "duration_us": 1500000, "p50_us": 1200, "p99_us": 90000}'
    found = wrk.parse(f"Running 1s test\n  junk\n\n{wrk.MARK}{line}\n")
    assert found == (300, 2, 1, 1.5, 1.2, 90.0)
    assert found.rps == 200


def test_no_figures_is_an_error():
    with pytest.raises(LoadTestError, match="no figures:\nunable"):
        wrk.parse("unable to connect")


def test_a_missing_program_names_its_package(monkeypatch):
    monkeypatch.setattr(wrk.shutil, "which", lambda _: None)
    with pytest.raises(MissingTool, match="apt install wrk"):
        wrk.load("http://127.0.0.1:9", requests(), connections=1, seconds=1)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="the load generator wrk is not installed")
def test_the_program_posts_the_bodies_and_counts_the_answers():
    codes = [200, 200, 429, 500]
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append((body, self.headers["x-session-id"]))
            code = codes[len(bodies) - 1] if len(bodies) <= len(codes) else 200
            self.send_response(code)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        found = wrk.load(f"http://127.0.0.1:{server.server_port}/infer", requests(), connections=1, seconds=1)
        server.shutdown()
        serving.join()
    assert (found.refused, found.failed) == (1, 1)
    assert found.answered >= len(bodies) - 3  # the last may be under way at the end
    assert {body for body, _ in bodies} == {each.body for each in requests()}
    assert {stream for _, stream in bodies} == {"a"}
    length = int(requests()[0].headers["Inference-Header-Content-Length"])
    assert json.loads(bodies[0][0][:length])["inputs"][0]["shape"] == [1, 3, 2, 2]
    assert 0 < found.p50_ms <= found.p99_ms
