"""One image to a detector and what it finds, in the Open Inference Protocol with binary tensors both ways.

Binary, because then an answer is the detector's own bits. `docs/http.md` describes routes and parameters.
"""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from loadtests.client import Client, Encoded
from loadtests.errors import RequestFailed

JSON_BYTES = 256  # of a request, filled up with blanks
DATATYPES = {"FP32": "<f4", "INT64": "<i8"}  # the protocol's name → numpy's


class Detected(NamedTuple):
    """What was found in one image, the surest first, and how it was looked at."""

    boxes: NDArray[np.float32]  # [N, 4]: x1, y1, x2, y2 in pixels of the image as it was sent
    labels: NDArray[np.int64]  # [N]
    scores: NDArray[np.float32]  # [N]
    modality: str  # whose translator was used; `rgb`: none
    translator_version: int  # of its weights; 0: as they came from the file, or no translator

    def same_bits(self, other: "Detected") -> bool:
        """Whether boxes, labels and scores are those of the other one, bit for bit."""
        pairs: tuple[tuple[NDArray[Any], NDArray[Any]], ...] = (
            (self.boxes, other.boxes),
            (self.labels, other.labels),
            (self.scores, other.scores),
        )
        return all(one.shape == another.shape and one.tobytes() == another.tobytes() for one, another in pairs)


class Detector(Client):
    """One detector of one server."""

    def detect(
        self, image: NDArray[np.uint8], *, stream: str, modality: str | None = None, adapt: bool = False
    ) -> Detected:
        """Look at one image.

        Args:
            image: uint8 [C, H, W], C 3 (RGB) or 1.
            stream: whose state answers.
            modality: of the image; the server recognises it where None.
            adapt: whether it may be learned from, or remembered.

        Raises:
            RequestFailed: the server did not answer as a detector does.
        """
        request = encode(image, stream=stream, modality=modality, adapt=adapt)
        return decode(self._call("POST", self.infer_path, headers=request.headers, content=request.body))

    def teach(
        self,
        image: NDArray[np.uint8],
        boxes: Sequence[Sequence[float]],
        labels: Sequence[int],
        *,
        stream: str,
        modality: str,
    ) -> str:
        """Say what is in an image, and have the stream and the modality's translator learn from it.

        Args:
            image: uint8 [C, H, W], C 3 (RGB) or 1.
            boxes: x1, y1, x2, y2 of each.
            labels: the class index of each.
            stream: that learns.
            modality: of the image.

        Returns:
            What came of it: `applied`, `refused`, `frozen` …

        Raises:
            RequestFailed: the server refused it, or did not say.
        """
        item = {"image": base64.b64encode(png(image)).decode(), "boxes": boxes, "labels": labels}
        response = self._call(
            "POST",
            f"/v2/models/{quote(self.model, safe='')}/feedback",
            headers={"Content-Type": "application/json"},
            content=json.dumps({"stream": stream, "modality": modality, "items": [item]}).encode(),
        )
        try:
            return str(response.json()["results"][0]["result"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestFailed(f"{response.url}: the answer says no result: {error!r}") from error


def encode(image: NDArray[np.uint8], *, stream: str, modality: str | None = None, adapt: bool = True) -> Encoded:
    """Encode a request with one image.

    The modality is named by a parameter, and blanks make all JSON equally long. So all requests of a stream have the
    same headers, whatever they hold, and wrk can send them in turn.

    Args:
        image: uint8 [C, H, W], C 3 (RGB) or 1.
        stream: whose state answers.
        modality: of the image; none is named where None.
        adapt: whether the image may be remembered, so that feedback can name it.
    """
    raw = np.ascontiguousarray(image).tobytes()
    tensor = {
        "name": "images",
        "shape": [1, *image.shape],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": len(raw)},
    }
    named = {} if modality is None else {"modality": modality}
    header = {"inputs": [tensor], "parameters": {"binary_data_output": True, **named}}
    told = json.dumps(header, separators=(",", ":")).encode().ljust(JSON_BYTES)
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(told)),
        "x-adapt": "on" if adapt else "off",
        "x-session-id": stream,
    }
    return Encoded(headers, told + raw)


def decode(response: httpx.Response) -> Detected:
    """What the answer to one image says.

    Raises:
        RequestFailed: it is no binary answer about one image.
    """
    try:
        length = int(response.headers["inference-header-content-length"])
        header = json.loads(response.content[:length])
        outputs = _tensors(header["outputs"], response.content[length:])
        parameters = header["parameters"]
        count = int(outputs["num_detections"].item())
        found = Detected(
            outputs["boxes"].reshape(count, 4),
            outputs["labels"].reshape(count),
            outputs["scores"].reshape(count),
            str(parameters["modalities"][0]),
            int(parameters["translator_versions"][0]),
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestFailed(f"{response.url}: the answer is not a detector's: {error!r}") from error
    return found


def _tensors(outputs: Sequence[dict[str, Any]], raw: bytes) -> dict[str, NDArray[Any]]:
    """The tensors by name, from their bytes one after the other."""
    found, offset = {}, 0
    for output in outputs:
        end = offset + int(output["parameters"]["binary_data_size"])
        array = np.frombuffer(raw[offset:end], DATATYPES[output["datatype"]])
        found[str(output["name"])] = array.reshape(output["shape"])
        offset = end
    return found


def png(image: NDArray[np.uint8]) -> bytes:
    """The image [C, H, W] as a file, C 3 (RGB) or 1 (grey)."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
