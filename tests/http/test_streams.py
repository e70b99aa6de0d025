"""Looking at streams and commanding them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from payloads import as_binary, tensor

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/digits"
STREAMS = f"{MODEL}/streams"
BOSS = {"authorization": "Bearer boss"}
LOOKS = ["", "/history"]
COMMANDS = ["reset", "freeze", "resume", "rollback"]
RFC_3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(scope="module")
async def commanded(anyio_backend, serving, held_out):
    """A server in the mode in which learning is over with the next answer, and its stream `seen`."""
    async with serving(adaptation={"mode": "sync"}, admin_token="boss") as server:
        await teach(server, held_out, "seen")
        yield server


async def ask(server, held_out, stream: str, *, adapt: str, at: int = 0, rows: int = 16) -> Any:
    body = as_binary(tensor(held_out[0][at : at + rows]), {"x-session-id": stream, "x-adapt": adapt})
    answer = await server.client.post(f"{MODEL}/infer", **body)
    assert answer.status_code == 200, answer.text
    return answer


async def teach(server, held_out, stream: str, at: int = 0) -> None:
    """One request to learn from, and one that is answered after the step."""
    await ask(server, held_out, stream, adapt="on", at=at)
    await ask(server, held_out, stream, adapt="off", rows=1)


async def answer_of(server, held_out, stream: str) -> tuple[int, Any]:
    """The stream's version and what it answers to always the same images."""
    answer = await ask(server, held_out, stream, adapt="off")
    (probabilities,) = (each["data"] for each in answer.json()["outputs"] if each["name"] == "probabilities")
    return int(answer.headers["x-state-version"]), np.array(probabilities)


async def view(server, stream: str) -> dict[str, Any]:
    return (await server.client.get(f"{STREAMS}/{stream}")).json()


async def command(server, stream: str, what: str, **body: Any) -> Any:
    return await server.client.post(f"{STREAMS}/{stream}/{what}", headers=BOSS, **body)


async def metric(server, name: str, labels: str) -> float:
    lines = (await server.client.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{") and labels in line)


async def test_streams_are_listed_by_page(serving, held_out):
    async with serving(adaptation={"mode": "sync"}) as server:
        assert (await server.client.get(STREAMS)).json() == {"streams": [], "total": 0}
        for stream in ("b", "c", "a"):
            await teach(server, held_out, stream)
        pages = [(await server.client.get(f"{STREAMS}?limit=2&offset={i}")).json() for i in (0, 2, 4)]
        assert [[each["stream"] for each in page["streams"]] for page in pages] == [["a", "b"], ["c"], []]
        assert [page["total"] for page in pages] == [3, 3, 3]
        assert pages[0]["streams"][0] == await view(server, "a")


async def test_a_stream_is_viewed(commanded):
    shown = await view(commanded, "seen")
    assert list(shown) == [
        *("stream", "mode", "version", "unsynced", "incarnation", "steps", "seen", "reliable", "selected"),
        *("selected_share", "refused", "trips", "frozen", "gated", "entropy", "drift", "flip_rate", "forgetting"),
        *("forgetting_standard_error", "pending_rows", "versions", "resident", "state_bytes"),
    ]
    assert (shown["stream"], shown["mode"], shown["version"], shown["seen"]) == ("seen", "sync", 1, 16)
    assert shown["selected_share"] == shown["selected"] / 16
    assert (shown["trips"], shown["frozen"], shown["gated"], shown["resident"]) == (0, False, False, True)
    assert (shown["versions"], shown["pending_rows"]) == ([0], 0)
    assert shown["state_bytes"] > 0


async def test_a_history_has_times_versions_and_events(serving, held_out):
    began = datetime.now(UTC) - timedelta(milliseconds=1)  # times are cut to the millisecond
    async with serving(adaptation={"mode": "sync"}, admin_token="boss") as server:
        await teach(server, held_out, "cam")
        await command(server, "cam", "freeze")
        await command(server, "cam", "resume")
        await command(server, "cam", "rollback", json={"version": 0})
        history = (await server.client.get(f"{STREAMS}/cam/history")).json()
    assert list(history) == ["stream", "version", "versions", "events"]
    assert (history["stream"], history["version"], history["versions"]) == ("cam", 4, [0])
    told = [(event["version"], event["what"]) for event in history["events"]]
    assert told == [(0, "begun"), (2, "frozen: by hand"), (3, "resumed"), (4, "rolled back to 0: by hand")]
    assert all(re.fullmatch(RFC_3339, event["at"]) for event in history["events"])
    times = [datetime.fromisoformat(event["at"]) for event in history["events"]]
    assert began <= times[0] <= times[-1] <= datetime.now(UTC)


async def test_reset_begins_anew(commanded, held_out):
    untaught = await answer_of(commanded, held_out, "untaught")
    await teach(commanded, held_out, "again")
    before = await view(commanded, "again")
    assert before["version"] == 1
    after = (await command(commanded, "again", "reset")).json()
    assert after["incarnation"] > before["incarnation"]
    assert (after["version"], after["steps"], after["seen"], after["state_bytes"]) == (0, 0, 0, 0)
    version, answer = await answer_of(commanded, held_out, "again")
    assert version == 0
    assert answer == pytest.approx(untaught[1], abs=1e-6)


async def test_a_frozen_stream_answers_as_it_did_and_counts_what_it_skips(commanded, held_out):
    await teach(commanded, held_out, "cold")
    before = await answer_of(commanded, held_out, "cold")
    skipped = await metric(commanded, "tta_skipped_rows_total", 'reason="frozen"')
    frozen = await command(commanded, "cold", "freeze")
    assert (frozen.status_code, frozen.json()["frozen"], frozen.json()["version"]) == (200, True, 2)
    for at in (16, 32, 48):
        await teach(commanded, held_out, "cold", at)
        version, answer = await answer_of(commanded, held_out, "cold")
        assert version == 2
        assert (answer == before[1]).all()
    assert (await view(commanded, "cold"))["seen"] == 16
    assert await metric(commanded, "tta_skipped_rows_total", 'reason="frozen"') == skipped + 48

    resumed = await command(commanded, "cold", "resume")
    assert (resumed.status_code, resumed.json()["frozen"]) == (200, False)
    await teach(commanded, held_out, "cold", 16)
    shown = await view(commanded, "cold")
    assert (shown["version"], shown["seen"]) == (4, 32)


async def test_a_frozen_stream_may_wait_out_of_memory(serving, held_out):
    async with serving(adaptation={"mode": "sync"}, admin_token="boss", streams={"resident": 1}) as server:
        await teach(server, held_out, "cold")
        before = await answer_of(server, held_out, "cold")
        await command(server, "cold", "freeze")
        await teach(server, held_out, "other")
        shown = await view(server, "cold")
        assert (shown["resident"], shown["state_bytes"], shown["frozen"]) == (False, 0, True)
        version, answer = await answer_of(server, held_out, "cold")
        assert version == before[0] + 1
        assert (answer == before[1]).all()
        assert not (await view(server, "other"))["resident"]


async def test_rollback_goes_back_to_a_kept_version_under_a_new_one(commanded, held_out):
    answers = dict([await answer_of(commanded, held_out, "back")])
    kept: list[int] = []
    for step in range(64):
        await teach(commanded, held_out, "back", at=16 * (step % 8))
        version, answer = await answer_of(commanded, held_out, "back")
        answers[version] = answer
        kept = (await view(commanded, "back"))["versions"][1:]
        if kept and version > kept[0]:
            break
    assert kept, "no version was kept"
    before = await view(commanded, "back")
    assert np.abs(answers[before["version"]] - answers[0]).max() > 1e-4  # versions answer differently

    for wanted in (kept[0], 0):
        before = await view(commanded, "back")
        answer = await command(commanded, "back", "rollback", json={"version": wanted})
        assert answer.status_code == 200, answer.text
        after = answer.json()
        assert after["version"] == before["version"] + 1
        assert after["incarnation"] > before["incarnation"]
        assert after["versions"] == before["versions"]
        version, probabilities = await answer_of(commanded, held_out, "back")
        assert version == after["version"]
        assert probabilities == pytest.approx(answers[wanted], abs=1e-6)


async def test_a_version_that_is_not_kept_is_not_found(commanded):
    before = await view(commanded, "seen")
    for version in (1, 12345):
        answer = await command(commanded, "seen", "rollback", json={"version": version})
        assert answer.status_code == 404
        assert answer.json() == {"error": f"the version {version} of stream 'seen' is not kept; there are 0"}
    assert await view(commanded, "seen") == before


@pytest.mark.parametrize(
    ("body", "holds"),
    [
        (b"", "EOF"),
        (b"{}", "version: Field required"),
        (b"[0]", "[0]"),
        (b"0", "0"),
        (b"{version: 0}", "line 1 column 2"),
        (b'{"version": "0"}', "'0'"),
        (b'{"version": 0.0}', "0.0"),
        (b'{"version": true}', "True"),
        (b'{"version": null}', "None"),
        (b'{"version": -1}', "-1"),
        (b'{"version": %s}' % (b"9" * 5000), "out of range"),
        (b'{"version": 0, "why": "so"}', "why"),
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe", "Invalid JSON"),
    ],
)
async def test_the_body_of_a_rollback_says_which_version(commanded, body, holds):
    before = await view(commanded, "seen")
    answer = await command(commanded, "seen", "rollback", content=body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith('the body must be {"version": n}, n one of the stream\'s versions; ')
    assert holds in answer.json()["error"]
    assert await view(commanded, "seen") == before


async def test_delete_leaves_nothing(serving, held_out):
    async with serving(adaptation={"mode": "sync"}, admin_token="boss", streams={"resident": 1}) as server:
        untaught = await answer_of(server, held_out, "new")
        for _ in range(2):
            for stream in ("gone", "stays"):
                await teach(server, held_out, stream)
        assert not (await view(server, "gone"))["resident"]  # it is written out
        deleted = await server.client.delete(f"{STREAMS}/gone", headers=BOSS)
        assert (deleted.status_code, deleted.json()) == (200, {"deleted": "gone"})
        for path in LOOKS:
            assert (await server.client.get(f"{STREAMS}/gone{path}")).status_code == 404
        listed = (await server.client.get(STREAMS)).json()
        assert ([each["stream"] for each in listed["streams"]], listed["total"]) == (["new", "stays"], 2)
        assert (await view(server, "stays"))["version"] == 2

        version, answer = await answer_of(server, held_out, "gone")  # a new stream of that name
        assert version == 0
        assert answer == pytest.approx(untaught[1], abs=1e-6)
        history = (await server.client.get(f"{STREAMS}/gone/history")).json()
        assert [event["what"] for event in history["events"]] == ["begun"]
        assert history["versions"] == [0]


@pytest.mark.parametrize("path", [*LOOKS, *(f"/{each}" for each in COMMANDS), None])
@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("never-seen", 404, "there is no stream named 'never-seen'"),
        (".hidden", 400, "'.hidden' cannot name a stream"),
        ("a%20b", 400, "'a b' cannot name a stream"),
        ("%C3%A9", 400, "'é' cannot name a stream"),
        ("a" * 129, 400, "1 to 128 letters"),
        ("a%2Fb", 404, "there is nothing at"),
    ],
)
async def test_names_that_are_bad_or_unknown(commanded, path, name, status, says):
    """`path`: None is DELETE."""
    before = commanded.service.engine.streams.names()
    if path is None:
        answer = await commanded.client.delete(f"{STREAMS}/{name}", headers=BOSS)
    elif path in LOOKS:
        answer = await commanded.client.get(f"{STREAMS}/{name}{path}")
    else:
        answer = await command(commanded, name, path[1:], json={"version": 0})
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert says in answer.json()["error"]
    assert commanded.service.engine.streams.names() == before


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "the parameter limit is '0'; it can be 1 … 1000"),
        ("limit=1001", "'1001'; it can be 1 … 1000"),
        ("limit=ten", "'ten'; it can be 1 … 1000"),
        ("limit=", "''; it can be 1 … 1000"),
        ("offset=-1", "the parameter offset is '-1'; it can be 0 …"),
        ("offset=1.5", "'1.5'; it can be 0 …"),
        pytest.param(f"offset={'9' * 5000}", "it can be 0 …", id="a number of 5000 digits"),
    ],
)
async def test_bad_pages(commanded, query, says):
    answer = await commanded.client.get(f"{STREAMS}?{query}")
    assert answer.status_code == 400
    assert says in answer.json()["error"]


async def test_methods_that_a_route_does_not_take(commanded):
    for method, path in [("POST", ""), ("PUT", "/seen"), ("GET", "/seen/freeze"), ("POST", "/seen/history")]:
        answer = await commanded.client.request(method, STREAMS + path, headers=BOSS)
        assert answer.status_code == 405
        assert f"{STREAMS}{path} does not take {method}" in answer.json()["error"]


async def test_openapi_describes_what_streams_answer(commanded):
    paths = (await commanded.client.get("/openapi.json")).json()["paths"]

    def schema_of(path: str, method: str = "get") -> Any:
        described = paths[f"/v2/models/{{model}}/streams{path}"][method]
        return described["responses"]["200"]["content"]["application/json"]["schema"]

    shown = list(await view(commanded, "seen"))
    assert list(schema_of("/{stream}")["properties"]) == schema_of("/{stream}")["required"] == shown
    assert list(schema_of("")["properties"]["streams"]["items"]["properties"]) == shown
    for each in COMMANDS:
        assert schema_of(f"/{{stream}}/{each}", "post") == schema_of("/{stream}")
    history = (await commanded.client.get(f"{STREAMS}/seen/history")).json()
    assert list(schema_of("/{stream}/history")["properties"]) == list(history)
    assert list(schema_of("/{stream}/history")["properties"]["events"]["items"]["properties"]) == [
        "at",
        "version",
        "what",
    ]
    body = paths["/v2/models/{model}/streams/{stream}/rollback"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["required"] == ["version"]
    for path in ("/{stream}/freeze", "/{stream}/rollback"):
        assert {"400", "401", "403", "404"} <= set(paths[f"/v2/models/{{model}}/streams{path}"]["post"]["responses"])
