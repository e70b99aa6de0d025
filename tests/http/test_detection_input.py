"""The promise of `test_bad_input.py`, for detectors: a 4xx that says what is wrong, and nothing else has happened."""

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import spots
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payloads import as_binary, as_json, picture, png_that_claims

from adapters import tree

# Pillow warns of what it finds in broken files; here the filter would turn that into an error of ours
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::UserWarning")]

MODEL = "/v2/models/spots"
INFER, PREDICT, FEEDBACK = f"{MODEL}/infer", f"{MODEL}/predict", f"{MODEL}/feedback"
CAM = {"x-session-id": "cam"}
ONE = np.zeros((1, 3, 4, 5), np.uint8)
UNIT = np.zeros((1, 3, 4, 5), np.float32)
RED, GREY = picture(spots.scene()), picture(spots.infrared()[..., 0])
IN_BASE64 = base64.b64encode(GREY).decode()
BOX = [4, 2, 10, 8]

Request = dict[str, Any]


def with_value(value: float) -> Request:
    x = UNIT.copy()
    x[0, 1, 2, 3] = value
    return as_binary(x)


def wire(**changed: Any) -> Request:
    described = {"name": "images", "shape": [1, 3, 4, 5], "datatype": "UINT8", "data": [0] * 60, **changed}
    return {"content": json.dumps({"inputs": [described]}).encode()}


def items(*each: Any, **more: Any) -> Request:
    return {"content": json.dumps({"items": list(each), **more}).encode()}


def item(*boxes: Any, labels: Any = None, **where: Any) -> Any:
    """For the prediction `ir`, which is there, unless told otherwise."""
    return {
        **(where or {"id": "ir"}),
        "boxes": list(boxes),
        "labels": ["red"] * len(boxes) if labels is None else labels,
    }


def pictures(count: int) -> Request:
    return {"files": [("images", ("a.png", RED)) for _ in range(count)]}


def named(header: str, **more: Any) -> Request:
    return {"content": GREY, "headers": {"x-modality": header}, **more}


# what it is, path, keyword arguments for httpx (made when the test runs), status, and what the message must hold
BAD: list[tuple[str, str, Callable[[], Request], int, tuple[str, ...]]] = [
    # tensors
    (
        "two channels",
        INFER,
        lambda: as_binary(ONE[:, :2]),
        400,
        ("[1, 2, 4, 5]", "[n, 3, height, width]", "one channel"),
    ),
    ("four channels", INFER, lambda: as_json(ONE.repeat(2, 1)[:, :4]), 400, ("[1, 4, 4, 5]",)),
    ("channels last", INFER, lambda: as_binary(ONE.transpose(0, 2, 3, 1)), 400, ("[1, 4, 5, 3]",)),
    ("no batch", INFER, lambda: as_binary(ONE[0]), 400, ("[3, 4, 5]", "[n, 3, height, width]")),
    ("five dimensions", INFER, lambda: as_binary(ONE[None]), 400, ("[1, 1, 3, 4, 5]",)),
    ("no rows", INFER, lambda: as_binary(ONE[:0]), 400, ("[0, 3, 4, 5]",)),
    ("no height", INFER, lambda: as_binary(ONE[:, :, :0]), 400, ("[1, 3, 0, 5]",)),
    ("no width", INFER, lambda: as_json(UNIT[..., :0]), 400, ("[1, 3, 4, 0]",)),
    ("NaN", INFER, lambda: with_value(np.nan), 400, ("NaN", "0 … 1")),
    ("infinity", INFER, lambda: with_value(np.inf), 400, ("infinite", "0 … 1")),
    ("255 as a float", INFER, lambda: with_value(255), 400, ("0 … 255", "UINT8")),
    ("a negative float", INFER, lambda: with_value(-0.5), 400, ("-0.5 … 0",)),
    ("256 as a byte", INFER, lambda: wire(data=[256] * 60), 400, ("256", "0 … 255")),
    ("integers", INFER, lambda: as_binary(ONE.astype(np.int64)), 400, ("int64", "UINT8")),
    ("too large", INFER, lambda: as_binary(np.zeros((1, 1, 101, 100), np.uint8)), 413, ("100×101", "10100", "10000")),
    ("too many", INFER, lambda: as_binary(ONE.repeat(9, 0)), 413, ("9 images", "8", "limits.images_per_request")),
    ("another input", INFER, lambda: wire(name="pixels"), 400, ("'pixels'", "'images'")),
    ("an output of classifiers", INFER, lambda: as_json(ONE, outputs=[{"name": "logits"}]), 400, ("'logits'", "boxes")),
    (
        "a frozen output that was not asked for",
        INFER,
        lambda: as_json(ONE, outputs=[{"name": "frozen_boxes"}]),
        400,
        ("'frozen_boxes'", "x-answer adapted", "num_detections"),
    ),
    # pictures
    ("a picture too large", PREDICT, lambda: {"content": png_that_claims(101, 100)}, 413, ("101×100", "10000")),
    ("too many pictures", PREDICT, lambda: pictures(9), 413, ("8", "limits.images_per_request")),
    ("no picture", PREDICT, lambda: {"content": b"hello"}, 400, ("5 bytes", "JPEG, PNG, WEBP")),
    ("nothing", PREDICT, lambda: {"content": b""}, 400, ("0 bytes",)),
    ("a truncated picture", PREDICT, lambda: {"content": RED[:-30]}, 400, ("decoded",)),
    # modalities
    ("an unknown modality", PREDICT, lambda: named("uv"), 400, ("'uv'", "rgb, ir", "recognised")),
    ("a long one", PREDICT, lambda: named("u" * 9000), 400, ("'uuu", "rgb, ir")),
    ("none at all", PREDICT, lambda: named(""), 400, ("''", "rgb, ir")),
    ("in capitals", PREDICT, lambda: named("IR"), 400, ("'IR'", "rgb, ir")),
    ("in the query", PREDICT, lambda: {"content": GREY, "params": {"modality": "uv"}}, 400, ("'uv'", "rgb, ir")),
    ("as a parameter", INFER, lambda: as_json(ONE, parameters={"modality": "uv"}), 400, ("'uv'", "rgb, ir")),
    ("no text", INFER, lambda: as_json(ONE, parameters={"modality": 7}), 400, ("modality is 7", "not text")),
    (
        "two that differ",
        PREDICT,
        lambda: named("ir", params={"modality": "rgb"}),
        400,
        ("x-modality", "'ir'", "'rgb'", "give one"),
    ),
    (
        "two that differ, of a tensor",
        INFER,
        lambda: {**as_json(ONE, parameters={"modality": "rgb"}), "headers": {"x-modality": "ir"}},
        400,
        ("'ir'", "'rgb'", "give one"),
    ),
    (
        "one that differs in feedback",
        FEEDBACK,
        lambda: {**items(item(BOX), modality="rgb"), "headers": {"x-modality": "ir"}},
        400,
        ("'ir'", "'rgb'"),
    ),
    ("unknown in feedback", FEEDBACK, lambda: items(item(BOX), modality="uv"), 400, ("'uv'", "rgb, ir")),
    # boxes
    ("a negative box", FEEDBACK, lambda: items(item([-1, 2, 10, 8])), 400, ("box 0", "[-1.0, 2.0", "16×12")),
    ("a box outside", FEEDBACK, lambda: items(item(BOX, [4, 2, 17, 8])), 400, ("box 1", "17.0", "16×12")),
    ("a box of another image", FEEDBACK, lambda: items(item([400, 200, 500, 300])), 400, ("box 0", "16×12")),
    ("NaN in a box", FEEDBACK, lambda: items(item([4, 2, float("nan"), 8])), 400, ("box 0", "nan", "finite")),
    ("an infinite box", FEEDBACK, lambda: items(item([4, 2, float("inf"), 8])), 400, ("box 0", "inf", "finite")),
    ("1e300", FEEDBACK, lambda: items(item([4, 2, 1e300, 8])), 400, ("box 0", "1e+300")),
    (
        "1e999",
        FEEDBACK,
        lambda: {"content": b'{"items": [{"id": "ir", "boxes": [[0, 0, 1e999, 1]], "labels": [1]}]}'},
        400,
        ("inf",),
    ),
    ("an integer of 400 digits", FEEDBACK, lambda: items(item([4, 2, 10**400, 8])), 400, ()),
    ("an empty box", FEEDBACK, lambda: items(item([4, 2, 4, 8])), 400, ("box 0", "empty", "x1 < x2")),
    ("a box turned over", FEEDBACK, lambda: items(item([10, 8, 4, 2])), 400, ("box 0", "empty")),
    (
        "a box that is empty within the image",
        FEEDBACK,
        lambda: items(item([16.1, 2, 16.4, 8])),
        400,
        ("box 0", "empty"),
    ),
    ("a box of no width to speak of", FEEDBACK, lambda: items(item([4, 2, 4.00001, 8])), 400, ("box 0", "empty")),
    ("three numbers", FEEDBACK, lambda: items(item([4, 2, 10])), 400, ("[4.0, 2.0, 10.0]", "[x1, y1, x2, y2]")),
    ("five numbers", FEEDBACK, lambda: items(item([4, 2, 10, 8, 1])), 400, ("[x1, y1, x2, y2]",)),
    ("no numbers", FEEDBACK, lambda: items(item([])), 400, ("[]", "[x1, y1, x2, y2]")),
    ("text as numbers", FEEDBACK, lambda: items(item(["4", "2", "10", "8"])), 400, ("items.0.boxes.0.0", "'4'")),
    ("truth as numbers", FEEDBACK, lambda: items(item([True, 2, 10, 8])), 400, ("items.0.boxes.0.0", "True")),
    ("no list of boxes", FEEDBACK, lambda: items({"id": "ir", "boxes": 7, "labels": []}), 400, ("items.0.boxes", "7")),
    ("a flat box", FEEDBACK, lambda: items({"id": "ir", "boxes": BOX, "labels": [1]}), 400, ("items.0.boxes.0", "4")),
    ("too many boxes", FEEDBACK, lambda: items(item(*[BOX] * 1001)), 400, ("items.0.boxes", "1000")),
    # labels
    (
        "an unknown label",
        FEEDBACK,
        lambda: items(item(BOX, labels=["pink"])),
        400,
        ("'pink'", "red, green, blue", "1 … 3"),
    ),
    ("the background", FEEDBACK, lambda: items(item(BOX, labels=["__background__"])), 400, ("'__background__'", "red")),
    ("the background's index", FEEDBACK, lambda: items(item(BOX, labels=[0])), 400, ("no class 0", "1 … 3")),
    ("an index too high", FEEDBACK, lambda: items(item(BOX, labels=[4])), 400, ("no class 4", "1 … 3")),
    ("a negative index", FEEDBACK, lambda: items(item(BOX, labels=[-1])), 400, ("no class -1", "1 … 3")),
    ("a huge index", FEEDBACK, lambda: items(item(BOX, labels=[10**300])), 400, ("no class 1000", "1 … 3")),
    ("truth as a label", FEEDBACK, lambda: items(item(BOX, labels=[True])), 400, ("items.0.labels.0", "True")),
    ("a fraction as a label", FEEDBACK, lambda: items(item(BOX, labels=[1.5])), 400, ("items.0.labels.0", "1.5")),
    ("too few labels", FEEDBACK, lambda: items(item(BOX, BOX, labels=["red"])), 400, ("2 boxes and 1 labels",)),
    ("too many labels", FEEDBACK, lambda: items(item(labels=["red"])), 400, ("0 boxes and 1 labels",)),
    ("no labels", FEEDBACK, lambda: items({"id": "ir", "boxes": [BOX]}), 400, ("items.0.labels", "required")),
    # images and predictions
    ("bad base64", FEEDBACK, lambda: items(item(BOX, image="!!!")), 400, ("image is not base64",)),
    ("cut base64", FEEDBACK, lambda: items(item(BOX, image=IN_BASE64[:-1])), 400, ("image is not base64",)),
    ("letters beyond ASCII", FEEDBACK, lambda: items(item(BOX, image="aé==")), 400, ("image is not base64",)),
    ("no image in base64", FEEDBACK, lambda: items(item(BOX, image="aGVsbG8=")), 400, ("5 bytes", "JPEG, PNG, WEBP")),
    ("no bytes in base64", FEEDBACK, lambda: items(item(BOX, image="")), 400, ("0 bytes",)),
    (
        "a huge image in base64",
        FEEDBACK,
        lambda: items(item(BOX, image=base64.b64encode(png_that_claims(9000, 9000)).decode())),
        413,
        ("9000×9000", "10000"),
    ),
    ("neither id nor image", FEEDBACK, lambda: items({"boxes": [BOX], "labels": ["red"]}), 400, ("`id`", "`image`")),
    ("both", FEEDBACK, lambda: items(item(BOX, id="ir", image=IN_BASE64)), 400, ("either", "`id`", "`image`")),
    ("an id that is no text", FEEDBACK, lambda: items(item(BOX, id=7)), 400, ("items.0.id", "7")),
    ("index out of range", FEEDBACK, lambda: items(item(BOX, id="ir", index=1)), 400, ("index is 1", "1 images")),
    ("index negative", FEEDBACK, lambda: items(item(BOX, id="ir", index=-1)), 400, ("items.0.index", "-1")),
    ("index a fraction", FEEDBACK, lambda: items(item(BOX, id="ir", index=0.5)), 400, ("items.0.index", "0.5")),
    ("unknown id", FEEDBACK, lambda: items(item(BOX, id="nobody")), 404, ("'nobody'", "'cam'", "remember_s")),
    ("a long id", FEEDBACK, lambda: items(item(BOX, id="x" * 100_000)), 404, ("'xxx", "'cam'")),
    ("another stream's id", FEEDBACK, lambda: items(item(BOX, id="theirs")), 404, ("'theirs'", "'cam'")),
    (
        "a stream that is not there",
        FEEDBACK,
        lambda: {**items(item(BOX), stream="new"), "headers": None},
        404,
        ("'new'",),
    ),
    ("two streams", FEEDBACK, lambda: items(item(BOX), stream="other"), 400, ("'cam'", "'other'", "give one")),
    ("a bad stream", FEEDBACK, lambda: {**items(item(BOX), stream="a b"), "headers": None}, 400, ("'a b'",)),
    ("an rgb prediction", FEEDBACK, lambda: items(item(BOX, id="rgb")), 400, ("modality is rgb", "ir")),
    (
        "an rgb image",
        FEEDBACK,
        lambda: items(item(BOX, image=base64.b64encode(RED).decode())),
        400,
        ("not translated", "rgb", "ir"),
    ),
    ("named rgb", FEEDBACK, lambda: items(item(BOX, image=IN_BASE64), modality="rgb"), 400, ("rgb", "ir")),
    # the body
    ("no JSON", FEEDBACK, lambda: {"content": b"{"}, 400, ("the body is not JSON", "line 1 column 2")),
    ("no text", FEEDBACK, lambda: {"content": b"\xff\xfe\xfd"}, 400, ("the body is not JSON",)),
    ("no bytes", FEEDBACK, lambda: {"content": b""}, 400, ("the body is not JSON",)),
    ("a list", FEEDBACK, lambda: {"content": b"[]"}, 400, ("the body is no feedback", "[]")),
    ("a picture", FEEDBACK, lambda: {"content": RED}, 400, ("the body is not JSON",)),
    ("deep nesting", FEEDBACK, lambda: {"content": b"[" * 100_000}, 400, ("the body is not JSON",)),
    (
        "deep nesting of boxes",
        FEEDBACK,
        lambda: {"content": b'{"items": ' + b"[" * 900 + b"]" * 900 + b"}"},
        400,
        ("items.0",),
    ),
    ("an integer of 5,000 digits", FEEDBACK, lambda: {"content": b'{"items": ' + b"9" * 5000 + b"}"}, 400, ("JSON",)),
    ("no items", FEEDBACK, lambda: items(), 400, ("items", "at least 1")),
    ("too many items", FEEDBACK, lambda: items(*[item(BOX)] * 9), 413, ("9 images", "8")),
    ("a key too many", FEEDBACK, lambda: items(item(BOX), colour="red"), 400, ("colour",)),
    ("a key too many in an item", FEEDBACK, lambda: items({**item(BOX), "score": 0.5}), 400, ("items.0.score", "0.5")),
    (
        "half a surrogate",
        FEEDBACK,
        lambda: {"content": b'{"items": [{"id": "\\ud800", "boxes": [], "labels": []}]}'},
        404,
        (r"'\ud800'",),
    ),
    ("one bad among good ones", FEEDBACK, lambda: items(item(BOX), item(BOX, id="nobody")), 404, ("'nobody'",)),
]


@pytest.fixture(scope="module")
async def taught(anyio_backend, detecting):
    """A server whose stream `cam` and whose translator have learned something, and where predictions are remembered."""
    async with detecting(limits={"image_pixels": 10_000, "images_per_request": 8}) as server:
        for stream, id, content in (
            ("cam", "first", GREY),
            ("cam", "ir", GREY),
            ("cam", "rgb", RED),
            ("b", "theirs", GREY),
        ):
            headers = {"x-session-id": stream, "x-request-id": id}
            answer = await server.client.post(PREDICT, content=content, headers=headers)
            assert answer.status_code == 200
        answer = await server.client.post(FEEDBACK, **items(item(BOX, id="first")), headers=CAM)
        assert answer.json()["results"][0]["result"] == "applied"
        yield server


def everything(server) -> Any:
    """Whatever a request could change: records, states, shared weights, and what is remembered."""
    engine = server.service.engine
    names = engine.streams.names()
    leaves = [leaf.clone() for name in names for _, leaf in tree.leaves(engine.streams.state(name))]
    shared = [each.state.weights.clone() for each in engine.modalities.values()]
    memories = {key: memory.used for key, memory in server.service._remembered._memories.items()}
    records = {name: engine.streams.record(name) for name in names}
    return records, {name: each.version for name, each in engine.modalities.items()}, memories, leaves + shared


async def good(server) -> list[Any]:
    """What the stream is answered, with nothing to remember."""
    answers = []
    for content in (GREY, RED):
        answer = await server.client.post(PREDICT, content=content, headers={**CAM, "x-adapt": "off"})
        assert answer.status_code == 200
        answers.append([answer.json()["predictions"], answer.json()["parameters"]])
    return answers


@pytest.mark.parametrize(("path", "make", "status", "holds"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
async def test_bad_input(taught, path, make, status, holds):
    before, answers = everything(taught), await good(taught)
    assert before[1] == {"ir": 1}

    request = make()
    headers = request.pop("headers", {})
    headers = {} if headers is None else {**CAM, **headers}  # None: the body names the stream
    answer = await taught.client.post(path, **request, headers=headers)

    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    message = answer.json()["error"]
    assert "Traceback" not in message
    assert len(message) < 2000
    for each in holds:
        assert each in message

    after = everything(taught)
    assert after[:3] == before[:3]
    assert all(map(torch.equal, after[3], before[3]))
    assert await good(taught) == answers


async def test_feedback_to_a_model_that_learns_nothing(detecting):
    async with detecting(adapter={"modtr": {"learns": "nothing"}}) as server:
        await server.client.post(PREDICT, content=GREY, headers={**CAM, "x-request-id": "ir"})
        answer = await server.client.post(FEEDBACK, **items(item(BOX)), headers=CAM)
        assert answer.status_code == 400
        assert "learns from no feedback" in answer.json()["error"]
        assert server.service.engine.modalities["ir"].version == 0


async def test_strips_are_answered(detecting):
    """Resized by their longer side, these have less than a pixel across."""
    async with detecting(source={"python": "spots:build_resizing"}) as server:
        for size in ((1, 2000), (2000, 1), (1, 1)):
            for image in (np.full(size, 255, np.uint8), np.full((*size, 3), (255, 0, 0), np.uint8)):
                answer = await server.client.post(PREDICT, content=picture(image), headers=CAM)
                assert answer.status_code == 200, answer.text


NUMBERS = st.integers(-2, 20) | st.floats() | st.sampled_from([0, 4, 10, 12, 16])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ITEMS = st.fixed_dictionaries(
    {"boxes": st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=2) | JSON},
    optional={
        "labels": st.lists(st.sampled_from(["red", "pink", 1, 9]), max_size=2) | JSON,
        "id": st.sampled_from(["ir", "rgb", "theirs"]) | JSON,
        "index": st.integers(-1, 2) | JSON,
        "image": st.sampled_from([IN_BASE64, "aGVsbG8="]) | st.text(max_size=8) | JSON,
    },
)
BODIES = st.fixed_dictionaries(
    {"items": st.lists(ITEMS, max_size=3) | JSON},
    optional={"stream": st.sampled_from(["cam", "b"]) | JSON, "modality": st.sampled_from(["ir", "rgb"]) | JSON},
)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(body=st.builds(lambda body: json.dumps(body).encode(), BODIES) | st.binary(max_size=64))
async def test_no_feedback_breaks_the_server(taught, body):
    answer: httpx.Response = await taught.client.post(FEEDBACK, content=body, headers={"x-modality": "ir"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert list(answer.json()) == ["error"]
    for modality in taught.service.engine.modalities.values():
        assert bool(modality.state.weights.isfinite().all())


async def test_small_files_that_are_large_pictures(anyio_backend, detecting):
    """Four pictures of a kilobyte, 250,000 pixels each: refused by their headers, all together."""
    async with detecting(limits={"request_pixels": 800_000}) as server:
        blank = picture(np.zeros((500, 500), np.uint8), "PNG")
        files = [("images", (f"{number}.png", blank)) for number in range(4)]
        answer = await server.client.post("/v2/models/spots/predict", files=files)
        assert answer.status_code == 413
        assert "1000000 pixels together; the limit is 800000 (limits.request_pixels)" in answer.json()["error"]
        answer = await server.client.post("/v2/models/spots/predict", files=files[:3])
        assert answer.status_code == 200


async def test_feedback_for_many_more_images_than_may_wait(anyio_backend, detecting):
    async with detecting() as server:
        body = b'{"items": [' + b",".join([b'{"id": "a", "boxes": [], "labels": []}'] * 5000) + b"]}"
        answer = await server.client.post("/v2/models/spots/feedback", content=body)
        assert answer.status_code == 413
        assert "feedback for 5000 images in one request; the limit is 64" in answer.json()["error"]
