"""The protocol against a server that reads the right label from an image's first pixel, and errs as it is told."""

import io
import json

import httpx
import numpy as np
import pytest
from rich.console import Console

from loadtests import shift
from loadtests.client import Client
from loadtests.errors import MissingFile, RequestFailed
from loadtests.shift import Errors


class FakeServer:
    """The frozen model errs on the first `frozen` images of a request, the adapting one on the first `adapting`."""

    def __init__(self, frozen=2, adapting=1):
        self.wrong = {"labels": adapting, "frozen_labels": frozen}
        self.played = []  # stream and rows of each request
        self.stream_calls = 0

    def __call__(self, request):
        if request.method == "GET":
            self.stream_calls += 1
            return httpx.Response(200, json={"version": 3, "steps": 3, "seen": 12, "selected": 5, "pending_rows": 0})
        length = int(request.headers["inference-header-content-length"])
        header = json.loads(request.content[:length])
        shape = header["inputs"][0]["shape"]
        images = np.frombuffer(request.content[length:], np.uint8).reshape(shape)
        self.played.append((request.headers["x-session-id"], len(images)))
        outputs = []
        for output in header["outputs"]:
            labels = images[:, 0, 0, 0].astype(int)
            labels[: self.wrong[output["name"]]] += 1
            told = {"name": output["name"], "shape": [len(images)], "datatype": "INT64", "data": labels.tolist()}
            outputs.append(told)
        return httpx.Response(200, json={"id": header.get("id", "made-up"), "outputs": outputs})


def shifts(*names, images=8):
    labels = np.arange(images) % 10
    pixels = np.zeros((images, 3, 2, 2), np.uint8)
    pixels[:, 0, 0, 0] = labels
    return [(name, pixels, labels) for name in names]


def play(server, *args, **kwargs):
    with Client("http://test", "cifar", transport=httpx.MockTransport(server)) as client:
        return shift.play(client, *args, **kwargs)


def test_continual_is_one_stream_in_order():
    server, told = FakeServer(), []
    errors = play(
        server,
        shifts("fog", "snow", "clean"),
        shift.streams("continual"),
        batch=4,
        told=lambda name, each: told.append((name, each)),
    )
    assert errors == {name: Errors(50.0, 25.0) for name in ("fog", "snow", "clean")}
    assert told == list(errors.items())
    assert [rows for _, rows in server.played] == [4] * 6
    assert len({stream for stream, _ in server.played}) == 1


def test_per_shift_has_a_stream_for_each():
    server = FakeServer()
    play(server, shifts("fog", "snow"), shift.streams("per_shift"), batch=4)
    streams = [stream for stream, _ in server.played]
    assert streams[0] == streams[1] != streams[2] == streams[3]


def test_streams_are_fresh_in_each_run():
    assert shift.streams("continual")("fog") != shift.streams("continual")("fog")


def test_a_last_smaller_batch_counts_by_its_images():
    server = FakeServer(frozen=1, adapting=0)
    errors = play(server, shifts("fog", images=10), shift.streams("continual"), batch=8)
    assert [rows for _, rows in server.played] == [8, 2]
    assert errors["fog"] == Errors(20.0, 0.0)


def test_drain_asks_after_each_request():
    server = FakeServer()
    play(server, shifts("fog"), shift.streams("continual"), batch=4, drain=True)
    assert server.stream_calls == 2


def test_counters_are_read_after_an_answer_that_teaches_nothing():
    server, calls = FakeServer(), []

    def handle(request):
        calls.append((request.method, request.headers.get("x-adapt")))
        return server(request)

    with Client("http://test", "cifar", transport=httpx.MockTransport(handle)) as client:
        told = shift.settled(client, "s", np.zeros((1, 3, 2, 2), np.uint8))
    assert calls == [("POST", "off"), ("GET", None), ("GET", None)]
    assert told["steps"] == 3


def test_a_failed_request_ends_the_run():
    def refuse(_request):
        return httpx.Response(503, json={"error": "starting"})

    with pytest.raises(RequestFailed, match="503: starting"):
        play(refuse, shifts("fog"), shift.streams("continual"))


ERRORS = {"fog": Errors(40.0, 20.0), "snow": Errors(30.0, 10.0), "clean": Errors(12.0, 13.0)}


def test_figures_leave_clean_out_of_the_mean():
    assert shift.figures(ERRORS, "continual", {"steps": 3, "seen": 12, "version": "3"}) == {
        "error/continual/default": 15.0,
        "error/continual/frozen": 35.0,
        "error/continual/default/fog": 20.0,
        "error/continual/frozen/fog": 40.0,
        "error/continual/default/snow": 10.0,
        "error/continual/frozen/snow": 30.0,
        "error/continual/default/clean": 13.0,
        "error/continual/frozen/clean": 12.0,
        "steps/continual/default": 3,
        "seen/continual/default": 12,
    }


def printed(table):
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue()


def test_table_has_the_reference_beside_ours():
    text = printed(shift.table(ERRORS, "continual"))
    for cell in ("fog", "mean of 2", "35.00", "-20.00", "41.13", "23.71", "clean, afterwards", "13.15"):
        assert cell in text


def test_table_of_another_batch_size_has_none():
    text = printed(shift.table(ERRORS, "per_shift", reference=False))
    assert "reference" not in text
    assert "41.13" not in text


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "shift.png"
    shift.plot(file, ERRORS, "continual")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_files_are_read_in_the_recorded_order(tmp_path):
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    for name in ("fog", "snow"):
        np.savez(tmp_path / f"{name}.npz", images=images)
    np.savez(tmp_path / "clean.npz", images=images, labels=np.array([3, 5], dtype=np.uint8))
    np.savez(tmp_path / "orders.npz", corruptions=np.array(["snow", "fog"]))
    loaded = list(shift.load(tmp_path))
    assert [name for name, _, _ in loaded] == ["snow", "fog", "clean"]
    assert loaded[0][1].shape == (2, 3, 32, 32)
    assert loaded[0][1][1, 2, 4, 5] == images[1, 4, 5, 2]
    assert loaded[0][2].tolist() == [3, 5]
    (tmp_path / "fog.npz").unlink()
    with pytest.raises(MissingFile, match=r"fog\.npz does not exist"):
        list(shift.load(tmp_path))
