"""The methods on networks small enough to know their answers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from adapters import EATA, Batch, EATAConfig, Groups, Network, Pipeline, tree
from loadtests import protocol_probe
from loadtests.protocol_images import Images
from loadtests.protocol_methods import BatchStatistics, FaithfulEATA, Frozen, play
from loadtests.protocol_orders import Request
from loadtests.replay_eata import normalised

IMAGES = 8


def seeded_images(corruptions=2):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (corruptions * IMAGES, 3, 4, 4), dtype=np.uint8)
    return Images(pixels, np.arange(IMAGES) % 3, pixels[:IMAGES])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def eata_pipeline():
    config = EATAConfig(entropy_margin=1.2, redundancy_margin=1.0, learning_rate=0.05, anchor="l2")
    network = Network(model())
    return Pipeline(network, norm=EATA(network, 3, config=config))


def requests(*of):
    return tuple(Request(stream, np.array(places)) for stream, places in of)


class Recorder:
    """Answers with the number of the round."""

    def __init__(self):
        self.calls = []

    def answer(self, asked):
        self.calls.append("answer")
        return [np.full(len(request.places), self.calls.count("answer")) for request in asked]

    def learn(self, _asked):
        self.calls.append("learn")


def test_answers_come_to_their_places_and_before_learning():
    method = Recorder()
    answers = play(method, [requests(("a", [3, 0])), requests(("a", [1]), ("b", [4]))], places=6)
    assert answers.tolist() == [1, 2, -1, 1, 2, -1]
    assert method.calls == ["answer", "learn", "answer", "learn"]


def test_frozen_is_the_network_itself():
    images, plain = seeded_images(), model().eval()
    with torch.no_grad():
        expected = plain(normalised(images.pixels)).argmax(1).tolist()
    method = Frozen(Network(model()), images)
    assert play(method, [requests(("a", [0, 1, 2]), ("b", list(range(3, 16))))], places=16).tolist() == expected


def test_batch_statistics_are_each_requests_own():
    images, training = seeded_images(), model().train()
    with torch.no_grad():
        expected = [training(normalised(images.pixels[rows])).argmax(1).tolist() for rows in ([0, 9, 4], [5, 1])]
    answers = BatchStatistics(Network(model()), images).answer(requests(("a", [0, 9, 4]), ("b", [5, 1])))
    assert [each.tolist() for each in answers] == expected


def test_a_later_visit_shows_the_same_images():
    images = seeded_images()
    assert (images.at(np.array([16 + 3])) == images.at(np.array([3]))).all()
    assert images.labels_at(np.array([0, 9, 18])).tolist() == [0, 1, 2]


def test_eata_answers_and_then_steps_once_a_request():
    pipeline, images = eata_pipeline(), seeded_images()
    method = FaithfulEATA(pipeline, images)
    states, expected = tree.stack([pipeline.init()]), []
    for places in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
        x, groups = normalised(images.pixels[places]), Groups.of((4,))
        expected += pipeline.predict(states, groups.index, groups, x).logits.argmax(1).tolist()
        states, told = pipeline.adapt(states, groups.index, Batch(x, groups, torch.ones(4)))
        assert bool(told.applied)
    rounds = [requests(("all", places)) for places in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])]
    assert play(method, rounds, places=12).tolist() == expected
    torch.testing.assert_close(method.states["all"].norm.params, states.norm.params[0])


def test_streams_side_by_side_end_where_they_end_alone():
    pipeline, images = eata_pipeline(), seeded_images()
    together, alone = FaithfulEATA(pipeline, images), FaithfulEATA(pipeline, images)
    side_by_side = [requests(("a", [i]), ("b", [8 + i])) for i in range(8)]
    one_by_one = [requests((name, [first + i])) for name, first in (("a", 0), ("b", 8)) for i in range(8)]
    assert play(together, side_by_side, 16).tolist() == play(alone, one_by_one, 16).tolist()
    for stream in ("a", "b"):
        learned = together.states[stream].norm.params
        assert not torch.equal(learned, pipeline.init().norm.params)
        torch.testing.assert_close(learned, alone.states[stream].norm.params, atol=1e-5, rtol=0)


def sign_network():
    """Label 0 where an image's first channel lies above its batch's mean, else 1."""
    linear = nn.Linear(3, 2)
    linear.weight.data = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    linear.bias.data.zero_()
    return Network(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), linear))


def test_forgetting_is_measured_under_the_probes_own_statistics():
    clean = np.zeros((4, 3, 1, 1), np.uint8)
    clean[:, 0, 0, 0] = [200, 201, 202, 203]  # all far above the source's mean, two above their own
    labels = np.array([1, 1, 0, 1])
    network = sign_network()
    eata = EATA(network, 2, config=EATAConfig(anchor="none"))
    run = FaithfulEATA(Pipeline(network, norm=eata), Images(clean, labels, clean))
    state = run.pipeline.init()
    always_0 = torch.tensor([1.0, 1, 1, 100, 0, 0])  # a shift of 100 in the first channel
    run.states = {"same": state, "lost": state._replace(norm=state.norm._replace(params=always_0))}
    probe = protocol_probe.of_eata(run, labels)
    assert probe.source.tolist() == [0, 0, 0, 1]  # says 1, 1, 0, 0
    assert probe.learned.tolist() == [0.5, 0.5, 0, 1]  # the second stream says 0, 0, 0, 0
    assert probe.state.tolist() == probe.learned.tolist()


@pytest.mark.parametrize("rows", [200, 201, 399])
def test_the_probe_is_taken_in_batches_of_200(rows, monkeypatch):
    sizes = []

    def answers(_network, _params, x, groups):
        sizes.append((len(x), groups.sizes))
        return functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 2)

    monkeypatch.setattr(protocol_probe, "under_own_statistics", answers)
    protocol_probe.wrong(None, None, protocol_probe._batches(torch.zeros(rows, 3, 1, 1)), np.zeros(rows))
    assert sizes == [(n, (n,)) for n in (200, rows - 200) if n]
