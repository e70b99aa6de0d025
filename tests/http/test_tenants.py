"""A tenant's token reaches the streams behind its prefix and no others."""

from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payloads import as_binary, picture

from tta_serve.access import Reach, may_administer, may_predict
from tta_serve.config import Tokens
from tta_serve.errors import Forbidden, InvalidInput, Unauthorized
from tta_serve.views import check_stream

MODEL = "/v2/models/digits"
TENANTS = {"acme": "token-of-acme", "globex": "token-of-globex"}
ACME, GLOBEX, READER, BOSS = ({"authorization": f"Bearer {token}"} for token in (*TENANTS.values(), "reader", "boss"))
ALL = Tokens(infer="reader", admin="boss", tenants=TENANTS)
ONE = np.zeros((1, 3, 32, 32), np.uint8)
COMMANDS = ["reset", "freeze", "resume", "rollback"]


@pytest.fixture(scope="module")
async def shared(anyio_backend, serving):
    """A server with a stream `cam` of each tenant's, one of nobody's, and one that looks like a tenant's."""
    async with serving(infer_token="reader", admin_token="boss", tenants=TENANTS) as server:
        for headers in (ACME, GLOBEX, READER):
            assert (await infer(server, headers, "cam")).status_code == 200
        assert (await infer(server, READER, "acme")).status_code == 200
        yield server


async def infer(server, authorization: dict[str, str], stream: str | None, **more: Any) -> Any:
    named = {} if stream is None else {"x-session-id": stream}
    body = as_binary(ONE, {**authorization, **named, "x-adapt": "off"}, **more)
    return await server.client.post(f"{MODEL}/infer", **body)


async def look(server, authorization: dict[str, str], path: str) -> Any:
    return await server.client.get(f"{MODEL}/streams{path}", headers=authorization)


@pytest.mark.parametrize(
    ("authorization", "reach"),
    [
        ("Bearer boss", Reach()),
        ("bearer token-of-acme", Reach(prefix="acme:")),
        ("Bearer token-of-globex", Reach(prefix="globex:")),
        ("Bearer reader", Reach(without=("acme:", "globex:"))),
    ],
)
def test_a_token_says_who_asks(authorization: str, reach: Reach) -> None:
    assert may_predict(ALL, authorization) == reach


@pytest.mark.parametrize("tokens", [ALL, ALL.model_copy(update={"infer": None, "admin": None})])
@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer ", "Bearer None", "token-of-acme", "Bearer acme"])
def test_with_tenants_nothing_is_open(tokens: Tokens, authorization: str) -> None:
    with pytest.raises(Unauthorized):
        may_predict(tokens, authorization)


@pytest.mark.parametrize("token", ["reader", *TENANTS.values(), "wrong", ""])
def test_one_token_administers(token: str) -> None:
    with pytest.raises(Unauthorized):
        may_administer(ALL, f"Bearer {token}")
    with pytest.raises(Forbidden):
        may_administer(ALL.model_copy(update={"admin": None}), f"Bearer {token}")
    may_administer(ALL, "Bearer boss")


def test_the_whole_name_is_bounded() -> None:
    acme = Reach(prefix="acme:")
    assert acme.full("a" * 123) == "acme:" + "a" * 123
    with pytest.raises(InvalidInput) as caught:
        acme.full("a" * 124)
    assert str(caught.value).endswith(
        "is too long: with the tenant's prefix 'acme:' the name of a stream has at most 128 characters, "
        "which leaves 123"
    )


NAMES = (
    st.sampled_from(
        ["cam", "acme", "acme:cam", "globex:cam", "globex", ":cam", "../globex:cam", "globex:cam\n", "", ":"]
    )
    | st.from_regex(r"(acme|globex|[A-Za-z0-9])[A-Za-z0-9._:-]{0,140}", fullmatch=True)
    | st.text(max_size=140)
)


@given(said=NAMES)
def test_no_name_leaves_the_prefix(said: str) -> None:
    acme = may_predict(ALL, "Bearer token-of-acme")
    try:
        full = acme.full(said)
    except InvalidInput:
        return
    assert full.startswith("acme:")
    assert len(full) > len("acme:")
    check_stream(full)
    assert acme.shown(full) == said


@given(said=NAMES)
def test_no_name_of_the_common_token_is_a_tenants(said: str) -> None:
    try:
        full = may_predict(ALL, "Bearer reader").full(said)
    except (InvalidInput, Unauthorized):
        return
    assert full == said
    assert not full.startswith(("acme:", "globex:"))


@pytest.mark.anyio
async def test_a_tenant_says_names_without_its_prefix(shared):
    answer = await infer(shared, ACME, "cam")
    assert answer.json()["parameters"]["stream"] == "cam"
    listed = (await look(shared, ACME, "")).json()
    assert [each["stream"] for each in listed["streams"]] == ["cam"]
    assert listed["total"] == 1
    own = (await look(shared, ACME, "/cam")).json()
    assert own == listed["streams"][0]
    assert own["incarnation"] == shared.service.engine.streams.record("acme:cam").incarnation
    assert (await look(shared, ACME, "/cam/history")).json()["stream"] == "cam"


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/acme:cam", "/globex:cam", "/globex:cam/history", "/acme", "/cam/../globex:cam"])
async def test_a_tenant_sees_no_stream_but_its_own(shared, path):
    assert (await look(shared, ACME, path)).status_code == 404


@pytest.mark.anyio
async def test_the_common_token_reaches_no_tenants_stream(shared):
    before = shared.service.engine.streams.names()
    for answer in (
        await infer(shared, READER, "acme:cam"),
        await infer(shared, READER, "acme:new"),
        await look(shared, READER, "/acme:cam"),
        await look(shared, READER, "/acme:cam/history"),
    ):
        assert answer.status_code == 401
        assert answer.json() == {
            "error": "streams named 'acme:…' are the tenant's; this needs its token or the admin token"
        }
    listed = (await look(shared, READER, "")).json()
    assert ([each["stream"] for each in listed["streams"]], listed["total"]) == (["acme", "cam"], 2)
    assert shared.service.engine.streams.names() == before


@pytest.mark.anyio
async def test_the_admin_token_reaches_all_by_their_full_names(shared):
    listed = (await look(shared, BOSS, "?limit=3")).json()
    assert ([each["stream"] for each in listed["streams"]], listed["total"]) == (["acme", "acme:cam", "cam"], 4)
    assert (await look(shared, BOSS, "/globex:cam")).json()["stream"] == "globex:cam"
    assert (await infer(shared, BOSS, "globex:cam")).json()["parameters"]["stream"] == "globex:cam"
    frozen = await shared.client.post(f"{MODEL}/streams/acme:cam/freeze", headers=BOSS)
    assert (frozen.status_code, frozen.json()["stream"]) == (200, "acme:cam")
    assert (await look(shared, ACME, "/cam")).json()["frozen"]
    assert not (await look(shared, GLOBEX, "/cam")).json()["frozen"]
    await shared.client.post(f"{MODEL}/streams/acme:cam/resume", headers=BOSS)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", ["cam", "acme:cam", "globex:cam"])
async def test_a_tenant_commands_no_stream(shared, stream):
    before = {name: shared.service.engine.streams.record(name) for name in shared.service.engine.streams.names()}
    answers = [
        await shared.client.post(f"{MODEL}/streams/{stream}/{each}", headers=ACME, json={"version": 0})
        for each in COMMANDS
    ]
    answers.append(await shared.client.delete(f"{MODEL}/streams/{stream}", headers=ACME))
    assert [answer.status_code for answer in answers] == [401] * 5
    assert {name: shared.service.engine.streams.record(name) for name in before} == before


@pytest.mark.anyio
async def test_without_a_name_a_tenant_has_a_default_of_its_own(serving):
    async with serving(tenants=TENANTS) as server:
        assert (await infer(server, {}, None)).status_code == 401
        for headers in (ACME, GLOBEX):
            assert (await infer(server, headers, None)).json()["parameters"]["stream"] == "default"
        grey = picture(ONE[0].transpose(1, 2, 0))
        predicted = await server.client.post(f"{MODEL}/predict?stream=p", content=grey, headers=ACME)
        assert predicted.json()["parameters"]["stream"] == "p"
        named = await infer(server, GLOBEX, None, parameters={"stream": "acme:p"})
        assert named.json()["parameters"]["stream"] == "acme:p"
        assert server.service.engine.streams.names() == [
            "acme:default",
            "acme:p",
            "globex:acme:p",
            "globex:default",
        ]


@pytest.mark.anyio
async def test_a_name_too_long_behind_the_prefix_is_refused(shared):
    answer = await infer(shared, ACME, "a" * 124)
    assert answer.status_code == 400
    assert "at most 128 characters, which leaves 123" in answer.json()["error"]
    assert (await look(shared, ACME, f"/{'a' * 124}")).status_code == 400


WIRE_NAMES = NAMES.map(lambda name: name.encode("utf-8", "replace").decode("latin-1"))  # as a header carries it


@pytest.mark.anyio
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(header=st.none() | WIRE_NAMES, parameter=st.none() | NAMES, path=NAMES, by=st.sampled_from(["infer", "predict"]))
async def test_no_request_of_a_tenant_touches_anything_outside_its_prefix(shared, header, parameter, path, by):
    streams = shared.service.engine.streams
    outside = {name: streams.record(name) for name in streams.names() if not name.startswith("acme:")}
    headers: dict[str, bytes] = {name: value.encode() for name, value in ACME.items()}
    if header is not None:
        headers["x-session-id"] = header.encode("latin-1")
    if by == "infer":
        more = {} if parameter is None else {"parameters": {"stream": parameter}}
        body = as_binary(ONE, **more)
        request = {"content": body["content"], "headers": {**headers, **body["headers"]}}
    else:
        request = {"content": picture(ONE[0].transpose(1, 2, 0)), "headers": headers}
        request["params"] = {} if parameter is None else {"stream": parameter}
    answer = await shared.client.post(f"{MODEL}/{by}", **request)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200:
        assert f"acme:{answer.json()['parameters']['stream']}" in streams.names()
    seen = await look(shared, ACME, f"/{quote(path, safe='')}")
    if seen.status_code == 200 and "incarnation" in seen.json():
        assert seen.json()["incarnation"] == streams.record(f"acme:{seen.json()['stream']}").incarnation
    assert {name: streams.record(name) for name in streams.names() if not name.startswith("acme:")} == outside
