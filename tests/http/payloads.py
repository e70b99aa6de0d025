"""Bodies of requests, made by hand as the protocols describe them."""

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIRE = {"uint8": "UINT8", "float16": "FP16", "float32": "FP32", "float64": "FP64", "int64": "INT64"}


def tensor(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """From pictures [n, H, W, 3] to the tensor [n, 3, H, W]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def as_json(x: NDArray[Any], **more: Any) -> dict[str, Any]:
    """An inference request as keyword arguments for httpx, all of it JSON."""
    wire = {"name": "images", "shape": list(x.shape), "datatype": WIRE[x.dtype.name], "data": x.ravel().tolist()}
    return {"content": json.dumps({"inputs": [wire], **more}).encode()}


def as_binary(x: NDArray[Any], headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """An inference request as keyword arguments for httpx, the tensor as bytes behind the JSON.

    `more` goes to the top of the JSON; `wire` among it changes the description of the tensor.
    """
    content = x.tobytes()
    wire = {
        "name": "images",
        "shape": list(x.shape),
        "datatype": WIRE[x.dtype.name],
        "parameters": {"binary_data_size": len(content)},
        **more.pop("wire", {}),
    }
    head = json.dumps({"inputs": [wire], **more}).encode()
    return {
        "content": head + content,
        "headers": {"Inference-Header-Content-Length": str(len(head)), **(headers or {})},
    }


def picture(image: NDArray[np.uint8], form: str = "PNG") -> bytes:
    """A picture [H, W, 3] as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header names a size, and which holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def odd_exif(image: NDArray[np.uint8]) -> bytes:
    """A JPEG that says it is to be turned by a quarter, and whose unit of resolution is a byte and not a number."""
    content = picture(image, "JPEG")
    turned = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    unit = b"\x01\x28\x00\x07\x00\x00\x00\x01\x00\x00\x00\x01"
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + turned + unit + b"\x00\x00\x00\x00"
    return content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:]
