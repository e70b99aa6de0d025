"""From settings to a detection engine: the detector, its translators and their probes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters import AdapterError, Alignment, AlignmentConfig, alignment_prior, tree
from adapters.guards import GuardConfig, Guarded
from tta_serve import coco, detector_models, modalities, pipelines, translators
from tta_serve.builtin import scenes
from tta_serve.config import RGB, AlignmentSettings, ModelSettings, ModTrSettings, StoreSettings
from tta_serve.detection import DetectionEngine, Sight, init_of, merging_of
from tta_serve.detector_models import LoadedDetector
from tta_serve.detectors import NO_BACKBONE, TRIAL_PIXELS
from tta_serve.engine import cores, pick_device, plan_threads, to_unit
from tta_serve.errors import ConfigError, InvalidInput
from tta_serve.metrics import Metrics
from tta_serve.modalities import Modality, Probe
from tta_serve.store_building import build_durable, generation_of

SOURCE_IMAGES = 512  # whose feature maps are measured when a server starts …
SOURCE_BATCH = 16  # … in batches of so many
SOURCE_SEED = 21  # of the built-in detector's scenes
SELECTED_ROWS_NEVER = 2**62  # rows in a row
TRIAL_STREAM = "trial"


def build_detection_engine(
    settings: ModelSettings,
    models_on_node: int = 1,
    store: StoreSettings | None = None,
    metrics: Metrics | None = None,
) -> tuple[DetectionEngine, LoadedDetector]:
    """Load the detector and its translators and make ready to serve them.

    Args:
        settings: of the model.
        models_on_node: how many models share the cores.
        store: where states live; None: in memory.
        metrics: of the replica; None: nobody looks at them.

    Raises:
        ConfigError: the detector, its device, a translator or a probe cannot be had.
    """
    adapter = settings.adapter.modtr or ModTrSettings(learns="nothing")
    loaded = detector_models.load(settings)
    try:
        loaded.detector.to(pick_device(settings.device))
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
        raise ConfigError(f"models.{settings.name}.device: {settings.device}: {str(error).splitlines()[0]}") from None
    known = {name: _modality(settings, adapter, name, loaded) for name in settings.translators}
    if settings.source.builtin and not known and settings.adapter.modtr:
        known = {
            name: _begun(path, adapter, name, loaded) for name, path in detector_models.BUILTIN_TRANSLATORS.items()
        }
    norm = None if settings.adapter.alignment is None else _alignment(settings, settings.adapter.alignment, loaded)
    threads = plan_threads(cores(), models_on_node) if settings.threads == "auto" else settings.threads
    durable = build_durable(
        settings,
        store,
        metrics or Metrics(settings.name, "replica"),
        _generation(settings, loaded, known),
        init_of(known, norm),
        merging_of(known, norm),
    )
    engine = DetectionEngine(
        loaded.detector,
        known,
        adapter,
        loaded.digest,
        threads,
        norm,
        streams_max=settings.streams.max,
        resident=settings.streams.resident,
        new_per_minute=settings.streams.new_per_minute,
        durable=durable,
        batch_streams_max=settings.batching.rows_max,
    )
    _try(settings, engine)
    return engine, loaded


def _generation(settings: ModelSettings, loaded: LoadedDetector, known: Mapping[str, Modality]) -> str:
    """What gives a stream's state its meaning: the detector, the translators, and the adapters' settings."""
    files = {name: tree.digest(tuple(modality.file.weights.values())) for name, modality in known.items()}
    return generation_of({}, loaded.digest, files, settings.adapter.model_dump(mode="json"))


def _alignment(settings: ModelSettings, chosen: AlignmentSettings, loaded: LoadedDetector) -> Guarded:
    """The adapter of the detector's own normalisation layers, with what its feature maps are like on source images."""
    where, network = f"models.{settings.name}.adapter.alignment", loaded.detector.network
    if network is None:
        raise ConfigError(f"{where}: {NO_BACKBONE}")
    detector = loaded.detector
    images = [detector.prepare(to_unit(image.to(detector.device))) for image in _source_images(settings)]
    canvases = {detector.canvas((image.shape[-2], image.shape[-1])) for image in images}
    if len(canvases) > 1:
        raise ConfigError(f"{where}: the images of `prior` are padded to {len(canvases)} sizes; they must have one")
    batches = (detector.pixels(images[first : first + SOURCE_BATCH]) for first in range(0, len(images), SOURCE_BATCH))
    config = AlignmentConfig(
        learning_rate=chosen.learning_rate,
        drift_max=chosen.drift_max,
        source_images=chosen.source_images,
        stream_images_max=chosen.stream_images_max,
    )
    try:
        alignment = Alignment(network, alignment_prior(network, batches), config)
    except (AdapterError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    # rows selected are those of streams that have drifted: none of a clean camera, all of one in fog, and both are well
    return Guarded(alignment, GuardConfig(selected_rows=SELECTED_ROWS_NEVER))


def _source_images(settings: ModelSettings) -> Sequence[Tensor]:
    """Images that the detector was made for, uint8 [3, H, W] each."""
    if settings.prior is None:  # the configuration has seen to it that this is the built-in one
        made = scenes.scenes(SOURCE_IMAGES, SOURCE_SEED, held_out=False)
        return [torch.from_numpy(scene.image).permute(2, 0, 1) for scene in made]
    return list(pipelines.read_raw_images(settings.prior, "prior")[:SOURCE_IMAGES])


def _modality(settings: ModelSettings, adapter: ModTrSettings, name: str, loaded: LoadedDetector) -> Modality:
    given = settings.translators[name]
    where = f"models.{settings.name}.translators.{name}"
    try:
        if given.probe is None:
            return _begun(given.file, adapter, name, loaded)
        probe = modalities.probe_of(coco.read(given.probe, loaded.labels).examples, loaded.detector)
        return _begun(given.file, adapter, name, loaded, probe)
    except (InvalidInput, ConfigError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _begun(
    path: Path, adapter: ModTrSettings, name: str, loaded: LoadedDetector, probe: Probe | None = None
) -> Modality:
    modality = modalities.begin(translators.load(path, loaded.digest, name), loaded.detector, adapter, probe)
    modalities.check(modality, loaded.detector)
    return modality


def _try(settings: ModelSettings, engine: DetectionEngine) -> None:
    """Look at one blank image of each modality: what cannot run at all fails here and not in the first request."""
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads)
    names = (RGB, *engine.modalities)
    blank = torch.zeros(3, TRIAL_PIXELS, TRIAL_PIXELS, dtype=torch.uint8)
    try:
        engine.streams.lease_until_s = -math.inf  # a trial begins no stream, wherever streams live
        engine.predict([Sight((blank,) * len(names), names, TRIAL_STREAM)])
        engine.streams.lease_until_s = math.inf
    except Exception as error:
        raise ConfigError(
            f"models.{settings.name}: the model loads, but a trial of looking fails: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_num_threads(before)
