"""From settings to an engine: the model, its adapters, and what looks at its streams."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters import Pipeline
from adapters.drift import Drift, drift_prior
from adapters.forgetting import Forgetting, Probe, unlabelled_probe
from adapters.open_set import OpenSet
from tta_serve import models, pipelines
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.engine import Engine, cores, pick_device, plan_threads, to_unit
from tta_serve.errors import ConfigError
from tta_serve.head_building import build_heads
from tta_serve.metrics import Metrics
from tta_serve.models import LoadedModel
from tta_serve.monitor import Monitor
from tta_serve.runtime import build_runtime
from tta_serve.store_building import build_durable, generation_of, label_folder

DRIFT_IMAGES = 512  # of the source; their moments are all in memory for a moment
PROBE_IMAGES = 256  # forgetting is measured while the server learns, and its budget pays
BATCH = 64


def build_engine(
    settings: ModelSettings,
    models_on_node: int = 1,
    store: StoreSettings | None = None,
    tenants: frozenset[str] = frozenset(),
    metrics: Metrics | None = None,
) -> tuple[Engine, LoadedModel]:
    """Load the model and make ready to serve it.

    Args:
        settings: of the model.
        models_on_node: how many models share the cores.
        store: where states live, and what was told lies; None: states live in memory, and kv_bottleneck cannot be.
        tenants: whose streams share no labels with others'.
        metrics: of the replica; None: nobody looks at them.

    Raises:
        ConfigError: the model, its adapter, its device, its prior or its probe cannot be had.
    """
    device = pick_device(settings.device)
    before = torch.get_num_threads()
    torch.set_num_threads(cores())  # nothing is served yet: loading and the Fisher diagonal may have them all
    try:
        model = models.load(settings)
        pipeline = pipelines.build(settings, model, device)
        monitor = build_monitor(settings, model, pipeline)
        heads = None
        if settings.adapter.kv_bottleneck:
            if store is None:
                raise ConfigError(f"models.{settings.name}: kv_bottleneck needs store.path")
            folder = label_folder(store, settings.name)
            fusion, heads = build_heads(settings, model, pipeline.network, folder, tenants)
            pipeline = Pipeline(pipeline.network, norm=pipeline.norm, head=fusion)
        open_set = _open_set(settings, model, pipeline) if settings.open_set else None
    finally:
        torch.set_num_threads(before)
    threads = plan_threads(cores(), models_on_node) if settings.threads == "auto" else settings.threads
    runtime = build_runtime(settings.runtime, pipeline.network, model.input.shape, settings.batching.rows_max, threads)
    durable = build_durable(
        settings,
        store,
        metrics or Metrics(settings.name, "replica"),
        generation_of(pipeline.network.model.state_dict(), _meaning(settings)),
        pipeline.init()._replace(head=()),
        pipeline.merging(),
    )
    engine = Engine(
        pipeline,
        device,
        settings.streams.max,
        threads,
        resident=settings.streams.resident,
        new_per_minute=settings.streams.new_per_minute,
        durable=durable,
        monitor=monitor,
        batch_streams_max=settings.batching.rows_max,
        runtime=runtime,
        heads=heads,
        open_set=open_set,
    )
    try:
        torch.set_num_threads(threads)  # as the threads that will serve: a compiled graph is for so many
        engine.warm(model.input.shape)
    except Exception as error:
        raise ConfigError(
            f"models.{settings.name}: the model loads, but a trial of predicting and adapting fails: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_num_threads(before)
    return engine, model


def _meaning(settings: ModelSettings) -> dict[str, Any]:
    """Of the settings, what gives a stream's state its meaning: labels are kept elsewhere."""
    return settings.adapter.model_dump(mode="json", include={"eata", "source"})


def build_monitor(settings: ModelSettings, model: LoadedModel, pipeline: Pipeline) -> Monitor | None:
    """What looks at the streams; None where nothing is learned, or where the papers' protocol is followed.

    Raises:
        ConfigError: the prior's or the probe's images cannot be had.
    """
    adaptation = settings.adaptation
    if settings.adapter.eata is None or adaptation.mode == "sync":
        return None
    network = pipeline.network
    source = _source_images(model)
    drift = None
    if source is not None:
        batches = (part.to(network.scale.device).float() / 255 for part in torch.split(source[:DRIFT_IMAGES], BATCH))
        try:
            drift = Drift(network, drift_prior(network, batches))
        except ValueError as error:
            raise ConfigError(f"models.{settings.name}: the images of its prior or probe: {error}") from error
    forgetting = None
    if model.probe is not None:
        forgetting = Forgetting(network, _probe(model.probe, model, pipeline), batch_rows=BATCH)
    return Monitor(pipeline, drift, forgetting, adaptation.forgetting_max, gate=adaptation.gate)


@torch.no_grad()
def _open_set(settings: ModelSettings, model: LoadedModel, pipeline: Pipeline) -> OpenSet:
    images = _source_images(model)
    if images is None:
        raise ConfigError(
            f"models.{settings.name}.open_set: needs `prior` or `adaptation.probe`: an .npz with source `images`"
        )
    network = pipeline.network
    batches = torch.split(images[:DRIFT_IMAGES], BATCH)
    try:
        return OpenSet(torch.cat([network(to_unit(x.to(network.scale.device))).logits.logsumexp(1) for x in batches]))
    except ValueError as error:
        raise ConfigError(f"models.{settings.name}.open_set: {error}") from error


def _source_images(model: LoadedModel) -> Tensor | None:
    """Images of the source, uint8 [N, 3, H, W]: the prior's, or else the probe's."""
    for what, path in (("prior", model.prior), ("probe", model.probe)):
        if path is not None and path.suffix == ".npz":
            return _spread(pipelines.read_images(path, model.input, what), DRIFT_IMAGES)
    return None


def _probe(path: Path, model: LoadedModel, pipeline: Pipeline) -> Probe:
    images = pipelines.read_images(path, model.input, "probe")
    x = _spread(images, PROBE_IMAGES).to(pipeline.network.scale.device).float() / 255
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            labels = archive.get("labels")
    except ValueError as error:  # pickled objects
        raise ConfigError(f"probe: {path} holds no readable array `labels`: {error}") from error
    if labels is None:
        return unlabelled_probe(pipeline.network, x, BATCH)
    numbers = labels.size > 0 and labels.dtype.kind in "iu"
    spread = f" from {labels.min()} to {labels.max()}" if numbers else ""
    enough = labels.ndim == 1 and len(labels) >= len(images)
    if not (numbers and enough and labels.min() >= 0 and labels.max() < len(model.labels)):
        raise ConfigError(
            f"probe: `labels` of {path} is {labels.dtype} {list(labels.shape)}{spread}; it must hold one class number, "
            f"0 … {len(model.labels) - 1}, for each image"
        )
    chosen = _spread(torch.from_numpy(labels[: len(images)].astype(np.int64)), PROBE_IMAGES)
    return Probe(x, chosen.to(x.device))


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, from all over: files may be sorted by class."""
    return rows[:: math.ceil(len(rows) / count)] if len(rows) > count else rows
