"""The live heads of one model: what each stream was told, and what all were told, ready to be read.

The feedback log is the truth, and every state is a function of it: one that is not at hand is made from its entries.
Views are read by the thread that predicts; everything that changes runs in one other thread.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters import tree
from adapters.heads import AnyHead, Items, NeverLearned
from tta_serve.audit import Change, Scope
from tta_serve.cache import Cache
from tta_serve.errors import TooLarge, Unavailable
from tta_serve.feedback_log import Beyond, Entry, FeedbackLog, New, OfClass, OfIds, OfStream, Where
from tta_serve.receipts import Receipt

log = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20  # of states, and again of tables: those used longest ago are made anew when they are needed


class Owner(NamedTuple):
    """Whose state: a stream's own, or what the streams of a namespace share."""

    scope: Scope
    name: str


class Part(NamedTuple):
    """A state, and what must be known of it beside."""

    state: Any
    version: int  # the number of the change that made it; 0: nothing was ever told
    names: Mapping[int, str]  # of its added classes
    images: Mapping[int, int]  # labels of each of its classes


class View(NamedTuple):
    """What one stream's images are read with."""

    table: Any
    added: tuple[str, ...]  # names of the classes behind the model's own, in order
    version: int  # of the last change to what it is made of
    parts: tuple[Part, ...] = ()
    nbytes: int = 0  # of its own, beside what it shares with the view of those that told nothing for themselves


class Told(NamedTuple):
    """One image whose class somebody told."""

    id: str
    place: int
    label: str
    code: Tensor  # int16 [n], on the host
    right: bool | None  # whether the prediction said so


class Heads:
    """The heads of one model's streams.

    Args:
        head: the algorithm.
        labels: the model's own classes.
        feedback: what was told.
        tenants: whose streams share nothing with others'; a stream `tenant:…` is that tenant's.
        classes_max: added classes of a stream, and of a namespace in common.
        labels_per_class: kept of each class of an owner; the oldest leaves.
        labels_max: kept in all.
        device: where the head computes.
    """

    def __init__(
        self,
        head: AnyHead,
        labels: Sequence[str],
        feedback: FeedbackLog,
        *,
        tenants: frozenset[str] = frozenset(),
        classes_max: int = 100,
        labels_per_class: int = 4096,
        labels_max: int = 100_000,
        device: torch.device | str = "cpu",
    ) -> None:
        self.head = head
        self.labels = tuple(labels)
        self.feedback = feedback
        self._device = torch.device(device)
        self._tenants = tenants
        self._classes_max = classes_max
        self._labels_per_class = labels_per_class
        # where unlearning is learning the rest anew, many go at once, and seldom
        self._slack = 0 if head.order_free else labels_per_class // 8
        self._labels_max = labels_max
        self._numbers = {label: number for number, label in reversed(list(enumerate(self.labels)))}
        empty = head.init()
        self._nothing = Part(empty, 0, {}, {})
        self.untold = View(head.read(empty), (), 0)
        self._lock = threading.RLock()  # for the log, and for what is made from it
        self._parts = Cache[Owner, Part](CACHE_BYTES, lambda part: tree.nbytes(part.state))
        self._views = Cache[Owner, View](CACHE_BYTES, lambda view: view.nbytes)
        self._versions: dict[Owner, int] = {}
        self._told: dict[Owner, int] = {}  # labels kept of each
        self._owners: set[Owner] = set()
        self._behind = False  # of what another process told
        self.load()
        if foreign := feedback.foreign():
            log.warning("%d labels were told for other weights, labels or keys, and have no effect", foreign)

    def load(self) -> None:
        """Make what is in the log ready, so that no prediction waits for it."""
        with self._lock:
            by_owner = self._in_effect(self.feedback.entries())
            self._parts.clear()
            self._views.clear()
            self._owners = set(by_owner)
            self._told = {owner: len(entries) for owner, entries in by_owner.items()}
            self._versions = {owner: self.feedback.last_change(*owner) for owner in by_owner}
            names = {
                namespace: self.feedback.names(namespace)
                for namespace in {entries[0].namespace for entries in by_owner.values()}
            }
            for owner, entries in by_owner.items():
                self._parts.put(owner, self._made_of(owner, entries, names[entries[0].namespace]))

    def refresh(self) -> bool:
        """Look whether another process changed the log: while a replica is replaced, two live at once."""
        with self._lock:
            self._behind = self.feedback.changed_elsewhere() or self._behind
            if not self._behind:
                return False
            log.info("another process changed the feedback log; heads are made anew")
            self.load()
            self._behind = False  # not before: what could not be read must be read at the next look
            return True

    def namespace(self, stream: str) -> str:
        """The tenant whose stream it is; "" where it is none's."""
        tenant, colon, _ = stream.partition(":")
        return tenant if colon and tenant in self._tenants else ""

    def streams(self) -> list[str]:
        """Those that told something."""
        with self._lock:
            return self.feedback.streams()

    def close(self) -> None:
        """Let go of the feedback log; what is made of it can still be read."""
        with self._lock:
            self.feedback.close()

    # -- read ---------------------------------------------------------------------------------------------------------

    def view(self, stream: str) -> View:
        """What this stream is read with; the very same until something changes.

        Raises:
            Unavailable: a state that was not at hand cannot be read from the log.
        """
        parts = self._parts_of(stream)
        # of one that was told something and holds nothing any more, its version counts too
        version = max(
            parts[owner].version if owner in parts else self._versions.get(owner, 0)
            for owner in self._owners_of(stream)
        )
        if not parts:
            return self.untold._replace(version=version) if version else self.untold
        owner = next(reversed(parts))
        known = self._views.get(owner)
        if known is None or known.version != version or not _same(known.parts, parts.values()):
            known = self._made(tuple(parts.values()), known, owner)._replace(version=version)
            self._views.put(owner, known)
        return known

    def view_to_answer(self, stream: str) -> View:
        """As `view`; where that cannot be had the model answers alone: a batch must not fail for one of its streams."""
        try:
            return self.view(stream)
        except Unavailable:
            log.exception("stream %r is answered without its labels", stream)
            return self.untold

    def labels_of(self, stream: str) -> tuple[str, ...]:
        """The classes that this stream can be answered with, by index."""
        return (*self.labels, *self.view(stream).added)

    def number_of(self, label: str) -> int | None:
        """The class's number, if it is one of the model's own; the first, where two have the name."""
        return self._numbers.get(label)

    def _made(self, parts: tuple[Part, ...], before: View | None, owner: Owner) -> View:
        state = parts[0].state
        for part in parts[1:]:
            state = self.head.merge(state, part.state)
        shared = self._views.get(Owner("shared", self.namespace(owner.name))) if owner.scope == "stream" else None
        like = before or shared
        table = self.head.read(state, like.table if like else None)
        self._settle()
        names = {number: name for part in parts for number, name in part.names.items()}
        added = tuple(names[number] for number in table.classes if number >= len(self.labels))
        others = {id(tensor) for tensor in _tensors(shared.table)} if shared else set()
        nbytes = sum(tensor.nbytes for tensor in _tensors(table) if id(tensor) not in others)
        return View(table, added, 0, parts, nbytes)

    def _settle(self) -> None:
        """Before another thread reads it: on a GPU each thread has a CUDA stream of its own."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _parts_of(self, stream: str) -> dict[Owner, Part]:
        """What a stream is read with, its own last; without those that were told nothing."""
        own, shared = self._owners_of(stream)
        return {owner: self._part(owner) for owner in (shared, own) if owner in self._owners}

    def _part(self, owner: Owner) -> Part:
        known = self._parts.get(owner)
        if known is None:
            if owner not in self._owners:
                return self._nothing._replace(version=self._versions.get(owner, 0))
            with self._lock:
                namespace = owner.name if owner.scope == "shared" else self.namespace(owner.name)
                known = self._made_of(owner, self._entries(owner), self.feedback.names(namespace))
                self._parts.put(owner, known)
        return known

    def _made_of(self, owner: Owner, entries: Sequence[Entry], names: Mapping[int, str]) -> Part:
        """The state that some entries make."""
        images = Counter(entry.label for entry in entries)
        own = {number: names[number] for number in images if number >= len(self.labels)}
        return Part(self._replayed(entries), self._versions.get(owner, 0), own, images)

    def _entries(self, owner: Owner) -> list[Entry]:
        if owner.scope == "stream":  # of its namespace as it is now: numbers of classes are a namespace's
            return self.feedback.entries(namespace=self.namespace(owner.name), stream=owner.name, scope="stream")
        return self._in_effect(self.feedback.entries(namespace=owner.name, scope="shared")).get(owner, [])

    def _replayed(self, entries: Sequence[Entry]) -> Any:
        return self.head.learn(self._nothing.state, self._items(entries)) if entries else self._nothing.state

    def _items(self, entries: Sequence[Entry]) -> Items:
        codes = np.stack([np.frombuffer(entry.code, np.int16) for entry in entries])
        classes = torch.tensor([entry.label for entry in entries], dtype=torch.int64)
        return Items(torch.from_numpy(codes).to(self._device), classes.to(self._device))

    def _owners_of(self, stream: str) -> tuple[Owner, Owner]:
        return Owner("stream", stream), Owner("shared", self.namespace(stream))

    # -- learn --------------------------------------------------------------------------------------------------------

    def learn(self, stream: str, scope: Scope, told: Sequence[Told]) -> list[bool]:
        """Learn labels: durable, and in effect for the next prediction, when this returns.

        Args:
            stream: that tells.
            scope: whom it shall change.
            told: the images.

        Returns:
            Of each, whether it was new.

        Raises:
            TooLarge: too many added classes. Nothing was learned, of any item.
            Unavailable: it cannot be kept. Nothing was learned.
        """
        namespace = self.namespace(stream)
        own, shared = self._owners_of(stream)
        owner = own if scope == "stream" else shared
        new = [
            New(
                stream, namespace, scope, each.id, each.place, each.label, self._numbers.get(each.label),
                each.code.numpy().tobytes(), each.right,
            )
            for each in told
        ]  # fmt: skip
        with self._lock:
            self.refresh()
            self._check_room(len(told))
            before = self._part(owner)
            learned = [before.state]

            def changes(entries: Sequence[Entry]) -> list[Change]:
                learned.append(self.head.learn(before.state, self._items(entries)))
                return [Change("learn", namespace, stream, scope, len(entries))]

            kept = self.feedback.append(new, self._classes_max, changes)
            if len(learned) > 1:
                names = dict(before.names)
                images = Counter(before.images)
                for entry, each in zip(kept, told, strict=True):
                    if entry is not None:
                        images[entry.label] += 1
                        if entry.label >= len(self.labels):
                            names[entry.label] = each.label
                self._publish(owner, learned[-1], names, images)
                for number in {entry.label for entry in kept if entry is not None}:
                    if images[number] > self._labels_per_class + self._slack:
                        self._slide(Beyond(scope, owner.name, number, self._labels_per_class), namespace)
        self.view(stream)  # made here, and not by the thread that predicts
        return [entry is not None for entry in kept]

    def _check_room(self, more: int) -> None:
        """Raise TooLarge where the model would have more labels than it may."""
        told = sum(self._told.values())
        if told + more > self._labels_max:
            raise TooLarge(
                f"{more} more labels, where {told} are kept; the limit is {self._labels_max} "
                "(kv_bottleneck.labels_max): forget some, or delete streams that are gone"
            )

    def _publish(self, owner: Owner, state: Any, names: Mapping[int, str], images: Mapping[int, int]) -> None:
        """Make this the owner's state; of one that holds nothing any more, only its version is left.

        In an order in which whoever looks meanwhile finds the state of before or this one, and its version.
        """
        version = self.feedback.last_change(*owner)
        self._settle()
        if images:
            self._told[owner] = sum(images.values())
            self._parts.put(owner, Part(state, version, names, images))
            self._owners.add(owner)
            self._versions[owner] = version
        else:
            self._versions[owner] = version
            self._told.pop(owner, None)
            self._owners.discard(owner)
            self._parts.drop(owner)

    def has(self, stream: str, id: str, place: int) -> bool:
        """Whether this image was told before."""
        with self._lock:
            return self.feedback.has(stream, id, place)

    # -- forget -------------------------------------------------------------------------------------------------------

    def forget_ids(self, stream: str, ids: Sequence[str]) -> Receipt:
        """Take out exactly what a stream told of some predictions."""
        return self._remove(OfIds(stream, ids), "forget", stream)

    def forget_class(self, stream: str, label: str, *, everywhere: bool = False) -> Receipt:
        """Take out exactly what a stream told of a class, or what all streams of its namespace did."""
        where = OfClass(self.namespace(stream), label, self._numbers.get(label), None if everywhere else stream)
        return self._remove(where, "forget", stream)

    def reset(self, stream: str) -> Receipt:
        """Take out what a stream told for itself; what it told for all stays."""
        return self._ended(stream, self._remove(OfStream(stream, "stream"), "reset", stream))

    def delete(self, stream: str) -> Receipt:
        """Take out all that a stream ever told."""
        return self._ended(stream, self._remove(OfStream(stream), "delete", stream))

    def _ended(self, stream: str, receipt: Receipt) -> Receipt:
        """The stream's next life begins as one that was never told anything."""
        self._versions.pop(Owner("stream", stream), None)
        return receipt

    def _slide(self, window: Beyond, namespace: str) -> None:
        """Unlearn the oldest labels of a class that has too many; the new one is kept whatever comes of it."""
        owner = Owner(window.scope, window.owner)
        try:
            found = self.feedback.find(window)
            state = self._without(owner, found.entries)
            note = f"the window of {window.keep} labels"
            stream = window.owner if window.scope == "stream" else None
            change = Change("slide", namespace, stream, window.scope, len(found.entries), note=note)
            self.feedback.remove(found, [change], vacuum=False)
            self._publish(owner, state, *self._left(owner, found.entries))
        except Unavailable:
            log.exception("the oldest labels of class %d stay for now", window.label)

    def _left(self, owner: Owner, gone: Sequence[Entry]) -> tuple[Mapping[int, str], Mapping[int, int]]:
        """Names and labels of an owner's classes once some entries are gone."""
        part = self._part(owner)
        images = +(Counter(part.images) - Counter(entry.label for entry in gone))
        return {number: name for number, name in part.names.items() if number in images}, images

    def _remove(self, where: Where, what: str, stream: str) -> Receipt:
        with self._lock:
            self.refresh()
            found = self.feedback.find(where)
            by_owner = self._in_effect(found.entries)
            inert = len(found.entries) - sum(map(len, by_owner.values()))
            owners = sorted(by_owner)
            names = self._names(found.entries)
            before = [self._part(owner).state for owner in owners]
            rest = [self._rest(owner, by_owner[owner]) for owner in owners]
            anew = [self._replayed(entries) for entries in rest]
            # learning the rest anew is the proof, and where unlearning is just that, there is nothing to compare with
            after = [self._without(owner, by_owner[owner]) for owner in owners] if self.head.order_free else anew
            verified = [tree.digest(state) for state in after] == [tree.digest(state) for state in anew]
            if not verified:  # the items that are left are the truth
                log.error("unlearning %d items left a trace in the state; it is made anew", len(found.entries))
                after = anew
            changes = [
                Change(what, self.namespace(stream), stream, owner.scope, len(by_owner[owner]), *digests)
                for owner, *digests in zip(owners, map(tree.digest, before), map(tree.digest, after), strict=True)
            ]
            if without_effect := len(found.foreign) + inert:
                note = "that had no effect"
                changes.append(Change(what, self.namespace(stream), stream, None, without_effect, note=note))
            left = [self._left(owner, by_owner[owner]) for owner in owners]
            removed = self.feedback.remove(found, changes)
            for owner, state, of_owner in zip(owners, after, left, strict=True):
                self._publish(owner, state, *of_owner)
            # what a view of another stream holds of shared labels goes too
            self._views.drop_where(lambda view: any(part.state is old for part in view.parts for old in before))
            gone = names - self._names(found.entries)
            self.view(stream)
        return Receipt(
            len(removed.entries) - inert,
            removed.foreign + inert,
            tuple(sorted({name for _, name in gone})),
            tree.digest(tuple(before)),
            tree.digest(tuple(after)),
            verified,
            removed.residue,
        )

    def _without(self, owner: Owner, entries: Sequence[Entry]) -> Any:
        """An owner's state without some entries."""
        if not self.head.order_free or not entries:  # the former's unlearning is learning the rest anew
            return self._replayed(self._rest(owner, entries))
        items = self._items(entries)
        try:
            return self.head.unlearn(self._part(owner).state, items, Items(items.codes[:0], items.classes[:0]))
        except NeverLearned:  # another process told some of them since this was last looked at
            log.warning("%s was not what the feedback log says; it is made anew", owner)
            return self._replayed(self._rest(owner, entries))

    def _rest(self, owner: Owner, gone: Sequence[Entry]) -> list[Entry]:
        without = {entry.seq for entry in gone}
        return [entry for entry in self._entries(owner) if entry.seq not in without]

    def _in_effect(self, entries: Sequence[Entry]) -> dict[Owner, list[Entry]]:
        """By whose state they are in; without those that were told before tenants changed."""
        found: dict[Owner, list[Entry]] = {}
        for entry in entries:
            if entry.namespace == self.namespace(entry.stream):
                name = entry.stream if entry.scope == "stream" else entry.namespace
                found.setdefault(Owner(entry.scope, name), []).append(entry)
        return found

    def _names(self, entries: Sequence[Entry]) -> set[tuple[str, str]]:
        """Added classes of the namespaces of these, as they are now."""
        return {
            (namespace, name)
            for namespace in {entry.namespace for entry in entries}
            for name in self.feedback.names(namespace).values()
        }


def _same(some: Iterable[Part], others: Iterable[Part]) -> bool:
    """Whether they are the very same."""
    return list(map(id, some)) == list(map(id, others))


def _tensors(table: Any) -> Iterator[Tensor]:
    """Those in a table, which may hold other things too."""
    if isinstance(table, Tensor):
        yield table
    elif isinstance(table, tuple):
        for part in table:
            yield from _tensors(part)
