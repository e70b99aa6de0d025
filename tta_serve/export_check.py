"""Whether an exported file answers as the pipeline does that it was made of: ONNX Runtime beside torch.

A head reads features as codes: a key is the nearest or it is not, a number is rounded up or down. Where two are equally
near but for float32's rounding, two machines may see different ones, and so may the server itself in two batches: such
an image lies *on an edge*, and is no fault of the file. It is told by asking the pipeline again with features that
differ by rounding alone: where its own answer differs as much as the file's does, it is one.
"""

from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import torch
from torch import Tensor

from adapters import Fusion, Groups, Pipeline, PipelineState, tree
from adapters.fusion import ABSENT
from tta_serve.errors import ConfigError

DIFFERENCE_MAX = 1e-4  # of a probability
LOGITS_DIFFERENCE_MAX = 1e-3  # of a logit, over the image's largest: probabilities of sure answers show nothing
BATCHES = (1, 2, 7)  # images of the first batches; the others have 32
BATCH = 32
ROUNDING = 3e-6  # of features, over an image's largest: some ten times what float32 leaves after 50 layers
ROUNDING_TRIALS = 16
EDGE_FACTOR = 2.0  # the file may differ by so many times what the pipeline's own answers do: those are a few draws
ON_EDGE_MAX = 0.02  # share of images, and at least one


class Compared(NamedTuple):
    """What came out."""

    images: int
    max_difference: float  # of a probability, over all images but those on an edge
    on_edge: int  # images on an edge that were answered differently


class Difference(NamedTuple):
    """How far two answers to each of N images lie apart."""

    probabilities: Tensor  # of any class at most, [N]
    logits: Tensor  # likewise, over the image's largest, [N]


class _Told(NamedTuple):
    """What the pipeline says of N images."""

    logits: Tensor  # on the host, [N, C]
    network_logits: Tensor  # before the head, [N, C]
    features: Tensor | None  # [N, F]


@torch.no_grad()
def compare(pipeline: Pipeline, state: PipelineState, images: Tensor, file: Path) -> Compared:
    """Check the file against ONNX's own rules, and its answers against the pipeline's.

    Args:
        pipeline: that the file was made of.
        state: likewise; see `export_onnx.export`.
        images: [N, 3, H, W] in [0, 1], N ≥ 1.
        file: with an input `images` and the outputs `probabilities` and `logits`.

    Raises:
        ConfigError: the file breaks the rules, cannot be run, or answers differently.
    """
    expected = _by_torch(pipeline, state, images)
    try:
        onnx.checker.check_model(file, full_check=True)
        probabilities, logits = _by_onnx(file, images)
    except Exception as error:  # each library raises its own kinds
        raise ConfigError(f"the ONNX file cannot be run: {type(error).__name__}: {error}") from error
    if logits.shape != expected.logits.shape:
        shapes = list(logits.shape), list(expected.logits.shape)
        raise ConfigError(f"the ONNX file answers with {shapes[0]}, torch with {shapes[1]}")
    found = _difference(expected.logits, logits, probabilities)
    # "not within" and no "above": NaN is within nothing
    wrong = ~((found.probabilities <= DIFFERENCE_MAX) & (found.logits <= LOGITS_DIFFERENCE_MAX))
    on_edge = torch.zeros_like(wrong)
    if wrong.any() and isinstance(pipeline.head, Fusion) and expected.features is not None and is_told(state):
        asked = wrong.to(expected.features.device)
        own = by_rounding_alone(pipeline.head, state, expected.features[asked], expected.network_logits[asked])
        near = found.probabilities[wrong] <= (EDGE_FACTOR * own.probabilities).clamp(min=DIFFERENCE_MAX)
        on_edge[wrong] = near & (found.logits[wrong] <= (EDGE_FACTOR * own.logits).clamp(min=LOGITS_DIFFERENCE_MAX))
    if (wrong & ~on_edge).any() or int(on_edge.sum()) > max(1, ON_EDGE_MAX * len(images)):
        raise ConfigError(
            f"the ONNX file answers {int(wrong.sum())} of {len(images)} images differently from torch: probabilities "
            f"by up to {float(found.probabilities.max()):.2g} ({DIFFERENCE_MAX:g} is allowed), logits by "
            f"{float(found.logits.max()):.2g} of the largest ({LOGITS_DIFFERENCE_MAX:g} is allowed)"
        )
    others = found.probabilities[~on_edge]
    return Compared(len(images), float(others.max()) if len(others) else 0.0, int(on_edge.sum()))


def is_told(state: PipelineState) -> bool:
    """Whether the state's head was told of any class."""
    return bool(state.head) and bool(state.head.classes)


def by_rounding_alone(fusion: Fusion, state: PipelineState, features: Tensor, network_logits: Tensor) -> Difference:
    """How far a head's own answers lie apart for features that differ by float32's rounding.

    Args:
        fusion: with the head.
        state: that was told something.
        features: [n, F].
        network_logits: [n, C].
    """
    rows = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    generator = torch.Generator().manual_seed(0)
    reach = ROUNDING * features.abs().amax(dim=1, keepdim=True)
    first = fusion.score((state.head,), rows, features, network_logits)
    trials = []
    for _ in range(ROUNDING_TRIALS):
        moved = features + reach * torch.randn(features.shape, generator=generator).to(features)
        logits = fusion.score((state.head,), rows, moved, network_logits)
        trials.append(_difference(first, logits, logits.softmax(dim=1)))
    most = (torch.stack(each).amax(dim=0).cpu() for each in zip(*trials, strict=True))
    return Difference(*most)


def _difference(expected: Tensor, logits: Tensor, probabilities: Tensor) -> Difference:
    """Of an answer from the expected logits, [N, C]."""
    largest = expected.abs().where(expected > ABSENT / 2, 0.0).amax(dim=1).clamp(min=1)  # of classes that can be
    return Difference(
        (probabilities - expected.softmax(dim=1)).abs().amax(dim=1), (logits - expected).abs().amax(dim=1) / largest
    )


def _by_torch(pipeline: Pipeline, state: PipelineState, images: Tensor) -> _Told:
    """Each image is a request of its own: the stream's statistics alone decide."""
    device = pipeline.network.scale.device
    table = tree.stack([state._replace(head=())])._replace(head=(state.head,))
    if not is_told(state):
        pipeline = Pipeline(pipeline.network, pipeline.input, pipeline.norm)
    parts = []
    for batch in torch.split(images, BATCH):
        rows = torch.zeros(len(batch), dtype=torch.int64, device=device)
        output = pipeline.predict(table, rows, Groups.of((1,) * len(batch), device), batch.to(device))
        own = output.logits if output.network_logits is None else output.network_logits
        parts.append((output.logits, own, output.features))
    logits, network_logits, features = zip(*parts, strict=True)
    return _Told(
        torch.cat(logits).cpu(),
        torch.cat(network_logits),
        None if features[0] is None else torch.cat(features),
    )


def _by_onnx(file: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and logits by ONNX Runtime, in batches of different sizes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    found, first = [], 0
    for size in (*BATCHES, *[BATCH] * len(images)):
        if first < len(images):
            batch = {"images": images[first : first + size].numpy()}
            found.append([torch.from_numpy(each) for each in session.run(["probabilities", "logits"], batch)])
        first += size
    probabilities, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
    return probabilities, logits
