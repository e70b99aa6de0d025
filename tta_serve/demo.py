"""What `tta-serve demo` plays: digits that are shifted, phase by phase, and both models' answers beside each other.

A client like any other: one connection, one request after the other at a camera's pace, in the Open Inference Protocol
with its binary tensor extension. Labels are needed only to count right answers, and never leave the client.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tta_serve.builtin import digits
from tta_serve.shifts import PHASES, Phase

REQUESTS_PER_S = 12.0  # at most: a camera, not a load test
TIMEOUT_S = 30.0
SETTLE_S = 1.0  # how long a phase waits at its end for the learner, so that its steps are counted as its own
POLL_EVERY = 4  # requests between two looks at the stream's counters
RETRIES = 8  # of a request that the server is too busy for
RETRY_S_MAX = 5.0
CLEAN_TOLERANCE = 0.02  # of accuracy: how far the adapting model may end below the frozen one on clean images
SEED = 0


class DemoError(Exception):
    """The server refused a request, or gave an answer that is none."""


@dataclass(frozen=True)
class PhaseFigures:
    """What one phase came to, so far."""

    name: str
    shifted: bool
    draws: int  # images answered
    frozen_accuracy: float  # 0 … 1
    adapting_accuracy: float
    entropy: float | None  # mean of the last step's rows, nats; None where no step was taken
    selected_share: float | None  # of the rows that the learner saw, 0 … 1; None where it saw none
    steps: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float

    @property
    def good(self) -> bool:
        """Ahead of the frozen model where images are shifted, not far behind it where they are not."""
        if self.shifted:
            return self.adapting_accuracy > self.frozen_accuracy
        return self.adapting_accuracy >= self.frozen_accuracy - CLEAN_TOLERANCE


@dataclass(frozen=True)
class Summary:
    """All phases that were played to their end."""

    phases: tuple[PhaseFigures, ...]

    @property
    def passed(self) -> bool:
        """Whether the adapting model was ahead on every shift, and at most 2 points behind on the last clean phase."""
        return len(self.phases) == len(PHASES) and not self.failures

    @property
    def failures(self) -> tuple[PhaseFigures, ...]:
        """The phases that contradict the promise. (The first clean one promises nothing: nothing was learned yet.)"""
        return tuple(phase for i, phase in enumerate(self.phases) if i > 0 and not phase.good)

    def sentence(self) -> str:
        """What happened, in plain words."""
        if len(self.phases) < len(PHASES):
            return f"Stopped after {len(self.phases)} of {len(PHASES)} phases."
        shifted = [phase for phase in self.phases if phase.shifted]
        frozen = sum(phase.frozen_accuracy for phase in shifted) / len(shifted)
        adapting = sum(phase.adapting_accuracy for phase in shifted) / len(shifted)
        last = self.phases[-1]
        averages = (
            f"Over {len(shifted)} shifts the frozen model got {frozen:.1%} right and the adapting one {adapting:.1%}"
        )
        back = f"{last.adapting_accuracy:.1%} against {last.frozen_accuracy:.1%}"
        if self.passed:
            return (
                f"{averages}, ahead in each of them, without a single label; "
                f"back on clean images it has forgotten nothing that shows ({back})."
            )
        wrong = ", ".join(
            f"{p.name} ({p.adapting_accuracy:.1%} against {p.frozen_accuracy:.1%})" for p in self.failures
        )
        return f"{averages}, but it should have done better here: {wrong}."


def play(
    url: str,
    model: str,
    *,
    stream: str,
    draws: int = 1024,
    images_per_request: int = 32,
    console: Console,
    once: bool,
    requests_per_s: float = REQUESTS_PER_S,
    client: httpx.Client | None = None,
) -> Summary:
    """Play all phases against a running server and show how both models do.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        model: its name there; it must classify `builtin: digits`.
        stream: which stream's state the requests use and teach.
        draws: images in each phase, drawn from the held-out digits with repeats.
        images_per_request: at most.
        console: a terminal shows a live table; anything else gets a line for each phase and the table at the end.
        once: end after the last phase; otherwise begin again until interrupted, and summarise the last full round.
        requests_per_s: the pace; the answer to a request is always waited for.
        client: another one than a plain connection to the server.

    Raises:
        DemoError: the server refused a request, or its answer cannot be read.
        httpx.TransportError: the server cannot be reached.
    """
    split = digits.split()
    source = _Source(split.held_out_images, split.held_out_labels, np.random.default_rng(SEED))
    with nullcontext(client) if client else httpx.Client(timeout=TIMEOUT_S) as connection:
        server = _Server(connection, f"{url.rstrip('/')}/v2/models/{quote(model, safe='')}", stream)
        pace = _Pace(requests_per_s)
        sizes = _sizes(draws, images_per_request)
        number, summary = 1, Summary(())
        while True:
            done: list[PhaseFigures] = []
            try:
                _play_round(server, source, pace, sizes, _Screen(console, model, draws, 0 if once else number), done)
            except KeyboardInterrupt:
                if once:
                    raise
                return summary if summary.phases else Summary(tuple(done))
            summary = Summary(tuple(done))
            if once:
                return summary
            number += 1


def _play_round(
    server: "_Server",
    source: "_Source",
    pace: "_Pace",
    sizes: list[int],
    screen: "_Screen",
    done: list[PhaseFigures],
) -> None:
    """Play every phase once; `done` gets the figures of each that ends."""
    with screen:
        for phase in PHASES:
            figures = None
            for figures in _play_phase(server, source, pace, sizes, phase):
                screen.show([*done, figures], running=True)
            if figures is not None:
                done.append(figures)
                screen.show(done, running=False)
        screen.close(Summary(tuple(done)))


def _play_phase(
    server: "_Server", source: "_Source", pace: "_Pace", sizes: list[int], phase: Phase
) -> Iterator[PhaseFigures]:
    """The figures so far after each request, and once more when the learner has settled."""
    before = server.counters()
    tally = _Tally(phase, before, before, started_s=time.monotonic())
    for number, size in enumerate(sizes, start=1):
        images, labels = source.draw(phase, size)
        pace.wait()
        tally.add(labels, server.infer(images))
        if number % POLL_EVERY == 0:
            tally.after = server.counters()
        yield tally.figures()
    deadline = time.monotonic() + SETTLE_S
    tally.after = server.counters()
    while tally.after.pending_rows and time.monotonic() < deadline:
        time.sleep(SETTLE_S / 10)
        tally.after = server.counters()
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
class _Server:
    """The two calls that the demo makes."""

    client: httpx.Client
    model_url: str
    stream: str

    def infer(self, images: NDArray[np.uint8]) -> _Answer:
        """Both models' labels for images [B, 3, 32, 32]; a busy server is asked again when it says."""
        for _ in range(RETRIES):
            sent_s = time.monotonic()
            response = self._post(images)
            latency_s = time.monotonic() - sent_s
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                break
            time.sleep(min(_retry_after_s(response), RETRY_S_MAX))
        reply = _json(response)
        outputs = {output.get("name"): output.get("data") for output in reply.get("outputs", [])}
        labels = [np.asarray(outputs.get(name), dtype=object) for name in ("labels", "frozen_labels")]
        if any(each.shape != (len(images),) for each in labels):
            raise DemoError(
                f"the server should answer {len(images)} 'labels' and 'frozen_labels'; its answer has the outputs "
                f"{sorted(map(str, outputs))}"
            )
        return _Answer(labels[0].astype(np.int64), labels[1].astype(np.int64), latency_s)

    def _post(self, images: NDArray[np.uint8]) -> httpx.Response:
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
        return self.client.post(f"{self.model_url}/infer", content=head + images.tobytes(), headers=headers)

    def counters(self) -> _Counters:
        """The stream's counters; all zero while the server does not know it yet."""
        response = self.client.get(f"{self.model_url}/streams/{quote(self.stream, safe='')}")
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


class _Screen:
    """Shows a round: a table that grows on a terminal; elsewhere a line for each phase, and the table at the end."""

    def __init__(self, console: Console, model: str, draws: int, number: int) -> None:
        self.console = console
        self.title = f"{model}: frozen and adapting, side by side" + (f" · round {number}" if number else "")
        self.draws = draws
        self.live = Live(console=console, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> "_Screen":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, phases: Sequence[PhaseFigures], running: bool) -> None:
        """The phases so far; `running`: the last of them still goes on."""
        if self.live:
            self.live.update(self.table(phases, running))
        elif not running:
            self.console.print(_line(phases[-1]), soft_wrap=True)

    def close(self, summary: Summary) -> None:
        """The whole round, and what happened in plain words."""
        style = "green" if summary.passed else "red"
        end = Group(self.table(summary.phases, running=False), Text(summary.sentence(), style=style))
        if self.live:
            self.live.update(end)
        else:
            self.console.print()
            self.console.print(end)

    def table(self, phases: Sequence[PhaseFigures], running: bool) -> Table:
        """Fits 80 columns."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title_justify="left")
        table.add_column("\nphase", no_wrap=True)
        for header in (
            "frozen\n% right",
            "adapting\n% right",
            "entropy\nnats",
            "selected\n%",
            "\nsteps",
            "requests\n/s",
            "p50\nms",
            "p99\nms",
        ):
            table.add_column(header, justify="right", no_wrap=True)
        for i, phase in enumerate(phases):
            now = running and i == len(phases) - 1
            table.add_row(*_cells(phase, "▸" if now else "✓" if phase.good else "✗"), style="bold" if now else "")
        for waiting in PHASES[len(phases) :]:
            table.add_row(f"  {waiting.name}", style="dim")
        if running:
            table.caption = f"▸ {phases[-1].name}: {phases[-1].draws:,} of {self.draws:,} images"
            table.caption_justify = "left"
        return table


def _cells(phase: PhaseFigures, mark: str) -> tuple[str | Text, ...]:
    return (
        f"{mark} {phase.name}",
        f"{100 * phase.frozen_accuracy:.1f}",
        Text(f"{100 * phase.adapting_accuracy:.1f}", style="bold green" if phase.good else "bold red"),
        "–" if phase.entropy is None else f"{phase.entropy:.2f}",
        "–" if phase.selected_share is None else f"{100 * phase.selected_share:.0f}",
        f"{phase.steps:,}",
        f"{phase.requests_per_s:.1f}",
        f"{phase.p50_ms:.0f}",
        f"{phase.p99_ms:.0f}",
    )


def _line(phase: PhaseFigures) -> str:
    gain = 100 * (phase.adapting_accuracy - phase.frozen_accuracy)
    return (
        f"{phase.name}: frozen {phase.frozen_accuracy:.1%}, adapting {phase.adapting_accuracy:.1%} "
        f"({gain:+.1f} points) over {phase.draws:,} images, {phase.steps:,} steps"
    )
