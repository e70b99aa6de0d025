import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_serve.remembered import Key, Memory, Remembered


def memory(at_s: float = 0.0, images: int = 1, pixels: int = 4) -> Memory:
    """Of `images` images of so many bytes each."""
    made = torch.zeros(images, 1, 1, pixels, dtype=torch.uint8)
    return Memory(tuple(made), ("ir",) * images, incarnation=1, at_s=at_s)


def kept(remembered: Remembered, ids: str, now_s: float = 0.0, stream: str = "a") -> str:
    return "".join(id for id in ids if remembered.find(Key(stream, id), now_s))


def test_the_oldest_give_way_to_newer_ones() -> None:
    remembered = Remembered(images_max=3, bytes_max=1000, age_max_s=60)
    for id in "pqrst":
        remembered.keep(Key("a", id), memory())
    assert kept(remembered, "pqrst") == "rst"
    remembered.keep(Key("a", "u"), memory(images=2))
    assert kept(remembered, "pqrstu") == "tu"
    assert remembered.images == 3


def test_so_many_bytes_and_no_more() -> None:
    remembered = Remembered(images_max=100, bytes_max=1000, age_max_s=60)
    for id in "pqr":
        remembered.keep(Key("a", id), memory(pixels=400))
    assert kept(remembered, "pqr") == "qr"
    remembered.keep(Key("a", "s"), memory(pixels=1001))  # alone too large, and nothing gives way to it
    assert kept(remembered, "qrs") == "qr"


def test_names_cost_memory_too() -> None:
    """A prediction may be named by its client, and a name is as long as a body may be."""
    remembered = Remembered(images_max=100, bytes_max=1000, age_max_s=60)
    remembered.keep(Key("a", "p" * 600), memory())
    remembered.keep(Key("a", "q" * 600), memory())
    assert remembered.find(Key("a", "p" * 600), 0.0) is None
    assert remembered.find(Key("a", "q" * 600), 0.0) is not None
    remembered.keep(Key("a", "r" * 1001), memory())
    assert remembered.find(Key("a", "r" * 1001), 0.0) is None
    assert 600 < remembered.bytes <= 1000


def test_none_is_kept_where_none_shall_be() -> None:
    for limits in ((0, 1000), (10, 0)):
        remembered = Remembered(*limits, age_max_s=60)
        remembered.keep(Key("a", "p"), memory())
        assert kept(remembered, "p") == ""
        assert (remembered.images, remembered.bytes) == (0, 0)


def test_what_is_too_old_is_forgotten() -> None:
    remembered = Remembered(images_max=10, bytes_max=1000, age_max_s=60)
    remembered.keep(Key("a", "p"), memory(at_s=100.0))
    remembered.keep(Key("a", "q"), memory(at_s=101.0))
    assert kept(remembered, "pq", now_s=160.0) == "pq"
    assert kept(remembered, "pq", now_s=160.5) == "q"
    assert remembered.images == 1  # it is gone, not only hidden


def test_a_name_used_again_is_the_newer_one() -> None:
    remembered = Remembered(images_max=10, bytes_max=1000, age_max_s=60)
    remembered.keep(Key("a", "p"), memory(images=3))
    newer = memory(at_s=1.0)
    remembered.keep(Key("a", "p"), newer)
    assert remembered.find(Key("a", "p"), 1.0) is newer
    assert remembered.images == 1


def test_streams_have_their_own_names() -> None:
    remembered = Remembered(images_max=10, bytes_max=1000, age_max_s=60)
    mine, theirs = memory(), memory()
    remembered.keep(Key("a", "p"), mine)
    remembered.keep(Key("b", "p"), theirs)
    assert remembered.find(Key("a", "p"), 0.0) is mine
    assert remembered.find(Key("c", "p"), 0.0) is None
    remembered.forget("a")
    assert remembered.find(Key("a", "p"), 0.0) is None
    assert remembered.find(Key("b", "p"), 0.0) is theirs
    remembered.forget("a")


steps = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("pqr"), st.integers(1, 4), st.integers(1, 300)), max_size=30
)


@settings(deadline=None)  # a busy machine
@given(steps, st.integers(0, 6), st.integers(0, 900))
def test_bounds_hold_and_sums_are_right(plan: list[tuple[str, str, int, int]], images_max: int, bytes_max: int) -> None:
    remembered = Remembered(images_max, bytes_max, age_max_s=5)
    for now_s, (stream, id, images, pixels) in enumerate(plan):
        key, made = Key(stream, id), memory(float(now_s), images, pixels)
        remembered.keep(key, made)
        fits = images <= images_max and remembered.cost(key, made) <= bytes_max
        assert (remembered.find(key, now_s) is made) == fits
        alive = remembered._memories.items()
        assert remembered.images == sum(len(each.images) for _, each in alive) <= images_max
        assert remembered.bytes == sum(remembered.cost(*each) for each in alive) <= bytes_max
    for stream in "ab":
        remembered.forget(stream)
    assert (remembered.images, remembered.bytes) == (0, 0)
