"""A detector of ten lines that looks for the brightest spot; the modality has a dark spot on bright ground."""

import io
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
import typer
from click.testing import Result
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from adapters.translator import SIZES, TranslatorConfig
from tta_serve import coco, router, train_translator_cli, training_data, translators
from tta_serve import train_translator as training
from tta_serve.comparison import translated
from tta_serve.detector_models import LoadedDetector
from tta_serve.detectors import Detector
from tta_serve.errors import ConfigError, InvalidInput, TTAError
from tta_serve.train_translator import TrainResult
from tta_serve.training import Epoch, TrainSettings, Unwatched, best_epoch, finished

torch.set_num_threads(1)

LABELS = ("__background__", "spot")
DIGEST = "0123456789abcdef"
SIDE = 8  # pixels of a spot
FAST = TrainSettings(
    translator=TranslatorConfig(in_channels=1, width=4, depth=1),
    epochs=3,
    batch_images=5,
    learning_rate=0.02,
    checkpoint_steps=2,
    fine_tune=False,
)
# 24 images, 4 of them to validate on, 5 in a step: 4 steps in an epoch


class Killed(BaseException):
    """As sudden as a signal: nothing of ours catches it."""


class Brightest(nn.Module):
    """Takes the centre of brightness for the middle of a spot; its loss is the distance, and it is a little random."""

    looks: ClassVar[list[int]] = []  # images at each look in training mode; of the class, which copies share
    killed_at: ClassVar[int | None] = None  # that look

    def __init__(self, sharpness: float = 20.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        centres = torch.stack([self.centre(image) for image in images])
        if not self.training:
            boxes = torch.cat([centres - SIDE / 2, centres + SIDE / 2], dim=1)
            return [{"boxes": box[None], "labels": torch.tensor([1]), "scores": torch.tensor([0.9])} for box in boxes]
        assert targets is not None
        self.looks.append(len(images))
        if len(self.looks) == self.killed_at:
            raise Killed
        wanted = torch.cat([(target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 for target in targets])
        return {"distance": (centres - wanted).abs().mean(), "noise": torch.rand(()) * centres.mean() / 100}

    def centre(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        share = (self.sharpness * image.mean(0)).flatten().softmax(0).view(height, width)
        x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
        return torch.stack([(share.sum(0) * x).sum(), (share.sum(1) * y).sum()])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Brightest.looks.clear()
    Brightest.killed_at = None


def write_spots(folder: Path, count: int, colour: bool = False) -> Path:
    """A COCO folder: every third picture is 16×24, the others 16×16."""
    generator = np.random.default_rng(int(colour))
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        width = 24 if number % 3 == 0 else 16
        left, top = int(generator.integers(width - SIDE)), int(generator.integers(16 - SIDE))
        pixels = generator.integers(30, 50, (16, width, 3) if colour else (16, width)).astype(np.uint8)
        pixels[top : top + SIDE, left : left + SIDE] += 180
        name = f"{number}.png"
        Image.fromarray(pixels if colour else 255 - pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [left, top, SIDE, SIDE]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "spot"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of the modality; read only."""
    return write_spots(tmp_path_factory.mktemp("spots") / "ir", 24)


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures that the detector knows; read only."""
    return write_spots(tmp_path_factory.mktemp("spots") / "rgb", 12, colour=True)


Run = Callable[..., TrainResult]


@pytest.fixture
def run(ir: Path, tmp_path: Path) -> Run:
    """`run(settings=FAST, out="out", **others)`: the file is `tmp_path / out`."""

    def make(
        settings: TrainSettings = FAST, out: str = "out", data: Path = ir, digest: str = DIGEST, **others: Any
    ) -> TrainResult:
        model = others.pop("model", None) or Brightest()
        return training.train(Detector(model), digest, LABELS, data, tmp_path / out, settings, **others)

    return make


def test_the_loss_falls_and_the_translator_helps(run: Run, rgb: Path) -> None:
    result = run(replace(FAST, epochs=6, translator=TranslatorConfig(in_channels=1, width=8, depth=1)), rgb=rgb)
    losses = [epoch.loss for epoch in result.epochs[1:]]
    assert result.epochs[0].loss is None
    assert losses[-1] < 0.5 * losses[0]
    figures = result.figures
    assert figures["ap50/rgb/frozen"] > 0.9  # what it is made for
    assert figures["ap50/ir/zero_shot"] < 0.2
    assert figures["ap50/ir/modtr"] > figures["ap50/ir/zero_shot"] + 0.3
    assert figures["ap50/ir/zero_shot"] == pytest.approx(result.epochs[0].ap50, abs=0.2)  # it starts as the identity


def test_the_detector_looks_once_at_each_batch(run: Run) -> None:
    run()
    assert Brightest.looks == [5, 5, 5, 5] * 3  # 20 images; validation is in evaluation mode, and not counted


def test_the_detector_stays_as_it_was(run: Run) -> None:
    model = Brightest()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(replace(FAST, fine_tune=True, epochs=1), model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.sharpness.grad is None


@pytest.mark.parametrize("killed_at", [1, 2, 4, 5, 7, 12])
def test_a_training_that_was_killed_ends_as_one_that_was_not(run: Run, tmp_path: Path, killed_at: int) -> None:
    run(out="whole")
    steps = len(Brightest.looks)
    Brightest.looks.clear()
    Brightest.killed_at = killed_at
    with pytest.raises(Killed):
        run(out="killed")
    Brightest.killed_at = None
    run(out="killed")
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(Brightest.looks) - steps <= FAST.checkpoint_steps  # and hardly a step is taken twice
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "whole"}  # no checkpoint is left


def test_fine_tuning_goes_on_too(run: Run, tmp_path: Path) -> None:
    settings = replace(FAST, fine_tune=True, epochs=2, learning_rate=1.0)
    run(settings, out="whole", save_fine_tuned=tmp_path / "whole.tuned", model=Brightest(2.0))
    Brightest.looks.clear()
    Brightest.killed_at = 4 * 2 + 4 + 4  # in the detector's second epoch
    with pytest.raises(Killed):
        run(settings, out="killed", save_fine_tuned=tmp_path / "killed.tuned", model=Brightest(2.0))
    assert (tmp_path / "killed.fine-tuned.checkpoint").exists()
    Brightest.killed_at = None
    run(settings, out="killed", save_fine_tuned=tmp_path / "killed.tuned", model=Brightest(2.0))
    assert weights(tmp_path / "whole.tuned")["sharpness"] != 2
    for end in ("", ".tuned"):
        assert (tmp_path / f"killed{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()


@pytest.mark.slow
def test_killed_by_a_signal(ir: Path, run: Run, tmp_path: Path) -> None:
    """SIGKILL at a step that nobody chose; the process says each step as it is taken."""
    run(out="whole")
    last = random.randrange(1, 4 * FAST.epochs - 3)  # an epoch before the end at the latest: the signal is not instant
    command = [sys.executable, __file__, str(ir), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == f"{last}\n":
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    run(out="killed")
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes(), f"killed after step {last}"


def test_another_seed_gives_other_weights(run: Run, tmp_path: Path) -> None:
    run(replace(FAST, epochs=1), out="one")
    run(replace(FAST, epochs=1, seed=1), out="other")
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "other").keys()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_the_global_generator_is_left_alone(run: Run) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    run(replace(FAST, epochs=1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"settings": replace(FAST, learning_rate=0.01)}, "learning_rate 0.02 (now 0.01)"),
        ({"settings": replace(FAST, seed=3)}, "seed 0 (now 3)"),
        ({"digest": "f" * 16}, f"detector '{DIGEST}' (now 'ffffffffffffffff')"),
        ({"data": "more"}, "training images '"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    run: Run, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    Brightest.killed_at = 7
    with pytest.raises(Killed):
        run()
    Brightest.killed_at = None
    before = (tmp_path / "out.checkpoint").read_bytes()
    if "data" in other:
        other = {"data": write_spots(tmp_path / "more", 25)}
    with pytest.raises(ConfigError) as caught:
        run(**other)
    assert str(caught.value).startswith(f"{tmp_path / 'out.checkpoint'} is the checkpoint of another training: ")
    assert said in str(caught.value)
    assert str(caught.value).endswith("give --restart to throw it away, or another --out")
    assert (tmp_path / "out.checkpoint").read_bytes() == before
    run(**other, restart=True)
    assert (tmp_path / "out").exists()


def test_comparing_less_or_saving_more_often_is_no_other_training(run: Run) -> None:
    Brightest.killed_at = 7
    with pytest.raises(Killed):
        run(replace(FAST, fine_tune=True))
    Brightest.killed_at = None
    Brightest.looks.clear()
    run(replace(FAST, checkpoint_steps=3))
    assert len(Brightest.looks) == 12 - 6


@pytest.mark.parametrize("content", [b"", b"no checkpoint", bytes(100)])
def test_what_is_no_checkpoint_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.checkpoint").write_bytes(content)
    with pytest.raises(ConfigError, match=r"out\.checkpoint is no checkpoint of a training .* give --restart"):
        run()


def test_a_translator_is_no_checkpoint(run: Run, tmp_path: Path) -> None:
    run(replace(FAST, epochs=1))
    shutil.copy(tmp_path / "out", tmp_path / "out.checkpoint")
    with pytest.raises(ConfigError, match="its header does not say so"):
        run()


def weights(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_best_epoch_is_kept_and_patience_ends(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AP50 by hand: epoch 2 is the best, and two more without a better one are enough."""
    scores = iter([0.1, 0.2, 0.6, 0.6, 0.3])
    kept: list[dict[str, Tensor]] = []
    real = training.evaluate

    def scored(detector: Detector, examples: Any, view: Any, *rest: Any) -> coco.AP:
        translator = getattr(view, "args", [None])[0]
        ap50 = next(scores, None)
        if ap50 is None:
            return real(detector, examples, view, *rest)
        kept.append({name: tensor.clone() for name, tensor in translator.learner.state_dict().items()})
        return coco.AP(0.5, ap50)

    monkeypatch.setattr(training, "evaluate", scored)
    result = run(replace(FAST, epochs=9, patience_epochs=2))
    assert [epoch.ap50 for epoch in result.epochs] == [0.1, 0.2, 0.6, 0.6, 0.3]
    assert result.best_epoch == 2
    written = weights(tmp_path / "out")
    assert written.keys() == kept[2].keys()
    assert all(torch.equal(written[name], kept[2][name]) for name in written)
    assert any(not torch.equal(written[name], kept[3][name]) for name in written)


def test_best_and_finished() -> None:
    lines = [Epoch(0, None, 0.1, 0.3), Epoch(1, 1.0, 0.2, 0.3), Epoch(2, 1.0, 0.2, 0.3), Epoch(3, 1.0, 0.9, 0.2)]
    assert best_epoch(lines[:1]) == 0
    assert best_epoch(lines) == 1  # AP decides between equal AP50, and the first of equals wins
    settings = TrainSettings(epochs=9, patience_epochs=2)
    assert [finished(lines[: number + 1], settings) for number in range(4)] == [False, False, False, True]
    assert finished(lines[:2], TrainSettings(epochs=1))


def test_order_shows_every_image_once_and_mirrors_about_half() -> None:
    settings = TrainSettings(batch_images=8)
    epoch = training_data.order(100, settings, 1)
    assert [len(batch) for batch in epoch] == [8] * 12 + [4]
    assert sorted(number for batch in epoch for number, _ in batch) == list(range(100))
    assert 35 <= sum(mirrored for batch in epoch for _, mirrored in batch) <= 65
    assert epoch == training_data.order(100, settings, 1) != training_data.order(100, settings, 2)
    assert not any(
        mirrored for batch in training_data.order(100, replace(settings, flips=False), 1) for _, mirrored in batch
    )


def test_mirrored_by_hand() -> None:
    image, boxes = training_data.mirror(torch.tensor([[[1.0, 2, 3, 4]]]), torch.tensor([[0.0, 0, 3, 1]]))
    assert image.tolist() == [[[4, 3, 2, 1]]]
    assert boxes.tolist() == [[1, 0, 4, 1]]


def test_the_learning_rate_is_half_a_cosine() -> None:
    settings = TrainSettings(learning_rate=0.4)
    assert [training.learning_rate(step, 3, settings) for step in range(3)] == pytest.approx([0.4, 0.3, 0.1])


def test_images_of_one_size_are_translated_together() -> None:
    shapes = []

    def halved(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x.expand(-1, 3, -1, -1) / 2

    images = [torch.full((1, *size), float(number)) for number, size in enumerate([(4, 6), (4, 4), (4, 6)])]
    got = translated(halved, images)
    assert shapes == [(2, 1, 4, 6), (1, 1, 4, 4)]
    assert [(tuple(each.shape), each.mean().item()) for each in got] == [
        ((3, 4, 6), 0.0),
        ((3, 4, 4), 0.5),
        ((3, 4, 6), 1.0),
    ]


def test_split_takes_its_share_whatever_the_count(ir: Path) -> None:
    examples = coco.read(ir, LABELS).examples
    for count, held_out in ((2, 1), (3, 1), (24, 4)):
        train, validation = training_data.split(examples[:count], TrainSettings())
        assert (len(train), len(validation)) == (count - held_out, held_out)
        assert sorted(map(id, (*train, *validation))) == sorted(map(id, examples[:count]))
    with pytest.raises(ConfigError, match="1 image cannot be split into training and validation"):
        training_data.split(examples[:1], TrainSettings())
    assert training_data.split(examples, TrainSettings()) != training_data.split(examples, TrainSettings(seed=1))


def test_folders_of_their_own_are_used(run: Run, ir: Path, rgb: Path, tmp_path: Path) -> None:
    more = write_spots(tmp_path / "val", 7)
    result = run(replace(FAST, epochs=1), validation=more, test=write_spots(tmp_path / "test", 6), rgb=rgb)
    assert result.metrics["images"] == {"train": 24, "validation": 7, "test": 6, "rgb": 12}
    assert result.metrics["figures_of"] == "test"
    assert Brightest.looks == [5, 5, 5, 5, 4]


def test_what_is_compared(run: Run, rgb: Path, tmp_path: Path) -> None:
    result = run(replace(FAST, fine_tune=True), rgb=rgb)
    ways = ["ir/zero_shot", "ir/equalised", "ir/modtr", "ir/fine_tuned", "rgb/frozen", "rgb/fine_tuned"]
    expected = {f"{what}/{way}" for what in ("ap", "ap50") for way in ways}
    assert expected <= result.figures.keys()
    assert result.figures.keys() - expected <= {"ratio/modtr_over_finetuned"}  # which needs something to divide by
    assert all(0 <= result.figures[name] <= 1 for name in expected)
    assert len(result.fine_tuned_epochs) == 4
    plain = run(FAST, out="plain")
    assert plain.figures.keys() == {f"{what}/{way}" for what in ("ap", "ap50") for way in ways[:3]}
    assert plain.fine_tuned_epochs == ()
    assert plain.figures["ap50/ir/modtr"] == result.figures["ap50/ir/modtr"]  # fine-tuning leaves no trace


def test_fine_tuning_changes_the_weights_that_are_saved(run: Run, tmp_path: Path) -> None:
    """A detector that hardly cares for brightness (2) learns to look for darkness."""
    result = run(
        replace(FAST, fine_tune=True, learning_rate=1.0), model=Brightest(2.0), save_fine_tuned=tmp_path / "tuned"
    )
    tuned = weights(tmp_path / "tuned")
    assert tuned.keys() == Brightest().state_dict().keys()
    assert tuned["sharpness"] < 0
    assert tuned["seen"] == 0  # a buffer, as normalisation statistics are
    assert result.figures["ap50/ir/fine_tuned"] > result.figures["ap50/ir/zero_shot"] + 0.3
    ratio = result.figures["ap50/ir/modtr"] / result.figures["ap50/ir/fine_tuned"]
    assert result.figures["ratio/modtr_over_finetuned"] == pytest.approx(ratio, abs=1e-5)


def test_the_file_names_its_detector_and_its_figures(run: Run, ir: Path, rgb: Path, tmp_path: Path) -> None:
    result = run(rgb=rgb)
    file = translators.load(tmp_path / "out", DIGEST, "ir")
    assert file.config == FAST.translator
    assert file.metrics == json.loads(json.dumps(result.metrics))
    assert file.metrics["figures"] == result.figures
    assert file.metrics["settings"]["learning_rate"] == 0.02
    assert file.router is not None
    for folder, sure in ((ir, True), (rgb, False)):
        image = coco.read_image(coco.read(folder, LABELS).examples[0].file)
        assert (file.router.confidence(router.features(image)) > 0.5) == sure


def test_too_few_images_for_a_router(run: Run, tmp_path: Path) -> None:
    said = Notes()
    run(replace(FAST, epochs=1), data=write_spots(tmp_path / "few", 11), progress=said)
    assert "9 images are too few for a router: requests must name the modality" in said.lines
    assert translators.load(tmp_path / "out", DIGEST).router is None


def test_a_loss_that_is_no_number_ends_the_training(run: Run, tmp_path: Path) -> None:
    model = Brightest()
    model.sharpness.data.fill_(math.nan)
    with pytest.raises(
        ConfigError, match=r"translator: step 0 has loss nan and a gradient of norm nan; use a learning"
    ):
        run(model=model)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    bad = write_spots(tmp_path / "bad", 3)
    (bad / "images" / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"image 1 \(1\.png\): there is no file"):
        run(data=bad)
    with pytest.raises(ConfigError, match="is no folder to write out to"):
        run(out="none/out")
    with pytest.raises(InvalidInput, match="'IR' cannot name a modality"):
        run(replace(FAST, modality="IR"))
    content = json.loads((bad / "annotations.json").read_text())
    few = write_spots(tmp_path / "few", 20)
    (few / "annotations.json").write_text(
        json.dumps({**json.loads((few / "annotations.json").read_text()), "annotations": content["annotations"][:1]})
    )
    with pytest.raises(ConfigError, match="none of the 3 validation images has a box"):
        run(data=few)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, ir: Path, tmp_path: Path) -> Callable[..., Result]:
    """`command("--epochs", "1", …)`: the command with the detector of this file, data and file given."""
    loaded = LoadedDetector(Detector(Brightest()), LABELS, DIGEST)
    monkeypatch.setattr(train_translator_cli, "load_detector", lambda *_: loaded)
    app = typer.Typer()
    app.command()(train_translator_cli.train_translator)
    given = ["--model", "builtin/digit-scenes", "--data", str(ir), "--out", str(tmp_path / "out")]
    return lambda *options: CliRunner().invoke(app, [*given, *options])


def test_the_command(command: Callable[..., Result], rgb: Path, tmp_path: Path) -> None:
    options = ("--epochs", "1", "--size", "tiny", "--in-channels", "1", "--modality", "near-ir", "--lr", "0.01")
    result = command(*options, "--batch", "7", "--no-flips", "--rgb", str(rgb), "--json", str(tmp_path / "figures"))
    assert result.exit_code == 0, result.output
    assert "translator, epoch 1: loss " in result.stderr
    assert "fine-tuned detector, epoch 1: loss " in result.stderr
    assert "near-ir, modtr" in result.stdout
    file = translators.load(tmp_path / "out", DIGEST, "near-ir")
    assert file.config == TranslatorConfig(1, *SIZES["tiny"])
    written = json.loads((tmp_path / "figures").read_text())
    assert written["script"] == "train-translator"
    assert written["figures"] == file.metrics["figures"]
    assert written["figures"].keys() >= {"ap50/near-ir/modtr", "ap/near-ir/fine_tuned", "ap50/rgb/fine_tuned"}
    settings = file.metrics["settings"]
    assert (settings["learning_rate"], settings["batch_images"], settings["flips"]) == (0.01, 7, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--in-channels", "2"), "--in-channels: 1 or 3, not 2"),
        (("--json", "/none/figures"), "--json: /none is not a folder"),
        (("--no-fine-tune", "--save-fine-tuned", "x"), "--save-fine-tuned: there are no fine-tuned weights"),
        (("--modality", "rgb"), "'rgb' is the name of images that are not translated"),
    ],
)
def test_a_wrong_command(command: Callable[..., Result], options: Sequence[str], said: str) -> None:
    result = command(*options)
    assert isinstance(result.exception, TTAError)
    assert said in str(result.exception)


def test_interrupting_the_command(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "take_step", interrupted)
        result = command("--size", "tiny")
    assert result.exit_code == 130
    assert "the same command goes on from the last checkpoint" in result.stderr


def test_a_detector_from_a_file(tmp_path: Path) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    weights_file = str(tmp_path / "weights.safetensors")
    loaded = train_translator_cli.load_detector(f"torchvision/{name}", weights_file, ",".join(LABELS), "cpu")
    assert loaded.labels == LABELS
    config = tmp_path / "server.yaml"
    config.write_text(
        f"models:\n- {{name: spots, source: torchvision/{name}, weights: {weights_file}, labels: [none, spot]}}\n"
        "- {name: digits, source: builtin/digits}\n"
    )
    same = train_translator_cli.load_detector(f"{config}#spots", None, None, "cpu")
    assert (same.labels, same.digest) == (("none", "spot"), loaded.digest)
    with pytest.raises(ConfigError, match="is no detector; translators are for detectors"):
        train_translator_cli.load_detector(f"{config}#digits", None, None, "cpu")
    with pytest.raises(ConfigError, match=r"has 2 models; say FILE#NAME"):
        train_translator_cli.load_detector(str(config), None, None, "cpu")
    with pytest.raises(ConfigError, match=r"has no model named 'x'; it has spots, digits"):
        train_translator_cli.load_detector(f"{config}#x", None, None, "cpu")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("digit-scenes", "--model digit-scenes: source: "),
        ("builtin/none", "--model builtin/none: source.builtin: "),
        ("builtin/digits", "is no detector"),
        ("torchvision/resnet18", "is no detector"),
    ],
)
def test_what_is_no_detector(source: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_translator_cli.load_detector(source, None, None, "cpu")
    assert said in str(caught.value)


def test_a_terminal_gets_a_bar_and_a_file_only_lines() -> None:
    shown = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        screen = train_translator_cli.Screen(console)
        screen.start("translator, epoch 1", 2)
        screen.advance(0.5)
        screen.advance(0.25)
        screen.note("translator, epoch 1: [good]")
        screen.stop()
        shown.append(console.file.getvalue())
    assert "2/2" in shown[0]
    assert "loss 0.2500" in shown[0]
    assert shown[1] == "translator, epoch 1: [good]\n"


class Notes(Unwatched):
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Saying(Unwatched):
    """Prints the number of each step."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, loss: float | None = None) -> None:
        if loss is not None:
            self.steps += 1
            print(self.steps, flush=True)


if __name__ == "__main__":
    training.train(Detector(Brightest()), DIGEST, LABELS, Path(sys.argv[1]), Path(sys.argv[2]), FAST, progress=Saying())
