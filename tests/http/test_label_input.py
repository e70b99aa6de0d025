"""The promise of `test_bad_input.py`, for labels: a 4xx that says what is wrong, and nothing else has happened."""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payloads import as_binary, picture, png_that_claims

from adapters import tree

# Pillow warns of what it finds in broken files; here the filter would turn that into an error of ours
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::UserWarning")]

MODEL = "/v2/models/digits"
PREDICT, INFER, FEEDBACK, FORGET = (f"{MODEL}/{route}" for route in ("predict", "infer", "feedback", "forget"))
CAM = {"x-session-id": "cam"}
GREY = picture(np.full((32, 32, 3), 128, np.uint8))
IN_BASE64 = base64.b64encode(GREY).decode()
LEARNS = {"adapter": {"kv_bottleneck": {"codebooks": 16, "branches": [4, 4], "classes_max": 2}}}

Request = dict[str, Any]


def body(**content: Any) -> Request:
    return {"content": json.dumps(content).encode()}


def items(*each: Any, **more: Any) -> Request:
    return body(items=list(each), **more)


def item(label: Any = "a", **where: Any) -> dict[str, Any]:
    """For the prediction `p`, which is there and has two images, unless told otherwise."""
    return {**(where or {"id": "p"}), "label": label}


def sent(label: Any = "a", image: str = IN_BASE64, **more: Any) -> dict[str, Any]:
    return {"image": image, "label": label, **more}


def unnamed(request: Request) -> Request:
    return {**request, "headers": None}


# what it is, path, keyword arguments for httpx (made when the test runs), status, and what the message must hold
BAD: list[tuple[str, str, Callable[[], Request], int, tuple[str, ...]]] = [
    # which prediction
    ("an unknown id", FEEDBACK, lambda: items(item(id="nobody")), 404, ("'nobody'", "'cam'", "remember_s", "image")),
    ("an expired id", FEEDBACK, lambda: items(item(id="old")), 404, ("'old'", "'cam'", "remember_s")),
    ("an id of x-adapt: off", FEEDBACK, lambda: items(item(id="off")), 404, ("'off'", "'cam'")),
    ("another stream's id", FEEDBACK, lambda: items(item(id="theirs")), 404, ("'theirs'", "'cam'")),
    ("an empty id", FEEDBACK, lambda: items(item(id="")), 400, ("items.0.id", "at least 1")),
    ("a long id", FEEDBACK, lambda: items(item(id="x" * 513)), 400, ("items.0.id", "512")),
    ("an id that is no text", FEEDBACK, lambda: items(item(id=7)), 400, ("items.0.id", "7")),
    ("an id of null", FEEDBACK, lambda: items({"id": None, "label": "a"}), 400, ("`id`", "`image`")),
    ("half a surrogate as id", FEEDBACK, lambda: items(item(id="\ud800")), 400, (r"'\ud800'",)),
    ("half a surrogate beside a picture", FEEDBACK, lambda: items(sent(id="\ud800")), 400, ("items.0.id",)),
    ("neither id nor image", FEEDBACK, lambda: items({"label": "a"}), 400, ("`id`", "`image`")),
    ("index out of range", FEEDBACK, lambda: items(item(id="p", index=2)), 400, ("index is 2", "'p'", "2 images")),
    ("index negative", FEEDBACK, lambda: items(item(id="p", index=-1)), 400, ("items.0.index", "-1")),
    ("index huge", FEEDBACK, lambda: items(item(id="p", index=10**300)), 400, ("items.0.index",)),
    ("index of an unknown id", FEEDBACK, lambda: items(item(id="nobody", index=2**31 - 1)), 404, ("'nobody'",)),
    ("index a fraction", FEEDBACK, lambda: items(item(id="p", index=0.5)), 400, ("items.0.index", "0.5")),
    ("index true", FEEDBACK, lambda: items(item(id="p", index=True)), 400, ("items.0.index", "True")),
    ("index text", FEEDBACK, lambda: items(item(id="p", index="1")), 400, ("items.0.index", "'1'")),
    ("index NaN", FEEDBACK, lambda: items(item(id="p", index=float("nan"))), 400, ("items.0.index", "nan")),
    ("index beside an image", FEEDBACK, lambda: items(sent(index=1)), 400, ("`index` 1", "`image`")),
    # pictures
    ("no base64", FEEDBACK, lambda: items(sent(image="!!!")), 400, ("image is not base64",)),
    ("cut base64", FEEDBACK, lambda: items(sent(image=IN_BASE64[:-1])), 400, ("image is not base64",)),
    ("letters beyond ASCII", FEEDBACK, lambda: items(sent(image="aé==")), 400, ("image is not base64",)),
    ("a data URL", FEEDBACK, lambda: items(sent(image=f"data:image/png;base64,{IN_BASE64}")), 400, ("not base64",)),
    ("no picture", FEEDBACK, lambda: items(sent(image="aGVsbG8=")), 400, ("5 bytes", "JPEG, PNG, WEBP")),
    ("no bytes", FEEDBACK, lambda: items(sent(image="")), 400, ("0 bytes",)),
    ("an image that is no text", FEEDBACK, lambda: items(sent(image=7)), 400, ("items.0.image", "7")),  # type: ignore[arg-type]
    (
        "half a picture",
        FEEDBACK,
        lambda: items(sent(image=base64.b64encode(GREY[:60]).decode())),
        400,
        ("image", "bytes"),
    ),
    (
        "a huge picture",
        FEEDBACK,
        lambda: items(sent(image=base64.b64encode(png_that_claims(9000, 9000)).decode())),
        413,
        ("9000×9000", "10000"),
    ),
    # labels
    ("no label", FEEDBACK, lambda: items({"id": "p"}), 400, ("items.0.label", "required")),
    ("an empty label", FEEDBACK, lambda: items(item("")), 400, ("''", "cannot name a class")),
    ("a space", FEEDBACK, lambda: items(item(" ")), 400, ("' '", "cannot name a class")),
    ("a space at the end", FEEDBACK, lambda: items(item("a ")), 400, ("'a '", "no space at the ends")),
    ("a long label", FEEDBACK, lambda: items(item("x" * 101)), 400, ("'xxx", "1 to 100")),
    ("a very long label", FEEDBACK, lambda: items(item("x" * 100_000)), 400, ("'xxx", "1 to 100")),
    ("a line in a label", FEEDBACK, lambda: items(item("a\nb")), 400, (r"'a\nb'", "printable")),
    ("NUL in a label", FEEDBACK, lambda: items(item("a\0")), 400, (r"'a\x00'", "printable")),
    ("an escape in a label", FEEDBACK, lambda: items(item("\x1b[31m")), 400, (r"'\x1b[31m'", "printable")),
    ("text turned about", FEEDBACK, lambda: items(item("a\u202eb")), 400, (r"'a\u202eb'", "printable")),
    ("half a surrogate", FEEDBACK, lambda: items(item("\ud800")), 400, (r"'\ud800'", "printable")),
    ("a negative index", FEEDBACK, lambda: items(item(-1)), 400, ("no class -1", "0 … 10")),
    ("an index too high", FEEDBACK, lambda: items(item(11)), 400, ("no class 11", "0 … 10")),
    ("a huge index", FEEDBACK, lambda: items(item(10**400)), 400, ("no class 1000", "0 … 10")),
    ("an index of 4,000 digits", FEEDBACK, lambda: items(item(-(10**4000))), 400, ("no class -1000",)),
    ("truth as a label", FEEDBACK, lambda: items(item(True)), 400, ("items.0.label", "True")),
    ("a fraction as a label", FEEDBACK, lambda: items(item(1.5)), 400, ("items.0.label", "1.5")),
    ("1.0 as a label", FEEDBACK, lambda: items(item(1.0)), 400, ("items.0.label", "1.0")),
    ("NaN as a label", FEEDBACK, lambda: items(item(float("nan"))), 400, ("items.0.label", "nan")),
    ("infinity as a label", FEEDBACK, lambda: {"content": b'{"items": [{"id": "p", "label": 1e999}]}'}, 400, ("inf",)),
    ("null as a label", FEEDBACK, lambda: items(item(None)), 400, ("items.0.label", "None")),
    ("a list as a label", FEEDBACK, lambda: items(item(["a"])), 400, ("items.0.label", "['a']")),
    ("a class beyond the cap", FEEDBACK, lambda: items(item("2nd"), item("3rd", id="p", index=1)), 413, ("'3rd'", "2")),
    (
        "classes beyond the cap, with pictures",
        FEEDBACK,
        lambda: items(sent("2nd"), sent("3rd")),
        413,
        ("'3rd'", "stream 'cam'", "forget a class"),
    ),
    (
        "classes beyond the cap of all",
        FEEDBACK,
        lambda: items(sent("2nd"), sent("3rd"), sent("4th"), scope="shared"),
        413,
        ("'4th'", "namespace ''"),
    ),
    # the request
    ("an unknown scope", FEEDBACK, lambda: items(item(), scope="world"), 400, ("scope", "'world'")),
    ("a scope of null", FEEDBACK, lambda: items(item(), scope=None), 400, ("scope", "None")),
    ("an unknown field", FEEDBACK, lambda: items(item(), colour="red"), 400, ("colour", "'red'")),
    ("an unknown field of an item", FEEDBACK, lambda: items({**item(), "score": 0.5}), 400, ("items.0.score", "0.5")),
    ("boxes", FEEDBACK, lambda: items({**item(), "boxes": [[0, 0, 1, 1]]}), 400, ("items.0.boxes",)),
    ("no items", FEEDBACK, lambda: items(), 400, ("items", "at least 1")),
    ("items left out", FEEDBACK, lambda: body(stream="cam"), 400, ("items", "required")),
    ("items of null", FEEDBACK, lambda: body(items=None), 400, ("items", "None")),
    ("items that are none", FEEDBACK, lambda: body(items={"id": "p"}), 400, ("items", "list")),
    ("an item that is none", FEEDBACK, lambda: items("p"), 400, ("items.0", "'p'")),
    ("too many items", FEEDBACK, lambda: items(*[item()] * 9), 413, ("9 images", "8", "limits.images_per_request")),
    ("far too many", FEEDBACK, lambda: items(*[item()] * 5000), 400, ("items", "4096")),
    ("a good one and a bad one", FEEDBACK, lambda: items(item(), item(id="nobody")), 404, ("'nobody'",)),
    ("a good picture and a bad id", FEEDBACK, lambda: items(sent(), item(id="nobody")), 404, ("'nobody'",)),
    ("a good id and a bad picture", FEEDBACK, lambda: items(item(), sent(image="aGVsbG8=")), 400, ("5 bytes",)),
    ("two streams", FEEDBACK, lambda: items(item(), stream="other"), 400, ("'cam'", "'other'", "give one")),
    ("a bad stream", FEEDBACK, lambda: unnamed(items(item(), stream="a b")), 400, ("'a b'",)),
    ("a stream of no text", FEEDBACK, lambda: unnamed(items(item(), stream=7)), 400, ("stream", "7")),
    ("a stream that is not there", FEEDBACK, lambda: unnamed(items(item(), stream="new")), 404, ("'new'",)),
    (
        "a stream that is not there, and a picture",
        FEEDBACK,
        lambda: unnamed(items(sent(), item(), stream="new")),
        404,
        ("'new'",),
    ),
    (
        "a bad picture of a stream that is not there",
        FEEDBACK,
        lambda: unnamed(items(sent(image="aGVsbG8="), stream="new")),
        400,
        ("5 bytes",),
    ),
    # the body
    ("no JSON", FEEDBACK, lambda: {"content": b"{"}, 400, ("the body is not JSON", "line 1 column 2")),
    ("no text", FEEDBACK, lambda: {"content": b"\xff\xfe\xfd"}, 400, ("the body is not JSON",)),
    ("nothing", FEEDBACK, lambda: {"content": b""}, 400, ("the body is not JSON",)),
    ("a list", FEEDBACK, lambda: {"content": b"[]"}, 400, ("the body is no feedback", "[]")),
    ("NaN alone", FEEDBACK, lambda: {"content": b"NaN"}, 400, ("the body is no feedback", "nan")),
    ("a picture", FEEDBACK, lambda: {"content": GREY}, 400, ("the body is not JSON",)),
    ("deep nesting", FEEDBACK, lambda: {"content": b"[" * 100_000}, 400, ("the body is not JSON",)),
    (
        "deep nesting of a label",
        FEEDBACK,
        lambda: {"content": b'{"items": [{"label": ' + b"[" * 900 + b"]" * 900 + b"}]}"},
        400,
        ("items.0.label",),
    ),
    ("an integer of 5,000 digits", FEEDBACK, lambda: {"content": b'{"items": ' + b"9" * 5000 + b"}"}, 400, ("JSON",)),
    ("too large a body", FEEDBACK, lambda: {"content": b" " * 2_000_000}, 413, ("1000000",)),
    # forgetting
    ("neither ids nor label", FORGET, lambda: body(), 400, ("either `ids`", "`label`")),
    ("both", FORGET, lambda: body(ids=["told"], label="glyph"), 400, ("either `ids`", "`label`")),
    ("no ids", FORGET, lambda: body(ids=[]), 400, ("ids", "at least 1")),
    ("too many ids", FORGET, lambda: body(ids=["told"] * 4097), 400, ("ids", "4096")),
    ("one id", FORGET, lambda: body(ids="told"), 400, ("ids", "list")),
    ("ids that are no text", FORGET, lambda: body(ids=[7]), 400, ("ids.0", "7")),
    ("half a surrogate to forget", FORGET, lambda: body(ids=["\ud800"]), 400, ("cannot be kept",)),
    ("an id that was not told", FORGET, lambda: body(ids=["p"]), 404, ("'cam'", "'p'")),
    ("many of them", FORGET, lambda: body(ids=[str(n) * 50 for n in range(1000)]), 404, ("'cam'", "'000")),
    ("another stream's", FORGET, lambda: unnamed(body(stream="b", ids=["told"])), 404, ("'b'", "'told'")),
    ("a class that was not told", FORGET, lambda: body(label="3"), 404, ("'cam'", "'3'")),
    ("a class that there is not", FORGET, lambda: body(label="x" * 9000), 404, ("'cam'", "'xxx")),
    ("half a surrogate as a class", FORGET, lambda: body(label="\ud800"), 400, ("cannot be kept",)),
    ("a class by index", FORGET, lambda: body(label=10), 400, ("label", "10")),
    ("a stream that has told nothing", FORGET, lambda: unnamed(body(stream="new", label="glyph")), 404, ("'new'",)),
    ("ids everywhere", FORGET, lambda: body(ids=["told"], everywhere=True), 400, ("`everywhere`", "`label`")),
    ("everywhere, by nobody", FORGET, lambda: body(label="glyph", everywhere=True), 403, ("admin routes are closed",)),
    ("everywhere, perhaps", FORGET, lambda: body(label="glyph", everywhere="yes"), 400, ("everywhere", "'yes'")),
    ("an unknown field to forget", FORGET, lambda: body(label="glyph", scope="shared"), 400, ("scope",)),
    ("nothing to forget", FORGET, lambda: {"content": b""}, 400, ("the body is not JSON",)),
    ("deep nesting to forget", FORGET, lambda: {"content": b"[" * 100_000}, 400, ("the body is not JSON",)),
    ("a list to forget", FORGET, lambda: {"content": b"[]"}, 400, ("the body is no request to forget", "[]")),
]


def good_pictures(count: int) -> Request:
    return {"files": [("images", (f"{number}.png", GREY)) for number in range(count)]}


@pytest.fixture(scope="module")
async def taught(anyio_backend, serving, tmp_path_factory):
    """A server whose stream `cam` was told a class, and where predictions are remembered; one is too old."""
    limits = {"image_pixels": 10_000, "images_per_request": 8, "body_bytes": 1_000_000}
    async with serving(**LEARNS, limits=limits, store=tmp_path_factory.mktemp("store")) as server:
        for stream, id, more in (
            ("cam", "old", {}),
            ("cam", "told", {}),
            ("cam", "p", {}),
            ("cam", "off", {"x-adapt": "off"}),
            ("b", "theirs", {}),
        ):
            headers = {"x-session-id": stream, "x-request-id": id, **more}
            assert (await server.client.post(PREDICT, **good_pictures(2), headers=headers)).status_code == 200
        answer = await server.client.post(FEEDBACK, **items(item("glyph", id="told")), headers=CAM)
        assert answer.json()["results"][0]["result"] == "applied"
        memories = server.service._remembered._memories
        next(memory for key, memory in memories.items() if key.id == "old").at_s -= 601
        yield server


def everything(server) -> Any:
    """Whatever a request could change: streams, states, the log, names, and what is remembered."""
    engine = server.service.engine
    heads = engine.heads
    views = {stream: heads.view(stream) for stream in (*engine.streams.names(), "another")}
    digests = {stream: [tree.digest(part.state) for part in view.parts] for stream, view in views.items()}
    records = {name: engine.streams.record(name) for name in engine.streams.names()}
    kept = heads.feedback.entries(), heads.feedback.names(""), heads.feedback.audit()
    remembered = [key for key in server.service._remembered._memories if key.id != "old"]
    return records, digests, {stream: view.added for stream, view in views.items()}, kept, remembered


async def good(server) -> list[Any]:
    """What streams are answered and told of classes, with nothing to remember."""
    answers = []
    for stream in ("cam", "another"):
        body = as_binary(
            np.full((1, 3, 32, 32), 128, np.uint8),
            {"x-session-id": stream, "x-adapt": "off"},
            outputs=[{"name": "logits"}],
        )
        answer = await server.client.post(INFER, **body)
        assert answer.status_code == 200
        metadata = await server.client.get(MODEL, params={"stream": stream})
        answers.append([answer.json()["outputs"], answer.json()["parameters"], metadata.json()])
    return answers


@pytest.mark.parametrize(("path", "make", "status", "holds"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
async def test_bad_input(taught, path, make, status, holds):
    answers, before = await good(taught), everything(taught)
    assert before[2]["cam"] == ("glyph",)

    request = make()
    headers = {} if request.pop("headers", {}) is None else CAM  # None: the body names the stream
    answer = await taught.client.post(path, **request, headers=headers)

    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    message = answer.json()["error"]
    assert "Traceback" not in message
    assert len(message) < 1000
    for each in holds:
        assert each in message

    assert everything(taught) == before
    assert await good(taught) == answers
    assert taught.service._waiting_labels == 0


@pytest.mark.parametrize("label", ["glyph", "other", 3])
async def test_a_repeated_id_changes_nothing(taught, label):
    answers, before = await good(taught), everything(taught)
    for scope in ("stream", "shared"):
        for request in (items(item(label, id="told"), scope=scope), items(sent(label, id="told"), scope=scope)):
            answer = await taught.client.post(FEEDBACK, **request, headers=CAM)
            assert answer.status_code == 200, answer.text
            assert [each["result"] for each in answer.json()["results"]] == ["repeated"]
    assert everything(taught) == before
    assert await good(taught) == answers


async def test_a_model_that_learns_from_no_labels(serving):
    async with serving(adapter="source") as server:
        await server.client.post(PREDICT, content=GREY, headers={**CAM, "x-request-id": "p"})
        for path, request in ((FEEDBACK, items(item())), (FEEDBACK, items(sent())), (FORGET, body(label="a"))):
            answer = await server.client.post(path, **request, headers=CAM)
            assert answer.status_code == 400
            assert answer.json() == {"error": "this model learns from no labels; give it the adapter kv_bottleneck"}
        assert server.service._remembered.images == 0
        assert server.service.engine.streams.names() == ["cam"]


@pytest.mark.parametrize("path", [FEEDBACK, FORGET])
async def test_only_posts(taught, path):
    for method in ("GET", "PUT", "DELETE"):
        answer = await taught.client.request(method, path)
        assert (answer.status_code, list(answer.json())) == (405, ["error"])


async def test_nothing_without_a_token(serving, tmp_path):
    async with serving(**LEARNS, infer_token="reader", store=tmp_path) as server:
        for path, request in ((FEEDBACK, items(sent())), (FORGET, body(label="a")), (FEEDBACK, {"content": b"{"})):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = await server.client.post(path, **request, headers=headers)
                assert answer.status_code == 401
        assert server.service.engine.streams.names() == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ITEMS = st.fixed_dictionaries(
    {"label": st.sampled_from(["glyph", "new", 3, 11, -1]) | st.text(max_size=8) | JSON},
    optional={
        "id": st.sampled_from(["p", "told", "theirs", "old"]) | st.text(max_size=8) | JSON,
        "index": st.integers(-1, 3) | JSON,
        "image": st.sampled_from([IN_BASE64, "aGVsbG8="]) | st.text(max_size=8) | JSON,
    },
)
MORE = {"stream": st.sampled_from(["fuzz", "cam"]) | JSON, "scope": st.sampled_from(["stream", "shared"]) | JSON}
TELL = st.fixed_dictionaries({"items": st.lists(ITEMS, max_size=3) | JSON}, optional=MORE)
TAKE_BACK = st.fixed_dictionaries(
    {},
    optional={
        "ids": st.lists(st.sampled_from(["p", "told"]) | st.text(max_size=4), max_size=3) | JSON,
        "label": st.sampled_from(["glyph", "new", "3"]) | st.text(max_size=8) | JSON,
        "everywhere": st.booleans() | JSON,
        "stream": MORE["stream"],
    },
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(told=TELL, forgotten=TAKE_BACK, garbage=st.none() | st.binary(max_size=64))
async def test_no_label_breaks_the_server(fuzzed, told, forgotten, garbage):
    for path, content in ((FEEDBACK, told), (FORGET, forgotten)):
        sent = json.dumps(content).encode() if garbage is None else garbage
        answer: httpx.Response = await fuzzed.client.post(path, content=sent)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert list(answer.json()) == ["error"]
    heads = fuzzed.service.engine.heads
    view = heads.view("fuzz")
    assert len(view.added) == len([number for number in view.table.classes if number >= 10])
    assert sum(view.table.images) == len(heads.feedback.entries(stream="fuzz", scope="stream")) + len(
        heads.feedback.entries(namespace="", scope="shared")
    )


@pytest.fixture(scope="module")
async def fuzzed(anyio_backend, serving, tmp_path_factory):
    async with serving(**LEARNS, store=tmp_path_factory.mktemp("fuzzed")) as server:
        for stream, id in (("fuzz", "p"), ("fuzz", "told"), ("cam", "p")):
            headers = {"x-session-id": stream, "x-request-id": id}
            assert (await server.client.post(PREDICT, **good_pictures(2), headers=headers)).status_code == 200
        yield server
