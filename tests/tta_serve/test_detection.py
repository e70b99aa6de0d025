"""The engine around a detector of bright spots, and around the built-in one where images must share a forward."""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import spots
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from adapters import optim, tree
from adapters.detection import Boxes, Detections
from adapters.modtr import ModTrState
from adapters.translator import TranslatorConfig
from tta_serve import modalities
from tta_serve.box_lessons import Shown, Taught
from tta_serve.builtin import scene_detector, scenes
from tta_serve.coco import Example
from tta_serve.config import ModTrSettings
from tta_serve.detection import DetectionEngine, Found, Sight, init_of, merging_of
from tta_serve.detectors import Detector
from tta_serve.durable import Durable
from tta_serve.memory_store import MemoryStore
from tta_serve.modalities import Modality
from tta_serve.sqlite_store import SQLiteStore

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SPOT = Boxes(torch.tensor([[4.0, 2.0, 10.0, 8.0]]), torch.tensor([1]))
NOTHING = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
IR = spots.tensor(spots.infrared())
RED = spots.tensor(spots.scene())
Make = Callable[..., DetectionEngine]


@pytest.fixture
def engine(tmp_path: Path) -> Make:
    """`engine("ir", "uv", build=spots.build, probe=0, **settings)`: in front of it a translator for each name."""

    def make(*names: str, build: Callable[[], Any] = spots.build, probe: int = 0, **settings: Any) -> DetectionEngine:
        detector = Detector(build()).freeze()
        rates = {"modality_learning_rate": 4e-3, "stream_learning_rate": 1e-2}
        chosen = ModTrSettings.model_validate({**rates, **settings})
        known: dict[str, Modality] = {}
        for number, name in enumerate(names):
            config = TranslatorConfig(in_channels=1, width=2 + number, depth=1)
            file = spots.translator_file(name, config, detector=detector.model)
            held = modalities.probe_of(pictures(tmp_path, probe), detector) if probe else None
            known[name] = modalities.begin(file, detector, chosen, held)
        return DetectionEngine(detector, known, chosen, "0" * 16, streams_max=20)

    return make


def pictures(folder: Path, count: int) -> list[Example]:
    """Spots that are just bright enough to be found whole."""
    for number in range(count):
        Image.fromarray(spots.infrared(level=100)[..., 0]).save(folder / f"{number}.png")
    return [Example(folder / f"{number}.png", (12, 16), SPOT) for number in range(count)]


def look(engine: DetectionEngine, image: Tensor, stream: str, modality: str = "ir", answer: Any = "adapted") -> Found:
    (found,) = engine.predict([Sight((image,), (modality,), stream, answer)])
    return found


def score(engine: DetectionEngine, stream: str, modality: str = "ir") -> float:
    """Of the one spot that it finds: as fine a measure of a translation as there is."""
    detections = look(engine, IR, stream, modality).detections
    assert detections is not None
    return float(detections[0].scores)


def teach(engine: DetectionEngine, stream: str, boxes: Boxes = SPOT, modality: str = "ir") -> Taught:
    engine.streams.begin(stream)
    incarnation = engine.streams.record(stream).incarnation
    return engine.boxes.learn(Shown((IR,), (boxes,), modality, stream, incarnation))


def own(engine: DetectionEngine, stream: str, place: int = 0) -> ModTrState:
    return cast(ModTrState, engine.streams.state(stream).input[place])


def weights(engine: DetectionEngine, modality: str = "ir") -> Tensor:
    return engine.modalities[modality].state.weights.clone()


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(x, y) for (_, x), (_, y) in zip(tree.leaves(one), tree.leaves(other), strict=True))


def close(found: tuple[Detections, ...] | None, expected: tuple[Detections, ...] | None, exactly: bool = False) -> None:
    assert (found is None) == (expected is None)
    for one, other in zip(found or (), expected or (), strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} if exactly else CLOSE))


# -- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [spots.build, spots.build_resizing])
def test_rgb_is_answered_as_without_translators(engine: Make, build: Callable[[], Any]) -> None:
    with_, without = engine("ir", "uv", build=build), engine(build=build)
    images = [RED, spots.tensor(spots.scene((1, 1, 9, 20), 2, (31, 12))), IR]
    for _ in range(2):
        for answer in ("adapted", "frozen", "both"):
            one, other = (
                mine.predict([Sight(tuple(images), ("rgb",) * 3, "a", answer)])[0] for mine in (with_, without)
            )
            close(one.detections, other.detections, exactly=True)
            close(one.frozen_detections, other.frozen_detections, exactly=True)
            assert (one.modalities, one.translator_versions) == (("rgb",) * 3, (0,) * 3)
        for boxes in (SPOT, NOTHING):  # and whatever they learn
            assert teach(with_, "a", boxes).modality.applied


def test_of_rgb_both_answers_are_one(engine: Make) -> None:
    mine = engine("ir")
    calls: list[int] = []
    mine.detector.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    found = look(mine, RED, "a", "rgb", "both")
    close(found.detections, found.frozen_detections, exactly=True)
    look(mine, IR, "a", "ir", "both")
    assert calls == [1, 2]


def test_both_answers_of_another_modality(engine: Make) -> None:
    mine, without = engine("ir"), engine()
    for _ in range(3):
        teach(mine, "a")
    found = look(mine, IR, "a", "ir", "both")
    close(found.frozen_detections, look(without, IR, "a", "rgb").detections, exactly=True)
    close(found.detections, look(mine, IR, "a").detections)
    assert found.detections is not None
    assert found.frozen_detections is not None
    assert abs(float(found.detections[0].scores - found.frozen_detections[0].scores)) > 0.05
    frozen = look(mine, IR, "a", "ir", "frozen")
    assert frozen.detections is None
    close(frozen.frozen_detections, found.frozen_detections)


def test_the_detector_itself_as_it_was_loaded(engine: Make) -> None:
    """Answers of the frozen detector, through everything around it, against the plain model."""
    mine = engine("ir", build=scene_detector.load)
    plain = scene_detector.load()
    for scene in scenes.scenes(3, 7, True):
        image = spots.tensor(scene.image)
        with torch.no_grad():
            (expected,) = plain([image / 255])
        found = look(mine, image, "a", "rgb").detections
        assert found is not None
        assert len(expected["scores"]) >= 1
        torch.testing.assert_close(found[0]._asdict(), expected, rtol=1e-5, atol=1e-3)


def test_float_and_byte_images_are_the_same(engine: Make) -> None:
    mine = engine("ir")
    close(look(mine, IR.float() / 255, "a").detections, look(mine, IR, "a").detections)


def test_a_translator_that_is_gone_is_not_asked(engine: Make) -> None:
    mine = engine("ir")
    found = look(mine, IR, "a", "uv")
    assert (found.modalities, found.translator_versions) == (("rgb",), (0,))
    close(found.detections, look(mine, IR, "a", "rgb").detections)


def test_strips_and_specks_fail_nobody(engine: Make) -> None:
    mine = engine("ir", build=spots.build_resizing)
    alone = look(mine, RED, "a", "rgb")
    sizes = ((1, 900), (900, 1), (1, 1))
    strips = [
        Sight((torch.full((1, *size), 255, dtype=torch.uint8),), (name,), "b")
        for size in sizes
        for name in ("ir", "rgb")
    ]
    found = mine.predict([*strips, Sight((RED,), ("rgb",), "a")])
    close(found[-1].detections, alone.detections)
    assert all(each.detections is not None and len(each.detections) == 1 for each in found)


requests = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "new"]),
        st.lists(st.tuples(st.sampled_from(["rgb", "ir", "uv"]), st.integers(0, 3)), min_size=1, max_size=3),
        st.sampled_from(["adapted", "adapted", "both", "frozen"]),
    ),
    min_size=1,
    max_size=5,
)
SHOWN = (RED, IR, spots.tensor(spots.infrared((1, 1, 9, 20), (31, 12))), spots.tensor(spots.scene((3, 3, 9, 9), 1)))


@pytest.fixture
def taught(engine: Make) -> DetectionEngine:
    """a and b have learned, each something else and each of both modalities; the shared weights have, too."""
    mine = engine("ir", "uv")
    for stream, boxes, modality in (("a", SPOT, "ir"), ("b", NOTHING, "ir"), ("a", NOTHING, "uv"), ("b", SPOT, "uv")):
        teach(mine, stream, boxes, modality)
    return mine


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests)
def test_no_answer_depends_on_other_requests(taught: DetectionEngine, mix: list[tuple[str, list[Any], Any]]) -> None:
    sights = [
        Sight(tuple(SHOWN[shown] for _, shown in images), tuple(name for name, _ in images), stream, answer)
        for stream, images, answer in mix
    ]
    for sight, together in zip(sights, taught.predict(sights), strict=True):
        (alone,) = taught.predict([sight])
        close(together.detections, alone.detections)
        close(together.frozen_detections, alone.frozen_detections)
        assert together[2:] == alone[2:]
        for name, modality, found in zip(
            sight.modalities, together.modalities, together.translator_versions, strict=True
        ):
            assert (modality, found) == (name, {"rgb": 0, "ir": 2, "uv": 2}[name])


def test_a_mixed_batch_of_the_built_in_detector(engine: Make) -> None:
    """One merged forward for both modalities; each image as if it were alone."""
    mine = engine("ir", build=scene_detector.load)
    seen = [*scenes.scenes(2, 7, True), *scenes.infrared_scenes(2, 7, True)]
    sights = [
        Sight((spots.tensor(scene.image),), ("ir" if scene.image.shape[2] == 1 else "rgb",), f"s{number}")
        for number, scene in enumerate(seen)
    ]
    calls: list[int] = []
    handle = mine.detector.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    together = mine.predict(sights)
    handle.remove()
    assert calls == [4]
    for sight, found in zip(sights, together, strict=True):
        (alone,) = mine.predict([sight])
        for one, other in zip(found.detections or (), alone.detections or (), strict=True):
            torch.testing.assert_close(one._asdict(), other._asdict(), rtol=1e-5, atol=1e-3)


def test_a_batch_that_is_too_large_is_cut(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tta_serve.detection.PIXELS_MAX", 2 * 32 * 32)  # as 12×16 is padded
    mine = engine()
    calls: list[int] = []
    mine.detector.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    images = tuple(spots.tensor(spots.scene(colour=number % 3)) for number in range(5))
    found = mine.predict([Sight(images, ("rgb",) * 5, "a")])[0].detections
    assert calls == [2, 2, 1]
    assert [int(each.labels) for each in found or ()] == [1, 2, 3, 1, 2]


# -- learn ------------------------------------------------------------------------------------------------------------


def test_a_stream_learns_for_itself_alone(engine: Make) -> None:
    mine = engine("ir", learns="stream")
    for stream in "ab":
        teach(mine, stream)
    before, theirs, shared = score(mine, "b"), own(mine, "b"), weights(mine)
    version, mine_before = mine.streams.record("b").version, score(mine, "a")
    for _ in range(3):
        done = teach(mine, "a", NOTHING)
        assert done.stream is not None
        assert (done.stream.result, done.modality) == ("applied", None)
    assert score(mine, "b") == before
    assert equal(own(mine, "b"), theirs)
    assert torch.equal(weights(mine), shared)
    assert mine.streams.record("b").version == version
    assert mine.modalities["ir"].version == 0
    assert score(mine, "a") < mine_before - 1e-3
    assert mine.streams.record("a").version == 4


@pytest.mark.parametrize("learns", ["both", "modality"])
def test_what_a_modality_learns_all_of_its_streams_have(engine: Make, learns: str) -> None:
    mine = engine("ir", "uv", learns=learns)
    teach(mine, "b", SPOT, "ir")
    halves = own(mine, "b")
    before, elsewhere, rgb = score(mine, "b"), score(mine, "b", "uv"), look(mine, RED, "b", "rgb")
    assert mine.modalities["ir"].version == 1
    done = teach(mine, "a", NOTHING)
    assert done.modality is not None
    assert done.modality.applied
    assert (done.stream is None) == (learns == "modality")
    assert score(mine, "b") < before - 1e-4
    assert score(mine, "b", "uv") == elsewhere
    close(look(mine, RED, "b", "rgb").detections, rgb.detections, exactly=True)
    assert equal(own(mine, "b"), halves)  # its own scale and shift are its own
    assert (mine.modalities["ir"].version, mine.modalities["uv"].version) == (2, 0)
    assert look(mine, IR, "b").translator_versions == (2,)
    assert mine.streams.record("a").version == (1 if learns == "both" else 0)


def test_nothing_is_learned_where_nothing_shall_be(engine: Make) -> None:
    mine = engine("ir", learns="nothing")
    before, shared = score(mine, "a"), weights(mine)
    assert teach(mine, "a") == Taught(None, None)
    assert score(mine, "a") == before
    assert torch.equal(weights(mine), shared)


def test_a_lesson_for_an_earlier_life_is_stale(engine: Make) -> None:
    mine = engine("ir")
    incarnation = look(mine, IR, "a").incarnation
    shared = weights(mine)
    for command in (mine.streams.reset, mine.streams.delete):
        command("a")
        done = mine.boxes.learn(Shown((IR,), (SPOT,), "ir", "a", incarnation))
        assert done.stream is not None
        assert (done.stream.result, done.modality) == ("stale", None)
    assert torch.equal(weights(mine), shared)
    assert mine.streams.find("a") is None


def test_so_is_one_for_a_translator_that_is_gone(engine: Make) -> None:
    done = teach(engine("ir"), "a", SPOT, "uv")
    assert done.stream is not None
    assert (done.stream.result, done.modality) == ("stale", None)


def test_a_frozen_stream_teaches_nobody(engine: Make) -> None:
    mine = engine("ir")
    teach(mine, "a")
    mine.streams.freeze("a")
    before, halves, shared = score(mine, "a"), own(mine, "a"), weights(mine)
    done = teach(mine, "a", NOTHING)
    assert done.stream is not None
    assert (done.stream.result, done.modality) == ("frozen", None)
    assert score(mine, "a") == before
    assert equal(own(mine, "a"), halves)
    assert torch.equal(weights(mine), shared)
    mine.streams.resume("a")
    assert teach(mine, "a", NOTHING).stream.result == "applied"
    assert score(mine, "a") < before


def test_images_of_several_sizes_are_as_many_steps(engine: Make) -> None:
    mine = engine("ir")
    mine.streams.begin("a")
    other = spots.tensor(spots.infrared(size=(20, 16)))
    lesson = Shown((IR, other, IR), (SPOT, SPOT, NOTHING), "ir", "a", mine.streams.record("a").incarnation)
    done = mine.boxes.learn(lesson)
    assert done.stream is not None
    assert (done.stream.seen, done.stream.result) == (3, "applied")
    assert (mine.streams.record("a").steps, mine.modalities["ir"].version) == (2, 2)


def test_boxes_are_moved_to_where_the_detector_looks(engine: Make) -> None:
    """12×16 pixels are made 16×21; the loss at the given box is lower than at any other."""
    losses = {}
    for box in ((4, 2, 10, 8), (5, 2, 13, 11), (0, 0, 6, 6), (4, 2, 16, 12)):
        mine = engine("ir", build=spots.build_resizing, learns="modality")
        done = teach(mine, "a", Boxes(torch.tensor([box], dtype=torch.float32), torch.tensor([1])))
        assert done.modality is not None
        losses[box] = done.modality.loss
    assert min(losses, key=lambda box: losses[box]) == (4, 2, 10, 8)


def test_a_stream_that_was_reset_answers_as_new(engine: Make) -> None:
    mine = engine("ir", learns="stream")
    new = score(mine, "a")
    teach(mine, "a", NOTHING)
    assert score(mine, "a") != new
    mine.streams.reset("a")
    assert score(mine, "a") == new


# -- guards -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_changes_nothing(engine: Make) -> None:
    mine = engine("ir", "uv")
    before = score(mine, "a")
    mine.streams.begin("a")
    halves, shared = own(mine, "a"), weights(mine)
    mine.detector.model.factor.fill_(torch.nan)
    done = teach(mine, "a")
    assert done.stream is not None
    assert done.modality is not None
    assert (done.stream.result, done.stream.trips) == ("refused", ("non_finite",))
    assert (done.modality.applied, done.modality.trips) == (False, ("non_finite",))
    assert equal(own(mine, "a"), halves)
    assert torch.equal(weights(mine), shared)
    assert score(mine, "a") == pytest.approx(before, rel=1e-5)
    record = mine.streams.record("a")
    assert (record.steps, record.refused, record.trips) == (0, 1, 1)


def test_after_three_of_them_the_stream_learns_no_more(engine: Make) -> None:
    mine = engine("ir", learns="stream")
    teach(mine, "a")
    mine.detector.model.factor.fill_(torch.nan)
    assert [teach(mine, "a").stream.result for _ in range(4)] == ["refused"] * 3 + ["frozen"]
    mine.detector.model.factor.fill_(1.0)
    assert mine.streams.record("a").frozen
    assert score(mine, "a") == score(mine, "new")  # rolled back to the last good version: to none
    teach(mine, "b")
    assert mine.streams.record("b").steps == 1


def test_a_stream_that_unlearns_the_probe_is_pulled_rolled_back_and_frozen(engine: Make) -> None:
    mine = engine("ir", probe=2, learns="stream", stream_learning_rate=2e-2)
    for _ in range(100):
        if teach(mine, "a", NOTHING).stream.result == "frozen":
            break
    record = mine.streams.record("a")
    assert record.frozen
    assert record.trips == 3
    said = [event.what for event in record.events if "forgetting" in event.what]
    assert said == ["forgetting: pull", "forgetting: roll_back", "forgetting: freeze"]
    assert score(mine, "a") == score(mine, "new")
    assert mine.modalities["ir"].version == 0


def test_a_modality_that_unlearns_its_probe_learns_no_more(engine: Make) -> None:
    mine = engine("ir", "uv", probe=2, learns="modality")
    begun = weights(mine)
    while not mine.modalities["ir"].frozen:
        teach(mine, "a", NOTHING)
        assert mine.modalities["ir"].version < 100
    assert torch.equal(weights(mine), begun)
    done = teach(mine, "a", NOTHING)
    assert done.stream is not None
    assert (done.stream.result, done.modality) == ("frozen", None)
    assert teach(mine, "a", NOTHING, "uv").modality.applied  # the other one goes on


# -- both at once -----------------------------------------------------------------------------------------------------


def test_answers_are_of_one_version(engine: Make) -> None:
    """One thread learns, this one looks: for a version of the stream and one of the translator there is one answer."""
    mine, steps = engine("ir"), 12
    look(mine, IR, "a")
    failures: list[BaseException] = []

    def learn() -> None:
        try:
            for number in range(steps):
                teach(mine, "a", SPOT if number % 2 else NOTHING)
        except BaseException as error:  # noqa: BLE001  # told to the thread that waits
            failures.append(error)

    def answer() -> tuple[tuple[int, int], bytes]:
        found = look(mine, IR.repeat(1, 2, 2), "a")
        assert found.detections is not None
        return (found.version, found.translator_versions[0]), np.concatenate(
            [np.ravel(x) for x in found.detections[0]]
        ).tobytes()

    answers: dict[tuple[int, int], set[bytes]] = {}
    seen: list[tuple[int, int]] = []
    thread = threading.Thread(target=learn)
    thread.start()
    while thread.is_alive() or not seen or seen[-1] != (steps, steps):
        versions, content = answer()
        answers.setdefault(versions, set()).add(content)
        seen.append(versions)
        assert not failures
    assert all(len(contents) == 1 for contents in answers.values()), answers.keys()
    assert len({content for (content,) in answers.values()}) == len(answers) > 1
    for one, other in itertools.pairwise(seen):  # neither goes back
        assert one[0] <= other[0]
        assert one[1] <= other[1]


@pytest.mark.parametrize("kept", ["memory", "sqlite"])
def test_states_survive_making_room_and_a_restart(tmp_path: Path, kept: str) -> None:
    detector = Detector(spots.build()).freeze()
    chosen = ModTrSettings(learns="stream", stream_learning_rate=1e-2)
    known: Mapping[str, Modality] = {"ir": modalities.begin(spots.translator_file(), detector, chosen)}
    store = MemoryStore() if kept == "memory" else SQLiteStore(tmp_path / "states.db", "model", "0")
    init = tree.encode(optim.rest(init_of(known, None)))

    def begun() -> DetectionEngine:
        durable = Durable(store, init=init, merging=merging_of(known, None))
        return DetectionEngine(detector, known, chosen, "0" * 16, streams_max=20, resident=1, durable=durable)

    mine = begun()
    expected: dict[str, float] = {}
    lessons: Sequence[Boxes] = (SPOT, NOTHING, SPOT)
    for count, stream in enumerate("abc", 1):
        for boxes in lessons[:count]:
            teach(mine, stream, boxes)
        expected[stream] = score(mine, stream)
    assert len(set(expected.values())) == 3
    assert mine.streams.names() == ["c"]
    assert {stream: score(mine, stream) for stream in "abc"} == expected
    mine.streams.flush()
    again = begun()
    assert {stream: score(again, stream) for stream in "abc"} == expected
    store.close()
