"""The promise to people who send nonsense: a 4xx that names the value and the limit, and nothing else has happened."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payloads import as_binary, as_json, odd_exif, picture, png_that_claims, tensor

from adapters import tree

# Pillow warns of what it finds in broken files; here the filter would turn that into an error of ours
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::UserWarning")]

MODEL = "/v2/models/digits"
INFER, PREDICT = f"{MODEL}/infer", f"{MODEL}/predict"
STREAM = "cam"
GIB = 2**30
PAUSE = {"x-session-id": STREAM, "x-adapt": "off"}

ONE = np.zeros((1, 3, 32, 32), np.uint8)
UNIT = np.zeros((1, 3, 32, 32), np.float32)
GREY = np.full((32, 32, 3), 128, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def with_value(value: float) -> np.ndarray[Any, Any]:
    x = UNIT.copy()
    x[0, 1, 2, 3] = value
    return x


async def zeros(count: int) -> AsyncIterator[bytes]:
    """So many bytes, a mebibyte at a time: they never exist all at once."""
    block = bytes(2**20)
    for _ in range(count // len(block)):
        yield block


def pictures(count: int) -> dict[str, Any]:
    return {"files": [("images", ("a.png", picture(GREY[:2, :2]))) for _ in range(count)]}


def lengthy(length: str) -> dict[str, Any]:
    return {"content": b'{"inputs": []}', "headers": {"Inference-Header-Content-Length": length}}


def described(**wire: Any) -> dict[str, Any]:
    wire = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [0] * 3072, **wire}
    return {"content": json.dumps({"inputs": [wire]}).encode()}


# what it is, path, keyword arguments for httpx (made when the test runs), status, and what the message must hold
BAD: list[tuple[str, str, Callable[[], dict[str, Any]], int, tuple[str, ...]]] = [
    ("wrong height", INFER, lambda: as_binary(ONE[:, :, :16]), 400, ("[1, 3, 16, 32]", "[n, 3, 32, 32]")),
    ("one channel", INFER, lambda: as_json(ONE[:, :1]), 400, ("[1, 1, 32, 32]", "[n, 3, 32, 32]")),
    ("no batch", INFER, lambda: as_binary(ONE[0]), 400, ("[3, 32, 32]", "[n, 3, 32, 32]")),
    ("a scalar", INFER, lambda: described(shape=[], data=[7]), 400, ("[]", "[n, 3, 32, 32]")),
    ("no rows", INFER, lambda: as_binary(ONE[:0]), 400, ("[0, 3, 32, 32]", "1 …")),
    ("negative size", INFER, lambda: described(shape=[-1, 3, 32, 32]), 400, ("[-1, 3, 32, 32]", "1 … 2147483647")),
    ("huge size", INFER, lambda: described(shape=[10**30, 0], data=[]), 400, (str(10**30), "1 … 2147483647")),
    ("huge sizes", INFER, lambda: described(shape=[10**4000] * 2, data=[]), 400, (str(10**4000), "2147483647")),
    ("wrong dtype", INFER, lambda: as_binary(ONE.astype(np.int64)), 400, ("int64", "UINT8", "FP32")),
    ("unknown datatype", INFER, lambda: described(datatype="FLOAT32"), 400, ("'FLOAT32'", "'UINT8'", "'FP32'")),
    ("bytes too few", INFER, lambda: as_binary(ONE, wire={"shape": [2, 3, 32, 32]}), 400, ("3072", "6144")),
    ("bytes too many", INFER, lambda: as_binary(ONE, wire={"shape": [1, 3, 16, 32]}), 400, ("3072", "1536")),
    (
        "binary size over the body",
        INFER,
        lambda: as_binary(ONE, wire={"parameters": {"binary_data_size": 3073}}),
        400,
        ("3073", "3072 bytes are left"),
    ),
    (
        "binary size under the body",
        INFER,
        lambda: as_binary(ONE[:, :, :31], wire={"parameters": {"binary_data_size": 2975}, "shape": [2975]}),
        400,
        ("1 bytes", "binary_data_size"),
    ),
    (
        "binary size no number",
        INFER,
        lambda: as_binary(ONE, wire={"parameters": {"binary_data_size": "all"}}),
        400,
        ("'all'", "3072 bytes are left"),
    ),
    ("numbers too few", INFER, lambda: described(data=[0, 1, 2]), 400, ("3 numbers", "3072")),
    ("ragged", INFER, lambda: described(data=[[0, 1], [2]]), 400, ("ragged",)),
    ("text as numbers", INFER, lambda: described(data=["a"] * 3072), 400, ("'images'", "UINT8")),
    ("no data", INFER, lambda: described(data=None), 400, ("'images'", "data", "binary_data_size")),
    ("NaN", INFER, lambda: as_binary(with_value(np.nan)), 400, ("NaN", "0 … 1")),
    ("NaN as JSON", INFER, lambda: as_json(with_value(np.nan)), 400, ("NaN", "0 … 1")),
    ("infinity", INFER, lambda: as_binary(with_value(-np.inf)), 400, ("infinite", "0 … 1")),
    ("255 as a float", INFER, lambda: as_binary(with_value(255)), 400, ("0 … 255", "0 … 1", "UINT8")),
    ("a negative float", INFER, lambda: as_binary(with_value(-0.5)), 400, ("-0.5 … 0", "0 … 1")),
    ("256 as a byte", INFER, lambda: described(data=[256] * 3072), 400, ("256", "0 … 255")),
    ("too many images", INFER, lambda: as_binary(ONE.repeat(257, axis=0)), 413, ("257", "256")),
    ("too many pictures", PREDICT, lambda: pictures(257), 413, ("256", "limits.images_per_request")),
    ("no pictures", PREDICT, lambda: {"content": b"", "headers": {"content-type": "image/png"}}, 400, ("0 bytes",)),
    ("a field that is no file", PREDICT, lambda: {"files": {"images": (None, b"text")}}, 400, ("file",)),
    ("multipart without boundary", PREDICT, lambda: multipart("multipart/form-data"), 400, ("boundary",)),
    ("truncated JPEG", PREDICT, lambda: {"content": picture(NOISE, "JPEG")[:2000]}, 400, ("2000 bytes", "truncated")),
    ("truncated PNG", PREDICT, lambda: {"content": picture(GREY)[:-40]}, 400, ("bytes", "decoded")),
    ("no picture", PREDICT, lambda: {"content": b"hello"}, 400, ("5 bytes", "JPEG, PNG, WEBP")),
    ("a GIF", PREDICT, lambda: {"content": picture(GREY, "GIF")}, 400, ("bytes", "JPEG, PNG, WEBP")),
    (
        "an image of 30,000 × 30,000",
        PREDICT,
        lambda: {"content": png_that_claims(30_000, 30_000)},
        413,
        ("30000×30000", "900000000", "25000000", "limits.image_pixels"),
    ),
    (
        "1 GiB, declared",
        INFER,
        lambda: {"content": zeros(GIB), "headers": {"content-length": str(GIB)}},
        413,
        (str(GIB), "33554432", "limits.body_bytes"),
    ),
    ("1 GiB, chunked", INFER, lambda: {"content": zeros(GIB)}, 413, ("33554432", "limits.body_bytes")),
    ("1 GiB of picture, chunked", PREDICT, lambda: {"content": zeros(GIB)}, 413, ("33554432", "limits.body_bytes")),
    ("a length that is none", INFER, lambda: {"content": b"", "headers": {"content-length": "ten"}}, 400, ("'ten'",)),
    ("a length of 5,000 digits", INFER, lambda: {"content": b"", "headers": {"content-length": "9" * 5000}}, 400, ()),
    ("unknown model", "/v2/models/nope/infer", lambda: as_binary(ONE), 404, ("'nope'", "digits")),
    ("unknown version", f"{MODEL}/versions/2/infer", lambda: as_binary(ONE), 404, ("/versions/2/infer",)),
    ("malformed JSON", INFER, lambda: {"content": b'{"inputs":'}, 400, ("line 1 column 10",)),
    ("JSON that is no object", INFER, lambda: {"content": b"[]"}, 400, ("object", "[]")),
    ("JSON without inputs", INFER, lambda: {"content": b"{}"}, 400, ("inputs",)),
    ("no bytes at all", INFER, lambda: {"content": b""}, 400, ("line 1 column 0",)),
    ("header length over the body", INFER, lambda: lengthy("900"), 400, ("'900'", "14 bytes")),
    ("header length negative", INFER, lambda: lengthy("-1"), 400, ("'-1'", "14 bytes")),
    ("header length within the JSON", INFER, lambda: lengthy("5"), 400, ("line 1 column 5",)),
    ("header length no number", INFER, lambda: lengthy("1e1"), 400, ("'1e1'", "14 bytes")),
    ("header length of 5,000 digits", INFER, lambda: lengthy("9" * 5000), 400, ("'999", "14 bytes")),
    ("unknown input", INFER, lambda: described(name="pixels"), 400, ("'pixels'", "'images'")),
    ("the same input twice", INFER, lambda: twice(), 400, ("'images'",)),
    ("unknown output", INFER, lambda: as_binary(ONE, outputs=[{"name": "boxes"}]), 400, ("'boxes'", "labels")),
    ("bad stream", INFER, lambda: as_binary(ONE, {"x-session-id": "a b"}), 400, ("'a b'", "128")),
    ("long stream", INFER, lambda: as_binary(ONE, {"x-session-id": "a" * 129}), 400, ("a" * 129, "128")),
    ("empty stream", INFER, lambda: as_binary(ONE, {"x-session-id": ""}), 400, ("''", "128")),
    ("stream no text", INFER, lambda: as_binary(ONE, parameters={"stream": 7}), 400, ("7",)),
    ("two streams", INFER, lambda: as_binary(ONE, {}, parameters={"stream": "b"}), 400, ("'cam'", "'b'")),
    ("x-adapt", INFER, lambda: as_binary(ONE, {"x-adapt": "maybe"}), 400, ("'maybe'", "on or off")),
    ("x-answer", INFER, lambda: as_binary(ONE, {"x-answer": "best"}), 400, ("'best'", "adapted, frozen or both")),
]


def multipart(content_type: str) -> dict[str, Any]:
    return {"content": b"--x\r\n", "headers": {"content-type": content_type}}


def twice() -> dict[str, Any]:
    request = json.loads(as_json(ONE)["content"])
    return {"content": json.dumps({"inputs": request["inputs"] * 2}).encode()}


@pytest.fixture(scope="module")
async def taught(anyio_backend, serving, held_out):
    """A server with one stream that has learned, in the mode in which learning is over with the next answer."""
    async with serving(adaptation={"mode": "sync"}) as server:
        body = as_binary(tensor(held_out[0][:32]), {"x-session-id": STREAM})
        assert (await server.client.post(INFER, **body)).status_code == 200
        assert (await good(server, held_out)).status_code == 200
        assert server.service.engine.streams.record(STREAM).steps == 1
        yield server


async def good(server, held_out) -> httpx.Response:
    return await server.client.post(INFER, **as_binary(tensor(held_out[0][:8]), PAUSE))


def leaves(server) -> list[tuple[str, torch.Tensor]]:
    """The stream's state as it is now, whatever becomes of it."""
    return [(name, leaf.clone()) for name, leaf in tree.leaves(server.service.engine.streams.state(STREAM))]


@pytest.mark.parametrize(("path", "make", "status", "holds"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
async def test_bad_input(taught, held_out, path, make, status, holds):
    before, leaves_before = taught.service.engine.streams.record(STREAM), leaves(taught)
    answer_before = (await good(taught, held_out)).json()["outputs"]

    request = make()
    headers = {"x-session-id": STREAM, **request.pop("headers", {})}
    answer = await taught.client.post(path, **request, headers=headers)

    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    message = answer.json()["error"]
    assert isinstance(message, str)
    assert "Traceback" not in message
    for each in holds:
        assert each in message

    answer_after = await good(taught, held_out)
    assert answer_after.status_code == 200
    assert answer_after.json()["outputs"] == answer_before
    assert taught.service.engine.streams.record(STREAM) == before
    for (name, leaf), (_, leaf_before) in zip(leaves(taught), leaves_before, strict=True):
        assert torch.equal(leaf, leaf_before), name
    assert taught.service.engine.streams.names() == [STREAM]


async def test_a_declared_gigabyte_is_refused_before_it_is_read(taught):
    read = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal read
        async for block in zeros(GIB):
            read += len(block)
            yield block

    answer = await taught.client.post(INFER, content=counted(), headers={"content-length": str(GIB)})
    assert answer.status_code == 413
    assert read == 0


async def test_a_body_at_the_limit_is_read(serving, held_out):
    request = as_binary(tensor(held_out[0][:4]))
    size = len(request["content"])
    for limit, status in ((size, 200), (size - 1, 413)):
        async with serving(limits={"body_bytes": limit}) as server:
            assert (await server.client.post(INFER, **request)).status_code == status
            assert (await server.client.get(MODEL)).status_code == 200


async def test_a_strip_is_refused_where_resizing_would_make_it_huge(serving):
    async with serving(limits={"image_pixels": 4096}) as server:
        wide = server.service.spec.__class__(height=32, width=32, resize=32)
        server.service.spec = wide
        answer = await server.client.post(PREDICT, content=picture(np.zeros((1, 500, 3), np.uint8)))
        assert answer.status_code == 413
        assert "1×500" not in answer.json()["error"]
        assert "500×1, 512000 pixels" in answer.json()["error"]
        assert "4096" in answer.json()["error"]
        assert (await server.client.post(PREDICT, content=picture(GREY))).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["images", "labels", "pixels", ""]) | JSON
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES,
        "shape": st.sampled_from([[1, 3, 32, 32], [0, 3, 32, 32], [1]]) | st.lists(st.integers(), max_size=9) | JSON,
        "datatype": st.sampled_from(["UINT8", "FP16", "FP32", "FP64", "INT64", "BOOL"]) | JSON,
        "data": st.just([0] * 3072) | st.lists(st.integers(-1, 300) | st.floats(), max_size=4) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-5, 4000) | JSON}) | JSON,
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(max_size=8) | JSON,
        "inputs": st.lists(TENSORS, max_size=2) | JSON,
        "outputs": st.lists(st.fixed_dictionaries({"name": NAMES, "parameters": JSON}), max_size=3) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"stream": st.text(max_size=8), "binary_data_output": JSON}),
    },
)
BODIES = st.binary(max_size=64) | st.builds(lambda r, tail: json.dumps(r).encode() + tail, REQUESTS, st.binary())
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=12)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Inference-Header-Content-Length": st.integers(-2, 200).map(str) | WORDS,
        "x-session-id": st.sampled_from(["cam", "other"]) | WORDS,
        "x-adapt": st.sampled_from(["on", "off"]) | WORDS,
        "x-answer": st.sampled_from(["adapted", "frozen", "both"]) | WORDS,
        "content-type": st.sampled_from(["application/json", "multipart/form-data; boundary=x"]) | WORDS,
        "authorization": WORDS,
    },
)
FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def encoded(headers: dict[str, str]) -> dict[str, bytes]:
    return {name: value.encode("latin-1") for name, value in headers.items()}


def check_answer(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert list(answer.json()) == ["error"]


@FUZZ
@given(body=BODIES, headers=HEADERS)
async def test_no_request_for_an_inference_breaks_the_server(taught, body, headers):
    check_answer(await taught.client.post(INFER, content=body, headers=encoded(headers)))


PICTURES = [picture(GREY, form) for form in ("PNG", "JPEG", "WEBP")] + [odd_exif(GREY)]


@FUZZ
@given(
    content=st.sampled_from(PICTURES) | st.binary(max_size=64),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    keep=st.integers(0, 1000),
    headers=HEADERS,
)
async def test_no_picture_breaks_the_server(taught, content, changes, keep, headers):
    changed = bytearray(content)
    for place, value in changes:
        if place < len(changed):
            changed[place] = value
    check_answer(await taught.client.post(PREDICT, content=bytes(changed[:keep]), headers=encoded(headers)))
