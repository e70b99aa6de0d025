"""Requests in the Open Inference Protocol v2 with its binary tensor extension.

A body is a JSON header, whose length the HTTP header `Inference-Header-Content-Length` tells, and then the raw bytes of
the images. References: KServe, "Open Inference Protocol"; Triton Inference Server, "Binary Tensor Data Extension".
"""

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from loadtests.errors import RequestFailed

Answer = Literal["adapted", "frozen", "both"]


class Encoded(NamedTuple):
    """A request, ready to be posted."""

    headers: dict[str, str]
    body: bytes


class Labels(NamedTuple):
    """An answer: the index of the likeliest label of each image, int64 [B]."""

    answered: NDArray[np.int64]  # by the model that `x-answer` chose; the adapted one with "both"
    frozen: NDArray[np.int64] | None  # by the frozen model, with "both"
    state_version: str


def encode(
    images: NDArray[np.uint8],
    *,
    id: str = "",
    stream: str | None = None,
    answer: Answer = "adapted",
    adapt: bool = True,
    outputs: Sequence[str] = (),
) -> Encoded:
    """Encode a request.

    Args:
        images: uint8 [B, 3, H, W], RGB.
        id: is echoed in the answer; none where empty.
        stream: whose state answers and learns; the server's default where None.
        answer: which model answers.
        adapt: whether the stream may learn from these images.
        outputs: names of the tensors to answer with; the server's choice where empty.
    """
    raw = np.ascontiguousarray(images).tobytes()
    tensor = {
        "name": "images",
        "shape": list(images.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raw)},
    }
    header: dict[str, Any] = {"inputs": [tensor]}
    if id:
        header["id"] = id
    if outputs:
        header["outputs"] = [{"name": name} for name in outputs]
    told = json.dumps(header, separators=(",", ":")).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(told)),
        "x-answer": answer,
        "x-adapt": "on" if adapt else "off",
    }
    if stream is not None:
        headers["x-session-id"] = stream
    return Encoded(headers, told + raw)


class Client:
    """One model of one server.

    Args:
        url: the server's root, such as http://127.0.0.1:8000.
        model: its name.
        timeout_s: of one request.
        transport: what carries requests; tests give a fake.
    """

    def __init__(
        self, url: str, model: str, *, timeout_s: float = 120.0, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.model = model
        self._http = httpx.Client(base_url=url, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._http.close()

    @property
    def infer_path(self) -> str:
        return f"/v2/models/{quote(self.model, safe='')}/infer"

    def ready(self) -> bool:
        """Whether the model is there and ready."""
        return self._call("GET", f"/v2/models/{quote(self.model, safe='')}/ready", allowed=(404, 503)).is_success

    def infer(
        self, images: NDArray[np.uint8], *, stream: str, answer: Answer = "adapted", adapt: bool = True, id: str = ""
    ) -> Labels:
        """Classify one request's images, uint8 [B, 3, H, W].

        Raises:
            RequestFailed: the server did not answer with one label an image.
        """
        wanted = ("labels", "frozen_labels") if answer == "both" else ("labels",)
        request = encode(images, id=id, stream=stream, answer=answer, adapt=adapt, outputs=wanted)
        response = self._call("POST", self.infer_path, headers=request.headers, content=request.body)
        found = _tensors(response)
        if id and response.json().get("id") != id:
            raise RequestFailed(f"{response.url}: the answer is to request {response.json().get('id')!r}, not {id!r}")
        for name in wanted:
            if name not in found or found[name].shape != (len(images),):
                shape = list(found[name].shape) if name in found else "absent"
                raise RequestFailed(f"{response.url}: {name} should be [{len(images)}], and is {shape}")
        return Labels(found["labels"], found.get("frozen_labels"), response.headers.get("x-state-version", ""))

    def stream(self, stream: str) -> dict[str, Any] | None:
        """What the server tells of a stream: version, steps, seen, selected, pending_rows …; None: it has none such."""
        path = f"/v2/models/{quote(self.model, safe='')}/streams/{quote(stream, safe='')}"
        response = self._call("GET", path, allowed=(404,))
        told: dict[str, Any] | None = None if response.status_code == 404 else response.json()
        return told

    def drain(self, stream: str, timeout_s: float = 60.0) -> bool:
        """Wait until the learner has no row of the stream left; whether that came within the time."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            told = self.stream(stream)
            if told is None or not told.get("pending_rows"):
                return True
            time.sleep(0.02)
        return False

    def _call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        allowed: Sequence[int] = (),
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, headers=headers, content=content)
        except httpx.HTTPError as error:
            raise RequestFailed(
                f"{method} {self._http.base_url.join(path)}: {error or type(error).__name__}"
            ) from error
        if not response.is_success and response.status_code not in allowed:
            raise RequestFailed(f"{method} {response.url}: {response.status_code}: {_reason(response)}")
        return response


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _tensors(response: httpx.Response) -> dict[str, NDArray[np.int64]]:
    """The integer tensors that an answer holds as JSON, by name."""
    try:
        outputs = response.json()["outputs"]
        return {
            output["name"]: np.array(output["data"], dtype=np.int64).reshape(output["shape"])
            for output in outputs
            if output["datatype"] == "INT64"
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RequestFailed(f"{response.url}: the answer is not in the Open Inference Protocol: {error!r}") from error
