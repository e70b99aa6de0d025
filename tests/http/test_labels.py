"""Labels by the documents: told, in effect, kept, shared or not, and forgotten with a receipt."""

import base64
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from payloads import as_binary, picture, tensor
from prometheus_client.parser import text_string_to_metric_families

from adapters import tree

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/digits"
PREDICT, INFER, FEEDBACK, FORGET = (f"{MODEL}/{route}" for route in ("predict", "infer", "feedback", "forget"))
OWN = [str(digit) for digit in range(10)]
BOSS = {"authorization": "Bearer boss"}
LEARNS = {"adapter": {"kv_bottleneck": {"codebooks": 64, "branches": [8, 4], "classes_max": 3}}}
Telling = Callable[..., Any]


@pytest.fixture(scope="module")
def telling(serving, tmp_path_factory) -> Telling:
    """`async with telling(store, …) as server`: one that learns from labels; the admin token is `boss`."""
    keys = tmp_path_factory.mktemp("keys")  # made once, by the first

    @asynccontextmanager
    async def make(store: Path, **more: Any) -> AsyncIterator[Any]:
        folder = store / "digits"
        folder.mkdir(exist_ok=True)
        for file in keys.iterdir():
            shutil.copy(file, folder)
        async with serving(**{**LEARNS, "admin_token": "boss", "store": store, **more}) as server:
            for file in folder.glob("*.safetensors"):
                shutil.copy(file, keys)
            yield server

    return make


@pytest.fixture(scope="module")
async def shared(anyio_backend, telling, tmp_path_factory):
    """One server for a whole module; every test has streams of its own."""
    async with telling(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def glyphs(held_out) -> list[bytes]:
    """Pictures of what the model does not know: digits in negative, each another."""
    return [picture(255 - image) for image in held_out[0][:40]]


@pytest.fixture(scope="module")
def digits(held_out) -> list[bytes]:
    return [picture(image) for image in held_out[0][40:60]]


async def predict(server, content: bytes, stream: str, **headers: str) -> dict[str, Any]:
    named = {"x-session-id": stream, **{name.replace("_", "-"): value for name, value in headers.items()}}
    answer = await server.client.post(PREDICT, content=content, headers=named)
    assert answer.status_code == 200, answer.text
    return {**answer.json(), "headers": answer.headers}


async def tell(server, stream: str, *items: Any, **more: Any) -> list[dict[str, Any]]:
    headers = more.pop("headers", {})
    answer = await server.client.post(FEEDBACK, json={"stream": stream, "items": items, **more}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


async def forget(server, stream: str, status: int = 200, **more: Any) -> dict[str, Any]:
    headers = more.pop("headers", {})
    answer = await server.client.post(FORGET, json={"stream": stream, **more}, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


async def labels(server, stream: str, **headers: str) -> list[str]:
    answer = await server.client.get(MODEL, params={"stream": stream}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [each["shape"] for each in answer.json()["outputs"][1:3]] == [
        [-1, len(answer.json()["parameters"]["labels"])]
    ] * 2
    return answer.json()["parameters"]["labels"]


async def logits(server, images: Any, stream: str, **headers: str) -> list[Any]:
    """Bytes of the logits, and all that the answer says beside them."""
    body = as_binary(
        tensor(images), {"x-session-id": stream, "x-adapt": "off", **headers}, outputs=[{"name": "logits"}]
    )
    answer = await server.client.post(INFER, **body)
    assert answer.status_code == 200, answer.text
    parameters = answer.json()["parameters"]
    return [answer.json()["outputs"], parameters, answer.headers.get("x-head-version")]


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def value(server, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where there is none yet."""
    for family in text_string_to_metric_families(server.service.metrics_text()):
        for sample in family.samples:
            if sample.name == name and sample.labels == {"model": "digits", "replica": "r1", **labels}:
                return sample.value
    return 0.0


# -- tell -------------------------------------------------------------------------------------------------------------


async def test_an_id_and_a_label_are_enough(shared, glyphs):
    before = await predict(shared, glyphs[0], "one")
    assert before["id"].startswith("r1-")
    assert "head_version" not in before["parameters"]
    assert "x-head-version" not in before["headers"]
    answer = await shared.client.post(
        FEEDBACK, json={"stream": "one", "items": [{"id": before["id"], "label": "glyph"}]}
    )
    said = before["predictions"][0]["label"]
    assert answer.json() == {
        "model_name": "digits",
        "results": [
            {
                "result": "applied",
                "id": before["id"],
                "index": 0,
                "label": "glyph",
                "predicted": said,
                "right": False,
            }
        ],
        "parameters": {"stream": "one", "state_version": "0", "head_version": "1", "labels": [*OWN, "glyph"]},
    }
    after = await predict(shared, glyphs[0], "one")
    assert (after["predictions"][0]["label"], after["predictions"][0]["index"]) == ("glyph", 10)
    assert after["parameters"]["added_labels"] == ["glyph"]
    version = after["parameters"]["head_version"]
    assert after["headers"]["x-head-version"] == version
    (again,) = await tell(shared, "one", {"id": before["id"], "label": "other"})
    assert again["result"] == "repeated"
    assert (await predict(shared, glyphs[0], "one"))["parameters"]["head_version"] == version
    assert await labels(shared, "one") == [*OWN, "glyph"]
    await tell(shared, "one", {"id": after["id"], "label": "glyph"})
    assert int((await predict(shared, glyphs[0], "one"))["parameters"]["head_version"]) > int(version)


async def test_the_header_names_the_stream_too(shared, glyphs):
    found = await predict(shared, glyphs[0], "header")
    headers = {"x-session-id": "header"}
    answer = await shared.client.post(FEEDBACK, json={"items": [{"id": found["id"], "label": 3}]}, headers=headers)
    assert answer.json()["parameters"]["stream"] == "header"
    assert answer.json()["results"][0]["label"] == "3"
    receipt = await shared.client.post(FORGET, json={"ids": [found["id"]]}, headers=headers)
    assert receipt.json()["removed"] == 1


async def test_a_client_may_say_the_id(shared, glyphs, held_out):
    await predict(shared, glyphs[0], "mine", x_request_id="order 66")
    assert (await tell(shared, "mine", {"id": "order 66", "label": "glyph"}))[0]["result"] == "applied"
    body = as_binary(tensor(held_out[0][:2]), {"x-session-id": "mine"}, id="tensor-1")
    assert (await shared.client.post(INFER, **body)).json()["id"] == "tensor-1"
    taken = await tell(shared, "mine", {"id": "tensor-1", "index": 1, "label": "b"}, {"id": "tensor-1", "label": "a"})
    assert [(each["index"], each["result"]) for each in taken] == [(1, "applied"), (0, "applied")]


async def test_the_ids_of_infer_are_the_servers_where_there_are_none(shared, held_out):
    body = as_binary(tensor(held_out[0][:1]), {"x-session-id": "tensors"})
    ids = [(await shared.client.post(INFER, **body)).json()["id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert all(id.startswith("r1-") for id in ids)
    assert [each["result"] for each in await tell(shared, "tensors", *({"id": id, "label": 0} for id in ids))] == [
        "applied"
    ] * 2


async def test_pictures_come_with_their_labels(shared, glyphs, digits):
    images = [{"image": in_base64(each), "label": "glyph"} for each in glyphs[:20]]
    taken = await tell(shared, "pictures", *images, {"image": in_base64(digits[0]), "label": "mark", "id": "my own"})
    assert [each["result"] for each in taken] == ["applied"] * 21
    assert len({each["id"] for each in taken}) == 21
    assert taken[-1]["id"] == "my own"
    found = [(await predict(shared, each, "pictures"))["predictions"][0]["label"] for each in glyphs[20:]]
    assert found.count("glyph") >= 18  # of 20 that it has not seen
    assert await labels(shared, "pictures") == [*OWN, "glyph", "mark"]
    (again,) = await tell(shared, "pictures", {"image": in_base64(digits[0]), "label": "other", "id": "my own"})
    assert again["result"] == "repeated"


async def test_probabilities_have_a_column_for_each_added_class(shared, glyphs, held_out):
    x = held_out[0][:1]
    await tell(shared, "columns", {"image": in_base64(glyphs[0]), "label": "glyph"})
    outputs = [{"name": name} for name in ("labels", "probabilities", "logits", "frozen_logits")]
    body = as_binary(tensor(x), {"x-session-id": "columns", "x-answer": "both"}, outputs=outputs)
    found = {each["name"]: each for each in (await shared.client.post(INFER, **body)).json()["outputs"]}
    assert [found[name]["shape"] for name in ("probabilities", "logits", "frozen_logits")] == [
        [1, 11],
        [1, 11],
        [1, 10],
    ]
    assert sum(found["probabilities"]["data"]) == pytest.approx(1, abs=1e-5)
    body = as_binary(tensor(x), {"x-session-id": "told nothing"[:4]}, outputs=outputs[:3])
    found = {each["name"]: each for each in (await shared.client.post(INFER, **body)).json()["outputs"]}
    assert found["probabilities"]["shape"] == [1, 10]


async def test_a_stream_that_was_told_nothing_is_answered_by_the_frozen_model(shared, held_out, glyphs):
    await tell(shared, "teller", {"image": in_base64(glyphs[0]), "label": "glyph"})
    outputs = [{"name": "logits"}, {"name": "frozen_logits"}]
    body = as_binary(tensor(held_out[0][:4]), {"x-session-id": "quiet", "x-answer": "both"}, outputs=outputs)
    one, other = (await shared.client.post(INFER, **body)).json()["outputs"]
    assert one["data"] == other["data"]


async def test_what_is_shared_reaches_all_streams(telling, tmp_path, glyphs):
    async with telling(tmp_path) as server:
        before = await predict(server, glyphs[0], "listener")
        found = await predict(server, glyphs[0], "teller")
        await tell(server, "teller", {"id": found["id"], "label": "glyph"}, scope="shared")
        for stream in ("teller", "listener", "never-seen"):
            assert (await predict(server, glyphs[0], stream))["predictions"][0]["label"] == "glyph"
            assert await labels(server, stream) == [*OWN, "glyph"]
        await forget(server, "listener", status=404, label="glyph")  # it told nothing
        gone = await server.client.delete(f"{MODEL}/streams/teller", headers=BOSS)
        assert gone.json()["receipt"]["removed"] == 1
        after = await predict(server, glyphs[0], "listener")
        assert after["predictions"] == before["predictions"]
        version = after["parameters"].pop("head_version")
        assert int(version) > 0  # it grew, and does not fall
        assert after["parameters"] == {**before["parameters"], "added_labels": []}
        assert await labels(server, "listener") == OWN


async def test_metadata_of_a_stream_that_does_not_exist_begins_none(shared):
    before = shared.service.engine.streams.names()
    assert await labels(shared, "nobody") == OWN
    assert shared.service.engine.streams.names() == before


async def test_without_adapting_nothing_is_remembered(shared, glyphs):
    for headers in ({"x_adapt": "off"}, {"x_answer": "frozen"}):
        found = await predict(shared, glyphs[0], "off", **headers)
        answer = await shared.client.post(
            FEEDBACK, json={"stream": "off", "items": [{"id": found["id"], "label": "glyph"}]}
        )
        assert answer.status_code == 404
        assert "send the image with its label" in answer.json()["error"]
    assert await labels(shared, "off") == OWN


async def test_a_frozen_stream_learns_no_labels(shared, glyphs):
    await predict(shared, glyphs[0], "ice")
    await shared.client.post(f"{MODEL}/streams/ice/freeze", headers=BOSS)
    found = await predict(shared, glyphs[0], "ice")
    items = [{"id": found["id"], "label": "glyph"}, {"image": in_base64(glyphs[1]), "label": "glyph"}]
    assert [each["result"] for each in await tell(shared, "ice", *items)] == ["frozen"] * 2
    assert (await predict(shared, glyphs[0], "ice"))["predictions"] == found["predictions"]
    await shared.client.post(f"{MODEL}/streams/ice/resume", headers=BOSS)
    assert (await tell(shared, "ice", items[1]))[0]["result"] == "applied"


async def test_beside_adaptation(serving, tmp_path, glyphs, held_out):
    """With eata too: images teach the normalisation, labels the head."""
    both = {"adapter": {"eata": {"entropy_margin": 10.0}, **LEARNS["adapter"]}, "adaptation": {"mode": "sync"}}
    async with serving(**both, store=tmp_path) as server:
        found = await predict(server, glyphs[0], "s")
        assert (await tell(server, "s", {"id": found["id"], "label": "glyph"}))[0]["result"] == "applied"
        for begin in range(0, 16, 8):
            body = as_binary(tensor(held_out[0][begin : begin + 8]), {"x-session-id": "s"})
            assert (await server.client.post(INFER, **body)).status_code == 200
        view = (await server.client.get(f"{MODEL}/streams/s")).json()
        assert view["steps"] > 0
        assert await labels(server, "s") == [*OWN, "glyph"]
        assert (await forget(server, "s", label="glyph"))["verified"]
        assert (await server.client.get(f"{MODEL}/streams/s")).json()["steps"] >= view["steps"]


async def test_online_accuracy_is_a_metric(telling, tmp_path, digits, glyphs):
    async with telling(tmp_path) as server:
        right, wrong = await predict(server, digits[0], "s"), await predict(server, glyphs[0], "s")
        told = [
            {"id": right["id"], "label": right["predictions"][0]["label"]},
            {"id": wrong["id"], "label": "glyph"},
        ]
        assert [each["right"] for each in await tell(server, "s", *told)] == [True, False]
        await tell(server, "s", *told)
        assert value(server, "tta_prequential_labels_total", right="true") == 1
        assert value(server, "tta_prequential_labels_total", right="false") == 1
        assert value(server, "tta_labels_total", result="applied") == 2
        assert value(server, "tta_labels_total", result="repeated") == 2
        await forget(server, "s", label="glyph")
        assert value(server, "tta_forgotten_labels_total") == 1
        assert value(server, "tta_requests_total", outcome="ok") == 5


# -- forget -----------------------------------------------------------------------------------------------------------


async def test_ids_are_forgotten_with_a_receipt(shared, glyphs, held_out):
    before = await logits(shared, held_out[0][:2], "regret")
    first = await tell(shared, "regret", {"image": in_base64(glyphs[0]), "label": "glyph"})
    between = await logits(shared, held_out[0][:2], "regret")
    more = await tell(shared, "regret", *({"image": in_base64(each), "label": "regretted"} for each in glyphs[1:4]))
    receipt = await forget(shared, "regret", ids=[each["id"] for each in more])
    assert list(receipt) == ["removed", "foreign", "classes", "state_before", "state_after", "verified", "residue"]
    assert (receipt["removed"], receipt["foreign"], receipt["classes"]) == (3, 0, ["regretted"])
    assert (receipt["verified"], receipt["residue"]) == (True, None)
    assert receipt["state_before"] != receipt["state_after"]
    after = await logits(shared, held_out[0][:2], "regret")
    assert after[0] == between[0]
    last = await forget(shared, "regret", ids=[first[0]["id"]])
    assert last["state_before"] == receipt["state_after"]
    assert last["state_after"] == tree.digest((shared.service.engine.heads.head.init(),))
    assert (await logits(shared, held_out[0][:2], "regret"))[0] == before[0]  # but for the head's version, which grows
    await forget(shared, "regret", status=404, ids=[first[0]["id"]])


async def test_a_class_is_forgotten(shared, glyphs):
    for stream in ("one-of-two", "two-of-two"):
        await tell(shared, stream, {"image": in_base64(glyphs[0]), "label": "spot"})
    receipt = await forget(shared, "one-of-two", label="spot")
    assert (receipt["removed"], receipt["classes"]) == (1, [])  # the other stream has it still
    assert await labels(shared, "one-of-two") == OWN
    assert await labels(shared, "two-of-two") == [*OWN, "spot"]
    assert (await predict(shared, glyphs[0], "one-of-two"))["predictions"][0]["label"] != "spot"


async def test_everywhere_takes_the_admin_token(telling, tmp_path, glyphs):
    async with telling(tmp_path, infer_token="reader") as server:
        reader = {"authorization": "Bearer reader"}
        for stream in ("a", "b"):
            await tell(server, stream, {"image": in_base64(glyphs[0]), "label": "glyph"}, headers=reader)
        for headers in ({}, {"authorization": "Bearer wrong"}, reader):
            error = await forget(server, "a", status=401, label="glyph", everywhere=True, headers=headers)
            assert list(error) == ["error"]
        assert await labels(server, "b", **reader) == [*OWN, "glyph"]
        receipt = await forget(server, "a", label="glyph", everywhere=True, headers=BOSS)
        assert (receipt["removed"], receipt["classes"]) == (2, ["glyph"])
        assert await labels(server, "b", **reader) == OWN


async def test_without_an_admin_token_nobody_forgets_everywhere(telling, tmp_path, glyphs):
    async with telling(tmp_path, admin_token=None) as server:
        await tell(server, "a", {"image": in_base64(glyphs[0]), "label": "glyph"})
        error = await forget(server, "a", status=403, label="glyph", everywhere=True)
        assert "admin routes are closed" in error["error"]
        assert await labels(server, "a") == [*OWN, "glyph"]


async def test_reset_and_delete(shared, glyphs, held_out):
    before = await logits(shared, held_out[0][:2], "short-lived")
    found = await predict(shared, glyphs[0], "short-lived")
    (told,) = await tell(shared, "short-lived", {"image": in_base64(glyphs[0]), "label": "glyph"})
    answer = await shared.client.post(f"{MODEL}/streams/short-lived/reset", headers=BOSS)
    assert answer.status_code == 200
    assert await logits(shared, held_out[0][:2], "short-lived") == before
    for id in (found["id"], told["id"]):
        answer = await shared.client.post(
            FEEDBACK, json={"stream": "short-lived", "items": [{"id": id, "label": "glyph"}]}
        )
        assert answer.status_code == 404
    await tell(shared, "short-lived", {"image": in_base64(glyphs[0]), "label": "glyph", "id": told["id"]})
    gone = await shared.client.delete(f"{MODEL}/streams/short-lived", headers=BOSS)
    assert gone.json()["deleted"] == "short-lived"
    assert (gone.json()["receipt"]["removed"], gone.json()["receipt"]["verified"]) == (1, True)
    assert "short-lived" not in shared.service.engine.streams.names()
    answer = await shared.client.post(FEEDBACK, json={"stream": "short-lived", "items": [{"id": "x", "label": "y"}]})
    assert (answer.status_code, "no stream named 'short-lived'" in answer.json()["error"]) == (404, True)
    assert await logits(shared, held_out[0][:2], "short-lived") == before


async def test_what_was_deleted_is_not_in_the_files(telling, tmp_path, glyphs):
    async with telling(tmp_path) as server:
        await tell(server, "keeps", {"image": in_base64(glyphs[1]), "label": "stays", "id": "kept-id"})
        await tell(
            server, "secret-stream-x", {"image": in_base64(glyphs[0]), "label": "secret-label", "id": "secret-id"}
        )
        code = server.service.engine.heads.feedback.entries(stream="secret-stream-x")[0].code

        def found(needle: bytes) -> bool:
            return any(needle in file.read_bytes() for file in (tmp_path / "digits").iterdir())

        assert all(map(found, (b"secret-label", b"secret-id", code)))
        receipt = (await server.client.delete(f"{MODEL}/streams/secret-stream-x", headers=BOSS)).json()["receipt"]
        assert receipt["residue"] is None
        assert not any(map(found, (b"secret-label", b"secret-id", code)))
        assert found(b"kept-id")


# -- lives ------------------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_all(telling, tmp_path, glyphs, held_out):
    x = held_out[0][:3]
    async with telling(tmp_path) as server:
        found = await predict(server, glyphs[0], "a")
        await tell(server, "a", {"id": found["id"], "label": "glyph"})
        await tell(server, "b", {"image": in_base64(glyphs[1]), "label": "mark", "id": "b-1"}, scope="shared")
        before = [(await logits(server, x, stream))[0] for stream in ("a", "b", "c")]
    async with telling(tmp_path) as server:
        listed = (await server.client.get(f"{MODEL}/streams")).json()["streams"]
        assert [each["stream"] for each in listed] == ["a", "b", "c"]
        assert [(await logits(server, x, stream))[0] for stream in ("a", "b", "c")] == before
        assert await labels(server, "a") == [*OWN, "glyph", "mark"]
        assert await labels(server, "c") == [*OWN, "mark"]
        (again,) = await tell(server, "a", {"id": found["id"], "label": "glyph"})
        assert (again["result"], again["predicted"], again["right"]) == ("repeated", None, None)
        receipt = (await server.client.delete(f"{MODEL}/streams/b", headers=BOSS)).json()["receipt"]
        assert (receipt["removed"], receipt["verified"]) == (1, True)
    async with telling(tmp_path) as server:
        assert await labels(server, "c") == OWN
        assert await labels(server, "a") == [*OWN, "glyph"]


async def test_the_head_alone_may_answer(serving, tmp_path, glyphs, digits):
    head = {**LEARNS["adapter"]["kv_bottleneck"], "answers": "head"}
    async with serving(adapter={"kv_bottleneck": head}, store=tmp_path) as server:
        found = await predict(server, digits[0], "s")
        assert found["predictions"][0]["label"] in OWN
        await tell(
            server,
            "s",
            *({"image": in_base64(each), "label": "glyph"} for each in glyphs[:5]),
            *({"image": in_base64(each), "label": "digit"} for each in digits[1:6]),
        )
        found = await predict(server, digits[1], "s")
        assert found["predictions"][0]["label"] == "digit"
        assert {each["label"] for each in found["predictions"][0]["scores"] if each["score"] > 0} <= {"glyph", "digit"}


# -- tenants ----------------------------------------------------------------------------------------------------------

TENANTS = {"acme": "token-of-acme", "globex": "token-of-globex"}
ACME, GLOBEX, READER = ({"authorization": f"Bearer {token}"} for token in (*TENANTS.values(), "reader"))


@pytest.fixture(scope="module")
async def tenants(anyio_backend, telling, tmp_path_factory):
    async with telling(tmp_path_factory.mktemp("tenants"), infer_token="reader", tenants=TENANTS) as server:
        yield server


@pytest.mark.parametrize("scope", ["stream", "shared"])
async def test_no_tenant_sees_what_another_was_told(tenants, glyphs, held_out, scope):
    x, stream = held_out[0][:3], f"cam-{scope}"
    others = (GLOBEX, READER)
    await tell(tenants, stream, {"image": in_base64(glyphs[1]), "label": "theirs"}, headers=GLOBEX)
    before = [await logits(tenants, x, stream, **headers) for headers in others]
    known = [await labels(tenants, stream, **headers) for headers in others]
    assert known == [[*OWN, "theirs"], OWN]

    taken = await tell(
        tenants,
        stream,
        *({"image": in_base64(each), "label": "acmes own"} for each in glyphs[:8]),
        {"image": in_base64(glyphs[9]), "label": "theirs", "id": "common"},
        scope=scope,
        headers=ACME,
    )
    assert [each["result"] for each in taken] == ["applied"] * 9
    assert (await predict(tenants, glyphs[0], stream, **ACME))["predictions"][0]["label"] == "acmes own"
    assert await labels(tenants, stream, **ACME) == [*OWN, "acmes own", "theirs"]
    assert await labels(tenants, f"acme:{stream}", **BOSS) == [*OWN, "acmes own", "theirs"]

    assert [await logits(tenants, x, stream, **headers) for headers in others] == before
    assert [await labels(tenants, stream, **headers) for headers in others] == known
    shown = [await labels(tenants, f"another-{scope}", **headers) for headers in (ACME, *others)]
    assert shown == [[*OWN, "acmes own", "theirs"] if scope == "shared" else OWN, OWN, OWN]
    for headers in others:
        error = await forget(tenants, stream, status=404, label="acmes own", headers=headers)
        assert "acmes" not in str(await predict(tenants, glyphs[0], stream, **headers))
        assert "told nothing" in error["error"]
        await forget(tenants, stream, status=404, ids=["common"], headers=headers)
    await forget(tenants, stream, status=404, label="acmes own", everywhere=True, headers=GLOBEX)
    assert (await forget(tenants, stream, label="acmes own", everywhere=True, headers=ACME))["removed"] == 8
    assert (await tenants.client.delete(f"{MODEL}/streams/acme:{stream}", headers=BOSS)).json()["receipt"][
        "removed"
    ] == 1
    assert [await logits(tenants, x, stream, **headers) for headers in others] == before
    assert [await labels(tenants, stream, **headers) for headers in others] == known


async def test_the_same_id_of_two_tenants_is_two(tenants, glyphs):
    for headers in (ACME, GLOBEX, READER):
        await predict(tenants, glyphs[0], "ids", x_request_id="same", **headers)
    for headers, label in ((ACME, "x"), (GLOBEX, "y"), (READER, "z")):
        assert (await tell(tenants, "ids", {"id": "same", "label": label}, headers=headers))[0]["result"] == "applied"
        assert (await labels(tenants, "ids", **headers))[10:] == [label]


async def test_an_id_of_another_tenant_is_unknown(tenants, glyphs):
    await predict(tenants, glyphs[0], "theft", x_request_id="acmes", **ACME)
    await predict(tenants, glyphs[0], "theft", **GLOBEX)
    for stream, headers in (("theft", GLOBEX), ("acme:theft", GLOBEX), ("acme:theft", READER), ("acme:theft", {})):
        body = {"stream": stream, "items": [{"id": "acmes", "label": "stolen"}]}
        answer = await tenants.client.post(FEEDBACK, json=body, headers=headers)
        assert answer.status_code == (404 if headers is GLOBEX else 401), answer.text
    assert await labels(tenants, "theft", **ACME) == OWN


async def test_a_cap_of_classes_is_each_tenants_own(tenants, glyphs):
    names = ["1st", "2nd", "3rd"]
    for headers in (ACME, GLOBEX):
        await tell(tenants, "cap", *({"image": in_base64(glyphs[0]), "label": name} for name in names), headers=headers)
        body = {"stream": "cap", "items": [{"image": in_base64(glyphs[0]), "label": "4th"}]}
        answer = await tenants.client.post(FEEDBACK, json=body, headers=headers)
        assert answer.status_code == 413
        assert (await labels(tenants, "cap", **headers))[10:] == names


async def test_health_and_metadata_need_no_token(tenants):
    answer = await tenants.client.get(MODEL)
    assert answer.status_code == 200
    assert answer.json()["parameters"]["labels"] == OWN
    assert np.array_equal(answer.json()["outputs"][1]["shape"], [-1, 10])
