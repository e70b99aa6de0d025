"""The comparison against a server whose answers are known: it reads and writes the real server's wire form."""

import io
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from loadtests import (
    incremental,
    incremental_baselines,
    incremental_cost,
    incremental_effects,
    incremental_encoder,
    incremental_figures,
    incremental_images,
    incremental_orders,
    incremental_play,
    incremental_server,
)
from loadtests.errors import LoadTestError, MissingFile, RequestFailed
from loadtests.incremental_baselines import SGD, Seen
from loadtests.incremental_client import LabelClient, Reads, Stage
from loadtests.incremental_images import Material, Part
from loadtests.incremental_play import Played, Served
from loadtests.report import ROOT
from tta_serve import images as server_images
from tta_serve.config import ModelSettings
from tta_serve.http_labels import ForgetRequest, parse_body, parse_labels
from tta_serve.metrics import Metrics
from tta_serve.models import InputSpec
from tta_serve.protocol import format_infer, parse_infer
from tta_serve.receipts import Receipt

OWN = ("a dial", "a lamp")  # classes of the model itself
TEACH_S = 0.004


class FakeServer:
    """Answers with the label of the nearest image that the stream was told; of none: the model's first class."""

    def __init__(self, models=("counts",), side=2, outcome="applied", verified=True):
        self.models = models
        self.side = side
        self.outcome = outcome
        self.verified = verified
        self.seen = {}  # stream, id → images
        self.told = {}  # stream → {(id, index): (label, image)}
        self.version = 0
        self.metrics = {model: Metrics(model, "r1") for model in models}
        self.asked = []  # stream, images, x-adapt

    def __call__(self, request):
        if request.url.path == "/metrics":
            return httpx.Response(200, text="".join(metrics.text() for metrics in self.metrics.values()))
        _, _, _, model, *route = request.url.path.split("/")
        if model not in self.models:
            return httpx.Response(404, json={"error": f"no model {model}"})
        return getattr(self, route[0] if route else "metadata")(request, model)

    def ready(self, _request, _model):
        return httpx.Response(200, json={"ready": True})

    def metadata(self, request, _model):
        labels = [*OWN, *self.added(request.url.params.get("stream"))]
        shape = [-1, 3, self.side, self.side]
        return httpx.Response(200, json={"inputs": [{"shape": shape}], "parameters": {"labels": labels}})

    def infer(self, request, _model):
        asked = parse_infer(request.content, request.headers["inference-header-content-length"])
        stream, images = request.headers["x-session-id"], asked.tensors["images"]
        self.asked.append((stream, len(images), request.headers["x-adapt"]))
        if request.headers["x-adapt"] == "on":
            self.seen[stream, asked.id] = images
        labels = [*OWN, *self.added(stream)]
        answers = np.array([labels.index(self.nearest(stream, image)) for image in images])
        parameters = {"stream": stream, "state_version": "0"}
        if self.told.get(stream):
            parameters |= {"head_version": str(self.version), "added_labels": self.added(stream)}
        header = {"id": asked.id, "parameters": parameters}
        return httpx.Response(200, content=format_infer(header, {"labels": answers}, frozenset())[0])

    def feedback(self, request, model):
        asked, items = parse_labels(request.content)
        self.metrics[model].observe("tta_stage_seconds", TEACH_S, stage="teach")
        self.metrics[model].observe("tta_stage_seconds", 1.0, stage="predict")
        self.version += 1
        results = []
        for item in items:
            image = self.seen[asked.stream, item.id][item.place]
            right = self.nearest(asked.stream, image) == item.label
            results.append({"result": self.outcome, "right": right})
        for item in items:
            image = self.seen[asked.stream, item.id][item.place]
            self.told.setdefault(asked.stream, {})[item.id, item.place] = (item.label, image)
        return httpx.Response(200, json={"results": results})

    def forget(self, request, _model):
        asked = parse_body(ForgetRequest, request.content, "request to forget")
        told = self.told[asked.stream]
        gone = [key for key, (label, _) in told.items() if label == asked.label or key[0] in (asked.ids or ())]
        for key in gone:
            del told[key]
        self.version += 1
        return httpx.Response(200, json=Receipt(len(gone), 0, (), "before", "after", self.verified, None)._asdict())

    def added(self, stream):
        return list(dict.fromkeys(label for label, _ in self.told.get(stream, {}).values()))

    def nearest(self, stream, image):
        told = list(self.told.get(stream, {}).values())
        if not told:
            return OWN[0]
        distances = [np.abs(image.astype(int) - other).sum() for _, other in told]
        return told[int(np.argmin(distances))][0]


def client_of(server, model="counts"):
    return LabelClient("http://test", model, transport=httpx.MockTransport(server))


def part(*greys):
    """An image for each grey; those of 0 … 49 are of class 0, of 50 … 99 of class 1, and so on."""
    pixels = np.array(greys, np.uint8)
    return Part(np.tile(pixels.reshape(-1, 1, 1, 1), (1, 3, 2, 2)), pixels.astype(np.int64) // 50)


@pytest.fixture
def material():
    train, rest = part(10, 20, 60, 70, 110, 120, 160, 170), part(25, 75, 125, 175)
    # the last is nearer to what class 1 was taught than to its own class
    test = part(5, 15, 65, 55, 115, 105, 165, 155, 38, 45)
    return Material(("w", "x", "y", "z"), train, rest, test, np.zeros((4, 1, 1, 3), np.uint8))


# -- images and orders ------------------------------------------------------------------------------------------------


def test_the_client_enlarges_as_the_server_does():
    small = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    large = incremental_images.enlarged(small, 128)
    for image, sent in zip(small, large, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        decoded = server_images.decode(file.getvalue(), InputSpec(128, 128, None, "bicubic"), 10**6)
        np.testing.assert_array_equal(sent, decoded.numpy())


def test_cifar_is_parted_by_class(tmp_path):
    labels = np.tile(np.arange(10, dtype=np.uint8), 3)
    images = np.repeat(np.arange(30, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3)
    np.savez(tmp_path / "source.npz", images=images, labels=labels)
    np.savez(tmp_path / "clean.npz", images=images[:4], labels=labels[:4])
    made = incremental_images.of_cifar(tmp_path, per_class=2, side=32)
    assert made.train.images[:, 0, 0, 0].tolist() == list(range(20))
    assert made.rest.images[:, 0, 0, 0].tolist() == list(range(20, 30))
    assert made.rest.labels.tolist() == list(range(10))
    assert made.test.labels.tolist() == [0, 1, 2, 3]
    assert made.unlabelled.shape == (30, 32, 32, 3)
    assert made.names[3] == "cifar-cat"
    with pytest.raises(LoadTestError, match="a class has 3 images: 3 to teach leave none"):
        incremental_images.of_cifar(tmp_path, per_class=3, side=32)


def test_digits_are_parted_by_class():
    made = incremental_images.of_digits(per_class=3)
    for some, count in ((made.train, 3), (made.rest, 3), (made.test, 20)):
        assert np.bincount(some.labels).tolist() == [count] * 10
    assert made.side == 32
    with pytest.raises(LoadTestError, match="fewer than 220 images of a digit"):
        incremental_images.of_digits(per_class=100)


def test_orders_hold_the_same_images():
    labels = np.repeat([0, 1, 2, 3], 40)
    orders = incremental_orders.orders_of(labels, rare=1, seed=0)
    assert [len(task) for task in orders["in_order"]] == [80, 80]
    assert set(labels[orders["in_order"][0]]) == {0, 1}
    assert sorted(orders["in_order"][0]) == list(range(80))
    assert orders["in_order"][0].tolist() != list(range(80))  # shuffled within
    assert [len(task) for task in orders["rare_in_order"]] == [42, 80]
    assert np.bincount(labels[orders["rare_shuffled"][0]]).tolist() == [40, 2, 40, 40]
    for rare in ("", "rare_"):
        in_order, (shuffled,) = orders[f"{rare}in_order"], orders[f"{rare}shuffled"]
        assert sorted(np.concatenate(in_order)) == sorted(shuffled)


# -- one pass ---------------------------------------------------------------------------------------------------------


class Scripted:
    """Gives answers that were written down, by round."""

    def __init__(self, *rounds):
        self.rounds = iter(rounds)
        self.taught, self.asked = [], []

    def teach(self, places):
        self.taught.append(places.tolist())
        return 1

    def answer(self, places):
        self.asked.append(places.tolist())
        return np.array(next(self.rounds))


TASKS = (np.array([1, 0]), np.array([2, 3]))
TAUGHT = np.array([0, 0, 1, 1])
TEST = np.array([0, 0, 1, 1, 0, 1, 0, 1])


def test_a_pass_asks_every_second_image_of_what_was_seen():
    learner = Scripted([0, 0, 1], [0, 0, 1, 1, 1, 1, 1, 0])
    played = incremental_play.play(learner, TASKS, TAUGHT, TEST)
    assert learner.taught == [[1, 0], [2, 3]]
    assert learner.asked == [[0, 4, 6], list(range(8))]
    assert played.answers.tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    np.testing.assert_allclose(played.recalls, [[2 / 3, np.nan], [1 / 3, 1]])
    assert played.accuracies == pytest.approx((2 / 3, 1 / 2))
    assert played.right_before == 0.5
    assert incremental_play.mean_drop(played.recalls) == pytest.approx(100 / 6)  # a third of one class of two


def test_a_pass_may_ask_at_the_end_alone():
    learner = Scripted([0] * 8)
    played = incremental_play.play(learner, TASKS, TAUGHT, TEST, between=False)
    assert learner.asked == [list(range(8))]
    assert played.accuracies == (0.75,)
    assert len(played.recalls) == 1


def test_a_head_is_taught_each_image_once_and_tested_without_a_trace(material):
    server = FakeServer()
    with client_of(server) as client:
        learner = Served(client, material, "s")
        assert learner.answer(np.array([0])).tolist() == [incremental_play.NOBODYS]  # a class of the model's own
        assert learner.teach(np.array([0, 2, 4, 6])) == 0
        assert learner.teach(np.array([1, 3, 5, 7])) == 4
        assert learner.answer(np.arange(10)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1]
    labels = {key: label for key, (label, _) in server.told["s"].items()}
    assert labels[("taught-1", 2)] == "y"
    assert len(labels) == 8
    assert server.asked == [("s", 1, "off"), ("s", 4, "on"), ("s", 4, "on"), ("s", 10, "off")]


def test_requests_hold_ten_images(material):
    server = FakeServer()
    with client_of(server) as client:
        Served(client, material, "s").teach(np.zeros(23, int))
    assert [images for _, images, _ in server.asked] == [10, 10, 3]


def test_a_learner_can_be_emptied(material):
    server = FakeServer()
    with client_of(server) as client:
        learner = Served(client, material, "s")
        learner.teach(np.arange(8))
        learner.clear()
    assert server.told == {"s": {}}


# -- requests ---------------------------------------------------------------------------------------------------------


def test_what_answers_a_stream(material):
    server = FakeServer()
    with client_of(server) as client:
        assert client.reads(material.test.images[0], stream="s") == Reads(0, ())
        Served(client, material, "s").teach(np.arange(8))
        assert client.reads(material.test.images[0], stream="s") == Reads(1, ("w", "x", "y", "z"))
        assert client.names("s") == (*OWN, "w", "x", "y", "z")
        assert client.names("another") == OWN


def test_a_label_that_is_not_learned_is_an_error(material):
    with client_of(FakeServer(outcome="stale")) as client:
        client.infer(material.train.images[:1], stream="s", id="p")
        with pytest.raises(RequestFailed, match="not every label of the prediction 'p' was learned: stale"):
            client.teach("p", ["w"], stream="s")


def test_a_stage_is_told_apart_from_others():
    server = FakeServer(models=("counts", "ridge"))
    server.metrics["ridge"].observe("tta_stage_seconds", 3.0, stage="teach")
    server.metrics["counts"].observe("tta_stage_seconds", 3.0, stage="predict")
    with client_of(server) as client:
        assert client.stage("teach") == Stage(0, 0, {})
        server.metrics["counts"].observe("tta_stage_seconds", 0.25, stage="teach")
        before = client.stage("teach")
        for seconds in (0.004, 0.5):
            server.metrics["counts"].observe("tta_stage_seconds", seconds, stage="teach")
        passed = client.stage("teach").since(before)
    assert (before.runs, passed.runs) == (1, 2)
    assert passed.seconds == pytest.approx(0.504)
    assert (passed.within[0.002], passed.within[0.005], passed.within[math.inf]) == (0, 1, 2)


# -- one label, and forgetting ----------------------------------------------------------------------------------------


def test_single_labels_leave_no_trace(material):
    server = FakeServer()
    with client_of(server) as client:
        learner = Served(client, material, "s")
        learner.teach(np.arange(8))
        kept = dict(server.told["s"])
        found = incremental_effects.single_labels(learner, 3)
    assert server.told["s"] == kept
    assert found["next_request"] == 1
    assert found["teach_ms"] == pytest.approx(4)
    assert found["teach_within_limit"] == 1
    assert found["forget_ids_verified"] == 1
    assert 0 < found["feedback_ms_p50"] <= found["feedback_ms_p99"]


def test_a_label_that_comes_late_is_seen(material):
    class Late(FakeServer):
        def infer(self, request, model):
            self.version = 1  # whatever was told since
            return super().infer(request, model)

    with client_of(Late()) as client:
        learner = Served(client, material, "s")
        learner.teach(np.arange(8))
        assert incremental_effects.single_labels(learner, 2)["next_request"] == 0


def test_a_forgotten_class_is_answered_no_more(material):
    with client_of(FakeServer(verified=False)) as client:
        learner = Served(client, material, "s")
        learner.teach(np.arange(8))
        answers = learner.answer(np.arange(10))
        found = incremental_effects.forgotten_class(learner, 1, answers)
    assert found == {
        "forget_recall_before": 100,
        "forget_recall_after": 0,
        "forget_others_change": 12.5,  # one of eight was taken for it
        "forget_others_lost": 0,
        "forget_verified": 0,
        "forget_removed": 2,
    }


# -- what it is compared with -----------------------------------------------------------------------------------------


def test_a_step_of_sgd_by_hand():
    train = np.array([[1, 0], [0, 2]], np.float32)
    learner = SGD(train, np.array([1, 1]), np.eye(2, dtype=np.float32), classes=2, rate=0.5)
    assert learner.teach(np.array([0])) == 0  # of equal logits the first
    # p = ½, so both classes' weights move by 0.5 · 0.5 · x, and their biases by 0.25
    np.testing.assert_allclose(learner._weights, [[-0.25, 0], [0.25, 0]])
    np.testing.assert_allclose(learner._bias, [-0.25, 0.25])
    assert learner.teach(np.array([1])) == 1
    assert learner.answer(np.array([0, 1])).tolist() == [1, 1]


def seen_of(material):
    """Features that tell the classes apart: the grey, once for each class."""
    greys = [some.images[:, 0, 0, 0].astype(np.float32) for some in (material.train, material.rest, material.test)]
    return Seen(*(np.stack([-np.abs(grey - centre) / 25 for centre in (15, 65, 115, 165)], axis=1) for grey in greys))


def test_the_ceiling_has_seen_all_at_once(material):
    answers = incremental_baselines.ceiling(seen_of(material), material, np.arange(8))
    assert answers[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_best_rate_is_the_best_on_the_rest(material, monkeypatch):
    monkeypatch.setattr(incremental_baselines, "RATES", (1e4, 1e-3))
    train, rest = np.array([[1], [1], [-1], [1]], np.float32), np.array([[1], [-1]], np.float32)
    two = material._replace(
        names=("w", "x"),
        train=Part(material.train.images[:4], np.array([0, 0, 1, 1])),  # the last is wrong
        rest=Part(material.rest.images[:2], np.array([0, 1])),
    )
    # small steps are each half a rate: weights of class 0: (1 + 1 + 1 − 1)/2 = 1 rate, its bias 0, and both are right;
    # with large ones the last image alone decides: weights 0, and the bias is class 1's
    assert incremental_baselines.best_rate(Seen(train, rest, rest), two, [np.arange(4)]) == 1e-3
    other_order = [np.array([3, 0, 1, 2])]  # here both rates end right, and the first is taken
    assert incremental_baselines.best_rate(Seen(train, rest, rest), two, other_order) == 1e4


def test_features_are_centred_without_looking_at_the_test():
    train, rest, test = np.array([[0.0, 2.0]]), np.array([[4.0, 2.0]]), np.array([[2.0, 2.0]])
    seen = incremental_baselines.normalised(train, rest, test)
    deviation = math.sqrt(2)  # of 0, 2, 4, 2
    np.testing.assert_allclose(seen.train, [[-2 / deviation, 0]])
    np.testing.assert_allclose(seen.test, [[0, 0]])


def test_features_are_those_that_the_server_reads(material):
    digits = incremental_images.of_digits(1)
    (entry,) = incremental_server.own_models(("counts",), digits, None)
    network = incremental_encoder.load(entry)
    found = incremental_encoder.features(network, digits.train.images[:3])
    with torch.no_grad():
        expected = network(torch.from_numpy(digits.train.images[:3]).float() / 255).features
    torch.testing.assert_close(found, expected)


def test_cost_of_one_label():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 4
    found = incremental_cost.one_label(features[:30], labels[:30], features[30:], labels[30:])
    assert found["pairs_per_label_max"] == 256  # the first image of a class meets one key of each codebook
    assert set(found) == {
        "pairs_per_label_max",
        *(f"one_label_ms/{x}" for x in (*incremental_cost.STEPS, "p50", "p99")),
    }
    assert 0 < found["one_label_ms/p50"] <= found["one_label_ms/p99"]


# -- how it is told ---------------------------------------------------------------------------------------------------


def played(answers, *recalls):
    return Played(np.array(answers), tuple(map(np.array, recalls)), (1.0, 0.5), 0.25)


def test_figures_have_the_names_of_the_design():
    compared = {
        "in_order": played([0, 0, 1, 0], [1.0, 0.5], [0.5, 0.5]),
        "shuffled": played([0, 0, 1, 1]),
        "rare_in_order": played([0, 0, 0, 1]),
        "rare_shuffled": played([0, 0, 0, 0]),
    }
    found = incremental_figures.figures_of("counts", compared, np.array([0, 0, 1, 1]), rare=1)
    assert found == {
        "accuracy/counts": 75,
        "drop/counts": 25,
        "order_gap/counts": 25,
        "prequential/counts": 25,
        "accuracy/rare/counts": 75,
        "order_gap/rare/counts": -25,
        "recall/rare/counts": 50,
        "accuracy/task_1/counts": 100,
        "accuracy/task_2/counts": 50,
    }
    answers = np.array([0, 0, 1, 1])
    found |= incremental_figures.ceiling_figures(answers, np.array([0, 0, 0, 1]), answers, rare=1)
    assert incremental_figures.ratios(found) == {"ratio/counts_over_ceiling": 0.75, "ratio/rare/counts_over_ceiling": 1}
    assert found["recall/rare/ceiling"] == 50


@pytest.mark.parametrize(
    ("figure", "value", "kept"),
    [
        ("ratio/counts_over_ceiling", 0.93, True),
        ("ratio/counts_over_ceiling", 0.9299, False),
        ("ratio/counts_over_ceiling", math.nan, False),
        ("order_gap/counts", 0.0, True),
        ("order_gap/counts", -0.05, False),
        ("order_gap/rare/ridge", 0.1, False),
        ("order_gap/rare/ridge", -0.05, True),
        ("forget_others_change/ridge", -0.2, True),
        ("forget_others_change/ridge", 0.25, False),
        ("one_label_ms/p99", 5.0, False),
    ],
)
def test_bounds(figure, value, kept):
    (wanted,) = (each for each in incremental_figures.WANTED if each.figure == figure)
    assert wanted.kept(value) == kept


FIGURES = {
    "labels": 2000,
    **{f"{what}/{name}": 80.25 for what in ("accuracy", "accuracy/rare") for name in ("counts", "ceiling")},
    **{f"accuracy/task_{task}/counts": 90.0 - task for task in (1, 2)},
    **{f"{what}/counts": 1.5 for what in ("drop", "order_gap", "order_gap/rare", "recall/rare")},
    "ratio/counts_over_ceiling": 0.912,
    "forget_verified/counts": 1.0,
}


def printed(table):
    out = io.StringIO()
    Console(file=out, width=80, color_system="standard", force_terminal=True).print(table)
    return out.getvalue()


def test_tables_fit_a_terminal():
    text = printed(incremental_figures.accuracy_table(FIGURES))
    for cell in ("2000 labels", "key-value, counts", "80.25", "0.912", "+1.50"):
        assert cell in text
    assert "SGD" not in text
    rare = printed(incremental_figures.rare_table(FIGURES))
    assert "20 times fewer" in rare
    assert rare.count("80.25") == 2


def test_what_falls_short_is_red():
    lines = printed(incremental_figures.wanted_table(FIGURES)).splitlines()

    def line(name):
        (found,) = (each for each in lines if name in each)
        return found

    assert "\x1b[31m" in line("ratio/counts_over_ceiling")
    assert "\x1b[31m" in line("order_gap/counts")
    assert "\x1b[31m" not in line("forget_verified/counts")
    assert "ridge" not in "".join(lines)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    incremental_figures.plot(tmp_path / "out.png", FIGURES, tasks=2)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# -- the script -------------------------------------------------------------------------------------------------------


def test_own_models_are_settings_of_a_server(material, tmp_path):
    prior = tmp_path / "unlabelled.npz"
    prior.touch()
    for given, source in ((prior, "efficientnet-lite0"), (None, "digits")):
        entries = incremental_server.own_models(incremental.HEADS, material, given)
        read = [ModelSettings.model_validate(entry) for entry in entries]
        assert [model.name for model in read] == list(incremental.HEADS)
        assert [model.adapter.kv_bottleneck.head for model in read] == list(incremental.HEADS)
        assert {model.adapter.kv_bottleneck.answers for model in read} == {"head"}
        assert {model.source.builtin for model in read} == {source}
    assert read[0].input is None


def test_the_server_is_started_beside_its_images_and_with_its_allocator(material, monkeypatch):
    started = []

    @contextmanager
    def own_server(models, start_max_s):
        with np.load(models[0]["prior"]) as arrays:
            started.append((arrays["images"].shape, {name: os.environ[name] for name in incremental_server.MALLOC}))
        yield "http://own"

    monkeypatch.setattr(incremental_server, "own_server", own_server)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    with incremental_server.server(lambda prior: [{"prior": str(prior)}], material) as url:
        assert url == "http://own"
    ((shape, environment),) = started
    assert shape == (4, 1, 1, 3)
    assert environment == {"MALLOC_TRIM_THRESHOLD_": "7", "MALLOC_MMAP_THRESHOLD_": "2000000000"}
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def run(monkeypatch, server, *arguments):
    @contextmanager
    def own(_models, _material):
        yield "http://own"

    monkeypatch.setattr(incremental, "server", own)
    monkeypatch.setattr(incremental, "LabelClient", partial(LabelClient, transport=httpx.MockTransport(server)))
    # what is done in process has tests of its own
    monkeypatch.setattr(
        incremental, "in_process", lambda *_: {"accuracy/ceiling": 100.0, "accuracy/rare/ceiling": 50.0}
    )
    monkeypatch.setattr(sys, "argv", ["incremental.py", *map(str, arguments)])
    return incremental.main()


def test_whole_run_on_its_own_server(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    server, file, picture = FakeServer(side=32), tmp_path / "figures.json", tmp_path / "figures.png"
    outputs = ("--json", file, "--plot", picture)
    assert run(monkeypatch, server, "--quick", "--per-class", 4, "--heads", "counts", *outputs) == 0
    written = json.loads(file.read_text())
    found = written["figures"]
    assert written["script"] == "incremental"
    assert found["labels"] == 40
    assert found["order_gap/counts"] == found["order_gap/rare/counts"] == 0  # a nearest image knows no order
    assert found["ratio/counts_over_ceiling"] == found["accuracy/counts"] / 100 > 0.7
    assert found["forget_recall_after/counts"] == 0
    assert found["forget_removed/counts"] == 4
    assert found["next_request/counts"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "ratio/counts_over_ceiling" in capsys.readouterr().out
    assert len({stream for stream, _, _ in server.asked}) == 4
    assert all(server.told.values())  # its own server goes away as a whole


def test_a_server_of_others_is_left_empty(monkeypatch):
    server = FakeServer(side=32)
    assert run(monkeypatch, server, "--quick", "--per-class", 2, "--heads", "counts", "--url", "http://there") == 0
    assert len(server.told) == 4
    assert not any(server.told.values())


def test_a_head_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    class Broken(FakeServer):
        def feedback(self, request, model):
            if model == "counts":
                return httpx.Response(503, json={"error": "the store is full"})
            return super().feedback(request, model)

    file = tmp_path / "figures.json"
    server = Broken(models=("counts", "ridge"), side=32)
    arguments = ("--quick", "--per-class", 2, "--heads", "ridge,counts", "--json", file)
    assert run(monkeypatch, server, *arguments) == 1
    assert "failed: counts: POST" in capsys.readouterr().err
    found = json.loads(file.read_text())["figures"]
    assert "accuracy/ridge" in found
    assert "accuracy/counts" not in found


@pytest.mark.parametrize(
    ("server", "message"),
    [(FakeServer(models=()), "no model 'counts' that is ready"), (FakeServer(side=224), "reads images of 224 pixels")],
)
def test_a_server_with_other_models_is_an_error(monkeypatch, server, message):
    with pytest.raises(LoadTestError, match=message):
        run(monkeypatch, server, "--url", "http://there", "--quick", "--per-class", 1)


def test_missing_files_are_told(monkeypatch, tmp_path):
    with pytest.raises(MissingFile, match=r"source\.npz does not exist"):
        run(monkeypatch, FakeServer(), "--data", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --data, or --quick"),
        (("--quick", "--data", "a"), "give --data, or --quick"),
        (("--quick", "--per-class", 0), "--per-class must be 1 or more, not 0"),
        (("--quick", "--heads", "counts,forest"), "forest: not one of counts, ridge, class_means, gradient"),
        (("--quick", "--rare", 10), "--rare must be 0 … 9, not 10"),
        (("--quick", "--seed", -1), "--seed must be 0 or more, not -1"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, FakeServer(), *arguments)
    assert message in capsys.readouterr().err


def test_figures_of_what_no_server_hosts(material, monkeypatch):
    monkeypatch.setattr(incremental_encoder, "load", lambda _: None)
    features = {id(some.images): read for some, read in zip(material[1:4], seen_of(material), strict=True)}
    monkeypatch.setattr(incremental_encoder, "features", lambda _, images: torch.from_numpy(features[id(images)]))
    orders = incremental_orders.orders_of(material.train.labels, rare=3, seed=0)
    lines = []
    found = incremental.in_process({}, material, orders, 3, lines.append)
    assert {"accuracy/sgd_best", "accuracy/sgd_1e-3", "accuracy/rare/ceiling", "one_label_ms/p99"} <= set(found)
    assert found["accuracy/ceiling"] >= 80
    assert found["rate/sgd_best"] in incremental_baselines.RATES
    assert lines[-1].startswith("ceiling: ")


@pytest.mark.real
@pytest.mark.timeout(600)  # minutes where others use the machine too
def test_a_trial_on_a_real_server(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "loadtests" / "incremental.py"), "--quick", "--json", str(file)]
    done = subprocess.run([*command, "--heads", "counts"], capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["figures"]
    assert found["order_gap/counts"] == 0
    assert found["forget_recall_after/counts"] == 0
    assert found["forget_verified/counts"] == found["forget_ids_verified/counts"] == found["next_request/counts"] == 1
    assert found["accuracy/counts"] > 90
