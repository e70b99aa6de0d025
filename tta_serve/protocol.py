"""Wire types: the Open Inference Protocol v2 for tensors, JSON and the binary tensor extension.

References:
    Open Inference Protocol (kserve/open-inference-protocol, inference_rest.md); Triton's binary tensor data extension.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tta_serve.errors import InvalidInput

DTYPES: dict[str, np.dtype[Any]] = {
    "UINT8": np.dtype("uint8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT64": np.dtype("<i8"),
}
Datatype = Literal["UINT8", "FP16", "FP32", "FP64", "INT64"]
SIZE_MAX = 2**31 - 1  # of one dimension of a shape
_SELF_EXPLAINING = ("json_invalid", "missing", "too_short", "too_long")  # pydantic's words name the value themselves


TENSORS_MAX = 16  # of one request; every model here reads one


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore")  # the protocol lets clients send what a server does not know


class WireInput(_Wire):
    """One tensor of a request."""

    name: str
    shape: list[int] = Field(max_length=8)
    datatype: Datatype
    parameters: dict[str, Any] = {}
    data: Any = None


class WireRequestedOutput(_Wire):
    """An output that a request asks for."""

    name: str
    parameters: dict[str, Any] = {}


class WireRequest(_Wire):
    """The JSON of an inference request."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    # fail_fast: a request of a million wrong inputs is refused for the first
    inputs: list[WireInput] = Field(min_length=1, max_length=TENSORS_MAX, fail_fast=True)
    outputs: list[WireRequestedOutput] | None = Field(None, max_length=TENSORS_MAX, fail_fast=True)


class InferRequest(NamedTuple):
    """An inference request, decoded."""

    id: str | None
    parameters: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] | None  # names asked for, in order; None: the server's choice
    binary_outputs: frozenset[str] | Literal["all"]  # which of them go as bytes behind the JSON


def parse_infer(body: bytes, header_length: str | None) -> InferRequest:
    """Decode the body of `POST …/infer`.

    Args:
        body: JSON, or JSON followed by the bytes of the tensors, in their order.
        header_length: the header `Inference-Header-Content-Length`: length of the JSON, where bytes follow.

    Raises:
        InvalidInput: with what is wrong, and the value.
    """
    header, binary = _split(body, header_length)
    try:
        request = WireRequest.model_validate_json(header)
    except ValidationError as error:
        problem = error.errors()[0]
        where = "".join(f"{step}." for step in problem["loc"]).removesuffix(".")
        given = "" if problem["type"] in _SELF_EXPLAINING else f", not {reprlib.repr(problem['input'])}"
        raise InvalidInput(
            f"the JSON is not an inference request: {where + ': ' if where else ''}{problem['msg']}{given}"
        ) from None
    tensors: dict[str, NDArray[Any]] = {}
    offset = 0
    for wire in request.inputs:
        if wire.name in tensors:
            raise InvalidInput(f"two inputs are named {wire.name!r}")
        size = wire.parameters.get("binary_data_size")
        if size is None:
            tensors[wire.name] = _from_json(wire)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary) - offset:
            raise InvalidInput(
                f"input {wire.name!r}: binary_data_size is {size!r}, "
                f"and {len(binary) - offset} bytes are left after the JSON"
            )
        tensors[wire.name] = _from_bytes(wire, binary[offset : offset + size])
        offset += size
    if offset != len(binary):
        raise InvalidInput(f"{len(binary) - offset} bytes after the JSON belong to no input (see binary_data_size)")
    outputs = None if request.outputs is None else tuple(output.name for output in request.outputs)
    if request.parameters.get("binary_data_output") is True:
        return InferRequest(request.id, request.parameters, tensors, outputs, "all")
    asked = frozenset(o.name for o in request.outputs or [] if o.parameters.get("binary_data") is True)
    return InferRequest(request.id, request.parameters, tensors, outputs, asked)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    digits = header_length.isascii() and header_length.isdigit() and len(header_length) < 20
    if not digits or int(header_length) > len(body):
        raise InvalidInput(
            f"Inference-Header-Content-Length is {header_length[:100]!r}; it must be the length of the JSON, at most "
            f"the {len(body)} bytes of the body"
        )
    length = int(header_length)
    return body[:length], memoryview(body)[length:]


def _shape(wire: WireInput) -> tuple[int, ...]:
    if not all(1 <= size <= SIZE_MAX for size in wire.shape):
        raise InvalidInput(f"input {wire.name!r}: shape {wire.shape} has a size outside 1 … {SIZE_MAX}")
    return tuple(wire.shape)


def _count(shape: Sequence[int]) -> int:
    count = 1  # in Python's integers: no shape overflows them
    for size in shape:
        count *= size
    return count


def _from_bytes(wire: WireInput, buffer: memoryview) -> NDArray[Any]:
    shape, dtype = _shape(wire), DTYPES[wire.datatype]
    expected = _count(shape) * dtype.itemsize
    if len(buffer) != expected:
        raise InvalidInput(
            f"input {wire.name!r}: {len(buffer)} bytes, and shape {wire.shape} of {wire.datatype} takes {expected}"
        )
    return np.frombuffer(buffer, dtype).reshape(shape)


def _from_json(wire: WireInput) -> NDArray[Any]:
    shape, dtype = _shape(wire), DTYPES[wire.datatype]
    if not isinstance(wire.data, list):
        raise InvalidInput(f"input {wire.name!r}: needs `data`, a list, or the parameter binary_data_size")
    try:
        values = np.asarray(wire.data)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"input {wire.name!r}: data is ragged or out of range: {error}") from None
    allowed = "iu" if dtype.kind in "iu" else "iuf"
    if values.size and values.dtype.kind not in allowed:
        raise InvalidInput(f"input {wire.name!r}: data holds other things than numbers of {wire.datatype}")
    if values.size != _count(shape):
        raise InvalidInput(f"input {wire.name!r}: {values.size} numbers, and shape {wire.shape} takes {_count(shape)}")
    if dtype.kind in "iu" and values.size:
        low, high = int(values.min()), int(values.max())
        limits = np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise InvalidInput(f"input {wire.name!r}: values {low} … {high} are outside {limits.min} … {limits.max}")
    with np.errstate(over="ignore"):  # a number too large becomes an infinity, which is refused by name later
        return values.astype(dtype).reshape(shape)


def datatype_of(array: NDArray[Any]) -> str:
    """The protocol's name of an array's dtype."""
    return next(name for name, dtype in DTYPES.items() if dtype == array.dtype)


def format_infer(
    header: Mapping[str, Any],
    outputs: Mapping[str, NDArray[Any]],
    binary: frozenset[str] | Literal["all"],
) -> tuple[bytes, int | None]:
    """Encode an inference response.

    Args:
        header: everything but the outputs.
        outputs: name → array, in order.
        binary: which outputs go as bytes behind the JSON.

    Returns:
        The body, and the length of its JSON where bytes follow.
    """
    described: list[dict[str, Any]] = []
    buffers: list[bytes] = []
    for name, array in outputs.items():
        wire: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if binary == "all" or name in binary:
            buffers.append(np.ascontiguousarray(array).tobytes())
            wire["parameters"] = {"binary_data_size": len(buffers[-1])}
        else:
            wire["data"] = array.ravel().tolist()
        described.append(wire)
    text = json.dumps({**header, "outputs": described}, separators=(",", ":")).encode()
    return b"".join([text, *buffers]), len(text) if buffers else None
