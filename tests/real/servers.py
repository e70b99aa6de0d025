"""Starting the command and looking at what runs."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tta_serve.runfolder import RunFolder

COMMAND = Path(sys.executable).with_name("tta-serve")
START_S = 200.0  # a busy machine with few cores
STOP_S = 60.0


class Live(NamedTuple):
    """A server that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def model(self) -> str:
        return f"{self.url}/v2/models/digits"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.port)

    def processes(self) -> dict[int, str]:
        """The command lines of all processes in the server's session, by process id."""
        return session(self.pid)


def session(leader: int) -> dict[int, str]:
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        with suppress(OSError):  # it has just ended
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for something that comes about, and give what it came to."""
    end_s = time.monotonic() + seconds
    while not (come := true()):
        assert time.monotonic() < end_s, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return come


def tta_serve(*words: str | Path, folder: Path, seconds: float = START_S) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [COMMAND, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
    )
