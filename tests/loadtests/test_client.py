import json

import httpx
import numpy as np
import pytest

from loadtests.client import Client, encode
from loadtests.errors import RequestFailed

IMAGES = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)


def answer(labels=(4, 7), frozen=(4, 1), **more):
    outputs = [
        {"name": name, "shape": [len(data)], "datatype": "INT64", "data": list(data)}
        for name, data in (("labels", labels), ("frozen_labels", frozen))
    ]
    return httpx.Response(200, json={"outputs": outputs, **more}, headers={"x-state-version": "3"})


def client_of(handle):
    return Client("http://test", "cifar", transport=httpx.MockTransport(handle))


def test_body_is_json_then_raw_bytes():
    request = encode(IMAGES, id="a", stream="s", answer="both", adapt=False, outputs=["labels"])
    length = int(request.headers["Inference-Header-Content-Length"])
    assert json.loads(request.body[:length]) == {
        "id": "a",
        "inputs": [
            {"name": "images", "shape": [2, 3, 2, 2], "datatype": "UINT8", "parameters": {"binary_data_size": 24}}
        ],
        "outputs": [{"name": "labels"}],
    }
    assert request.body[length:] == bytes(range(24))
    assert request.headers["x-session-id"] == "s"
    assert request.headers["x-answer"] == "both"
    assert request.headers["x-adapt"] == "off"


def test_channels_last_memory_is_sent_channel_first():
    stored = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1))
    request = encode(stored.transpose(0, 3, 1, 2))
    assert request.body.endswith(bytes(range(24)))
    assert "x-session-id" not in request.headers


def test_infer_returns_both_answers():
    def handle(request):
        assert request.url.path == "/v2/models/cifar/infer"
        return answer(id="r1")

    with client_of(handle) as client:
        labels = client.infer(IMAGES, stream="s", answer="both", id="r1")
    assert labels.answered.tolist() == [4, 7]
    assert labels.frozen.tolist() == [4, 1]
    assert labels.state_version == "3"


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(429, json={"error": "1024 rows wait"}), "429: 1024 rows wait"),
        (httpx.Response(502, text="<html>"), "502: <html>"),
        (httpx.Response(200, text="fine"), "not in the Open Inference Protocol"),
        (answer(labels=(1,), id="r1"), r"labels should be \[2\], and is \[1\]"),
        (answer(id="other"), "request 'other', not 'r1'"),
    ],
)
def test_a_wrong_answer_is_told_in_one_error(response, message):
    with client_of(lambda _: response) as client, pytest.raises(RequestFailed, match=message):
        client.infer(IMAGES, stream="s", id="r1")


def test_a_missing_frozen_answer_is_an_error():
    response = httpx.Response(
        200, json={"outputs": [{"name": "labels", "shape": [2], "datatype": "INT64", "data": [0, 1]}]}
    )
    with client_of(lambda _: response) as client, pytest.raises(RequestFailed, match="frozen_labels should be"):
        client.infer(IMAGES, stream="s", answer="both")


def test_no_connection_is_a_request_failed():
    def refuse(request):
        raise httpx.ConnectError("refused", request=request)

    with client_of(refuse) as client, pytest.raises(RequestFailed, match="http://test/v2/models/cifar/ready: refused"):
        client.ready()


def test_an_unknown_stream_is_none_and_drained():
    with client_of(lambda _: httpx.Response(404, json={"error": "no stream"})) as client:
        assert client.stream("x") is None
        assert client.drain("x")
        assert not client.ready()


def test_drain_waits_for_the_learner():
    pending = [2, 1, 0]
    with client_of(lambda _: httpx.Response(200, json={"pending_rows": pending.pop(0)})) as client:
        assert client.drain("x")
    assert not pending


def test_drain_gives_up():
    with client_of(lambda _: httpx.Response(200, json={"pending_rows": 1})) as client:
        assert not client.drain("x", timeout_s=0)
