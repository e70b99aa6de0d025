"""States that are not in the table: written out to make room, and kept to roll back to.

A *snapshot* is a state, encoded, under its stream and version. `Folder` keeps them as safetensors files, `Memory` for
tests and for adapters whose state is nothing.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple, Protocol

import safetensors.torch
from torch import Tensor

from tta_serve.errors import NotFound


class Snapshots(Protocol):
    """Where snapshots are."""

    def save(self, stream: str, version: int, tensors: dict[str, Tensor]) -> None:
        """Keep a state; a version that is there already is replaced.

        Raises:
            OSError: it cannot be kept; what was there before is there still.
        """
        ...

    def load(self, stream: str, version: int) -> dict[str, Tensor]:
        """The state as it was saved.

        Raises:
            NotFound: there is no such version.
        """
        ...

    def versions(self, stream: str) -> list[int]:
        """What is kept of a stream, ascending."""
        ...

    def drop(self, stream: str, version: int) -> None:
        """Let go of one version; nothing happens where there is none."""
        ...

    def delete(self, stream: str) -> None:
        """Let go of everything about a stream."""
        ...


class Memory:
    """Snapshots in this process's memory."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, dict[str, Tensor]]] = {}

    def save(self, stream: str, version: int, tensors: dict[str, Tensor]) -> None:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self._kept.setdefault(stream, {})[version] = copies

    def load(self, stream: str, version: int) -> dict[str, Tensor]:
        try:
            return self._kept[stream][version]
        except KeyError:
            raise _missing(stream, version) from None

    def versions(self, stream: str) -> list[int]:
        return sorted(self._kept.get(stream, ()))

    def drop(self, stream: str, version: int) -> None:
        self._kept.get(stream, {}).pop(version, None)

    def delete(self, stream: str) -> None:
        self._kept.pop(stream, None)


class _Path(NamedTuple):
    folder: Path
    file: Path


class Folder:
    """Snapshots as files, one folder a stream.

    Args:
        path: an existing folder that is this object's alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, stream: str, version: int, tensors: dict[str, Tensor]) -> None:
        folder, file = self._where(stream, version)
        part = file.with_suffix(".part")
        header = {"stream": stream, "version": str(version)}
        encoded = safetensors.torch.save(tensors, metadata=header)
        folder.mkdir(exist_ok=True)
        try:
            part.write_bytes(encoded)  # `save_file` would hide from the caller that the disk is full: not an OSError
            part.replace(file)  # readers see all of it or nothing
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def load(self, stream: str, version: int) -> dict[str, Tensor]:
        _, file = self._where(stream, version)
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load_file(file)
        except FileNotFoundError:
            raise _missing(stream, version) from None
        return tensors

    def versions(self, stream: str) -> list[int]:
        folder, _ = self._where(stream, 0)
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(file.stem) for file in folder.glob("*.safetensors"))
        return []

    def drop(self, stream: str, version: int) -> None:
        self._where(stream, version).file.unlink(missing_ok=True)

    def delete(self, stream: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._where(stream, 0).folder)

    def _where(self, stream: str, version: int) -> _Path:
        # a digest: names may differ in nothing but case, and some file systems do not see that
        folder = self._path / hashlib.sha256(os.fsencode(stream)).hexdigest()[:32]
        return _Path(folder, folder / f"{version}.safetensors")


def _missing(stream: str, version: int) -> NotFound:
    return NotFound(f"there is no version {version} of the stream {stream!r}; its history lists those that are kept")
