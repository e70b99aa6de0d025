"""Clients that keep asking, each for its own stream, and what came of every request.

A client that gets no answer asks again: the same request with the same `id`, at most three times, each time after a
longer pause. Whatever may pass is a reason: no connection, a connection that breaks, no answer in time, 429, 5xx.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from loadtests.client import Encoded, encode

BACK_OFF_S = (0.5, 1.5, 4.0)  # before the first retry, the second, the third
TIMEOUT_S = 10.0  # of one attempt
PAUSE_S = (0.3, 0.7)  # between a client's requests
ROWS = 4  # images of a request
REFUSED = 429


class Told(NamedTuple):
    """What an answer said of its stream's state."""

    incarnation: int  # 0: the frozen model's answer
    stored: int  # the version that the store has
    total: int  # and the changes since
    replica: str  # that made these; "" where there are none


class Outcome(NamedTuple):
    """What came of one request."""

    stream: str
    id: str
    began_s: float  # monotonic; first attempt
    ended_s: float
    attempts: int
    told: Told | None  # None: it failed
    error: str = ""  # of the last attempt that failed

    @property
    def answered(self) -> bool:
        return self.told is not None

    @property
    def took_s(self) -> float:
        return self.ended_s - self.began_s


def read_told(headers: Mapping[str, str]) -> Told:
    """The state's version in the headers of an answer.

    >>> read_told({"x-state-version": "12+3@r1", "x-state-incarnation": "1"})
    Told(incarnation=1, stored=12, total=15, replica='r1')
    >>> read_told({"x-state-version": "12", "x-state-incarnation": "1"}).total
    12
    """
    version, _, replica = headers["x-state-version"].partition("@")
    stored, _, more = version.partition("+")
    return Told(int(headers["x-state-incarnation"]), int(stored), int(stored) + int(more or 0), replica)


def ask(
    post: Callable[[], httpx.Response],
    stream: str,
    id: str,
    wait: Callable[[float], object],
    clock: Callable[[], float],
) -> Outcome:
    """Ask until there is an answer, or no retry is left.

    Args:
        post: one attempt.
        stream: who asks.
        id: of the request; an answer to another one counts as a failure.
        wait: for so many seconds.
        clock: seconds, monotonic.
    """
    began_s, error = clock(), ""
    for attempt, pause_s in enumerate((*BACK_OFF_S, 0.0), start=1):
        try:
            response = post()
        except httpx.HTTPError as broken:
            error, again = f"{type(broken).__name__}: {broken}", True
        else:
            if response.is_success and response.json().get("id") == id:
                return Outcome(stream, id, began_s, clock(), attempt, read_told(response.headers), error)
            error = f"{response.status_code}: {response.text[:200]}"
            again = response.status_code == REFUSED or response.is_server_error
        if not again or attempt > len(BACK_OFF_S):
            break
        wait(pause_s)
    return Outcome(stream, id, began_s, clock(), attempt, None, error)


class Traffic:
    """One client for each stream, from the beginning of the block to its end.

    Args:
        url: of the server.
        model: that is asked.
        streams: their names.
        images: to ask about, uint8 [N, 3, H, W].
        seed: of who asks about what, and when.
    """

    def __init__(self, url: str, model: str, streams: Sequence[str], images: NDArray[np.uint8], seed: int) -> None:
        self.streams = tuple(streams)
        self._url = f"{url}/v2/models/{model}/infer"
        self._images = images
        self._outcomes: list[Outcome] = []  # appended to by all clients
        self._stopping = threading.Event()
        self._clients = [
            threading.Thread(target=self._keep_asking, args=(stream, np.random.default_rng([seed, place])), name=stream)
            for place, stream in enumerate(streams)
        ]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopping.set()
        for client in self._clients:
            client.join()

    def outcomes(self) -> list[Outcome]:
        """All so far, in the order in which they ended."""
        return self._outcomes.copy()

    def _keep_asking(self, stream: str, generator: np.random.Generator) -> None:
        with httpx.Client(timeout=TIMEOUT_S) as http:
            number = 0
            while not self._stopping.wait(generator.uniform(*PAUSE_S)):
                number += 1
                id = f"{stream}-{number}"
                request = encode(self._images[generator.choice(len(self._images), ROWS)], id=id, stream=stream)
                self._outcomes.append(ask(lambda: self._post(http, request), stream, id, time.sleep, time.monotonic))  # noqa: B023

    def _post(self, http: httpx.Client, request: Encoded) -> httpx.Response:
        return http.post(self._url, headers=request.headers, content=request.body)


def served_since(
    outcomes: Sequence[Outcome], streams: Collection[str], since_s: float, within_s: float
) -> float | None:
    """When all streams were served again: the last request of each began since then, and was answered in time.

    Returns:
        When the last of these first answers came; None: one stream is not served.
    """
    latest = {outcome.stream: outcome for outcome in outcomes}
    for stream in streams:
        outcome = latest.get(stream)
        if outcome is None or not outcome.answered or outcome.began_s < since_s or outcome.took_s > within_s:
            return None
    first: dict[str, float] = {}
    for outcome in outcomes:
        if outcome.answered and outcome.began_s >= since_s and outcome.took_s <= within_s:
            first.setdefault(outcome.stream, outcome.ended_s)
    return max(first[stream] for stream in streams)


def named_since(outcomes: Sequence[Outcome], since_s: float) -> set[str]:
    """The replicas that answers to requests since then name."""
    return {outcome.told.replica for outcome in outcomes if outcome.told and outcome.began_s >= since_s} - {""}
