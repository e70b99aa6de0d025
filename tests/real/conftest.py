"""Real servers, started by the command as a user does: Ray Serve, HAProxy and all."""

import contextlib
import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from servers import STOP_S, Live, tta_serve

from tta_serve.builtin import digits
from tta_serve.runfolder import RunFolder


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        # below those of outgoing connections: one of them could have it before the server starts
        for port in random.sample(range(20_000, 32_000), 100):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
        raise AssertionError("no port is free")

    return find


@pytest.fixture(scope="session")
def write_config(tmp_path_factory, free_port) -> Iterator[Callable[..., tuple[Path, int]]]:
    """Writes a configuration of one model, `digits` unless told otherwise; gives its path and its port."""
    ports = set()

    def write(port: int | None = None, **model: Any) -> tuple[Path, int]:
        port = port or free_port()
        ports.add(port)
        content = {"http": {"port": port}, "models": [{"name": "digits", "source": {"builtin": "digits"}, **model}]}
        path = tmp_path_factory.mktemp("config") / "config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path, port

    yield write
    for port in ports:
        if not RunFolder(port).alive():  # a start that failed leaves its logs
            RunFolder(port).remove()


@pytest.fixture(scope="session")
def detached(write_config) -> Callable[..., Any]:
    """`with detached(**settings of the model) as live`: from `up --detach` to `down`."""

    @contextmanager
    def run(**model: Any) -> Iterator[Live]:
        path, port = write_config(**model)
        said = tta_serve("up", path, "--detach", folder=path.parent)
        assert said.returncode == 0, said.stderr + said.stdout
        status = RunFolder(port).read()
        assert status
        live = Live(port, status.pid)
        try:
            assert f"ready {live.url}" in said.stdout
            yield live
        finally:
            if live.folder.alive():
                tta_serve("down", "--port", str(port), folder=path.parent, seconds=STOP_S)

    return run


@pytest.fixture(scope="session")
def live(detached) -> Iterator[Live]:
    """One server for all tests that leave it as they found it."""
    with detached(adaptation={"budget": 1}) as running:
        yield running


@pytest.fixture(scope="session")
def live_sync(detached) -> Iterator[Live]:
    """A second server beside the first."""
    with detached(adaptation={"mode": "sync"}) as running:
        yield running


@pytest.fixture(scope="session")
def held_out() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images as uint8 [n, 32, 32, 3] that the frozen model is sure of, and their labels."""
    split = digits.split()
    with torch.inference_mode():
        sure, labels = digits.load()(digits.prepare(split.held_out_images)).softmax(dim=1).max(dim=1)
    chosen = (sure > 0.95).numpy() & (labels.numpy() == split.held_out_labels)
    return split.held_out_images[chosen], split.held_out_labels[chosen]


@pytest.fixture(scope="session")
def infer() -> Callable[..., dict[str, Any]]:
    """Makes keyword arguments for httpx: an inference over pictures [n, 32, 32, 3], bytes behind the JSON."""

    def make(images: NDArray[np.uint8], stream: str, output: str = "labels", **headers: str) -> dict[str, Any]:
        x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        described = {
            "name": "images",
            "shape": list(x.shape),
            "datatype": "UINT8",
            "parameters": {"binary_data_size": x.nbytes},
        }
        head = json.dumps({"inputs": [described], "outputs": [{"name": output}]}).encode()
        named = {"inference-header-content-length": str(len(head)), "x-session-id": stream}
        return {"content": head + x.tobytes(), "headers": {**named, **headers}}

    return make


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as connection:
        yield connection
