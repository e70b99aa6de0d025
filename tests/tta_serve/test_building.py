"""From settings to an engine: what looks at the streams, where it is wanted; and what is said of a wrong probe."""

import copy
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import Network, Pipeline
from adapters.forgetting import Forgetting
from tta_serve import building
from tta_serve.building import build_engine
from tta_serve.builtin import digits
from tta_serve.config import ModelSettings, StoreSettings
from tta_serve.engine import Engine, Query
from tta_serve.errors import ConfigError
from tta_serve.models import LoadedModel
from tta_serve.monitor import Monitor
from tta_serve.store_building import STATES_FILE

Settings = Callable[..., ModelSettings]


def monitor_of(engine: Engine) -> Monitor:
    assert engine._monitor is not None
    return engine._monitor


def forgetting_of(engine: Engine) -> Forgetting:
    found = monitor_of(engine)._forgetting
    assert found is not None
    return found


def probe_file(path: Path, count: int = 20, **others: Any) -> Path:
    """`count` of the built-in probe's images, and other arrays beside them."""
    with np.load(digits.PROBE) as archive:
        np.savez(path, images=archive["images"][:count], **others)
    return path


def test_the_builtin_digits_are_looked_at(model_settings: Settings) -> None:
    threads = torch.get_num_threads()
    engine, model = build_engine(model_settings())
    assert torch.get_num_threads() == threads
    assert model.labels == digits.LABELS
    monitor, forgetting = monitor_of(engine), forgetting_of(engine)
    assert monitor._drift is not None
    assert 2 <= len(forgetting.probe.x) <= building.PROBE_IMAGES
    assert forgetting.source_wrong.float().mean() < 0.1  # under the probe's own batch statistics
    x = forgetting.probe.x[:64]
    ((_, lesson),) = engine.predict([Query(x, "a")])
    (learned,) = engine.learn([lesson])
    assert (learned.seen, learned.trips) == (64, ())
    reading = engine.reading("a")
    assert reading is not None
    assert 0 < reading.drift < 1.5  # images of the source
    assert reading.flip_rate <= 0.05
    dark = 0.2 * x
    engine.learn([lesson for _, lesson in engine.predict([Query(dark, "b")])])
    found = engine.reading("b")
    assert found is not None
    assert found.drift > 2


def test_settings_reach_the_states_and_the_monitor(model_settings: Settings, tmp_path: Path) -> None:
    probe = str(probe_file(tmp_path / "probe.npz"))
    engine, _ = build_engine(
        model_settings(
            streams={"max": 7, "resident": 3},
            adaptation={"gate": False, "forgetting_max": 0.5, "probe": probe},
            threads=1,
        )
    )
    assert (engine.streams.streams_max, engine.streams.resident, engine.threads) == (7, 3, 1)
    assert monitor_of(engine)._forgetting_max == 0.5
    assert not monitor_of(engine).watch("a", 1).may_close


@pytest.mark.parametrize("settings", [{"adaptation": {"mode": "sync"}}, {"adapter": "source"}])
def test_where_the_papers_are_followed_or_nothing_is_learned_nobody_looks(
    model_settings: Settings, settings: dict[str, Any]
) -> None:
    engine, _ = build_engine(model_settings(**settings))
    assert engine._monitor is None


@pytest.fixture
def frozen(digits_model: LoadedModel) -> Pipeline:
    """Nothing but the network of the built-in digits."""
    return Pipeline(Network(copy.deepcopy(digits_model.module)))


def test_a_probe_without_labels_takes_the_frozen_answers(model_settings: Settings, tmp_path: Path) -> None:
    path = probe_file(tmp_path / "probe.npz")
    engine, _ = build_engine(model_settings(adaptation={"probe": str(path)}))
    probe = forgetting_of(engine).probe
    with torch.no_grad():
        assert torch.equal(probe.labels, engine.pipeline.network(probe.x).logits.argmax(1))


def test_a_probe_with_labels_is_believed(digits_model: LoadedModel, frozen: Pipeline, tmp_path: Path) -> None:
    labels = np.arange(20, dtype=np.uint8) % 10
    probe = building._probe(probe_file(tmp_path / "probe.npz", labels=labels), digits_model, frozen)
    assert probe.labels.tolist() == labels.tolist()
    assert probe.x.shape == (20, 3, 32, 32)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(20, np.float32), "float32 [20];"),
        (np.zeros((20, 1), np.int64), "int64 [20, 1] from 0 to 0;"),
        (np.zeros(19, np.int64), "int64 [19] from 0 to 0;"),
        (np.arange(20), "int64 [20] from 0 to 19;"),
        (np.full(20, -1), "int64 [20] from -1 to -1;"),
        (np.zeros(0, np.int64), "int64 [0]"),
        (np.array(["a"] * 20), "<U1 [20]"),
    ],
)
def test_labels_that_are_no_class_numbers(
    digits_model: LoadedModel, frozen: Pipeline, tmp_path: Path, labels: np.ndarray, said: str
) -> None:
    path = probe_file(tmp_path / "probe.npz", labels=labels)
    with pytest.raises(ConfigError) as caught:
        building._probe(path, digits_model, frozen)
    message = str(caught.value)
    assert message.startswith(f"probe: `labels` of {path} is {said}")
    assert message.endswith("it must hold one class number, 0 … 9, for each image")


def test_labels_that_cannot_be_read(digits_model: LoadedModel, frozen: Pipeline, tmp_path: Path) -> None:
    path = probe_file(tmp_path / "probe.npz", labels=np.array([{"pickled": 1}] * 20, dtype=object))
    with pytest.raises(ConfigError, match="holds no readable array `labels`"):
        building._probe(path, digits_model, frozen)


def test_a_probe_of_too_few_images_to_measure_drift(model_settings: Settings, tmp_path: Path) -> None:
    path = probe_file(tmp_path / "probe.npz", count=3)
    with pytest.raises(ConfigError, match=r"models\.m: .*drift needs at least 4 source images to compare with, not 3"):
        build_engine(model_settings(adaptation={"probe": str(path)}))


def test_a_probe_that_is_no_probe(model_settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "probe.npz"
    path.write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"(prior|probe): .*probe\.npz holds no readable array `images`"):
        build_engine(model_settings(adaptation={"probe": str(path)}))


def test_rows_are_taken_from_all_over() -> None:
    rows = torch.arange(10)
    assert building._spread(rows, 10).tolist() == list(range(10))
    assert building._spread(rows, 4).tolist() == [0, 3, 6, 9]
    assert building._spread(rows, 1).tolist() == [0]


def test_states_are_written_where_nobody_else_reads(model_settings: Settings, tmp_path: Path) -> None:
    settings = model_settings(streams={"resident": 1}, adaptation={"mode": "sync"})  # which needs no drift prior
    store = StoreSettings(path=str(tmp_path / "states"))
    engine, _ = build_engine(settings, store=store)
    for number, stream in enumerate("ab"):
        x = torch.full((1, 3, 32, 32), 0.3 * number)
        engine.learn([lesson for _, lesson in engine.predict([Query(x, stream)])])
    engine.streams.flush()
    file = tmp_path / "states" / "m" / STATES_FILE
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    engine.streams.durable.store.close()
    again, _ = build_engine(settings, store=store)
    assert [again.streams.record(stream).version for stream in "ab"] == [1, 1]
    again.streams.durable.store.close()


def test_another_adapter_is_another_generation(model_settings: Settings, tmp_path: Path) -> None:
    store = StoreSettings(path=str(tmp_path))
    found = {}
    for name, more in {
        "eata": {},
        "the same": {"batching": {"rows_max": 3}},
        "another rate": {"adapter": {"eata": {"learning_rate": 1e-4}}},
    }.items():
        engine, _ = build_engine(model_settings(adaptation={"mode": "sync"}, **more), store=store)
        found[name] = engine.streams.durable._generation
        engine.streams.durable.store.close()
    assert found["eata"] == found["the same"] != found["another rate"]
