"""Routes of one model's streams: to look at them, for all who may predict; to command them, with the admin token."""

from collections.abc import Awaitable, Callable

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from tta_serve import errors
from tta_serve.access import may_administer, may_predict
from tta_serve.config import Tokens
from tta_serve.http_answers import problem_of, reached, read_count
from tta_serve.model_service import Commanded, ModelService

STREAMS_PAGE_MAX = 1000
OFFSET_MAX = 2**31


class RollbackRequest(BaseModel):
    """The body of a rollback."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=0, lt=2**63, description="One of the stream's `versions`.")


class StreamRoutes:
    """The routes below `/streams`.

    Args:
        service: called at each request, so that the routes can be documented without one.
        tokens: who may do what.
    """

    def __init__(self, service: Callable[[], ModelService], tokens: Tokens) -> None:
        self.service = service
        self.tokens = tokens

    async def page(self, request: Request) -> JSONResponse:
        """The streams by name, a page at a time."""
        reach = may_predict(self.tokens, _authorization(request))
        limit = read_count(request, "limit", default=100, least=1, most=STREAMS_PAGE_MAX)
        offset = read_count(request, "offset", default=0, least=0, most=OFFSET_MAX)
        service = self.service()
        views, total = await service.with_store(
            lambda: service.streams(limit, offset, reach.prefix, without=reach.without)
        )
        shown = [view._replace(stream=reach.shown(view.stream))._asdict() for view in views]
        return JSONResponse({"streams": shown, "total": total})

    async def view(self, request: Request) -> JSONResponse:
        """One stream: version, steps, rows seen and selected, entropy, guards, bytes."""
        reach = may_predict(self.tokens, _authorization(request))
        service, stream = self.service(), reach.full(request.path_params["stream"])
        view = await service.with_store(lambda: service.view(stream))
        return JSONResponse(view._replace(stream=reach.shown(view.stream))._asdict())

    async def history(self, request: Request) -> JSONResponse:
        """What happened to the stream of late, and the versions that it can be rolled back to."""
        reach = may_predict(self.tokens, _authorization(request))
        service, stream = self.service(), reach.full(request.path_params["stream"])
        history = await service.with_store(lambda: service.history(stream))
        events = [event._asdict() for event in history.events]
        return JSONResponse({**history._asdict(), "stream": reach.shown(history.stream), "events": events})

    async def reset(self, request: Request) -> JSONResponse:
        """Begin the stream anew: its state becomes that of one that has seen nothing. Admin token."""
        return await self._command(request, self.service().reset)

    async def freeze(self, request: Request) -> JSONResponse:
        """Let the stream answer as it does now, and learn nothing until it is resumed. Admin token."""
        return await self._command(request, self.service().freeze)

    async def resume(self, request: Request) -> JSONResponse:
        """Let a frozen stream learn again. Admin token."""
        return await self._command(request, self.service().resume)

    async def rollback(self, request: Request) -> JSONResponse:
        """Go back to the state of a kept version, under a new version. Admin token."""
        may_administer(self.tokens, _authorization(request))
        version = parse_rollback(await request.body())
        return _commanded(await self.service().rollback(request.path_params["stream"], version))

    async def delete(self, request: Request) -> JSONResponse:
        """Forget the stream: its state, the versions kept of it, and rows that wait. Admin token."""
        may_administer(self.tokens, _authorization(request))
        stream = request.path_params["stream"]
        deleted = await self.service().delete(stream)
        receipt = {"receipt": deleted.receipt._asdict()} if deleted.receipt else {}
        return reached({"deleted": stream, **receipt}, deleted.number, deleted.waiting)

    async def _command(self, request: Request, command: Callable[[str], Awaitable[Commanded]]) -> JSONResponse:
        may_administer(self.tokens, _authorization(request))
        return _commanded(await command(request.path_params["stream"]))


def _commanded(done: Commanded) -> JSONResponse:
    return reached(done.view._asdict(), done.number, done.waiting)


def parse_rollback(body: bytes) -> int:
    """The version that the body of a rollback names.

    >>> parse_rollback(b'{"version": 32}')
    32

    Raises:
        InvalidInput: anything else.
    """
    try:
        return RollbackRequest.model_validate_json(body).version
    except ValidationError as error:
        raise errors.InvalidInput(
            f'the body must be {{"version": n}}, n one of the stream\'s versions; {problem_of(error)}'
        ) from None


def _authorization(request: Request) -> str:
    return request.headers.get("authorization", "")
