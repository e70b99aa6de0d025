"""Routes of one model, the table from errors to statuses, and who may do what."""

import hmac
import logging
import reprlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tta_serve import errors
from tta_serve.config import Tokens
from tta_serve.engine import AnswerKind
from tta_serve.protocol import WireRequest, format_infer, parse_infer
from tta_serve.service import DEFAULT_STREAM, Prediction, Service, probabilities

log = logging.getLogger(__name__)

MODEL_VERSION = "1"
INPUT_NAME = "images"
PARSE_INLINE_BYTES = 256 * 1024
TOP = 5  # classes listed for each image by `predict`
STREAMS_PAGE_MAX = 1000

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


class Options(NamedTuple):
    """What the headers of a prediction say."""

    stream: str
    adapt: bool
    answer: AnswerKind


def read_options(request: Request, parameter_stream: object = None) -> Options:
    """Read `x-session-id`, `x-adapt` and `x-answer`.

    Args:
        request: the request.
        parameter_stream: the parameter `stream`, of the JSON or the query.

    Raises:
        InvalidInput: an unknown value, or a stream named twice and differently.
    """
    if parameter_stream is not None and not isinstance(parameter_stream, str):
        raise errors.InvalidInput(f"the parameter stream is {reprlib.repr(parameter_stream)}, not text")
    header_stream = request.headers.get("x-session-id")
    if header_stream is not None and parameter_stream is not None and header_stream != parameter_stream:
        raise errors.InvalidInput(
            f"the header x-session-id names the stream {header_stream!r}, "
            f"the parameter stream {parameter_stream!r}; give one"
        )
    adapt = request.headers.get("x-adapt", "on")
    answer = request.headers.get("x-answer", "adapted")
    if adapt not in ("on", "off"):
        raise errors.InvalidInput(f"x-adapt is {adapt!r}; it can be on or off")
    if answer not in ("adapted", "frozen", "both"):
        raise errors.InvalidInput(f"x-answer is {answer!r}; it can be adapted, frozen or both")
    named = header_stream if header_stream is not None else parameter_stream
    return Options(DEFAULT_STREAM if named is None else named, adapt == "on", cast(AnswerKind, answer))


def check_token(request: Request, *accepted: str | None) -> None:
    """Raise unless the request carries one of the tokens (`Authorization: Bearer …`)."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise errors.Unauthorized("this needs a token: Authorization: Bearer TOKEN")
    if not any(token and hmac.compare_digest(given.encode(), token.encode()) for token in accepted):
        raise errors.Unauthorized("the token is not valid here")


class Endpoint(NamedTuple):
    """One row of the table of a model's routes."""

    method: str
    path: str  # below the model's prefix
    answer: Callable[[Request], Awaitable[Response]]
    tag: str
    doc: dict[str, Any] | None = None  # what OpenAPI cannot read off the function


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
            Endpoint("POST", "/infer", self.infer, "predict", _INFER_DOC),
        )
        self.table = (
            *self.versioned,
            Endpoint("POST", "/predict", self.predict, "predict", _PREDICT_DOC),
            Endpoint("GET", "/streams", self.streams, "streams", _PAGE_DOC),
            Endpoint("GET", "/streams/{stream}", self.stream, "streams"),
            Endpoint("DELETE", "/streams/{stream}", self.delete, "streams"),
            Endpoint("POST", "/streams/{stream}/reset", self.reset, "streams"),
        )

    async def metadata(self, _: Request) -> JSONResponse:
        """The model's metadata: inputs, outputs, labels and limits."""
        service = self.service()
        shape = [-1, *service.spec.shape]
        classes = len(service.labels)
        outputs = [
            {"name": prefix + name, "datatype": datatype, "shape": list(dims)}
            for prefix in ("", "frozen_")
            for name, datatype, dims in (
                ("labels", "INT64", (-1,)),
                ("probabilities", "FP32", (-1, classes)),
                ("logits", "FP32", (-1, classes)),
            )
        ]
        return JSONResponse(
            {
                "name": self.name,
                "versions": [MODEL_VERSION],
                "platform": "tta-serve_torch",
                "inputs": [{"name": INPUT_NAME, "datatype": "FP32", "shape": shape}],
                "outputs": outputs,
                "parameters": {
                    "labels": list(service.labels),
                    "mode": service.mode,
                    "input": "RGB; FP32 (also FP16, FP64) in 0 … 1, or UINT8 in 0 … 255",
                    "images_per_request": service.limits.images_per_request,
                },
            }
        )

    async def ready(self, _: Request) -> JSONResponse:
        """Whether the model answers."""
        ready = self.service().ready
        return JSONResponse({"name": self.name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        """Open Inference Protocol v2: tensors in, tensors out; JSON, or with binary tensor data."""
        self._may_predict(request)
        body = await request.body()
        header_length = request.headers.get("inference-header-content-length")
        if len(body) <= PARSE_INLINE_BYTES:
            asked = parse_infer(body, header_length)
        else:  # megabytes of JSON take a second, in which no other request would be heard
            asked = await self.service().off_loop(lambda: parse_infer(body, header_length))
        options = read_options(request, asked.parameters.get("stream"))
        unknown = [name for name in asked.tensors if name != INPUT_NAME]
        if unknown:
            raise errors.InvalidInput(
                f"there is no input named {reprlib.repr(unknown[0])}; this model reads one, {INPUT_NAME!r}"
            )
        wanted = _check_outputs(asked.outputs, options.answer)
        service = self.service()
        x = service.to_input(asked.tensors[INPUT_NAME])
        prediction = await service.predict(x, options.stream, adapt=options.adapt, answer=options.answer)
        header = {
            "model_name": self.name,
            "model_version": MODEL_VERSION,
            "id": asked.id or uuid.uuid4().hex,
            "parameters": _state_of(prediction, options),
        }
        service.metrics.count("tta_requests_total", outcome="ok")
        content, json_length = format_infer(header, _outputs(prediction, wanted), asked.binary_outputs)
        headers = _headers_of(prediction)
        if json_length is None:
            return Response(content, media_type="application/json", headers=headers)
        headers["inference-header-content-length"] = str(json_length)
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def predict(self, request: Request) -> Response:
        """Pictures in, labels and scores out: a body of JPEG, PNG or WebP, or multipart with several."""
        self._may_predict(request)
        service = self.service()
        options = read_options(request, request.query_params.get("stream"))
        contents = await self._pictures(request, service)
        x = await service.decode(contents)
        prediction = await service.predict(x, options.stream, adapt=options.adapt, answer=options.answer)
        service.metrics.count("tta_requests_total", outcome="ok")
        content: dict[str, Any] = {
            "model_name": self.name,
            "id": request.headers.get("x-request-id") or uuid.uuid4().hex,
        }
        if prediction.logits is not None:
            content["predictions"] = _ranked(prediction.logits, service.labels)
        if prediction.frozen_logits is not None:
            content["frozen_predictions"] = _ranked(prediction.frozen_logits, service.labels)
        content["parameters"] = _state_of(prediction, options)
        return JSONResponse(content, headers=_headers_of(prediction))

    async def streams(self, request: Request) -> JSONResponse:
        """The streams by name, a page at a time."""
        self._may_predict(request)
        limit = _read_count(request, "limit", default=100, least=1, most=STREAMS_PAGE_MAX)
        offset = _read_count(request, "offset", default=0, least=0, most=2**31)
        service = self.service()
        names = service.engine.stream_names()
        page = [service.view(name)._asdict() for name in names[offset : offset + limit]]
        return JSONResponse({"streams": page, "total": len(names)})

    async def stream(self, request: Request) -> JSONResponse:
        """One stream: version, steps, rows seen and selected, entropy, bytes."""
        self._may_predict(request)
        return JSONResponse(self.service().view(request.path_params["stream"])._asdict())

    async def reset(self, request: Request) -> JSONResponse:
        """Begin the stream anew: its state becomes that of one that has seen nothing. Admin token."""
        self._may_administer(request)
        return JSONResponse(self.service().reset(request.path_params["stream"])._asdict())

    async def delete(self, request: Request) -> JSONResponse:
        """Forget the stream. Admin token."""
        self._may_administer(request)
        stream = request.path_params["stream"]
        self.service().delete(stream)
        return JSONResponse({"deleted": stream})

    def _may_predict(self, request: Request) -> None:
        if self.tokens.infer is not None:
            check_token(request, self.tokens.infer, self.tokens.admin)

    def _may_administer(self, request: Request) -> None:
        if self.tokens.admin is None:
            raise errors.Forbidden(
                "admin routes are closed: the server was started without an admin token; set the environment variable "
                "that auth.admin_token_env names (TTA_ADMIN_TOKEN unless configured) and start it again"
            )
        check_token(request, self.tokens.admin)

    async def _pictures(self, request: Request, service: Service) -> list[bytes]:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return [await request.body()]
        most = service.limits.images_per_request
        try:
            form = await request.form(max_files=most, max_fields=most)
        except HTTPException as error:  # Starlette's own for a form that cannot be parsed or holds too many files
            kind = errors.TooLarge if "Too many" in str(error.detail) else errors.InvalidInput
            raise kind(f"the multipart body: {error.detail} (limits.images_per_request is {most})") from None
        try:
            parts = [part for _, part in form.multi_items()]
            if not all(isinstance(part, UploadFile) for part in parts):
                raise errors.InvalidInput("the multipart body holds a field that is no file; send each image as a file")
            service.check_count(len(parts))
            return [await cast(UploadFile, part).read() for part in parts]
        finally:
            await form.close()


def model_app(routes: ModelRoutes, service: Service) -> ASGIApp:
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
            {"retry-after": str(max(1, round(error.retry_after_s)))} if isinstance(error, errors.Overloaded) else {}
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


def _read_count(request: Request, name: str, *, default: int, least: int, most: int) -> int:
    given = request.query_params.get(name, str(default))
    digits = given.isascii() and given.isdigit() and len(given) < 20
    if not (digits and least <= int(given) <= most):
        raise errors.InvalidInput(f"the parameter {name} is {given[:100]!r}; it can be {least} … {most}")
    return int(given)


def _check_outputs(asked: tuple[str, ...] | None, answer: AnswerKind) -> tuple[str, ...]:
    prefixes = {"adapted": ("",), "frozen": ("frozen_",), "both": ("", "frozen_")}[answer]
    if asked is None:
        return tuple(prefix + name for prefix in prefixes for name in ("labels", "probabilities"))
    known = [prefix + name for prefix in prefixes for name in ("labels", "probabilities", "logits")]
    for name in asked:
        if name not in known:
            raise errors.InvalidInput(
                f"there is no output named {name!r} with x-answer {answer}; there are {', '.join(known)}"
            )
    return asked


def _outputs(prediction: Prediction, wanted: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    outputs: dict[str, NDArray[Any]] = {}
    for full_name in wanted:
        name = full_name.removeprefix("frozen_")
        logits = prediction.frozen_logits if full_name.startswith("frozen_") else prediction.logits
        assert logits is not None  # _check_outputs
        if name == "labels":
            outputs[full_name] = logits.argmax(axis=1).astype(np.int64)
        else:
            outputs[full_name] = probabilities(logits) if name == "probabilities" else logits
    return outputs


def _ranked(logits: NDArray[np.float32], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each image the best label with its score, and the best few."""
    ranked = []
    for probs in probabilities(logits):
        best = np.argsort(-probs, kind="stable")[:TOP]
        scores = [{"label": labels[i], "index": int(i), "score": round(float(probs[i]), 6)} for i in best]
        ranked.append({**scores[0], "scores": scores})
    return ranked


def _state_of(prediction: Prediction, options: Options) -> dict[str, Any]:
    return {"stream": options.stream, "state_version": str(prediction.version), "adapted": prediction.adapted}


def _headers_of(prediction: Prediction) -> dict[str, str]:
    return {"x-state-version": str(prediction.version), "x-adapted": "true" if prediction.adapted else "false"}


_HEADERS_DOC = [
    {"name": name, "in": "header", "schema": schema, "description": text}
    for name, schema, text in (
        ("x-session-id", {"type": "string"}, "The stream; else the parameter `stream`; else `default`."),
        ("x-adapt", {"enum": ["on", "off"]}, "Whether the request may be learned from."),
        ("x-answer", {"enum": ["adapted", "frozen", "both"]}, "Whose answer."),
    )
]
_PAGE_DOC = {
    "parameters": [
        {"name": name, "in": "query", "schema": {"type": "integer", "default": default}}
        for name, default in (("limit", 100), ("offset", 0))
    ]
}
_INFER_DOC = {
    "parameters": [
        *_HEADERS_DOC,
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "schema": {"type": "integer"},
            "description": "Length of the JSON, where binary tensor data follows it.",
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": WireRequest.model_json_schema(ref_template="#/components/schemas/{model}")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
_IMAGE_DOC = {"schema": {"type": "string", "format": "binary"}}
_PREDICT_DOC = {
    "parameters": [*_HEADERS_DOC, {"name": "stream", "in": "query", "schema": {"type": "string"}}],
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": _IMAGE_DOC,
            "image/png": _IMAGE_DOC,
            "image/webp": _IMAGE_DOC,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    },
}
