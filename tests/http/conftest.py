"""The applications of one server, put together in this process as Ray Serve and HAProxy put them together.

The body limit is outermost, `/v2/models/digits` leads to the model, and everything else to the front.
"""

import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import numpy as np
import pytest
import spots
import torch
from numpy.typing import NDArray
from starlette.types import ASGIApp, Receive, Scope, Send

from tta_serve import translators
from tta_serve.bodylimit import BodyLimit
from tta_serve.builtin import digits
from tta_serve.config import LimitSettings, ModelSettings, StoreSettings, Tokens
from tta_serve.detection_service import DetectionService
from tta_serve.front import front_app
from tta_serve.http import ModelRoutes, model_app
from tta_serve.model_service import ModelService
from tta_serve.service import Service

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's modules warn while they are imported; Ray itself is never started here
    from tta_serve.replica import build_routes, build_service

PREFIX = "/v2/models/digits"


class Server(NamedTuple):
    """What a test holds of a running server."""

    client: httpx.AsyncClient
    service: Service


Serving = Callable[..., AbstractAsyncContextManager[Server]]


class Local:
    """A model in this process, as the front reaches one."""

    def __init__(self, service: ModelService) -> None:
        self.service = service

    async def ready(self) -> bool:
        return self.service.ready

    async def metrics_text(self) -> str:
        return self.service.metrics_text()


def composed(model: ASGIApp, front: ASGIApp, body_bytes: int, prefix: str = PREFIX) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == prefix or scope["path"].startswith(f"{prefix}/"):
            await BodyLimit(model, body_bytes)({**scope, "root_path": prefix}, receive, send)
        else:
            await BodyLimit(front, body_bytes)(scope, receive, send)

    return app


@asynccontextmanager
async def _serving(
    *,
    limits: Mapping[str, Any] | None = None,
    infer_token: str | None = None,
    admin_token: str | None = None,
    tenants: Mapping[str, str] | None = None,
    store: Path | None = None,
    replica: str = "r1",
    **model: Any,
) -> AsyncIterator[Server]:
    settings = ModelSettings.model_validate({"name": "digits", "source": {"builtin": "digits"}, **model})
    checked = LimitSettings.model_validate(limits or {})
    tokens = Tokens(infer=infer_token, admin=admin_token, tenants=tenants or {})
    kept = None if store is None else StoreSettings(path=str(store), sync_interval_s=0.1)
    service = build_service(
        settings, checked, models_on_node=1, replica=replica, store=kept, tenants=frozenset(tokens.tenants)
    )
    assert isinstance(service, Service)
    app = model_app(ModelRoutes("digits", lambda: service, tokens), service)
    front = front_app({"digits": Local(service)}, tokens)
    # exceptions that pass the application are answers to the client, not failures of the test
    transport = httpx.ASGITransport(composed(app, front, int(checked.body_bytes)), raise_app_exceptions=False)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield Server(client, service)


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[None]:
    """Start and stop an application as a web server does."""
    to_app_send, to_app = anyio.create_memory_object_stream[Any](1)
    from_app_send, from_app = anyio.create_memory_object_stream[Any](1)
    async with anyio.create_task_group() as tasks, to_app_send, to_app, from_app_send, from_app:
        tasks.start_soon(app, {"type": "lifespan", "state": {}}, to_app.receive, from_app_send.send)
        await to_app_send.send({"type": "lifespan.startup"})
        assert (await from_app.receive())["type"] == "lifespan.startup.complete"
        try:
            yield
        finally:
            await to_app_send.send({"type": "lifespan.shutdown"})
            assert (await from_app.receive())["type"] == "lifespan.shutdown.complete"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def serving() -> Serving:
    """`async with serving(**settings of the model, limits=…, *_token=…, tenants=…, store=…, replica=…)`."""
    return _serving


@pytest.fixture(scope="module")
async def server(anyio_backend: str, serving: Serving) -> AsyncIterator[Server]:
    """One server for a whole module, as it comes."""
    async with serving() as running:
        yield running


@pytest.fixture(scope="session")
def held_out() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images as uint8 [n, 32, 32, 3] that the frozen model is sure of, and their labels."""
    split = digits.split()
    with torch.inference_mode():
        sure, labels = digits.load()(digits.prepare(split.held_out_images)).softmax(dim=1).max(dim=1)
    chosen = (sure > 0.95).numpy() & (labels.numpy() == split.held_out_labels)
    return split.held_out_images[chosen], split.held_out_labels[chosen]


class Detecting(NamedTuple):
    """What a test holds of a running server with a detector."""

    client: httpx.AsyncClient
    service: DetectionService


@pytest.fixture(scope="session")
def detecting(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractAsyncContextManager[Detecting]]:
    """As `serving`, of the model `spots`, which detects; there is a translator for each of `names`."""
    folder = tmp_path_factory.mktemp("translators")

    @asynccontextmanager
    async def make(
        *,
        names: tuple[str, ...] = ("ir",),
        limits: Mapping[str, Any] | None = None,
        infer_token: str | None = None,
        admin_token: str | None = None,
        tenants: Mapping[str, str] | None = None,
        **model: Any,
    ) -> AsyncIterator[Detecting]:
        files: dict[str, Path] = {name: folder / f"{name}.safetensors" for name in names}
        for name, path in files.items():
            translators.save(path, spots.translator_file(name))
        settings = ModelSettings.model_validate(
            {
                "name": "spots",
                "source": {"python": "spots:build"},
                "task": "detection",
                "labels": spots.LABELS,
                "adapter": {"modtr": {"stream_learning_rate": 0.01}},
                "translators": {name: str(path) for name, path in files.items()},
                **model,
            }
        )
        checked = LimitSettings.model_validate(limits or {})
        tokens = Tokens(infer=infer_token, admin=admin_token, tenants=tenants or {})
        service = build_service(settings, checked, models_on_node=1, replica="r1")
        assert isinstance(service, DetectionService)
        app = model_app(build_routes(settings, service, tokens), service)
        whole = composed(app, front_app({"spots": Local(service)}, tokens), int(checked.body_bytes), "/v2/models/spots")
        transport = httpx.ASGITransport(whole, raise_app_exceptions=False)
        async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield Detecting(client, service)

    return make
