"""The CIFAR files that the load tests read from `--data`, and the server's configuration for ResNet-20 on them.

`clean.npz` (`images` uint8 [N, 32, 32, 3] RGB, `labels` [N]), `<corruption>.npz` (`images`: the same N, so the same
labels), `source.npz` (training images), `orders.npz` (`corruptions`: their order), `resnet20.safetensors`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.errors import MissingFile

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.485, 0.456, 0.406)  # what the weights were trained with
STD = (0.229, 0.224, 0.225)
FISHER_IMAGES = 2000  # of source.npz, from the first
FISHER_BATCH = 200


def images(data: Path, name: str) -> NDArray[np.uint8]:
    """Images of one file, uint8 [N, 3, 32, 32] RGB. A view: the memory stays channels-last."""
    with np.load(existing(data, f"{name}.npz")) as arrays:
        stored: NDArray[np.uint8] = arrays["images"]
    return stored.transpose(0, 3, 1, 2)


def labels(data: Path) -> NDArray[np.int64]:
    """Labels of the clean images and of every corruption, int64 [N]."""
    with np.load(existing(data, "clean.npz")) as arrays:
        stored: NDArray[np.int64] = arrays["labels"].astype(np.int64)
    return stored


def corruptions(data: Path) -> tuple[str, ...]:
    """Names of the corruptions in the order of the published protocol."""
    with np.load(existing(data, "orders.npz")) as arrays:
        return tuple(str(name) for name in arrays["corruptions"])


def existing(data: Path, file: str) -> Path:
    """The file's absolute path.

    Raises:
        MissingFile: there is none.
    """
    path = data.resolve() / file
    if not path.is_file():
        raise MissingFile(f"{path} does not exist; --data names the folder with the CIFAR files")
    return path


def served_model(data: Path, name: str, adapter: str | dict[str, Any], mode: str) -> dict[str, Any]:
    """One entry of `models:` in a server's configuration: ResNet-20 with this adapter.

    Args:
        data: folder with the CIFAR files.
        name: under which it is served.
        adapter: "source" for the frozen model, or `{"eata": {…}}`.
        mode: "sync" or "async".
    """
    model: dict[str, Any] = {
        "name": name,
        "source": {"python": "loadtests.resnet20:build"},
        "weights": str(existing(data, "resnet20.safetensors")),
        "input": {"size": [32, 32], "mean": list(MEAN), "std": list(STD)},
        "labels": list(LABELS),
        "adapter": adapter,
    }
    if adapter != "source":
        model |= {"prior": str(existing(data, "source.npz")), "adaptation": {"mode": mode}}
    return model
