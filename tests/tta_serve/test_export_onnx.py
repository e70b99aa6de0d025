import copy
import errno
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from adapters import (
    EATA,
    Batch,
    ClassMeans,
    ClassMeansPrior,
    Counts,
    EATAConfig,
    FlatKeys,
    FlatKeysConfig,
    Fusion,
    Groups,
    Guarded,
    Keys,
    KeysConfig,
    KVGradient,
    Network,
    Output,
    Pipeline,
    PipelineState,
    Ridge,
    fit_class_means,
    fit_flat_keys,
    fit_keys,
    fit_ridge,
    tree,
)
from adapters.class_means import ClassMeansTable
from adapters.heads import AnyHead, Items
from tta_serve import export_onnx, pipelines
from tta_serve.builtin import digits
from tta_serve.config import ModelSettings
from tta_serve.errors import ConfigError, InvalidInput
from tta_serve.export_check import DIFFERENCE_MAX, by_rounding_alone, compare
from tta_serve.export_heads import FixedHead
from tta_serve.export_onnx import AdaptedModel, export
from tta_serve.models import InputSpec, LoadedModel, Normalised

pytestmark = pytest.mark.slow  # torch's exporter takes seconds; tests/cli/test_state.py exports one model

Rows = Callable[..., Tensor]
SPEC = InputSpec(4, 4, None)
LABELS = ("a", "b", "c")
ADDED = ("d", "e")  # classes 3 and 4
TOLD = torch.tensor([1, 4, 3] * 8)
TREE = KeysConfig(codebooks=8, branches=(4, 2), key_dim=4, components=8)
FLAT = FlatKeysConfig(codebooks=16, keys=8, width=4, epochs=2, batch=32)

HEADS: dict[str, Callable[[Tensor], AnyHead]] = {
    "counts": lambda features: Counts(Keys(fit_keys(features, TREE), TREE)),
    "gradient": lambda features: KVGradient(fit_flat_keys(features, FLAT), features.shape[1]),
    "ridge": lambda features: Ridge(fit_ridge(features, count=8)),
    "class_means": lambda features: ClassMeans(fit_class_means(features)),
}


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def convolutional(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm_2d": lambda: convolutional(nn.BatchNorm2d(4)),
    "batch_norm_1d": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "group_norm": lambda: convolutional(nn.GroupNorm(2, 4)),
    "layer_norm": lambda: nn.Sequential(
        nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 6), nn.GELU(), MeanToken(), nn.LayerNorm(6), nn.Linear(6, 3)
    ),
}


def filled(model: nn.Module) -> nn.Module:
    """With numbers from a formula: the same on every machine."""
    for number, tensor in enumerate(model.parameters()):
        waves = (number + 1.7 * torch.arange(tensor.numel(), dtype=torch.float64)).sin().float()
        tensor.data.copy_(waves.reshape(tensor.shape))
    return model.eval()


def around(module: nn.Module, **config: Any) -> Pipeline:
    """EATA that takes long steps from every row."""
    settings = {"anchor": "none", "entropy_margin": 10.0, "redundancy_margin": 2.0, "learning_rate": 0.05}
    network = Network(module)
    eata = EATA(network, len(LABELS), config=EATAConfig(**{**settings, "statistics": "evidence", **config}))
    return Pipeline(network, norm=Guarded(eata))


def adapted(pipeline: Pipeline, images: Tensor, steps: int = 3) -> PipelineState:
    """The state of a stream that has seen these images so many times."""
    table, rows = tree.stack([pipeline.init()]), torch.zeros(len(images), dtype=torch.int64)
    for _ in range(steps):
        batch = Batch(images, Groups.of((len(images),)), torch.ones(len(images)))
        table, _ = pipeline.adapt(table, rows, batch)
    return tree.row(table, 0)


def answer(pipeline: Pipeline, state: PipelineState, images: Tensor) -> Output:
    """What the pipeline says, each image a request of its own."""
    table = tree.stack([state._replace(head=())])._replace(head=(state.head,))
    rows = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        return pipeline.predict(table, rows, Groups.of((1,) * len(images)), images)


def probabilities(pipeline: Pipeline, state: PipelineState, images: Tensor) -> Tensor:
    return answer(pipeline, state, images).logits.softmax(dim=1)


def agrees(pipeline: Pipeline, state: PipelineState, images: Tensor) -> None:
    """What would be written answers as the pipeline: fast, for nothing is traced."""
    found, logits = AdaptedModel(pipeline, state)(images)
    torch.testing.assert_close(found, probabilities(pipeline, state, images), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, logits.softmax(dim=1))


def run(file: Path, images: Tensor) -> list[Tensor]:
    """Probabilities and logits by ONNX Runtime."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]


def taught(kind: str, rows: Rows, answers: Any = "combined") -> tuple[Pipeline, PipelineState]:
    """A pipeline with a head of this kind, and a state that was adapted and told 24 labels of three classes."""
    pipeline = around(filled(MODELS["batch_norm_2d"]()))
    state = adapted(pipeline, 0.5 * rows(16))
    unlabelled, told = (answer(pipeline, state, rows(count, start=3.0)).features for count in (60, 24))
    assert unlabelled is not None
    assert told is not None
    head = HEADS[kind](unlabelled)
    learned = head.learn(head.init(), Items(head.encode(told), TOLD))
    pipeline = Pipeline(pipeline.network, norm=pipeline.norm, head=Fusion(head, len(LABELS), answers))
    return pipeline, state._replace(head=head.read(learned))


@pytest.mark.parametrize("kind", MODELS)
def test_the_file_answers_as_the_adapted_model_at_any_number_of_images(kind: str, rows: Rows, tmp_path: Path) -> None:
    pipeline, file = around(filled(MODELS[kind]())), tmp_path / "adapted.onnx"
    state = adapted(pipeline, 0.5 * rows(16))
    before = [probabilities(pipeline, each, rows(5)) for each in (state, pipeline.init())]
    done = export(pipeline, state, SPEC, LABELS, file, metadata={})
    after = [probabilities(pipeline, each, rows(5)) for each in (state, pipeline.init())]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))  # the pipeline stays as it is
    assert done.max_difference < DIFFERENCE_MAX
    assert (done.bytes, done.opset, done.images, done.on_edge) == (file.stat().st_size, 20, 64, 0)
    for count in (1, 2, 7, 40):
        images = rows(count, start=0.7)
        found, logits = run(file, images)
        expected = probabilities(pipeline, state, images)
        torch.testing.assert_close(found, expected, rtol=0, atol=DIFFERENCE_MAX)
        torch.testing.assert_close(logits.softmax(dim=1), found, rtol=0, atol=1e-6)
        frozen = probabilities(pipeline, pipeline.init(), images)
        assert float((found - frozen).abs().max()) > 100 * DIFFERENCE_MAX  # it is the stream's, not the source's


def test_statistics_alone_are_exported_too(rows: Rows) -> None:
    pipeline = around(filled(MODELS["batch_norm_2d"]()), learning_rate=0.0)
    state = adapted(pipeline, 0.5 * rows(16))
    assert torch.equal(state.norm.inner.params, pipeline.init().norm.inner.params)
    agrees(pipeline, state, rows(5))
    frozen = probabilities(pipeline, pipeline.init(), rows(5))
    assert float((probabilities(pipeline, state, rows(5)) - frozen).abs().max()) > 100 * DIFFERENCE_MAX


def test_a_layer_by_hand() -> None:
    """y = γ (x − μ)/√(σ² + ε) + β with γ = 3, μ = 0.5, σ² + ε = 4, β = 1: 0.5, 1 and 0 become 1, 1.75 and 0.25."""
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    module[1].eps = 1.0
    module[2].weight.data.copy_(torch.eye(3))
    pipeline = around(module)
    guarded = pipeline.init().norm
    inner = guarded.inner._replace(
        params=torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, 1.0]),
        mean=torch.full((3,), 0.5),
        var=torch.full((3,), 3.0),
        images=torch.tensor(1.0),
        source_images=torch.tensor(0.0),
    )
    model = AdaptedModel(pipeline, PipelineState((), guarded._replace(inner=inner), ()))
    _, logits = model(torch.tensor([0.5, 1.0, 0.0]).view(1, 3, 1, 1))
    torch.testing.assert_close(logits, torch.tensor([[1.0, 1.75, 0.25]]))


def test_the_file_says_what_it_is_and_nothing_of_this_machine(rows: Rows, tmp_path: Path) -> None:
    pipeline, file = around(filled(MODELS["batch_norm_2d"]())), tmp_path / "adapted.onnx"
    told = {"stream": "camera-7", "version": "12", "model": "traffic"}
    export(pipeline, pipeline.init(), SPEC, ("ä", "b", "c"), file, metadata=told)
    assert [each.name for each in tmp_path.iterdir()] == ["adapted.onnx"]  # weights inside, nothing beside
    model = onnx.load(file)
    assert {each.key: each.value for each in model.metadata_props} == {**told, "labels": '["ä", "b", "c"]'}
    (images,) = model.graph.input
    assert images.name == "images"
    assert [each.dim_param or each.dim_value for each in images.type.tensor_type.shape.dim] == ["n", 3, 4, 4]
    assert [each.name for each in model.graph.output] == ["probabilities", "logits"]
    for trace in (str(Path(torch.__file__).parents[1]), str(Path(export_onnx.__file__).parent), "nn_module_stack"):
        assert trace.encode() not in file.read_bytes()


def test_a_model_without_adapters(rows: Rows) -> None:
    pipeline = Pipeline(Network(filled(MODELS["batch_norm_2d"]())))
    agrees(pipeline, pipeline.init(), rows(3))


@pytest.mark.parametrize("kind", HEADS)
def test_labels_are_in_the_file(kind: str, rows: Rows, tmp_path: Path) -> None:
    pipeline, state = taught(kind, rows)
    file = tmp_path / "taught.onnx"
    done = export(pipeline, state, SPEC, (*LABELS, *ADDED), file, metadata={})
    assert done.max_difference < DIFFERENCE_MAX
    assert done.on_edge == 0
    for count in (1, 2, 7):
        images = rows(count, start=3.0)
        found, logits = run(file, images)
        assert found.shape == logits.shape == (count, 5)
        expected = probabilities(pipeline, state, images)
        torch.testing.assert_close(found, expected, rtol=0, atol=DIFFERENCE_MAX)
    assert float(found[:, 3:].sum(dim=1).max()) > 0.1  # what was told is in the answers


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_alone(kind: str, rows: Rows) -> None:
    pipeline, state = taught(kind, rows, "head")
    agrees(pipeline, state, rows(7, start=3.0))
    found, _ = AdaptedModel(pipeline, state)(rows(7, start=3.0))
    assert float(found[:, [0, 2]].max()) == 0  # classes that it was never told


def test_a_head_alone_in_a_file(rows: Rows, tmp_path: Path) -> None:
    pipeline, state = taught("ridge", rows, "head")
    export(pipeline, state, SPEC, (*LABELS, *ADDED), tmp_path / "head.onnx", metadata={})
    found, _ = run(tmp_path / "head.onnx", rows(2))
    torch.testing.assert_close(found, probabilities(pipeline, state, rows(2)), rtol=0, atol=DIFFERENCE_MAX)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_was_told_nothing_leaves_the_models_answer(kind: str, rows: Rows) -> None:
    pipeline, state = taught(kind, rows)
    assert isinstance(pipeline.head, Fusion)
    head = pipeline.head.head
    alone = probabilities(Pipeline(pipeline.network, norm=pipeline.norm), state, rows(3))
    for untold in ((), head.read(head.init())):
        found, _ = AdaptedModel(pipeline, state._replace(head=untold))(rows(3))
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


def test_a_mixture_by_hand() -> None:
    """A cosine of 1 and one label: e = ½·exp 1 = 1.359, P(none) = 1/2.359 = 0.424, which is the network's; and a
    network that is sure (its logits are 1,000 apart) must not overflow."""
    head = ClassMeans(ClassMeansPrior(torch.zeros(2)))
    head.config = type(head.config)(scale=1.0)
    table = ClassMeansTable((2,), (1,), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    fixed = FixedHead(Fusion(head, 2), table)
    features = torch.tensor([[3.0, 0.0]])
    none = 1 / (1 + 0.5 * math.e)
    for logits, network in (([0.0, 0.0], [0.5, 0.5]), ([1000.0, 0.0], [1.0, 0.0])):
        found = fixed(torch.tensor([logits]), features).softmax(dim=1)
        torch.testing.assert_close(found, torch.tensor([[none * network[0], none * network[1], 1 - none]]))
    alone = FixedHead(Fusion(head, 2, "head"), table)
    assert alone(torch.tensor([[5.0, 1.0]]), features).softmax(dim=1).tolist() == [[0.0, 0.0, 1.0]]


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(error: type[Exception], words: str, file: Path, *arguments: Any, **options: Any) -> None:
    """The export fails with these words, and leaves the folder as it was."""

    def held() -> dict[Path, bytes]:
        return {each: each.read_bytes() for each in file.parent.glob("*") if each.is_file()}

    before = held()
    with pytest.raises(error, match=words):
        export(*arguments, file, metadata={}, **options)
    assert held() == before


def test_statistics_of_each_request_cannot_be_in_a_file(tmp_path: Path) -> None:
    pipeline = around(filled(MODELS["batch_norm_2d"]()), statistics="batch")
    words = r"normalised by each request's own \(adaptation: {mode: sync}\); export it .* with `mode: async`"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)


def test_group_norm_has_no_statistics_to_miss(rows: Rows) -> None:
    pipeline = around(filled(MODELS["group_norm"]()), statistics="batch")
    agrees(pipeline, adapted(pipeline, 0.5 * rows(16)), rows(3))


class Brighter:
    site = "input"

    def init(self) -> tuple[()]:
        return ()

    def transform(self, states: Any, rows: Tensor, x: Tensor) -> Tensor:
        return x + 0.1


def test_a_translator_in_front(tmp_path: Path) -> None:
    network: Any = Network(filled(MODELS["batch_norm_2d"]()))
    translator: Any = Brighter()
    pipeline = Pipeline(network, input=translator)
    words = "only classifiers can be exported, and this model has a translator in front"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)


class Boxes(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def test_a_model_without_logits(tmp_path: Path) -> None:
    pipeline = Pipeline(Network(Boxes()))
    words = "only classifiers can be exported, and this model gives no logits"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)


def test_a_head_of_an_unknown_kind(rows: Rows, tmp_path: Path) -> None:
    pipeline, state = taught("counts", rows)
    assert isinstance(pipeline.head, Fusion)
    pipeline.head.head = object()  # type: ignore[assignment]
    words = r"a head of kind object \(with a CountsTable\) cannot be exported; those that can are counts, gradient"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, state, SPEC, (*LABELS, *ADDED))


def test_another_number_of_labels(tmp_path: Path) -> None:
    pipeline = around(filled(MODELS["batch_norm_2d"]()))
    words = r"2 labels were given for a model that answers with \[3\]"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS[:2])


def test_more_than_one_file_holds(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    module[1].weight = nn.Parameter(torch.zeros(1, 1).expand(2**15, 2**14))  # 2 GiB that take no memory
    pipeline = Pipeline(Network(module))
    words = "has 2.0 GiB of weights, and one ONNX file holds less than 2 GiB"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)


class Branching(nn.Module):
    """Looks at the image to choose what to do: no single graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.flatten(1))
        return y if x.sum() > 0 else -y


def test_a_model_that_has_no_graph(tmp_path: Path) -> None:
    pipeline = Pipeline(Network(Branching()))
    words = "torch cannot export this model to ONNX: .*"
    refused(InvalidInput, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)


class Neighbours(nn.Module):
    """An answer that depends on the other images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = filled(nn.Linear(48, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.flatten(1))
        return y - y.mean(dim=0)


def test_a_file_that_answers_otherwise_is_not_kept_and_the_old_one_is(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.write_bytes(b"the old one")
    pipeline = Pipeline(Network(Neighbours()))
    words = r"the ONNX file answers \d+ of 64 images differently from torch: probabilities by up to 0\.\d+ \(0.0001 is"
    refused(ConfigError, words, file, pipeline, pipeline.init(), SPEC, LABELS)
    assert file.read_bytes() == b"the old one"


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    pipeline = Pipeline(Network(filled(MODELS["batch_norm_2d"]())))
    words = "a.onnx cannot be written: .*missing is not there; make the folder first"
    refused(ConfigError, words, tmp_path / "missing" / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)
    words = "cannot be written: it is a folder; name a file in it"
    refused(ConfigError, words, tmp_path, pipeline, pipeline.init(), SPEC, LABELS)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_onnx.os, "fsync", full)
    pipeline = Pipeline(Network(filled(MODELS["group_norm"]())))
    words = "a.onnx cannot be written: No space left on device"
    refused(ConfigError, words, tmp_path / "a.onnx", pipeline, pipeline.init(), SPEC, LABELS)


def test_a_model_that_cannot_be_copied() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    module[0].lock = threading.Lock()  # type: ignore[assignment]
    pipeline = Pipeline(Network(module))
    with pytest.raises(
        InvalidInput, match="holds something that cannot be copied, so that it stays here: cannot pickle"
    ):
        AdaptedModel(pipeline, pipeline.init())


# -- the comparison ----------------------------------------------------------------------------------------------------


def test_the_file_of_another_state_is_told(rows: Rows, tmp_path: Path) -> None:
    pipeline, file = around(filled(MODELS["batch_norm_2d"]())), tmp_path / "a.onnx"
    export(pipeline, pipeline.init(), SPEC, LABELS, file, metadata={})
    assert compare(pipeline, pipeline.init(), rows(9), file).images == 9
    with pytest.raises(ConfigError, match="answers 9 of 9 images differently from torch"):
        compare(pipeline, adapted(pipeline, 0.5 * rows(16)), rows(9), file)


def test_sure_answers_are_compared_by_their_logits(rows: Rows, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    module[1].weight.data.zero_()
    module[1].bias.data.copy_(torch.tensor([500.0, 0.0, 0.0]))
    other = copy.deepcopy(module)
    other[1].bias.data.copy_(torch.tensor([600.0, 0.0, 0.0]))  # surer still
    file, pipeline = tmp_path / "a.onnx", Pipeline(Network(module))
    export(pipeline, pipeline.init(), SPEC, LABELS, file, metadata={})
    pipeline = Pipeline(Network(other))
    words = r"by up to 0 \(0.0001 is allowed\), logits by 0.17 of the largest \(0.001 is allowed\)"
    with pytest.raises(ConfigError, match=words):
        compare(pipeline, pipeline.init(), rows(4), file)


def test_no_onnx_file(rows: Rows, tmp_path: Path) -> None:
    pipeline = Pipeline(Network(filled(MODELS["batch_norm_2d"]())))
    (tmp_path / "a.onnx").write_bytes(b"no onnx file")
    with pytest.raises(ConfigError, match="the ONNX file cannot be run: "):
        compare(pipeline, pipeline.init(), rows(4), tmp_path / "a.onnx")


def between(keys: tuple[float, float]) -> tuple[Pipeline, PipelineState]:
    """A head of one codebook that looks at four times the first feature, the red of the first pixel."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    module[1].weight.data.zero_()
    head = KVGradient(FlatKeys(torch.tensor(0), torch.tensor(keys).view(1, 2, 1)), 48)
    head.projections = torch.zeros(1, 48, 1)
    head.projections[0, 0, 0] = 4.0
    features = torch.zeros(2, 48)
    features[:, 0] = torch.tensor([0.375, 0.625])  # at 1.5 and 2.5
    state = head.learn(head.init(), Items(head.encode(features), torch.tensor([0, 1])))
    return Pipeline(Network(module), head=Fusion(head, 3, "head")), PipelineState((), (), head.read(state))


def reds(*values: float) -> Tensor:
    images = torch.zeros(len(values), 3, 4, 4)
    images[:, 0, 0, 0] = torch.tensor(values)
    return images


def test_an_image_between_two_keys_is_no_fault_of_the_file(tmp_path: Path) -> None:
    """At 0.5 both keys are 0.5 away, to the bit: the first wins, and in the other order that is the other."""
    file = tmp_path / "a.onnx"
    pipeline, state = between((1.5, 2.5))
    export(pipeline, state, SPEC, LABELS, file, metadata={})
    turned, turned_state = between((2.5, 1.5))
    assert isinstance(turned.head, Fusion)
    features = reds(0.5, 0.4, 0.49999).flatten(1)
    own = by_rounding_alone(turned.head, turned_state, features, torch.zeros(3, 3))
    assert (own.probabilities > 0.5).tolist() == [True, False, False]
    done = compare(turned, turned_state, reds(0.4, 0.5, 0.6, 0.1), file)
    assert (done.images, done.on_edge) == (4, 1)
    assert done.max_difference < DIFFERENCE_MAX
    with pytest.raises(ConfigError, match="answers 2 of 4 images differently"):  # where it is not the exception
        compare(turned, turned_state, reds(0.4, 0.5, 0.5, 0.1), file)


# -- models that people use --------------------------------------------------------------------------------------------


def test_adapted_digits(digits_model: LoadedModel, tmp_path: Path) -> None:
    module, split = copy.deepcopy(digits_model.module), digits.split()
    settings = ModelSettings.model_validate({"name": "digits", "source": "builtin/digits"})
    model = LoadedModel(module, digits_model.input, digits_model.labels, digits_model.digest, digits_model.prior)
    pipeline = pipelines.build(settings, model, torch.device("cpu"))
    dark = 1 - torch.from_numpy(split.held_out_images).permute(0, 3, 1, 2).float() / 255  # dark strokes on white
    table, rows = tree.stack([pipeline.init()]), torch.zeros(64, dtype=torch.int64)
    for first in range(0, 320, 64):
        batch = Batch(dark[first : first + 64], Groups.of((64,)), torch.ones(64))
        table, _ = pipeline.adapt(table, rows, batch)
    state, later = tree.row(table, 0), dark[320:]
    done = export(pipeline, state, model.input, model.labels, tmp_path / "digits.onnx", metadata={}, images=later)
    assert done.images == 64 + 180
    assert done.max_difference < 1e-5
    found, _ = run(tmp_path / "digits.onnx", later)
    assert torch.equal(found.argmax(dim=1), probabilities(pipeline, state, later).argmax(dim=1))
    truth = torch.from_numpy(split.held_out_labels[320:])
    frozen = probabilities(pipeline, pipeline.init(), later)
    right, frozen_right = (float((each.argmax(dim=1) == truth).float().mean()) for each in (found, frozen))
    assert frozen_right < 0.3
    assert right > 0.9
    props = {each.key: each.value for each in onnx.load(tmp_path / "digits.onnx").metadata_props}
    assert json.loads(props["labels"]) == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_resnet20_gives_the_same_top_1_on_2000_corrupted_images(tmp_path: Path) -> None:
    from loadtests import cifar, resnet20

    data = Path(os.environ.get("TTA_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar")
    if not (data / "gaussian_noise.npz").is_file():
        pytest.skip("the CIFAR files are not here; TTA_DATA names their folder")
    module = resnet20.build()
    module.load_state_dict(safetensors.torch.load_file(data / "resnet20.safetensors"))
    network = Network(Normalised(module.eval(), cifar.MEAN, cifar.STD))
    eata = EATA(network, 10, config=EATAConfig(anchor="l2", learning_rate=4e-3, statistics="evidence"))
    pipeline = Pipeline(network, norm=Guarded(eata))
    images = torch.from_numpy(np.ascontiguousarray(cifar.images(data, "gaussian_noise"))).float() / 255
    state = adapted(pipeline, images[:200], steps=5)
    file = tmp_path / "resnet20.onnx"
    done = export(pipeline, state, InputSpec(32, 32, None), cifar.LABELS, file, metadata={}, images=images)
    assert done.images == 2064
    assert done.max_difference < DIFFERENCE_MAX
    found = torch.cat([run(file, part)[0] for part in images.split(500)])
    expected = torch.cat([probabilities(pipeline, state, part) for part in images.split(500)])
    truth = torch.from_numpy(cifar.labels(data))
    same = int((found.argmax(dim=1) == expected.argmax(dim=1)).sum())
    difference, errors_of_file = float((found - expected).abs().max()), float((found.argmax(1) != truth).float().mean())
    print(f"the same top-1: {same} of 2000; probabilities differ by up to {difference:.2g}; error {errors_of_file:.4f}")
    assert same == 2000
    frozen = torch.cat([network(part).logits for part in images.split(500)])
    assert errors_of_file < float((frozen.argmax(dim=1) != truth).float().mean()) - 0.1  # it is the adapted model
