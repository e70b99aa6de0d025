import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import pytest
from starlette.types import Message, Receive, Scope, Send

from tta_serve import bodylimit
from tta_serve.bodylimit import BodyLimit, serve_middlewares

LIMIT = 10
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Seen(NamedTuple):
    """What happened to one request."""

    sent: list[Message]  # to the client
    body: bytes  # that the application read
    scope: dict[str, Any]  # that the application got; empty where it was not called
    unread: int  # messages that nobody asked the client for

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> str:
        return str(json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))["error"])


async def read_all(receive: Receive) -> tuple[bytes, bool]:
    """The body, and whether the client left before its end."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body, True
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body, False


def chunks(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": number < last} for number, part in enumerate(parts)]


def request(messages: Iterable[Message], headers: Iterable[tuple[bytes, bytes]] = (), app: App | None = None) -> Seen:
    """Send a request through the middleware to an application that reads it all and answers 200."""
    left, sent = list(messages), []
    scopes: list[dict[str, Any]] = []
    bodies: list[bytes] = []

    async def reader(scope: Scope, receive: Receive, send: Send) -> None:
        body, _ = await read_all(receive)
        bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"read"})

    async def main() -> None:
        async def receive() -> Message:
            if left:
                return left.pop(0)
            return await asyncio.get_running_loop().create_future()  # as a server does while the client stays

        async def send(message: Message) -> None:
            sent.append(message)

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            scopes.append(dict(scope))
            await (app or reader)(scope, receive, send)

        async with asyncio.timeout(20):
            await BodyLimit(inner, LIMIT)({"type": "http", "headers": list(headers)}, receive, send)

    asyncio.run(main())
    return Seen(sent, b"".join(bodies), scopes[0] if scopes else {}, len(left))


def test_a_small_body_passes() -> None:
    seen = request(chunks(b"abc"), [(b"content-length", b"3")])
    assert (seen.status, seen.body) == (200, b"abc")
    assert [message["type"] for message in seen.sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("parts", [(b"x" * LIMIT,), (b"x" * 4, b"y" * 6), (b"x" * LIMIT, b""), (b"",)])
def test_a_body_of_exactly_the_limit_passes(parts: tuple[bytes, ...]) -> None:
    for headers in ([], [(b"content-length", str(len(b"".join(parts))).encode())]):
        seen = request(chunks(*parts), headers)
        assert (seen.status, seen.body) == (200, b"".join(parts))


def test_a_body_declared_too_large_is_refused_unread() -> None:
    seen = request(chunks(b"x" * 11), [(b"content-length", b"11")])
    assert seen.status == 413
    assert seen.error == "the body has 11 bytes; the limit is 10 bytes (limits.body_bytes); send fewer images at once"
    assert seen.unread == 1
    assert seen.scope == {}


def test_a_refusal_is_json_and_closes_the_connection() -> None:
    seen = request([], [(b"content-length", b"11")])
    headers = dict(seen.sent[0]["headers"])
    body = b"".join(message["body"] for message in seen.sent[1:])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"connection"] == b"close"
    assert not seen.sent[-1].get("more_body", False)


@pytest.mark.parametrize("declared", [b"", b"-1", b"1.0", b"ten", b"5, 5", b"\xb2", b"+5", b"9" * 5000])
def test_a_length_that_is_no_number(declared: bytes) -> None:
    seen = request(chunks(b"abc"), [(b"content-length", declared)])
    assert seen.status == 400
    assert seen.error.startswith(f"Content-Length is {declared[:100].decode('latin-1')!r}, not a number")
    assert (seen.scope, seen.unread) == ({}, 1)


def test_a_body_that_turns_out_too_large_is_refused_and_the_client_may_finish() -> None:
    """The chunk that passes the limit is followed by two more, which are read and thrown away."""
    seen = request(chunks(b"x" * 6, b"y" * 6, b"z" * 50, b"end"))
    assert seen.status == 413
    assert seen.error == "the body has more; the limit is 10 bytes (limits.body_bytes); send fewer images at once"
    assert seen.body == b"x" * 6
    assert seen.unread == 0
    assert len([message for message in seen.sent if message["type"] == "http.response.start"]) == 1


def test_a_last_chunk_that_passes_the_limit_is_not_waited_after() -> None:
    seen = request(chunks(b"x" * 6, b"y" * 6))
    assert seen.status == 413
    assert not seen.sent[-1].get("more_body", False)


def test_a_declared_length_does_not_hide_a_larger_body() -> None:
    assert request(chunks(b"x" * 6, b"y" * 6, b""), [(b"content-length", b"6")]).status == 413


def test_a_client_that_leaves_while_it_may_finish() -> None:
    seen = request([*chunks(b"x" * 11, b"never sent")[:1], {"type": "http.disconnect"}])
    assert seen.status == 413


def test_a_client_that_never_finishes_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodylimit, "LINGER_S", 0.01)
    seen = request(chunks(b"x" * 11, b"never sent")[:1])
    assert seen.status == 413
    assert not seen.sent[-1].get("more_body", False)


def test_an_application_that_has_answered_is_not_interrupted() -> None:
    """It reads on after its answer has begun: the limit ends its reading, and its answer stays the only one."""
    left: list[bool] = []

    async def answers_first(_: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 202, "headers": []})
        left.append((await read_all(receive))[1])
        await send({"type": "http.response.body", "body": b"done"})

    seen = request(chunks(b"x" * 6, b"y" * 6, b"z"), app=answers_first)
    assert [message.get("status", message.get("body")) for message in seen.sent] == [202, b"done"]
    assert left == [True]


def test_what_an_application_sends_after_a_refusal_is_dropped() -> None:
    async def stubborn(_: Scope, receive: Receive, send: Send) -> None:
        assert (await read_all(receive))[1]
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"oh"})

    seen = request(chunks(b"x" * 11, b""), app=stubborn)
    assert seen.status == 413
    assert len(seen.sent) == 3  # start, message, end


def test_headers_that_ray_would_obey_are_taken_off() -> None:
    kept = [(b"content-length", b"3"), (b"x-session-id", b"cam"), (b"x-request-id", b"7")]
    rays = [
        (b"x-request-timeout-seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"1"),
        (b"serve_multiplexed_model_id", b"m"),
    ]
    seen = request(chunks(b"abc"), [kept[0], *rays, *kept[1:]])
    assert seen.scope["headers"] == kept


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_everything_else_passes_untouched(kind: str) -> None:
    got: list[Any] = []

    async def app(*args: Any) -> None:
        got.extend(args)

    scope: Scope = {"type": kind, "headers": [(b"content-length", b"999"), (b"x-request-timeout-seconds", b"1")]}

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None: ...

    asyncio.run(BodyLimit(app, LIMIT)(scope, receive, send))
    assert got == [scope, receive, send]


def test_ray_gets_the_limit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bodylimit.BODY_BYTES_ENV, "123")
    (middleware,) = serve_middlewares()
    assert (middleware.cls, middleware.kwargs) == (BodyLimit, {"body_bytes": 123})
    module, _, name = bodylimit.HOOK.partition(":")
    assert (module, getattr(bodylimit, name)) == (bodylimit.__name__, serve_middlewares)
