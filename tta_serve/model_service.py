"""The use cases around one model, whatever its task: look at streams, command them. Knows nothing of HTTP or Ray."""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from tta_serve.errors import InvalidInput, NotFound, TooLarge, Unavailable
from tta_serve.judging import Learned
from tta_serve.metrics import Metrics
from tta_serve.receipts import Receipt
from tta_serve.states import States
from tta_serve.streams import StreamRecord
from tta_serve.sync import Health, Sync
from tta_serve.views import StreamHistory, StreamPage, StreamView, check_stream, history_of
from tta_serve.watch import Reading

log = logging.getLogger(__name__)

T = TypeVar("T")

EVERYWHERE_S = 5.0  # that a command waits for other replicas; their leases may last longer
EVERYWHERE_POLL_S = 0.02


class Commanded(NamedTuple):
    """What came of a command."""

    view: StreamView
    number: int = 0  # of the change in the store
    waiting: tuple[str, ...] = ()  # live replicas that it had not reached in `EVERYWHERE_S`


class Deleted(NamedTuple):
    """What came of a deletion."""

    receipt: Receipt | None  # of what the stream had told; None where nothing here learns from labels
    number: int = 0
    waiting: tuple[str, ...] = ()


class Limits(NamedTuple):
    """What one request may hold."""

    image_pixels: int
    images_per_request: int
    request_pixels: int = 2**63  # of all images of a request; of detectors, whose images keep their sizes


class ModelService(ABC):
    """One model's streams and what all its requests share.

    Args:
        states: of its streams.
        labels: names of its classes.
        metrics: where everything is counted.
        mode: `sync`, `async`, `labels` or `frozen`.
        limits: of one request.
    """

    def __init__(self, states: States, labels: tuple[str, ...], metrics: Metrics, *, mode: str, limits: Limits) -> None:
        self.labels = labels
        self.metrics = metrics
        self.mode = mode
        self.limits = limits
        self.sync: Sync | None = None  # with the store that other replicas share; None: there is none
        self._states = states
        self._decoders = ThreadPoolExecutor(2, "tta-decode")
        self._store_threads = ThreadPoolExecutor(
            4, "tta-store"
        )  # its waiting must not keep pictures waiting, nor they it
        self._running = False

    @abstractmethod
    async def start(self) -> None:
        """Open for requests."""

    @abstractmethod
    async def stop(self) -> None:
        """Close; a forward or step at hand is finished first."""

    @property
    @abstractmethod
    def waiting_rows(self) -> int:
        """Rows that wait for a forward."""

    @abstractmethod
    def pending_rows(self, stream: str | None = None) -> int:
        """Rows that wait or are being learned from, of one stream or of all."""

    @abstractmethod
    def drop_pending(self, stream: str) -> None:
        """Drop what waits of a stream."""

    def reading(self, stream: str) -> Reading | None:  # noqa: ARG002  # for those that look at their streams
        """The last check of a stream; None before the first."""
        return None

    def gated(self, stream: str) -> bool:  # noqa: ARG002
        """Whether a stream is spared its steps because it is like the source."""
        return False

    def new_id(self) -> str:
        """A name for a prediction whose request has none; no two replicas make the same."""
        return f"{self.metrics.replica}-{uuid.uuid4().hex}"

    @property
    def ready(self) -> bool:
        return self._running

    @property
    def health(self) -> Health:
        """How this replica stands with the store."""
        return self.sync.health if self.sync else Health(None, False, 0.0)

    def version_text(self, version: int, unsynced: int) -> str:
        """A state's version as users see it: `12`, or `12+3@replica` with three changes that the store has not."""
        if self.sync is None or not unsynced:
            return str(version)
        return f"{version - unsynced}+{unsynced}@{self.metrics.replica}"

    async def start_syncing(self) -> None:
        """Get in step with the store, and stay with it."""
        if self.sync is not None:
            await asyncio.to_thread(self.sync.start)

    async def stop_syncing(self) -> None:
        """Give the store what it does not have."""
        if self.sync is not None:
            began_s = time.monotonic()
            given = await asyncio.to_thread(self.sync.stop)
            log.warning("gave the store the last of %d streams in %.2f s", given, time.monotonic() - began_s)

    async def version_of(self, stream: str) -> str:
        """The version of a stream's present state, as users see it.

        Raises:
            NotFound: no such stream.
        """
        record = self._states.find(stream)
        if record is None:
            record = await self.with_store(lambda: self._states.record(stream))
        return self.version_text(record.version, record.unsynced)

    async def begin(self, stream: str) -> StreamRecord | None:
        """Begin a stream, or load it, so that the thread that answers need not: see `States.begin`."""
        self.check_running()
        if self._states.find(stream) is not None:
            return None
        return await self.with_store(lambda: self._states.begin(stream))

    async def everywhere(self, number: int) -> tuple[str, ...]:
        """Wait until a change has reached all live replicas; those that it has not after `EVERYWHERE_S`."""
        sync, until_s = self.sync, time.monotonic() + EVERYWHERE_S
        waiting: Sequence[str] = ("unknown",)
        while sync is not None and number:
            try:
                waiting = await self.with_store(lambda: sync.reached(number))
            except Unavailable:  # the command is done all the same; who has followed cannot be known now
                log.exception("who has followed the change %d cannot be asked", number)
            if not waiting:
                break
            if time.monotonic() > until_s:
                return tuple(waiting)
            await asyncio.sleep(EVERYWHERE_POLL_S)
        return ()

    def check_running(self) -> None:
        """Raise unless requests are taken."""
        if not self._running:
            raise Unavailable("the server is not running")

    async def off_loop(self, call: Callable[[], T]) -> T:
        """Run something slow beside the event loop, where pictures are decoded.

        Raises:
            Unavailable: the service is stopping.
        """
        return await self._on(self._decoders, call)

    async def with_store(self, call: Callable[[], T]) -> T:
        """Run something that may have to wait for the store beside the event loop.

        Raises:
            Unavailable: the service is stopping.
        """
        return await self._on(self._store_threads, call)

    def check_count(self, count: int) -> None:
        """Raise unless a request may hold that many images."""
        if count < 1:
            raise InvalidInput("the request holds no image")
        if count > self.limits.images_per_request:
            raise TooLarge(
                f"{count} images in one request; the limit is {self.limits.images_per_request} "
                "(limits.images_per_request)"
            )

    def streams(self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()) -> StreamPage:
        """A page of the streams whose names begin with `prefix` and with none of `without`."""
        lines, total = self._states.page(limit, offset, prefix, without=without)
        views = []
        for line in lines:
            with contextlib.suppress(NotFound):  # deleted since
                views.append(self.view(line.stream))
        return StreamPage(views, total)

    def view(self, stream: str) -> StreamView:
        """A stream as it stands.

        Raises:
            InvalidInput, NotFound: a bad name; no such stream.
        """
        check_stream(stream)
        record, reading = self._states.record(stream), self.reading(stream)
        forgetting, forgetting_error = record.forgetting or (None, None)
        return StreamView(
            stream=stream,
            mode=self.mode,
            version=record.version - record.unsynced if self.sync else record.version,
            unsynced=record.unsynced if self.sync else 0,
            incarnation=record.incarnation,
            steps=record.steps,
            seen=record.seen,
            reliable=record.reliable,
            selected=record.selected,
            selected_share=record.selected / record.seen if record.seen else None,
            refused=record.refused,
            trips=record.trips,
            frozen=record.frozen,
            gated=self.gated(stream),
            entropy=record.entropy,
            drift=reading.drift if reading and math.isfinite(reading.drift) else None,
            flip_rate=reading.flip_rate if reading and math.isfinite(reading.flip_rate) else None,
            forgetting=forgetting,
            forgetting_standard_error=forgetting_error if math.isfinite(forgetting_error or 0.0) else None,
            pending_rows=self.pending_rows(stream),
            versions=(0, *record.kept),
            resident=self._states.find(stream) is not None,
            state_bytes=self._states.bytes_of(stream),
        )

    def history(self, stream: str) -> StreamHistory:
        """What happened to a stream, and the versions that are kept of it.

        Raises:
            InvalidInput, NotFound: a bad name; no such stream.
        """
        check_stream(stream)
        record = self._states.record(stream)
        return history_of(stream, record, (0, *record.kept))

    async def reset(self, stream: str) -> Commanded:
        """Begin a stream's life anew; rows that wait are dropped, here and in the commands below.

        Raises:
            InvalidInput, NotFound: a bad name; no such stream.
            Unavailable: the service is stopping.
        """
        return await self._command(stream, self._states.reset)

    async def freeze(self, stream: str) -> Commanded:
        """Let a stream answer as it does now, and learn nothing until `resume`.

        Raises:
            InvalidInput, NotFound, Unavailable: see `reset`.
        """
        return await self._command(stream, self._states.freeze)

    async def resume(self, stream: str) -> Commanded:
        """Let a frozen stream learn again.

        Raises:
            InvalidInput, NotFound, Unavailable: see `reset`.
        """
        return await self._command(stream, self._states.resume)

    async def rollback(self, stream: str, version: int) -> Commanded:
        """Go back to the state of an earlier version, under a new version.

        Raises:
            InvalidInput: a bad name.
            NotFound: no such stream, or the version is not kept.
            Unavailable: the version cannot be read, or the service is stopping.
        """
        return await self._command(stream, lambda stream: self._states.rollback(stream, version))

    async def delete(self, stream: str) -> Deleted:
        """Forget a stream.

        Raises:
            InvalidInput, NotFound, Unavailable: see `reset`.
        """
        check_stream(stream)
        number = await self.with_store(lambda: self._states.delete(stream))
        self.drop_pending(stream)
        return Deleted(None, number, await self.everywhere(number))

    async def _command(self, stream: str, command: Callable[[str], tuple[StreamRecord, int]]) -> Commanded:
        check_stream(stream)
        _, number = await self.with_store(lambda: command(stream))
        self.drop_pending(stream)
        waiting = await self.everywhere(number)
        return Commanded(await self.with_store(lambda: self.view(stream)), number, waiting)

    def metrics_text(self) -> str:
        """Prometheus text, gauges read now."""
        names = self._states.names()
        health = self.health
        self.metrics.set("tta_store_ok", health.degraded is None)
        self.metrics.set("tta_cut_off", health.cut_off)
        self.metrics.set("tta_snapshot_lag_seconds", health.behind_s)
        self.metrics.set("tta_waiting_rows", self.waiting_rows)
        self.metrics.set("tta_pending_rows", self.pending_rows())
        self.metrics.set("tta_streams", len(names))
        self.metrics.set("tta_state_bytes", self._states.bytes())
        return self.metrics.text()

    def count_learned(self, learned: Sequence[Learned], took_s: float) -> None:
        """Count a step of some streams that took so long."""
        self.metrics.observe("tta_stage_seconds", took_s, stage="learn")
        for each in learned:
            self.metrics.count("tta_steps_total", result=each.result)
            for guard in each.trips:
                self.metrics.count("tta_guard_trips_total", guard=guard)
            if each.result in ("stale", "frozen", "gated"):  # no step was taken
                self.count_skipped(each.seen, each.result)
                continue
            self.metrics.count("tta_learned_rows_total", each.seen)
            self.metrics.count("tta_selected_rows_total", each.selected)
            if each.result in ("applied", "filtered") and math.isfinite(each.entropy):
                self.metrics.set("tta_entropy_nats", each.entropy)

    def observe_batch(self, asked_s: Sequence[float], began_s: float, rows: int, streams: int) -> None:
        """Count a forward that ends now.

        Args:
            asked_s: when each of its requests came.
            began_s: when it began.
            rows: in it.
            streams: in it.
        """
        for each_s in asked_s:
            self.metrics.observe("tta_stage_seconds", began_s - each_s, stage="queue")
        self.metrics.observe("tta_stage_seconds", time.monotonic() - began_s, stage="predict")
        self.metrics.observe("tta_batch_rows", rows)
        self.metrics.observe("tta_batch_streams", streams)

    def count_skipped(self, rows: int, reason: str) -> None:
        """Count rows that were not learned from."""
        self.metrics.count("tta_skipped_rows_total", rows, reason=reason)

    async def _on(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, call)
        except asyncio.CancelledError:
            if self._running:
                raise  # the caller has left
            raise Unavailable("the server is stopping") from None
        except RuntimeError as error:
            if not self._running and "shutdown" in str(error):
                raise Unavailable("the server is stopping") from None
            raise
