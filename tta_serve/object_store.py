"""Streams in a bucket, by URL: for replicas on several machines, with no database beside it.

Below the URL's folder lies, of each model::

    MODEL/generations/GENERATION/heads/STREAM            the head, with its snapshot
    MODEL/generations/GENERATION/kept/STREAM/VERSION-…   a version to roll back to
    MODEL/changes/NUMBER                                 what has changed (`object_log.py`)
    MODEL/members/REPLICA                                a lease
    MODEL/floor                                          the last number that was dropped

A head is replaced by a put whose condition is the entity tag of the head that was compared. Each put has a name of its
own in the content: so no entity tag comes back, and a writer whose answer was lost recognises its own work.

**A writer may die anywhere.** Before it replaces heads it writes down, under the change's number, which ones, and which
objects come and go with them: the change is *open*. Afterwards it *settles* the change. Whoever reads an open change
looks at the heads. One that has this number, or a greater one, is as it will be. One that has a smaller number may
still be replaced: the reader says that it knows the changes before this one, no more, and looks again. When it has
found a change open for `GRACE_S`, it puts the head there anew, as it is, on the condition that nobody else has: then
the writer's condition does not hold any more, should it still live, and the reader settles the change in its place,
and takes away the objects that no head names. So no change is passed over, no two clocks are compared, and nobody
waits for the dead for long. A reader that slept for so long that changes were dropped looks at all heads.

**What a deleted stream leaves.** Its head becomes a tombstone of some 200 bytes, and the kept versions are deleted.
A tombstone becomes void when it is pruned (no stream, but an object), and a void object is deleted when it is pruned:
services delete without conditions, so an object that may be replaced at any moment is never deleted. Who begins a
stream anew in the very instant in which its void object, an hour old, is deleted, loses that save, and begins again
with the next.

**Buckets with versions keep everything.** There, what a put replaces and a delete takes away stays as a *noncurrent
version*. So what a stream had learned outlives its deletion, and each save costs room, until a lifecycle rule expires
such versions. Where a bucket of S3 or Azure is found to have them, the log says so at the start (Google's service does
not tell). The rule for S3 (`aws s3api put-bucket-lifecycle-configuration`)::

    {"Rules": [{"ID": "tta-serve", "Status": "Enabled", "Filter": {"Prefix": "FOLDER/"},
      "NoncurrentVersionExpiration": {"NoncurrentDays": 1}, "Expiration": {"ExpiredObjectDeleteMarker": true}}]}

Google: `gcloud storage buckets update gs://BUCKET --no-versioning --clear-soft-delete`. Azure: a lifecycle rule with
`version: {delete: {daysAfterCreationGreaterThan: 1}}`, and soft delete of blobs switched off.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tta_serve.errors import NotFound, Unavailable
from tta_serve.object_bucket import Bucket
from tta_serve.object_changes import Follower, together
from tta_serve.object_format import ALIVE, SETTLED, Change, Unreadable, segment
from tta_serve.object_heads import ATTEMPTS, Heads, Place, Plan, contended, unique, unreadable
from tta_serve.object_log import SPAN, ChangeLog, number_of
from tta_serve.store import Changes, Head, Member, Save, Stored

log = logging.getLogger(__name__)

CONNECTIONS = 16  # requests at once


class ObjectStore:
    """A `Store` in a bucket. Making one connects to nothing.

    Args:
        url: `s3://BUCKET/FOLDER`, `gs://…`, `az://…`; `memory://NAME` for tests.
        model: its name.
        generation: digest of the model and of the adapters that give its states their meaning.
        timeout_s: of a request.
        allow_http: that requests are not encrypted.
        options: of the service, in obstore's words; others are taken from the environment.
        clock: monotonic seconds, by which an open change ages.

    Raises:
        ConfigError: states cannot live at this URL.
    """

    def __init__(
        self,
        url: str,
        model: str,
        generation: str,
        *,
        timeout_s: float = 5.0,
        allow_http: bool = False,
        options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = Bucket(url, timeout_s=timeout_s, allow_http=allow_http, options=options)
        self._generation = generation
        self._members = f"{segment(model)}/members"
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="tta-objects")
        self._heads = Heads(self._bucket, segment(model))
        self._log = ChangeLog(self._bucket, segment(model))
        self._follower = Follower(self._log, self._heads, generation, self._threads, clock)

    def load(self, stream: str) -> Head | None:
        return self._heads.load(Place(self._generation, stream))

    def load_kept(self, stream: str, version: int) -> bytes:
        found = self._heads.load_kept(Place(self._generation, stream), version)
        if found is None:
            raise NotFound(f"version {version} of the stream {stream!r} is not kept; its history lists those that are")
        return found

    def save(self, saves: Sequence[Save]) -> list[int | None]:
        numbers: list[int | None] = []
        while len(numbers) < len(saves):
            numbers += self._save(self._generation, _distinct(saves[len(numbers) :]))
        return numbers

    def page(
        self, limit: int, offset: int = 0, prefix: str = "", *, without: tuple[str, ...] = ()
    ) -> tuple[list[Stored], int]:
        places = sorted(
            place
            for place, state in self._heads.places(self._generation)
            if state == ALIVE and place.stream.startswith(prefix) and not place.stream.startswith(without)
        )
        lines = together(self._threads, self._heads.line, places[offset : offset + limit])
        return [line for line in lines if line is not None], len(places)

    def count(self) -> int:
        return sum(state == ALIVE for _, state in self._heads.places(self._generation))

    def changes(self, since: int) -> Changes:
        return self._follower.changes(since)

    def announce(self, kind: str, detail: str) -> int:
        return number_of(self._log.claim(Change(unique(), time.time(), notice=(kind, detail)), SETTLED))

    def erase_elsewhere(self, stream: str) -> int:
        erased = 0
        for generation in self._heads.generations():
            for _ in range(ATTEMPTS if generation != self._generation else 0):
                seen = self._heads.start(Place(generation, stream))
                if seen is None or seen.start.state != ALIVE:
                    break
                tombstone = Head(seen.start.incarnation + 1, 0, {}, None, gone=True)
                if self._save(generation, [Save(stream, seen.start.tag, tombstone)]) != [None]:
                    erased += 1
                    break
            else:
                if generation != self._generation:
                    raise contended(stream)
        return erased

    def renew(self, replica: str, lease_s: float, seen: int, address: str = "") -> None:
        self._log.prepare()
        member = Member(replica, time.time() + lease_s, seen, address)
        self._bucket.put(self._member_path(replica), json.dumps(member).encode())

    def members(self) -> list[Member]:
        now_s = time.time()
        return [member for _, member in self._all_members() if member.until_s > now_s]

    def leave(self, replica: str) -> None:
        self._bucket.delete(self._member_path(replica))

    def prune(self, older_s: float) -> int:
        before_s = time.time() - older_s
        self._follower.prune(before_s)
        for path, member in self._all_members():
            if member.until_s < before_s:
                self._bucket.delete(path)
        places = [
            place
            for generation in self._heads.generations()
            for place, state in self._heads.places(generation)
            if state != ALIVE
        ]
        return sum(together(self._threads, lambda place: self._heads.void(place, before_s), places))

    def close(self) -> None:
        self._threads.shutdown()

    def _save(self, generation: str, saves: Sequence[Save]) -> list[int | None]:
        """Heads of different streams, which change together."""
        write = unique()
        plans = together(self._threads, lambda save: self._heads.plan(generation, save, write), saves)
        kept = [plan for plan in plans if plan is not None]
        if not kept:
            return [None] * len(saves)
        change = Change(write, time.time(), tuple(plan.entry() for plan in kept))
        key = self._log.claim(change)
        numbers = [number_of(key, place, len(kept)) for place in range(len(kept))]
        won = together(self._threads, lambda each: self._heads.replace(*each), zip(kept, numbers, strict=True))
        try:
            together(self._threads, lambda each: self._tidy(*each), zip(kept, won, strict=True))
            entries = tuple(entry._replace(won=yes) for entry, yes in zip(change.entries, won, strict=True))
            self._log.settle(key, change._replace(entries=entries))
        except Unavailable as error:  # what is saved is saved; whoever reads the change settles it
            log.warning("a change was left open: %s", error)
        outcome = iter(number if yes else None for number, yes in zip(numbers, won, strict=True))
        return [None if plan is None else next(outcome) for plan in plans]

    def _tidy(self, plan: Plan, won: bool) -> None:
        """Delete the objects of kept versions that no head names now."""
        self._heads.drop(plan.place, plan.dropped if won else plan.put)

    def _all_members(self) -> list[tuple[str, Member]]:
        paths = [f"{self._members}/{each.name}" for each in self._bucket.objects(self._members)]
        found = zip(paths, together(self._threads, self._bucket.get, paths), strict=True)
        return [(path, self._member(path, read.content)) for path, read in found if read is not None]

    def _member(self, path: str, content: bytes) -> Member:
        try:
            return Member(*json.loads(content))
        except (ValueError, TypeError) as error:
            raise unreadable(self._bucket, path, Unreadable(str(error))) from None

    def _member_path(self, replica: str) -> str:
        return f"{self._members}/{segment(replica)}"


def _distinct(saves: Sequence[Save]) -> Sequence[Save]:
    """The first saves, as many as can change together: no stream twice."""
    streams: set[str] = set()
    for place, save in enumerate(saves[:SPAN]):
        if save.stream in streams:
            return saves[:place]
        streams.add(save.stream)
    return saves[:SPAN]
