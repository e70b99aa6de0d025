"""What a removal did, and the proof."""

from typing import NamedTuple


class Receipt(NamedTuple):
    """What was taken out of heads."""

    removed: int  # items that were in effect
    foreign: int  # that were not: told under other keys
    classes: tuple[str, ...]  # added ones that have gone with their last item
    state_before: str  # digests of the states that were touched, as one
    state_after: str
    verified: bool  # the state is, bit for bit, one made anew from the items that are left
    residue: str | None  # why bytes may still be in the store's files; None: they are gone
