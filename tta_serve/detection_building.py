"""From settings to a detection engine: the detector, its translators and their probes."""

from pathlib import Path

import torch

from tta_serve import coco, detector_models, modalities, translators
from tta_serve.building import make_private
from tta_serve.config import RGB, ModelSettings, ModTrSettings
from tta_serve.detection import DetectionEngine, Sight
from tta_serve.detector_models import LoadedDetector
from tta_serve.engine import cores, pick_device, plan_threads
from tta_serve.errors import ConfigError, InvalidInput
from tta_serve.modalities import Modality, Probe
from tta_serve.snapshots import Folder

TRIAL_PIXELS = 64
TRIAL_STREAM = "trial"


def build_detection_engine(
    settings: ModelSettings, models_on_node: int = 1, folder: Path | None = None
) -> tuple[DetectionEngine, LoadedDetector]:
    """Load the detector and its translators and make ready to serve them.

    Args:
        settings: of the model.
        models_on_node: how many models share the cores.
        folder: where states are written out; None: they are kept in memory.

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
    threads = plan_threads(cores(), models_on_node) if settings.threads == "auto" else settings.threads
    if folder is not None:
        make_private(folder)
    engine = DetectionEngine(
        loaded.detector,
        known,
        adapter,
        loaded.digest,
        threads,
        streams_max=settings.streams.max,
        resident=settings.streams.resident,
        new_per_minute=settings.streams.new_per_minute,
        snapshots=None if folder is None else Folder(folder),
        batch_streams_max=settings.batching.rows_max,
    )
    _try(settings, engine)
    return engine, loaded


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
    return modalities.begin(translators.load(path, loaded.digest, name), loaded.detector, adapter, probe)


def _try(settings: ModelSettings, engine: DetectionEngine) -> None:
    """Look at one blank image of each modality: what cannot run at all fails here and not in the first request."""
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads)
    names = (RGB, *engine.modalities)
    blank = torch.zeros(3, TRIAL_PIXELS, TRIAL_PIXELS, dtype=torch.uint8)
    try:
        engine.predict([Sight((blank,) * len(names), names, TRIAL_STREAM)])
        engine.streams.delete(TRIAL_STREAM)
    except Exception as error:
        raise ConfigError(
            f"models.{settings.name}: the model loads, but a trial of looking fails: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_num_threads(before)
