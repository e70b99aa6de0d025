"""A snapshot is a state, encoded: safetensors with a header that says whose it is, under one checksum.

The checksum is the SHA-256 of the whole snapshot, taken while 64 zeros stand in the checksum's own place: header,
names, types, shapes, numbers and every byte between them are under it. It tells a snapshot that was torn or damaged
from a whole one; it does not tell who wrote it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from tta_serve.errors import InvalidInput, Unavailable

FORMAT = 1  # grows with every change that older servers cannot read
_UNKNOWN_TO_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_NO_CHECKSUM = "0" * 64
_LENGTH_BYTES = 8  # of the safetensors header, in front of it, little end first


class Header(NamedTuple):
    """Whose state it is."""

    model: str  # its name
    generation: str  # digest of the model and of the adapters that give the state its meaning, hex
    stream: str
    incarnation: int
    version: int
    steps: int  # updates of parameters
    at_s: float  # wall clock, seconds since 1970
    extra: str = ""  # JSON, of whoever encodes
    format: int = FORMAT


class Refused(Unavailable):
    """A snapshot that is not used.

    Args:
        stream: whose it was taken for; None where that is not known.
        version: as its header has it; None where the header cannot be read.
        reason: what is wrong with it.
    """

    def __init__(self, stream: str | None, version: int | None, reason: str) -> None:
        super().__init__(stream, version, reason)
        self.stream = stream
        self.version = version
        self.reason = reason

    def __str__(self) -> str:
        whose = "" if self.stream is None else f" of the stream {self.stream!r}"
        which = "" if self.version is None else f", version {self.version},"
        return f"the snapshot{whose}{which} is refused: {self.reason}"


def encode(tensors: Mapping[str, Tensor], header: Header) -> bytes:
    """A state as a snapshot.

    Args:
        tensors: by name, of any shapes, on any device.
        header: whose they are.

    Raises:
        InvalidInput: a name is no Unicode.
        Refused: a tensor is not finite; so the last good snapshot stays where it is.

    >>> content = encode({"mean": torch.ones(2)}, Header("traffic", "a1", "camera-7", 1, 5, steps=3, at_s=0.5))
    >>> tensors, header = decode(content, model="traffic", generation="a1", stream="camera-7")
    >>> tensors["mean"].tolist(), header.version
    ([1.0, 1.0], 5)
    """
    _check_finite(tensors, header)
    fields = {name: str(value) for name, value in header._asdict().items()}
    try:
        content = _serialized(tensors, {**fields, "sha256": _NO_CHECKSUM})
    except UnicodeEncodeError as error:
        raise InvalidInput(f"a name in a snapshot is no Unicode ({error}); give another") from error
    place = _place(content, _NO_CHECKSUM)
    return content[:place] + _checksum(content, place).encode() + content[place + len(_NO_CHECKSUM) :]


def decode(content: bytes, *, model: str, generation: str, stream: str) -> tuple[dict[str, Tensor], Header]:
    """A snapshot's state and header.

    Args:
        content: as `encode` gave it.
        model: whose state is wanted.
        generation: of which meaning.
        stream: of which stream.

    Raises:
        Refused: it is torn, damaged, somebody else's, of another format or not finite.
    """
    header = _read(content, stream)
    for what, wanted, found in (
        ("model", model, header.model),
        ("generation", generation, header.generation),
        ("stream", stream, header.stream),
    ):
        if found != wanted:
            raise Refused(stream, header.version, f"it is of the {what} {found!r}, not {wanted!r}")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        # the checksum is right: this is what somebody wrote. KeyError and ValueError: types that torch does not have
        raise Refused(stream, header.version, f"safetensors cannot read it ({error})") from error
    _check_finite(tensors, header)
    return tensors, header


def read_header(content: bytes) -> Header:
    """A snapshot's header, whosever it is.

    Raises:
        Refused: it is torn, damaged, no snapshot, or of another format.
    """
    return _read(content, None)


def _read(content: bytes, stream: str | None) -> Header:
    fields = _fields(content, stream)
    try:
        # first: another format may have another checksum
        written = int(fields["format"])
        if written != FORMAT:
            raise Refused(stream, None, f"it has format {written} and this server reads {FORMAT}")
        checksum = fields["sha256"]
        header = Header(
            model=fields["model"],
            generation=fields["generation"],
            stream=fields["stream"],
            incarnation=int(fields["incarnation"]),
            version=int(fields["version"]),
            steps=int(fields["steps"]),
            at_s=float(fields["at_s"]),
            extra=fields["extra"],
        )
    except (KeyError, TypeError, ValueError):
        raise Refused(stream, None, "it is damaged, or no snapshot: fields of its header are missing") from None
    place = _place(content, checksum)
    if len(checksum) != len(_NO_CHECKSUM) or place < 0 or _checksum(content, place) != checksum:
        raise Refused(stream, header.version, "it is cut short or damaged: its bytes do not match its SHA-256")
    return header


def _fields(content: bytes, stream: str | None) -> dict[str, str]:
    """The metadata, unchecked."""
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if len(content) < _LENGTH_BYTES or length > len(content) - _LENGTH_BYTES:
        raise Refused(stream, None, f"it is cut short, or no snapshot: it has {len(content)} bytes")
    try:
        read: Any = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])
        fields: dict[str, str] = read["__metadata__"]
        strings = all(isinstance(value, str) for value in fields.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        strings = False
    if not strings:
        raise Refused(stream, None, "it is damaged, or no snapshot: it has no header")
    return fields


def _serialized(tensors: Mapping[str, Tensor], fields: dict[str, str]) -> bytes:
    """By numpy where it knows the types: from torch many small tensors take safetensors three times as long."""
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: bytes
    if any(tensor.dtype in _UNKNOWN_TO_NUMPY for tensor in arrays.values()):
        # copies: rows of one table share their storage, which it does not take
        content = safetensors.torch.save({name: each.clone() for name, each in arrays.items()}, metadata=fields)
    else:
        content = safetensors.numpy.save({name: each.numpy() for name, each in arrays.items()}, metadata=fields)
    return content


def _place(content: bytes, checksum: str) -> int:
    """Where the checksum's digits stand in the content; −1: nowhere."""
    name = b'"sha256":"'  # nowhere else: JSON escapes the quotes of a text that has this in it
    found = content.find(name + checksum.encode(errors="replace"))
    return found + len(name) if found >= 0 else -1


def _checksum(content: bytes, place: int) -> str:
    view = memoryview(content)
    whole = hashlib.sha256(view[:place])
    whole.update(_NO_CHECKSUM.encode())
    whole.update(view[place + len(_NO_CHECKSUM) :])
    return whole.hexdigest()


def _check_finite(tensors: Mapping[str, Tensor], header: Header) -> None:
    floats = {name: tensor.reshape(-1) for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return
    # all in one go: a state is many small tensors
    if not torch.cat([numbers.double() for numbers in floats.values()]).isfinite().all():
        names = [name for name, numbers in floats.items() if not numbers.double().isfinite().all()]
        raise Refused(header.stream, header.version, f"{', '.join(names)[:200]}: numbers that are not finite")
