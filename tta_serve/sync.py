"""A replica keeps in step with the store: a thread that gives what was learned, takes what others changed, and keeps a
lease.

Each tick it looks whether anything has changed (a number, which costs next to nothing), follows it and says so beside
its lease, so that whoever gave a command need not wait for long. Each interval it also gives the store what was
learned.

The lease is counted from before it was asked for, by this machine's own clock, so that a replica knows of its end
before anybody else does. Past it, others may have deleted streams without waiting for this one: it answers with the
frozen model and learns nothing until it has caught up.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from tta_serve.durable import COMMANDED
from tta_serve.errors import Unavailable
from tta_serve.metrics import Metrics
from tta_serve.states import States

log = logging.getLogger(__name__)

TICK_S = 0.05
LEASE_INTERVALS = 10  # a lease is so many sync intervals long …
LEASE_MIN_S = 10.0  # … and no shorter
COUNT_EVERY_S = 10.0  # streams of others, toward the limit
PRUNE_EVERY_S = 600.0
PRUNE_LEASES = 10  # tombstones are kept for so many leases, and not less than an hour
PRUNE_MIN_S = 3600.0


class Health(NamedTuple):
    """How a replica stands with the store."""

    degraded: str | None  # why nothing can be saved now; None: it can
    cut_off: bool  # for longer than the lease: answers are the frozen model's
    behind_s: float  # since everything learned before was in the store


class Sync:
    """The thread.

    Args:
        states: the streams at hand.
        interval_s: between two savings.
        tick_s: between two looks at what others changed.
        metrics: where savings are counted.
        refresh: called before changes are acknowledged, for what is kept elsewhere (labels).
    """

    def __init__(
        self,
        states: States,
        interval_s: float,
        metrics: Metrics,
        *,
        tick_s: float = TICK_S,
        refresh: Callable[[], object] | None = None,
    ) -> None:
        self.interval_s = interval_s
        self.lease_s = max(LEASE_MIN_S, LEASE_INTERVALS * interval_s)
        self._states = states
        self._durable = states.durable
        self._durable.interval = lambda: int(time.time() / interval_s)
        self._store = states.durable.store
        self._metrics = metrics
        self._tick_s = min(tick_s, interval_s)
        self._refresh = refresh
        self._seen = -1  # the number up to which all changes are known; -1: nothing was looked at yet
        self._synced_s = time.monotonic()
        self._pruned_s = time.monotonic()
        self._count_s = self._pruned_s
        self._degraded: str | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def health(self) -> Health:
        return Health(self._degraded, self._states.cut_off, max(0.0, time.monotonic() - self._synced_s))

    def start(self) -> None:
        """Get in step, or begin degraded, and stay with it."""
        self._states.lease_until_s = -math.inf  # until the store was reached once
        self.sync()
        self._thread = threading.Thread(target=self._run, name="tta-sync", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Give the store what it does not have, and end the lease.

        Returns:
            Of how many streams it was given something.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        given = 0
        try:
            given = self._flush()
            self._store.leave(self._durable.replica)
        except Unavailable as error:
            log.error("what %d streams learned last is lost: %s", len(self._states.ahead()), error)
        self._store.close()
        return given

    def others(self) -> bool:
        """Whether another replica lives.

        Raises:
            Unavailable: the store cannot say.
        """
        return any(each.replica != self._durable.replica for each in self._store.members())

    def announce(self, kind: str, detail: str = "") -> int:
        """Give notice to all replicas; the number to wait for.

        Raises:
            Unavailable: the store is.
        """
        return self._store.announce(kind, detail)

    def reached(self, number: int) -> list[str]:
        """The live replicas that a change has not reached yet.

        Raises:
            Unavailable: the store cannot say.
        """
        me = self._durable.replica
        return [each.replica for each in self._store.members() if each.replica != me and each.seen < number]

    def _run(self) -> None:
        next_s = time.monotonic() + self.interval_s
        while not self._stopping.wait(self._tick_s):
            began_s = time.monotonic()
            due = began_s >= next_s
            try:
                self.sync() if due else self.follow()
            except Exception as error:  # the thread must live, or nothing is ever saved again
                log.exception("keeping in step with the store failed")
                self._failed(error)
            if due:  # what is learned while it takes long is saved no later for that
                took_s = time.monotonic() - began_s
                next_s = began_s + max(self.interval_s - took_s, self.interval_s / 2)

    def sync(self) -> None:
        """Take, give, and stay."""
        began_s = time.monotonic()
        try:
            if self._states.cut_off:  # from now on commands wait for this replica; then see what it has missed
                self._let_go_of_what_is_old()
                self._store.renew(self._durable.replica, self.lease_s, self._seen)
            self._durable.alone = not self.others()
            self._catch_up()
            if self._refresh:  # what is kept elsewhere changes without a number, too
                self._refresh()
            self._renew()
            self._flush()
            self._prune()
        except Unavailable as error:
            self._failed(error)
            return
        self._synced_s = began_s
        if self._degraded is not None:
            log.warning("the store can be reached again")
        self._degraded = None
        self._metrics.observe("tta_sync_seconds", time.monotonic() - began_s)

    def follow(self) -> None:
        """Take what others changed, and say so."""
        if self._degraded is not None:  # each attempt may take as long as the store waits: once an interval will do
            return
        try:
            before = self._seen
            if self._catch_up() or before != self._seen:
                self._renew()
        except Unavailable as error:
            self._failed(error)

    def _catch_up(self) -> bool:
        """Whether anything of others had to be followed."""
        changes = self._store.changes(self._seen)
        if changes.number == self._seen:
            return False
        if changes.number < self._seen:  # another file stands there, or an older copy of this one
            changes = self._store.changes(0)
        if self._seen >= 0:
            self._states.take_in(changes)
        if self._refresh:
            self._refresh()
        self._states.flush([notice.detail for notice in changes.notices if notice.kind == COMMANDED])
        self._seen = changes.number
        return True

    def _flush(self) -> int:
        given = self._states.flush()
        if time.monotonic() >= self._count_s:
            self._states.known = self._store.count()
            self._count_s = time.monotonic() + COUNT_EVERY_S
        return given

    def _renew(self) -> None:
        began_s = time.monotonic()
        self._store.renew(self._durable.replica, self.lease_s, self._seen)
        self._states.lease_until_s = began_s + self.lease_s

    def _let_go_of_what_is_old(self) -> None:
        """Tombstones may have been pruned that this replica has never seen: then nothing at hand can be trusted."""
        if self._seen >= 0 and time.monotonic() - self._states.lease_until_s > PRUNE_MIN_S / 2:
            log.error("the store was out of reach for so long that everything is loaded anew")
            self._states.let_go()

    def _prune(self) -> None:
        now_s = time.monotonic()
        if now_s - self._pruned_s >= PRUNE_EVERY_S:
            self._store.prune(max(PRUNE_MIN_S, PRUNE_LEASES * self.lease_s))
            self._pruned_s = now_s

    def _failed(self, error: Exception) -> None:
        self._metrics.count("tta_store_failures_total")
        if self._degraded is None:
            log.error("nothing can be saved: %s", error)  # a reason, not a traceback
        self._degraded = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
