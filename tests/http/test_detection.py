"""What clients of a detector rely on, over HTTP."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import spots
from fastapi.openapi.models import OpenAPI
from numpy.typing import NDArray
from payloads import as_binary, as_json, picture

from tta_serve.builtin import scene_detector, scenes

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/spots"
RED, GREY = spots.scene(), spots.infrared()
BOX = [4, 2, 10, 8]
CAM = {"x-session-id": "cam"}


@pytest.fixture(scope="module")
async def server(anyio_backend, detecting):
    async with detecting() as running:
        yield running


@pytest.fixture
async def fresh(anyio_backend, detecting):
    """A server that this test may teach."""
    async with detecting() as running:
        yield running


def tensor(*images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for image in images])


def file(image: NDArray[np.uint8], form: str = "PNG") -> bytes:
    """One channel is a grey picture."""
    return picture(image[..., 0] if image.shape[2] == 1 else image, form)


async def predict(server, *images: NDArray[np.uint8], headers: Mapping[str, str] = CAM, **more: Any) -> Any:
    files = [("images", (f"{number}.png", file(image))) for number, image in enumerate(images)]
    body = {"content": file(images[0])} if len(images) == 1 else {"files": files}
    answer = await server.client.post(f"{MODEL}/predict", headers=headers, **{**body, **more})
    assert answer.status_code == 200, answer.text
    return answer


async def feedback(server, *items: dict[str, Any], headers: Mapping[str, str] = CAM, **more: Any) -> Any:
    content = json.dumps({"items": items, **more}).encode()
    answer = await server.client.post(f"{MODEL}/feedback", content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def outputs(answer: Any) -> dict[str, NDArray[Any]]:
    """Of an inference response, as arrays of their shapes."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    head, rest = json.loads(answer.content[:length]), answer.content[length:]
    kinds = {"FP32": np.float32, "INT64": np.int64}
    found = {}
    for each in head["outputs"]:
        size = each.get("parameters", {}).get("binary_data_size")
        kind = kinds[each["datatype"]]
        if size is None:
            array = np.array(each["data"], kind)
        else:
            array, rest = np.frombuffer(rest[:size], kind), rest[size:]
        found[each["name"]] = array.reshape(each["shape"])
    assert not rest
    return found


# -- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("colour", [0, 1, 2])
async def test_a_picture_in_colour(server, form, colour):
    image = spots.scene((8, 8, 24, 16), colour, (24, 32), 250)  # on the blocks of JPEG
    answer = await predict(server, image, content=file(image, form))
    (found,) = answer.json()["predictions"]
    assert (found["width"], found["height"]) == (32, 24)
    assert found["modality"] == {"name": "rgb", "decided": "recognised", "confidence": 1.0, "translator_version": "0"}
    (detection,) = found["detections"]
    assert (detection["label"], detection["index"]) == (spots.LABELS[1 + colour], 1 + colour)
    np.testing.assert_allclose(detection["box"], [8, 8, 24, 16], atol=1 if form == "JPEG" else 0)
    assert detection["score"] == pytest.approx(250 / 255, abs=0.3 if form == "JPEG" else 1e-4)
    assert answer.headers["x-modality"] == "rgb"


async def test_a_grey_picture_is_translated(server):
    answer = await predict(server, GREY)
    said = answer.json()
    (found,) = said["predictions"]
    assert found["modality"]["name"] == "ir"
    assert found["modality"]["confidence"] == pytest.approx(0.993307, abs=1e-5)
    assert found["detections"][0]["box"] == BOX
    assert found["detections"][0]["score"] < 0.7  # of 200 / 255 as it came
    assert {name: answer.headers[name] for name in ("x-modality", "x-state-version", "x-adapted")} == {
        "x-modality": "ir",
        "x-state-version": "0",
        "x-adapted": "true",
    }
    assert said["model_name"] == "spots"
    assert said["parameters"] == {
        "stream": "cam",
        "state_version": "0",
        "adapted": True,
        "modalities": ["ir"],
        "modality_confidences": [found["modality"]["confidence"]],
        "translator_versions": ["0"],
    }


async def test_several_pictures_of_several_sizes(server):
    wide = spots.scene((20, 1, 30, 5), 2, (7, 40))
    answer = await predict(server, RED, wide, GREY)
    found = answer.json()["predictions"]
    assert [(each["width"], each["height"]) for each in found] == [(16, 12), (40, 7), (16, 12)]
    assert [each["detections"][0]["box"] for each in found] == [BOX, [20, 1, 30, 5], BOX]
    assert [each["detections"][0]["label"] for each in found] == ["red", "blue", "red"]
    assert answer.json()["parameters"]["modalities"] == ["rgb", "rgb", "ir"]
    assert answer.headers["x-modality"] == "mixed"


async def test_nothing_found(server):
    (found,) = (await predict(server, np.zeros((5, 5, 3), np.uint8))).json()["predictions"]
    assert found["detections"] == []


async def test_boxes_are_in_the_pixels_of_the_picture(detecting):
    """The detector looks at 16 rows whatever it is sent."""
    async with detecting(source={"python": "spots:build_resizing"}, names=()) as server:
        single = spots.scene((8, 4, 20, 16), 0, (24, 32))
        for times in (1, 2, 3):
            image = single.repeat(times, axis=0).repeat(times, axis=1)
            (found,) = (await predict(server, image)).json()["predictions"]
            assert (found["width"], found["height"]) == (32 * times, 24 * times)
            # a pixel that it looks at is 1.5 · `times` wide
            np.testing.assert_allclose(
                found["detections"][0]["box"], np.multiply([8, 4, 20, 16], times), atol=1.5 * times
            )


async def test_the_built_in_detector(detecting):
    settings = {"source": "builtin/digit-scenes", "labels": None, "adapter": "source"}
    async with detecting(**settings, names=()) as server:
        scene = scenes.scene(0, 7, True)
        (found,) = (await predict(server, scene.image)).json()["predictions"]
        sure = {each["label"] for each in found["detections"] if each["score"] > 0.5}
        assert sure & {scene_detector.LABELS[label] for label in scene.labels}
        described = (await server.client.get(MODEL)).json()["parameters"]
        assert (described["labels"], described["mode"]) == (list(scene_detector.LABELS), "frozen")


@pytest.mark.parametrize("named", ["header", "query"])
async def test_the_modality_may_be_named(server, named):
    headers = {**CAM, "x-modality": "rgb"} if named == "header" else CAM
    answer = await predict(server, GREY, headers=headers, params={"modality": "rgb"} if named == "query" else {})
    (found,) = answer.json()["predictions"]
    assert (found["modality"]["name"], found["modality"]["decided"]) == ("rgb", "named")
    assert found["detections"][0]["score"] == pytest.approx(200 / 255, abs=1e-5)


async def test_both_answers(server):
    both = (await predict(server, GREY, RED, headers={**CAM, "x-answer": "both"})).json()
    adapted = (await predict(server, GREY, RED)).json()["predictions"]
    frozen = (await predict(server, GREY, RED, headers={**CAM, "x-answer": "frozen"})).json()
    assert both["predictions"] == adapted
    assert both["frozen_predictions"] == frozen["frozen_predictions"]
    assert "predictions" not in frozen
    assert frozen["parameters"]["adapted"] is False
    assert both["frozen_predictions"][0]["detections"][0]["score"] == pytest.approx(200 / 255, abs=1e-5)
    assert both["frozen_predictions"][1] == both["predictions"][1]


# -- infer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [as_json, as_binary])
@pytest.mark.parametrize("binary", [False, True])
async def test_tensors(server, make, binary):
    dark = np.zeros((12, 16, 3), np.uint8)
    request = make(tensor(RED, dark, spots.scene(colour=2)), parameters={"binary_data_output": binary, "stream": "cam"})
    answer = await server.client.post(f"{MODEL}/infer", **request)
    found = outputs(answer)
    assert list(found) == ["boxes", "labels", "scores", "num_detections"]
    assert found["num_detections"].tolist() == [1, 0, 1]
    assert found["boxes"].tolist() == [[BOX], [[0, 0, 0, 0]], [BOX]]
    assert found["labels"].tolist() == [[1], [-1], [3]]  # where there is nothing, no class
    np.testing.assert_allclose(found["scores"], [[200 / 255], [0], [200 / 255]], rtol=1e-6)
    assert answer.headers["x-modality"] == "mixed"  # what is dark is grey
    assert ("inference-header-content-length" in answer.headers) == binary


async def test_floats_are_the_same(server):
    bytes_ = await server.client.post(f"{MODEL}/infer", **as_binary(tensor(GREY)))
    floats = await server.client.post(f"{MODEL}/infer", **as_binary((tensor(GREY) / 255).astype(np.float32)))
    for name, array in outputs(bytes_).items():
        np.testing.assert_allclose(outputs(floats)[name], array, rtol=1e-5)


async def test_no_image_with_anything_in_it(server):
    found = outputs(await server.client.post(f"{MODEL}/infer", **as_json(np.zeros((2, 1, 5, 5), np.uint8))))
    assert {name: array.shape for name, array in found.items()} == {
        "boxes": (2, 0, 4),
        "labels": (2, 0),
        "scores": (2, 0),
        "num_detections": (2,),
    }


async def test_outputs_are_those_asked_for(server):
    request = as_json(tensor(GREY), outputs=[{"name": "frozen_scores"}, {"name": "num_detections"}])
    answer = await server.client.post(f"{MODEL}/infer", **request, headers={**CAM, "x-answer": "both"})
    assert list(outputs(answer)) == ["frozen_scores", "num_detections"]
    every = await server.client.post(f"{MODEL}/infer", **as_json(tensor(GREY)), headers={**CAM, "x-answer": "both"})
    names = ["boxes", "labels", "scores", "num_detections"]
    assert list(outputs(every)) == [*names, *(f"frozen_{name}" for name in names)]
    frozen = await server.client.post(f"{MODEL}/infer", **as_json(tensor(GREY)), headers={**CAM, "x-answer": "frozen"})
    assert list(outputs(frozen)) == [f"frozen_{name}" for name in names]
    assert frozen.headers["x-adapted"] == "false"


async def test_the_versioned_path_is_the_same(server):
    request = as_json(tensor(RED), id="seven", parameters={"modality": "ir"})
    answers = [(await server.client.post(f"{MODEL}{path}/infer", **request)).json() for path in ("", "/versions/1")]
    assert answers[0] == answers[1]
    assert answers[0]["id"] == "seven"
    assert answers[0]["parameters"]["modalities"] == ["ir"]


async def test_metadata(server):
    described = (await server.client.get(MODEL)).json()
    assert (described["name"], described["versions"]) == ("spots", ["1"])
    assert described["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, -1, -1, -1]}]
    listed = {each["name"]: (each["datatype"], each["shape"]) for each in described["outputs"]}
    assert listed == {
        prefix + name: each
        for prefix in ("", "frozen_")
        for name, each in {
            "boxes": ("FP32", [-1, -1, 4]),
            "labels": ("INT64", [-1, -1]),
            "scores": ("FP32", [-1, -1]),
            "num_detections": ("INT64", [-1]),
        }.items()
    }
    parameters = described["parameters"]
    assert (parameters["task"], parameters["mode"], parameters["modalities"]) == ("detection", "async", ["rgb", "ir"])
    assert parameters["labels"] == list(spots.LABELS)
    assert (await server.client.get(f"{MODEL}/ready")).json() == {"name": "spots", "ready": True}


# -- feedback ---------------------------------------------------------------------------------------------------------


async def test_feedback_by_the_predictions_id(fresh):
    first = (await predict(fresh, GREY)).json()
    answer = await feedback(fresh, {"id": first["id"], "boxes": [BOX], "labels": ["red"]})
    said = answer.json()
    (result,) = said["results"]
    loss = result["modality"].pop("loss")
    assert 0 < loss < 1
    assert result == {
        "result": "applied",
        "modality": {"applied": True, "trips": []},
        "stream": {"result": "applied", "trips": []},
    }
    assert said["parameters"] == {"stream": "cam", "state_version": "1"}
    assert answer.headers["x-state-version"] == "1"
    second = (await predict(fresh, GREY)).json()
    assert second["parameters"]["state_version"] == "1"
    assert second["parameters"]["translator_versions"] == ["1"]
    score = [each["predictions"][0]["detections"][0]["score"] for each in (first, second)]
    assert score[1] > score[0]
    again = (await feedback(fresh, {"id": first["id"], "boxes": [], "labels": []})).json()
    assert again["results"] == [{"result": "repeated"}]
    assert again["parameters"]["state_version"] == "1"


async def test_feedback_by_an_id_of_ones_own(fresh):
    await predict(fresh, GREY, headers={**CAM, "x-request-id": "frame-7"})
    request = as_json(tensor(GREY, GREY), id="frame-8")
    await fresh.client.post(f"{MODEL}/infer", **request, headers=CAM)
    items = [{"id": "frame-7", "boxes": [BOX], "labels": [1]}, {"id": "frame-8", "index": 1, "boxes": [], "labels": []}]
    said = (await feedback(fresh, *items)).json()
    assert [each["result"] for each in said["results"]] == ["applied", "applied"]
    assert said["parameters"]["state_version"] == "2"


@pytest.mark.parametrize("named", ["recognised", "header", "body"])
async def test_feedback_with_the_image(fresh, named):
    await predict(fresh, RED)
    image = GREY if named == "recognised" else RED
    item = {"image": base64.b64encode(file(image)).decode(), "boxes": [BOX, [0, 0, 2, 2]], "labels": ["red", 3]}
    headers = {**CAM, "x-modality": "ir"} if named == "header" else CAM
    said = (await feedback(fresh, item, headers=headers, **({"modality": "ir"} if named == "body" else {}))).json()
    assert said["results"][0]["result"] == "applied"
    assert fresh.service.engine.modalities["ir"].version == 1


async def test_feedback_leaves_colour_alone(fresh):
    before = (await predict(fresh, RED)).json()
    for _ in range(3):
        id = (await predict(fresh, GREY)).json()["id"]
        await feedback(fresh, {"id": id, "boxes": [], "labels": []})
    after = (await predict(fresh, RED)).json()
    assert after["predictions"] == before["predictions"]


async def test_feedback_for_a_frozen_stream(detecting):
    async with detecting(admin_token="boss") as server:
        await predict(server, GREY)
        await server.client.post(f"{MODEL}/streams/cam/freeze", headers={"authorization": "Bearer boss"})
        id = (await predict(server, GREY)).json()["id"]
        said = (await feedback(server, {"id": id, "boxes": [BOX], "labels": ["red"]})).json()
        assert said["results"] == [{"result": "frozen", "stream": {"result": "frozen", "trips": []}}]
        assert server.service.engine.modalities["ir"].version == 0


async def test_a_loss_that_is_no_number_is_refused(fresh):
    id = (await predict(fresh, GREY)).json()["id"]
    fresh.service.engine.detector.model.factor.fill_(float("nan"))
    said = (await feedback(fresh, {"id": id, "boxes": [BOX], "labels": ["red"]})).json()
    assert said["results"][0]["result"] == "refused"
    assert said["results"][0]["modality"] == {"applied": False, "loss": None, "trips": ["non_finite"]}
    text = (await fresh.client.get("/metrics")).text
    assert 'tta_guard_trips_total{guard="non_finite",model="spots",replica="r1"} 2.0' in text


async def test_a_translator_that_learns_no_more_says_so(detecting):
    """Not `repeated`, which the feedback is not."""
    async with detecting(adapter={"modtr": {"learns": "modality"}}) as server:
        known = server.service.engine.modalities
        server.service.engine._modalities.present = {"ir": known["ir"]._replace(frozen=True)}
        id = (await predict(server, GREY)).json()["id"]
        said = (await feedback(server, {"id": id, "boxes": [BOX], "labels": ["red"]})).json()
        assert said["results"][0]["result"] == "frozen"


async def test_translators_are_listed(fresh):
    id = (await predict(fresh, GREY)).json()["id"]
    await feedback(fresh, {"id": id, "boxes": [BOX], "labels": ["red"]})
    (listed,) = (await fresh.client.get(f"{MODEL}/translators")).json()["translators"]
    assert {name: listed[name] for name in ("modality", "version", "steps", "frozen", "recognised", "in_channels")} == {
        "modality": "ir",
        "version": 1,
        "steps": 1,
        "frozen": False,
        "recognised": True,
        "in_channels": 1,
    }
    assert listed["detector"] == spots.translator_file().detector


async def test_images_are_counted_by_modality(fresh):
    await predict(fresh, GREY, RED, GREY)
    text = (await fresh.client.get("/metrics")).text
    assert 'tta_modality_images_total{modality="ir",model="spots",replica="r1"} 2.0' in text
    assert 'tta_modality_images_total{modality="rgb",model="spots",replica="r1"} 1.0' in text
    assert 'tta_requests_total{model="spots",outcome="ok",replica="r1"} 1.0' in text


# -- who may do what --------------------------------------------------------------------------------------------------


async def test_tokens(detecting):
    async with detecting(infer_token="reader", admin_token="boss") as server:
        item = {"items": [{"id": "p", "boxes": [BOX], "labels": ["red"]}]}
        for token, status in ((None, 401), ("wrong", 401), ("reader", 200), ("boss", 200)):
            headers = {**CAM, **({"authorization": f"Bearer {token}"} if token else {}), "x-request-id": "p"}
            answers = [
                await server.client.post(f"{MODEL}/predict", content=file(GREY), headers=headers),
                await server.client.post(f"{MODEL}/infer", **as_json(tensor(GREY)), headers=headers),
                await server.client.post(f"{MODEL}/feedback", json=item, headers=headers),
                await server.client.get(f"{MODEL}/translators", headers=headers),
            ]
            assert [answer.status_code for answer in answers] == [status] * 4, token
        assert server.service.engine.streams.names() == ["cam"]


async def test_a_tenants_feedback_reaches_its_streams_alone(detecting):
    tenants = {"acme": "token-of-acme", "globex": "token-of-globex"}
    acme, globex = ({**CAM, "authorization": f"Bearer {token}"} for token in tenants.values())
    modtr = {"learns": "stream", "stream_learning_rate": 0.01}
    async with detecting(tenants=tenants, infer_token="reader", adapter={"modtr": modtr}) as server:
        first = [(await predict(server, GREY, headers={**who, "x-request-id": "p"})).json() for who in (acme, globex)]
        assert server.service.engine.streams.names() == ["acme:cam", "globex:cam"]
        for number in range(3):
            id = "p" if not number else (await predict(server, GREY, headers=acme)).json()["id"]
            said = (await feedback(server, {"id": id, "boxes": [], "labels": []}, headers=acme)).json()
            assert said["parameters"] == {"stream": "cam", "state_version": str(number + 1)}
        last = [(await predict(server, GREY, headers=who)).json() for who in (acme, globex)]
        assert last[1]["predictions"] == first[1]["predictions"]
        assert last[0]["predictions"] != first[0]["predictions"]
        # the other's prediction is not theirs to speak of, whatever they call its stream
        for stream in ("cam", "globex:cam", "acme:cam"):
            content = json.dumps({"stream": stream, "items": [{"id": last[1]["id"], "boxes": [], "labels": []}]})
            headers = {"authorization": acme["authorization"]}
            answer = await server.client.post(f"{MODEL}/feedback", content=content, headers=headers)
            assert answer.status_code == 404, answer.text
        reader = {"authorization": "Bearer reader", "x-session-id": "globex:cam"}
        content = json.dumps({"items": [{"id": last[1]["id"], "boxes": [], "labels": []}]})
        assert (await server.client.post(f"{MODEL}/feedback", content=content, headers=reader)).status_code == 401
        assert server.service.engine.streams.record("globex:cam").version == 0


# -- described --------------------------------------------------------------------------------------------------------


async def test_openapi_describes_what_detectors_add(server):
    schema = (await server.client.get("/openapi.json")).json()
    OpenAPI.model_validate(schema)
    paths = schema["paths"]
    post = paths["/v2/models/{model}/feedback"]["post"]
    body = post["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["items"]["items"] == {"$ref": "#/components/schemas/FeedbackItem"}
    item = schema["components"]["schemas"]["FeedbackItem"]["properties"]
    assert set(item) == {"id", "index", "image", "boxes", "labels"}
    assert {"200", "400", "401", "404", "429"} <= set(post["responses"])
    assert {"get", "put", "delete"} >= set(paths["/v2/models/{model}/translators"]) >= {"get"}
    for path in ("infer", "predict", "feedback"):
        headers = {each["name"] for each in paths[f"/v2/models/{{model}}/{path}"]["post"]["parameters"]}
        assert {"x-modality", "x-session-id", "model"} <= headers, path
