"""What each replica of a model says of itself, read from `/metrics`; one that does not answer there yet is asked again.

Each look may be answered by any of the replicas, so several are needed to hear all of them.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping

import httpx

from loadtests.errors import RequestFailed

POLL_S = 0.05
TIMEOUT_S = 10.0  # of one look
SAMPLE = re.compile(r"(?P<name>[a-z_]+)\{(?P<labels>[^}]*)\} (?P<value>\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def by_replica(text: str, name: str, model: str) -> dict[str, float]:
    """A metric without further labels, by replica.

    >>> text = 'tta_pending_rows{model="a",replica="r1"} 3.0'
    >>> by_replica(text, "tta_pending_rows", "a"), by_replica(text, "tta_pending_rows", "b")
    ({'r1': 3.0}, {})
    """
    found = {}
    for sample in SAMPLE.finditer(text):
        labels = dict(LABEL.findall(sample["labels"]))
        if sample["name"] == name and labels.get("model") == model:
            found[labels["replica"]] = float(sample["value"])
    return found


def of_all(
    look: Callable[[], Mapping[str, float]], replicas: int, is_final: Callable[[float], bool], max_s: float
) -> dict[str, float]:
    """Look until each of so many replicas has said a value that will not change any more.

    Args:
        look: the values of those that answer, by replica.
        replicas: how many there are.
        is_final: whether a value is.
        max_s: how long.

    Raises:
        RequestFailed: some have not.
    """
    said: dict[str, float] = {}
    until_s = time.monotonic() + max_s
    while len(said) < replicas:
        said |= {replica: value for replica, value in look().items() if is_final(value)}
        if len(said) < replicas and time.monotonic() > until_s:
            raise RequestFailed(f"after {max_s:.0f} s only {len(said)} of {replicas} replicas are done: {said}")
        if len(said) < replicas:
            time.sleep(POLL_S)
    return said


class ReplicaMetrics:
    """The metrics of one model's replicas.

    Args:
        http: of the server.
        model: its name.
        replicas: how many it has.
    """

    def __init__(self, http: httpx.Client, model: str, replicas: int) -> None:
        self._http = http
        self._model = model
        self._replicas = replicas

    def drain(self, max_s: float = 120.0) -> None:
        """Wait until no replica has a row to learn from, once nothing is sent any more.

        Raises:
            RequestFailed: that did not come in time.
        """
        of_all(self._pending_rows, self._replicas, lambda rows: rows == 0, max_s)

    def images(self, max_s: float = 30.0) -> dict[str, float]:
        """Images that each has answered, by replica.

        Raises:
            RequestFailed: not all have said so in time.
        """
        return of_all(self._images, self._replicas, lambda _: True, max_s)

    def _pending_rows(self) -> dict[str, float]:
        return by_replica(self._look(), "tta_pending_rows", self._model)

    def _images(self) -> dict[str, float]:
        text = self._look()
        answered = by_replica(text, "tta_images_total", self._model)
        # one that has answered none yet does not count them
        return {replica: answered.get(replica, 0.0) for replica in by_replica(text, "tta_pending_rows", self._model)}

    def _look(self) -> str:
        try:
            response = self._http.get("/metrics", timeout=TIMEOUT_S)
        except httpx.HTTPError as error:
            raise RequestFailed(f"GET /metrics: {error or type(error).__name__}") from error
        if not response.is_success:
            raise RequestFailed(f"GET /metrics: {response.status_code}")
        return response.text


def largest_share(counts: Collection[float]) -> float:
    """Of the whole, what the busiest has.

    >>> largest_share([30, 10])
    0.75
    """
    return max(counts) / sum(counts)
