"""Who joins a batch: requests wait in a bounded queue, and the device takes what is there whenever it becomes free.

`Waiting` is the policy, without I/O; `Batcher` is a thin asyncio shell around it. No timer holds a request back: with a
free device it is taken at once, under load batches grow by themselves.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

from tta_serve.errors import Overloaded, Unavailable

log = logging.getLogger(__name__)

Q = TypeVar("Q")
A = TypeVar("A")


class Waiting(Generic[Q]):
    """A first-in-first-out queue, bounded in rows.

    Args:
        rows_max: rows of one batch; a request is never split, and a larger one goes alone.
        queue_rows: rows that may wait.

    >>> waiting = Waiting(rows_max=4, queue_rows=8)
    >>> [waiting.offer(name, rows) for name, rows in (("a", 3), ("b", 1), ("c", 4), ("d", 1))]
    [True, True, True, False]
    >>> waiting.take(), waiting.take(), waiting.take()
    (['a', 'b'], ['c'], [])
    """

    def __init__(self, rows_max: int, queue_rows: int) -> None:
        self.rows_max = rows_max
        self.queue_rows = queue_rows
        self.rows = 0
        self._queue: deque[tuple[Q, int]] = deque()

    @property
    def batches(self) -> float:
        """About how many batches wait: a request is never split, so no more than there are requests."""
        return min(len(self._queue), self.rows / self.rows_max)

    def offer(self, request: Q, rows: int) -> bool:
        """Queue a request; False when there is no room. An empty queue has room for any request."""
        if self._queue and self.rows + rows > self.queue_rows:
            return False
        self._queue.append((request, rows))
        self.rows += rows
        return True

    def take(self) -> list[Q]:
        """The next batch; empty when nothing waits."""
        batch: list[Q] = []
        total = 0
        while self._queue and (not batch or total + self._queue[0][1] <= self.rows_max):
            request, rows = self._queue.popleft()
            batch.append(request)
            total += rows
        self.rows -= total
        return batch


class _Ticket(NamedTuple, Generic[Q, A]):
    request: Q
    future: asyncio.Future[A]


class Batcher(Generic[Q, A]):
    """Runs batches one after the other and hands each caller its own answer.

    A caller that leaves is dropped if it still waits, and never disturbs its batch-mates if it does not.

    Args:
        run: answers one batch, in order.
        rows_max, queue_rows: see `Waiting`.
        afterwards: called with the batch when its answers are out and before the next batch is taken.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Q]], Awaitable[Sequence[A]]],
        rows_max: int,
        queue_rows: int,
        afterwards: Callable[[Sequence[Q], Sequence[A]], Awaitable[None]] | None = None,
    ) -> None:
        self._run = run
        self._afterwards = afterwards
        self._waiting: Waiting[_Ticket[Q, A]] = Waiting(rows_max, queue_rows)
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._batch_s = 0.0  # moving mean of a batch's duration

    @property
    def waiting_rows(self) -> int:
        return self._waiting.rows

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self) -> None:
        """End after the batch at hand; those still waiting get `Unavailable`."""
        self._stopping = True
        self._arrived.set()
        if self._task:
            await asyncio.gather(self._task, return_exceptions=True)
        while batch := self._waiting.take():
            for ticket in batch:
                _settle(ticket.future, Unavailable("the server is stopping"))

    async def submit(self, request: Q, rows: int) -> A:
        """Wait for the answer to a request.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the batcher is not running.
        """
        if self._stopping or not self._task or self._task.done():
            raise Unavailable("the server is not running")
        ticket = _Ticket(request, asyncio.get_running_loop().create_future())
        if not self._waiting.offer(ticket, rows):
            waiting = self._waiting
            raise Overloaded(
                f"{waiting.rows} rows are waiting, and these {rows} would pass the limit of {waiting.queue_rows} "
                "(batching.queue_rows); try again later",
                max(0.1, self._batch_s * waiting.batches),
            )
        self._arrived.set()
        return cast(A, await ticket.future)

    async def _loop(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await self._arrived.wait()
            if self._stopping:
                return
            batch = [ticket for ticket in self._waiting.take() if not ticket.future.done()]
            if not self._waiting.rows:
                self._arrived.clear()
            if not batch:
                continue
            began_s = clock()
            requests = [ticket.request for ticket in batch]
            try:
                answers = await self._run(requests)
                if len(answers) != len(batch):
                    raise RuntimeError(f"{len(answers)} answers to {len(batch)} requests")
            except Exception as error:  # noqa: BLE001  # every caller is told, and the loop lives on
                for ticket in batch:
                    _settle(ticket.future, error)
                continue
            except asyncio.CancelledError:
                for ticket in batch:
                    _settle(ticket.future, Unavailable("the server is stopping"))
                raise
            for ticket, answer in zip(batch, answers, strict=True):
                if not ticket.future.done():
                    ticket.future.set_result(answer)
            if self._afterwards:
                try:
                    await self._afterwards(requests, answers)
                except Exception:  # the answers are out, and the loop lives on
                    log.exception("what follows a batch of %d requests failed", len(batch))
            self._batch_s += 0.1 * (clock() - began_s - self._batch_s)


def _settle(future: "asyncio.Future[A]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
