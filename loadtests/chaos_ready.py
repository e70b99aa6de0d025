"""What a server says of itself while faults befall it: `ready`, asked again and again."""

import threading
import time
from types import TracebackType
from typing import NamedTuple, Self

import httpx

EVERY_S = 0.1
TIMEOUT_S = 2.0
GOOD_LOOKS = 5  # in a row: each is answered by one replica, and all of them have to be well


class Look(NamedTuple):
    """One answer."""

    at_s: float  # monotonic, when it was asked
    ready: bool
    degraded: bool  # the store cannot be written

    @property
    def good(self) -> bool:
        return self.ready and not self.degraded


class Readiness:
    """A thread that asks, for the length of the block.

    Args:
        url: of the server.
        model: that is asked about.
    """

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v2/models/{model}/ready"
        self._looks: list[Look] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ready")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def looks(self) -> list[Look]:
        """All so far."""
        return self._looks.copy()

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self._looks.append(self._look())

    def _look(self) -> Look:
        at_s = time.monotonic()
        try:
            response = httpx.get(self._url, timeout=TIMEOUT_S)  # a new connection each time: any replica may answer
            return Look(at_s, response.is_success, "degraded" in response.json())
        except (httpx.HTTPError, ValueError):
            return Look(at_s, ready=False, degraded=False)


def good_since(looks: list[Look], since_s: float) -> float | None:
    """When the looks since then began to be good without exception; None: they are not yet, or too few.

    >>> good_since([Look(at_s, ready=at_s > 2, degraded=False) for at_s in range(9)], since_s=1)
    3
    """
    good: list[Look] = []
    for look in reversed(looks):
        if not look.good or look.at_s < since_s:
            break
        good.append(look)
    return good[-1].at_s if len(good) >= GOOD_LOOKS else None
