"""What every route answers, and the headers that steer a prediction."""

import re
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI
from payloads import as_binary, as_json, odd_exif, picture, tensor
from prometheus_client.parser import text_string_to_metric_families

from tta_serve import __version__
from tta_serve.builtin import digits
from tta_serve.config import Tokens
from tta_serve.front import front_app

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/digits"
LABEL_OUTPUTS = [{"name": "labels"}]


def outputs(answer: dict[str, Any]) -> dict[str, Any]:
    return {output["name"]: output for output in answer["outputs"]}


@pytest.mark.parametrize(
    ("path", "holds"),
    [
        ("/", {"name": "tta-serve", "version": __version__, "models": [MODEL]}),
        ("/v2", {"name": "tta-serve", "version": __version__, "extensions": ["binary_tensor_data"]}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True, "models": {"digits": True}}),
        ("/v2/models", {"models": [{"name": "digits", "url": MODEL}]}),
        (MODEL, {"name": "digits", "versions": ["1"]}),
        (f"{MODEL}/", {"name": "digits", "versions": ["1"]}),
        (f"{MODEL}/versions/1", {"name": "digits", "versions": ["1"]}),
        (f"{MODEL}/ready", {"name": "digits", "ready": True}),
        (f"{MODEL}/versions/1/ready", {"name": "digits", "ready": True}),
    ],
)
async def test_get(server, path, holds):
    answer = await server.client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert holds.items() <= answer.json().items()


async def test_metadata_describes_what_the_model_reads_and_gives(server):
    described = (await server.client.get(MODEL)).json()
    assert described["platform"] == "tta-serve_torch"
    assert described["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert {each["name"]: (each["datatype"], each["shape"]) for each in described["outputs"]} == {
        "labels": ("INT64", [-1]),
        "probabilities": ("FP32", [-1, 10]),
        "logits": ("FP32", [-1, 10]),
        "frozen_labels": ("INT64", [-1]),
        "frozen_probabilities": ("FP32", [-1, 10]),
        "frozen_logits": ("FP32", [-1, 10]),
    }
    assert described["parameters"]["labels"] == list(digits.LABELS)
    assert described["parameters"]["mode"] == "async"
    assert described["parameters"]["images_per_request"] == 256


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/nothing", 404, "/nothing"),
        ("GET", "/v2/models/nope", 404, "'nope'; there are digits"),
        ("POST", "/v2/models/nope/infer", 404, "'nope'; there are digits"),
        ("GET", f"{MODEL}/nothing", 404, f"{MODEL}/nothing"),
        ("GET", f"{MODEL}/versions/2/ready", 404, f"{MODEL}/versions/2/ready"),
        ("GET", f"{MODEL}/infer", 405, "GET"),
        ("POST", f"{MODEL}/streams", 405, "POST"),
    ],
)
async def test_what_is_not_there_is_told(server, method, path, status, says):
    answer = await server.client.request(method, path)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert says in answer.json()["error"]


async def test_infer_json_and_binary_agree(server, held_out):
    x = tensor(held_out[0][:4])
    options = {"x-adapt": "off", "x-session-id": "forms"}
    bodies = [
        as_json(x),
        as_binary(x),
        as_json((x / 255).astype(np.float32)),
        as_binary((x / 255).astype(np.float32)),
        as_binary((x / 255).astype(np.float64)),
    ]
    answers = []
    for body in bodies:
        headers = {**body.pop("headers", {}), **options}
        answer = await server.client.post(f"{MODEL}/infer", **body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model_name"] == "digits"
        assert answer.json()["model_version"] == "1"
        answers.append(outputs(answer.json()))
    assert list(answers[0]) == ["labels", "probabilities"]
    assert answers[0]["labels"]["datatype"] == "INT64"
    assert answers[0]["labels"]["shape"] == [4]
    assert answers[0]["labels"]["data"] == held_out[1][:4].tolist()
    assert answers[0]["probabilities"]["shape"] == [4, 10]
    assert np.reshape(answers[0]["probabilities"]["data"], (4, 10)).sum(axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    for answer in answers[1:]:
        assert answer["labels"] == answers[0]["labels"]
        assert answer["probabilities"]["data"] == pytest.approx(answers[0]["probabilities"]["data"], abs=1e-5)


async def test_half_precision_is_read(server, held_out):
    body = as_binary((tensor(held_out[0][:4]) / 255).astype(np.float16), outputs=LABEL_OUTPUTS)
    answer = await server.client.post(f"{MODEL}/infer", **body)
    assert outputs(answer.json())["labels"]["data"] == held_out[1][:4].tolist()


@pytest.mark.parametrize("everything", [True, False], ids=["binary_data_output", "binary_data"])
async def test_infer_answers_in_binary_where_asked(server, held_out, everything):
    wanted = [{"name": "labels", "parameters": {"binary_data": not everything}}, {"name": "logits"}]
    asked = {"outputs": wanted, **({"parameters": {"binary_data_output": True}} if everything else {})}
    answer = await server.client.post(f"{MODEL}/infer", **as_binary(tensor(held_out[0][:3]), **asked))
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    head = httpx.Response(200, content=answer.content[:length]).json()
    described = outputs(head)
    rest = answer.content[length:]
    assert described["labels"]["parameters"] == {"binary_data_size": 24}
    assert np.frombuffer(rest[:24], "<i8").tolist() == held_out[1][:3].tolist()
    if everything:
        assert described["logits"]["parameters"] == {"binary_data_size": 120}
        assert np.frombuffer(rest[24:], "<f4").reshape(3, 10).argmax(axis=1).tolist() == held_out[1][:3].tolist()
    else:
        assert len(rest) == 24
        assert len(described["logits"]["data"]) == 30


async def test_infer_below_the_version(server, held_out):
    answer = await server.client.post(f"{MODEL}/versions/1/infer", **as_binary(tensor(held_out[0][:1])))
    assert outputs(answer.json())["labels"]["data"] == held_out[1][:1].tolist()


async def test_the_id_is_echoed_and_made_where_there_is_none(server, held_out):
    x = tensor(held_out[0][:1])
    answer = await server.client.post(f"{MODEL}/infer", **as_json(x, id="frame-7"))
    assert answer.json()["id"] == "frame-7"
    made = [(await server.client.post(f"{MODEL}/infer", **as_json(x))).json()["id"] for _ in range(2)]
    assert made[0] != made[1]
    answer = await server.client.post(
        f"{MODEL}/predict", content=picture(held_out[0][0]), headers={"x-request-id": "frame-8"}
    )
    assert answer.json()["id"] == "frame-8"


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
async def test_predict_reads_pictures(server, held_out, form):
    answer = await server.client.post(
        f"{MODEL}/predict", content=picture(held_out[0][0], form), headers={"content-type": f"image/{form.lower()}"}
    )
    assert answer.status_code == 200, answer.text
    (prediction,) = answer.json()["predictions"]
    assert prediction["label"] == str(held_out[1][0])
    assert prediction["index"] == held_out[1][0]
    assert prediction["score"] == prediction["scores"][0]["score"]
    scores = [each["score"] for each in prediction["scores"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("spelt", ["multipart/form-data", "Multipart/Form-Data"])
async def test_predict_reads_multipart_in_order(server, held_out, spelt):
    files = [("images", (f"{i}.png", picture(held_out[0][i]))) for i in range(5)]
    request = server.client.build_request("POST", f"{MODEL}/predict", files=files)
    request.headers["content-type"] = request.headers["content-type"].replace("multipart/form-data", spelt)
    answer = await server.client.send(request)
    assert answer.status_code == 200, answer.text
    assert [each["index"] for each in answer.json()["predictions"]] == held_out[1][:5].tolist()


async def test_predict_turns_a_picture_upright_and_passes_over_odd_exif(server, held_out):
    sideways = np.rot90(held_out[0][0]).copy()
    answer = await server.client.post(f"{MODEL}/predict", content=odd_exif(sideways))
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0]["index"] == held_out[1][0]


async def test_headers_and_parameters_tell_the_state(serving, held_out):
    body = as_binary(tensor(held_out[0][:16]), {"x-session-id": "told"})
    versions = []
    async with serving(adaptation={"mode": "sync"}) as server:
        for _ in range(3):
            answer = await server.client.post(f"{MODEL}/infer", **body)
            assert answer.headers["x-adapted"] == "true"
            version = answer.headers["x-state-version"]
            assert answer.json()["parameters"] == {"stream": "told", "state_version": version, "adapted": True}
            versions.append(int(version))
    assert versions == [0, 1, 2]  # in sync mode every request is a step


async def test_x_adapt_off_teaches_nothing(server, held_out):
    body = as_binary(tensor(held_out[0][:16]), {"x-session-id": "untaught", "x-adapt": "off"})
    versions = [(await server.client.post(f"{MODEL}/infer", **body)).headers["x-state-version"] for _ in range(3)]
    assert versions == ["0", "0", "0"]
    view = (await server.client.get(f"{MODEL}/streams/untaught")).json()
    assert view["seen"] == view["steps"] == view["version"] == 0


async def test_x_answer_chooses_whose_answer(serving, held_out):
    x = tensor(held_out[0][:16])
    async with serving(adaptation={"mode": "sync"}) as server:

        async def ask(answer: str, adapt: str = "off", **more: Any) -> httpx.Response:
            headers = {"x-session-id": "answers", "x-answer": answer, "x-adapt": adapt}
            return await server.client.post(f"{MODEL}/infer", **as_binary(x, headers, **more))

        await ask("adapted", adapt="on")
        both, frozen, adapted = [await ask(answer) for answer in ("both", "frozen", "adapted")]
        refused = await ask("frozen", outputs=LABEL_OUTPUTS)
    assert list(outputs(both.json())) == ["labels", "probabilities", "frozen_labels", "frozen_probabilities"]
    assert list(outputs(frozen.json())) == ["frozen_labels", "frozen_probabilities"]
    assert [each.headers["x-adapted"] for each in (both, frozen, adapted)] == ["true", "false", "true"]
    of_both = outputs(both.json())
    assert of_both["probabilities"] == outputs(adapted.json())["probabilities"]
    assert of_both["frozen_probabilities"] == outputs(frozen.json())["frozen_probabilities"]
    assert of_both["probabilities"]["data"] != of_both["frozen_probabilities"]["data"]
    assert refused.status_code == 400
    assert "'labels' with x-answer frozen; there are frozen_labels" in refused.json()["error"]


async def test_predict_gives_both_answers(server, held_out):
    headers = {"x-answer": "both", "x-adapt": "off"}
    answer = await server.client.post(f"{MODEL}/predict", content=picture(held_out[0][0]), headers=headers)
    assert answer.json()["predictions"][0]["index"] == held_out[1][0]
    assert answer.json()["frozen_predictions"][0]["index"] == held_out[1][0]


@pytest.mark.parametrize(
    ("header", "parameter", "named"),
    [
        (None, None, "default"),
        ("cam-1", None, "cam-1"),
        (None, "cam-2", "cam-2"),
        ("cam-3", "cam-3", "cam-3"),
        ("tenant:a/".strip("/"), None, "tenant:a"),
    ],
)
async def test_a_stream_is_named_by_header_or_parameter(server, held_out, header, parameter, named):
    headers = {"x-adapt": "off", **({"x-session-id": header} if header else {})}
    more = {"parameters": {"stream": parameter}} if parameter else {}
    answer = await server.client.post(f"{MODEL}/infer", **as_binary(tensor(held_out[0][:1]), headers, **more))
    assert answer.json()["parameters"]["stream"] == named
    answer = await server.client.post(
        f"{MODEL}/predict",
        content=picture(held_out[0][0]),
        headers=headers,
        params={"stream": parameter} if parameter else {},
    )
    assert answer.json()["parameters"]["stream"] == named


async def test_a_stream_named_twice_and_differently_is_refused(server, held_out):
    headers = {"x-session-id": "this"}
    body = as_binary(tensor(held_out[0][:1]), headers, parameters={"stream": "that"})
    answers = [
        await server.client.post(f"{MODEL}/infer", **body),
        await server.client.post(f"{MODEL}/predict?stream=that", content=picture(held_out[0][0]), headers=headers),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert "'this'" in answer.json()["error"]
        assert "'that'" in answer.json()["error"]


async def test_async_mode_learns_after_it_has_answered(serving, held_out):
    async with serving(adaptation={"mode": "async", "step_rows": 16, "budget": 1}) as server:
        body = as_binary(tensor(held_out[0][:16]), {"x-session-id": "cam"})
        assert (await server.client.post(f"{MODEL}/infer", **body)).headers["x-state-version"] == "0"
        view: dict[str, Any] = {"pending_rows": 1}
        while view["pending_rows"]:
            view = (await server.client.get(f"{MODEL}/streams/cam")).json()
        assert (view["version"], view["seen"]) == (1, 16)
        assert (await server.client.post(f"{MODEL}/infer", **body)).headers["x-state-version"] == "1"


async def test_source_alone_is_the_frozen_model(serving, held_out):
    async with serving(adapter="source") as server:
        body = as_binary(tensor(held_out[0][:16]), {"x-answer": "both"})
        answer = outputs((await server.client.post(f"{MODEL}/infer", **body)).json())
        assert answer["probabilities"]["data"] == pytest.approx(answer["frozen_probabilities"]["data"], abs=1e-6)


async def test_metrics_count_what_happened(serving, held_out):
    async with serving(adaptation={"mode": "sync"}) as server:
        await server.client.post(f"{MODEL}/infer", **as_binary(tensor(held_out[0][:16]), {"x-session-id": "a"}))
        await server.client.post(
            f"{MODEL}/infer", **as_binary(tensor(held_out[0][:2]), {"x-session-id": "a", "x-adapt": "off"})
        )
        await server.client.post(f"{MODEL}/predict", content=b"no picture")
        answer = await server.client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, tuple(value for name, value in sample.labels.items() if name not in ("model", "replica"))): sample
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    own = [sample for (name, _), sample in samples.items() if name != "tta_replica_scrape_ok"]
    assert {(sample.labels["model"], sample.labels["replica"]) for sample in own} == {("digits", "r1")}
    expected = {
        ("tta_requests_total", ("ok",)): 2,
        ("tta_requests_total", ("invalid",)): 1,
        ("tta_images_total", ()): 18,
        ("tta_learned_rows_total", ()): 16,
        ("tta_skipped_rows_total", ("off",)): 2,
        ("tta_batch_rows_count", ()): 2,
        ("tta_batch_rows_sum", ()): 18,
        ("tta_streams", ()): 1,
        ("tta_waiting_rows", ()): 0,
        ("tta_replica_scrape_ok", ()): 1,
    }
    assert {key: samples[key].value for key in expected} == expected


class Broken:
    async def ready(self) -> bool:
        raise RuntimeError("the replica is gone")

    async def metrics_text(self) -> str:
        raise RuntimeError("the replica is gone")


async def test_a_replica_that_does_not_answer_shows_in_health_and_metrics():
    transport = httpx.ASGITransport(front_app({"digits": Broken()}, Tokens(infer=None, admin=None)))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        ready = await client.get("/v2/health/ready")
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "models": {"digits": False}}
        assert (await client.get("/v2/health/live")).status_code == 200
        assert 'tta_replica_scrape_ok{model="digits"} 0.0' in (await client.get("/metrics")).text


async def test_openapi_describes_every_route(server):
    schema = (await server.client.get("/openapi.json")).json()
    OpenAPI.model_validate(schema)
    listed = {(method.upper(), path) for path, each in schema["paths"].items() for method in each}
    model = "/v2/models/{model}"
    assert listed == {
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/v2"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", "/v2/models"),
        ("GET", model),
        ("GET", f"{model}/ready"),
        ("POST", f"{model}/infer"),
        ("POST", f"{model}/predict"),
        ("POST", f"{model}/feedback"),
        ("POST", f"{model}/forget"),
        ("GET", f"{model}/queries"),
        ("GET", f"{model}/translators"),
        *((method, f"{model}/translators/{{modality}}") for method in ("PUT", "DELETE")),
        ("GET", f"{model}/streams"),
        ("GET", f"{model}/streams/{{stream}}"),
        ("DELETE", f"{model}/streams/{{stream}}"),
        ("GET", f"{model}/streams/{{stream}}/history"),
        *(("POST", f"{model}/streams/{{stream}}/{command}") for command in ("reset", "freeze", "resume", "rollback")),
    }
    operations = [(path, each) for path, methods in schema["paths"].items() for each in methods.values()]
    ids = [operation["operationId"] for _, operation in operations]
    assert len(ids) == len(set(ids))
    for path, operation in operations:
        described = [each["name"] for each in operation.get("parameters", []) if each["in"] == "path"]
        assert sorted(described) == sorted(re.findall(r"{(\w+)}", path))
        assert operation["summary"]
        assert operation["description"]
    for reference in re.findall(r'"\$ref":"#/components/schemas/(\w+)"', httpx.Response(200, json=schema).text):
        assert reference in schema["components"]["schemas"]


async def test_the_documentation_page_needs_no_internet(server):
    page = await server.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:https?:)?//[^\s"'<]+""", page.text)
    linked = [*re.findall(r"""(?:src|href)=["']([^"']+)""", page.text), "/openapi.json"]
    assert len(linked) >= 3  # style, script and the description itself
    for path in linked:
        answer = await server.client.get(path)
        assert answer.status_code == 200, path
        assert len(answer.content) > 100
