"""From settings to heads: what they hang on is fitted once, from images without labels, and kept beside what was told.

A label is kept as a code, and a code means something only with the keys (or components, or means) that made it. So
these lie in the store too, under a name that says for which weights and settings they were made: other images in
`prior` later do not change them.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from adapters import Network, tree
from adapters.class_means import ClassMeans, ClassMeansPrior, fit_class_means
from adapters.components import Components
from adapters.flat_keys import FlatKeys, FlatKeysConfig, fit_flat_keys
from adapters.fusion import Fusion
from adapters.heads import AnyHead
from adapters.keys import Keys, KeysConfig, KeysPrior, fit_keys
from adapters.kv_bottleneck import Counts
from adapters.kv_gradient import KVGradient
from adapters.ridge import Ridge, fit_ridge
from tta_serve import pipelines
from tta_serve.builtin import digits
from tta_serve.config import KVBottleneckSettings, ModelSettings
from tta_serve.errors import ConfigError
from tta_serve.feedback_log import FeedbackLog
from tta_serve.heads import Heads
from tta_serve.models import LoadedModel
from tta_serve.private import make_private

BATCH_PIXELS = 64 * 224 * 224  # of one forward


class _Kind(NamedTuple):
    """How one head is made."""

    prior: type
    fit: Callable[[Tensor], Any]  # from features [N, F]
    make: Callable[[Any], AnyHead]
    made_with: str  # everything beside weights and prior that gives a code its meaning


def build_heads(
    settings: ModelSettings, model: LoadedModel, network: Network, folder: Path, tenants: frozenset[str] = frozenset()
) -> tuple[Fusion, Heads]:
    """The heads of one model, with all that they were told before.

    Args:
        settings: of the model; has `kv_bottleneck`.
        model: loaded.
        network: around it, on its device.
        folder: where labels and keys lie; it is made where it is not there.
        tenants: see `Heads`.

    Raises:
        ConfigError: the model has no features, its prior cannot be used, or the folder cannot.
        Unavailable: another process keeps the labels locked.
    """
    chosen = settings.adapter.kv_bottleneck
    assert chosen is not None
    if network.head is None:
        raise ConfigError(
            f"models.{settings.name}.adapter: kv_bottleneck reads what the model's last linear layer reads, and this "
            "model has none"
        )
    try:
        make_private(folder.absolute())
        kind = _kind(chosen)
        made_for = hashlib.sha256(f"{model.digest} {chosen.head} {kind.made_with}".encode()).hexdigest()[:16]
        file = folder / f"{chosen.head}-{made_for}.safetensors"
        prior = _load(kind.prior, file) if file.is_file() else _fitted(settings, model, network, kind, file)
    except OSError as error:
        raise ConfigError(f"store.path: {folder} cannot be used: {error.strerror or error}") from error
    head = kind.make(tree.apply(lambda leaf: leaf.to(network.scale.device), prior))
    # labels too: a class of the model's own is kept by its number
    digest = hashlib.sha256(f"{made_for} {tree.digest(prior)} {model.labels}".encode()).hexdigest()[:16]
    feedback = FeedbackLog(folder / "feedback.db", settings.name, digest, len(model.labels))
    heads = Heads(
        head,
        model.labels,
        feedback,
        tenants=tenants,
        classes_max=chosen.classes_max,
        labels_per_class=chosen.labels_per_class,
        labels_max=chosen.labels_max,
        device=network.scale.device,
    )
    return Fusion(head, len(model.labels), chosen.answers), heads


def _kind(chosen: KVBottleneckSettings) -> _Kind:
    if chosen.head == "counts":
        keys = KeysConfig(codebooks=chosen.codebooks, branches=chosen.branches)
        return _Kind(KeysPrior, lambda x: fit_keys(x, keys), lambda prior: Counts(Keys(prior, keys)), repr(keys))
    if chosen.head == "gradient":
        flat = FlatKeysConfig(codebooks=chosen.codebooks)
        return _Kind(
            _WithWidth,
            lambda x: _WithWidth(fit_flat_keys(x, flat), torch.tensor(x.shape[1])),
            lambda prior: KVGradient(prior.keys, int(prior.features)),
            repr(flat),
        )
    if chosen.head == "ridge":
        return _Kind(Components, fit_ridge, Ridge, "")
    return _Kind(ClassMeansPrior, fit_class_means, ClassMeans, "")


class _WithWidth(NamedTuple):
    """Flat keys, and how wide the features are that their projections read."""

    keys: FlatKeys
    features: Tensor  # F, int64 []


def _fitted(settings: ModelSettings, model: LoadedModel, network: Network, kind: _Kind, file: Path) -> Any:
    """Fit and keep; the file is whole or not there."""
    path = model.prior if model.prior and model.prior.suffix == ".npz" else None
    if path is None and settings.source.builtin == "digits":
        path = digits.PROBE
    if path is None:
        raise ConfigError(f"models.{settings.name}: kv_bottleneck needs `prior`: an .npz with `images`, without labels")
    images = pipelines.read_images(path, model.input, "prior")
    try:
        prior = kind.fit(_features(network, images))
    except ValueError as error:
        raise ConfigError(f"models.{settings.name}.prior: {path}: {error}") from error
    part = file.with_suffix(f".{uuid.uuid4().hex}.part")  # another replica may be starting too
    try:
        with part.open("wb") as out:
            out.write(safetensors.torch.save(tree.encode(prior)))
            out.flush()
            os.fsync(out)  # labels survive a crash of the machine, so what gives them their meaning has to
        part.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # and its name
        finally:
            os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    return prior


@torch.no_grad()
def _features(network: Network, images: Tensor) -> Tensor:
    """What the last linear layer reads, [N, F] on the host."""
    rows = max(1, BATCH_PIXELS // images[0, 0].numel())
    found = []
    for batch in torch.split(images, rows):
        features = network(batch.to(network.scale.device).float() / 255).features
        if features is None or features.dim() != 2:
            shape = None if features is None else list(features.shape)
            raise ConfigError(
                f"kv_bottleneck reads features [images, width], and this model's last layer reads {shape}"
            )
        found.append(features.cpu())
    return torch.cat(found)


def _load(kind: type, file: Path) -> Any:
    try:
        tensors = safetensors.torch.load_file(file)
        return _rebuilt(kind, tensors, "")
    except (SafetensorError, KeyError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}), and the labels that were told hang on it; put a copy in its place, or "
            "remove it to begin anew: those labels then have no effect"
        ) from error


def _rebuilt(kind: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A named tuple out of what `tree.encode` made of it."""
    if kind is Tensor:
        return tensors[name]
    if get_origin(kind) is tuple:
        (each, _) = get_args(kind)
        count = len({key for key in tensors if key.startswith(f"{name}.")})
        return tuple(_rebuilt(each, tensors, f"{name}.{i}") for i in range(count))
    fields = get_type_hints(kind).items()
    return kind(*(_rebuilt(hint, tensors, f"{name}.{field}" if name else field) for field, hint in fields))
