"""A stream's adapted model as one ONNX file, for devices that answer by themselves and learn nothing.

What is in the file: the frozen weights, the stream's scale, shift and statistics folded into them, and what its labels
taught. It answers as the server answers a request of fewer than 8 images. Larger requests the server normalises in
part by their own rows; a file cannot, for there the answer to an image must not depend on its neighbours.

    images         float32 [n, 3, H, W], RGB in [0, 1]: what `infer` takes; the model normalises by itself
    probabilities  float32 [n, C], of the classes in the file's metadata under `labels`
    logits         float32 [n, C]

Nothing is kept that was not compared: the file is written under another name, checked, run by ONNX Runtime beside
torch, and only then gets its own.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters import Fusion, Pipeline, PipelineState
from tta_serve.errors import ConfigError, InvalidInput
from tta_serve.export_check import compare, is_told
from tta_serve.export_heads import FixedHead
from tta_serve.export_network import FixedNetwork, modulation_of
from tta_serve.models import InputSpec

OPSET = 20
BYTES_MAX = 2**31 - 2**20  # a protobuf holds less than 2 GiB, and the graph needs a little
NOISE_IMAGES = 64


class Exported(NamedTuple):
    """What was written, and how it compared."""

    max_difference: float  # of a probability; see `Compared`
    bytes: int  # of the file
    opset: int
    images: int  # that were compared
    on_edge: int  # of these; see `Compared`


class AdaptedModel(nn.Module):
    """One stream's model: see the head of this file.

    Args:
        pipeline: of a classifier; stays as it is.
        state: of the stream; its head is what the head's `read` gave, or `()`.

    Raises:
        InvalidInput: something in it has no place in a file; the message says what.
    """

    def __init__(self, pipeline: Pipeline, state: PipelineState) -> None:
        super().__init__()
        if pipeline.input is not None:
            raise InvalidInput("only classifiers can be exported, and this model has a translator in front")
        self.network = FixedNetwork(pipeline.network, modulation_of(pipeline, state))
        fusion = pipeline.head
        if fusion is not None and not isinstance(fusion, Fusion):
            raise InvalidInput(f"a head of kind {type(fusion).__name__} cannot be exported")
        self.head = FixedHead(fusion, state.head) if fusion and is_told(state) else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and logits, [n, C] each."""
        logits, features = self.network(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise InvalidInput("only classifiers can be exported, and this model gives no logits [images, classes]")
        if self.head is not None:
            if features is None:
                raise InvalidInput("a head needs the features of the network, and this one gives none")
            logits = self.head(logits, features)
        return logits.softmax(dim=1), logits


@torch.no_grad()
def export(
    pipeline: Pipeline,
    state: PipelineState,
    spec: InputSpec,
    labels: Sequence[str],
    file: Path,
    *,
    metadata: Mapping[str, str],
    images: Tensor | None = None,
) -> Exported:
    """Write one stream's adapted model as an ONNX file, and prove that it answers as the server does.

    The answer is that to a request of fewer than 8 images: see the head of this file.

    Args:
        pipeline: of a classifier; stays as it is.
        state: of the stream, not stacked; its head is what the head's `read` gave, or `()`.
        spec: what the model reads.
        labels: names of all classes, added ones last: C.
        file: to write; what is there is replaced, once the new one is proved.
        metadata: what else the file shall say of itself: stream, version, model …
        images: to compare on beside noise, [N, 3, H, W] in [0, 1].

    Raises:
        InvalidInput: this model or state cannot be exported.
        ConfigError: the file cannot be written, or does not answer as torch does. Nothing is left of it.
    """
    _check_place(file)
    model = AdaptedModel(pipeline, state).eval()
    compared = _noise(spec) if images is None else torch.cat([_noise(spec), images.float().cpu()])
    needed = sum(each.nbytes for each in {id(each): each for each in _tensors(model)}.values())
    if needed > BYTES_MAX:
        raise InvalidInput(
            f"the model has {needed / 2**30:.1f} GiB of weights, and one ONNX file holds less than 2 GiB; "
            "export a smaller one"
        )
    _check_labels(model, compared, labels)
    proto = _proto(model, compared[:2])
    onnx.helper.set_model_props(proto, {**metadata, "labels": json.dumps(list(labels), ensure_ascii=False)})
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as out:
            out.write(proto.SerializeToString())
            out.flush()
            os.fsync(out)
        found = compare(pipeline, state, compared, part)
        size = part.stat().st_size
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    opset = next(each.version for each in proto.opset_import if not each.domain)
    return Exported(found.max_difference, size, opset, found.images, found.on_edge)


def _check_place(file: Path) -> None:
    """Before half a minute of tracing."""
    if not file.parent.is_dir():
        raise ConfigError(f"{file} cannot be written: {file.parent} is not there; make the folder first")
    if file.is_dir():
        raise ConfigError(f"{file} cannot be written: it is a folder; name a file in it")


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _noise(spec: InputSpec) -> Tensor:
    """Images of noise in [0, 1], always the same: half of them fine, half of 4×4 patches; [64, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.rand(NOISE_IMAGES // 2, *spec.shape, generator=generator)
    coarse = torch.rand(NOISE_IMAGES // 2, 3, 4, 4, generator=generator)
    return torch.cat([fine, functional.interpolate(coarse, size=(spec.height, spec.width), mode="nearest")])


def _check_labels(model: AdaptedModel, images: Tensor, labels: Sequence[str]) -> None:
    found, _ = model(images[:1])
    if found.shape[1:] != (len(labels),):
        raise InvalidInput(f"{len(labels)} labels were given for a model that answers with {list(found.shape[1:])}")


def _proto(model: AdaptedModel, images: Tensor) -> onnx.ModelProto:
    """The model in ONNX's words, for any number of images.

    Raises:
        InvalidInput: torch's exporter cannot say it.
    """
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["images"],
            output_names=["probabilities", "logits"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    except Exception as error:
        raise InvalidInput(f"torch cannot export this model to ONNX: {_innermost(error)}") from error
    assert program is not None
    proto = program.model_proto
    for each in [proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        del each.metadata_props[:]  # the exporter's notes name the source files of this machine
        each.doc_string = ""
    return proto


def _innermost(error: BaseException) -> str:
    """The cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
