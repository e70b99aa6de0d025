"""The file of a translator: its weights, and in its header what it is for.

A safetensors file whose metadata has `format`, `format_version`, `modality`, `detector` (digest of the weights that it
was trained through), `config`, `router` and `metrics` (JSON). Whoever reads one takes nothing in it for granted: it may
have come by HTTP.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters.translator import Translator, TranslatorConfig
from tta_serve.config import MODALITY_PATTERN, RGB
from tta_serve.errors import InvalidInput
from tta_serve.router import Router

FORMAT = "tta-serve-translator"
FORMAT_VERSION = "1"
FILE_BYTES_MAX = 64 * 2**20  # about 16 million parameters; the paper's largest translator has 6.6
WIDTH_MAX, DEPTH_MAX = 64, 6  # a network is built before its weights are looked at, and costs by these two

DIGEST = re.compile(r"[0-9a-f]{16}")


class TranslatorFile(NamedTuple):
    """A translator and what it is for."""

    modality: str  # matches `MODALITY_PATTERN`, and is not `rgb`
    detector: str  # digest of the detector's weights, 16 hexadecimal digits
    config: TranslatorConfig
    weights: dict[str, Tensor]  # the `Translator`'s state dict
    router: Router | None  # recognises the modality; None: clients must name it
    metrics: dict[str, Any]  # what its training measured; JSON


def check_modality(name: str) -> str:
    """The name, if a modality that is translated can have it.

    Raises:
        InvalidInput: it cannot; says what a name looks like.
    """
    if not MODALITY_PATTERN.fullmatch(name):
        raise InvalidInput(
            f"{name!r:.80} cannot name a modality; use 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or digit"
        )
    if name == RGB:
        raise InvalidInput(f"{RGB!r} is the name of images that are not translated; give the modality another name")
    return name


def save(path: Path, file: TranslatorFile) -> None:
    """Write a translator's file; whoever reads at the same time sees all of the old one or all of the new one.

    Raises:
        InvalidInput: the file could not be read back: a name, a digest, a config or weights that `parse` refuses.
        ValueError: a metric that is not finite, or not JSON.
        OSError: it cannot be written; what was there before is there still.
    """
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "modality": file.modality,
        "detector": file.detector,
        "config": json.dumps(dataclasses.asdict(file.config)),
        "router": "null" if file.router is None else file.router.to_json(),
        "metrics": json.dumps(file.metrics, allow_nan=False),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in file.weights.items()}
    content = _in_order(safetensors.torch.save(weights, metadata=header))
    parse(content, file.detector, file.modality)
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(part).chmod(0o644)  # mkstemp's are for their owner alone
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)


def load(path: Path, detector: str, modality: str | None = None) -> TranslatorFile:
    """Read a translator's file.

    Args:
        path: of the file.
        detector: digest of the detector that it will stand in front of.
        modality: what it must be for; None: whatever it says.

    Raises:
        InvalidInput: as `parse`; the message begins with the path.
        OSError: there is no such file, or it cannot be read.
    """
    with path.open("rb") as stream:
        content = stream.read(FILE_BYTES_MAX + 1)  # one more than is allowed is enough to refuse it
    try:
        return parse(content, detector, modality)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None


def parse(content: bytes, detector: str, modality: str | None = None) -> TranslatorFile:
    """Read the bytes of a translator's file; see `load`.

    Raises:
        InvalidInput: too large, not safetensors, of another format or version, for another detector or modality, a
            config that no translator has, weights that do not fit it, or a router or metrics that cannot be read. The
            message names the value and the remedy.
    """
    if len(content) > FILE_BYTES_MAX:
        raise InvalidInput(f"the translator's file has more than {FILE_BYTES_MAX} bytes, which is the limit")
    try:
        weights: dict[str, Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: of a dtype that torch does not have
        raise InvalidInput(
            f"{len(content)} bytes that are no safetensors file ({error}); was the file cut short?"
        ) from None
    header = _header(content)
    for name, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if header.get(name) != expected:
            raise InvalidInput(
                f"the file's {name} is {header.get(name)!r:.80}, not {expected!r}; "
                "give a file that this version's `tta-serve train-translator` wrote"
            )
    named = check_modality(_entry(header, "modality"))
    if modality is not None and named != modality:
        raise InvalidInput(f"the translator is for the modality {named!r}, not {modality!r}; give it under {named!r}")
    made_for = _entry(header, "detector")
    if not DIGEST.fullmatch(made_for):
        raise InvalidInput(f"the file's detector {made_for!r:.80} is no digest of 16 hexadecimal digits")
    if made_for != detector:
        raise InvalidInput(
            f"the translator was made for the detector {made_for}, this one is {detector}; "
            "train one through this detector with `tta-serve train-translator`"
        )
    config = _config(_json(header, "config"))
    _check_weights(config, weights)
    metrics = _json(header, "metrics")
    if not isinstance(metrics, dict):
        raise InvalidInput("the file's metrics must be a JSON object")
    return TranslatorFile(named, made_for, config, weights, _router(_entry(header, "router")), metrics)


def build(file: TranslatorFile) -> Translator:
    """The translator, in evaluation mode, with copies of the file's weights."""
    translator = Translator(file.config)
    translator.load_state_dict(file.weights)
    return translator.eval()


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: the library's order differs from call to call."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8, as the library has them
    return len(encoded).to_bytes(8, "little") + encoded + content[end:]


def _header(content: bytes) -> Mapping[str, str]:
    """The metadata of bytes that are a safetensors file: its header is a length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: Mapping[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    return metadata


def _entry(header: Mapping[str, str], name: str) -> str:
    try:
        return header[name]
    except KeyError:
        raise InvalidInput(f"the file's header has no {name}; is it a translator's file?") from None


def _json(header: Mapping[str, str], name: str) -> Any:
    def refuse(number: str) -> None:
        raise ValueError(number)

    try:
        return json.loads(_entry(header, name), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise InvalidInput(f"the file's {name} is not JSON (finite numbers only)") from None


def _config(read: Any) -> TranslatorConfig:
    fields = {field.name: type(field.default) for field in dataclasses.fields(TranslatorConfig)}
    if not isinstance(read, dict) or set(read) != set(fields):
        raise InvalidInput(f"the file's config must be an object with {', '.join(fields)} and nothing else")
    for name, kind in fields.items():
        if type(read[name]) is not kind:  # not isinstance: True is an int
            raise InvalidInput(f"the config's {name} must be of type {kind.__name__}, not {read[name]!r:.80}")
    for name, most in (("width", WIDTH_MAX), ("depth", DEPTH_MAX)):
        if read[name] > most:
            raise InvalidInput(f"the config's {name} is {read[name]}; at most {most} is served")
    try:
        return TranslatorConfig(**read)
    except ValueError as error:
        raise InvalidInput(f"the file's config cannot be used: {error}") from None


def _check_weights(config: TranslatorConfig, weights: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):  # shapes alone: a config costs no memory before its weights are there
        expected = Translator(config).state_dict()
    for problem, names in (("lack", expected.keys() - weights.keys()), ("have", weights.keys() - expected.keys())):
        if names:
            raise InvalidInput(
                f"the translator's weights {problem} {', '.join(sorted(names)[:3]):.200}; "
                f"those of the config {config} do not. Give the file as `tta-serve train-translator` wrote it"
            )
    for name, wanted in expected.items():
        given = weights[name]
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise InvalidInput(
                f"the weight {name} is {given.dtype} {list(given.shape)}; "
                f"with the config {config} it must be {wanted.dtype} {list(wanted.shape)}"
            )
        if not given.isfinite().all():
            raise InvalidInput(f"the weight {name} has values that are not finite; train the translator again")
        if name.endswith("running_var") and (given < 0).any():
            raise InvalidInput(f"the variance {name} has values below 0; train the translator again")


def _router(text: str) -> Router | None:
    if text == "null":
        return None
    try:
        return Router.from_json(text)
    except ValueError as error:
        raise InvalidInput(f"{error}; train the translator again to have it fitted") from None
