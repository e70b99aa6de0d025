"""The learn path: rows that were answered wait in pools, and a thread of lower priority takes steps within its budget.

`Pools` is the policy, without I/O and given the time; `Learner` is the thread around it.
"""

import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tta_serve.engine import Engine, Learned, Lesson

log = logging.getLogger(__name__)

STEP_ROWS_MAX = 256  # rows of one backward …
STEP_PIXELS_MAX = 64 * 224 * 224  # … and pixels: a backward keeps every activation of every row
QUEUE_BYTES = 256 * 2**20  # of rows that wait


class _Pooled(NamedTuple):
    lesson: Lesson
    arrived_s: float


def step_rows_max(lesson: Lesson) -> int:
    """Rows of this size that one step may take."""
    return max(1, min(STEP_ROWS_MAX, STEP_PIXELS_MAX // max(1, lesson.x[0, 0].numel())))


class Pools:
    """Rows that wait to be learned from, by stream, bounded in all.

    A stream is ready when it has `step_rows` rows, or its oldest has waited `step_wait_s`. When there is no room, the
    oldest rows of the stream that has the most give way: one busy stream cannot crowd out the others.

    >>> import torch
    >>> pools = Pools(step_rows=2, step_wait_s=1.0, queue_rows=4)
    >>> one_row = Lesson(torch.zeros(1, 3, 8, 8), "a", incarnation=1, version=0)
    >>> pools.add(one_row, now_s=0.0)
    0
    >>> len(pools.take(now_s=0.5)), len(pools.take(now_s=1.0))
    (0, 1)
    """

    def __init__(self, step_rows: int, step_wait_s: float, queue_rows: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self.step_rows = step_rows
        self.step_wait_s = step_wait_s
        self.queue_rows = queue_rows
        self.queue_bytes = queue_bytes
        self.bytes = 0
        self._pools: dict[str, deque[_Pooled]] = {}
        self._rows: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        return self._rows.total()

    def rows_of(self, stream: str) -> int:
        return self._rows[stream]

    def add(self, lesson: Lesson, now_s: float) -> int:
        """Queue a lesson; returns how many rows gave way to it."""
        dropped = 0
        while self._rows and (
            self.rows + len(lesson.x) > self.queue_rows or self.bytes + lesson.x.nbytes > self.queue_bytes
        ):
            dropped += self._pop(max(self._rows, key=self._rows.__getitem__))
        self._pools.setdefault(lesson.stream, deque()).append(_Pooled(lesson, now_s))
        self._rows[lesson.stream] += len(lesson.x)
        self.bytes += lesson.x.nbytes
        return dropped

    def take(self, now_s: float) -> list[Lesson]:
        """The lessons of all ready streams, those that have waited longest first; at most `step_rows_max` rows."""
        ready = [stream for stream in self._pools if self._ready(stream, now_s)]
        taken: list[Lesson] = []
        total = 0
        for stream in sorted(ready, key=lambda stream: self._pools[stream][0].arrived_s):
            while pool := self._pools.get(stream):
                rows = len(pool[0].lesson.x)
                if taken and total + rows > step_rows_max(pool[0].lesson):
                    return taken
                taken.append(pool[0].lesson)
                total += rows
                self._pop(stream)
        return taken

    def forget(self, stream: str) -> int:
        """Drop all rows of a stream; returns how many."""
        for pooled in self._pools.pop(stream, ()):
            self.bytes -= pooled.lesson.x.nbytes
        return self._rows.pop(stream, 0)

    def _ready(self, stream: str, now_s: float) -> bool:
        oldest_s = self._pools[stream][0].arrived_s
        return self._rows[stream] >= self.step_rows or now_s - oldest_s >= self.step_wait_s

    def _pop(self, stream: str) -> int:
        pool = self._pools[stream]
        x = pool.popleft().lesson.x
        rows = len(x)
        self._rows[stream] -= rows
        self.bytes -= x.nbytes
        if not pool:
            del self._pools[stream], self._rows[stream]
        return rows


class Learner:
    """A thread that learns from what it is given, for at most `budget` of its time.

    Args:
        engine: where states live.
        pools: the policy; this object is its only user.
        budget: share of wall-clock time spent learning, 0.05 … 1.
        on_learned: told of every step: what was done, and its seconds.
        on_skipped: told of rows that were not learned from: how many and why.
    """

    def __init__(
        self,
        engine: Engine,
        pools: Pools,
        budget: float,
        on_learned: Callable[[Sequence[Learned], float], None],
        on_skipped: Callable[[int, str], None],
    ) -> None:
        self.engine = engine
        self.budget = budget
        self._pools = pools
        self._on_learned = on_learned
        self._on_skipped = on_skipped
        self._changed = threading.Condition()
        self._stopping = False
        self._learning: Counter[str] = Counter()  # rows in the step that runs now
        self._thread = threading.Thread(target=self._run, name="tta-learner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the step at hand; what waits is dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def offer(self, lesson: Lesson) -> None:
        """Queue rows; never waits for the step that runs."""
        with self._changed:
            # a request may hold more rows than one step
            parts = torch.split(lesson.x, step_rows_max(lesson))
            dropped = sum(self._pools.add(lesson._replace(x=part), time.monotonic()) for part in parts)
            self._changed.notify()
        if dropped:
            self._on_skipped(dropped, "queue_full")

    def pending_rows(self, stream: str | None = None) -> int:
        """Rows that wait or are being learned from, of one stream or of all."""
        with self._changed:
            if stream is None:
                return self._pools.rows + self._learning.total()
            return self._pools.rows_of(stream) + self._learning[stream]

    def forget(self, stream: str) -> None:
        """Drop what waits of a stream."""
        with self._changed:
            dropped = self._pools.forget(stream)
        if dropped:
            self._on_skipped(dropped, "forgotten")

    def _run(self) -> None:
        self.engine.prepare_thread()
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        rest_until_s = 0.0
        while (lessons := self._next(rest_until_s)) is not None:
            began_s = time.monotonic()
            try:
                learned = self.engine.learn(lessons)
            except Exception:  # the thread must live: rows of a failed step are counted and logged
                log.exception("a learning step over %d requests failed", len(lessons))
                self._on_skipped(sum(len(lesson.x) for lesson in lessons), "failed")
                learned = []
            took_s = time.monotonic() - began_s
            with self._changed:
                self._learning.clear()
            if learned:
                self._on_learned(learned, took_s)
            rest_until_s = time.monotonic() + took_s * (1 / self.budget - 1)

    def _next(self, rest_until_s: float) -> list[Lesson] | None:
        """Wait for the rest to be over and a stream to be ready; None when stopping."""
        with self._changed:
            while not self._stopping:
                now_s = time.monotonic()
                if now_s < rest_until_s:
                    self._changed.wait(rest_until_s - now_s)
                    continue
                if lessons := self._pools.take(now_s):
                    for lesson in lessons:
                        self._learning[lesson.stream] += len(lesson.x)
                    return lessons
                # rows that are too few yet become ready by waiting; without any, only an arrival matters
                self._changed.wait(self._pools.step_wait_s / 4 if self._pools.rows else None)
            return None
