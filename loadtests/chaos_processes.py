"""The processes of a server: all those of its session, as Linux lists them."""

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from loadtests.errors import LoadTestError

PROC = Path("/proc")
END_MAX_S = 30.0  # for processes that were killed


def session(leader: int) -> dict[int, str]:
    """Command lines of a session's processes, by process id; without those that have ended."""
    found = {}
    for path in PROC.iterdir():
        if not path.name.isdigit():
            continue
        with suppress(OSError):  # it has just ended
            state, its_session = state_of((path / "stat").read_text())
            if its_session == leader and state != "Z":
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(path.name)] = line.strip()
    return found


def state_of(stat: str) -> tuple[str, int]:
    """A process's state and session, from its `stat` (proc(5)). The name before them may hold anything.

    >>> state_of("12 (a) b (c) S 1 12 7 0 -1")
    ('S', 7)
    """
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[3])


def replicas(processes: dict[int, str], model: str) -> list[int]:
    """Those of a model's replicas, by process id."""
    return sorted(pid for pid, line in processes.items() if line.startswith(f"ray::ServeReplica:model-{model}:"))


def proxies(processes: dict[int, str]) -> list[int]:
    """Those of HAProxy itself; one that was replaced may still be there."""
    return sorted(pid for pid, line in processes.items() if Path(line.partition(" ")[0]).name == "haproxy")


def kill(pids: Iterable[int]) -> float:
    """End processes as a power cut does; when the first was to end (monotonic)."""
    at_s = time.monotonic()
    for pid in pids:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)
    return at_s


def kill_session(leader: int) -> float:
    """End all processes of a session, those that it begins meanwhile too; when the first was to end (monotonic).

    Raises:
        LoadTestError: some are still there.
    """
    at_s = kill(session(leader))
    until_s = at_s + END_MAX_S
    while left := session(leader):
        if time.monotonic() > until_s:
            raise LoadTestError(
                f"processes {sorted(left)} of the server are still there {END_MAX_S:.0f} s after kill -9"
            )
        kill(left)
        time.sleep(0.02)
    return at_s
