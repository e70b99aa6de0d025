"""Faults, done for real to a server of the script's own. Those of the store last for a block, and are then undone."""

import resource
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from loadtests import chaos_processes
from loadtests.chaos_plan import Kind
from loadtests.errors import LoadTestError
from loadtests.server import OwnServer

WRITABLE_BYTES = 4096  # of each file, while the disk is full: a header, and no page of the database's log after it
LOCK_MAX_S = 5.0  # for writers to let the database go for once


def kill_replica(server: OwnServer, model: str, chance: float) -> float:
    """Kill one replica of a model; which one, `chance` in 0 … 1 says. When (monotonic).

    Raises:
        LoadTestError: there is none.
    """
    found = chaos_processes.replicas(processes(server), model)
    if not found:
        raise LoadTestError(f"{model} has no replica that could be killed")
    return chaos_processes.kill([found[min(int(chance * len(found)), len(found) - 1)]])


def kill_haproxy(server: OwnServer) -> float:
    """Kill HAProxy, and leave alone what started it. When (monotonic).

    Raises:
        LoadTestError: it does not run.
    """
    found = chaos_processes.proxies(processes(server))
    if not found:
        raise LoadTestError("HAProxy does not run: there is nothing to kill")
    return chaos_processes.kill(found)


def kill_node(server: OwnServer) -> float:
    """Kill every process of the server. When (monotonic)."""
    assert server.process is not None
    at_s = chaos_processes.kill_session(server.process.pid)
    server.process.wait()
    return at_s


def processes(server: OwnServer) -> dict[int, str]:
    """All of the server's, by process id."""
    assert server.process is not None
    return chaos_processes.session(server.process.pid)


@contextmanager
def full_disk(pids: Sequence[int]) -> Iterator[None]:
    """No file of these processes can grow past its first bytes: what is written fails, in the middle too.

    A limit stands in for the disk (`RLIMIT_FSIZE`, setrlimit(2)): it can be set from outside without being root, and
    takes nobody else's room. The write itself fails, with EFBIG where a full disk says ENOSPC.
    """
    before = {}
    for pid in pids:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        before[pid] = (soft, hard)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (WRITABLE_BYTES, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_folder(folder: Path) -> Iterator[None]:
    """The store's folder is away, and cannot be written.

    Away, and not read-only: permissions bind neither root nor who has opened the files before.
    """
    away = folder.with_name(f"{folder.name}.away")
    folder.rename(away)
    try:
        yield
    finally:
        away.rename(folder)


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another process has the database to itself.

    Raises:
        LoadTestError: it does not get it.
    """
    connection = sqlite3.connect(database, isolation_level=None, timeout=LOCK_MAX_S)
    try:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise LoadTestError(f"{database} cannot be locked: {error}") from error
        yield
    finally:
        connection.close()  # which gives back the lock


def store_faults(
    server: OwnServer, model: str, database: Path
) -> dict[Kind, Callable[[], AbstractContextManager[None]]]:
    """What makes each fault of the store."""
    return {
        "full_disk": lambda: full_disk(chaos_processes.replicas(processes(server), model)),
        "no_folder": partial(no_folder, database.parent),
        "locked": partial(locked, database),
    }


def last(fault: AbstractContextManager[None], seconds: float) -> float:
    """Let a fault of the store last, and undo it; when it was undone (monotonic)."""
    with fault:
        time.sleep(seconds)
    return time.monotonic()
