"""Streams of a detector whose normalisation follows them: the built-in detector, in the dark."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import Alignment, alignment_prior, optim, tree
from adapters.detection import Boxes, Detections
from adapters.guards import GuardConfig, Guarded
from tta_serve.builtin import scene_detector, scenes
from tta_serve.coco import average_precision
from tta_serve.config import ModTrSettings
from tta_serve.detection import DetectionEngine, Found, Sight
from tta_serve.detectors import Detector
from tta_serve.engine import AnswerKind
from tta_serve.lessons import Lesson

LIGHT = 0.12  # that is left in the dark
SCENES = list(scenes.scenes(48, seed=31, held_out=True))
DARK = [torch.from_numpy((scene.image * LIGHT).astype(np.uint8)).permute(2, 0, 1) for scene in SCENES]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(scene_detector.load()).freeze()


@pytest.fixture(scope="module")
def norm(detector: Detector) -> Guarded:
    assert detector.network is not None
    made = scenes.scenes(64, seed=32, held_out=False)
    source = [torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255 for scene in made]
    prior = alignment_prior(detector.network, [detector.pixels(source[:32]), detector.pixels(source[32:])])
    return Guarded(Alignment(detector.network, prior), GuardConfig(selected_rows=2**62))


@pytest.fixture
def engine(detector: Detector, norm: Guarded) -> Callable[..., DetectionEngine]:
    """`engine(aligns=True)`."""

    def make(*, aligns: bool = True) -> DetectionEngine:
        settings = ModTrSettings(learns="nothing")
        return DetectionEngine(detector, {}, settings, "0" * 16, 1, norm if aligns else None, streams_max=10)

    return make


def look(engine: DetectionEngine, images: Sequence[Tensor], stream: str = "a", answer: AnswerKind = "adapted") -> Found:
    return engine.predict([Sight(tuple(images), ("rgb",) * len(images), stream, answer)])[0]


def teach(engine: DetectionEngine, images: Sequence[Tensor], stream: str = "a") -> list[str]:
    assert engine.aligner is not None
    return [done.result for done in engine.aligner.learn(look(engine, images, stream).lessons)]


def same(one: Sequence[Detections] | None, other: Sequence[Detections] | None, tolerance: float = 0.0) -> bool:
    assert one is not None
    assert other is not None
    pairs = [pair for mine, theirs in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


def ap50(found: Sequence[Detections] | None, numbers: range) -> float:
    truth = [Boxes(torch.from_numpy(SCENES[n].boxes), torch.from_numpy(SCENES[n].labels)) for n in numbers]
    return average_precision(truth, found or (), [(128, 128)] * len(numbers)).ap50


def test_a_stream_that_has_learned_nothing_gets_the_frozen_answer(engine: Callable[..., DetectionEngine]) -> None:
    found = look(engine(), DARK[:3], answer="both")
    assert same(found.detections, look(engine(aligns=False), DARK[:3]).detections)
    assert same(found.frozen_detections, found.detections)
    assert look(engine(aligns=False), DARK[:3]).lessons == ()


def test_in_the_dark_it_learns_to_see(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    assert mine.aligner is not None
    for first in range(0, 32, 8):
        assert teach(mine, DARK[first : first + 8]) == ["applied"]
    found = look(mine, DARK[32:], answer="both")
    assert ap50(found.frozen_detections, range(32, 48)) < 0.1
    assert ap50(found.detections, range(32, 48)) > 0.5
    assert same(found.frozen_detections, look(engine(aligns=False), DARK[32:]).detections, 1e-3)
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.seen, record.selected) == (4, 4, 32, 32)
    drift = mine.aligner.drift("a", record.incarnation)
    assert drift is not None
    assert drift > 1  # the alarm line


def test_by_day_no_step_is_taken(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    assert mine.aligner is not None
    bright = [torch.from_numpy(scene.image).permute(2, 0, 1) for scene in SCENES[:32]]
    assert {result for first in range(0, 32, 16) for result in teach(mine, bright[first : first + 16])} == {"filtered"}
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.seen, record.selected) == (2, 0, 32, 0)  # statistics alone
    drift = mine.aligner.drift("a", record.incarnation)
    assert drift is not None
    assert drift < 1


def test_streams_do_not_touch_each_other(engine: Callable[..., DetectionEngine]) -> None:
    mine, alone = engine(), engine()
    for each in (mine, alone):
        teach(each, DARK[:8], "a")
    teach(mine, DARK[8:16], "b")
    for name, leaf in tree.leaves(mine.streams.state("a")):
        assert torch.equal(leaf, dict(tree.leaves(alone.streams.state("a")))[name]), name
    sights = [Sight((DARK[20],), ("rgb",), stream) for stream in ("a", "b", "new")]
    for sight, found in zip(sights, mine.predict(sights), strict=True):
        assert same(found.detections, mine.predict([sight])[0].detections, 1e-3), sight.stream  # pixels


def test_lessons_of_another_life_and_of_frozen_streams(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    assert mine.aligner is not None
    before = look(mine, DARK[:2]).lessons
    mine.streams.reset("a")
    assert [done.result for done in mine.aligner.learn(before)] == ["stale"]
    waiting = look(mine, DARK[:2]).lessons
    mine.streams.freeze("a")
    assert [done.result for done in mine.aligner.learn(waiting)] == ["frozen"]
    assert look(mine, DARK[:2]).lessons == ()  # none is made where nothing is learned
    record = mine.streams.record("a")
    assert (record.version, record.steps, record.seen) == (1, 0, 0)  # freezing is a version, and no step


def test_a_reset_forgets_everything(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    assert mine.aligner is not None
    new = look(mine, DARK[:2]).detections
    teach(mine, DARK[:8])
    life = mine.streams.record("a").incarnation
    assert not same(look(mine, DARK[:2]).detections, new)
    mine.streams.reset("a")
    assert same(look(mine, DARK[:2]).detections, new)
    assert mine.aligner.drift("a", life) is None


def test_images_of_several_sizes_make_a_lesson_each(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    wide = torch.cat([DARK[0], DARK[1]], dim=2)  # 128×256
    lessons = look(mine, [DARK[0], wide, DARK[2]]).lessons
    assert sorted(tuple(lesson.x.shape) for lesson in lessons) == [(1, 3, 128, 256), (2, 3, 128, 128)]
    assert mine.aligner is not None
    done = mine.aligner.learn(lessons)
    assert sorted(each.seen for each in done) == [1, 2]
    assert mine.streams.record("a").seen == 3


def test_what_is_not_finite_is_refused(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    assert mine.aligner is not None
    teach(mine, DARK[:8])
    (lesson,) = look(mine, DARK[:2]).lessons
    answer, known = look(mine, DARK[8:9]).detections, tree.encode(mine.streams.state("a"))
    begun = mine.streams.begin("b")
    assert begun is not None
    broken = Lesson(torch.full_like(lesson.x, torch.nan), "b", begun.incarnation, 0)
    (done,) = mine.aligner.learn([broken])
    assert (done.result, done.trips) == ("refused", ("non_finite",))
    assert all(torch.equal(leaf, known[name]) for name, leaf in tree.encode(mine.streams.state("a")).items())
    assert same(look(mine, DARK[8:9], "b").detections, look(engine(aligns=False), DARK[8:9]).detections)
    assert same(look(mine, DARK[8:9]).detections, answer)


def test_a_step_of_one_stream_while_another_row_is_written(
    engine: Callable[..., DetectionEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned from is a copy: a state read alone is a view of the table, which others go on writing to."""
    mine = engine()
    assert mine.aligner is not None
    teach(mine, DARK[:2], "a")
    teach(mine, DARK[:2], "b")
    network = mine.detector.network
    assert network is not None
    forward = type(network).__call__

    def write_meanwhile(self: Any, *given: Any) -> Any:
        table = mine.streams._table
        table.write([mine.streams.record("b").row], tree.stack([optim.rest(mine.streams.state("b"))]))
        return forward(self, *given)

    (lesson,) = look(mine, DARK[2:4], "a").lessons
    monkeypatch.setattr(type(network), "__call__", write_meanwhile)
    assert [done.result for done in mine.aligner.learn([lesson])] == ["applied"]


def test_drift_is_kept_of_living_streams_alone(engine: Callable[..., DetectionEngine]) -> None:
    mine = engine()
    assert mine.aligner is not None
    for number in range(4):
        teach(mine, DARK[:2], f"s{number}")
        mine.streams.delete(f"s{number}")
    assert mine.aligner._drifts == {}


def test_nothing_is_aligned_with_what_asked_not_to_be(engine: Callable[..., DetectionEngine]) -> None:
    (found,) = engine().predict([Sight((DARK[0],), ("rgb",), "a", adapt=False)])
    assert found.lessons == ()
