"""Streams as users see them: how they are named, what is shown of them, what happened to them."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from tta_serve.errors import InvalidInput
from tta_serve.streams import StreamRecord

STREAM_LENGTH_MAX = 128
STREAM_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:-]{{0,{STREAM_LENGTH_MAX - 1}}}")
DEFAULT_STREAM = "default"


class StreamView(NamedTuple):
    """A stream as users see it."""

    stream: str
    mode: str
    version: int  # that the store has
    unsynced: int  # changes since, of this replica
    incarnation: int
    steps: int
    seen: int
    reliable: int
    selected: int
    selected_share: float | None
    refused: int
    trips: int
    frozen: bool
    gated: bool
    entropy: float | None
    drift: float | None  # at the last check, as flip_rate; None before it, and where no source images are known
    flip_rate: float | None
    forgetting: float | None  # a share; None without a probe
    forgetting_standard_error: float | None
    pending_rows: int
    versions: tuple[int, ...]  # that `rollback` can go to
    resident: bool  # in this replica's memory
    state_bytes: int


class StreamPage(NamedTuple):
    """Some of the streams, by name."""

    streams: list[StreamView]
    total: int  # on all pages


class StreamEvent(NamedTuple):
    """Something in a stream's life."""

    at: str  # RFC 3339, UTC
    version: int  # of the state after it
    what: str


class StreamHistory(NamedTuple):
    """What happened to a stream of late, and where it can go back to."""

    stream: str
    version: int
    versions: tuple[int, ...]
    events: list[StreamEvent]  # the latest last


def check_stream(name: str) -> None:
    """Raise unless `name` may name a stream."""
    if not STREAM_PATTERN.fullmatch(name):
        raise InvalidInput(
            f"{name[:200]!r} cannot name a stream: 1 to 128 letters, digits, '.', '_', ':' or '-', "
            "beginning with a letter or digit"
        )


def history_of(stream: str, record: StreamRecord, versions: Sequence[int]) -> StreamHistory:
    """What there is to tell of a stream.

    Args:
        stream: its name.
        record: as it stands.
        versions: that are kept of it.
    """
    events = [StreamEvent(rfc3339(event.at_s), event.version, event.what) for event in record.events]
    return StreamHistory(stream, record.version, tuple(versions), events)


def rfc3339(at_s: float) -> str:
    """A wall-clock time as text, in UTC, to the millisecond.

    >>> rfc3339(0.25), rfc3339(1_700_000_000)
    ('1970-01-01T00:00:00.250Z', '2023-11-14T22:13:20.000Z')
    """
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
