"""What answers say after commands: which life of a stream each is of, and which lives were over when it was asked.

A *floor* of a stream is the first incarnation that may still be seen: a command that all replicas have acknowledged
ends the lives below. An answer is stale when its life was over before its request was sent; a request that was under
way when the command's answer came may be answered either way.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from loadtests.chaos_traffic import Told


class Stale(NamedTuple):
    """What came of a life that was over."""

    stream: str
    incarnation: int
    floor: int
    where: str  # an answer of which replica, or a snapshot of which version


class Floors:
    """Of each stream the first incarnation that may still be seen; raised by one thread, read by many.

    >>> floors = Floors()
    >>> floors.raise_to("a", 3)
    >>> floors.raise_to("a", 2)
    >>> floors.of("a"), floors.of("b")
    (3, 1)
    """

    def __init__(self) -> None:
        self._floors: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, stream: str) -> int:
        return self._floors.get(stream, 1)

    def raise_to(self, stream: str, incarnation: int) -> None:
        with self._lock:
            self._floors[stream] = max(self.of(stream), incarnation)

    def all(self) -> Mapping[str, int]:
        with self._lock:
            return self._floors.copy()


class Answers:
    """Judges answers, from any thread.

    Args:
        floors: of the streams.
    """

    def __init__(self, floors: Floors) -> None:
        self.stale: list[Stale] = []
        self.checked = 0  # answers to streams of which a life was over when they were asked
        self.failed: list[str] = []
        self.frozen = 0  # answers of the frozen model, which are of no life
        self.replicas: set[str] = set()  # that were named
        self._floors = floors
        self._newest: dict[str, int] = {}
        self._lock = threading.Lock()

    def ask(self, stream: str, post: Callable[[], Told]) -> Told:
        """Ask, and judge the answer by what was over before."""
        floor = self._floors.of(stream)
        told = post()
        with self._lock:
            self.checked += floor > 1
            self.frozen += told.incarnation == 0
            self.replicas |= {told.replica} - {""}
            self._newest[stream] = max(self._newest.get(stream, 0), told.incarnation)
            if 0 < told.incarnation < floor:
                self.stale.append(Stale(stream, told.incarnation, floor, f"an answer of {told.replica or 'a replica'}"))
        return told

    def failed_with(self, error: str) -> None:
        with self._lock:
            self.failed.append(error)

    def newest(self, stream: str) -> int:
        """The newest life that any answer told of; 0 before the first."""
        return self._newest.get(stream, 0)


class Clients:
    """Threads that keep calling, for the length of the block.

    Args:
        call: one request; given the client's number and how often it has asked before.
        count: of clients.
    """

    def __init__(self, call: Callable[[int, int], object], count: int) -> None:
        self._call = call
        self._stopping = threading.Event()
        self._clients = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def __enter__(self) -> "Clients":
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for client in self._clients:
            client.join()

    def _run(self, number: int) -> None:
        asked = 0
        while not self._stopping.is_set():
            self._call(number, asked)
            asked += 1


def wait_until(is_so: Callable[[], bool], max_s: float, poll_s: float = 0.02) -> bool:
    """Whether something came to be so in time."""
    until_s = time.monotonic() + max_s
    while not is_so():
        if time.monotonic() > until_s:
            return False
        time.sleep(poll_s)
    return True
