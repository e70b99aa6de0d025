"""The configuration file: YAML → frozen settings, validated in full, every problem reported at once with its line."""

import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tta_serve.errors import ConfigError
from tta_serve.yaml_lines import UniqueKeyLoader, located

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MODALITY_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
DETECTORS = ("fasterrcnn_", "fcos_", "retinanet_", "ssd300_", "ssdlite320_")  # of torchvision, by how names begin
CELLS_MAX = 2**20  # keys of all codebooks: each class has a value for each, 4 bytes
KEYS_MAX = 2**15  # of a codebook: their ids are kept in 16 bits
STORE_SCHEMES = ("s3", "gs", "az")  # of object stores
RGB = "rgb"  # the modality that needs no translator
TENANT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")  # a stream's, without the ':' that ends the prefix


def _whole_number(value: object) -> object:
    """YAML 1.1 reads 25e6 as text; a number of pixels may be written so all the same."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value
    return int(number) if number.is_integer() else value


def _at_least_one(models: tuple[Any, ...]) -> tuple[Any, ...]:
    # not `min_length`, which counts only the models without problems
    if not models:
        raise ValueError("give at least one model")
    return models


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path


def _tenant(name: str) -> str:
    if not TENANT_PATTERN.fullmatch(name):
        raise ValueError(
            f"{name[:100]!r} cannot name a tenant: 1 to 32 letters, digits, '.', '_' or '-', beginning with a letter "
            "or digit"
        )
    return name


def _modality(name: str) -> str:
    if not MODALITY_PATTERN.fullmatch(name) or name == RGB:
        raise ValueError(
            f"{name[:100]!r} cannot name a translator's modality: 1 to 32 small letters, digits, '_' or '-', beginning "
            f"with a letter or digit, and not {RGB!r}, which needs none"
        )
    return name


def _existing_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path


Count = Annotated[int, BeforeValidator(_whole_number), Field(gt=0)]
File = Annotated[Path, AfterValidator(_existing_file)]
Folder = Annotated[Path, AfterValidator(_existing_folder)]
Tenant = Annotated[str, AfterValidator(_tenant)]
Modality = Annotated[str, AfterValidator(_modality)]
Task = Literal["classification", "detection"]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HTTPSettings(Settings):
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


class LimitSettings(Settings):
    """What one request may hold."""

    body_bytes: ByteSize = Field(ByteSize(32 * 2**20), gt=0)
    image_pixels: Count = 25_000_000
    images_per_request: Count = 256
    request_pixels: Count = 100_000_000  # detectors: of all images of a request together


class AuthSettings(Settings):
    """Names of the environment variables that hold the tokens."""

    infer_token_env: str | None = None  # None: predictions are open to all who reach the port
    admin_token_env: str = "TTA_ADMIN_TOKEN"  # noqa: S105  # unset: admin routes are closed
    tenants: Mapping[Tenant, str] = {}  # tenant → variable; its token reaches the streams `tenant:…` alone


class InputSettings(Settings):
    """How an image becomes a tensor. Weights from torchvision and built-in models bring their own.

    Beside such weights, `interpolation`, `mean` and `std` that are not given stay theirs.
    """

    size: tuple[Count, Count]  # height, width of the tensor
    resize: Count | None = None  # shorter side before the centre crop to `size`; None: resize to `size` itself
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"  # of resizing
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _std_is_positive(self) -> "InputSettings":
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {list(self.std)}")
        return self


class SourceSettings(Settings):
    """Where a model comes from: exactly one of three."""

    builtin: Literal["digits", "digit-scenes", "efficientnet-lite0", "noop"] | None = None
    torchvision: str | None = Field(None, pattern=r"^[a-z0-9_]+$")
    python: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")  # module:attribute, a factory

    @model_validator(mode="after")
    def _exactly_one(self) -> "SourceSettings":
        if len([each for each in (self.builtin, self.torchvision, self.python) if each]) != 1:
            raise ValueError("give exactly one of builtin, torchvision, python")
        return self


def _parse_source(value: object) -> object:
    """`torchvision/resnet18` is short for `{torchvision: resnet18}`, and so on."""
    if isinstance(value, str):
        kind, slash, name = value.partition("/")
        if not slash:
            raise ValueError(
                f"{value!r} is not a source; write torchvision/NAME, {{builtin: NAME}} or {{python: module:factory}}"
            )
        return {kind: name}
    return value


class EATASettings(Settings):
    """Settings of the `eata` adapter; `auto` follows the number of classes. See adapters/eata.py."""

    entropy_margin: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    redundancy_margin: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    anchor: Literal["fisher", "l2", "none"] = "fisher"
    anchor_weight: float = Field(1.0, ge=0)
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    source_pull: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] = "auto"
    full_step_rows: Literal["auto"] | Count = "auto"
    momentum: float = Field(0.9, ge=0, lt=1)
    source_images: float = Field(16.0, gt=0)
    stream_images_max: float = Field(256.0, ge=0)
    class_mix: float = Field(0.1, ge=0)
    class_mix_rate: float = Field(0.3, ge=0, lt=1)


class ModTrSettings(Settings):
    """Settings of the `modtr` adapter, of a detector. See adapters/modtr.py."""

    learns: Literal["both", "stream", "modality", "nothing"] = "both"  # from feedback: whose parameters
    stream_learning_rate: float = Field(1e-3, gt=0, le=0.05)  # of a stream's scale and shift; more trips the guards
    modality_learning_rate: float = Field(1e-4, gt=0, le=5e-3)  # of the weights that its modality's streams share
    router_confidence: float = Field(0.9, gt=0.5, le=1)  # less sure than that of a modality: no translator
    ap50_drop_max: float = Field(0.05, ge=0, le=1)  # on a translator's probe, before a guard trips

    @property
    def shares(self) -> bool:
        """Whether one stream's feedback changes weights that others answer with."""
        return self.learns in ("both", "modality")


class AlignmentSettings(Settings):
    """Settings of the `alignment` adapter, of a detector. See adapters/alignment.py."""

    learning_rate: float = Field(0.01, gt=0, le=0.05)
    drift_max: float = Field(1.0, gt=0)  # no step below it; 1 is the alarm line
    source_images: float = Field(8.0, gt=0)
    stream_images_max: float = Field(64.0, ge=0)


class KVBottleneckSettings(Settings):
    """Settings of the `kv_bottleneck` adapter, of a classifier: classes learned from labels. See adapters/heads.py."""

    head: Literal["counts", "ridge", "class_means", "gradient"] = "counts"
    answers: Literal["combined", "head"] = "combined"  # with the model's, or the head alone once it was told some
    codebooks: int = Field(256, ge=1, le=4096)  # counts, gradient
    branches: tuple[Annotated[int, Field(ge=2)], ...] = (16, 4, 4)  # counts: children of a cell of keys, level by level
    classes_max: Count = 100  # added by labels: to each stream, and to all streams in common
    labels_per_class: Count = 4096  # kept of each class; the oldest is unlearned when one more comes
    labels_max: Count = 100_000  # kept in all

    @model_validator(mode="after")
    def _has_few_keys(self) -> "KVBottleneckSettings":
        keys = prod(self.branches) if self.branches else 0
        if not 0 < keys <= KEYS_MAX:
            raise ValueError(f"branches {list(self.branches)} give {keys} keys; there can be 2 to {KEYS_MAX}")
        if keys * self.codebooks > CELLS_MAX:
            raise ValueError(
                f"{self.codebooks} codebooks of {keys} keys are {keys * self.codebooks} values for each class; at "
                f"most {CELLS_MAX} can be had"
            )
        return self


class AdapterSettings(Settings):
    """What stands around the model.

    `eata` and `kv_bottleneck` (or both) for classifiers, `modtr` and `alignment` (or both) for detectors.
    """

    eata: EATASettings | None = None
    kv_bottleneck: KVBottleneckSettings | None = None
    modtr: ModTrSettings | None = None
    alignment: AlignmentSettings | None = None
    source: Literal[True] | None = None  # the frozen model

    @model_validator(mode="after")
    def _exactly_one(self) -> "AdapterSettings":
        classifies, detects = self.eata or self.kv_bottleneck, self.modtr or self.alignment
        given = [each for each in (classifies, detects, self.source) if each is not None]
        if len(given) != 1:
            raise ValueError(
                "give eata: {…} and/or kv_bottleneck: {…}, or modtr: {…} and/or alignment: {…}, or source: true"
            )
        return self


def _parse_adapter(value: object) -> object:
    """The name of an adapter alone is short for the adapter with its defaults."""
    if value == "source":
        return {"source": True}
    names = ("eata", "kv_bottleneck", "modtr", "alignment")
    if value in names:
        return {value: {}}
    if isinstance(value, dict):
        return {key: {} if key in names and given is None else given for key, given in value.items()}
    return value


class TranslatorSettings(Settings):
    """A translator of `modtr`."""

    file: File  # from `tta-serve train-translator`
    probe: Folder | None = None  # COCO-format images with boxes: what feedback must not unlearn


def _parse_translator(value: object) -> object:
    """A path alone is short for the file without a probe."""
    return {"file": value} if isinstance(value, str) else value


class FeedbackSettings(Settings):
    """What is remembered of predictions, so that labels or boxes can come later by the prediction's `id`.

    Of a classifier the features of its images, of a detector the images.
    """

    remember_images: int = Field(4096, ge=0)  # 0: none
    remember_bytes: ByteSize = ByteSize(64 * 2**20)
    remember_s: float = Field(600, gt=0)


class OpenSetSettings(Settings):
    """Of a classifier: images that look like nothing known teach nothing without a label. See adapters/open_set.py."""

    unknown_above: float = Field(0.95, ge=0, lt=1)  # of the score; such a share of the source's images is better known


class AdaptationSettings(Settings):
    """When the adapter learns."""

    mode: Literal["async", "sync"] = "async"  # answer first, or one request = one batch = one step, in order
    budget: float = Field(0.3, ge=0.05, le=1)  # async: share of one core's (or device's) time for learning
    step_rows: Count = 32  # async: a step waits for this many rows of a stream …
    step_wait_s: float = Field(0.5, gt=0)  # … or until the oldest has waited this long
    queue_rows: Count = 1024  # async: rows that may wait for the learner; the oldest give way
    gate: bool = True  # async: a stream that is like the source is spared its steps
    probe: File | None = None  # async: .npz with source `images` and, if known, their `labels`: to measure forgetting
    forgetting_max: float = Field(0.02, ge=0, le=1)  # async: error added on the probe, as a share, before a guard trips


class BatchingSettings(Settings):
    """How requests share a forward."""

    rows_max: Count = 64
    queue_rows: Count = 1024  # more than these waiting: 429


class StreamSettings(Settings):
    """How many streams a model may have, and how many of them at hand."""

    max: Count = 10_000
    resident: Count = 1024  # states in memory; those of the others are written out until they are needed
    new_per_minute: Count = 600


class AutoscalingSettings(Settings):
    """How many replicas there are, as Ray Serve decides by the requests under way."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    target_ongoing_requests: float = Field(16, gt=0)  # of one replica
    upscale_delay_s: float = Field(30, ge=0)  # that there must be too many for
    downscale_delay_s: float = Field(600, ge=0)

    @model_validator(mode="after")
    def _least_below_most(self) -> "AutoscalingSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ModelSettings(Settings):
    """One model and everything around it."""

    name: str = Field(pattern=NAME_PATTERN)
    source: Annotated[SourceSettings, BeforeValidator(_parse_source)]
    task: Task = Field(default_factory=lambda data: _usual_task(data.get("source")))  # a model from python may detect
    weights: str | None = None  # a name of torchvision's, or a file (.safetensors, .pt)
    input: InputSettings | None = None
    labels: tuple[str, ...] | None = None
    prior: File | None = None  # .safetensors with `fisher`, or .npz with source `images`, uint8 [N, H, W, 3]
    replicas: int = Field(1, ge=1)
    autoscaling: AutoscalingSettings | None = None  # in place of `replicas`
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    runtime: Literal["eager", "compile"] = "eager"  # of predictions; compiling takes minutes at the first start
    threads: Literal["auto"] | Count = "auto"  # of one forward on the CPU
    adapter: Annotated[AdapterSettings, BeforeValidator(_parse_adapter)] = Field(
        default_factory=lambda data: _usual_adapter(data.get("task"))
    )
    translators: Mapping[Modality, Annotated[TranslatorSettings, BeforeValidator(_parse_translator)]] = {}
    feedback: FeedbackSettings = FeedbackSettings()
    open_set: OpenSetSettings | None = None  # None: every image is taken to be of a known class
    adaptation: AdaptationSettings = AdaptationSettings()
    batching: BatchingSettings = BatchingSettings()
    streams: StreamSettings = StreamSettings()

    @property
    def replicas_max(self) -> int:
        """How many replicas there may be."""
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelSettings":
        if self.autoscaling and "replicas" in self.model_fields_set:
            raise ValueError("give either replicas or autoscaling")
        if self.replicas_max > 1 and self.adaptation.mode == "sync":
            raise ValueError(f"adaptation.mode: sync is one replica's protocol, and there are {self.replicas_max}")
        if self.replicas_max > 1 and self.adapter.modtr and self.adapter.modtr.shares:
            raise ValueError(
                "replicas: what feedback teaches the weights that a modality's streams share stays in one replica, and "
                f"there are {self.replicas_max}; set adapter: {{modtr: {{learns: stream}}}}"
            )
        if self.source.builtin and self.weights:
            raise ValueError("a built-in model brings its own weights; remove `weights`")
        if self.weights and _is_path(self.weights) and not Path(self.weights).is_file():
            raise ValueError(f"weights: {self.weights} is not a file; give the path of a .safetensors or .pt file")
        if self.source.python and self.weights and not _is_path(self.weights):
            raise ValueError(f"weights: {self.weights!r} is not a file (.safetensors, .pt)")
        if self.task == "detection":
            return self._fits_detection()
        if _usual_task(self.source) == "detection":
            raise ValueError("task: this source is a detector")
        if self.translators or self.adapter.modtr or self.adapter.alignment:
            raise ValueError("translators and the adapters modtr and alignment are for detectors (task: detection)")
        keyed = self.adapter.kv_bottleneck and self.source.builtin != "digits"  # which brings its own images
        if keyed and (self.prior is None or self.prior.suffix != ".npz"):
            raise ValueError(
                "kv_bottleneck needs `prior`: an .npz with `images` like those that will come, without labels, uint8 "
                "[N, height, width, 3]"
            )
        if self.source.python and not self.input:
            raise ValueError("a model from python needs `input: {size: [height, width], mean: …, std: …}`")
        if self.source.torchvision and self.weights and _is_path(self.weights) and not self.input:
            raise ValueError("torchvision weights from a file need `input: {size: [height, width], mean: …, std: …}`")
        return self

    def _fits_detection(self) -> "ModelSettings":
        if self.source.builtin and self.source.builtin != "digit-scenes":
            raise ValueError(f"task: builtin/{self.source.builtin} is no detector")
        if self.adapter.eata or self.adapter.kv_bottleneck:
            raise ValueError(
                "adapter: eata and kv_bottleneck are for classifiers; a detector takes modtr, alignment, both or source"
            )
        if self.open_set:
            raise ValueError("open_set: of a classifier")
        if self.input:
            raise ValueError("input: a detector resizes and normalises by itself; remove it")
        if given := self.adaptation.model_fields_set & {"probe", "forgetting_max", "gate"}:
            raise ValueError(
                f"adaptation.{min(given)}: of a classifier; a detector has a probe and `ap50_drop_max` for its "
                "translators, and `drift_max` for alignment"
            )
        if self.prior and not self.adapter.alignment:
            raise ValueError("prior: of a detector, only the adapter alignment uses it")
        if self.adapter.alignment and not self.source.builtin and (self.prior is None or self.prior.suffix != ".npz"):
            raise ValueError("alignment needs `prior`: an .npz with source `images`, uint8 [N, height, width, 3]")
        if self.source.python and not self.labels:
            raise ValueError("a detector from python needs `labels`, with __background__ first where it has one")
        if self.runtime != "eager":
            raise ValueError("runtime: a detector runs in eager")
        if self.adaptation.mode != "async":
            raise ValueError("adaptation: a detector has no mode sync")
        if self.translators and not self.adapter.modtr:
            raise ValueError("translators: only the adapter modtr uses them")
        return self


def _usual_task(source: SourceSettings | None) -> Task:
    """What a source is for, as far as its name says."""
    name = (source and source.torchvision) or ""
    detects = name.startswith(DETECTORS) or (source is not None and source.builtin == "digit-scenes")
    return "detection" if detects else "classification"


def _usual_adapter(task: Task | None) -> AdapterSettings:
    if task == "detection":
        return AdapterSettings(modtr=ModTrSettings())
    return AdapterSettings(eata=EATASettings())


def _is_path(weights: str) -> bool:
    return "/" in weights or weights.endswith((".safetensors", ".pt", ".pth"))


class StoreSettings(Settings):
    """Where states live, and what users told the server lies."""

    path: str = Field("tta-state", min_length=1)  # a folder on a disk of this machine, or s3://BUCKET/FOLDER, gs://…
    sync_interval_s: float = Field(1.0, ge=0.05, le=3600)  # what a replica learned since is lost when it is killed

    @property
    def is_url(self) -> bool:
        return "://" in self.path

    @property
    def folder(self) -> Path:
        return Path(self.path)

    @property
    def absolute(self) -> "StoreSettings":
        """The same from whatever folder it is looked at."""
        return self if self.is_url else self.model_copy(update={"path": str(self.folder.absolute())})

    @field_validator("path")
    @classmethod
    def _has_a_known_scheme(cls, path: str) -> str:
        scheme, found, _ = path.partition("://")
        if found and scheme not in STORE_SCHEMES:
            raise ValueError(f"{scheme}:// is not a place for states; give a folder, or {', '.join(STORE_SCHEMES)}://…")
        return path


class Config(Settings):
    """The whole file."""

    http: HTTPSettings = HTTPSettings()
    limits: LimitSettings = LimitSettings()
    auth: AuthSettings = AuthSettings()
    store: StoreSettings = StoreSettings()
    models: Annotated[tuple[ModelSettings, ...], AfterValidator(_at_least_one)]

    @model_validator(mode="after")
    def _names_differ(self) -> "Config":
        names = [model.name for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models are named {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _labels_lie_in_a_folder(self) -> "Config":
        telling = [model.name for model in self.models if model.adapter.kv_bottleneck]
        if self.store.is_url and telling:
            raise ValueError(
                f"store.path: the model {telling[0]} learns from labels, which are kept in a file; give a folder"
            )
        return self

    @model_validator(mode="after")
    def _tenants_share_no_weights(self) -> "Config":
        sharing = [model.name for model in self.models if model.adapter.modtr and model.adapter.modtr.shares]
        if self.auth.tenants and sharing:
            raise ValueError(
                f"auth.tenants: the model {sharing[0]} has weights that all streams of a modality share and that "
                "feedback changes, so that tenants would change each other's answers; "
                "set adapter: {modtr: {learns: stream}}"
            )
        return self


class Tokens(BaseModel):
    """The tokens themselves, read from the environment once."""

    model_config = ConfigDict(frozen=True)

    infer: str | None
    admin: str | None
    tenants: Mapping[str, str] = {}  # tenant → token


def read_tokens(auth: AuthSettings) -> Tokens:
    """Read the tokens that the configuration names.

    Raises:
        ConfigError: the variable of the infer token or of a tenant's is named and empty: leaving the routes open is not
            what was asked for. Or a tenant's token is not its alone.
    """
    infer = os.environ.get(auth.infer_token_env) if auth.infer_token_env else None
    if auth.infer_token_env and not infer:
        raise ConfigError(
            f"auth.infer_token_env names {auth.infer_token_env}, which is not set; set it or remove the line"
        )
    admin = os.environ.get(auth.admin_token_env) or None
    tenants = {tenant: os.environ.get(variable, "") for tenant, variable in auth.tenants.items()}
    owners = {"admin_token_env": admin, "infer_token_env": infer}
    for tenant, token in tenants.items():
        if not token:
            raise ConfigError(
                f"auth.tenants.{tenant} names {auth.tenants[tenant]}, which is not set; set it or remove the tenant"
            )
        if same := [owner for owner, theirs in owners.items() if theirs == token]:
            raise ConfigError(f"auth.tenants.{tenant} and auth.{same[0]} give the same token; each needs its own")
        owners[f"tenants.{tenant}"] = token
    return Tokens(infer=infer or None, admin=admin, tenants=tenants)


def load(path: Path) -> Config:
    """Read and validate a configuration file.

    Relative paths in it are relative to the current folder, as in every command line.

    Raises:
        ConfigError: with one line for each problem, each beginning with `FILE:LINE:`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        content = yaml.load(text, UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that is none
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}:1: the file must be a mapping with the key `models`")
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        lines = [f"{path}:{line}: {what}" for line, what in located(root, error.errors())]
        raise ConfigError("\n".join(lines)) from None
