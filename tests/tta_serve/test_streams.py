"""Rows, order of use, beginnings and the guards' ladder: policies, by hand and by random sequences."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tta_serve.streams import CALM_STEPS, EVENTS_MAX, Bucket, Event, Ladder, Recency, Rows, StreamRecord


def test_row_0_is_never_handed_out_and_never_free() -> None:
    rows = Rows(3)
    rows.give_back(0)
    rows.give_back(None)
    assert (rows.take(), rows.take(), rows.take()) == (1, 2, None)
    assert rows.used == 2


def test_a_table_of_one_row_has_none_to_give() -> None:
    rows = Rows(1)
    assert rows.take() is None
    assert rows.used == 0


def test_a_row_is_free_when_its_last_holder_lets_go() -> None:
    rows = Rows(2)
    assert rows.take() == 1
    rows.hold([1, 1])  # two requests of one stream
    rows.hold([1])
    rows.give_back(1)
    rows.release([1, 1])
    assert (rows.take(), rows.used) == (None, 1)
    rows.release([1])
    assert (rows.used, rows.take()) == (0, 1)


def test_a_row_that_was_held_and_let_go_is_still_its_owners() -> None:
    rows = Rows(2)
    rows.take()
    rows.hold([0, 1])
    rows.release([0, 1])
    assert (rows.take(), rows.used) == (None, 1)


class RowsInUse(RuleBasedStateMachine):
    """Any order of taking, holding, letting go and giving back, against a plain list of who has what."""

    COUNT = 5

    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows(self.COUNT)
        self.owned: set[int] = set()
        self.held: list[int] = []

    @rule()
    def take(self) -> None:
        row = self.rows.take()
        if row is None:
            assert self.owned | set(self.held) == set(range(1, self.COUNT))
            return
        assert 0 < row < self.COUNT
        assert row not in self.owned
        assert row not in self.held
        self.owned.add(row)

    @precondition(lambda self: self.owned)
    @rule(choice=st.integers(0, 100))
    def hold(self, choice: int) -> None:
        row = sorted(self.owned)[choice % len(self.owned)]
        self.rows.hold([row])
        self.held.append(row)

    @precondition(lambda self: self.held)
    @rule(choice=st.integers(0, 100))
    def release(self, choice: int) -> None:
        self.rows.release([self.held.pop(choice % len(self.held))])

    @precondition(lambda self: self.owned)
    @rule(choice=st.integers(0, 100))
    def give_back(self, choice: int) -> None:
        row = sorted(self.owned)[choice % len(self.owned)]
        self.owned.remove(row)
        self.rows.give_back(row)

    @invariant()
    def none_is_lost(self) -> None:
        assert self.rows.used == len(self.owned | set(self.held))


TestRowsInUse = RowsInUse.TestCase
TestRowsInUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_oldest_is_who_was_used_longest_ago() -> None:
    recency = Recency()
    for name in ("a", "b", "c", "a"):
        recency.touch(name)
    assert recency.oldest() == "b"
    recency.forget("b")
    recency.forget("never seen")
    assert (recency.oldest(), len(recency), "b" in recency, "a" in recency) == ("c", 2, False, True)


@given(st.lists(st.tuples(st.sampled_from(["touch", "forget"]), st.sampled_from("abcd")), max_size=40))
def test_recency_is_the_order_of_last_uses(steps: list[tuple[str, str]]) -> None:
    recency, expected = Recency(), []
    for what, name in steps:
        getattr(recency, what)(name)
        expected = [each for each in expected if each != name] + ([name] if what == "touch" else [])
        assert len(recency) == len(expected)
        assert not expected or recency.oldest() == expected[0]


def test_a_bucket_begins_full_and_refills_evenly() -> None:
    bucket = Bucket(per_minute=3, now_s=100.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait_s() == pytest.approx(20.0)
    assert not bucket.take(119.0)
    assert bucket.wait_s() == pytest.approx(1.0)
    assert bucket.take(120.5)
    assert not bucket.take(121.0)
    assert [bucket.take(1e6) for _ in range(4)] == [True, True, True, False]  # an hour's rest saves up no more


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=60))
def test_no_minute_sees_more_than_a_full_bucket_and_its_refill(per_minute: int, gaps_s: list[float]) -> None:
    bucket, now_s, taken = Bucket(per_minute, 0.0), 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        if bucket.take(now_s):
            taken.append(now_s)
        else:
            assert 0 < bucket.wait_s() <= 60 / per_minute
    for begin_s in taken:
        assert sum(begin_s <= each_s < begin_s + 60 for each_s in taken) <= 2 * per_minute


def test_each_trip_takes_the_next_rung_and_calm_leads_down() -> None:
    ladder, actions = Ladder(), []
    for _ in range(5):
        ladder, action = ladder.trip()
        actions.append(action)
    assert actions == ["pull", "roll_back", "freeze", "freeze", "freeze"]
    ladder, _ = Ladder().trip()
    for _ in range(CALM_STEPS - 1):
        ladder = ladder.step()
    assert ladder.rung == 1
    assert ladder.trip() == (Ladder(rung=2), "roll_back")  # and the calm is counted from here again
    assert ladder.step() == Ladder()


def test_the_oldest_events_go() -> None:
    record = StreamRecord(incarnation=1, version=7)
    for number in range(EVENTS_MAX + 2):
        record = record.noted(str(number))
    assert len(record.events) == EVENTS_MAX
    assert (record.events[0].what, record.events[-1].what) == ("2", str(EVENTS_MAX + 1))
    assert {event.version for event in record.events} == {7}


def test_what_happened_during_a_step_stands_beside_what_the_step_made() -> None:
    old = StreamRecord(incarnation=1, row=3, version=4, ladder=Ladder(rung=1), events=(Event(1.0, 0, "begun"),))
    old = old._replace(unsynced=2)
    # frozen by a command, which makes a version of its own; and the store has all of it
    present = old._replace(
        frozen=True, version=5, unsynced=0, rebased=1, kept=(4,), events=(*old.events, Event(2.0, 4, "frozen: by hand"))
    )
    stepped = old._replace(version=5, steps=9, ladder=Ladder(rung=2), events=(*old.events, Event(3.0, 5, "collapse")))
    found = stepped.caught_up(old, present)
    assert found == stepped._replace(
        frozen=True,
        version=6,
        unsynced=1,
        rebased=1,
        kept=(4,),
        events=(Event(1.0, 0, "begun"), Event(2.0, 4, "frozen: by hand"), Event(3.0, 5, "collapse")),
    )
    resumed = old._replace(ladder=Ladder())
    assert stepped.caught_up(old, resumed).ladder == Ladder()
    assert stepped.caught_up(old, old) == stepped._replace(unsynced=3)
