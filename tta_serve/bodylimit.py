"""The outermost layer of every application: refuses bodies over the limit before anything buffers them.

Ray Serve reads a request's body into memory while the application has not asked for it, so the limit has to stand
outside of Ray's own layers: `serve_middlewares` is named to Ray as the hook for that.
"""

import asyncio
import contextlib
import json
import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES_ENV = "TTA_SERVE_BODY_BYTES"  # set by `app.up` for the processes that Ray starts
HOOK = "tta_serve.bodylimit:serve_middlewares"

LINGER_S = 10.0  # how long a refused client may go on sending

# Ray Serve obeys these from any client, and answers some of them with plain text; ours are the only limits
_RAY_HEADERS = frozenset(
    (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve_multiplexed_model_id")
)


class BodyLimit:
    """ASGI middleware: 413 for a body over the limit, by its header at once or by counting.

    Args:
        app: the application behind.
        body_bytes: the limit.
    """

    def __init__(self, app: ASGIApp, body_bytes: int) -> None:
        self.app = app
        self.body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not declared.isdigit() or len(declared) > 19:
            await _refuse(send, 400, f"Content-Length is {declared[:100].decode('latin-1')!r}, not a number of bytes")
            return
        if int(declared) > self.body_bytes:
            await _refuse(send, 413, self._message(f"{int(declared)} bytes"))
            return
        scope = {**scope, "headers": [each for each in scope["headers"] if each[0] not in _RAY_HEADERS]}
        seen = 0
        answered = refused = False

        async def counted() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen <= self.body_bytes:
                return message
            if not (answered or refused):
                refused = True
                await _refuse(send, 413, self._message("more"), linger_on=receive if message.get("more_body") else None)
            return {"type": "http.disconnect"}

        async def unless_refused(message: Message) -> None:
            nonlocal answered
            if not refused:
                answered = True
                await send(message)

        await self.app(scope, counted, unless_refused)

    def _message(self, found: str) -> str:
        return (
            f"the body has {found}; the limit is {self.body_bytes} bytes (limits.body_bytes); send fewer images at once"
        )


async def _refuse(send: Send, status: int, message: str, linger_on: Receive | None = None) -> None:
    """Answer, and close.

    Where the client is in the middle of its body, let it go on for a while (as nginx's lingering close does): many
    clients read nothing before they have written everything.
    """
    body = json.dumps({"error": message}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while linger_on and (await linger_on()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b""})


def serve_middlewares() -> list[Middleware]:
    """What Ray Serve puts around every application."""
    return [Middleware(BodyLimit, body_bytes=int(os.environ[BODY_BYTES_ENV]))]
