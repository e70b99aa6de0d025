import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tta_serve.errors import InvalidInput
from tta_serve.protocol import DTYPES, InferRequest, datatype_of, format_infer, parse_infer

quick = settings(max_examples=60, deadline=None)  # deadline: the machine may be busy

arrays = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, max_side=4))
)


def wire(array: np.ndarray, name: str = "images", **parameters: Any) -> dict[str, Any]:
    described = {"name": name, "shape": list(array.shape), "datatype": datatype_of(array)}
    return {**described, "parameters": parameters} if parameters else described


def encode(*inputs: tuple[str, np.ndarray], binary: bool, **fields: Any) -> tuple[bytes, str | None]:
    """A client's request: its body and the header with the length of its JSON."""
    if not binary:
        described = [
            {**wire(array, name), "data": array.tolist() if array.ndim else [array.item()]} for name, array in inputs
        ]
        return json.dumps({"inputs": described, **fields}).encode(), None
    described = [wire(array, name, binary_data_size=array.nbytes) for name, array in inputs]
    text = json.dumps({"inputs": described, **fields}).encode()
    return b"".join([text, *(array.tobytes() for _, array in inputs)]), str(len(text))


@pytest.fixture
def refused() -> Callable[..., str]:
    """`refused(input, tail=b"…")`: why a request with this one input is refused; bytes are taken as the whole body."""

    def make(given: dict[str, Any] | bytes, tail: bytes = b"", header: str | None = None) -> str:
        body = given if isinstance(given, bytes) else json.dumps({"inputs": [given]}).encode()
        if tail:
            header = str(len(body))
        with pytest.raises(InvalidInput) as caught:
            parse_infer(body + tail, header)
        return str(caught.value)

    return make


def fp32(shape: list[Any], data: Any = None, **parameters: Any) -> dict[str, Any]:
    described = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": parameters}
    return described if data is None else {**described, "data": data}


@quick
@given(arrays, st.booleans())
def test_any_array_survives_the_way_in(array: np.ndarray, binary: bool) -> None:
    got = parse_infer(*encode(("images", array), binary=binary)).tensors["images"]
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert got.tobytes() == array.tobytes() or np.array_equal(got, array, equal_nan=True)


@quick
@given(arrays, arrays, st.sampled_from([frozenset(), frozenset({"a"}), frozenset({"a", "b"}), "all"]))
def test_any_array_survives_the_way_out(a: np.ndarray, b: np.ndarray, binary: Any) -> None:
    body, length = format_infer({"id": "7"}, {"a": a, "b": b}, binary)
    assert (length is None) == (binary == frozenset())
    header = json.loads(body[:length])
    assert header["id"] == "7"
    offset = length or 0
    for described, array in zip(header["outputs"], (a, b), strict=True):
        assert described["shape"] == list(array.shape)
        dtype = DTYPES[described["datatype"]]
        if "data" in described:
            got = np.array(described["data"], dtype).reshape(array.shape)
        else:
            size = described["parameters"]["binary_data_size"]
            got = np.frombuffer(body[offset : offset + size], dtype).reshape(array.shape)
            offset += size
        assert np.array_equal(got, array, equal_nan=dtype.kind == "f")
    assert offset == (len(body) if length else 0)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.none() | st.text(max_size=8) | st.integers(-5, 250).map(str))
def test_arbitrary_bytes_raise_nothing_but_invalid_input(body: bytes, header: str | None) -> None:
    with pytest.raises(InvalidInput):
        parse_infer(body, header)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(-2, 3) | st.integers(), max_size=9) | json_values,
    datatype=st.sampled_from([*DTYPES, "BOOL", "BYTES"]),
    data=st.lists(st.integers(-3, 300) | st.floats() | st.integers(), max_size=6) | json_values,
    size=st.none() | st.integers(-2, 20) | json_values,
    tail=st.binary(max_size=16),
)
def test_nearly_good_requests_raise_nothing_but_invalid_input(
    shape: Any, datatype: str, data: Any, size: Any, tail: bytes
) -> None:
    given_input = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
    if size is not None:
        given_input["parameters"] = {"binary_data_size": size}
    text = json.dumps({"inputs": [given_input]}).encode()
    try:
        request = parse_infer(text + tail, str(len(text)))
    except InvalidInput:
        return
    assert request.tensors["x"].ndim == len(shape)
    assert request.tensors["x"].dtype == DTYPES[datatype]


def test_a_request_with_everything() -> None:
    images, other = np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.array([1, 2], np.uint8)
    asked = [{"name": "labels"}, {"name": "logits", "parameters": {"binary_data": True}}]
    fields: dict[str, Any] = {"id": "42", "parameters": {"stream": "cam"}, "outputs": asked, "unknown": [1]}
    got = parse_infer(*encode(("images", images), ("other", other), binary=True, **fields))
    assert (got.id, got.parameters) == ("42", {"stream": "cam"})
    assert (got.tensors["images"] == images).all()
    assert got.tensors["other"].tolist() == [1, 2]
    assert (got.outputs, got.binary_outputs) == (("labels", "logits"), frozenset({"logits"}))


def test_a_request_with_little() -> None:
    got = parse_infer(b'{"inputs": [{"name": "x", "shape": [2], "datatype": "INT64", "data": [5, -6]}]}', None)
    tensor = got.tensors["x"]
    assert got._replace(tensors={}) == InferRequest(None, {}, {}, None, frozenset())
    assert (tensor.dtype, tensor.tolist()) == (np.int64, [5, -6])


def test_json_and_bytes_may_be_mixed() -> None:
    a, b = np.array([1.5], np.float32), np.array([7, 8], np.uint8)
    text = json.dumps({"inputs": [{**wire(a, "a"), "data": [1.5]}, wire(b, "b", binary_data_size=2)]}).encode()
    got = parse_infer(text + b.tobytes(), str(len(text))).tensors
    assert (got["a"].tolist(), got["b"].tolist()) == ([1.5], [7, 8])


def test_data_may_be_flat_or_nested() -> None:
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]]):
        body = json.dumps({"inputs": [fp32([2, 2], data)]}).encode()
        assert parse_infer(body, None).tensors["x"].tolist() == [[1, 2], [3, 4]]


def test_bytes_are_little_endian() -> None:
    text = json.dumps({"inputs": [fp32([1], binary_data_size=4)]}).encode()
    assert parse_infer(text + b"\x00\x00\x80\x3f", str(len(text))).tensors["x"].tolist() == [1.0]


def test_every_output_may_be_asked_for_in_bytes() -> None:
    x = np.zeros(1, np.uint8)
    got = parse_infer(*encode(("x", x), binary=False, parameters={"binary_data_output": True}))
    assert got.binary_outputs == "all"
    got = parse_infer(*encode(("x", x), binary=False, parameters={"binary_data_output": 1}))
    assert got.binary_outputs == frozenset()


@pytest.mark.parametrize("header", ["²", "-1", "+3", "1e2", "1_0", "0x1", " 5", "", "9" * 30, "0" * 5000])
def test_a_header_length_that_is_none(refused: Callable[..., str], header: str) -> None:
    message = refused(fp32([1], [1]), header=header)
    assert message.startswith(f"Inference-Header-Content-Length is {header[:100]!r}; it must be the length of the JSON")


def test_a_header_length_beyond_the_body(refused: Callable[..., str]) -> None:
    assert refused(b"{}", header="3").endswith("at most the 2 bytes of the body")


def test_a_header_length_within_the_json(refused: Callable[..., str]) -> None:
    assert refused(fp32([1], [1]), header="10").startswith("the JSON is not an inference request: Invalid JSON: EOF")


@pytest.mark.parametrize(
    ("size", "tail", "said"),
    [
        (3, b"abcd", "3 bytes, and shape [1] of FP32 takes 4"),
        (4, b"abcdef", "2 bytes after the JSON belong to no input"),
        (8, b"abcd", "binary_data_size is 8, and 4 bytes are left"),
        (-4, b"abcd", "binary_data_size is -4, and 4 bytes"),
        (True, b"a", "binary_data_size is True"),
        ("4", b"abcd", "binary_data_size is '4'"),
        (4.0, b"abcd", "binary_data_size is 4.0"),
        ([4], b"abcd", "binary_data_size is [4]"),
    ],
)
def test_wrong_sizes_of_bytes(refused: Callable[..., str], size: Any, tail: bytes, said: str) -> None:
    assert said in refused(fp32([1], binary_data_size=size), tail)


def test_bytes_that_no_header_announces(refused: Callable[..., str]) -> None:
    assert "binary_data_size is 4, and 0 bytes are left" in refused(fp32([1], binary_data_size=4))
    assert refused(json.dumps({"inputs": [fp32([1], [1])]}).encode() + b"abcd").startswith("the JSON is not")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([2**40, 2**40], "a size outside 1 … 2147483647"),
        ([2**31 - 1] * 8, f"1 numbers, and shape {[2**31 - 1] * 8} takes {(2**31 - 1) ** 8}"),
        ([10**4000] * 8, "a size outside"),
        ([-1], "shape [-1] has a size outside"),
        ([1, -(2**70)], "a size outside"),
        ([0], "a size outside"),
        ([0, 2**62, 2**62], "a size outside"),
        ([2], "1 numbers, and shape [2] takes 2"),
        ([1] * 9, "inputs.0.shape: List should have at most 8 items"),
        (["a"], "inputs.0.shape.0: Input should be a valid integer"),
        ([1.5], "inputs.0.shape.0: Input should be a valid integer"),
        ([None], "inputs.0.shape.0: Input should be a valid integer"),
        (3, "inputs.0.shape: Input should be a valid array, not 3"),
    ],
)
def test_bad_shapes(refused: Callable[..., str], shape: Any, said: str) -> None:
    assert said in refused(fp32(shape, [1]))


@pytest.mark.parametrize("shape", [[2**31 - 1] * 8, [10**4000] * 8, [-1], [0]])
def test_bad_shapes_of_bytes(refused: Callable[..., str], shape: list[int]) -> None:
    assert "input 'x'" in refused(fp32(shape, binary_data_size=4), b"abcd")


@pytest.mark.parametrize(
    ("datatype", "data", "said"),
    [
        ("FP32", [[1, 2], [3]], "data is ragged"),
        ("FP32", [1, [2]], "data is ragged"),
        ("FP32", [True, False], "other things than numbers of FP32"),
        ("FP32", [1, None], "other things than numbers of FP32"),
        ("FP32", [1, "2"], "other things than numbers of FP32"),
        ("FP32", ["NaN", "1"], "other things than numbers of FP32"),
        ("FP32", [{"a": 1}, {}], "other things than numbers of FP32"),
        ("FP32", [10**30, 1], "other things than numbers of FP32"),
        ("FP32", "ab", "needs `data`, a list, or the parameter binary_data_size"),
        ("FP32", {"0": 1}, "needs `data`, a list"),
        ("FP32", 3, "needs `data`, a list"),
        ("FP32", [], "0 numbers, and shape [2] takes 2"),
        ("UINT8", [-1, 5], "values -1 … 5 are outside 0 … 255"),
        ("UINT8", [0, 256], "values 0 … 256 are outside 0 … 255"),
        ("UINT8", [1, 2.5], "other things than numbers of UINT8"),
        ("INT64", [2**63, 2**63], f"values {2**63} … {2**63} are outside -{2**63} … {2**63 - 1}"),
    ],
)
def test_bad_data(refused: Callable[..., str], datatype: str, data: Any, said: str) -> None:
    assert said in refused({**fp32([2], data), "datatype": datatype})


def test_data_nested_too_deep(refused: Callable[..., str]) -> None:
    deep: list[Any] = [1]
    for _ in range(100):
        deep = [deep]
    assert "data is ragged or out of range" in refused(fp32([1], deep))
    assert "recursion limit" in refused(b"[" * 3000)


def test_no_data_at_all(refused: Callable[..., str]) -> None:
    assert "needs `data`" in refused(fp32([1]))


def test_a_number_beyond_the_datatype_becomes_an_infinity() -> None:
    body = b'{"inputs": [{"name": "x", "shape": [3], "datatype": "FP16", "data": [1e30, -1e999, 1]}]}'
    assert parse_infer(body, None).tensors["x"].tolist() == [np.inf, -np.inf, 1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Invalid JSON: EOF"),
        (b"\xff", "Invalid JSON"),
        (b"[]", "Input should be an object, not []"),
        (b"null", "Input should be an object, not None"),
        (b"{}", "inputs: Field required"),
        (b'{"inputs": []}', "inputs: List should have at least 1 item"),
        (b'{"inputs": 5}', "inputs: Input should be a valid array, not 5"),
        (b'{"id": 5, "inputs": []}', "id: Input should be a valid string, not 5"),
        (b'{"parameters": 5, "inputs": []}', "parameters: Input should be an object, not 5"),
        (
            b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BOOL"}]}',
            "inputs.0.datatype: Input should be 'UINT8'",
        ),
        (b'{"inputs": [{"shape": [1], "datatype": "FP32"}]}', "inputs.0.name: Field required"),
    ],
)
def test_json_that_is_no_request(refused: Callable[..., str], body: bytes, said: str) -> None:
    message = refused(body)
    assert message.startswith("the JSON is not an inference request: ")
    assert said in message


def test_two_inputs_of_one_name() -> None:
    x = np.zeros(1, np.uint8)
    for binary in (False, True):
        with pytest.raises(InvalidInput, match="two inputs are named 'x'"):
            parse_infer(*encode(("x", x), ("x", x), binary=binary))


def test_a_response_by_hand() -> None:
    outputs = {"labels": np.array([3, -1]), "scores": np.array([[0.5], [0.25]], np.float32)}
    body, length = format_infer({"model_name": "m"}, outputs, frozenset())
    assert length is None
    assert body == (
        b'{"model_name":"m","outputs":['
        b'{"name":"labels","datatype":"INT64","shape":[2],"data":[3,-1]},'
        b'{"name":"scores","datatype":"FP32","shape":[2,1],"data":[0.5,0.25]}]}'
    )
    body, length = format_infer({"model_name": "m"}, outputs, frozenset({"scores"}))
    assert length is not None
    assert body[length:] == b"\x00\x00\x00\x3f\x00\x00\x80\x3e"
    assert json.loads(body[:length])["outputs"][1] == {
        "name": "scores",
        "datatype": "FP32",
        "shape": [2, 1],
        "parameters": {"binary_data_size": 8},
    }


def test_a_response_holds_arrays_of_any_layout() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    body, length = format_infer({}, {"x": turned}, "all")
    assert body[length:] == np.array([0, 3, 1, 4, 2, 5], np.float32).tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_datatypes_have_their_names(name: str) -> None:
    assert datatype_of(np.zeros(1, DTYPES[name])) == name
