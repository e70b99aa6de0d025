"""Who may do what."""

import pytest
from payloads import as_binary, picture, tensor

pytestmark = pytest.mark.anyio

MODEL = "/v2/models/digits"
PREDICTIONS = [
    ("POST", "/infer"),
    ("POST", "/predict"),
    ("GET", "/streams"),
    ("GET", "/streams/cam"),
    ("GET", "/streams/cam/history"),
]
ADMIN = [
    *(("POST", f"/streams/cam/{command}") for command in ("freeze", "resume", "rollback", "reset")),
    ("DELETE", "/streams/cam"),
]


@pytest.fixture(scope="module")
async def guarded(anyio_backend, serving, held_out):
    async with serving(infer_token="reader", admin_token="boss") as server:
        await server.client.post(f"{MODEL}/infer", **cam(held_out, "Bearer reader"))
        yield server


def cam(held_out, authorization):
    return as_binary(tensor(held_out[0][:1]), {"x-session-id": "cam", "authorization": authorization, "x-adapt": "off"})


@pytest.mark.parametrize("authorization", [None, "", "reader", "Bearer", "Bearer ", "Basic reader"])
@pytest.mark.parametrize(("method", "path"), PREDICTIONS + ADMIN)
async def test_without_a_token(guarded, method, path, authorization):
    headers = {} if authorization is None else {"authorization": authorization}
    answer = await guarded.client.request(method, MODEL + path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json() == {"error": "this needs a token: Authorization: Bearer TOKEN"}


@pytest.mark.parametrize("token", ["wrong", "READER", "reader ", "readers", "ünï"])
@pytest.mark.parametrize(("method", "path"), PREDICTIONS + ADMIN)
async def test_with_a_wrong_token(guarded, method, path, token):
    answer = await guarded.client.request(method, MODEL + path, headers={"authorization": f"Bearer {token}".encode()})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json() == {"error": "the token is not valid here"}
    assert "cam" in guarded.service.engine.streams.names()


@pytest.mark.parametrize("authorization", ["Bearer reader", "bearer reader", "Bearer boss"])
async def test_either_token_predicts(guarded, held_out, authorization):
    answer = await guarded.client.post(f"{MODEL}/infer", **cam(held_out, authorization))
    assert answer.status_code == 200
    headers = {"authorization": authorization}
    answer = await guarded.client.post(f"{MODEL}/predict", content=picture(held_out[0][0]), headers=headers)
    assert answer.status_code == 200
    assert (await guarded.client.get(f"{MODEL}/streams/cam", headers=headers)).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_the_token_for_predictions_does_not_administer(guarded, method, path):
    answer = await guarded.client.request(method, MODEL + path, headers={"authorization": "Bearer reader"})
    assert answer.status_code == 401
    assert "cam" in guarded.service.engine.streams.names()


async def test_the_admin_token_administers(guarded, held_out):
    boss = {"authorization": "Bearer boss"}
    for method, path in ADMIN:
        body = {"json": {"version": 0}} if path.endswith("rollback") else {}
        answer = await guarded.client.request(method, MODEL + path, headers=boss, **body)
        assert answer.status_code == 200, (path, answer.text)
    assert "cam" not in guarded.service.engine.streams.names()
    await guarded.client.post(f"{MODEL}/infer", **cam(held_out, "Bearer reader"))


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models", MODEL, "/metrics", "/docs"])
async def test_health_and_documentation_are_open(guarded, path):
    assert (await guarded.client.get(path)).status_code == 200


@pytest.fixture(scope="module")
async def without_admin(anyio_backend, serving, held_out):
    async with serving() as server:
        await server.client.post(f"{MODEL}/infer", **cam(held_out, "none"))
        yield server


@pytest.mark.parametrize(("method", "path"), ADMIN)
@pytest.mark.parametrize("authorization", [None, "Bearer None", "Bearer anything"])
async def test_admin_routes_are_closed_without_an_admin_token(without_admin, method, path, authorization):
    headers = {"authorization": authorization} if authorization else {}
    answer = await without_admin.client.request(method, MODEL + path, headers=headers)
    assert answer.status_code == 403
    assert "auth.admin_token_env" in answer.json()["error"]
    assert without_admin.service.engine.streams.names() == ["cam"]
