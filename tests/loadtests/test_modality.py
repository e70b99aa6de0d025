"""The measure against a server whose answers are known: it reads and writes the real server's wire form."""

import base64
import io
import json
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from adapters.detection import Boxes
from loadtests import (
    modality,
    modality_client,
    modality_figures,
    modality_images,
    modality_load,
    modality_scenes,
    plots,
    wrk,
)
from loadtests.errors import LoadTestError, MissingFile, RequestFailed
from loadtests.modality_client import Detected, Detector
from loadtests.modality_scenes import AP, Scenes
from loadtests.wrk import Load
from tta_serve.builtin import digits, scenes
from tta_serve.config import ModelSettings
from tta_serve.protocol import format_infer, parse_infer

COLOUR = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
GREY = COLOUR[:1]
NOTHING = (np.zeros((0, 4)), np.zeros(0), np.zeros(0))


class FakeServer:
    """Answers with what `find` says of the model, the image [C, H, W] and the modality; of one channel: `ir`."""

    def __init__(self, find=lambda *_: NOTHING, results=("applied",), models=("scenes", "plain")):
        self.find = find
        self.results = iter(results)
        self.models = models
        self.looked = []  # model, channels, the modality that was named, x-adapt, stream
        self.taught = []

    def __call__(self, request):
        _, _, _, model, route = request.url.path.split("/")
        if model not in self.models:
            return httpx.Response(404, json={"error": f"no model {model}"})
        if route == "ready":
            return httpx.Response(200, json={"ready": True})
        if route == "feedback":
            self.taught.append(json.loads(request.content))
            return httpx.Response(200, json={"results": [{"result": next(self.results)}]})
        asked = parse_infer(request.content, request.headers["inference-header-content-length"])
        (image,) = asked.tensors["images"]
        named = asked.parameters.get("modality")
        headers = request.headers
        self.looked.append((model, len(image), named, headers["x-adapt"], headers["x-session-id"]))
        used = named or ("ir" if len(image) == 1 else "rgb")
        boxes, labels, scores = self.find(model, image, used)
        outputs = {
            "boxes": np.array(boxes, np.float32).reshape(1, -1, 4),
            "labels": np.array(labels, np.int64)[np.newaxis],
            "scores": np.array(scores, np.float32)[np.newaxis],
            "num_detections": np.array([len(scores)], np.int64),
        }
        header = {"parameters": {"modalities": [used], "translator_versions": [str(len(self.taught))]}}
        body, length = format_infer(header, outputs, asked.binary_outputs)
        return httpx.Response(200, content=body, headers={"inference-header-content-length": str(length)})


def detector(server, model="scenes"):
    return Detector("http://test", model, transport=httpx.MockTransport(server))


def detectors(server, *models):
    return {model: detector(server, model) for model in models}


@pytest.fixture(scope="module")
def made():
    return modality_scenes.make(4, modality.SEED, held_out=True)


def truth_of(made):
    """What is in an image of either modality, each box with the score 0.9."""
    known = {
        image.tobytes(): (truth.boxes.numpy(), truth.labels.numpy(), np.full(len(truth.labels), 0.9))
        for images in (made.rgb, made.infrared)
        for image, truth in zip(images, made.truth, strict=True)
    }
    return lambda image: known[image.tobytes()]


# -- requests and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "named"), [(COLOUR, "rgb"), (GREY, "ir"), (GREY, None)])
def test_the_server_reads_what_is_sent(image, named):
    request = modality_client.encode(image, stream="s", modality=named)
    asked = parse_infer(request.body, request.headers["Inference-Header-Content-Length"])
    np.testing.assert_array_equal(asked.tensors["images"], image[np.newaxis])
    assert asked.parameters.get("modality") == named
    assert asked.binary_outputs == "all"


def test_all_requests_of_a_stream_have_the_same_headers():
    large = np.zeros((3, 1000, 1000), np.uint8)
    headers = [
        modality_client.encode(image, stream="s", modality=named).headers
        for image, named in ((large, "rgb"), (GREY, "ir"), (GREY, None))
    ]
    assert headers[0] == headers[1] == headers[2]
    assert headers[0]["x-adapt"] == "on"
    assert modality_client.encode(GREY, stream="s", adapt=False).headers["x-adapt"] == "off"


def test_an_answer_keeps_its_bits():
    boxes, scores = np.array([[0.1, 2, 3, 4], [1, 1, 2, 2]], np.float32), np.array([0.7, 0.3], np.float32)
    with detector(FakeServer(lambda *_: (boxes, [3, 10], scores))) as client:
        found = client.detect(GREY, stream="s")
    assert found.same_bits(Detected(boxes, np.array([3, 10]), scores, "", 0))
    assert (found.modality, found.translator_version) == ("ir", 0)


def test_nothing_found_is_an_answer():
    with detector(FakeServer()) as client:
        found = client.detect(COLOUR, stream="s", modality="rgb")
    assert found.boxes.shape == (0, 4)
    assert len(found.labels) == len(found.scores) == 0


def test_one_bit_makes_an_answer_another():
    one = Detected(np.array([[0, 1, 2, 3]], np.float32), np.array([1]), np.array([0.5], np.float32), "rgb", 0)
    next_score = np.nextafter(one.scores, np.float32(1))
    assert one.same_bits(one._replace(modality="ir", translator_version=3))
    assert not one.same_bits(one._replace(scores=next_score))
    assert not one.same_bits(one._replace(labels=np.array([2])))
    assert not one.same_bits(one._replace(boxes=-one.boxes))
    assert not one.same_bits(one._replace(boxes=np.array([[-0.0, 1, 2, 3]], np.float32)))
    assert not one.same_bits(Detected(one.boxes[:0], one.labels[:0], one.scores[:0], "rgb", 0))


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, json={"outputs": []}),
        httpx.Response(200, content=b"{}", headers={"inference-header-content-length": "2"}),
        httpx.Response(
            200,
            content=b'{"outputs": [{"name": "boxes", "datatype": "FP32", "shape": [1, 1, 4], "parameters": '
            b'{"binary_data_size": 16}}]}too short',
            headers={"inference-header-content-length": "112"},
        ),
    ],
)
def test_another_answer_is_an_error(answer):
    with detector(lambda _: answer) as client, pytest.raises(RequestFailed, match="not a detector's"):
        client.detect(GREY, stream="s")


@pytest.mark.parametrize("image", [COLOUR, GREY])
def test_feedback_holds_the_picture_and_its_boxes(image):
    server = FakeServer(results=["frozen"])
    with detector(server) as client:
        assert client.teach(image, [[0, 0, 2, 2]], [4], stream="s", modality="ir") == "frozen"
    (body,) = server.taught
    (item,) = body["items"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["image"]))))
    np.testing.assert_array_equal(picture, image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    assert (item["boxes"], item["labels"], body["stream"], body["modality"]) == ([[0, 0, 2, 2]], [4], "s", "ir")


def test_feedback_without_a_result_is_an_error():
    with (
        detector(lambda _: httpx.Response(200, json={"results": []})) as client,
        pytest.raises(RequestFailed, match="no result"),
    ):
        client.teach(GREY, [], [], stream="s", modality="ir")


# -- images -----------------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_in_both_modalities(made):
    assert [image.shape for image in made.rgb] == [(3, *scenes.SIZE)] * 4
    assert [image.shape for image in made.infrared] == [(1, *scenes.SIZE)] * 4
    for number, scene in enumerate(scenes.scenes(4, modality.SEED, held_out=True)):
        np.testing.assert_array_equal(made.rgb[number].transpose(1, 2, 0), scene.image)
        np.testing.assert_array_equal(made.truth[number].boxes, scene.boxes)
    other = modality_scenes.make(4, modality.SEED, held_out=False)
    assert {image.tobytes() for image in other.rgb}.isdisjoint(image.tobytes() for image in made.rgb)


def test_precision_of_half_of_what_there_is():
    # one class, two scenes with a box each, one of them found: recall 1/2 at precision 1. COCO takes the precision at
    # the 101 recalls 0, 0.01 … 1, and 51 of them are at most 1/2
    picture, box = np.zeros((3, 10, 10), np.uint8), Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([1]))
    two = Scenes((picture,) * 2, (picture[:1],) * 2, (box, box))
    found = Detected(box.boxes.numpy(), box.labels.numpy(), np.array([0.9], np.float32), "rgb", 0)
    none = Detected(found.boxes[:0], found.labels[:0], found.scores[:0], "rgb", 0)
    assert modality_scenes.average_precision(two, [found, none]) == pytest.approx((51 / 101, 51 / 101))
    assert modality_scenes.average_precision(two, [none, none]) == (0, 0)


def test_equalised_uses_the_whole_range():
    image = np.array([[[100, 101], [102, 103]]], np.uint8)
    large = np.repeat(np.repeat(image, 64, axis=1), 64, axis=2)
    flat = modality_images.equalised(large)
    assert flat.shape == large.shape
    # 16,384 pixels, the last level's 4,096 apart 12,288: a step is 48, and a level begins (24 + pixels below) / 48
    assert np.unique(flat).tolist() == [0, (24 + 4096) // 48, (24 + 8192) // 48, 255]


def test_photographs_are_grey_crops_of_different_sizes():
    crops = modality_images.photographs(12, seed=4)
    assert len(crops) == 12
    assert all(crop.dtype == np.uint8 and len(crop) == 1 for crop in crops)
    assert len({crop.shape for crop in crops}) == 12
    assert all(16 <= side <= 400 for crop in crops for side in crop.shape[1:])
    again = modality_images.photographs(12, seed=4)
    assert all(np.array_equal(one, other) for one, other in zip(crops, again, strict=True))


def test_cifar_in_grey(tmp_path):
    colours = np.zeros((2, 32, 32, 3), np.uint8)
    colours[1] = (255, 0, 0)
    np.savez(tmp_path / "clean.npz", images=colours)
    black, red = modality_images.grey_cifar(tmp_path, 5)
    assert (black.shape, black.max()) == ((1, 32, 32), 0)
    assert np.unique(red).tolist() == [76]  # 0.299 of 255


# -- what is measured -------------------------------------------------------------------------------------------------


def test_each_way_shows_its_images_to_its_model(made):
    truth = truth_of(made)
    told = []

    def find(model, image, modality):
        blind = model == "scenes" and len(image) == 1 and modality == "rgb"
        return NOTHING if blind else truth(image)

    server = FakeServer(find, models=("scenes", "fine-tuned"))
    with_all = modality.precisions(detectors(server, "scenes", "fine-tuned"), made, "s", told.append)
    assert {way: each.ap50 for way, each in with_all.items()} == {
        "rgb/frozen": 1,
        "ir/zero_shot": 0,
        "ir/equalised": 0,
        "ir/modtr": 1,
        "ir/fine_tuned": 1,
        "rgb/fine_tuned": 1,
    }
    assert list(with_all) == list(modality_figures.WAYS)
    assert server.looked[::4] == [
        ("scenes", 3, "rgb", "off", "s"),
        ("scenes", 1, "rgb", "off", "s"),
        ("scenes", 1, "rgb", "off", "s"),
        ("scenes", 1, "ir", "off", "s"),
        ("fine-tuned", 1, "rgb", "off", "s"),
        ("fine-tuned", 3, "rgb", "off", "s"),
    ]
    assert told[0] == "rgb/frozen: AP50 1.000, AP 1.000"
    without = modality.precisions(detectors(server, "scenes"), made, "s", told.append)
    assert list(without) == ["rgb/frozen", "ir/zero_shot", "ir/equalised", "ir/modtr"]


def test_identity_counts_the_answers_with_other_bits(made):
    truth = truth_of(made)
    first = made.rgb[0].tobytes()
    server = None

    def find(model, image, modality):
        boxes, labels, scores = truth(image)
        # the plain model differs on one scene of four, and once it was taught the other does on all but one
        other = image.tobytes() == first if model == "plain" else server.taught and image.tobytes() != first
        return boxes, labels, scores - 1e-6 if other else scores

    server = FakeServer(find, results=["applied", "refused", "applied", "applied"], models=("scenes", "plain"))
    told = []
    found = modality.identity(detectors(server, "scenes", "plain"), made, "s", made, told.append)
    assert found == {
        "rgb_identical/plain": 0.75,
        "feedback_applied": 3,
        "translator_version/after_feedback": 4,
        "rgb_identical/after_feedback": 0.25,
    }
    assert {body["modality"] for body in server.taught} == {"ir"}
    assert server.taught[2]["items"][0]["boxes"] == made.truth[2].boxes.tolist()
    assert "rgb_identical/plain: 0.75" in told


def test_identity_without_teaching_or_another_model(made):
    server = FakeServer(models=("scenes",))
    assert modality.identity(detectors(server, "scenes"), made, "s", None, print) == {}
    assert server.taught == []


def test_feedback_that_is_never_applied_ends_the_run(made):
    server = FakeServer(results=["refused", "frozen", "refused", "refused"], models=("scenes",))
    with pytest.raises(RequestFailed, match="no feedback was applied: refused, frozen"):
        modality.teach(detector(server), made, "s")


def test_router_is_right_where_only_infrared_is_translated():
    server, told = FakeServer(models=("scenes",)), []
    images = {"rgb": [COLOUR] * 4, "ir": [GREY, GREY, GREY, COLOUR], "photographs": [COLOUR, GREY]}
    found = modality.routing(detector(server), images, "s", told.append)
    assert found == {"router_right/rgb": 1.0, "router_right/ir": 0.75, "router_right/photographs": 0.5}
    assert {named for _, _, named, _, _ in server.looked} == {None}
    assert told[1] == "ir: 75.00% of 4 routed rightly"


# -- load -------------------------------------------------------------------------------------------------------------


def test_the_mix_alternates_and_wrk_can_send_it(made):
    sent = modality_load.requests(made, "s")

    def shapes(variant):
        parsed = [parse_infer(each.body, each.headers["Inference-Header-Content-Length"]) for each in sent[variant]]
        return [(len(each.tensors["images"][0]), each.parameters.get("modality")) for each in parsed]

    assert shapes("rgb") == [(3, "rgb")] * 4
    assert shapes("mixed") == [(3, "rgb"), (1, "ir")] * 4
    assert shapes("rgb_routed") == [(3, None)] * 4
    assert shapes("mixed_routed") == [(3, None), (1, None)] * 4
    for several in sent.values():
        assert wrk.MARK in wrk.script(several)


RPS = {"rgb": 100.0, "mixed": 85.0, "rgb_routed": 90.0, "mixed_routed": 72.0}


def fake_load(calls):
    def load(variant, seconds):
        calls.append((variant, seconds))
        return Load(round(RPS[variant] * 2), 1, 0, duration_s=2.0, p50_ms=1.0, p99_ms=3.0)

    return load


def test_both_sides_of_a_ratio_follow_each_other():
    calls, told = [], []
    rounds = modality_load.measure(fake_load(calls), 5, 7, told.append)
    assert calls[:2] == [("rgb", 2), ("mixed", 2)]
    assert [variant for variant, _ in calls[2:6]] == ["rgb", "mixed", "mixed", "rgb"]
    assert {seconds for variant, seconds in calls[2:12]} == {7}
    assert len(calls) == 2 * (2 + 2 * 5)
    assert told[0] == "16 connections, rgb: 100 requests/s, p99 3.0 ms"
    found = modality_load.figures(rounds)
    assert found["ratio/mixed_over_rgb_throughput"] == 0.85
    assert found["ratio_min/mixed_routed_over_rgb_routed_throughput"] == 0.8
    assert found["rps/mixed/16"] == found["rps_max/mixed/16"] == 85
    assert found["p99_ms/rgb/16"] == 3
    assert found["refused_requests/rgb/16"] == 5
    assert found["failed_requests/rgb/16"] == 0


def test_a_server_that_answers_nothing_is_an_error():
    def load(_variant, _seconds):
        return Load(0, 2, 7, duration_s=2.0, p50_ms=0.0, p99_ms=0.0)

    with pytest.raises(LoadTestError, match="rgb: no request was answered; 7 failed, 2 got 429"):
        modality_load.measure(load, 5, 1, print)


# -- how it is told ---------------------------------------------------------------------------------------------------

FIGURES = {
    "scenes": 500,
    "seed": 4,
    **modality_figures.precision_figures({"ir/modtr": AP(0.6, 0.85), "ir/fine_tuned": AP(0.7, 0.95)}),
    "rgb_identical/plain": 0.99999,
    "router_right/rgb": 1.0,
    "router_right/photographs": 0.5,
    "ratio/mixed_over_rgb_throughput": 0.85,
    "ratio_min/mixed_over_rgb_throughput": 0.8,
    "ratio_max/mixed_over_rgb_throughput": 0.9,
}


def printed(table):
    out = io.StringIO()
    Console(file=out, width=80, color_system="standard", force_terminal=True).print(table)
    return out.getvalue()


def test_figures_have_the_names_of_the_design():
    assert FIGURES["ap50/ir/modtr"] == 0.85
    assert FIGURES["ap/ir/fine_tuned"] == 0.7
    assert FIGURES["ratio/modtr_over_finetuned"] == pytest.approx(0.85 / 0.95)
    assert "ratio/modtr_over_finetuned" not in modality_figures.precision_figures({"ir/modtr": AP(0.6, 0.85)})
    nothing = modality_figures.precision_figures({"ir/modtr": AP(0.6, 0.85), "ir/fine_tuned": AP(0, 0)})
    assert np.isnan(nothing["ratio/modtr_over_finetuned"])


def test_what_falls_short_is_red():
    lines = printed(modality_figures.wanted_table(FIGURES)).splitlines()

    def line(name):
        (found,) = (each for each in lines if name in each)
        return found

    red = "\x1b[31m"
    assert red in line("ratio/modtr_over_finetuned")  # 0.895
    assert red in line("rgb_identical/plain")
    assert "0.9999" in line("rgb_identical/plain")  # and not 1.0000
    assert red in line("router_right/photographs")
    assert red not in line("router_right/rgb")
    assert red not in line("ratio/mixed_over_rgb_throughput")
    assert "0.800–0.900" in line("ratio/mixed_over_rgb_throughput")
    assert "router_right/cifar" not in "".join(lines)


def test_precision_table_says_which_scenes():
    text = printed(modality_figures.precision_table(FIGURES))
    for cell in ("IR, translated", "0.850", "0.600", "500 held-out scenes of seed 4"):
        assert cell in text
    assert "zero-shot" not in text


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rounds = modality_load.measure(fake_load([]), 5, 1, lambda _: None)
    precision, router = modality_figures.panels(FIGURES)
    assert precision.series == {"AP": [0.6, 0.7], "AP50": [0.85, 0.95]}
    assert list(precision.levels.values()) == [pytest.approx(0.855)]
    assert dict(zip(router.labels, router.series["right"], strict=True)) == {"rgb": 1.0, "photographs": 0.5}
    load = modality_load.panel(rounds)
    assert list(load.series.values()) == [[100, 90], [85, 72]]
    plots.draw(tmp_path / "modality.png", [precision, router, load])
    assert (tmp_path / "modality.png").read_bytes().startswith(b"\x89PNG")
    assert modality_figures.panels({"scenes": 1, "seed": 4}) == []


# -- the script -------------------------------------------------------------------------------------------------------


def test_own_models_are_settings_of_a_server(tmp_path):
    weights = tmp_path / "tuned.safetensors"
    weights.touch()
    read = [ModelSettings.model_validate(model) for model in modality.own_models(weights, None)]
    assert [model.name for model in read] == ["scenes", "plain", "fine-tuned"]
    assert {model.task for model in read} == {"detection"}
    assert [model.adapter.modtr is None for model in read] == [False, True, True]
    assert read[2].labels == ("__background__", *digits.LABELS)
    assert [model["name"] for model in modality.own_models(None, weights)] == ["scenes", "plain"]
    assert modality.own_models(None, weights)[0]["translators"] == {"ir": str(weights)}


def run(monkeypatch, server, *arguments):
    @contextmanager
    def own_server(models):
        server.models = tuple(model["name"] for model in models)
        yield "http://own"

    monkeypatch.setattr(modality, "own_server", own_server)
    monkeypatch.setattr(modality, "Detector", partial(Detector, transport=httpx.MockTransport(server)))
    monkeypatch.setattr(modality.modality_load, "wrk_load", lambda *_: fake_load([]))
    monkeypatch.setattr(modality.wrk, "check_installed", lambda: "wrk")
    monkeypatch.setattr(sys, "argv", ["modality.py", *map(str, arguments)])
    return modality.main()


def test_whole_run_on_its_own_server(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tuned = tmp_path / "tuned.safetensors"
    tuned.touch()
    known = modality_scenes.make(2, 5, held_out=True)
    truth = truth_of(known)
    seen = {image.tobytes() for image in known.rgb}

    def find(_model, image, _modality):
        return truth(image) if image.tobytes() in seen else NOTHING

    server = FakeServer(find, ["applied"] * 8)
    file, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    outputs = ("--json", file, "--plot", picture)
    assert run(monkeypatch, server, "--scenes", 2, "--seed", 5, "--fine-tuned", tuned, *outputs) == 0
    written = json.loads(file.read_text())
    found = written["figures"]
    assert written["script"] == "modality"
    assert {name.partition("/")[0] for name in found} >= {"ap50", "ap", "router_right", "rps", "ratio", "rgb_identical"}
    assert (found["ap50/rgb/frozen"], found["ap50/rgb/fine_tuned"], found["ap50/ir/modtr"]) == (1, 1, 0)
    assert (found["router_right/rgb"], found["router_right/photographs"]) == (1, 0)  # the fake sends all grey to `ir`
    assert (found["rgb_identical/plain"], found["rgb_identical/after_feedback"]) == (1, 1)
    assert (found["feedback_applied"], found["scenes"], found["seed"]) == (8, 2, 5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "2 held-out scenes of seed 5" in capsys.readouterr().out


def test_a_server_of_others_is_not_taught(monkeypatch, tmp_path):
    server = FakeServer(models=("mine",))
    file = tmp_path / "figures.json"
    arguments = ("--url", "http://there", "--model", "mine", "--scenes", 2, "--json", file, "--only", "ap")
    assert run(monkeypatch, server, *arguments) == 0
    assert server.taught == []
    found = json.loads(file.read_text())["figures"]
    assert "ap50/ir/modtr" in found
    assert not any(name.startswith(("rgb_identical", "router_right", "rps", "ap50/ir/fine")) for name in found)


def test_one_part_alone(monkeypatch, tmp_path):
    server, file = FakeServer(), tmp_path / "figures.json"
    run(monkeypatch, server, "--scenes", 3, "--only", "router", "--json", file)
    assert set(json.loads(file.read_text())["figures"]) == {
        "scenes",
        "seed",
        *(f"router_right/{kind}" for kind in ("rgb", "ir", "photographs")),
    }


def test_a_server_without_the_model_is_an_error(monkeypatch):
    with pytest.raises(LoadTestError, match="no model 'absent' that is ready; see --model"):
        run(monkeypatch, FakeServer(), "--url", "http://there", "--model", "absent", "--scenes", 1)


def test_missing_files_are_told_before_a_server_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(modality_scenes, "make", lambda *_, **__: SimpleNamespace())
    with pytest.raises(MissingFile, match=r"tuned\.safetensors does not exist"):
        run(monkeypatch, FakeServer(), "--fine-tuned", tmp_path / "tuned.safetensors")
    with pytest.raises(MissingFile, match=r"clean\.npz does not exist"):
        run(monkeypatch, FakeServer(), "--data", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", 4), "--pairs must be 5 or more, not 4"),
        (("--seconds", 0), "--seconds must be 1 to 600, not 0"),
        (("--scenes", 0), "--scenes must be 1 or more, not 0"),
        (("--seed", -1), "--seed must be 0 or more, not -1"),
        (("--url", "http://there", "--fine-tuned", "a"), "leave out --url"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, FakeServer(), *arguments)
    assert message in capsys.readouterr().err
