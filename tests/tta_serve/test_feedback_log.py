"""What is kept is there after every kind of end, and what was removed is nowhere: the files' bytes are searched."""

import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_serve import feedback_file, feedback_log
from tta_serve.audit import Change, Scope
from tta_serve.errors import ConfigError, InvalidInput, TooLarge, Unavailable
from tta_serve.feedback_log import Beyond, Entry, FeedbackLog, New, OfClass, OfIds, OfStream, Where

Open = Callable[..., FeedbackLog]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feedback.db"


@pytest.fixture
def open_log(path: Path) -> Iterator[Open]:
    logs: list[FeedbackLog] = []

    def make(head: str = "aa", own_classes: int = 10, model: str = "m", wait_s: float = 5.0) -> FeedbackLog:
        logs.append(FeedbackLog(path, model, head, own_classes, wait_s, clock=lambda: 7.5))
        return logs[-1]

    yield make
    for log in logs:
        log.close()


def new(
    id: str,
    label: str = "glyph",
    own: int | None = None,
    stream: str = "s",
    scope: Scope = "stream",
    namespace: str = "",
    place: int = 0,
) -> New:
    return New(stream, namespace, scope, id, place, label, own, f"code of {id}".encode())


def ids(entries: Sequence[Entry | None]) -> str:
    return "".join("-" if entry is None else entry.id for entry in entries)


# What is kept


def test_what_is_appended_comes_back_in_order(open_log: Open) -> None:
    items = [
        New("s", "acme", "stream", "p", 0, "three", 3, b"\x00\xff", True),
        New("s", "acme", "shared", "p", 1, "glyph", None, b"", False),
        New("t", "", "stream", "p", 0, "glyph\x00'", None, b"x", None),
    ]
    expected = [
        Entry(1, "s", "acme", "stream", "p", 0, 3, b"\x00\xff", True, 7.5),
        Entry(2, "s", "acme", "shared", "p", 1, 10, b"", False, 7.5),
        Entry(3, "t", "", "stream", "p", 0, 10, b"x", None, 7.5),
    ]
    log = open_log()
    assert log.append(items[:2], classes_max=5) == expected[:2]
    assert log.append(items[2:], classes_max=5) == expected[2:]
    for each in (log, open_log()):
        assert each.entries() == expected
        assert each.entries(namespace="acme") == expected[:2]
        assert each.entries(namespace="") == expected[2:]
        assert each.entries(stream="s", scope="shared") == expected[1:2]
        assert each.entries(scope="stream") == [expected[0], expected[2]]
        assert each.streams() == ["s", "t"]
        assert (each.names("acme"), each.names("")) == ({10: "glyph"}, {10: "glyph\x00'"})


def test_what_is_there_already_is_not_kept_again(open_log: Open) -> None:
    log = open_log()
    assert ids(log.append([new("p"), new("q"), new("p", "other")], 5)) == "pq-"
    assert ids(log.append([new("q", "other"), new("q", place=1), new("q", stream="t")], 5)) == "-qq"
    assert log.append([new("p")], 5) == [None]
    assert ids(log.entries()) == "pqqq"
    assert log.names("") == {10: "glyph"}  # that of a repeated item was never made
    assert log.has("s", "p", 0)
    assert not log.has("s", "p", 1)
    assert not log.has("u", "p", 0)
    log.remove(log.find(OfIds("s", ["p"])))
    assert not log.has("s", "p", 0)
    assert ids(log.append([new("p")], 5)) == "p"  # forgotten is forgotten: it may be told again


def test_models_share_a_file_and_nothing_else(open_log: Open) -> None:
    mine, other = open_log(), open_log(model="other")
    mine.append([new("p"), new("q", "glyph-2")], 5)
    assert other.append([new("p", "letter")], 5)[0] is not None
    assert (ids(other.entries()), other.names(""), other.streams(), other.foreign()) == ("p", {10: "letter"}, ["s"], 0)
    other.remove(other.find(OfStream("s")))
    assert (ids(mine.entries()), other.streams()) == ("pq", [])


def test_nothing_to_do(open_log: Open) -> None:
    log = open_log()
    assert log.append([], 5) == []
    assert (log.entries(), log.streams(), log.names(""), log.foreign(), log.audit()) == ([], [], {}, 0, [])
    assert log.remove(log.find(OfIds("s", []))) == ([], 0, None)
    assert log.remove(log.find(OfStream("s"))) == ([], 0, None)
    assert log.wipe() is None


# Classes


def test_a_number_is_never_used_again(open_log: Open) -> None:
    log = open_log()
    log.append([new("p", "a"), new("q", "b"), new("r", "a"), new("t", "c", namespace="acme")], 5)
    assert log.names("") == {10: "a", 11: "b"}
    assert log.names("acme") == {10: "c"}
    log.remove(log.find(OfClass("", "b", None)))
    assert log.names("") == {10: "a"}
    log.append([new("u", "c"), new("v", "b")], 5)
    assert log.names("") == {10: "a", 12: "c", 13: "b"}
    log.remove(log.find(OfStream("s")))
    assert log.names("") == {}
    log.close()
    again = open_log()
    again.append([new("p", "a")], 5)
    assert again.names("") == {14: "a"}


def test_a_model_that_grew_has_its_numbers_to_itself(open_log: Open) -> None:
    open_log().append([new("p", "a")], 5)
    larger = open_log(head="bb", own_classes=12)
    larger.append([new("p", "ten", own=10), new("q", "a"), new("r", "b")], 5)
    assert [entry.label for entry in larger.entries()] == [10, 12, 13]
    assert larger.names("") == {12: "a", 13: "b"}


def test_the_cap_is_of_each_stream_and_of_each_namespace(open_log: Open) -> None:
    log = open_log()
    log.append([new("1", "a"), new("2", "b"), new("3", "zero", own=0)], classes_max=2)
    log.append([new("4", "c", stream="t"), new("5", "d", stream="t")], classes_max=2)
    log.append([new("6", "e", scope="shared"), new("7", "a", scope="shared", stream="t")], classes_max=2)
    log.append([new("8", "b"), new("9", "one", own=1), new("1", "f")], classes_max=2)  # known, own, repeated
    before = log.entries()
    with pytest.raises(TooLarge) as caught:
        log.append([new("x", "a"), new("y", "g")], classes_max=2)
    assert str(caught.value) == (
        "the label 'g' would be added class 3 of the stream 's', which may have 2; "
        "use a label that there is, forget a class, or raise the limit"
    )
    with pytest.raises(TooLarge, match="the label 'c' would be added class 3 of the namespace ''"):
        log.append([new("x", "c", scope="shared", stream="t")], classes_max=2)
    with pytest.raises(TooLarge, match="added class 1 of the stream 'u', which may have 0"):
        log.append([new("x", "a", stream="u")], classes_max=0)
    assert log.entries() == before
    log.remove(log.find(OfClass("", "b", None)))
    log.append([new("y", "g")], classes_max=2)
    assert log.names("")[15] == "g"  # the refused ones used up no number


def test_the_cap_counts_within_one_append(open_log: Open) -> None:
    log = open_log()
    with pytest.raises(TooLarge, match="added class 3 of the stream"):
        log.append([new("1", "a"), new("2", "b"), new("3", "a"), new("4", "c")], classes_max=2)
    assert (log.entries(), log.names("")) == ([], {})


@pytest.mark.parametrize("own", [-1, 10])
def test_an_own_class_that_the_model_has_not_is_a_mistake(open_log: Open, own: int) -> None:
    log = open_log()
    with pytest.raises(ValueError, match=f"the model's own classes are 0 … 9, not {own}"):
        log.append([new("p"), new("q", "q", own=own)], 5)
    assert log.entries() == []


# Removal

HISTORY = [
    new("a", "crane", own=1),
    new("b", "crane", own=2),  # of one name with the other: some label sets have that
    new("c", "glyph"),
    new("d", "glyph", scope="shared"),
    new("e", "glyph", stream="t"),
    new("f", "glyph", stream="t", scope="shared"),
    new("g", "glyph", stream="t", namespace="acme"),
    new("c", "rune", place=1),
    new("h", "crane", stream="t"),  # an added class of an own one's name
]


@pytest.mark.parametrize(
    ("where", "gone", "names"),
    [
        (OfIds("s", ["c", "a", "c", "e", "zz"]), "acc", {10: "glyph", 12: "crane"}),
        (OfClass("", "crane", 1), "a", {10: "glyph", 11: "rune", 12: "crane"}),
        (OfClass("", "crane", None), "h", {10: "glyph", 11: "rune"}),
        (OfClass("", "glyph", None), "cdef", {11: "rune", 12: "crane"}),
        (OfClass("", "glyph", None, stream="t"), "ef", {10: "glyph", 11: "rune", 12: "crane"}),
        (OfClass("", "glyph", None, scope="shared"), "df", {10: "glyph", 11: "rune", 12: "crane"}),
        (OfClass("", "glyph", None, stream="s", scope="stream"), "c", {10: "glyph", 11: "rune", 12: "crane"}),
        (OfClass("acme", "glyph", None), "g", {10: "glyph", 11: "rune", 12: "crane"}),
        (OfClass("acme", "crane", 1), "", {10: "glyph", 11: "rune", 12: "crane"}),
        (OfStream("t"), "efgh", {10: "glyph", 11: "rune"}),
        (OfStream("t", "stream"), "egh", {10: "glyph", 11: "rune"}),
        (OfStream("t", "shared"), "f", {10: "glyph", 11: "rune", 12: "crane"}),
        (Beyond("shared", "", 10, keep=1), "d", {10: "glyph", 11: "rune", 12: "crane"}),
        (Beyond("shared", "", 10, keep=0), "df", {10: "glyph", 11: "rune", 12: "crane"}),
        (Beyond("stream", "s", 11, keep=0), "c", {10: "glyph", 12: "crane"}),
        (Beyond("stream", "t", 10, keep=2), "", {10: "glyph", 11: "rune", 12: "crane"}),
    ],
)
def test_each_removal_takes_what_it_names(open_log: Open, where: Where, gone: str, names: dict[int, str]) -> None:
    log = open_log()
    log.append(HISTORY, 5)
    before = log.entries()
    found = log.find(where)
    assert (ids(found.entries), found.foreign) == (gone, ())
    assert log.entries() == before
    assert log.remove(found) == (found.entries, 0, None)
    assert log.entries() == [entry for entry in before if entry not in found.entries]
    assert log.names("") == names
    assert log.names("acme") == ({} if "g" in gone else {10: "glyph"})


def test_entries_under_another_head_have_no_effect_and_are_removed_like_the_rest(open_log: Open) -> None:
    old = open_log(head="00")
    old.append([new("a", "crane", own=5), new("b", "crane"), new("c", "glyph"), new("d", stream="t")], 5)
    log = open_log(head="aa")
    log.append([new("a", "crane", own=1), new("e", "crane"), new("f", "letter"), new("g", "letter")], 2)
    assert (ids(log.entries()), log.foreign(), old.foreign(), log.streams()) == ("aefg", 4, 4, ["s", "t"])
    assert log.names("") == {10: "crane", 12: "letter"}
    assert log.remove(log.find(Beyond("stream", "s", 12, keep=1))).foreign == 0
    found = log.find(OfClass("", "crane", 1))
    assert (ids(found.entries), found.foreign) == ("a", (1, 2))  # there by its name alone, own or added
    assert log.remove(found) == (found.entries, 2, None)
    assert (ids(log.entries()), ids(old.entries())) == ("eg", "cd")
    assert log.remove(log.find(OfIds("s", ["c"]))) == ([], 1, None)
    assert log.remove(log.find(OfStream("t"))) == ([], 1, None)
    assert (log.foreign(), old.entries(), old.names("")) == (0, [], {})


def test_what_changed_after_it_was_found_is_not_removed(open_log: Open) -> None:
    mine, other = open_log(), open_log()
    mine.append([new("p"), new("q", stream="t")], 5)
    found = mine.find(OfClass("", "glyph", None))
    other.append([new("r")], 5)
    with pytest.raises(Unavailable, match="nothing was removed; try again"):
        mine.remove(found, [Change("forget", "", "s", "stream", 2)])
    assert (ids(mine.entries()), mine.audit()) == ("pqr", [])
    other.append([new("u", "rune")], 5)
    assert ids(mine.remove(mine.find(OfClass("", "glyph", None))).entries) == "pqr"


# The audit log, in the same transaction

LEARN = Change("learn", "", "s", "stream", 2, "00", "0f")
FORGET = Change("forget", "", "s", "stream", 1, "0f", "00", "counts")


def test_changes_are_written_with_what_they_tell_of(open_log: Open) -> None:
    log = open_log()
    told: list[str] = []

    def learn(entries: Sequence[Entry]) -> list[Change]:
        told.append(ids(entries))
        return [LEARN]

    log.append([new("p"), new("p"), new("q")], 5, learn)
    log.append([new("p")], 5, learn)
    assert told == ["pq"]
    log.remove(log.find(OfIds("s", ["p"])), [FORGET])
    log.record([FORGET._replace(items=0)])
    assert [(row.seq, row.at_s, row.model, row.change) for row in open_log().audit()] == [
        (1, 7.5, "m", LEARN),
        (2, 7.5, "m", FORGET),
        (3, 7.5, "m", FORGET._replace(items=0)),
    ]


def test_an_append_that_cannot_be_learned_did_not_happen(open_log: Open) -> None:
    def fail(entries: Sequence[Entry]) -> list[Change]:
        raise OSError("of the caller")

    log = open_log()
    with pytest.raises(OSError, match="of the caller"):
        log.append([new("p")], 5, fail)
    assert (log.entries(), log.names(""), log.audit()) == ([], {}, [])
    log.append([new("p", "rune")], 5)
    assert log.names("") == {10: "rune"}


def test_a_removal_whose_changes_cannot_be_written_did_not_happen(open_log: Open) -> None:
    log = open_log()
    log.append([new("p")], 5)
    with pytest.raises(sqlite3.IntegrityError, match="items >= 0"):
        log.remove(log.find(OfStream("s")), [FORGET, FORGET._replace(items=-1)])
    assert (ids(log.entries()), log.names(""), log.audit()) == ("p", {10: "glyph"}, [])


# Bytes


def bytes_of(path: Path) -> bytes:
    """All that is on disk."""
    files = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
    return b"".join(file.read_bytes() for file in files if file.exists())


class Told(NamedTuple):
    """An item all of whose content can be recognised."""

    item: New

    @property
    def traces(self) -> list[bytes]:
        """Each 16 bytes of the code, and 8 of the id: rows may be cut to pieces."""
        code, id = self.item.code, self.item.id.encode()
        return [code[at : at + 16] for at in range(0, len(code), 16)] + [id[:8], id[8:16], id[16:]]


def tell(rng: random.Random, count: int, label: str = "glyph") -> list[Told]:
    """Items of codes of 512 bytes and of ids as the server makes them."""
    made = []
    for _ in range(count):
        stream, scope = f"s{rng.randrange(5)}", rng.choice(("stream", "shared"))
        made.append(Told(New(stream, "", scope, rng.randbytes(12).hex(), 0, label, None, rng.randbytes(512))))
    return made


def found_in(content: bytes, told: Sequence[Told]) -> list[str]:
    """Ids of those of which a trace is there."""
    return [each.item.id for each in told if any(trace in content for trace in each.traces)]


def test_removed_bytes_are_in_no_file(open_log: Open, path: Path) -> None:
    rng = random.Random(0)
    log, reader = open_log(), open_log()
    gone, kept = tell(rng, 6, label="rune-0123456789abcdef"), tell(rng, 6)
    mixed = [each for pair in zip(gone, kept, strict=True) for each in pair]
    log.append([each.item for each in mixed], 5)
    assert len(reader.entries()) == 12
    assert found_in(bytes_of(path), mixed) == [each.item.id for each in mixed]
    assert b"rune-0123456789abcdef" in bytes_of(path)
    removed = log.remove(log.find(OfClass("", "rune-0123456789abcdef", None)))
    assert (len(removed.entries), removed.residue, log.residue) == (6, None, None)
    content = bytes_of(path)
    assert found_in(content, mixed) == [each.item.id for each in kept]
    assert b"rune-0123" not in content
    assert Path(f"{path}-wal").stat().st_size == 0
    assert len(reader.entries()) == 6


def test_rows_that_sqlite_moved_leave_no_bytes(open_log: Open, path: Path) -> None:
    """Between pages, as trees grow and shrink: where a row lay before, `secure_delete` does not come again.

    In this history SQLite 3.40 leaves part of a row, unless the file is written anew.
    """
    rng = random.Random(0)
    log = open_log()
    alive: list[Told] = []
    gone: list[Told] = []
    for _ in range(60):
        more = tell(rng, rng.choice((1, 3, 50)))
        log.append([each.item for each in more], 5)
        alive += more
        if rng.random() < 0.1:
            rng.shuffle(alive)
            cut = len(alive) * 3 // 10
            gone, alive = gone + alive[:cut], alive[cut:]
            remove_each(log, gone[-cut:])
    assert log.wipe() is None
    content = bytes_of(path)
    assert len(gone) > 100
    assert found_in(content, gone) == []
    assert found_in(content, alive) == [each.item.id for each in alive]


def remove_each(log: FeedbackLog, told: Sequence[Told]) -> None:
    for stream in sorted({each.item.stream for each in told}):
        of_stream = [each.item.id for each in told if each.item.stream == stream]
        log.remove(log.find(OfIds(stream, of_stream)), vacuum=False)


def test_a_reader_that_stays_is_named_and_wiping_waits_for_it(open_log: Open, path: Path) -> None:
    log = open_log(wait_s=0.05)
    told = tell(random.Random(0), 4)
    log.append([each.item for each in told], 5)
    with sqlite3.connect(path, isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM entries").fetchone()
        removed = log.remove(log.find(OfClass("", "glyph", None)))
        assert removed.residue == f"{path} cannot be wiped: another process has read it for more than 0.05 s"
        assert (log.entries(), log.residue) == ([], removed.residue)
        assert found_in(bytes_of(path), told) != []  # so that this test can fail
        assert log.wipe() == removed.residue
        reader.execute("COMMIT")
        assert (log.wipe(), log.residue) == (None, None)
        assert found_in(bytes_of(path), told) == []
    reader.close()


def test_a_writer_that_stays_keeps_the_file_from_being_written_anew(open_log: Open, path: Path) -> None:
    log, other = open_log(wait_s=0.05), open_log()
    told = tell(random.Random(0), 4)
    log.append([each.item for each in told], 5)
    log.remove(log.find(OfClass("", "glyph", None)), vacuum=False)
    assert log.residue == f"{path} was not written anew yet"
    with other._file.transaction():
        assert log.wipe() == (
            f"{path} cannot be wiped: another process keeps it locked for more than 0.05 s (database is locked)"
        )
    assert log.wipe() is None
    assert found_in(bytes_of(path), told) == []


def test_what_one_process_left_the_next_one_wipes(open_log: Open, path: Path) -> None:
    told = tell(random.Random(0), 4)
    with sqlite3.connect(path) as holder:  # keeps the last log's `close` from tidying up
        first = open_log()
        first.append([each.item for each in told], 5)
        first.remove(first.find(OfClass("", "glyph", None)), vacuum=False)
        assert first._file.execute("SELECT removals, wiped FROM wiping").fetchone() == (1, 0)
        second = open_log()
        assert second.residue is None
        assert second._file.execute("SELECT removals, wiped FROM wiping").fetchone() == (1, 1)
        assert Path(f"{path}-wal").stat().st_size <= 4 * 4152  # the head's row alone is there, if anything
        assert found_in(bytes_of(path), told) == []
    holder.close()


# Any history

CLASSES = [("zero", 0), ("two", 2), ("a", None), ("b", None), ("two", None)]
streams, scopes = st.sampled_from("st"), st.sampled_from(("stream", "shared"))
namespaces, heads, classes = st.sampled_from(("", "acme")), st.sampled_from(("aa", "bb")), st.sampled_from(CLASSES)
items = st.builds(
    lambda stream, namespace, scope, name, place, label, code, right: New(
        stream, namespace, scope, name, place, *label, code, right
    ),
    streams, namespaces, scopes, st.sampled_from("pqr"), st.integers(0, 1), classes, st.binary(max_size=3),
    st.sampled_from((None, True, False)),
)  # fmt: skip
wheres = st.one_of(
    st.builds(OfIds, streams, st.lists(st.sampled_from("pqr"), max_size=3)),
    st.builds(
        lambda namespace, label, stream, scope: OfClass(namespace, *label, stream, scope),
        namespaces, classes, st.none() | streams, st.none() | scopes,
    ),
    st.builds(OfStream, streams, st.none() | scopes),
    st.builds(Beyond, scopes, st.sampled_from(("s", "t", "", "acme")), st.integers(0, 5), st.integers(0, 2)),
)  # fmt: skip
steps = st.lists(st.tuples(heads, st.lists(items, min_size=1, max_size=4) | wheres), max_size=14)


class Plain:
    """The log as lists: what it shall do, without how."""

    own_classes = 3

    def __init__(self) -> None:
        self.rows: list[tuple[str, New, Entry]] = []
        self.seq = 0
        self.next: dict[str, int] = {}

    def append(self, head: str, new: Sequence[New], classes_max: int) -> list[Entry | None] | None:
        """As the log's; None where that raises TooLarge."""
        rows, seq, next = list(self.rows), self.seq, dict(self.next)
        made: list[Entry | None] = []
        for item in new:
            if any(
                h == head and (i.stream, i.id, i.place) == (item.stream, item.id, item.place) for h, i, _ in self.rows
            ):
                made.append(None)
                continue
            self.seq += 1
            entry = Entry(self.seq, *item[:5], self.number(item), item.code, item.right, 7.5)
            self.rows.append((head, item, entry))
            made.append(entry)
            added = {(i.namespace, i.label) for h, i, _ in self.rows if h == head and self.alike(i, item)}
            if item.own is None and len(added) > classes_max:
                self.rows, self.seq, self.next = rows, seq, next
                return None
        return made

    @staticmethod
    def alike(a: New, b: New) -> bool:
        """Whether both are of added classes that count together."""
        same = a.stream == b.stream if b.scope == "stream" else a.namespace == b.namespace
        return a.own is None and a.scope == b.scope and same

    def number(self, item: New) -> int:
        if item.own is not None:
            return item.own
        for _, other, entry in self.rows:
            if (other.namespace, other.label, other.own) == (item.namespace, item.label, None):
                return entry.label
        number = self.next.get(item.namespace, self.own_classes)
        self.next[item.namespace] = number + 1
        return number

    def matching(self, head: str, where: Where) -> list[tuple[str, New, Entry]]:
        match where:
            case OfIds(stream, ids):
                return [row for row in self.rows if row[1].stream == stream and row[1].id in ids]
            case OfClass(namespace, label, own, stream, scope):
                return [
                    row
                    for row in self.rows
                    if (row[1].namespace, row[1].label) == (namespace, label)
                    and (row[0] != head or row[1].own == own)
                    and stream in (None, row[1].stream)
                    and scope in (None, row[1].scope)
                ]
            case OfStream(stream, scope):
                return [row for row in self.rows if row[1].stream == stream and scope in (None, row[1].scope)]
            case Beyond(scope, owner, label, keep):
                of_class = [
                    row
                    for row in self.rows
                    if row[0] == head and row[1].scope == scope and row[2].label == label
                    and owner == (row[1].stream if scope == "stream" else row[1].namespace)
                ]  # fmt: skip
                return of_class[: max(len(of_class) - keep, 0)]

    def names(self, head: str, namespace: str) -> dict[int, str]:
        added = [
            (entry.label, i.label) for h, i, entry in self.rows if (h, i.namespace, i.own) == (head, namespace, None)
        ]
        return dict(sorted(added))


@settings(max_examples=60, deadline=None)
@given(steps)
def test_any_history_is_that_of_lists(plan: list[tuple[str, list[New] | Where]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "feedback.db"
        logs = {head: FeedbackLog(path, "m", head, Plain.own_classes, clock=lambda: 7.5) for head in ("aa", "bb")}
        plain = Plain()
        for head, step in plan:
            log = logs[head]
            if isinstance(step, list):
                expected = plain.append(head, step, classes_max=2)
                if expected is None:
                    with pytest.raises(TooLarge):
                        log.append(step, classes_max=2)
                else:
                    assert log.append(step, classes_max=2) == expected
            else:
                gone = plain.matching(head, step)
                plain.rows = [row for row in plain.rows if row not in gone]
                mine = [entry for h, _, entry in gone if h == head]
                removed = log.remove(log.find(step), vacuum=False)
                assert (removed.entries, removed.foreign) == (mine, len(gone) - len(mine))
            for head, log in logs.items():
                assert log.entries() == [entry for h, _, entry in plain.rows if h == head]
                assert log.foreign() == sum(h != head for h, _, _ in plain.rows)
                assert {name: log.names(name) for name in ("", "acme")} == {
                    name: plain.names(head, name) for name in ("", "acme")
                }
            assert log.streams() == sorted({item.stream for _, item, _ in plain.rows})
        for log in logs.values():
            log.close()


# Several processes, and ends of all kinds

WRITER = """
import sys
from pathlib import Path
from tta_serve.feedback_log import FeedbackLog, New, OfIds

path, name, count, remove = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "remove"
log = FeedbackLog(path, "m", "aa", own_classes=10, wait_s=30)
for number in range(count):
    mine = [New(name, "", "stream", f"{number}", place, f"class {number % 7}", None, bytes(512)) for place in range(3)]
    both = New("both", "", "shared", f"{number}", 0, f"class {number % 7}", None, name.encode())
    made = log.append([*mine, both], classes_max=7)
    print(number, made[-1] is not None, flush=True)
    if remove and number % 3 == 0:
        log.remove(log.find(OfIds(name, [f"{number}"])), vacuum=number % 2 == 0)
        print(number, "gone", flush=True)
log.close()
"""


def start(path: Path, name: str, count: int, remove: bool = False) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", WRITER, str(path), name, str(count), "remove" if remove else "keep"]
    root = Path(feedback_log.__file__).parents[1]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def test_two_processes_write_one_file(open_log: Open, path: Path) -> None:
    """From its first moment: neither finds a file that is ready."""
    writers = {name: start(path, name, count=60, remove=True) for name in ("left", "right")}
    said = {name: writer.communicate(timeout=60) for name, writer in writers.items()}
    assert {name: (writer.returncode, said[name][1]) for name, writer in writers.items()} == dict.fromkeys(
        said, (0, "")
    )
    log = open_log()
    for name in writers:
        there = [f"{number}" for number in range(60) if number % 3 for _ in range(3)]
        assert [entry.id for entry in log.entries(stream=name)] == there
    both = log.entries(stream="both")
    assert sorted(int(entry.id) for entry in both) == list(range(60))  # each once, whoever came first
    for name, (output, _) in said.items():
        first = [line.split()[0] for line in output.splitlines() if line.endswith("True")]
        assert [entry.id for entry in both if entry.code == name.encode()] == first
    assert log.names("") == {10 + number: f"class {number}" for number in range(7)}
    assert all(log.names("")[entry.label] == f"class {int(entry.id) % 7}" for entry in log.entries())
    seqs = [entry.seq for entry in log.entries()]
    assert seqs == sorted(set(seqs))


def test_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    """SQLite does not wait for locks in every moment of that."""
    for number in range(10):
        path, together = tmp_path / f"{number}.db", Barrier(6)

        def open_and_append(id: int, path: Path = path, together: Barrier = together) -> None:
            together.wait()
            log = FeedbackLog(path, "m", "aa", 10, wait_s=30)
            log.append([new(f"{id}")], 5)
            log.close()

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(open_and_append, range(6)))  # raises what they raised
        log = FeedbackLog(path, "m", "aa", 10)
        assert sorted(ids(log.entries())) == list("012345")
        log.close()


@pytest.mark.parametrize("seed", range(4))
def test_what_was_acknowledged_is_there_after_a_kill(open_log: Open, path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with start(path, "s", count=100_000, remove=seed % 2 == 1) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        lines = [writer.stdout.readline() for _ in range(rng.randrange(1, 120))]
        for _ in range(rng.randrange(20_000)):  # to no beat of the writer's
            pass
        writer.send_signal(signal.SIGKILL)
        output, errors = writer.stdout.read(), writer.stderr.read()
    assert (writer.returncode, errors) == (-signal.SIGKILL, "")
    said = [line.split() for line in ("".join(lines) + output).splitlines(keepends=True) if line.endswith("\n")]
    kept = [int(line[0]) for line in said if line[1] == "True"]
    gone = [int(line[0]) for line in said if line[1] == "gone"]
    log = open_log()
    there = [int(entry.id) for entry in log.entries(stream="both")]
    assert there in (kept, [*kept, len(kept)])  # one more may be durable that could not be acknowledged
    mine = [int(entry.id) for entry in log.entries(stream="s")]
    whole = [number for number in there for _ in range(3)]
    left = [number for number in whole if number not in gone]
    last = there[-1] if there else -1
    assert mine in (left, [number for number in left if number != last])  # its removal, the same
    assert log._file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert log.residue is None


def test_settings_that_durability_rests_on(open_log: Open, path: Path) -> None:
    log = open_log()
    pragmas = ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "temp_store", "user_version")
    found = [log._file.execute(f"PRAGMA {each}").fetchone()[0] for each in pragmas]
    assert found == ["wal", 2, 1, 1, 2, feedback_file.FORMAT]
    assert [stat.S_IMODE(Path(f"{path}{each}").stat().st_mode) for each in ("", "-wal", "-shm")] == [0o600] * 3


# Faults


def test_a_locked_file(open_log: Open, path: Path) -> None:
    log = open_log(wait_s=0.05)
    log.append([new("p")], 5)
    found = log.find(OfStream("s"))
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        said = (
            f"the feedback log {path} cannot be used: another process keeps it locked for more than 0.05 s "
            "(database is locked); try again, or end that process"
        )
        for call in (
            lambda: log.append([new("q")], 5),
            lambda: log.remove(found),
            lambda: log.record([FORGET]),
            lambda: open_log(wait_s=0.05),
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert str(caught.value) == said
        other.execute("ROLLBACK")
    other.close()
    assert (ids(log.entries()), log.audit()) == ("p", [])
    assert ids(log.append([new("q")], 5)) == "q"


def test_a_full_disk(open_log: Open) -> None:
    log = open_log()
    log.append([new("p")], 5)
    pages = log._file.execute("PRAGMA page_count").fetchone()[0]
    log._file.execute(f"PRAGMA max_page_count = {pages}")
    large = [new(f"{number}", "rune")._replace(code=bytes(5000)) for number in range(5)]
    with pytest.raises(Unavailable, match=r"the disk is full \(database or disk is full\); make room on it"):
        log.append(large, 5)
    assert (ids(log.entries()), log.names("")) == ("p", {10: "glyph"})
    log._file.execute("PRAGMA max_page_count = 100000")
    assert ids(log.append(large, 5)) == "01234"


def test_a_file_that_became_read_only(open_log: Open) -> None:
    log = open_log()
    log.append([new("p")], 5)
    log._file.execute("PRAGMA query_only = ON")
    wanted = r"it cannot be opened or written .* let this user write the file and its folder"
    with pytest.raises(Unavailable, match=wanted):
        log.append([new("q")], 5)
    log._file.execute("PRAGMA query_only = OFF")
    assert ids(log.append([new("q")], 5)) == "q"


def test_a_file_that_was_taken_away(open_log: Open, path: Path) -> None:
    log = open_log()
    path.rename(path.with_suffix(".old"))
    for _ in range(2):  # nothing there, then another one
        with pytest.raises(Unavailable, match="was moved or removed while in use; put it back, then restart"):
            log.append([new("p")], 5)
        path.touch()


@pytest.mark.parametrize("kind", ["below a file", "in no folder", "a folder"])
def test_a_path_that_cannot_be(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    path = {"below a file": tmp_path / "file" / "log", "in no folder": tmp_path / "x" / "log", "a folder": tmp_path}[
        kind
    ]
    with pytest.raises(ConfigError) as caught:
        FeedbackLog(path, "m", "aa", 10)
    reason = {
        "below a file": "cannot be made: Not a directory; give a path in a folder that can be written",
        "in no folder": "cannot be made: No such file or directory; give a path in a folder that can be written",
        "a folder": "cannot be used: it cannot be opened or written (unable to open database file); let this user "
        "write the file and its folder, or give another path",
    }[kind]
    assert str(caught.value) == f"the feedback log {path} {reason}"


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"label,id\n" * 1000)
    with pytest.raises(
        ConfigError, match=r"it is damaged, or no database \(file is not a database\); put a copy of it"
    ):
        FeedbackLog(path, "m", "aa", 10)
    assert path.read_bytes() == b"label,id\n" * 1000


def test_a_database_of_another_program(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE entries (seq INTEGER)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is a database, but no feedback log; give another path"):
        FeedbackLog(path, "m", "aa", 10)
    assert path.read_bytes() == before


def test_a_file_of_a_newer_format(open_log: Open, path: Path) -> None:
    log = open_log()
    log._file.execute("PRAGMA user_version = 2")
    log.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_log()
    assert str(caught.value) == (
        f"the feedback log {path} has format 2 and this server reads 1; "
        "use the server that wrote it, or give another path"
    )
    assert path.read_bytes() == before


def test_a_damaged_file(open_log: Open, path: Path) -> None:
    log = open_log()
    log.append([new(f"{number:04}", "zero", own=0) for number in range(500)], 5)
    log.close()
    content = path.read_bytes()
    damaged = len(content) // 2 // 4096 * 4096
    path.write_bytes(content[:damaged] + b"\xff" * (len(content) - damaged))
    again = open_log()
    said = r"it is damaged, or no database \(database disk image is malformed\); put a copy of it in its place"
    with pytest.raises(Unavailable, match=said):
        again.entries()
    with pytest.raises(Unavailable, match=said):
        again.append([new(f"{number:04}", "zero", own=0) for number in range(500, 1000)], 5)
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(ConfigError, match=said):
        open_log()


@pytest.mark.parametrize("field", ["stream", "namespace", "id", "label"])
def test_a_text_that_is_no_unicode(open_log: Open, field: str) -> None:
    log = open_log()
    with pytest.raises(InvalidInput, match=r"cannot be kept .*surrogates not allowed.*; send Unicode"):
        log.append([new("p"), new("q")._replace(**{field: "\ud800"})], 5)
    assert log.entries() == []


def test_a_place_that_is_no_place(open_log: Open) -> None:
    with pytest.raises(InvalidInput, match="numbers below 2"):
        open_log().has("s", "p", 2**63)
