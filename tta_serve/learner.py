"""The learn path: rows that were answered wait in pools, and a thread of lower priority takes steps within its budget.

`Pools` is the policy, without I/O and given the time; `Learner` is the thread around it.
"""

import heapq
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from tta_serve.judging import Learned
from tta_serve.lessons import Lesson, Observed, observed
from tta_serve.states import TEACHING_MAX

log = logging.getLogger(__name__)

STEP_ROWS_MAX = 256  # rows of one backward …
STEP_PIXELS_MAX = 64 * 224 * 224  # … and pixels: a backward keeps every activation of every row
QUEUE_BYTES = 256 * 2**20  # of rows that wait
OBSERVED_MAX = 256  # requests whose moments wait


class _Pooled(NamedTuple):
    lesson: Lesson
    arrived_s: float


class _Work(NamedTuple):
    observed: list[Observed]  # to absorb
    lessons: list[Lesson]  # to take a step on


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
    []
    >>> len(pools.take(now_s=0.5)), len(pools.take(now_s=1.0))
    (0, 1)
    """

    def __init__(self, step_rows: int, step_wait_s: float, queue_rows: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self.step_rows = step_rows
        self.step_wait_s = step_wait_s
        self.queue_rows = queue_rows
        self.queue_bytes = queue_bytes
        self.rows = 0
        self.bytes = 0
        self._pools: dict[str, deque[_Pooled]] = {}
        self._rows: Counter[str] = Counter()

    def rows_of(self, stream: str) -> int:
        return self._rows[stream]

    def add(self, lesson: Lesson, now_s: float) -> list[Lesson]:
        """Queue a lesson; returns those that gave way to it."""
        dropped = []
        while self._rows and (
            self.rows + lesson.rows > self.queue_rows or self.bytes + lesson.nbytes > self.queue_bytes
        ):
            dropped.append(self._pop(max(self._rows, key=self._rows.__getitem__)))
        self._pools.setdefault(lesson.stream, deque()).append(_Pooled(lesson, now_s))
        self._rows[lesson.stream] += lesson.rows
        self.rows += lesson.rows
        self.bytes += lesson.nbytes
        return dropped

    def take(self, now_s: float) -> list[Lesson]:
        """The lessons of one step: as equally many rows as can be of the ready streams that have waited longest.

        At most `TEACHING_MAX` streams and `step_rows_max` rows. A busy stream takes what the others leave, and no
        more.
        """
        ready = [stream for stream in self._pools if self._ready(stream, now_s)]
        ready = sorted(ready, key=lambda stream: self._pools[stream][0].arrived_s)[:TEACHING_MAX]
        taken: dict[str, list[Lesson]] = {stream: [] for stream in ready}
        total = 0
        turns = [(0, age, stream) for age, stream in enumerate(ready)]  # a heap: who has the fewest rows is next
        while turns:
            rows, age, stream = heapq.heappop(turns)
            lesson = self._pools[stream][0].lesson
            if total and total + lesson.rows > step_rows_max(lesson):
                continue  # its turn comes at the next step; a smaller lesson of another stream may still fit
            taken[stream].append(lesson)
            total += lesson.rows
            self._pop(stream)
            if stream in self._pools:
                heapq.heappush(turns, (rows + lesson.rows, age, stream))
        return [lesson for stream in ready for lesson in taken[stream]]

    def forget(self, stream: str) -> int:
        """Drop all rows of a stream; returns how many."""
        for pooled in self._pools.pop(stream, ()):
            self.bytes -= pooled.lesson.nbytes
        rows = self._rows.pop(stream, 0)
        self.rows -= rows
        return rows

    def has_enough(self, stream: str) -> bool:
        """Whether a stream is ready however short its rows have waited."""
        return self._rows[stream] >= self.step_rows

    def _ready(self, stream: str, now_s: float) -> bool:
        return self.has_enough(stream) or now_s - self._pools[stream][0].arrived_s >= self.step_wait_s

    def _pop(self, stream: str) -> Lesson:
        pool = self._pools[stream]
        lesson = pool.popleft().lesson
        self._rows[stream] -= lesson.rows
        self.rows -= lesson.rows
        self.bytes -= lesson.nbytes
        if not pool:
            del self._pools[stream], self._rows[stream]
        return lesson


def _parts(lesson: Lesson) -> list[Lesson]:
    """A request may hold more rows than one step; its moments, which are those of all its rows, go with the first."""
    rows = step_rows_max(lesson)
    if lesson.rows <= rows:
        return [lesson]
    xs = torch.split(lesson.x, rows)
    logits = [None] * len(xs) if lesson.logits is None else torch.split(lesson.logits, rows)
    return [
        lesson._replace(x=x, logits=part, moments=None if number else lesson.moments)
        for number, (x, part) in enumerate(zip(xs, logits, strict=True))
    ]


class Teachable(Protocol):
    """What the thread teaches."""

    @property
    def device(self) -> torch.device: ...

    def prepare_thread(self, *, learns: bool = False) -> None:
        """Called once in the thread."""
        ...

    def learn(self, lessons: Sequence[Lesson]) -> list[Learned]:
        """See `Engine.learn`."""
        ...


class Learner:
    """A thread that learns from what it is given, for at most `budget` of a core's or the device's time.

    Of rows for which there is no time, the statistics are taken all the same, where their forward measured them.

    Args:
        engine: where states live.
        pools: the policy; this object is its only user.
        budget: share of time spent learning, 0.05 … 1. On the CPU it is processor time: this thread has a low priority,
            and the time that it waits for its turn is not spent.
        on_learned: told of every step: what was done, and its seconds.
        on_skipped: told of rows that were not learned from: how many and why.
        absorb: see `Engine.absorb`; None: what is taught brings no moments.
    """

    def __init__(
        self,
        engine: Teachable,
        pools: Pools,
        budget: float,
        on_learned: Callable[[Sequence[Learned], float], None],
        on_skipped: Callable[[int, str], None],
        absorb: Callable[[Sequence[Observed]], None] | None = None,
    ) -> None:
        self.engine = engine
        self.budget = budget
        self._pools = pools
        self._on_learned = on_learned
        self._on_skipped = on_skipped
        self._take_moments = absorb
        self._changed = threading.Condition()
        self._stopping = False
        self._resting = False  # until a time that is set: an arrival changes nothing
        self._observed: deque[Observed] = deque(maxlen=OBSERVED_MAX)
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
        dropped: list[Lesson] = []
        with self._changed:
            was_empty = not self._pools.rows
            for part in _parts(lesson):
                dropped += self._pools.add(part, time.monotonic())
            self._observed.extend(observed(dropped))
            # a thread that is woken for nothing takes the interpreter from the one that answers
            if not self._resting and (was_empty or dropped or self._pools.has_enough(lesson.stream)):
                self._changed.notify()
        if dropped:
            self._on_skipped(sum(each.rows for each in dropped), "queue_full")

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
            kept = [each for each in self._observed if each.stream != stream]
            self._observed = deque(kept, maxlen=OBSERVED_MAX)
        if dropped:
            self._on_skipped(dropped, "forgotten")

    def _run(self) -> None:
        self.engine.prepare_thread(learns=True)
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        spent_s = time.thread_time if self.engine.device.type == "cpu" else time.monotonic
        rest_until_s = 0.0
        while (work := self._next(rest_until_s)) is not None:
            began_s, spent_before_s = time.monotonic(), spent_s()
            if work.observed:
                self._absorb(work.observed)
            if work.lessons:
                self._learn(work.lessons)
            rest_until_s = began_s + (spent_s() - spent_before_s) / self.budget

    def _absorb(self, given: Sequence[Observed]) -> None:
        try:
            if self._take_moments:
                self._take_moments(given)
        except Exception:  # the thread must live; the rows are counted as skipped already
            log.exception("taking the moments of %d requests failed", len(given))

    def _learn(self, lessons: Sequence[Lesson]) -> None:
        began_s = time.monotonic()
        try:
            learned = self.engine.learn(lessons)
        except Exception:  # the thread must live: rows of a failed step are counted and logged
            log.exception("a learning step over %d requests failed", len(lessons))
            self._on_skipped(sum(lesson.rows for lesson in lessons), "failed")
            learned = []
        with self._changed:
            self._learning.clear()
        if learned:
            self._on_learned(learned, time.monotonic() - began_s)

    def _next(self, rest_until_s: float) -> _Work | None:
        """Wait for the rest to be over, and for moments or a stream that is ready; None when stopping."""
        with self._changed:
            while not self._stopping:
                now_s = time.monotonic()
                self._resting = now_s < rest_until_s
                if self._resting:
                    self._changed.wait(rest_until_s - now_s)
                    continue
                lessons = self._pools.take(now_s)
                waiting, self._observed = list(self._observed), deque(maxlen=OBSERVED_MAX)
                for lesson in lessons:
                    self._learning[lesson.stream] += lesson.rows
                if lessons or waiting:
                    return _Work(waiting, lessons)
                # rows that are too few yet become ready by waiting; without any, only an arrival matters
                self._changed.wait(self._pools.step_wait_s / 4 if self._pools.rows else None)
            return None
