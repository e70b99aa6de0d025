"""A server of the script's own: configured in a temporary folder, started on a free port, and stopped again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtests.errors import MissingTool, ServerFailed
from loadtests.report import ROOT

START_MAX_S = 300.0  # a server on a busy machine was seen to need 80
STOP_MAX_S = 60.0
LOG_LINES = 15  # of the server's log, in an error


@contextmanager
def own_server(models: Sequence[dict[str, Any]], *, start_max_s: float = START_MAX_S) -> Iterator[str]:
    """Run `tta-serve up` for the length of the block.

    Args:
        models: the entries of `models:` in its configuration; paths must be absolute.
        start_max_s: it must be ready by then.

    Yields:
        Its URL.

    Raises:
        MissingTool: the command is not installed beside this interpreter.
        ServerFailed: it ended, or was not ready in time.
    """
    command = Path(sys.executable).parent / "tta-serve"  # not resolved: the link in a virtual environment counts
    if not command.is_file():
        raise MissingTool(f"{command} does not exist: pip install the repository (pip install -e .), or give --url")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # the server runs inside the folder: whatever it keeps under a relative path goes away with it
    with tempfile.TemporaryDirectory(prefix="tta-loadtest-", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump({"http": {"host": "127.0.0.1", "port": port}, "models": list(models)}))
        log = Path(folder) / "server.log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                [str(command), "up", str(config)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this script alone, which then stops the server
            )
        try:
            _wait_until_ready(process, url, [str(model["name"]) for model in models], log, start_max_s)
            yield url
        finally:
            _stop(process)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _python_path() -> str:
    """So that the server finds `loadtests.resnet20`."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, models: Sequence[str], log: Path, max_s: float
) -> None:
    paths = ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models)]
    end = time.monotonic() + max_s
    with httpx.Client(base_url=url, timeout=5) as http:
        while not all(_is_ready(http, path) for path in paths):
            if process.poll() is not None:
                raise ServerFailed(f"the server ended with exit code {process.returncode}:\n{_end_of(log)}")
            if time.monotonic() > end:
                raise ServerFailed(f"the server was not ready after {max_s:.0f} s:\n{_end_of(log)}")
            time.sleep(0.2)


def _is_ready(http: httpx.Client, path: str) -> bool:
    try:
        return http.get(path).is_success
    except httpx.HTTPError:
        return False  # nothing listens yet


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_MAX_S)
    except subprocess.TimeoutExpired:
        print(f"warning: the server (process {process.pid}) did not stop within {STOP_MAX_S:.0f} s", file=sys.stderr)
        process.kill()
        process.wait()
