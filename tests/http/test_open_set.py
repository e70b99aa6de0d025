"""Images that look like nothing known: scored, kept from teaching, asked about, and known once they have a label."""

from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray
from payloads import as_json, picture, tensor

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/digits"
SETTINGS = {
    "adapter": {"eata": {"anchor": "l2"}, "kv_bottleneck": {"codebooks": 64, "branches": [8, 4]}},
    "adaptation": {"step_rows": 8, "step_wait_s": 0.05, "gate": False},
    "open_set": {"unknown_above": 0.9},
}


@pytest.fixture(scope="module")
def strange(held_out) -> NDArray[np.uint8]:
    """What the model was never shown: digits in negative, [12, 32, 32, 3]."""
    return 255 - held_out[0][60:72]


@pytest.fixture(scope="module")
async def server(anyio_backend, serving, tmp_path_factory):
    async with serving(**SETTINGS, store=tmp_path_factory.mktemp("store") / "digits") as running:
        yield running


async def predict(server: Any, content: bytes, stream: str, **headers: str) -> dict[str, Any]:
    answer = await server.client.post(f"{MODEL}/predict", content=content, headers={"x-session-id": stream, **headers})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def queries(server: Any, stream: str, **parameters: Any) -> list[dict[str, Any]]:
    answer = await server.client.get(f"{MODEL}/queries", params={"stream": stream, **parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()["queries"]


async def test_what_is_known_has_a_low_score_and_the_rest_a_high_one(server, held_out, strange) -> None:
    known = [(await predict(server, picture(x), "scores"))["predictions"][0]["unknown"] for x in held_out[0][:40]]
    other = [(await predict(server, picture(x), "scores"))["predictions"][0]["unknown"] for x in strange]
    assert np.median(known) < 0.8
    assert min(other) > 0.9


async def test_the_strangest_are_asked_about_first(server, held_out, strange) -> None:
    for image in (*strange[:4], *held_out[0][:4]):
        await predict(server, picture(image), "asking")
    asked = await queries(server, "asking")
    assert len(asked) >= 4
    assert [each["unknown"] for each in asked] == sorted((each["unknown"] for each in asked), reverse=True)
    assert {"id", "index", "unknown", "predicted", "age_s"} == set(asked[0])
    assert len(await queries(server, "asking", limit=2)) == 2
    assert await queries(server, "another") == []


async def test_an_answer_ends_the_question_and_makes_its_like_known(server, strange) -> None:
    for image in strange:
        await predict(server, picture(image), "answering")
    asked = await queries(server, "answering", limit=100)
    assert len(asked) == len(strange)
    items = [{"id": each["id"], "index": each["index"], "label": "negative"} for each in asked[:8]]
    told = await server.client.post(f"{MODEL}/feedback", json={"stream": "answering", "items": items})
    assert told.status_code == 200, told.text
    assert len(await queries(server, "answering", limit=100)) == len(strange) - 8
    again = await predict(server, picture(strange[-1]), "answering")
    assert again["predictions"][0]["label"] == "negative"
    assert again["predictions"][0]["unknown"] < 0.5


async def test_the_unknown_teaches_nothing(server, strange) -> None:
    skipped = skipped_rows(server, "unknown")
    for image in strange:
        await predict(server, picture(image), "teaching")
    await until(lambda: skipped_rows(server, "unknown") == skipped + len(strange))  # counted after the answer
    assert server.service.view("teaching").seen == 0
    assert server.service.pending_rows("teaching") == 0


async def test_of_a_mixed_request_the_known_rows_teach(server, held_out, strange) -> None:
    rows = tensor(np.concatenate([held_out[0][:20], strange[:4]]))
    asked = as_json(rows, outputs=[{"name": "unknown"}, {"name": "labels"}])
    answer = await server.client.post(f"{MODEL}/infer", headers={"x-session-id": "mixed"}, **asked)
    assert answer.status_code == 200, answer.text
    scores = next(each for each in answer.json()["outputs"] if each["name"] == "unknown")
    known = sum(score <= 0.9 for score in scores["data"])
    assert scores["shape"] == [24]
    assert min(scores["data"][20:]) > 0.9
    assert 10 < known <= 20
    await until(lambda: server.service.view("mixed").seen > 0)
    assert server.service.view("mixed").seen == known


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not true():
            await anyio.sleep(0)


def skipped_rows(server: Any, reason: str) -> float:
    for line in server.service.metrics_text().splitlines():
        if line.startswith("tta_skipped_rows_total{") and f'reason="{reason}"' in line:
            return float(line.rsplit(" ", 1)[1])
    return 0.0


async def test_without_an_open_set_nothing_is_asked(serving, tmp_path) -> None:
    async with serving(adapter={"kv_bottleneck": {"codebooks": 8}}, store=tmp_path / "digits") as server:
        answer = await server.client.get(f"{MODEL}/queries")
        assert answer.status_code == 400
        assert "open_set" in answer.json()["error"]
        asked = as_json(np.zeros((1, 3, 32, 32), np.uint8), outputs=[{"name": "unknown"}])
        refused = await server.client.post(f"{MODEL}/infer", **asked)
        assert refused.status_code == 400


@pytest.mark.parametrize("limit", ["0", "-1", "many", "1001"])
async def test_a_limit_that_cannot_be(server, limit: str) -> None:
    answer = await server.client.get(f"{MODEL}/queries", params={"limit": limit})
    assert answer.status_code == 400
    assert "limit" in answer.json()["error"]
