"""What lies in a bucket: heads and changes as bytes, and names as keys. Pure functions.

A listing tells of an object its key and its size. What a listing must tell besides (whether a stream is alive, whether
a change is settled) is the remainder of the size by four: objects are filled up with zeros.
"""

import base64
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from tta_serve.store import Head

ALIVE, GONE, VOID = 0, 1, 2  # of heads; void: there is none, but an object
OPEN, SETTLED = 0, 1  # of changes
KEY_MAX = 384  # bytes that a name may take as it is: keys have at most 1,024
START_BYTES = 4096  # of a head, in which what compare-and-set needs is found nearly always

_MAGIC = b"tta-head"
_PREFIX = struct.Struct("<8sII")  # magic, bytes of what is written of it, bytes of its record


class Start(NamedTuple):
    """What is written of a head before its record and its snapshot."""

    incarnation: int
    version: int
    state: int  # ALIVE, GONE or VOID
    number: int  # of the change that put it there
    at_s: float  # wall clock of that
    write: str  # of this very object, and of no other: no two have the same content, and none comes back
    kept: Mapping[int, str]  # versions that can be rolled back to, and the names of the objects that have them
    snapshot_bytes: int  # -1: no snapshot

    @property
    def tag(self) -> tuple[int, int] | None:
        """What compare-and-set compares; None: there is no head."""
        return None if self.state == VOID else (self.incarnation, self.version)


class Unreadable(Exception):
    """An object is not what was written. `str(error)` says why."""


def state_of(size: int) -> int:
    """What the size of an object tells."""
    return size % 4


def encode_head(start: Start, record: Mapping[str, Any], snapshot: bytes | None) -> bytes:
    start = start._replace(snapshot_bytes=-1 if snapshot is None else len(snapshot))
    about = json.dumps(start._asdict(), separators=(",", ":")).encode()
    lines = json.dumps(record, separators=(",", ":")).encode()
    return _filled(_PREFIX.pack(_MAGIC, len(about), len(lines)) + about + lines + (snapshot or b""), start.state)


def needed_bytes(content: bytes) -> int:
    """How much of a head must be read for all but its snapshot.

    Raises:
        Unreadable: this is not the beginning of one.
    """
    if len(content) < _PREFIX.size or not content.startswith(_MAGIC):
        raise Unreadable("it was not written by tta-serve")
    _, about, record = _PREFIX.unpack_from(content)
    return _PREFIX.size + int(about) + int(record)


def decode_start(content: bytes) -> Start:
    """Raises:
    Unreadable: this is not the beginning of a head.
    """
    needed_bytes(content)
    _, about, _ = _PREFIX.unpack_from(content)
    try:
        fields = json.loads(content[_PREFIX.size : _PREFIX.size + about])
        kept = {int(version): str(name) for version, name in fields.pop("kept").items()}
        return Start(**fields, kept=kept)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(f"its beginning is damaged ({error})") from None


def decode_record(content: bytes) -> dict[str, Any]:
    """Raises:
    Unreadable: it is damaged.
    """
    _, about, record = _PREFIX.unpack_from(content)
    begin = _PREFIX.size + about
    try:
        found = json.loads(content[begin : begin + record])
    except ValueError as error:
        raise Unreadable(f"its record is damaged ({error})") from None
    if not isinstance(found, dict):
        raise Unreadable("its record is no JSON object")
    return found


def decode_head(content: bytes) -> tuple[Start, Head]:
    """Raises:
    Unreadable: it is not what was written. (Whether the snapshot is, its own checksum tells.)
    """
    start, begin = decode_start(content), needed_bytes(content)
    end = begin + max(0, start.snapshot_bytes)
    if not 0 <= len(content) - end < 4 or state_of(len(content)) != start.state:
        raise Unreadable(f"it has {len(content)} bytes, which is not what is written in it")
    snapshot = None if start.snapshot_bytes < 0 else content[begin:end]
    return start, as_head(start, decode_record(content), snapshot)


def as_head(start: Start, record: Mapping[str, Any], snapshot: bytes | None) -> Head:
    return Head(start.incarnation, start.version, record, snapshot, tuple(sorted(start.kept)), start.state == GONE)


class Entry(NamedTuple):
    """A head that is to be replaced, or was."""

    generation: str
    stream: str
    incarnation: int  # of the new head
    version: int
    gone: bool
    objects: tuple[str, ...]  # names of kept versions that are put or dropped with it
    won: bool = False  # of a settled change: it was replaced


class Change(NamedTuple):
    """What one number stands for: heads, or a notice."""

    write: str  # of this change, and of no other
    at_s: float  # wall clock
    entries: tuple[Entry, ...] = ()
    notice: tuple[str, str] | None = None  # kind, detail


def encode_change(change: Change, state: int) -> bytes:
    """Settled and open changes alike: which it is, its size tells."""
    return _filled(json.dumps(change, separators=(",", ":")).encode(), state)


def decode_change(content: bytes) -> Change:
    """Raises:
    Unreadable: it is not what was written.
    """
    try:
        write, at_s, entries, notice = json.loads(content.rstrip(b"\0"))
        read = tuple(Entry(*each)._replace(objects=tuple(each[5])) for each in entries)
        return Change(str(write), float(at_s), read, tuple(notice) if notice else None)
    except (ValueError, TypeError, IndexError) as error:
        raise Unreadable(f"it is damaged ({error})") from None


def segment(name: str) -> str:
    """A name as part of a key: no two names have the same one, and no service changes it.

    >>> segment("camera-7"), segment("a/b"), segment(".."), segment("ä")
    ('camera-7', 'a%2Fb', '%2E%2E', '%C3%A4')
    """
    plain = quote(name, safe="", errors="surrogatepass").replace(".", "%2E").replace("~", "%7E")
    if len(plain) <= KEY_MAX:
        return plain
    return "~" + base64.urlsafe_b64encode(name.encode("utf-8", "surrogatepass")).decode()


def name_of(key: str) -> str:
    """The name of which a segment was made.

    >>> name_of("a%2Fb"), name_of("~w6Q=")
    ('a/b', 'ä')
    """
    if key.startswith("~"):
        return base64.urlsafe_b64decode(key[1:]).decode("utf-8", "surrogatepass")
    return unquote(key, errors="surrogatepass")


def _filled(content: bytes, state: int) -> bytes:
    """With zeros at its end, up to a size that says the state."""
    return content + bytes((state - len(content)) % 4)
