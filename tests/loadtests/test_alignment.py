import numpy as np
import pytest
import torch

from adapters.detection import Boxes
from loadtests import alignment
from loadtests.errors import RequestFailed
from loadtests.modality_client import Detected
from loadtests.modality_scenes import Scenes

GREY = np.full((3, 4, 4), 200, np.uint8)
TRUTH = Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([1]))
BLACK = np.zeros((3, 16, 16), np.uint8)
RIGHT = Detected(np.array([[0, 0, 8, 8]], np.float32), np.array([1]), np.array([0.9], np.float32), "rgb", 0)
NOTHING = Detected(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), "rgb", 0)


class Fake:
    """Sees nothing until it was drained often enough."""

    model = "fake"

    def __init__(self, *, learns_after: int = 1, drains: bool = True) -> None:
        self.learns_after = learns_after
        self.drains = drains
        self.drained = 0
        self.adapted: list[bool] = []

    def detect(self, image, *, stream, modality, adapt):
        assert modality == "rgb"
        self.adapted.append(adapt)
        return RIGHT if self.drained >= self.learns_after else NOTHING

    def drain(self, stream):
        self.drained += 1
        return self.drains


def scenes(count: int) -> Scenes:
    return Scenes((BLACK,) * count, (BLACK[:1],) * count, (TRUTH,) * count)


@pytest.mark.parametrize(
    ("shift", "value"),
    [
        ("low_contrast", 138),  # 255 · (0.5 + 0.15 · (200 / 255 − 0.5)) = 138.4
        ("dark", 24),
        ("clean", 200),
        ("blur", 200),
    ],
)
def test_shifts_by_hand(shift, value):
    shifted = alignment.SHIFTS[shift](GREY, np.random.default_rng(0))
    assert (shifted.dtype, shifted.shape) == (np.uint8, GREY.shape)
    assert np.all(shifted == value)


def test_fog_is_thicker_at_the_top():
    shifted = alignment.fog(GREY, np.random.default_rng(0))
    # 0.1 · 200 + 0.9 · 204 above, 0.4 · 200 + 0.6 · 204 below
    assert [int(row[0]) for row in shifted[0]] == [204, 203, 203, 202]


def test_noise_is_drawn_from_the_generator():
    one, other = (alignment.noise(GREY, np.random.default_rng(seed)) for seed in (0, 0))
    assert np.array_equal(one, other)
    assert one.std() > 20


def test_every_eight_images_are_learned_from_before_the_next_are_sent():
    fake = Fake()
    found = alignment.look(fake, [BLACK] * 20, "a", adapts=True)
    assert [len(each.scores) for each in found] == [0] * 8 + [1] * 12
    assert (fake.drained, fake.adapted) == (2, [True] * 20)


def test_the_frozen_one_is_not_waited_for():
    fake = Fake()
    alignment.look(fake, [BLACK] * 20, "a", adapts=False)
    assert (fake.drained, fake.adapted) == (0, [False] * 20)


def test_a_server_that_does_not_learn_ends_the_run():
    with pytest.raises(RequestFailed, match="rows of 'a' still wait"):
        alignment.look(Fake(drains=False), [BLACK] * 8, "a", adapts=True)


def test_figures_of_every_shift():
    told = []
    figures = alignment.measure(Fake(), Fake(learns_after=1000), scenes(16), 6, told.append)
    assert set(figures) == {
        f"ap50/{shift}/{kind}"
        for shift in alignment.SHIFTS
        for kind in ("frozen", "adapting", "adapting_first_half", "adapting_second_half")
    }
    assert figures["ap50/noise/frozen"] == 0
    assert (figures["ap50/noise/adapting_first_half"], figures["ap50/noise/adapting_second_half"]) == (0, 1)
    assert len(told) == len(alignment.SHIFTS)
    assert alignment.table_of(figures).row_count == len(alignment.SHIFTS)
