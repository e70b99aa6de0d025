"""A server that runs: what it answers through HAProxy, to many at once, and to nonsense."""

import asyncio
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from servers import tta_serve

from tta_serve import models, pipelines
from tta_serve.config import ModelSettings
from tta_serve.engine import Engine, Query

pytestmark = pytest.mark.real

CONNECTIONS = 64
MIB = 2**20


def test_two_servers_run_beside_each_other(live, live_sync, client, tmp_path):
    modes = [client.get(each.model).json()["parameters"]["mode"] for each in (live, live_sync)]
    assert modes == ["async", "sync"]
    said = tta_serve("status", folder=tmp_path).stdout
    assert f"{live.url} " in said
    assert f"{live_sync.url} " in said
    ambiguous = tta_serve("down", folder=tmp_path)
    assert ambiguous.returncode == 2
    assert "several servers run; say which: --port" in ambiguous.stderr


def test_sync_mode_over_http_follows_the_engine(live_sync, client, held_out, infer):
    """Twelve requests of noisy pictures: the same logits as the engine's own, though the state changes with each."""
    settings = ModelSettings.model_validate(
        {"name": "digits", "source": {"builtin": "digits"}, "adaptation": {"mode": "sync"}}
    )
    engine = Engine(
        pipelines.build(settings, models.load(settings), torch.device("cpu")), torch.device("cpu"), streams_max=1
    )
    draw = np.random.default_rng(0)
    for step in range(12):
        chosen = draw.integers(len(held_out[0]), size=32)
        noisy = np.clip(held_out[0][chosen] + draw.normal(0, 60, (32, 32, 32, 3)), 0, 255).astype(np.uint8)
        answer = client.post(f"{live_sync.model}/infer", **infer(noisy, "trajectory", "logits"))
        stored, _, unsynced = answer.headers["x-state-version"].partition("+")
        assert int(stored) + int(unsynced.partition("@")[0] or 0) == step
        served = np.reshape(answer.json()["outputs"][0]["data"], (32, 10))
        query = Query(torch.from_numpy(np.ascontiguousarray(noisy.transpose(0, 3, 1, 2))), "trajectory")
        ((own, lesson),) = engine.predict([query])
        engine.learn([lesson])
        assert served == pytest.approx(own.logits, abs=1e-4)
    assert engine.streams.record("trajectory").steps == 12
    assert client.get(f"{live_sync.model}/streams/trajectory").json()["steps"] >= 11


def test_many_connections_at_once(live, held_out, infer):
    images, labels = held_out

    async def run() -> list[tuple[int, bool]]:
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def ask(connection: int) -> list[tuple[int, bool]]:
                answers = []
                for i in range(connection, connection + 5):
                    request = infer(images[i : i + 1], f"many-{connection % 8}", **{"x-adapt": "off"})
                    answer = await client.post(f"{live.model}/infer", **request)
                    right = answer.is_success and answer.json()["outputs"][0]["data"] == [labels[i]]
                    answers.append((answer.status_code, right))
                return answers

            return [each for part in await asyncio.gather(*map(ask, range(CONNECTIONS))) for each in part]

    assert asyncio.run(run()) == [(200, True)] * (5 * CONNECTIONS)


def test_many_streams_learn_at_once(live, client, held_out, infer):
    def post(stream: str, rows: int) -> httpx.Response:
        return client.post(f"{live.model}/infer", **infer(held_out[0][:rows], stream))

    names = [f"learner-{i}" for i in range(6)]
    for _ in range(3):
        for name in names:
            assert post(name, 16).status_code == 200
    for name in names:
        while (view := client.get(f"{live.model}/streams/{name}").json())["pending_rows"]:
            pass
        assert view["seen"] == 48
        assert view["version"] + view["unsynced"] >= 1


def zeros(count: int) -> Iterator[bytes]:
    block = bytes(MIB)
    for _ in range(count // MIB):
        yield block


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()[:2000]


BAD = [
    ("predict", lambda: {"content": png_that_claims(30_000, 30_000)}, 413, ("900000000", "25000000")),
    ("predict", lambda: {"content": truncated_jpeg()}, 400, ("2000 bytes", "truncated")),
    ("infer", lambda: {"content": zeros(200 * MIB)}, 413, ("33554432", "limits.body_bytes")),
    ("infer", lambda: {"content": b'{"inputs":'}, 400, ("line 1 column 10",)),
    ("infer", lambda: {"content": b"{}", "headers": {"Inference-Header-Content-Length": "900"}}, 400, ("'900'", "2")),
    ("../nope/infer", lambda: {"content": b"{}"}, 404, ("'nope'", "digits")),
]


@pytest.mark.parametrize(("path", "make", "status", "holds"), BAD, ids=[f"{b[2]} {b[3][0]}" for b in BAD])
def test_bad_input(live, client, held_out, infer, path, make, status, holds):
    answer = client.post(f"{live.model}/{path}", **make())
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    for each in holds:
        assert each in answer.json()["error"]
    good = client.post(f"{live.model}/infer", **infer(held_out[0][:1], "good", **{"x-adapt": "off"}))
    assert good.status_code == 200


@pytest.mark.parametrize("path", ["/v2/models/digits/infer", "/v2/models/digits/predict", "/nothing"])
def test_a_declared_gigabyte_is_refused_before_it_is_sent(live, path):
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {2**30}\r\n\r\n"
        connection.sendall(head.encode())
        said = b""
        while b'"}' not in said and (part := connection.recv(65536)):
            said += part
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body) == {
        "error": "the body has 1073741824 bytes; the limit is 33554432 bytes (limits.body_bytes); "
        "send fewer images at once"
    }


def test_headers_that_ray_would_obey_are_passed_over(live, client, held_out, infer):
    for header in ({"x-request-timeout-seconds": "0.0001"}, {"x-request-timeout-seconds": "soon"}):
        answer = client.post(f"{live.model}/infer", **infer(held_out[0][:1], "timeouts", **header))
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/models", "/v2/models/digits", "/v2/models/digits/", "/docs"])
def test_each_path_is_answered_by_whom_it_belongs_to(live, client, path):
    assert client.get(live.url + path).status_code == 200


def test_metrics_name_the_replica(live, client):
    lines = client.get(f"{live.url}/metrics").text.splitlines()
    own = [line for line in lines if line.startswith("tta_images_total{")]
    assert len(own) == 1
    assert 'model="digits"' in own[0]
    assert 'replica="' in own[0]
    assert 'tta_replica_scrape_ok{model="digits"} 1.0' in lines
