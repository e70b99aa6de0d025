"""Translators that change while the server runs."""

import json

import pytest
import spots
import torch
from payloads import picture

from adapters import tree
from tta_serve import translators

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/spots"
ADMIN = {"authorization": "Bearer admin"}
CAM = {"x-session-id": "cam"}


@pytest.fixture
async def server(anyio_backend, detecting):
    async with detecting(admin_token="admin") as running:
        yield running


@pytest.fixture
def content(tmp_path):
    """The bytes of a translator's file for `spots`."""

    def make(modality: str = "ir", **of) -> bytes:
        path = tmp_path / "some.safetensors"
        translators.save(path, spots.translator_file(modality, **of))
        return path.read_bytes()

    return make


async def put(server, modality: str, body: bytes, headers=ADMIN):
    return await server.client.put(f"{MODEL}/translators/{modality}", content=body, headers=headers)


async def predict(server, modality: str):
    headers = {**CAM, "x-modality": modality}
    return await server.client.post(
        f"{MODEL}/predict", content=picture(spots.infrared()[..., 0], "PNG"), headers=headers
    )


async def teach(server, modality: str):
    id = (await predict(server, modality)).json()["id"]
    item = {"id": id, "boxes": [[4, 2, 10, 8]], "labels": ["red"]}
    answer = await server.client.post(f"{MODEL}/feedback", content=json.dumps({"stream": "cam", "items": [item]}))
    assert answer.json()["results"][0]["result"] == "applied", answer.text


def score(answer) -> float:
    return answer.json()["predictions"][0]["detections"][0]["score"]


async def test_another_translator_serves_from_the_next_request_on(server, content):
    before = score(await predict(server, "ir"))
    answer = await put(server, "ir", content(plain=True))  # nearly the identity: as bright as the picture
    assert (answer.status_code, answer.json()["version"], answer.json()["in_channels"]) == (200, 0, 1)
    after = score(await predict(server, "ir"))
    assert after == pytest.approx(200 / 255, abs=0.01)
    assert before < after - 0.1


async def test_what_a_stream_learned_for_one_translator_survives_another(server, content):
    await teach(server, "ir")
    learned = tree.encode(server.service.engine.streams.state("cam").input[0])
    answered = score(await predict(server, "ir"))
    assert (await put(server, "thermal", content("thermal"))).status_code == 200
    assert list(server.service.engine.modalities) == ["ir", "thermal"]
    states = server.service.engine.streams.state("cam").input
    # optimizer moments begin anew, everything else is what it was
    assert all(torch.equal(value, learned[name]) for name, value in tree.encode(states[0]).items() if "opt" not in name)
    init = server.service.engine.modalities["thermal"].modtr.init()
    assert all(torch.equal(value, tree.encode(init)[name]) for name, value in tree.encode(states[1]).items())
    assert score(await predict(server, "ir")) == answered
    view = (await server.client.get(f"{MODEL}/streams/cam")).json()
    assert (view["version"], view["steps"]) == (2, 1)  # the step, and the change
    events = (await server.client.get(f"{MODEL}/streams/cam/history")).json()["events"]
    assert events[-1]["what"] == "translator thermal added"


async def test_what_was_learned_for_a_translator_that_is_replaced_is_dropped(server, content):
    await teach(server, "ir")
    assert (await put(server, "ir", content())).status_code == 200
    init = server.service.engine.modalities["ir"].modtr.init()
    state = tree.encode(server.service.engine.streams.state("cam").input[0])
    assert all(torch.equal(value, tree.encode(init)[name]) for name, value in state.items())
    listed = (await server.client.get(f"{MODEL}/translators")).json()["translators"]
    assert [(each["modality"], each["version"], each["steps"]) for each in listed] == [("ir", 0, 0)]


async def test_versions_of_the_old_structure_cannot_be_rolled_back_to(server, content):
    for _ in range(8):  # one is kept every 8 steps
        await teach(server, "ir")
    assert (await server.client.get(f"{MODEL}/streams/cam")).json()["versions"] == [0, 8]
    await put(server, "thermal", content("thermal"))
    assert (await server.client.get(f"{MODEL}/streams/cam")).json()["versions"] == [0]
    await teach(server, "thermal")


async def test_a_deleted_translator_is_unknown(server):
    await predict(server, "ir")
    answer = await server.client.delete(f"{MODEL}/translators/ir", headers=ADMIN)
    assert (answer.status_code, answer.json()) == (200, {"deleted": "ir"})
    answer = await predict(server, "ir")
    assert answer.status_code == 400
    assert "there are rgb" in answer.json()["error"]
    answer = await server.client.delete(f"{MODEL}/translators/ir", headers=ADMIN)
    assert answer.status_code == 404


async def test_only_so_many_translators(server, content):
    for number in range(15):
        assert (await put(server, f"m{number}", content(f"m{number}"))).status_code == 200
    answer = await put(server, "m15", content("m15"))
    assert answer.status_code == 400
    assert "there are 16 translators, which is the limit" in answer.json()["error"]
    assert (await put(server, "m3", content("m3"))).status_code == 200  # in another's place


@pytest.mark.parametrize(
    ("headers", "status"), [({}, 401), ({"authorization": "Bearer wrong"}, 401), (CAM, 401)], ids=["no", "wrong", "cam"]
)
async def test_changing_takes_the_admin_token(server, content, headers, status):
    assert (await put(server, "ir", content(), headers)).status_code == status
    answer = await server.client.delete(f"{MODEL}/translators/ir", headers=headers)
    assert answer.status_code == status
    assert list(server.service.engine.modalities) == ["ir"]


async def test_without_an_admin_token_translators_do_not_change(anyio_backend, detecting, content):
    async with detecting() as server:
        answer = await put(server, "ir", content())
        assert (answer.status_code, "closed" in answer.json()["error"]) == (403, True)


@pytest.mark.parametrize(
    ("modality", "body", "said"),
    [
        ("ir", lambda content: content()[:-10], "was the file cut short?"),
        ("ir", lambda _: b"", "no safetensors file"),
        ("ir", lambda content: content("thermal"), "give it under 'thermal'"),
        ("rgb", lambda content: content(), "not 'rgb'"),
    ],
    ids=["cut", "empty", "another modality", "rgb"],
)
async def test_files_that_cannot_be_served(server, content, modality, body, said):
    await teach(server, "ir")
    before = server.service.engine.modalities["ir"]
    answer = await put(server, modality, body(content))
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert server.service.engine.modalities["ir"] is before


async def test_a_translator_of_another_detector_is_refused_by_name(server, content):
    other = spots.Spots()
    other.norm.weight.data.fill_(2)
    answer = await put(server, "ir", content(detector=other))
    assert answer.status_code == 400
    theirs, ours = spots.translator_file(detector=other).detector, server.service.engine.digest
    assert f"made for the detector {theirs}, this one is {ours}" in answer.json()["error"]


async def test_a_translator_that_makes_no_numbers_is_refused(server, tmp_path):
    file = spots.translator_file()
    weights = {name: tensor * 1e30 if tensor.is_floating_point() else tensor for name, tensor in file.weights.items()}
    translators.save(tmp_path / "wild.safetensors", file._replace(weights=weights))
    answer = await put(server, "ir", (tmp_path / "wild.safetensors").read_bytes())
    assert answer.status_code == 400
    assert "not finite" in answer.json()["error"]
    assert (await predict(server, "ir")).json()["predictions"][0]["detections"]


async def test_streams_that_are_written_out_begin_anew(anyio_backend, detecting, content):
    async with detecting(admin_token="admin", streams={"resident": 1}) as server:
        await teach(server, "ir")
        lives = [server.service.engine.streams.record("cam").incarnation]
        other = await server.client.post(
            f"{MODEL}/predict", content=picture(spots.infrared()[..., 0], "PNG"), headers={"x-session-id": "other"}
        )
        item = {"id": other.json()["id"], "boxes": [[4, 2, 10, 8]], "labels": ["red"]}
        await server.client.post(f"{MODEL}/feedback", content=json.dumps({"stream": "other", "items": [item]}))
        assert server.service.engine.streams.find("cam") is None  # made room
        assert (await put(server, "thermal", content("thermal"))).status_code == 200
        assert server.service.engine.streams.record("other").steps == 1
        await teach(server, "ir")  # and it goes on
        lives.append(server.service.engine.streams.record("cam").incarnation)
        assert lives[0] != lives[1]
