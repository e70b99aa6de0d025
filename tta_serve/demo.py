"""What `tta-serve demo` plays: digits that are shifted, phase by phase, and both models' answers beside each other.

A client like any other: one connection, one request after the other at a camera's pace, in the Open Inference Protocol
with its binary tensor extension. Where the learner falls behind the client goes slower, so that a busy machine shows
the same story in more time. Labels are needed only to count right answers, and never leave the client.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tta_serve.builtin import digits
from tta_serve.demo_figures import PhaseFigures, Summary
from tta_serve.demo_screen import Screen
from tta_serve.errors import TTAError
from tta_serve.shifts import PHASES, Phase

REQUESTS_PER_S = 12.0  # at most: a camera, not a load test
TIMEOUT_S = 30.0
PENDING_ROWS_MAX = 32  # rows that may wait to be learned from when the next request goes out …
LEARNER_WAIT_S = 2.0  # … unless it has waited this long for them; also at a phase's end, so that its steps are its own
POLL_S = 0.02
RETRIES = 8  # of a request that the server is too busy for
RETRY_S_MAX = 5.0
SEED = 0


class DemoError(TTAError):
    """The server cannot be reached, refused a request, or gave an answer that is none."""


def play(
    url: str,
    model: str,
    *,
    stream: str,
    draws: int = 1024,
    images_per_request: int = 32,
    console: Console,
    requests_per_s: float = REQUESTS_PER_S,
    client: httpx.Client | None = None,
) -> Summary:
    """Play every phase once against a running server and show how both models do.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        model: its name there; it must classify `builtin: digits`.
        stream: which stream's state the requests use and teach.
        draws: images in each phase, drawn from the held-out digits with repeats.
        images_per_request: at most.
        console: a terminal shows a live table; anything else gets a line for each phase and the table at the end.
        requests_per_s: the pace; the answer to a request is always waited for.
        client: another one than a plain connection to the server.

    Raises:
        DemoError: the server cannot be reached or refused a request, or its answer cannot be read.
    """
    split = digits.split()
    source = _Source(split.held_out_images, split.held_out_labels, np.random.default_rng(SEED))
    pace = _Pace(requests_per_s)
    sizes = _sizes(draws, images_per_request)
    done: list[PhaseFigures] = []
    with nullcontext(client) if client else httpx.Client(timeout=TIMEOUT_S) as connection:
        server = _Server(Model.at(url, model, connection), stream)
        with Screen(console, model, draws) as screen:
            for phase in PHASES:
                for figures in _play_phase(server, source, pace, sizes, phase):
                    screen.show([*done, figures], running=True)
                done.append(figures)
                screen.show(done, running=False)
            summary = Summary(tuple(done))
            screen.close(summary)
    return summary


def _play_phase(
    server: "_Server", source: "_Source", pace: "_Pace", sizes: list[int], phase: Phase
) -> Iterator[PhaseFigures]:
    """The figures so far after each request, and once more when the learner has settled."""
    before = server.counters()
    tally = _Tally(phase, before, before, started_s=time.monotonic())
    for size in sizes:
        images, labels = source.draw(phase, size)
        pace.wait()
        tally.add(labels, server.infer(images))
        tally.after = server.settled(PENDING_ROWS_MAX)
        yield tally.figures()
    tally.after = server.settled(0)
    yield tally.figures()


class _Answer(NamedTuple):
    adapting: NDArray[np.int64]  # [B]
    frozen: NDArray[np.int64]  # [B]
    latency_s: float


class _Counters(NamedTuple):
    """What the server has counted for the stream since it began."""

    steps: int = 0
    seen: int = 0
    selected: int = 0
    entropy: float | None = None
    pending_rows: int = 0


@dataclass
class _Tally:
    """Counts one phase."""

    phase: Phase
    before: _Counters
    after: _Counters
    started_s: float
    draws: int = 0
    frozen: int = 0  # right answers
    adapting: int = 0
    latencies_s: list[float] = field(default_factory=list)
    ended_s: float = math.nan

    def add(self, labels: NDArray[np.int64], answer: _Answer) -> None:
        self.draws += len(labels)
        self.frozen += int((answer.frozen == labels).sum())
        self.adapting += int((answer.adapting == labels).sum())
        self.latencies_s.append(answer.latency_s)
        self.ended_s = time.monotonic()

    def figures(self) -> PhaseFigures:
        steps, seen, selected = (
            max(0, after - before) for before, after in zip(self.before[:3], self.after[:3], strict=True)
        )
        p50_s, p99_s = np.percentile(self.latencies_s, (50, 99))
        return PhaseFigures(
            name=self.phase.name,
            shifted=self.phase.shifted,
            draws=self.draws,
            frozen_accuracy=self.frozen / self.draws,
            adapting_accuracy=self.adapting / self.draws,
            entropy=self.after.entropy if steps else None,
            selected_share=selected / seen if seen else None,
            steps=steps,
            requests_per_s=len(self.latencies_s) / max(self.ended_s - self.started_s, 1e-9),
            p50_ms=1000 * float(p50_s),
            p99_ms=1000 * float(p99_s),
        )


@dataclass(frozen=True)
class _Source:
    """Held-out digits to draw from."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    generator: np.random.Generator

    def draw(self, phase: Phase, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images of the phase as the wire wants them, uint8 [count, 3, 32, 32], and their labels."""
        chosen = self.generator.integers(len(self.labels), size=count)
        shifted = phase.shift(self.images[chosen], self.generator)
        return np.ascontiguousarray(shifted.transpose(0, 3, 1, 2)), self.labels[chosen]


class _Pace:
    """Lets a caller through at most so many times a second."""

    def __init__(self, per_s: float) -> None:
        self.interval_s = 1 / per_s
        self.next_s = time.monotonic()

    def wait(self) -> None:
        now = time.monotonic()
        if now < self.next_s:
            time.sleep(self.next_s - now)
        self.next_s = max(now, self.next_s) + self.interval_s


@dataclass(frozen=True)
class Model:
    """A model of a server, over one connection."""

    client: httpx.Client
    url: str

    @classmethod
    def at(cls, server_url: str, name: str, client: httpx.Client) -> "Model":
        """The model of this name."""
        return cls(client, f"{server_url.rstrip('/')}/v2/models/{quote(name, safe='')}")

    def ask(self, path: str, content: bytes, headers: Mapping[str, str]) -> tuple[dict[str, Any], float]:
        """The answer to a body, and the seconds that it took; a busy server is asked again when it says.

        Raises:
            DemoError: the server cannot be reached, refused the request or stays busy, or its answer is no JSON object.
        """
        for _ in range(RETRIES):
            sent_s = time.monotonic()
            response = self.call("POST", path, content=content, headers=headers)
            latency_s = time.monotonic() - sent_s
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                break
            time.sleep(min(_retry_after_s(response), RETRY_S_MAX))
        return _json(response), latency_s

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Whatever the server says.

        Raises:
            DemoError: it cannot be reached.
        """
        try:
            return self.client.request(method, f"{self.url}/{path}", **options)
        except httpx.TransportError as error:
            raise DemoError(f"{self.url} does not answer: {error or type(error).__name__}") from error


@dataclass(frozen=True)
class _Server:
    """The two calls that the demo makes."""

    model: Model
    stream: str

    def infer(self, images: NDArray[np.uint8]) -> _Answer:
        """Both models' labels for images [B, 3, 32, 32]."""
        reply, latency_s = self._post(images)
        outputs = {output.get("name"): output.get("data") for output in reply.get("outputs", [])}
        labels = [np.asarray(outputs.get(name), dtype=object) for name in ("labels", "frozen_labels")]
        if any(each.shape != (len(images),) for each in labels):
            raise DemoError(
                f"the server should answer {len(images)} 'labels' and 'frozen_labels'; its answer has the outputs "
                f"{sorted(map(str, outputs))}"
            )
        return _Answer(labels[0].astype(np.int64), labels[1].astype(np.int64), latency_s)

    def _post(self, images: NDArray[np.uint8]) -> tuple[dict[str, Any], float]:
        tensor = {
            "name": "images",
            "shape": list(images.shape),
            "datatype": "UINT8",
            "parameters": {"binary_data_size": images.nbytes},
        }
        head = json.dumps({"inputs": [tensor], "outputs": [{"name": "labels"}, {"name": "frozen_labels"}]}).encode()
        headers = {
            "content-type": "application/octet-stream",
            "inference-header-content-length": str(len(head)),
            "x-session-id": self.stream,
            "x-answer": "both",
        }
        return self.model.ask("infer", head + images.tobytes(), headers)

    def settled(self, pending_rows: int) -> _Counters:
        """The counters when no more than so many rows wait to be learned from, or the time for that is up."""
        deadline_s = time.monotonic() + LEARNER_WAIT_S
        counters = self.counters()
        while counters.pending_rows > pending_rows and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            counters = self.counters()
        return counters

    def counters(self) -> _Counters:
        """The stream's counters; all zero while the server does not know it yet."""
        response = self.model.call("GET", f"streams/{quote(self.stream, safe='')}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return _Counters()
        state = _json(response)
        return _Counters(**{name: state[name] for name in _Counters._fields if name in state})


def _sizes(draws: int, images_per_request: int) -> list[int]:
    """Images of each request of a phase.

    >>> _sizes(70, 32)
    [32, 32, 6]
    """
    full, rest = divmod(draws, images_per_request)
    return [images_per_request] * full + ([rest] if rest else [])


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    said = body["error"] if isinstance(body, dict) and "error" in body else response.text[:200]
    raise DemoError(f"{response.request.method} {response.request.url}: {response.status_code}, {said}")


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", "1"))
    except ValueError:  # a date
        return 1.0
