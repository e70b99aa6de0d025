"""The application at `/`: health, the list of models, metrics of all of them, and the documentation of every route."""

import asyncio
import re
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline

from tta_serve import __version__, metrics
from tta_serve.config import Tokens
from tta_serve.errors import NotFound, Unavailable
from tta_serve.http import ModelRoutes, error_handlers
from tta_serve.http_detection import DetectionRoutes, FeedbackRequest
from tta_serve.protocol import WireRequest

ASK_TIMEOUT_S = 1.0  # a replica that takes longer to say a word counts as not answering


class ModelClient(Protocol):
    """How the front reaches one model."""

    async def ready(self) -> bool: ...

    async def metrics_text(self) -> str: ...


def front_app(models: Mapping[str, ModelClient], tokens: Tokens) -> FastAPI:
    """Build the front application.

    Args:
        models: by name.
        tokens: who may do what.
    """
    app = FastAPIOffline(title="tta-serve", version=__version__, redoc_url=None)  # its pages need no internet
    router = APIRouter(tags=["server"])

    @router.get("/")
    async def home() -> JSONResponse:
        """Where everything is."""
        links = {"docs": "/docs", "openapi": "/openapi.json", "metrics": "/metrics", "health": "/v2/health/ready"}
        return JSONResponse(
            {"name": "tta-serve", "version": __version__, "models": [f"/v2/models/{m}" for m in models], **links}
        )

    @router.get("/v2")
    async def server_metadata() -> JSONResponse:
        """The server's metadata."""
        return JSONResponse({"name": "tta-serve", "version": __version__, "extensions": ["binary_tensor_data"]})

    @router.get("/v2/health/live")
    async def live() -> JSONResponse:
        """Whether the server runs."""
        return JSONResponse({"live": True})

    @router.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        """Whether every model answers."""
        answers = dict(zip(models, await asyncio.gather(*map(_ready, models.values())), strict=True))
        return JSONResponse({"ready": all(answers.values()), "models": answers}, 200 if all(answers.values()) else 503)

    @router.get("/v2/models")
    async def model_list() -> JSONResponse:
        """The models."""
        return JSONResponse({"models": [{"name": name, "url": f"/v2/models/{name}"} for name in models]})

    @router.get("/metrics")
    async def all_metrics() -> Response:
        """Prometheus metrics of all replicas; `tta_replica_scrape_ok` is 0 for one that did not answer."""
        texts = await asyncio.gather(*map(_metrics, models.values()))
        scraped = ["# HELP tta_replica_scrape_ok Whether the replica answered.", "# TYPE tta_replica_scrape_ok gauge"]
        scraped += [
            f'tta_replica_scrape_ok{{model="{name}"}} {int(text is not None)}'
            for name, text in zip(models, texts, strict=True)
        ]
        merged = metrics.merge([*(text for text in texts if text is not None), "\n".join(scraped) + "\n"])
        return Response(merged, media_type=metrics.CONTENT_TYPE)

    async def nothing_here(request: Request) -> Response:
        path = request.url.path
        name = path.split("/")[3] if path.startswith("/v2/models/") else None
        if name and name not in models:
            raise NotFound(f"there is no model named {name!r}; there are {', '.join(models)} (GET /v2/models)")
        raise NotFound(f"there is nothing at {path}; GET / lists what there is")

    app.include_router(router)
    app.add_api_route(
        "/{path:path}", nothing_here, methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False
    )
    for kind, answer in error_handlers(lambda _: None).items():
        app.add_exception_handler(kind, answer)
    app.openapi = lambda: _openapi(app, tokens)  # type: ignore[method-assign]
    return app


async def _ready(model: ModelClient) -> bool:
    try:
        return await asyncio.wait_for(model.ready(), ASK_TIMEOUT_S)
    except Exception:  # noqa: BLE001  # whatever keeps it from answering, it is not ready
        return False


async def _metrics(model: ModelClient) -> str | None:
    try:
        return await asyncio.wait_for(model.metrics_text(), ASK_TIMEOUT_S)
    except Exception:  # noqa: BLE001  # shown as tta_replica_scrape_ok 0
        return None


def _openapi(app: FastAPI, tokens: Tokens) -> dict[str, Any]:
    """One description of the front's routes and of those that every model has."""

    def no_service() -> NoReturn:
        raise Unavailable("these routes only describe those of the models")

    documented = APIRouter()
    tables = (*ModelRoutes("{model}", no_service, tokens).table, *DetectionRoutes("{model}", no_service, tokens).table)
    # a route of both kinds of model is described once; the detector's description knows one header more
    for each in {(each.method, each.path): each for each in tables}.values():
        path = f"/v2/models/{{model}}{each.path}".removesuffix("/")
        documented.add_api_route(path, each.answer, methods=[each.method], tags=[each.tag], openapi_extra=each.doc)
    schema = get_openapi(title=app.title, version=app.version, routes=[*app.routes, *documented.routes])
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    for body in (WireRequest, FeedbackRequest):
        schemas.update(body.model_json_schema(ref_template="#/components/schemas/{model}")["$defs"])
    for path, operations in schema["paths"].items():
        for name in re.findall(r"{(\w+)}", path):
            described = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for operation in operations.values():
                operation.setdefault("parameters", []).append(described)
    return schema
