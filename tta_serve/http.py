"""Routes of one model, and the table from errors to statuses."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import ceil
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tta_serve import errors, http_docs
from tta_serve.access import may_predict
from tta_serve.config import Tokens
from tta_serve.http_answers import check_outputs, headers_of, outputs_of, ranked, read_options, state_of
from tta_serve.http_labels import ForgetRequest, LabelRoutes, LabelsRequest
from tta_serve.http_routes import (
    INPUT_NAME,
    MODEL_VERSION,
    Endpoint,
    Routes,
    infer_answer,
    read_infer,
    read_pictures,
    ready_answer,
    stream_endpoints,
)
from tta_serve.model_service import ModelService
from tta_serve.service import Service

log = logging.getLogger(__name__)


STATUS: dict[type[errors.TTAError], int] = {
    errors.InvalidInput: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.TooLarge: 413,
    errors.Overloaded: 429,
    errors.Unavailable: 503,
    errors.ConfigError: 500,
}
_OUTCOME = {400: "invalid", 413: "invalid", 401: "refused", 403: "refused", 404: "invalid", 429: "refused"}


class ModelRoutes:
    """The routes of one model, below its prefix.

    Args:
        name: the model's name.
        service: called at each request, so that the routes can be documented without one.
        tokens: who may do what.
    """

    def __init__(self, name: str, service: Callable[[], Service], tokens: Tokens) -> None:
        self.name = name
        self.service = service
        self.tokens = tokens
        self.versioned = (
            Endpoint("GET", "/", self.metadata, "model"),
            Endpoint("GET", "/ready", self.ready, "model"),
            Endpoint("POST", "/infer", self.infer, "predict", http_docs.INFER),
        )
        labels = LabelRoutes(name, service, tokens)
        self.table = (
            *self.versioned,
            Endpoint("POST", "/predict", self.predict, "predict", http_docs.PREDICT),
            Endpoint("POST", "/feedback", labels.feedback, "feedback", http_docs.feedback(LabelsRequest)),
            Endpoint("POST", "/forget", labels.forget, "feedback", http_docs.forget(ForgetRequest)),
            Endpoint("GET", "/queries", labels.queries, "feedback", http_docs.QUERIES),
            *stream_endpoints(service, tokens),
        )

    async def metadata(self, request: Request) -> JSONResponse:
        """The model's metadata: inputs, outputs, labels and limits; labels as the stream has them that is named."""
        service = self.service()
        labels = await service.off_loop(lambda: self._labels(request))
        shape = [-1, *service.spec.shape]
        outputs = [
            {"name": prefix + name, "datatype": datatype, "shape": list(dims)}
            for prefix, classes in (("", len(labels)), ("frozen_", len(service.labels)))
            for name, datatype, dims in (
                ("labels", "INT64", (-1,)),
                ("probabilities", "FP32", (-1, classes)),
                ("logits", "FP32", (-1, classes)),
            )
        ]
        if service.engine.open_set:
            outputs.append({"name": "unknown", "datatype": "FP32", "shape": [-1]})
        return JSONResponse(
            {
                "name": self.name,
                "versions": [MODEL_VERSION],
                "platform": "tta-serve_torch",
                "inputs": [{"name": INPUT_NAME, "datatype": "FP32", "shape": shape}],
                "outputs": outputs,
                "parameters": {
                    "labels": list(labels),
                    "mode": service.mode,
                    "input": "RGB; FP32 (also FP16, FP64) in 0 … 1, or UINT8 in 0 … 255",
                    "images_per_request": service.limits.images_per_request,
                },
            }
        )

    def _labels(self, request: Request) -> tuple[str, ...]:
        """As the stream has them that is named; the model's own to whoever names none, and shows no token."""
        authorization = _authorization(request)
        is_open = self.tokens.infer is None and not self.tokens.tenants
        names_one = "x-session-id" in request.headers or "stream" in request.query_params
        if not (is_open or names_one or authorization):
            return self.service().labels
        stream = read_options(request, request.query_params.get("stream")).stream
        return self.service().labels_of(may_predict(self.tokens, authorization).full(stream))

    async def ready(self, _: Request) -> JSONResponse:
        """Whether the model answers."""
        return ready_answer(self.name, self.service())

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol v2: tensors in, tensors out; JSON, or with binary tensor data."""
        reach = may_predict(self.tokens, _authorization(request))
        asked = await read_infer(request, self.service)
        options = read_options(request, asked.parameters.get("stream"))
        stream = reach.full(options.stream)
        service = self.service()
        wanted = check_outputs(asked.outputs, options.answer, service.engine.open_set is not None)
        id = asked.id or service.new_id()
        x = service.to_input(asked.tensors[INPUT_NAME])
        prediction = await service.predict(x, stream, id=id, adapt=options.adapt, answer=options.answer)
        service.metrics.count("tta_requests_total", outcome="ok")
        state, outputs = state_of(prediction, options), outputs_of(prediction, wanted)
        answer = infer_answer(self.name, asked, id, state, outputs)
        answer.headers.update(headers_of(prediction))
        return answer

    async def predict(self, request: Request) -> Response:
        """Pictures in, labels and scores out: a body of JPEG, PNG or WebP, or multipart with several."""
        reach = may_predict(self.tokens, _authorization(request))
        service = self.service()
        options = read_options(request, request.query_params.get("stream"))
        stream = reach.full(options.stream)
        contents = await read_pictures(request, service)
        id = request.headers.get("x-request-id") or service.new_id()
        x = await service.decode(contents)
        prediction = await service.predict(x, stream, id=id, adapt=options.adapt, answer=options.answer)
        service.metrics.count("tta_requests_total", outcome="ok")
        content: dict[str, Any] = {"model_name": self.name, "id": id}
        if prediction.logits is not None:
            content["predictions"] = ranked(prediction.logits, (*service.labels, *prediction.added), prediction.unknown)
        if prediction.frozen_logits is not None:
            content["frozen_predictions"] = ranked(prediction.frozen_logits, service.labels)
        content["parameters"] = state_of(prediction, options)
        return JSONResponse(content, headers=headers_of(prediction))


def _authorization(request: Request) -> str:
    return request.headers.get("authorization", "")


def model_app(routes: Routes, service: ModelService) -> ASGIApp:
    """The application of one model, relative to the prefix that it is mounted at; runs the service while it lives."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    # Starlette and not FastAPI: nothing here is parsed by FastAPI, and its layers cost a third of a small request
    below_version = [each._replace(path=f"/versions/{MODEL_VERSION}{each.path}") for each in routes.versioned]
    app = Starlette(
        routes=[
            Route(each.path.removesuffix("/") or "/", each.answer, methods=[each.method])
            for each in (*routes.table, *below_version)
        ],
        exception_handlers=error_handlers(lambda outcome: service.metrics.count("tta_requests_total", outcome=outcome)),
        lifespan=lifespan,
    )
    return WithoutTrailingSlash(app)


class WithoutTrailingSlash:
    """ASGI: lets `/v2/models/m` reach the route `/` of the application mounted there, as `/v2/models/m/` does."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == scope.get("root_path", ""):
            scope = {**scope, "path": scope["path"] + "/"}
        await self.app(scope, receive, send)


def error_handlers(count: Callable[[str], None]) -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """Answers to every error, as `{"error": …}`; `count` is told the outcome of each."""

    async def ours(_: Request, error: Exception) -> Response:
        status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
        headers = (
            {"retry-after": str(max(1, ceil(error.retry_after_s)))} if isinstance(error, errors.Overloaded) else {}
        )
        if isinstance(error, errors.Unauthorized):
            headers["www-authenticate"] = "Bearer"
        count(_OUTCOME.get(status, "failed"))
        return JSONResponse({"error": str(error)}, status, headers)

    async def routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        count("invalid")
        return JSONResponse({"error": what.get(error.status_code, error.detail)}, error.status_code, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        count("failed")
        return JSONResponse({"error": "an internal error; the server's log says more"}, 500)

    async def gone(_: Request, __: Exception) -> Response:
        count("gone")
        return Response(status_code=499)  # nobody reads it

    return {errors.TTAError: ours, HTTPException: routing, ClientDisconnect: gone, Exception: unexpected}
