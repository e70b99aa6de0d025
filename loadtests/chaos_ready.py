"""What a server says of itself while faults befall it: `ready`, asked again and again."""

import time
from typing import NamedTuple

import httpx

from loadtests.background import Background

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


class Readiness(Background):
    """A thread that asks, for the length of the block.

    Args:
        url: of the server.
        model: that is asked about.
    """

    def __init__(self, url: str, model: str) -> None:
        super().__init__("ready")
        self._url = f"{url}/v2/models/{model}/ready"
        self._looks: list[Look] = []

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
