"""A server of the script's own: configured in a temporary folder, started on a free port, and stopped again."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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


class OwnServer:
    """`tta-serve up` on a free port; it can be started again, and finds what it has stored.

    Args:
        models: the entries of `models:` in its configuration; paths must be absolute.
        folder: where it runs: whatever it keeps under a relative path lies there.
        settings: of the configuration's other sections, by section.
        environment: variables of the server's own, beside this process's.

    Raises:
        MissingTool: the command is not installed beside this interpreter.
    """

    def __init__(
        self,
        models: Sequence[dict[str, Any]],
        folder: Path,
        settings: Mapping[str, dict[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = (
            Path(sys.executable).parent / "tta-serve"
        )  # not resolved: the link in a virtual environment counts
        if not self._command.is_file():
            raise MissingTool(
                f"{self._command} does not exist: pip install the repository (pip install -e .), or give --url"
            )
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None  # leads the session of all its processes
        self._environment = {**(environment or {}), "PYTHONPATH": _python_path()}
        self._models = [str(model["name"]) for model in models]
        self._config = folder / "config.yaml"
        self._log = folder / "server.log"
        content = {**(settings or {}), "http": {"host": "127.0.0.1", "port": port}, "models": list(models)}
        self._config.write_text(yaml.safe_dump(content))

    def start(self, max_s: float = START_MAX_S) -> None:
        """Start it, and wait until it is ready.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        with self._log.open("ab") as written:
            self.process = subprocess.Popen(
                [str(self._command), "up", str(self._config)],
                cwd=self.folder,
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this script alone, which then stops the server
            )
        _wait_until_ready(self.process, self.url, self._models, self._log, max_s)

    def stop(self) -> None:
        """Stop it as a user does. Nothing happens where it does not run."""
        if self.process is not None:
            _stop(self.process)


@contextmanager
def own_server(
    models: Sequence[dict[str, Any]],
    *,
    settings: Mapping[str, dict[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
    start_max_s: float = START_MAX_S,
) -> Iterator[str]:
    """Run `tta-serve up` for the length of the block.

    Args:
        models: see `OwnServer`, and so are `settings` and `environment`.
        settings: of the configuration's other sections, by section.
        environment: variables of the server's own, beside this process's.
        start_max_s: it must be ready by then.

    Yields:
        Its URL.

    Raises:
        MissingTool: the command is not installed beside this interpreter.
        ServerFailed: it ended, or was not ready in time.
    """
    # the server runs inside the folder: whatever it keeps under a relative path goes away with it
    with tempfile.TemporaryDirectory(prefix="tta-loadtest-", ignore_cleanup_errors=True) as folder:
        server = OwnServer(models, Path(folder), settings, environment)
        try:
            server.start(start_max_s)
            yield server.url
        finally:
            server.stop()


def free_port() -> int:
    """A port that nothing listens on now, below those of outgoing connections, one of which could have it next."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise ServerFailed("no port from 20000 to 31999 is free")


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
