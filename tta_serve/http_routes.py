"""What the routes of every model share, whatever its task."""

import reprlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast

from numpy.typing import NDArray
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tta_serve import errors, http_docs
from tta_serve.config import Tokens
from tta_serve.http_streams import StreamRoutes
from tta_serve.model_service import ModelService
from tta_serve.protocol import InferRequest, format_infer, parse_infer

MODEL_VERSION = "1"
INPUT_NAME = "images"
PARSE_INLINE_BYTES = 256 * 1024


class Endpoint(NamedTuple):
    """One row of the table of a model's routes."""

    method: str
    path: str  # below the model's prefix
    answer: Callable[[Request], Awaitable[Response]]
    tag: str
    doc: dict[str, Any] | None = None  # what OpenAPI cannot read off the function


class Routes(Protocol):
    """The routes of one model."""

    @property
    def versioned(self) -> tuple[Endpoint, ...]:
        """Those that are also found below `/versions/1`."""
        ...

    @property
    def table(self) -> tuple[Endpoint, ...]:
        """All of them."""
        ...


def stream_endpoints(service: Callable[[], ModelService], tokens: Tokens) -> tuple[Endpoint, ...]:
    """The routes below `/streams`."""
    streams = StreamRoutes(service, tokens)
    return (
        Endpoint("GET", "/streams", streams.page, "streams", http_docs.PAGE),
        Endpoint("GET", "/streams/{stream}", streams.view, "streams", http_docs.VIEW),
        Endpoint("DELETE", "/streams/{stream}", streams.delete, "streams", http_docs.DELETE),
        Endpoint("GET", "/streams/{stream}/history", streams.history, "streams", http_docs.HISTORY),
        Endpoint("POST", "/streams/{stream}/reset", streams.reset, "streams", http_docs.COMMAND),
        Endpoint("POST", "/streams/{stream}/freeze", streams.freeze, "streams", http_docs.COMMAND),
        Endpoint("POST", "/streams/{stream}/resume", streams.resume, "streams", http_docs.COMMAND),
        Endpoint("POST", "/streams/{stream}/rollback", streams.rollback, "streams", http_docs.ROLLBACK),
    )


def ready_answer(name: str, service: ModelService) -> JSONResponse:
    """Whether the model answers, 200 or 503."""
    degraded = service.health.degraded
    said = {"name": name, "ready": service.ready} | ({"degraded": degraded} if degraded else {})
    return JSONResponse(said, 200 if service.ready else 503)


async def read_infer(request: Request, service: Callable[[], ModelService]) -> InferRequest:
    """The inference request in the body.

    Raises:
        InvalidInput: it is none, or has another input than `images`.
    """
    body = await request.body()
    header_length = request.headers.get("inference-header-content-length")
    if len(body) <= PARSE_INLINE_BYTES:
        asked = parse_infer(body, header_length)
    else:  # megabytes of JSON take a second, in which no other request would be heard
        asked = await service().off_loop(lambda: parse_infer(body, header_length))
    unknown = [name for name in asked.tensors if name != INPUT_NAME]
    if unknown:
        raise errors.InvalidInput(
            f"there is no input named {reprlib.repr(unknown[0])}; this model reads one, {INPUT_NAME!r}"
        )
    return asked


def infer_answer(
    model: str, asked: InferRequest, id: str, parameters: dict[str, Any], outputs: Mapping[str, NDArray[Any]]
) -> Response:
    """An inference response, without the headers of its state.

    Args:
        model: its name.
        asked: what is answered.
        id: of the answer.
        parameters: of the answer.
        outputs: name → array, in order.
    """
    header = {"model_name": model, "model_version": MODEL_VERSION, "id": id, "parameters": parameters}
    content, json_length = format_infer(header, outputs, asked.binary_outputs)
    if json_length is None:
        return Response(content, media_type="application/json")
    headers = {"inference-header-content-length": str(json_length)}
    return Response(content, media_type="application/octet-stream", headers=headers)


async def read_pictures(request: Request, service: ModelService) -> list[bytes]:
    """The pictures in the body: itself, or the files of a multipart form.

    Raises:
        InvalidInput, TooLarge: the form is none, holds a field that is no file, or too many.
    """
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
