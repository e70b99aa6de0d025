"""One modality in front of a detector of bright spots."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spots
import torch
from PIL import Image
from torch import Tensor

from adapters import tree
from adapters.detection import Boxes
from adapters.translator import Translator, TranslatorConfig
from tta_serve import modalities, translators
from tta_serve.coco import Example
from tta_serve.config import ModTrSettings
from tta_serve.detectors import Detector
from tta_serve.modalities import PROBE_EVERY_STEPS, PROBE_IMAGES, Modality

NO_ROWS = torch.zeros(0, dtype=torch.int64)
SPOT = Boxes(torch.tensor([[4.0, 2.0, 10.0, 8.0]]), torch.tensor([1]))
NOTHING = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
FAINT = 100  # of 255: translated, it is just bright enough to be found whole; a little darker, and one row of it is
Make = Callable[..., Modality]


@pytest.fixture
def detector() -> Detector:
    return Detector(spots.build()).freeze()


@pytest.fixture
def modality(detector: Detector, tmp_path: Path) -> Make:
    """`modality(probe=n, level=…, rate=…, **translator)`: with n pictures, all of one spot, in its probe."""

    def make(probe: int = 0, level: int = FAINT, rate: float = 4e-3, **translator: Any) -> Modality:
        examples = []
        for number in range(probe):
            file = tmp_path / f"{number}.png"
            Image.fromarray(spots.infrared(level=level)[..., 0]).save(file)
            examples.append(Example(file, (12, 16), SPOT))
        settings = ModTrSettings(modality_learning_rate=rate)
        known = modalities.probe_of(examples, detector) if examples else None
        return modalities.begin(spots.translator_file(**translator), detector, settings, known)

    return make


def shown(level: int = 200, size: tuple[int, int] = (12, 16)) -> Tensor:
    return spots.tensor(spots.infrared(level=level, size=size)).float() / 255


def weights(modality: Modality) -> Tensor:
    return modality.state.weights.clone()


def teach(modality: Modality, detector: Detector, boxes: Boxes, times: int = 1, level: int = 200) -> Modality:
    for _ in range(times):
        modality, step = modalities.teach(modality, shown(level)[None], [boxes], detector, ap50_drop_max=0.05)
        assert step.applied
    return modality


# -- translating ------------------------------------------------------------------------------------------------------


def test_a_new_modality_translates_as_its_file(modality: Make) -> None:
    mine = modality()
    plain = Translator(spots.CONFIG).eval()
    plain.load_state_dict(mine.file.weights)
    x = shown()
    (y,) = modalities.translate(mine, [x], None, NO_ROWS)
    with torch.no_grad():
        torch.testing.assert_close(y, plain(x[None])[0])
    assert (y - x).abs().max() > 0.3
    assert (mine.version, mine.trips, mine.frozen, mine.ap50) == (0, 0, False, None)


def test_images_of_any_sizes_keep_their_order(modality: Make) -> None:
    mine = modality()
    images = [shown(level, size) for level, size in ((200, (12, 16)), (90, (9, 31)), (120, (12, 16)), (60, (9, 31)))]
    together = modalities.translate(mine, images, None, NO_ROWS)
    for y, x in zip(together, images, strict=True):
        assert y.shape == (3, *x.shape[1:])
        torch.testing.assert_close(y, modalities.translate(mine, [x], None, NO_ROWS)[0])


def test_each_row_is_translated_with_its_streams_state(modality: Make) -> None:
    mine = modality()
    init = mine.modtr.init()
    states = tree.stack([init, init._replace(scale=init.scale * 1.5, shift=init.shift + 0.3)])
    images = [shown(), shown(size=(9, 31)), shown()]
    y = modalities.translate(mine, images, states, torch.tensor([0, 1, 1]))
    (new,) = modalities.translate(mine, images[:1], None, NO_ROWS)
    torch.testing.assert_close(y[0], new)
    assert (y[2] - y[0]).abs().max() > 1e-3
    (alone,) = modalities.translate(mine, images[1:2], states, torch.tensor([1]))
    torch.testing.assert_close(y[1], alone)


def test_colour_and_grey_are_made_what_the_translator_reads(modality: Make) -> None:
    grey, three = shown(), shown().repeat(3, 1, 1)
    one = modality()
    torch.testing.assert_close(
        modalities.translate(one, [three], None, NO_ROWS)[0], modalities.translate(one, [grey], None, NO_ROWS)[0]
    )
    colours = modality(config=TranslatorConfig(in_channels=3, width=2, depth=1))
    torch.testing.assert_close(
        modalities.translate(colours, [grey], None, NO_ROWS)[0],
        modalities.translate(colours, [three], None, NO_ROWS)[0],
    )


# -- the probe --------------------------------------------------------------------------------------------------------


def test_ap50_on_the_probe(modality: Make, detector: Detector) -> None:
    assert modality(probe=2).ap50 == 1.0
    dark = modality(probe=2, level=60)  # 0.14 once it is translated: nothing is found
    assert dark.ap50 == 0.0
    assert dark.probe is not None
    assert modalities.measure(modality(), dark.probe, detector, None) == 0.0


def test_a_large_probe_is_looked_at_in_part(modality: Make) -> None:
    mine = modality(probe=PROBE_IMAGES + 3)
    assert mine.probe is not None
    assert len(mine.probe.images) == PROBE_IMAGES


# -- learning ---------------------------------------------------------------------------------------------------------


def test_a_lesson_is_a_new_value(modality: Make, detector: Detector) -> None:
    old = modality()
    before, x = weights(old), shown()
    (seen,) = modalities.translate(old, [x], None, NO_ROWS)
    new, step = modalities.teach(old, x[None], [SPOT], detector, 0.05)
    assert (step.applied, step.trips) == (True, ())
    assert (new.version, int(new.state.steps), old.version) == (1, 1, 0)
    assert torch.equal(weights(old), before)
    assert torch.equal(modalities.translate(old, [x], None, NO_ROWS)[0], seen)
    (brighter,) = modalities.translate(new, [x], None, NO_ROWS)
    assert brighter.amax() > seen.amax() + 1e-3  # the box asks for light
    states = tree.stack([new.modtr.init()])  # streams follow too, with their own halves as they are
    torch.testing.assert_close(modalities.translate(new, [x], states, torch.tensor([0]))[0], brighter)
    assert torch.equal(new.modtr.init().scale, old.modtr.init().scale)


def test_lessons_lower_the_loss(modality: Make, detector: Detector) -> None:
    mine, losses = modality(), []
    for _ in range(12):
        mine, step = modalities.teach(mine, shown()[None], [SPOT], detector, 0.05)
        losses.append(step.loss)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert int(mine.state.steps) == mine.version == 12


def test_a_loss_that_is_no_number_changes_no_weight(modality: Make, detector: Detector) -> None:
    mine = modality()
    before = weights(mine)
    detector.model.factor.fill_(torch.nan)
    new, step = modalities.teach(mine, shown()[None], [SPOT], detector, 0.05)
    assert (step.applied, step.trips) == (False, ("non_finite",))
    assert torch.equal(weights(new), before)
    assert (int(new.state.steps), new.trips, new.frozen) == (0, 1, False)


def test_three_such_losses_and_it_learns_no_more(modality: Make, detector: Detector) -> None:
    mine = teach(modality(), detector, SPOT, times=PROBE_EVERY_STEPS + 1)
    good, source = mine.good.weights.clone(), mine.shared.source_weights
    detector.model.factor.fill_(torch.nan)
    learned = weights(mine)
    seen = []
    for _ in range(3):
        mine, _ = modalities.teach(mine, shown()[None], [SPOT], detector, 0.05)
        seen.append((weights(mine), mine.frozen))
    torch.testing.assert_close(seen[0][0], (learned + source) / 2)  # the first: half the way back
    assert torch.equal(seen[1][0], good)
    assert torch.equal(seen[2][0], good)
    assert [frozen for _, frozen in seen] == [False, False, True]
    assert mine.trips == 3


def test_unlearning_the_probe_trips_rung_by_rung(modality: Make, detector: Detector) -> None:
    """Boxes that say that nothing is there: the spots of the probe get darker, and after 8 steps one row is found."""
    last = modality(probe=2)
    begun, source = weights(last), last.shared.source_weights
    tripped: list[tuple[tuple[str, ...], bool]] = []
    while not last.frozen:
        before = last
        last, done = modalities.teach(last, shown()[None], [NOTHING], detector, 0.05)
        assert last.version < 100
        if done.trips:
            assert int(last.state.steps) % PROBE_EVERY_STEPS == 0
            tripped.append((done.trips, torch.equal(weights(last), begun)))
            assert last.ap50 is None  # of the condemned weights, which serve no more
            if len(tripped) == 1:  # half the way back, and the moments begin anew
                assert (weights(last) - source).norm() < 0.6 * (weights(before) - source).norm()
                assert float(last.state.optimizer.first.abs().sum()) == 0.0
    # then to the last good weights, which are those of the beginning: no others were good
    trip = ("forgetting",)
    assert tripped == [(trip, False), (trip, True), (trip, True)]
    assert last.trips == 3
    assert last.probe is not None
    assert modalities.measure(last, last.probe, detector, None) == 1.0


def test_what_the_probe_finds_good_is_rolled_back_to(modality: Make, detector: Detector) -> None:
    mine = modality(probe=2)
    for step in range(1, PROBE_EVERY_STEPS + 2):
        mine = teach(mine, detector, SPOT)
        kept = torch.equal(mine.good.weights, weights(mine))
        assert kept == (step == PROBE_EVERY_STEPS)
    assert int(mine.good.steps) == PROBE_EVERY_STEPS
    assert mine.ap50 == 1.0


def test_what_there_is_to_say(modality: Make, detector: Detector) -> None:
    said = modalities.described(teach(modality(probe=1), detector, SPOT, times=2))
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said == {
        "modality": "ir",
        "detector": spots.translator_file().detector,
        "parameters": sum(each.numel() for each in translators.build(spots.translator_file()).state_dict().values()),
        "in_channels": 1,
        "fusion": "multiply",
        "recognised": True,
        "version": 2,
        "steps": 2,
        "trips": 0,
        "frozen": False,
        "ap50_probe": 1.0,
        "metrics": {},
    }
    assert not modalities.described(modality(routed=False))["recognised"]
