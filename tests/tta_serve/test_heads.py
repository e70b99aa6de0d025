"""Live heads above a real feedback log: whatever was told and forgotten, they are what the items that are left make."""

import gc
import logging
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import tree
from adapters.class_means import ClassMeans, fit_class_means
from adapters.flat_keys import FlatKeysConfig, fit_flat_keys
from adapters.heads import AnyHead, Items
from adapters.keys import Keys, KeysConfig, fit_keys
from adapters.kv_bottleneck import Counts, CountsState
from adapters.kv_gradient import KVGradient
from adapters.ridge import Ridge, fit_ridge
from tta_serve import heads as live
from tta_serve.audit import Scope
from tta_serve.errors import TooLarge, Unavailable
from tta_serve.feedback_log import FeedbackLog
from tta_serve.heads import Heads, Owner, Told

WIDTH = 6
OWN = ("a", "b", "c")
WAIT_S = 20.0  # for what happens at once, unless it never does
Make = Callable[..., Heads]


def features(count: int, start: float = 0.0) -> Tensor:
    """[count, 6], no two rows alike."""
    return (start + 2.399 * torch.arange(count * WIDTH, dtype=torch.float64)).sin().float().view(count, WIDTH)


TINY = KeysConfig(codebooks=3, branches=(2, 2), key_dim=2, components=4)
COUNTS = Counts(Keys(fit_keys(features(40), TINY), TINY))
SEEN = features(16, 0.5)  # what is told of, and asked about


def told(id: str, label: str, row: int = 0, place: int = 0, head: AnyHead = COUNTS) -> Told:
    return Told(id, place, label, head.encode(SEEN[row : row + 1])[0], None)


def scores(heads: Heads, stream: str) -> dict[str, tuple[int, list[float]]]:
    """Of each class that a stream is read with: how many labels, and what every row of `SEEN` gets."""
    table, names = heads.view(stream).table, heads.labels_of(stream)
    columns = heads.head.score(table, heads.head.encode(SEEN)).T.tolist()
    own = [number for number in table.classes if number < len(OWN)]
    found = [*(OWN[number] for number in own), *names[len(OWN) :]]
    return {name: (images, column) for name, images, column in zip(found, table.images, columns, strict=True)}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Make]:
    """`opened(folder=…, keys="00ff", head=COUNTS, **others)`: heads above the log that lies there."""
    made: list[Heads] = []

    def make(folder: Path = tmp_path, keys: str = "00ff", head: AnyHead = COUNTS, **others: Any) -> Heads:
        log = FeedbackLog(folder / "feedback.db", "m", keys, len(OWN), wait_s=0.2)
        made.append(Heads(head, OWN, log, **others))
        return made[-1]

    yield make
    for each in made:
        each.close()


# -- learn ------------------------------------------------------------------------------------------------------------


def test_a_stream_that_was_told_nothing_is_read_with_nothing(opened: Make) -> None:
    heads = opened()
    assert heads.view("x") is heads.untold
    assert (heads.untold.table.classes, heads.untold.added, heads.untold.version) == ((), (), 0)
    assert heads.labels_of("x") == OWN
    assert heads.streams() == []


def test_what_was_told_is_in_effect_for_its_stream_alone(opened: Make) -> None:
    heads = opened()
    assert heads.learn("x", "stream", [told("1", "glyph"), told("2", "b", 1), told("3", "glyph", 2)]) == [True] * 3
    view = heads.view("x")
    assert (view.table.classes, view.table.images, view.added) == ((1, 3), (1, 2), ("glyph",))
    assert heads.labels_of("x") == (*OWN, "glyph")
    assert heads.view("y") is heads.untold
    assert heads.streams() == ["x"]


def test_what_is_shared_is_in_effect_for_all_of_the_namespace(opened: Make) -> None:
    heads = opened(tenants=frozenset({"acme"}))
    heads.learn("x", "shared", [told("1", "glyph")])
    heads.learn("y", "stream", [told("1", "glyph", 1), told("2", "mark", 2)])
    heads.learn("acme:x", "shared", [told("1", "theirs", 3)])
    assert {name: images for name, (images, _) in scores(heads, "x").items()} == {"glyph": 1}
    assert {name: images for name, (images, _) in scores(heads, "y").items()} == {"glyph": 2, "mark": 1}
    assert {name: images for name, (images, _) in scores(heads, "never:seen").items()} == {"glyph": 1}
    assert {name: images for name, (images, _) in scores(heads, "acme:other").items()} == {"theirs": 1}
    assert heads.view("acme:x").table.classes == (3,)  # the tenant's first: numbers are each namespace's own


@pytest.mark.parametrize(
    ("stream", "namespace"),
    [("acme:x", "acme"), ("acme:", "acme"), ("acme:globex:x", "acme"), ("acme", ""), ("globex:x", ""), ("x", "")],
)
def test_a_namespace_is_a_tenants(opened: Make, stream: str, namespace: str) -> None:
    assert opened(tenants=frozenset({"acme"})).namespace(stream) == namespace


def test_the_same_again_changes_nothing(opened: Make) -> None:
    heads = opened()
    assert heads.learn("x", "stream", [told("1", "a"), told("1", "b"), told("1", "b", place=1)]) == [True, False, True]
    before = heads.view("x")
    assert heads.learn("x", "shared", [told("1", "glyph", 5)]) == [False]
    assert heads.view("x") is before
    assert heads.has("x", "1", 1)
    assert not heads.has("y", "1", 1)


def test_a_view_is_the_very_same_until_something_changes(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "a")])
    heads.learn("y", "stream", [told("1", "b")])
    x, y = heads.view("x"), heads.view("y")
    heads.learn("y", "stream", [told("2", "b", 1)])
    assert heads.view("x") is x
    assert heads.view("y").version > y.version > x.version > 0
    heads.learn("z", "shared", [told("1", "c")])
    assert heads.view("x").version > y.version
    assert heads.view("x").table.classes == (0, 2)


def test_two_own_classes_of_one_name_are_the_first(opened: Make, tmp_path: Path) -> None:
    heads = opened()
    twice = Heads(COUNTS, ("a", "crane", "crane"), heads.feedback)
    twice.learn("x", "stream", [told("1", "crane")])
    assert twice.view("x").table.classes == (1,)
    assert twice.number_of("crane") == 1


def test_a_class_too_many_changes_nothing(opened: Make) -> None:
    heads = opened(classes_max=1)
    heads.learn("y", "stream", [told("1", "glyph")])
    with pytest.raises(TooLarge, match="'mark'"):
        heads.learn("x", "stream", [told("1", "glyph"), told("2", "mark")])
    assert heads.view("x") is heads.untold
    assert not heads.has("x", "1", 0)
    with pytest.raises(TooLarge, match="'mark' would be added class 2 of the stream 'y', which may have 1"):
        heads.learn("y", "stream", [told("2", "mark")])
    assert heads.labels_of("y") == (*OWN, "glyph")
    heads.learn("y", "shared", [told("2", "mark")])  # the limit is each owner's
    assert heads.labels_of("y") == (*OWN, "glyph", "mark")


def test_what_cannot_be_kept_is_not_learned(opened: Make, tmp_path: Path) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "a")])
    before = heads.view("x")
    (tmp_path / "feedback.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(Unavailable, match="was moved or removed"):
        heads.learn("x", "stream", [told("2", "b")])
    assert heads.view("x") is before
    (tmp_path / "elsewhere.db").rename(tmp_path / "feedback.db")
    assert heads.learn("x", "stream", [told("2", "b")]) == [True]
    assert heads.view("x").table.classes == (0, 1)


def test_the_oldest_of_a_class_leaves_when_there_are_too_many(opened: Make, tmp_path: Path) -> None:
    heads = opened(labels_per_class=2)
    heads.learn("x", "stream", [told("1", "glyph", 1), told("2", "a", 2)])
    heads.learn("x", "stream", [told("3", "glyph", 3), told("4", "glyph", 4), told("5", "glyph", 5)])
    (other := tmp_path / "other").mkdir()
    anew = opened(other)
    anew.learn("x", "stream", [told("2", "a", 2), told("4", "glyph", 4), told("5", "glyph", 5)])
    assert scores(heads, "x") == scores(anew, "x")
    assert not heads.has("x", "1", 0)
    (row,) = [row.change for row in heads.feedback.audit() if row.change.what == "slide"]
    assert (row.stream, row.scope, row.items, row.note) == ("x", "stream", 2, "the window of 2 labels")
    assert heads.view("x").version == heads.feedback.audit()[-1].seq


# -- forget -----------------------------------------------------------------------------------------------------------


def test_a_receipt_says_what_was_removed(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "a"), told("2", "glyph", 1), told("2", "glyph", 2, place=1)])
    heads.learn("y", "stream", [told("1", "mark")])
    only_a = COUNTS.learn(COUNTS.init(), Items(COUNTS.encode(SEEN[:1]), torch.tensor([0])))
    whole = COUNTS.learn(only_a, Items(COUNTS.encode(SEEN[1:3]), torch.tensor([3, 3])))
    receipt = heads.forget_ids("x", ["2", "never"])
    assert receipt._asdict() == {
        "removed": 2,
        "foreign": 0,
        "classes": ("glyph",),
        "state_before": tree.digest((whole,)),
        "state_after": tree.digest((only_a,)),
        "verified": True,
        "residue": None,
    }
    change = heads.feedback.audit()[-1].change
    assert (change.what, change.stream, change.scope, change.items) == ("forget", "x", "stream", 2)
    assert (change.state_before, change.state_after) == (tree.digest(whole), tree.digest(only_a))
    assert heads.labels_of("x") == (*OWN,)


def test_a_class_is_forgotten_by_one_stream_or_by_all(opened: Make) -> None:
    heads = opened(tenants=frozenset({"acme"}))
    for stream in ("x", "y", "acme:x"):
        heads.learn(stream, "stream", [told("1", "glyph"), told("2", "a", 1)])
        heads.learn(stream, "shared", [told("3", "glyph", 2)])
    one = heads.forget_class("x", "glyph")
    assert (one.removed, one.classes) == (2, ())  # y's is there still
    assert scores(heads, "x")["glyph"][0] == 1  # what y shares
    rest = heads.forget_class("x", "glyph", everywhere=True)
    assert (rest.removed, rest.classes) == (2, ("glyph",))
    assert list(scores(heads, "x")) == list(scores(heads, "y")) == ["a"]
    assert scores(heads, "acme:x")["glyph"][0] == 2
    assert heads.forget_class("x", "a").removed == 1
    assert not heads.view("x").table.classes


def test_reset_takes_what_is_the_streams_and_delete_takes_all(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "a")])
    heads.learn("x", "shared", [told("2", "b")])
    heads.learn("y", "stream", [told("1", "c")])
    assert heads.reset("x").removed == 1
    assert list(scores(heads, "x")) == ["b"]
    assert list(scores(heads, "y")) == ["b", "c"]
    assert heads.delete("x").removed == 1
    assert not heads.view("x").table.classes
    assert list(scores(heads, "y")) == ["c"]
    empty = heads.delete("x")
    assert (empty.removed, empty.state_before, empty.verified) == (0, empty.state_after, True)


def test_nothing_of_a_deleted_stream_stays_in_memory(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "a")])
    values = weakref.ref(heads.view("x").table.values[0])
    cells = weakref.ref(heads.view("x").parts[0].state.classes[0].cells)
    heads.delete("x")
    gc.collect()
    assert (values(), cells()) == (None, None)


def test_a_number_is_never_used_again(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "glyph")])
    heads.forget_class("x", "glyph")
    heads.learn("x", "stream", [told("2", "mark")])
    assert (heads.view("x").table.classes, heads.view("x").added) == ((4,), ("mark",))
    heads.learn("x", "stream", [told("3", "glyph")])
    assert (heads.view("x").table.classes, heads.view("x").added) == ((4, 5), ("mark", "glyph"))


class Forgetful(Counts):
    """Leaves something behind."""

    def unlearn(self, state: CountsState, items: Items, rest: Items) -> CountsState:
        return state


def test_a_trace_that_is_left_is_seen_and_taken_out(opened: Make, caplog: pytest.LogCaptureFixture) -> None:
    heads = opened(head=Forgetful(COUNTS.keys))
    heads.learn("x", "stream", [told("1", "a"), told("2", "b", 1)])
    only_a = COUNTS.learn(COUNTS.init(), Items(COUNTS.encode(SEEN[:1]), torch.tensor([0])))
    with caplog.at_level(logging.ERROR):
        receipt = heads.forget_ids("x", ["2"])
    assert not receipt.verified
    assert receipt.state_after == tree.digest((only_a,))
    assert list(scores(heads, "x")) == ["a"]
    assert [record.message for record in caplog.records] == [
        "unlearning 1 items left a trace in the state; it is made anew"
    ]


def test_what_another_process_told_can_be_forgotten(
    opened: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = opened()
    ours.learn("x", "stream", [told("1", "a")])
    theirs = opened()
    theirs.learn("x", "stream", [told("2", "glyph", 1), told("3", "a", 2)])
    with caplog.at_level(logging.INFO):
        receipt = ours.forget_ids("x", ["2"])
    assert (receipt.removed, receipt.verified) == (1, True)
    assert "another process changed the feedback log" in caplog.text
    (other := tmp_path / "other").mkdir()
    anew = opened(other)
    anew.learn("x", "stream", [told("1", "a"), told("3", "a", 2)])
    assert scores(ours, "x") == scores(anew, "x")


def test_a_view_made_while_a_class_is_forgotten_is_of_the_moment_before(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "shared", [told("1", "glyph")])
    heads._views.drop(Owner("shared", ""))  # as if there had been no room for it
    remove, part, looking = heads.feedback.remove, heads._part, threading.Event()
    pool = ThreadPoolExecutor(1)
    found: list[Any] = []

    def noted(owner: Owner) -> Any:
        try:
            return part(owner)
        finally:
            if threading.current_thread() is not threading.main_thread():
                looking.set()

    def overtaken(*args: Any, **more: Any) -> Any:
        removed = remove(*args, **more)
        found.append(pool.submit(heads.view, "y"))
        assert looking.wait(WAIT_S)  # it has the state that is about to go
        return removed

    heads._part, heads.feedback.remove = noted, overtaken  # type: ignore[method-assign]
    heads.forget_class("x", "glyph")
    assert found[0].result(WAIT_S).added == ("glyph",)  # of the moment before, with its name
    pool.shutdown()
    assert not heads.view("y").table.classes


KINDS: dict[str, Callable[[], AnyHead]] = {
    "counts": lambda: COUNTS,
    "class_means": lambda: ClassMeans(fit_class_means(features(40))),
    "ridge": lambda: Ridge(fit_ridge(features(40), count=4)),
    "gradient": lambda: KVGradient(
        fit_flat_keys(features(40), FlatKeysConfig(codebooks=4, keys=4, width=2, epochs=1, batch=16)), WIDTH
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_forgets_exactly(opened: Make, tmp_path: Path, kind: str) -> None:
    head = KINDS[kind]()

    def told_it(*items: tuple[str, str, int]) -> Sequence[Told]:
        return [told(id, label, row, head=head) for id, label, row in items]

    heads = opened(head=head)
    heads.learn("x", "stream", told_it(("1", "a", 0), ("2", "glyph", 1)))
    heads.learn("x", "stream", told_it(("3", "b", 2), ("4", "a", 3)))
    receipt = heads.forget_ids("x", ["1", "3"])
    assert (receipt.removed, receipt.verified) == (2, True)
    (other := tmp_path / "other").mkdir()
    anew = opened(other, head=head)
    anew.learn("x", "stream", told_it(("2", "glyph", 1)))
    anew.learn("x", "stream", told_it(("4", "a", 3)))
    assert scores(heads, "x") == scores(anew, "x")
    assert heads.delete("x").verified
    assert heads.view("x") is heads.untold


# -- across lives -----------------------------------------------------------------------------------------------------


def test_a_restart_changes_nothing(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "glyph"), told("2", "a", 1)])
    heads.learn("y", "shared", [told("1", "mark", 2)])
    heads.forget_ids("x", ["2"])
    before = {stream: scores(heads, stream) for stream in ("x", "y", "z")}
    versions = {stream: heads.view(stream).version for stream in ("x", "y", "z")}
    heads.close()
    again = opened()
    assert {stream: scores(again, stream) for stream in ("x", "y", "z")} == before
    assert all(again.view(stream).version >= version for stream, version in versions.items())
    assert again.streams() == ["x", "y"]
    assert again.learn("x", "stream", [told("1", "b")]) == [False]


def test_what_another_process_told_is_seen_once_it_is_looked_for(opened: Make) -> None:
    ours, theirs = opened(), opened()
    ours.refresh()  # the other one has just opened the file
    assert not ours.refresh()
    theirs.learn("x", "stream", [told("1", "glyph")])
    assert not ours.view("x").table.classes
    assert ours.refresh()
    assert ours.view("x").added == ("glyph",)
    theirs.forget_class("x", "glyph")
    ours.learn("x", "stream", [told("2", "a")])  # looks by itself, and begins with what there is
    assert not ours.refresh()  # its own changes are no news
    assert scores(ours, "x") == scores(opened(), "x")


@pytest.mark.parametrize("before", [True, False])
def test_labels_told_before_tenants_changed_have_no_effect(opened: Make, before: bool) -> None:
    """Numbers of classes are a namespace's; under another they would be other classes."""
    tenants = [frozenset({"acme"}), frozenset()]
    first, then = tenants if before else tenants[::-1]
    heads = opened(tenants=first)
    heads.learn("acme:cam", "stream", [told("1", "glyph")])
    heads.learn("acme:cam", "shared", [told("2", "glyph", 1)])
    heads.close()
    again = opened(tenants=then)
    assert not again.view("acme:cam").table.classes
    again.learn("acme:lobby", "stream", [told("1", "other")])
    assert again.view("acme:lobby").added == ("other",)
    assert not again.view("acme:cam").table.classes
    gone = again.delete("acme:cam")
    assert (gone.removed, gone.foreign, gone.verified) == (0, 2, True)
    assert again.feedback.streams() == ["acme:lobby"]


def test_versions_grow_when_labels_are_forgotten_too(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "shared", [told("1", "a")])
    heads.learn("x", "stream", [told("2", "b")])
    versions = [heads.view("x").version]
    heads.forget_ids("x", ["2"])
    versions.append(heads.view("x").version)
    heads.forget_ids("x", ["1"])
    versions.append(heads.view("x").version)
    assert versions == sorted(set(versions))


def test_so_many_labels_and_no_more(opened: Make) -> None:
    heads = opened(labels_max=3)
    heads.learn("x", "stream", [told("1", "a"), told("2", "a")])
    with pytest.raises(TooLarge, match="2 more labels, where 2 are kept; the limit is 3"):
        heads.learn("y", "shared", [told("3", "a"), told("4", "a")])
    heads.forget_ids("x", ["1"])
    assert heads.learn("y", "shared", [told("3", "a"), told("4", "a")]) == [True, True]


def test_a_forget_makes_no_other_stream_s_view_anew(opened: Make) -> None:
    heads = opened()
    for stream in ("x", "y"):
        heads.learn(stream, "stream", [told(stream, "a")])
    kept = heads.view("y")
    heads.forget_ids("x", ["x"])
    assert heads.view("y") is kept


def test_a_restart_tells_no_stream_of_others(opened: Make) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "glyph")])
    heads.close()
    again = opened()
    assert again.view("y") is again.untold
    again.learn("y", "shared", [told("1", "a")])
    again.delete("y")
    assert not again.view("z").table.classes


def test_labels_for_other_keys_have_no_effect_and_can_be_forgotten(
    opened: Make, caplog: pytest.LogCaptureFixture
) -> None:
    heads = opened()
    heads.learn("x", "stream", [told("1", "glyph"), told("2", "a")])
    heads.close()
    with caplog.at_level(logging.WARNING):
        other = opened(keys="11ee")
    assert [record.message for record in caplog.records] == [
        "2 labels were told for other weights, labels or keys, and have no effect"
    ]
    assert other.view("x") is other.untold
    assert other.streams() == ["x"]
    assert other.learn("x", "stream", [told("1", "b")]) == [True]  # its code is of these keys
    receipt = other.forget_class("x", "glyph")
    assert (receipt.removed, receipt.foreign, receipt.state_before) == (0, 1, receipt.state_after)
    assert list(scores(other, "x")) == ["b"]
    other.close()
    back = opened()
    assert list(scores(back, "x")) == ["a"]


def test_states_that_found_no_room_are_made_anew(opened: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CACHE_BYTES", 1)
    heads = opened()
    for row, stream in enumerate("xyz"):
        heads.learn(stream, "stream", [told("1", "glyph", row)])
    heads.learn("x", "shared", [told("2", "a", 3)])
    found = {stream: scores(heads, stream) for stream in "xyzw"}
    assert {stream: scores(heads, stream) for stream in "xyzw"} == found
    assert [list(found[stream]) for stream in "xyzw"] == [["a", "glyph"]] * 3 + [["a"]]
    assert len({str(found[stream]["glyph"]) for stream in "xyz"}) > 1
    assert heads.delete("y").verified
    assert list(scores(heads, "y")) == ["a"]


# -- any history ------------------------------------------------------------------------------------------------------

STREAMS = ("x", "y", "acme:x")
LABELS = ("a", "glyph", "mark")


class Item(NamedTuple):
    stream: str
    scope: Scope
    id: str
    label: str
    row: int


ids = st.sampled_from([str(number) for number in range(5)])
streams, labels = st.sampled_from(STREAMS), st.sampled_from(LABELS)
items = st.lists(st.tuples(ids, labels, st.integers(0, 15)), min_size=1, max_size=4)
STEPS = st.lists(
    st.tuples(st.just("learn"), streams, st.sampled_from(["stream", "shared"]), items)
    | st.tuples(st.just("learn"), streams, st.sampled_from(["stream", "shared"]), items)
    | st.tuples(st.just("forget_ids"), streams, st.lists(ids, min_size=1, max_size=3), st.none())
    | st.tuples(st.just("forget_class"), streams, labels, st.booleans())
    | st.tuples(st.sampled_from(["reset", "delete"]), streams, st.none(), st.none()),
    min_size=1,
    max_size=8,
)


def play(heads: Heads, known: list[Item], step: Any) -> list[Item]:
    """Take a step; what should be known afterwards, where `known` was before."""
    what, stream, this, that = step
    if what == "learn":
        new = []
        for id, label, row in that:
            there = any((each.stream, each.id) == (stream, id) for each in known + new)
            new += [] if there else [Item(stream, this, id, label, row)]
        done = heads.learn(stream, this, [told(id, label, row) for id, label, row in that])
        assert sum(done) == len(new)
        return known + new
    if what == "forget_ids":
        receipt, goes = heads.forget_ids(stream, this), lambda item: item.stream == stream and item.id in this
    elif what == "forget_class":
        space = heads.namespace(stream)
        receipt = heads.forget_class(stream, this, everywhere=that)

        def goes(item: Item) -> bool:
            whose = heads.namespace(item.stream) == space if that else item.stream == stream
            return whose and item.label == this
    elif what == "reset":
        receipt, goes = heads.reset(stream), lambda item: item.stream == stream and item.scope == "stream"
    else:
        receipt, goes = heads.delete(stream), lambda item: item.stream == stream
    assert (receipt.removed, receipt.verified, receipt.residue) == (sum(map(goes, known)), True, None)
    return [item for item in known if not goes(item)]


def above(folder: Path) -> Heads:
    log = FeedbackLog(folder / "feedback.db", "m", "00ff", len(OWN))
    return Heads(COUNTS, OWN, log, tenants=frozenset({"acme"}))


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_any_history_leaves_what_the_items_that_are_left_would_make(steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        heads, anew = above(Path(one)), above(Path(other))
        known: list[Item] = []
        for step in steps:
            known = play(heads, known, step)
        for item in reversed(known):  # in another order too
            anew.learn(item.stream, item.scope, [told(item.id, item.label, item.row)])
        for stream in STREAMS:
            assert scores(heads, stream) == scores(anew, stream)
            assert sorted(heads.view(stream).added) == sorted(anew.view(stream).added)
        before = {stream: (scores(heads, stream), heads.labels_of(stream)) for stream in STREAMS}
        heads.close()
        again = above(Path(one))
        assert {stream: (scores(again, stream), again.labels_of(stream)) for stream in STREAMS} == before
        again.close()
        anew.close()
