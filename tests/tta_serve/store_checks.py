"""What every store promises (`tta_serve/store.py`), as functions: each is given a way to open one more client of one
storage, and is run by the tests of each store."""

import threading
from collections.abc import Callable
from typing import Protocol

import pytest

from tta_serve.errors import NotFound
from tta_serve.store import Changed, Head, Member, Notice, Save, Store


class Make(Protocol):
    """Opens another client of one model's storage, which was empty at the first call."""

    def __call__(self, generation: str = "a1") -> Store: ...


class Clock:
    """What `time.time` is while a check runs."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def head(incarnation: int, version: int, snapshot: bytes | None = b"state", *kept: int) -> Head:
    return Head(incarnation, version, {"steps": version, "events": [[0.5, version, "learned ü"]]}, snapshot, kept)


def tombstone(incarnation: int) -> Head:
    return Head(incarnation, 0, {}, None, gone=True)


def put(store: Store, stream: str, expected: tuple[int, int] | None, new: Head, **keep: bytes) -> int:
    """Save one head, which must win; `v3=...` keeps version 3."""
    versions = {int(name[1:]): content for name, content in keep.items()}
    (number,) = store.save([Save(stream, expected, new, versions)])
    assert number is not None
    return number


def check_what_is_saved_is_loaded_by_everybody(make: Make) -> None:
    one, two = make(), make()
    assert one.load("camera-7") is None
    nothing_learned = head(1, 0, None)
    put(one, "camera-7", None, nothing_learned)
    assert [store.load("camera-7") for store in (one, two)] == [nothing_learned] * 2
    learned = head(1, 1, b"\x00\xff" * 5_000)
    put(two, "camera-7", (1, 0), learned)
    assert [store.load("camera-7") for store in (one, two, make())] == [learned] * 3


def check_only_the_expected_head_is_replaced(make: Make) -> None:
    one, two = make(), make()
    put(one, "s", None, head(1, 4))
    mine = head(1, 5, b"mine")
    for expected in (None, (1, 3), (1, 5), (2, 4), (4, 1)):
        assert two.save([Save("s", expected, mine)]) == [None]
    assert two.save([Save("other", (1, 4), mine)]) == [None]
    assert (one.load("s"), one.load("other")) == (head(1, 4), None)
    put(two, "s", (1, 4), mine)
    assert one.save([Save("s", (1, 4), head(1, 5, b"late"))]) == [None]
    assert one.load("s") == mine


def check_each_save_succeeds_or_fails_for_itself(make: Make) -> None:
    store = make()
    put(store, "b", None, head(1, 1, b"old"))
    saves = [Save(name, None, head(1, 1, name.encode())) for name in ("a", "b", "c")]
    first, second, third = store.save(saves)
    assert first is not None
    assert third is not None
    assert (second, first < third) == (None, True)
    assert [found.snapshot for name in "abc" if (found := store.load(name))] == [b"a", b"old", b"c"]
    assert store.save([]) == []


def check_a_lost_race_changes_nothing(make: Make) -> None:
    store = make()
    put(store, "s", None, head(1, 2, b"two", 1), v1=b"one")
    number = store.changes(-1).number
    assert store.save([Save("s", (1, 1), head(1, 3, b"three", 2), {2: b"x"})]) == [None]
    assert store.load("s") == head(1, 2, b"two", 1)
    assert store.load_kept("s", 1) == b"one"
    assert store.changes(-1).number == number


def check_writers_at_once_lose_nothing(make: Make) -> None:
    """Each adds one until it has won ten times; every win is in the sum, whatever the interleaving."""
    threads_count, wins_each = 4, 10
    put(make(), "sum", None, head(1, 0, b"0"))
    start = threading.Barrier(threads_count)
    faults: list[BaseException] = []

    def add(store: Store) -> None:
        try:
            start.wait(timeout=30)
            wins = 0
            while wins < wins_each:
                there = store.load("sum")
                assert there is not None
                more = str(int(there.snapshot or b"") + 1).encode()
                (number,) = store.save([Save("sum", there.tag, head(1, there.version + 1, more))])
                wins += number is not None
        except BaseException as error:  # noqa: BLE001 a thread's fault is told by the one that waits for it
            faults.append(error)

    threads = [threading.Thread(target=add, args=(make(),)) for _ in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert make().load("sum") == head(1, 40, b"40")


def check_a_tombstone_is_loaded_and_not_listed(make: Make) -> None:
    one, two = make(), make()
    put(one, "s", None, head(1, 7, b"seven", 5, 6), v5=b"five", v6=b"six")
    number = put(one, "s", (1, 7), tombstone(2))
    assert two.load("s") == tombstone(2)
    assert two.page(10) == ([], 0)
    assert two.count() == 0
    for version in (5, 6, 7):
        with pytest.raises(NotFound):
            two.load_kept("s", version)
    assert Changed("s", 2, 0, True) in two.changes(number - 1).heads
    assert two.save([Save("s", (1, 7), head(1, 8)), Save("s", None, head(1, 1))]) == [None, None]  # of the old life
    put(two, "s", (2, 0), head(2, 1, b"new"))
    assert one.load("s") == head(2, 1, b"new")
    assert one.count() == 1


def check_versions_are_kept_exactly(make: Make) -> None:
    one, two = make(), make()
    put(one, "s", None, head(1, 9, b"9", 9), v9=b"nine")
    put(one, "s", (1, 9), head(1, 10, b"10", 9, 10), v10=b"ten")
    assert two.load("s") == head(1, 10, b"10", 9, 10)
    assert [two.load_kept("s", version) for version in (9, 10)] == [b"nine", b"ten"]
    # what is not in `kept` goes, whether it was there or is given; what is there and given is replaced
    put(two, "s", (1, 10), head(1, 11, b"11", 10), v10=b"TEN", v11=b"eleven")
    assert one.load_kept("s", 10) == b"TEN"
    for stream, version in (("s", 9), ("s", 11), ("t", 10)):
        with pytest.raises(NotFound) as caught:
            one.load_kept(stream, version)
        assert repr(stream) in str(caught.value)
        assert str(version) in str(caught.value)
    put(one, "s", (1, 11), head(1, 12))
    with pytest.raises(NotFound):
        two.load_kept("s", 10)


def check_changes_miss_nothing(make: Make) -> None:
    one, two = make(), make()
    start = two.changes(-1).number
    assert two.changes(start) == (start, (), ())
    first = put(one, "a", None, head(1, 1))
    second = put(two, "b", None, head(1, 1))
    third = one.announce("forget", '{"namespace": "ü"}')
    fourth = put(two, "a", (1, 1), head(1, 2))
    assert start < first < second < third < fourth

    def since(store: Store, number: int) -> tuple[int, set[Changed], tuple[Notice, ...]]:
        found = store.changes(number)
        assert len(set(found.heads)) == len(found.heads)
        return found.number, set(found.heads), found.notices

    a, b, notice = Changed("a", 1, 2, False), Changed("b", 1, 1, False), Notice(third, "forget", '{"namespace": "ü"}')
    for store in (one, two, make()):
        assert since(store, start) == (fourth, {a, b}, (notice,))
        assert since(store, first) == (fourth, {a, b}, (notice,))
        assert since(store, second) == (fourth, {a}, (notice,))
        assert since(store, third) == (fourth, {a}, ())
        assert since(store, fourth) == (fourth, set(), ())
        assert since(store, -1) == (fourth, set(), ())


def check_notices_come_in_order(make: Make) -> None:
    one, two = make(), make("b2")
    start = one.changes(-1).number
    numbers = [store.announce("kind", str(each)) for each, store in enumerate([one, two, two, one])]
    assert numbers == sorted(set(numbers))
    notices = tuple(Notice(number, "kind", str(each)) for each, number in enumerate(numbers))
    assert one.changes(start).notices == two.changes(start).notices == notices


def check_every_change_is_seen_once_while_others_write(make: Make) -> None:
    """A reader that asks again and again from the number that it knows learns of every version's end."""
    writers, each_saves = 3, 8
    reader = make()
    seen, number = {}, reader.changes(-1).number

    def write(name: str, store: Store) -> None:
        for version in range(each_saves):
            put(store, name, (1, version) if version else None, head(1, version + 1))

    threads = [threading.Thread(target=write, args=(f"s{each}", make())) for each in range(writers)]
    for thread in threads:
        thread.start()
    going = True
    while going:
        going = any(thread.is_alive() for thread in threads)  # before the last look
        found = reader.changes(number)
        assert found.number >= number
        number = found.number
        for change in found.heads:
            assert change.version >= seen.get(change.stream, 0)
            seen[change.stream] = change.version
    for thread in threads:
        thread.join()
    assert seen == dict.fromkeys(("s0", "s1", "s2"), each_saves)


def check_generations_do_not_read_each_other(make: Make) -> None:
    one, other = make("a1"), make("b2")
    start = one.changes(-1).number
    put(one, "s", None, head(1, 5, b"one", 4), v4=b"four")
    number = put(other, "s", None, head(1, 1, b"other"))
    assert one.load("s") == head(1, 5, b"one", 4)
    assert other.load("s") == head(1, 1, b"other")
    with pytest.raises(NotFound):
        other.load_kept("s", 4)
    assert [stored.head.version for stored in other.page(10)[0]] == [1]
    assert (one.count(), make("c3").count()) == (1, 0)
    # numbers they share
    assert other.changes(start) == (number, (Changed("s", 1, 1, False),), ())
    assert make("c3").changes(start) == (number, (), ())


def check_a_deletion_reaches_other_generations(make: Make) -> None:
    one, other, third = make("a1"), make("b2"), make("c3")
    put(one, "s", None, head(1, 5))
    put(other, "s", None, head(3, 2, b"other", 1), v1=b"one")
    put(other, "t", None, head(1, 2))
    put(third, "s", None, tombstone(4))
    number = other.changes(-1).number
    one.erase_elsewhere("s")
    assert one.load("s") == head(1, 5)  # its own is not elsewhere
    gone = other.load("s")
    assert gone is not None
    assert (gone.gone, gone.incarnation, gone.snapshot, gone.kept, gone.record) == (True, 4, None, (), {})
    with pytest.raises(NotFound):
        other.load_kept("s", 1)
    assert [stored.stream for stored in other.page(10)[0]] == ["t"]
    assert other.changes(number).heads == (Changed("s", *gone.tag, True),)
    assert third.load("s") == tombstone(4)  # was gone before
    one.erase_elsewhere("never seen")
    assert other.load("never seen") is None


def check_pages(make: Make) -> None:
    store = make()
    names = ["a", "a.b", "a:b", "a:c", "aa", "b", "ä", "B"]
    store.save([Save(name, None, head(1, number, b"x" * number, number)) for number, name in enumerate(names)])
    put(store, "gone", None, tombstone(2))

    def listed(limit: int, offset: int = 0, prefix: str = "", without: tuple[str, ...] = ()) -> tuple[list[str], int]:
        lines, total = store.page(limit, offset, prefix, without=without)
        return [line.stream for line in lines], total

    assert listed(99) == (["B", "a", "a.b", "a:b", "a:c", "aa", "b", "ä"], 8)
    assert listed(2) == (["B", "a"], 8)
    assert listed(3, 6) == (["b", "ä"], 8)
    assert listed(3, 9) == ([], 8)
    assert listed(0) == ([], 8)
    assert listed(99, prefix="a") == (["a", "a.b", "a:b", "a:c", "aa"], 5)
    assert listed(1, 1, "a:") == (["a:c"], 2)
    assert listed(99, prefix="a", without=("a:", "aa")) == (["a", "a.b"], 2)
    assert listed(99, prefix="a%") == listed(99, prefix="a_") == listed(99, prefix="a*") == ([], 0)
    assert listed(99, without=("",)) == ([], 0)
    assert store.count() == 8
    (line,), _ = store.page(1, prefix="a:c")
    assert (line.stream, line.snapshot_bytes, line.head) == ("a:c", 3, head(1, 3, None))


def check_names_that_differ_in_little(make: Make) -> None:
    store = make()
    names = ["camera", "Camera", "CAMERA", "a:b", "a.b", "a-b", "a/b", "..", "a:b:", "x" * 128, "ä", "a\u0308"]
    store.save([Save(name, None, head(1, 1, name.encode(), 1), {1: name.encode()}) for name in names])
    for name in names:
        assert store.load(name) == head(1, 1, name.encode(), 1)
        assert store.load_kept(name, 1) == name.encode()
    assert store.count() == len(names)


def check_leases(make: Make, clock: Clock) -> None:
    one, two = make("a1"), make("b2")  # members are the model's
    assert one.members() == []
    one.renew("r1", 5.0, 3, "10.0.0.1:9000")
    two.renew("r2", 7.0, 4)
    first, second = Member("r1", 1_000_005.0, 3, "10.0.0.1:9000"), Member("r2", 1_000_007.0, 4, "")
    for store in (one, two, make()):
        assert sorted(store.members()) == [first, second]
    clock.now_s += 5.5
    assert two.members() == [second]
    two.renew("r1", 5.0, 9, "10.0.0.1:9001")
    assert sorted(one.members()) == [Member("r1", 1_000_010.5, 9, "10.0.0.1:9001"), second]
    one.leave("r2")
    one.leave("never there")
    assert [member.replica for member in two.members()] == ["r1"]


def check_prune(make: Make, clock: Clock) -> None:
    store = make()
    start = store.changes(-1).number
    put(store, "old", None, tombstone(2))
    put(store, "living", None, head(1, 1))
    store.announce("old", "")
    store.renew("old", 1.0, 0)
    clock.now_s += 100
    put(store, "young", None, tombstone(5))
    young = store.announce("young", "")
    store.renew("young", 1.0, 0)
    assert store.prune(98.5) == 1
    assert store.load("old") is None
    assert store.load("living") == head(1, 1)
    assert store.load("young") == tombstone(5)
    found = store.changes(start)
    assert {change.stream for change in found.heads} == {"living", "young"}
    assert found.notices == (Notice(young, "young", ""),)
    assert found.number == young  # numbers never go back
    assert store.prune(98.5) == 0
    clock.now_s -= 100  # the lease that was over is not back
    assert [member.replica for member in store.members()] == ["young"]
    put(make(), "old", None, head(1, 1))


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_what_is_saved_is_loaded_by_everybody,
    check_only_the_expected_head_is_replaced,
    check_each_save_succeeds_or_fails_for_itself,
    check_a_lost_race_changes_nothing,
    check_writers_at_once_lose_nothing,
    check_a_tombstone_is_loaded_and_not_listed,
    check_versions_are_kept_exactly,
    check_changes_miss_nothing,
    check_notices_come_in_order,
    check_every_change_is_seen_once_while_others_write,
    check_generations_do_not_read_each_other,
    check_a_deletion_reaches_other_generations,
    check_pages,
    check_names_that_differ_in_little,
)
TIMED_CHECKS: tuple[Callable[[Make, Clock], None], ...] = (check_leases, check_prune)  # `time.time` is the clock
