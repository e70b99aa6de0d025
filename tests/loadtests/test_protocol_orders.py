"""Every protocol's requests, by hand: two corruptions of four images, in batches of two."""

import numpy as np
import pytest

from loadtests import protocol_orders
from loadtests.protocol_orders import PROTOCOLS, Orders, by_stream, places_asked, plan

ORDERS = Orders(
    corruptions=("fog", "snow"),
    images=4,  # fog is 0 … 3, snow 4 … 7
    batch=2,
    mixed=np.array([7, 0, 1, 2, 6, 5, 3, 4]),
    correlated=np.array([2, 0, 3, 1]),
)


def told(rounds):
    return [[(request.stream, request.places.tolist()) for request in each] for each in rounds]


def alone(*requests):
    """Rounds of one request each."""
    return [[request] for request in requests]


def test_per_shift_has_a_stream_for_each_corruption():
    playing = plan("per_shift", ORDERS)
    expected = alone(("fog", [0, 1]), ("fog", [2, 3]), ("snow", [4, 5]), ("snow", [6, 7]))
    assert told(playing.rounds) == told(playing.rounds_with_ids) == expected


@pytest.mark.parametrize("protocol", ["continual", "full_rate"])
def test_continual_is_one_stream(protocol):
    playing = plan(protocol, ORDERS)
    expected = alone(("all", [0, 1]), ("all", [2, 3]), ("all", [4, 5]), ("all", [6, 7]))
    assert told(playing.rounds) == told(playing.rounds_with_ids) == expected


def test_interleaved_takes_turns():
    playing = plan("interleaved", ORDERS)
    assert told(playing.rounds) == alone(("all", [0, 1]), ("all", [4, 5]), ("all", [2, 3]), ("all", [6, 7]))
    assert told(playing.rounds_with_ids) == alone(("fog", [0, 1]), ("snow", [4, 5]), ("fog", [2, 3]), ("snow", [6, 7]))


def test_mixed_is_split_by_id_in_the_order_of_the_batch():
    playing = plan("mixed", ORDERS._replace(batch=3))
    assert told(playing.rounds) == alone(("all", [7, 0, 1]), ("all", [2, 6, 5]), ("all", [3, 4]))
    assert told(playing.rounds_with_ids) == [
        [("fog", [0, 1]), ("snow", [7])],
        [("fog", [2]), ("snow", [6, 5])],
        [("fog", [3]), ("snow", [4])],
    ]


def test_correlated_is_ordered_within_each_corruption():
    playing = plan("correlated", ORDERS)
    expected = alone(("fog", [2, 0]), ("fog", [3, 1]), ("snow", [6, 4]), ("snow", [7, 5]))
    assert told(playing.rounds) == told(playing.rounds_with_ids) == expected


def test_batch_of_one_plays_the_corruptions_side_by_side():
    playing = plan("batch_of_one", ORDERS)
    expected = [[("fog", [i]), ("snow", [4 + i])] for i in range(4)]
    assert told(playing.rounds) == told(playing.rounds_with_ids) == expected


def test_recurring_visits_three_times():
    playing = plan("recurring", ORDERS)
    visit = [("all", [0, 1]), ("all", [2, 3]), ("all", [4, 5]), ("all", [6, 7])]
    later = [[(stream, [p + n * 8 for p in places]) for stream, places in visit] for n in range(3)]
    assert told(playing.rounds) == alone(*later[0], *later[1], *later[2])


def test_recurring_takes_its_own_three_where_they_are():
    several = ("fog", "snow", "gaussian_noise", "defocus_blur")
    assert protocol_orders.recurring(several) == ("gaussian_noise", "defocus_blur", "snow")
    assert protocol_orders.recurring(several[:2]) == ("fog", "snow")


def test_a_last_request_is_smaller():
    assert [len(each[0].places) for each in plan("per_shift", ORDERS._replace(batch=3)).rounds] == [3, 1, 3, 1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ids_change_neither_what_is_asked_nor_how_often(protocol):
    playing = plan(protocol, ORDERS)
    asked = places_asked(playing.rounds).tolist()
    assert asked == places_asked(playing.rounds_with_ids).tolist()
    assert asked == list(range(24 if protocol == "recurring" else 8))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_round_holds_a_stream_once(protocol):
    for rounds in plan(protocol, ORDERS):
        for each in rounds:
            assert len({request.stream for request in each}) == len(each)


def test_by_stream():
    rounds = plan("mixed", ORDERS._replace(batch=3)).rounds_with_ids
    assert by_stream(rounds) == {"fog": [[0, 1], [2], [3]], "snow": [[7], [6, 5], [4]]}


def test_gaps_of_left_out_corruptions_are_closed():
    orders = Orders(("fog", "snow", "frost"), 2, 2, np.array([5, 0, 3, 2, 1, 4]), np.array([1, 0]))
    few = protocol_orders.chosen(orders, ["frost", "fog"])
    assert few.corruptions == ("fog", "frost")
    assert few.mixed.tolist() == [3, 0, 1, 2]
