"""The Ray Serve deployments: a replica that holds one model and answers HTTP itself, and the front."""

import logging
import sys
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from tta_serve.building import build_engine
from tta_serve.config import LimitSettings, ModelSettings, StoreSettings, Tokens
from tta_serve.detection import DetectionEngine
from tta_serve.detection_building import build_detection_engine
from tta_serve.detection_service import DetectionService
from tta_serve.detector_models import LoadedDetector
from tta_serve.front import front_app
from tta_serve.http import ModelRoutes, model_app
from tta_serve.http_detection import DetectionRoutes
from tta_serve.http_routes import Routes
from tta_serve.learner import Pools
from tta_serve.metrics import Metrics
from tta_serve.model_service import Limits
from tta_serve.remembered import Remembered
from tta_serve.service import Service
from tta_serve.store_building import build_sync

log = logging.getLogger(__name__)


def build_service(
    settings: ModelSettings,
    limits: LimitSettings,
    models_on_node: int,
    replica: str,
    store: StoreSettings | None = None,
    tenants: frozenset[str] = frozenset(),
) -> Service | DetectionService:
    """Everything behind the routes of one model.

    Args:
        settings: of the model.
        limits: of one request.
        models_on_node: how many models share the cores.
        replica: the replica's id, for the metrics.
        store: where states live, and what this model was told lies; None: states live in memory.
        tenants: whose streams share nothing with others'.

    Raises:
        ConfigError: see `build_engine`.
    """
    metrics = Metrics(settings.name, replica)
    allowed = Limits(limits.image_pixels, limits.images_per_request, limits.request_pixels)
    if settings.task == "detection":
        detector = build_detection_engine(settings, models_on_node, store, metrics)
        detection = _detection(settings, metrics, allowed, *detector)
        detection.sync = build_sync(detection.engine.streams, store, metrics)
        return detection
    engine, model = build_engine(settings, models_on_node, store, tenants, metrics)
    adaptation = settings.adaptation
    service = Service(
        engine,
        model.input,
        model.labels,
        metrics,
        mode=adaptation.mode if settings.adapter.eata else "labels" if settings.adapter.kv_bottleneck else "frozen",
        limits=allowed,
        batch_rows_max=settings.batching.rows_max,
        queue_rows=settings.batching.queue_rows,
        pools=_pools(settings),
        budget=adaptation.budget,
        remembered=_remembered(settings),
        unknown_above=settings.open_set.unknown_above if settings.open_set else 1.0,
    )
    refresh = engine.heads.refresh if engine.heads else None
    service.sync = build_sync(engine.streams, store, metrics, refresh=refresh)
    return service


def _remembered(settings: ModelSettings) -> Remembered:
    feedback = settings.feedback
    return Remembered(feedback.remember_images, int(feedback.remember_bytes), feedback.remember_s)


def _pools(settings: ModelSettings) -> Pools:
    adaptation = settings.adaptation
    return Pools(adaptation.step_rows, adaptation.step_wait_s, adaptation.queue_rows)


def _detection(
    settings: ModelSettings, metrics: Metrics, limits: Limits, engine: DetectionEngine, loaded: LoadedDetector
) -> DetectionService:
    modtr = settings.adapter.modtr
    learns = engine.aligner is not None or (modtr is not None and modtr.learns != "nothing")
    return DetectionService(
        engine,
        loaded.labels,
        metrics,
        mode=settings.adaptation.mode if learns else "frozen",
        limits=limits,
        batch_rows_max=settings.batching.rows_max,
        queue_rows=settings.batching.queue_rows,
        remembered=_remembered(settings),
        pools=_pools(settings),
        budget=settings.adaptation.budget,
    )


def build_routes(settings: ModelSettings, service: Service | DetectionService, tokens: Tokens) -> Routes:
    """The routes of one model."""
    if isinstance(service, DetectionService):
        return DetectionRoutes(settings.name, lambda: service, tokens)
    return ModelRoutes(settings.name, lambda: service, tokens)


def app_name(model: str) -> str:
    """The Ray Serve application of a model; the prefix keeps a model named `front` apart from the front."""
    return f"model-{model}"


def _log_to_the_workers_file() -> None:
    """Ray Serve lets what a replica writes to `sys.stderr` pass its own level; ours shall be in the worker's log."""
    logger = logging.getLogger("tta_serve")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


class ModelReplica:
    """One replica of one model: Ray Serve's ingress, so that HTTP reaches the model in one hop."""

    def __init__(
        self,
        settings: ModelSettings,
        limits: LimitSettings,
        tokens: Tokens,
        models_on_node: int,
        store: StoreSettings,
    ) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        _log_to_the_workers_file()
        self._service = build_service(
            settings,
            limits,
            models_on_node,
            replica,
            store,
            frozenset(tokens.tenants),
        )
        self._routes = build_routes(settings, self._service, tokens)

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Ray's name for it
        return model_app(self._routes, self._service)

    async def ready(self) -> bool:
        return self._service.ready

    async def metrics_text(self) -> str:
        return self._service.metrics_text()


class FrontReplica:
    """The front application."""

    def __init__(self, names: list[str], tokens: Tokens) -> None:
        self._names = names
        self._tokens = tokens

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return front_app({name: _Remote(name) for name in self._names}, self._tokens)


class _Remote:
    """A model in another process."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def ready(self) -> bool:
        return bool(await self._handle().ready.remote())

    async def metrics_text(self) -> str:
        return str(await self._handle().metrics_text.remote())

    def _handle(self) -> Any:
        return serve.get_app_handle(app_name(self._name))
