"""A snapshot comes back bit for bit or is refused with its name and reason: every bit flip, every cut, any bytes."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tta_serve.errors import InvalidInput, Unavailable
from tta_serve.snapshots import FORMAT, Header, Refused, decode, encode, read_header

HEADER = Header(
    "traffic", "a1b2", "camera-7", incarnation=2, version=41, steps=17, at_s=1722.25, extra='{"rounds": [3]}'
)


def state() -> dict[str, Tensor]:
    return {
        "norm.mean": torch.tensor([[1.5, -0.0], [1e-45, 3.0]]),
        "norm.seen": torch.tensor(7),
        "norm.none": torch.zeros(0, 3),
        "norm.half": torch.tensor([0.5], dtype=torch.bfloat16),
        "norm.on": torch.tensor([True, False]),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, object]:
    """Bit for bit, dtypes and shapes included."""
    return {
        name: (each.dtype, each.shape, bytes(each.reshape(-1).view(torch.uint8).tolist()))
        for name, each in tensors.items()
    }


def of_camera_7(content: bytes) -> tuple[dict[str, Tensor], Header]:
    return decode(content, model="traffic", generation="a1b2", stream="camera-7")


CONTENT = encode(state(), HEADER)


def test_a_state_comes_back_bit_for_bit() -> None:
    tensors, header = of_camera_7(CONTENT)
    assert bits(tensors) == bits(state())
    assert header == HEADER == read_header(CONTENT)
    assert header.format == FORMAT == 1


def test_other_programs_can_read_it() -> None:
    assert bits(safetensors.torch.load(CONTENT)) == bits(state())


def test_no_tensors_and_empty_tensors() -> None:
    for tensors in ({}, {"none": torch.zeros(0)}, {"none": torch.zeros(2, 0, dtype=torch.int64)}):
        assert bits(of_camera_7(encode(tensors, HEADER))[0]) == bits(tensors)


def test_rows_of_one_table_and_tensors_with_gradients() -> None:
    table = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    read, _ = of_camera_7(encode({"a": table[0], "b": table[2], "turned": table.T, "again": table[0]}, HEADER))
    assert [read[name].tolist() for name in ("a", "b", "again")] == [[0, 1, 2, 3], [8, 9, 10, 11], [0, 1, 2, 3]]
    assert read["turned"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_what_was_decoded_is_the_callers_own() -> None:
    first, _ = of_camera_7(CONTENT)
    first["norm.mean"].fill_(9.0)
    assert bits(of_camera_7(CONTENT)[0]) == bits(state())


def test_every_single_bit_flip_is_refused() -> None:
    content = encode({"m": torch.tensor([1.0])}, HEADER._replace(extra=""))
    assert len(content) < 400
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(Refused):
            of_camera_7(bytes(flipped))
        with pytest.raises(Refused):
            read_header(bytes(flipped))


def test_every_cut_and_every_added_byte_is_refused() -> None:
    for length in range(len(CONTENT)):
        with pytest.raises(Refused, match="cut short"):
            of_camera_7(CONTENT[:length])
    for more in (b"\0", b" ", CONTENT):
        with pytest.raises(Refused, match="do not match its SHA-256"):
            of_camera_7(CONTENT + more)


@given(st.binary(max_size=600))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(Refused):
        of_camera_7(content)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_header_is_refused(text: bytes, length: int) -> None:
    for size in (length, len(text)):
        with pytest.raises(Refused):
            of_camera_7(size.to_bytes(8, "little") + text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys((*Header._fields, "sha256"), JSON))


@given(st.one_of(JSON, st.fixed_dictionaries({"__metadata__": FIELDS | JSON})))
def test_any_json_for_a_header_is_refused(header: object) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(Refused):
        of_camera_7(len(text).to_bytes(8, "little") + text)


def test_a_header_without_end_is_refused() -> None:
    for text in (b"[" * 100_000, b'{"__metadata__":' + b"1" * 5000 + b"}", b'"\\ud800"', b"\xff"):
        with pytest.raises(Refused, match="no header"):
            of_camera_7(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"model": "street"}, "it is of the model 'traffic', not 'street'"),
        ({"generation": "c3"}, "it is of the generation 'a1b2', not 'c3'"),
        ({"stream": "camera-8"}, "it is of the stream 'camera-7', not 'camera-8'"),
        ({"stream": "\udc80"}, r"it is of the stream 'camera-7', not '\udc80'"),
    ],
)
def test_a_foreign_snapshot_is_refused_by_name(wanted: dict[str, str], said: str) -> None:
    ours = {"model": "traffic", "generation": "a1b2", "stream": "camera-7", **wanted}
    with pytest.raises(Refused) as caught:
        decode(CONTENT, **ours)
    whose = f"the snapshot of the stream {ours['stream']!r}, version 41, is refused: "
    assert str(caught.value) == whose + said


def test_a_file_of_another_program_is_refused() -> None:
    for metadata in (None, {"format": "pt"}, {"format": "1", "sha256": "0" * 64}):
        with pytest.raises(Refused, match="no snapshot"):
            of_camera_7(safetensors.torch.save(state(), metadata=metadata))


def test_another_format_is_refused() -> None:
    with pytest.raises(Refused, match="it has format 2 and this server reads 1"):
        of_camera_7(encode(state(), HEADER._replace(format=2)))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(
    number: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {**state(), "norm.odd": torch.tensor([1.0, number], dtype=dtype)}
    said = "the snapshot of the stream 'camera-7', version 41, is refused: norm.odd: numbers that are not finite"
    with pytest.raises(Refused) as caught:
        encode(bad, HEADER)
    assert str(caught.value) == said
    with monkeypatch.context() as patched:  # as a server without that check would have written it
        patched.setattr("tta_serve.snapshots._check_finite", lambda *_: None)
        content = encode(bad, HEADER)
    with pytest.raises(Refused) as caught:
        of_camera_7(content)
    assert str(caught.value) == said


def test_large_numbers_are_finite() -> None:
    large = {"a": torch.tensor([3.4e38]), "b": torch.tensor([1.7e308], dtype=torch.float64)}
    assert bits(of_camera_7(encode(large, HEADER))[0]) == bits(large)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_names_a_stream_and_a_tensor(stream: str, name: str) -> None:
    header = HEADER._replace(stream=stream, model=name, extra=name)
    tensors = {f"t.{name}": torch.ones(1)}
    read, found = decode(encode(tensors, header), model=name, generation="a1b2", stream=stream)
    assert (bits(read), found) == (bits(tensors), header)


@pytest.mark.parametrize(
    "name", ["0" * 64, '"sha256":"' + "0" * 64, '"sha256":"' + "0" * 64 + '"', "\0", "__metadata__x"]
)
def test_names_that_look_like_the_header(name: str) -> None:
    header = HEADER._replace(stream=name, model=name, generation=name, extra=name)
    for tensor in (name, "m"):
        tensors = {tensor: torch.ones(1)}
        read, found = decode(encode(tensors, header), model=name, generation=name, stream=name)
        assert (bits(read), found) == (bits(tensors), header)


@pytest.mark.parametrize("field", ["stream", "model", "generation", "extra", "tensor"])
def test_a_name_that_is_no_unicode_is_the_callers_mistake(field: str) -> None:
    name = "camera-\udc80"
    tensors = {name: torch.ones(1)} if field == "tensor" else state()
    header = HEADER if field == "tensor" else HEADER._replace(**{field: name})
    with pytest.raises(InvalidInput, match="no Unicode"):
        encode(tensors, header)


def test_a_refusal_survives_pickling() -> None:
    for error in (Refused("camera-7", 41, "it is torn"), Refused(None, None, "it is no snapshot")):
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, Unavailable)
        assert (str(copy), vars(copy)) == (str(error), vars(error))
    assert str(error) == "the snapshot is refused: it is no snapshot"
