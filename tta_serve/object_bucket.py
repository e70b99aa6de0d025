"""A folder of a bucket: objects that are read, listed, and put only if nobody else has put another in between."""

import logging
import re
import threading
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store, from_url

from tta_serve.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "memory")
RETRIES_MAX = 2
LISTED_AT_ONCE = 1000
ANOTHER = {"e_tag": '"00000000000000000000000000000000"', "version": "1"}  # no object's

_FAULTS = (BaseError, OSError, RuntimeError, ValueError)  # all that obstore raises; RuntimeError: what it cannot do
_BUCKET_MISSING = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")

_TELLING = (S3Store, AzureStore)  # where only buckets with versions name one

Tag = Mapping[str, str]  # what a conditional put names: an entity tag, and a version where the service has one


class Read(NamedTuple):
    """An object as it was read, or its beginning."""

    content: bytes
    tag: Tag
    whole_bytes: int  # of the object


class Listed(NamedTuple):
    """An object in a listing."""

    name: str  # the path's last segment
    size: int  # bytes


def refusal(url: str) -> str | None:
    """Why states cannot live at a URL; None: they can, as far as the URL tells."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"this is no URL: {error}"
    if parts.scheme == "file":
        return "folders cannot replace a file only if it is still the same; give a plain path, `path: /folder`, instead"
    if parts.scheme not in SCHEMES:
        return f"{parts.scheme or 'no'} scheme is none of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    if "@" in parts.netloc and parts.scheme not in ("abfs", "abfss"):
        return "credentials do not belong into a URL; give them in the environment"
    if parts.query or parts.fragment:
        return "a URL of a bucket has no `?` and no `#`; settings are given in the environment"
    if parts.scheme != "memory" and not parts.netloc:
        return f"it names no bucket; write {parts.scheme}://BUCKET/FOLDER"
    return None


class Bucket:
    """Making one connects to nothing.

    Args:
        url: of the bucket, with a folder.
        timeout_s: of a request; a connection is waited for half as long.
        allow_http: that requests are not encrypted.
        options: of the service, in obstore's words; others are taken from the environment.

    Raises:
        ConfigError: states cannot live there.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 5.0, allow_http: bool = False, options: Mapping[str, Any] | None = None
    ) -> None:
        if (why := refusal(url)) is not None:
            shown = re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])  # nothing that may be a secret
            raise ConfigError(f"states cannot live at {shown}: {why}")
        self.url = url
        self._checked = threading.Event()  # it was reached
        self._proven = threading.Event()  # it refuses what it must
        if urlsplit(url).scheme == "memory":
            self._store: S3Store | GCSStore | AzureStore | MemoryStore = _in_memory(url)
            return
        try:
            opened = from_url(
                url,
                config=cast(Any, dict(options or {})),
                client_options={
                    "timeout": timedelta(seconds=timeout_s),
                    "connect_timeout": timedelta(seconds=timeout_s / 2),
                    "allow_http": allow_http,
                },
                retry_config={
                    "max_retries": RETRIES_MAX,
                    "retry_timeout": timedelta(seconds=timeout_s),
                    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
                },
            )
        except _FAULTS as error:
            raise ConfigError(f"states cannot live at {url}: {_words(error)}") from None
        self._store = cast("S3Store | GCSStore | AzureStore", opened)

    def get(self, path: str, first_bytes: int | None = None) -> Read | None:
        """An object, or so many bytes of its beginning; None: there is none.

        Raises:
            Unavailable: it cannot be read.
        """
        self._check()
        try:
            options: Any = {} if first_bytes is None else {"range": (0, first_bytes)}
            result = self._store.get(path, options=options)
            return Read(bytes(result.bytes()), _tag(result.meta), result.meta["size"])
        except FileNotFoundError as error:
            if any(words in str(error) for words in _BUCKET_MISSING):
                raise self._unavailable(error) from None
            return None
        except _FAULTS as error:
            raise self._unavailable(error) from None

    def put(self, path: str, content: bytes) -> None:
        """Put an object, whatever is there.

        Raises:
            Unavailable: it cannot be written.
        """
        try:
            self._store.put(path, content, use_multipart=False)
        except _FAULTS as error:
            raise self._unavailable(error) from None

    def put_if(self, path: str, content: bytes, expected: Tag | None) -> bool:
        """Put an object if the one that is there is the expected one (None: if there is none); whether it was put.

        False may also mean that the answer to a first attempt was lost and the second found what the first had put:
        whoever must know puts something of its own into the content, and looks.

        Raises:
            Unavailable: it cannot be written, or the answer did not come.
        """
        try:
            self._store.put(path, content, mode=cast(Any, "create" if expected is None else dict(expected)))
        except (AlreadyExistsError, PreconditionError) as error:
            if any(words in str(error) for words in _BUCKET_MISSING):
                raise self._unavailable(error) from None
            return False
        except _FAULTS as error:
            raise self._unavailable(error) from None
        return True

    def delete(self, path: str) -> None:
        """Raises:
        Unavailable: it may still be there.
        """
        try:
            self._store.delete(path)
        except FileNotFoundError as error:  # services differ in what they say of an object that is not there
            if any(words in str(error) for words in _BUCKET_MISSING):
                raise self._unavailable(error) from None
        except _FAULTS as error:
            raise self._unavailable(error) from None

    def objects(self, folder: str, after: str | None = None) -> list[Listed]:
        """The objects of a folder by name, those after a name.

        Raises:
            Unavailable: it cannot be read.
        """
        offset = None if after is None else f"{folder}/{after}"
        try:
            pages = self._store.list(folder, offset=offset, chunk_size=LISTED_AT_ONCE)
            found = [Listed(each["path"].rpartition("/")[2], each["size"]) for page in pages for each in page]
        except _FAULTS as error:
            raise self._unavailable(error) from None
        return sorted(found)

    def folders(self, folder: str) -> list[str]:
        """The folders in a folder, by name.

        Raises:
            Unavailable: it cannot be read.
        """
        try:
            found = self._store.list_with_delimiter(folder)["common_prefixes"]
        except _FAULTS as error:
            raise self._unavailable(error) from None
        return sorted(each.rstrip("/").rpartition("/")[2] for each in found)

    @property
    def proven(self) -> bool:
        return self._proven.is_set()

    def prove(self, path: str, content: bytes) -> None:
        """Make sure that a put with a condition is refused where the condition does not hold.

        A service that does not know conditions puts the object all the same, and streams would lose what they learned
        with nobody noticing.

        Args:
            path: of an object that exists.
            content: what it has, or had: nothing is lost if it is put.

        Raises:
            Unavailable: it is not refused, or the service cannot be reached.
        """
        if self.put_if(path, content, None) or self.put_if(path, content, ANOTHER):
            raise Unavailable(
                f"the object store {self.url} puts objects although others were put before (it does not know If-Match "
                "and If-None-Match): replicas would undo each other's work; use a service that knows them"
            )
        found = self.get(path)
        if found is not None and found.tag.get("version", "null") != "null" and isinstance(self._store, _TELLING):
            log.warning(
                "the bucket of %s has versions: what a deleted stream had learned stays there, and each save costs "
                "room, until a lifecycle rule expires noncurrent versions (docs/state.md)",
                self.url,
            )
        self._proven.set()

    def _check(self) -> None:
        """Some services say of an object in a bucket that does not exist no more than that there is none."""
        if not self._checked.is_set():
            self.folders("")
            self._checked.set()

    def _unavailable(self, error: BaseException) -> Unavailable:
        text = str(error)
        if any(words in text for words in _BUCKET_MISSING):
            return Unavailable(f"the object store {self.url} does not exist: make the bucket, or name another")
        words = _words(error)
        refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
        if refused or any(f"status code: {code} " in text for code in (401, 403)):  # of a listing, obstore says no more
            return Unavailable(
                f"the object store {self.url} refuses the credentials in the environment ({words}); they must be "
                "allowed to list, get, put and delete objects"
            )
        if isinstance(error, (NotImplementedError, NotSupportedError)):
            return Unavailable(f"the object store {self.url} cannot do what is needed ({words}); use another service")
        if "BadScheme" in text:
            return Unavailable(f"the object store {self.url} is spoken to over http; allow that, or use https")
        return Unavailable(f"the object store {self.url} cannot be used now: {words}")


@cache
def _in_memory(url: str) -> MemoryStore:
    """One for all of this process that name it alike."""
    assert urlsplit(url).scheme == "memory"
    return MemoryStore()


def _tag(meta: Mapping[str, Any]) -> Tag:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key] is not None}


def _words(error: BaseException) -> str:
    r"""What an error says, without what the service and the library add for their developers.

    >>> _words(ValueError("GET http://h/b?sig=secret in 5ms - <Code>AccessDenied</Code><Message>No</Message>"))
    'AccessDenied: No'
    >>> _words(ValueError("GET http://h/b?sig=secret in 5ms - no route\n\nDebug source: ..."))
    'GET http://h/b in 5ms - no route'
    """
    text = str(error)
    code, message = (re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message"))
    if code:
        return f"{code[1]}: {message[1]}" if message else code[1]
    first = text.strip().partition("\n")[0]
    return re.sub(r"\?\S*", "", first)[:300].rstrip() or type(error).__name__
