"""Two replicas of one model on one store, as users see them."""

import base64
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
from payloads import picture

from tta_serve import model_service
from tta_serve.errors import Unavailable
from tta_serve.sqlite_store import SQLiteStore

# two servers for each test; test_durable.py and test_sync.py are quick
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
]

MODEL = "/v2/models/digits"
BOSS = {"authorization": "Bearer boss"}
WAIT_S = 30.0


class Pair(NamedTuple):
    one: Any
    two: Any


async def until(true: Callable[[], Any]) -> Any:
    with anyio.fail_after(WAIT_S):
        while not (found := await true()):
            await anyio.sleep(0.02)
    return found


@pytest.fixture
async def pair(anyio_backend, serving, tmp_path: Path) -> AsyncIterator[Pair]:
    async with (
        serving(store=tmp_path, admin_token="boss", replica="r1") as one,
        serving(store=tmp_path, admin_token="boss", replica="r2") as two,
    ):
        yield Pair(one, two)


async def ask(server: Any, image: Any, stream: str) -> Any:
    answer = await server.client.post(f"{MODEL}/predict", content=picture(image), headers={"x-session-id": stream})
    assert answer.status_code == 200, answer.text
    return answer


async def view(server: Any, stream: str) -> Any:
    answer = await server.client.get(f"{MODEL}/streams/{stream}")
    return answer.json() if answer.status_code == 200 else None


async def taught(pair: Pair, images: Any, stream: str) -> None:
    """Until the first has learned, and both know."""
    for image in images[:40]:
        await ask(pair.one, image, stream)

    async def both_know() -> bool:
        views = [await view(each, stream) for each in pair]
        return all(each and each["steps"] and not each["unsynced"] and not each["pending_rows"] for each in views)

    await until(both_know)


async def test_a_version_says_what_the_store_has_and_what_it_has_not(pair, held_out):
    texts = set()

    async def unsynced() -> bool:
        texts.add((await ask(pair.one, 255 - held_out[0][0], "s")).headers["x-state-version"])
        return any("+" in text for text in texts)

    await until(unsynced)
    assert all(re.fullmatch(r"\d+(\+[1-9]\d*@r1)?", text) for text in texts)


async def test_what_one_learned_both_answer_with(pair, held_out):
    await taught(pair, 255 - held_out[0], "s")
    told = [await ask(each, held_out[0][0], "s") for each in pair]
    views = [await view(each, "s") for each in pair]
    assert views[0]["version"] == views[1]["version"] > 0
    assert views[0]["seen"] == views[1]["seen"] == 40
    assert len({answer.headers["x-state-version"] for answer in told}) == 1
    assert told[0].json()["predictions"] == told[1].json()["predictions"]
    for each in pair:
        listed = (await each.client.get(f"{MODEL}/streams")).json()
        assert ([line["stream"] for line in listed["streams"]], listed["total"]) == (["s"], 1)


@pytest.mark.parametrize("how", ["reset", "delete", "rollback"])
async def test_after_a_command_no_replica_answers_from_the_life_before(pair, held_out, how):
    await taught(pair, 255 - held_out[0], "s")
    if how == "delete":
        done = await pair.one.client.delete(f"{MODEL}/streams/s", headers=BOSS)
    else:
        body = {"json": {"version": 0}} if how == "rollback" else {}
        done = await pair.one.client.post(f"{MODEL}/streams/s/{how}", headers=BOSS, **body)
    assert done.status_code == 200, done.text
    assert "waiting" not in done.json()
    for each in pair:
        assert (await ask(each, held_out[0][0], "s")).headers["x-state-incarnation"] == "2"


async def test_freezing_here_freezes_there(pair, held_out):
    await taught(pair, 255 - held_out[0], "s")
    frozen = await pair.two.client.post(f"{MODEL}/streams/s/freeze", headers=BOSS)
    assert (frozen.status_code, frozen.json()["frozen"]) == (200, True)
    assert (await view(pair.one, "s"))["frozen"]


async def test_a_command_that_somebody_does_not_follow_is_accepted_and_says_who(pair, held_out, monkeypatch):
    monkeypatch.setattr(model_service, "EVERYWHERE_S", 0.2)
    await taught(pair, 255 - held_out[0], "s")
    pair.two.service.sync._stopping.set()
    pair.two.service.sync._thread.join()
    done = await pair.one.client.delete(f"{MODEL}/streams/s", headers=BOSS)
    said = done.json()
    assert (done.status_code, said["deleted"], said["waiting"]) == (202, "s", ["r2"])
    assert said["sequence"] > 0


async def test_a_store_that_is_out_of_reach_is_told_and_predictions_go_on(pair, held_out, monkeypatch):
    await taught(pair, 255 - held_out[0], "s")

    def broken(*_: Any) -> Any:
        raise Unavailable("the disk is full")

    for name in ("save", "changes", "members"):
        monkeypatch.setattr(SQLiteStore, name, broken)

    async def degraded() -> Any:
        answer = await pair.one.client.get(f"{MODEL}/ready")
        return answer if "degraded" in answer.json() else None

    said = await until(degraded)
    assert (said.status_code, said.json()["degraded"]) == (200, "the disk is full")
    metrics = (await pair.one.client.get("/metrics")).text
    assert 'tta_store_ok{model="digits",replica="r1"} 0.0' in metrics
    assert (await ask(pair.one, held_out[0][0], "s")).headers["x-state-incarnation"] == "1"
    refused = await pair.one.client.delete(f"{MODEL}/streams/s", headers=BOSS)
    assert (refused.status_code, refused.json()) == (503, {"error": "the disk is full"})
    monkeypatch.undo()

    async def well() -> bool:
        return "degraded" not in (await pair.one.client.get(f"{MODEL}/ready")).json()

    await until(well)
    assert (await pair.one.client.delete(f"{MODEL}/streams/s", headers=BOSS)).status_code == 200


async def test_what_one_forgets_the_other_has_forgotten(anyio_backend, serving, tmp_path, held_out):
    head = {"adapter": {"kv_bottleneck": {"codebooks": 16, "branches": [4, 4]}}, "store": tmp_path}
    async with serving(**head, replica="r1") as one, serving(**head, replica="r2") as two:
        image = 255 - held_out[0][0]
        item = {"image": base64.b64encode(picture(image)).decode(), "label": "glyph", "id": "first"}
        told = await one.client.post(f"{MODEL}/feedback", json={"stream": "s", "items": [item]})
        assert told.json()["results"][0]["result"] == "applied"

        async def known() -> bool:
            return (await ask(two, image, "s")).json()["predictions"][0]["label"] == "glyph"

        await until(known)
        gone = await one.client.post(f"{MODEL}/forget", json={"stream": "s", "label": "glyph"})
        assert (gone.status_code, gone.json()["removed"], gone.json()["verified"]) == (200, 1, True)
        assert (await ask(two, image, "s")).json()["predictions"][0]["label"] != "glyph"


async def test_a_restart_goes_on_where_it_was(anyio_backend, serving, tmp_path, held_out):
    async with serving(store=tmp_path, replica="r1") as server:
        for image in 255 - held_out[0][:40]:
            await ask(server, image, "s")
        await until(lambda: learned(server))
    async with serving(store=tmp_path, replica="r2") as server:
        assert server.service.engine.streams.names() == []  # nothing is loaded before it is asked for
        shown = await view(server, "s")
        assert (shown["seen"], shown["resident"], shown["unsynced"]) == (40, False, 0)
        answer = await ask(server, held_out[0][0], "s")
        assert answer.headers["x-state-version"] == str(shown["version"])
        assert (await view(server, "s"))["resident"]


async def learned(server: Any) -> bool:
    shown = await view(server, "s")
    return bool(shown["steps"] and not shown["pending_rows"])
