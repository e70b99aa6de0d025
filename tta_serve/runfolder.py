"""One folder for each running server: who it is, how far it has come, and its logs.

`up`, `status` and `down` meet here. A server holds a lock on its folder for as long as it lives, so nothing depends on
process ids that may have been used again.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from tta_serve.errors import ConfigError, Unavailable

# Ray's and HAProxy's sockets lie below; a socket's path may have 97 characters, of which Serve takes 57: short names
ROOT = Path("/tmp") / f"tta-{os.getuid()}"  # noqa: S108  # made with mode 0700 and checked to be ours

Phase = Literal["starting", "ready", "updating", "failed"]


class ServerStatus(NamedTuple):
    """What a server says of itself."""

    port: int
    host: str
    pid: int
    config: str
    models: tuple[str, ...]
    phase: Phase
    message: str = ""
    update: str = ""  # the last that was asked for and is done, or failed for the reason in `message`

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class Update(NamedTuple):
    """A configuration that a running server shall go over to."""

    id: str
    config: str  # its path
    folder: str  # that paths in it are relative to


class RunFolder:
    """The folder of the server on one port.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.path = ROOT / str(port)
        self._lock = FileLock(self.path / "lock")

    @property
    def log(self) -> Path:
        return self.path / "server.log"

    def make(self) -> None:
        """Make the folder, readable for this user alone.

        Raises:
            ConfigError: somebody else's folder stands there.
        """
        with contextlib.suppress(FileExistsError):
            ROOT.mkdir(mode=0o700)
        if not _is_ours():
            raise ConfigError(f"{ROOT} is not a folder of this user's alone; remove it")
        self.path.mkdir(mode=0o700, exist_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the server of this port.

        Raises:
            ConfigError: another one is.
        """
        self.make()
        try:
            self._lock.acquire(timeout=1)  # `alive` holds it for an instant
        except Timeout:
            raise ConfigError(
                f"a tta-serve already runs on port {self.port}; `tta-serve down --port {self.port}` stops it"
            ) from None
        try:
            (self.path / "update.json").unlink(missing_ok=True)  # that a server which is gone was asked for
            yield
        finally:
            self._lock.release()

    def write(self, status: ServerStatus) -> None:
        """Say how far the server has come."""
        self._replace("status.json", json.dumps(status._asdict()))

    def read(self) -> ServerStatus | None:
        """What the server last said; None where none has run."""
        try:
            content = json.loads((self.path / "status.json").read_text())
            return ServerStatus(**{**content, "models": tuple(content["models"])})
        except (OSError, ValueError, TypeError, KeyError):  # none, or one of another version
            return None

    def ask_for(self, config: Path) -> Update:
        """Ask the server to go over to another configuration."""
        update = Update(secrets.token_hex(8), str(config.absolute()), str(Path.cwd()))
        self._replace("update.json", json.dumps(update._asdict()))
        return update

    def take_update(self, status: ServerStatus) -> Update | None:
        """What the server was asked to go over to and has not yet.

        Args:
            status: what it said last.
        """
        try:
            update = Update(**json.loads((self.path / "update.json").read_text()))
        except (OSError, ValueError, TypeError):  # nothing was asked
            return None
        return None if update.id == status.update else update

    def _replace(self, name: str, text: str) -> None:
        """Readers see the old or the new text, never half of one."""
        part = self.path / f"{name}.part"
        part.write_text(text)
        part.replace(self.path / name)

    def alive(self) -> bool:
        """Whether a server holds this folder."""
        if not _is_ours():
            return False
        try:
            # not with a FileLock, which makes file and folder anew: the server may be removing them just now
            with (self.path / "lock").open() as probe:
                fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _is_ours() -> bool:
    """Whether `ROOT` is a folder that nobody else can have written to: what it says decides whom `down` ends."""
    try:
        found = ROOT.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def running() -> list[ServerStatus]:
    """All servers of this user that are alive, by port."""
    ports = sorted(int(path.name) for path in ROOT.glob("*") if path.name.isdigit())
    found = [folder.read() for port in ports if (folder := RunFolder(port)).alive()]
    return [status for status in found if status is not None]


def stop(status: ServerStatus, wait_s: float = 60.0) -> None:
    """Ask a server to stop and wait until it has.

    Raises:
        Unavailable: it still runs after `wait_s`.
    """
    folder = RunFolder(status.port)
    with contextlib.suppress(ProcessLookupError):
        os.kill(status.pid, signal.SIGTERM)
    until_s = time.monotonic() + wait_s
    while folder.alive():
        if time.monotonic() > until_s:
            raise Unavailable(
                f"the server on port {status.port} (process {status.pid}) has not stopped after {wait_s:g} s"
            )
        time.sleep(0.1)
