"""The default in lock-step, on the digits model that comes with the server: what is learned from, and when."""

import numpy as np
import pytest
import torch

from adapters import Groups, tree
from loadtests import protocol_full_rate, protocol_probe, protocol_served
from loadtests.protocol_full_rate import Costs
from loadtests.protocol_images import Images
from loadtests.protocol_orders import Request
from loadtests.protocol_served import Default, Served
from tta_serve import models, pipelines
from tta_serve.config import ModelSettings

IMAGES = 64


@pytest.fixture(scope="module")
def built():
    settings = ModelSettings.model_validate({"name": "digits", "source": {"builtin": "digits"}})
    return Default(settings, pipelines.build(settings, models.load(settings), protocol_served.CPU), monitor=None)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2 * IMAGES, 3, 32, 32), dtype=np.uint8)
    return Images(pixels, np.arange(IMAGES) % 10, pixels[:IMAGES])


def alone(stream, *places):
    return [(Request(stream, np.array(each)),) for each in places]


def test_drained_learns_from_every_request_before_the_next(built, images):
    served, learned = Served(built, images), []
    for requests in alone("a", [0, 1, 2], range(3, 20)):
        served.answer(requests)
        learned.append(served.learned_rows)
        served.learn(requests)
        learned.append(served.learned_rows)
    assert learned == [0, 3, 3, 20]


def test_single_images_gather_until_a_step_has_enough(built, images):
    assert built.settings.adaptation.step_rows == 32
    served, learned = Served(built, images, drained=False), []
    rounds = [(Request("a", np.array([i])), Request("b", np.array([IMAGES + i]))) for i in range(33)]
    for requests in rounds:
        served.answer(requests)
        served.learn(requests)
        learned.append(served.learned_rows)
    assert learned == [0] * 31 + [64, 64]


def test_answers_are_those_of_the_pipeline(built, images):
    served = Served(built, images)
    fresh = served.answer(alone("a", range(12))[0])[0]
    x = torch.from_numpy(images.pixels[:12]).float() / 255
    groups = Groups.of((12,))
    with torch.no_grad():
        expected = built.pipeline.predict(tree.stack([built.pipeline.init()]), groups.index, groups, x).logits
    assert fresh.tolist() == expected.argmax(1).tolist()


def test_what_a_fresh_state_forgets_is_nothing(built, images):
    served = Served(built, images)
    served.answer(alone("a", range(12))[0])  # begins the stream; nothing is learned
    probe = protocol_probe.of_served(served, ["a"], images.labels)
    assert probe.learned.tolist() == probe.source.tolist()
    with torch.no_grad():  # with nothing but the source's statistics, a state is the frozen model
        frozen = served.network(torch.from_numpy(images.clean).float() / 255).logits.argmax(1).numpy()
    assert probe.state.tolist() == (frozen != images.labels).astype(float).tolist()


def test_at_full_rate_the_budget_bounds_what_is_learned(built, images):
    # request k arrives at time k. The step on request 0 takes 2.9 forwards, with its rest 9.67; the next one begins
    # then with requests 1 … 8 (256 rows, as many as a step may take) and is not over when the last is answered at 11
    assert built.settings.adaptation.budget == 0.3
    served = Served(built, images)
    rounds = alone("a", *(range(first, first + 32) for _ in range(3) for first in range(0, 128, 32)))
    played = protocol_full_rate.play_served(served, rounds, 128, Costs(3.0, 2.9, 1.0), batch=32)
    assert played.share_learned == 32 / (12 * 32)
    assert (played.answers >= 0).all()


def test_a_free_learner_keeps_up(built, images):
    served = Served(built, images)
    rounds = alone("a", *(range(first, first + 32) for first in range(0, 128, 32)))
    played = protocol_full_rate.play_served(served, rounds, 128, Costs(1.0, 0.2, 1.0), batch=32)
    assert played.share_learned == 3 / 4  # the last request is learned from when nobody asks any more
