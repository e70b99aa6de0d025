"""Streams in a bucket: what every store promises, over a real S3 server and in memory; what servers and writers can
suffer is told in words, and nothing is lost."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import boto3
import moto.settings
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from store_checks import CHECKS, TIMED_CHECKS, Clock, Make, head, put, tombstone
from werkzeug.serving import WSGIRequestHandler, make_server

from tta_serve.errors import ConfigError, Unavailable
from tta_serve.object_bucket import Bucket, refusal
from tta_serve.object_changes import GRACE_S
from tta_serve.object_format import (
    ALIVE,
    OPEN,
    SETTLED,
    Change,
    Entry,
    Start,
    Unreadable,
    decode_change,
    decode_head,
    encode_change,
    encode_head,
    name_of,
    segment,
    state_of,
)
from tta_serve.object_store import ObjectStore
from tta_serve.store import Changed, Head, Notice, Save

pytestmark = pytest.mark.slow  # a server of S3 in Python

BUCKET = "states"
folders = count()


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None: ...


class Server:
    """moto's S3, on a port of loopback. One request at a time: moto looks at a condition and puts in two steps."""

    def __init__(self, port: int = 0) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.ignored: tuple[str, ...] = ()  # headers that this service does not know
        self.lost = 0  # answers to puts of heads that are lost
        self._server = make_server("127.0.0.1", port, self._answer, threaded=True, request_handler=Quiet)
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bucket(self, name: str, *, versions: bool = False) -> None:
        client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
        )
        client.create_bucket(Bucket=name)
        if versions:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        client.close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        for each in self.ignored:
            environ.pop(each, None)
        answers: list[tuple[Any, ...]] = []
        with self._lock:
            content = b"".join(self._moto(environ, lambda *answer: answers.append(answer)))
        if self.lost and environ["REQUEST_METHOD"] == "PUT" and "/heads/" in environ["PATH_INFO"]:
            self.lost -= 1
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        start(*answers[-1])
        return [content]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.bucket(BUCKET)
    yield server
    server.stop()


@pytest.fixture
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ_of(server.url).items():
        monkeypatch.setenv(name, value)


def environ_of(url: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }


Open = Callable[..., ObjectStore]


@contextmanager
def opening(url: str) -> Iterator[Open]:
    stores: list[ObjectStore] = []

    def another(generation: str = "a1", at: str = url, **more: Any) -> ObjectStore:
        stores.append(ObjectStore(at, "traffic", generation, allow_http=True, **more))
        return stores[-1]

    yield another
    for store in stores:
        store.close()


@pytest.fixture
def in_memory() -> Iterator[Open]:
    with opening(f"memory://{next(folders)}") as another:
        yield another


@pytest.fixture
def in_s3(environment: None) -> Iterator[Open]:
    with opening(f"s3://{BUCKET}/{next(folders)}/states") as another:
        yield another


@pytest.fixture(params=["in_memory", "in_s3"])
def make(request: pytest.FixtureRequest) -> Open:
    found: Open = request.getfixturevalue(request.param)
    return found


# What every store promises


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_store(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.parametrize("check", TIMED_CHECKS, ids=lambda check: check.__name__)
def test_every_store_in_time(make: Make, check: Callable[[Make, Clock], None], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    check(make, clock)


def test_a_stream_may_be_saved_twice_at_once(in_memory: Open) -> None:
    store = in_memory()
    first, second = store.save([Save("s", None, head(1, 1)), Save("s", (1, 1), head(1, 2))])
    assert first is not None
    assert second is not None
    assert first < second
    assert store.load("s") == head(1, 2)


def test_more_streams_than_a_change_has_numbers(in_memory: Open) -> None:
    store = in_memory()
    numbers = store.save([Save(str(each), None, Head(1, 0, {}, None)) for each in range(1025)])
    assert None not in numbers
    assert len(set(numbers)) == store.count() == len(store.changes(0).heads) == 1025
    assert store.changes(numbers[1022] or 0).heads == (Changed("1023", 1, 0, False), Changed("1024", 1, 0, False))


def test_a_long_record_is_listed(make: Open) -> None:
    store = make()
    record = {"events": ["ü" * 5_000]}
    put(store, "s", None, Head(1, 1, record, b"x" * 10_000))
    assert [(line.head.record, line.snapshot_bytes) for line in store.page(1)[0]] == [(record, 10_000)]


def test_models_share_a_bucket_and_nothing_else(in_memory: Open) -> None:
    one = in_memory()
    other = ObjectStore(one._bucket.url, "street", "a1")
    put(one, "s", None, head(1, 1))
    one.renew("r", 5.0, 0)
    assert (other.load("s"), other.count(), other.members(), other.changes(0)) == (None, 0, [], (0, (), ()))
    other.close()


# Processes

ADD = """
import sys
from tta_serve.object_store import ObjectStore
from tta_serve.store import Head, Save
store = ObjectStore(sys.argv[1], "traffic", "a1", allow_http=True)
wins = 0
while wins < int(sys.argv[2]):
    there = store.load("sum")
    more = str(int(there.snapshot) + 1).encode()
    kept = (there.version + 1,)
    (number,) = store.save([Save("sum", there.tag, Head(1, there.version + 1, {}, more, kept), {kept[0]: more})])
    wins += number is not None
    print(wins, flush=True)
store.close()
"""


def adding(store: ObjectStore, server: Server, wins: int) -> "subprocess.Popen[str]":
    environ = {**os.environ, **environ_of(server.url)}
    return subprocess.Popen(
        [sys.executable, "-c", ADD, store._bucket.url, str(wins)], env=environ, stdout=-1, text=True
    )


def test_two_processes_lose_nothing(in_s3: Open, server: Server) -> None:
    store = in_s3()
    put(store, "sum", None, head(1, 0, b"0"))
    processes = [adding(store, server, 10) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].split()[-1] for process in processes] == ["10", "10"]
    assert [process.returncode for process in processes] == [0, 0]
    there = store.load("sum")
    assert there is not None
    assert (there.version, there.snapshot) == (20, b"20")
    assert store.load_kept("sum", 20) == b"20"
    assert kept_objects(store, "sum") == 1


def test_a_writer_that_is_killed_leaves_nothing_behind(in_s3: Open, server: Server) -> None:
    """At whatever moment: what it last put is told, and no object is left that no head names."""
    clock = Clock()
    store = in_s3(clock=clock)
    put(store, "sum", None, head(1, 0, b"0"))
    seen, number = 0, store.changes(-1).number
    for _ in range(3):
        process = adding(store, server, 1_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for _ in range(2):
            found = store.changes(number)
            number = found.number
            seen = max([seen, *(change.version for change in found.heads)])
            clock.now_s += GRACE_S
        there = store.load("sum")
        assert there is not None
        assert there.version == seen > 0
        assert there.snapshot == store.load_kept("sum", seen) == str(seen).encode()
        assert kept_objects(store, "sum") == 1


def kept_objects(store: ObjectStore, stream: str) -> int:
    return len(store._bucket.objects(f"traffic/generations/a1/kept/{segment(stream)}"))


# Writers that die


class Dead(Exception):
    """What a writer that has died does next."""


def dies_after(store: ObjectStore, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on only so many objects are put or deleted."""
    left = [writes]

    def mortal(do: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            if not left[0]:
                raise Dead
            left[0] -= 1
            return do(*arguments)

        return write

    for name in ("put", "put_if", "delete"):
        monkeypatch.setattr(store._bucket, name, mortal(getattr(store._bucket, name)))


@pytest.mark.parametrize("gone", [False, True], ids=["learns", "is deleted"])
def test_a_writer_may_die_before_each_of_its_writes(
    in_memory: Open, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    clock, outcomes = Clock(), []
    for writes in count():
        stream = f"s{writes}"
        reader = in_memory(clock=clock)
        put(reader, stream, None, head(1, 4, b"4", 3), v3=b"three")
        start = reader.changes(-1).number
        writer = in_memory()
        writer._log.prepare()
        dies_after(writer, writes, monkeypatch)
        new = Save(stream, (1, 4), tombstone(2)) if gone else Save(stream, (1, 4), head(1, 5, b"5", 4), {4: b"four"})
        try:
            (number,) = writer.save([new])
        except Dead:
            number = None
        before = reader.changes(start)
        assert not before.heads or before.number > start
        clock.now_s += GRACE_S
        after = reader.changes(start)
        there = reader.load(stream)
        assert there is not None
        if there == new.head:
            assert after.heads == (Changed(stream, *new.head.tag, gone),)
            assert kept_objects(reader, stream) == len(new.head.kept)
        else:
            assert there == head(1, 4, b"4", 3)
            assert after.heads == ()
            assert [reader.load_kept(stream, 3), kept_objects(reader, stream)] == [b"three", 1]
        assert in_memory().changes(-1).number == after.number >= start
        assert reader.changes(after.number) == (after.number, (), ())
        put(in_memory(), stream, there.tag, head(3, 1))  # nobody stands in anybody's way
        outcomes.append((there == new.head, number is not None))
        if number is not None:
            break
    # claim, [kept,] head, drop, settle: alive only after the last, though the head is there before
    lost = 2 if gone else 3
    assert outcomes == [(False, False)] * lost + [(True, False)] * 2 + [(True, True)]


def test_a_stream_whose_beginner_died_can_begin(in_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    reader, writer = in_memory(clock=clock), in_memory()
    writer._log.prepare()
    dies_after(writer, 1, monkeypatch)
    with pytest.raises(Dead):
        writer.save([Save("s", None, head(1, 1))])
    known = reader.changes(0).number
    clock.now_s += GRACE_S
    assert reader.changes(0).number > known
    assert (reader.load("s"), reader.count(), reader.page(9)) == (None, 0, ([], 0))
    number = put(reader, "s", None, head(1, 1))
    assert reader.changes(known) == (number, (Changed("s", 1, 1, False),), ())


def test_a_writer_that_slept_has_lost(in_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on after its change was settled by a reader: the condition of its put does not hold any more."""
    clock = Clock()
    reader, writer = in_memory(clock=clock), in_memory()
    for stream, expected in (("new", None), ("old", (1, 4))):
        if expected:
            put(reader, stream, None, head(1, 4, b"4", 3), v3=b"three")
        start, there, kept = reader.changes(-1).number, reader.load(stream), kept_objects(reader, stream)
        replace = writer._heads.replace

        def late(*arguments: Any, replace: Any = replace, start: int = start) -> bool:
            open_still = reader.changes(start)
            assert open_still == (open_still.number, (), ())
            clock.now_s += GRACE_S
            assert reader.changes(start).number > open_still.number
            return bool(replace(*arguments))

        monkeypatch.setattr(writer._heads, "replace", late)
        assert writer.save([Save(stream, expected, head(1, 5, b"5", 5), {5: b"five"})]) == [None]
        monkeypatch.undo()
        assert (reader.load(stream), kept_objects(reader, stream)) == (there, kept)
        assert reader.changes(start).heads == ()


def test_readers_wait_for_an_open_change_and_no_longer(in_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = in_memory(), in_memory()
    start = reader.announce("first", "")
    claim = writer._log.claim
    between: list[int] = []

    def slow(change: Change) -> int:
        key = claim(change)
        between.append(reader.announce("second", ""))
        assert reader.changes(start) == (start, (), ())
        return key

    monkeypatch.setattr(writer._log, "claim", slow)
    number = put(writer, "s", None, head(1, 1))
    assert reader.changes(start) == (between[0], (Changed("s", 1, 1, False),), (Notice(between[0], "second", ""),))
    assert number < between[0]


# Pruning


def test_a_reader_that_slept_through_a_pruning_misses_nothing(in_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    store = in_memory()
    put(store, "before", None, head(1, 1))
    start = store.changes(-1).number
    put(store, "a", None, head(1, 1))
    put(store, "a", (1, 1), head(1, 2))
    put(store, "b", None, head(1, 1))
    clock.now_s += 100
    last = put(store, "c", None, tombstone(2))
    assert store.prune(50) == 0
    assert len(store._log.listed(None)) == 1
    expected = {Changed("a", 1, 2, False), Changed("b", 1, 1, False), Changed("c", 2, 0, True)}
    for each in (store, in_memory()):
        found = each.changes(start)
        assert (found.number, set(found.heads), found.notices) == (last, expected, ())


def test_a_writer_that_slept_through_a_pruning_makes_no_number_anew(
    in_memory: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    asleep, awake = in_memory(), in_memory()
    asleep.announce("first", "")
    numbers = [awake.announce("kind", "") for _ in range(5)]
    clock.now_s += 100
    awake.prune(50)
    assert asleep.announce("last", "") > numbers[-1]
    assert set(awake._log.listed(None)) == {numbers[-1] // 1024, numbers[-1] // 1024 + 1}


def test_tombstones_leave_no_object_in_the_end(make: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    store = make()
    put(store, "s", None, head(1, 1, b"1", 1), v1=b"one")
    put(store, "s", (1, 1), tombstone(2))
    clock.now_s += 100
    assert (store.prune(50), store.load("s")) == (1, None)
    assert len(store._heads.places("a1")) == 1
    clock.now_s += 100
    assert (store.prune(50), store._heads.places("a1"), kept_objects(store, "s")) == (0, [], 0)


# Servers


METHODS: dict[str, Callable[[ObjectStore], object]] = {
    "load": lambda store: store.load("s"),
    "load_kept": lambda store: store.load_kept("s", 1),
    "save": lambda store: store.save([Save("s", None, Head(1, 1, {}, b"state"))]),
    "page": lambda store: store.page(10),
    "count": lambda store: store.count(),
    "changes": lambda store: store.changes(0),
    "announce": lambda store: store.announce("kind", "detail"),
    "erase_elsewhere": lambda store: store.erase_elsewhere("s"),
    "renew": lambda store: store.renew("r", 5.0, 0),
    "members": lambda store: store.members(),
    "leave": lambda store: store.leave("r"),
    "prune": lambda store: store.prune(60.0),
}


def check_unavailable(store: ObjectStore, said: str, methods: tuple[str, ...] = tuple(METHODS)) -> None:
    for name in methods:
        with pytest.raises(Unavailable, match=said) as caught:
            METHODS[name](store)
        assert store._bucket.url in str(caught.value)
        assert "secret" not in str(caught.value)


def test_methods_are_all_tried() -> None:
    public = {name for name, each in vars(ObjectStore).items() if not name.startswith("_") and callable(each)}
    assert public == {*METHODS, "close"}


def test_a_server_that_is_down_and_comes_back(in_s3: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
    store = in_s3(timeout_s=1.0)
    number = put(store, "s", None, head(1, 1))
    other.stop()
    begun_s = time.monotonic()
    check_unavailable(store, "cannot be used now")
    assert time.monotonic() - begun_s < 3 * len(METHODS)
    other = Server(other.port)
    assert store.load("s") == head(1, 1)
    put(store, "s", (1, 1), head(1, 2))
    assert store.changes(number).heads == (Changed("s", 1, 2, False),)
    other.stop()


def test_a_server_that_does_not_answer(in_s3: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun_s = time.monotonic()
        check_unavailable(in_s3(timeout_s=0.2), "cannot be used now", ("load", "save", "changes", "renew"))
        assert time.monotonic() - begun_s < 8


def test_a_bucket_that_does_not_exist(in_s3: Open) -> None:
    check_unavailable(in_s3(at="s3://nobodys/states"), "make the bucket, or name another")


def test_credentials_that_are_refused(in_s3: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    check_unavailable(in_s3(), "refuses the credentials in the environment .*InvalidAccessKeyId")


def test_no_credentials_at_all(in_s3: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
    check_unavailable(in_s3(timeout_s=0.5), "cannot be used now", ("load", "save"))


def test_http_must_be_allowed(environment: None) -> None:
    store = ObjectStore(f"s3://{BUCKET}/x", "traffic", "a1")
    check_unavailable(store, "spoken to over http", ("load", "renew"))
    store.close()


@pytest.mark.parametrize("header", ["HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"])
def test_a_service_that_knows_no_conditions_is_refused(in_s3: Open, server: Server, header: str) -> None:
    server.ignored = (header,)
    try:
        store = in_s3()
        check_unavailable(store, "does not know If-Match", ("save", "announce", "renew", "save"))
        assert store.count() == 0
    finally:
        server.ignored = ()


def test_a_writer_whose_answer_was_lost_has_won(in_s3: Open, server: Server) -> None:
    """The second attempt finds a head in the place of the expected one: what the first had put."""
    store = in_s3()
    server.lost = 1
    put(store, "s", None, head(1, 1, b"1"))
    server.lost = 1
    put(store, "s", (1, 1), head(1, 2, b"2"))
    server.lost = 99  # no attempt is answered
    put(store, "s", (1, 2), head(1, 3, b"3"))
    server.lost = 0
    assert store.load("s") == head(1, 3, b"3")


@pytest.mark.parametrize("versions", [True, False])
def test_versions_are_said_at_the_start(
    in_s3: Open, server: Server, caplog: pytest.LogCaptureFixture, versions: bool
) -> None:
    name = f"bucket-{next(folders)}"
    server.bucket(name, versions=versions)
    store = in_s3(at=f"s3://{name}/states")
    with caplog.at_level(logging.WARNING):
        store.renew("r", 5.0, 0)
        store.renew("r", 5.0, 0)
        put(store, "s", None, head(1, 1))
    assert [("has versions" in each.message, name in each.message) for each in caplog.records] == [
        (True, True)
    ] * versions


# What lies in a bucket


def test_objects_that_cannot_be_read(in_memory: Open) -> None:
    store = in_memory()
    put(store, "s", None, head(1, 1, b"1", 1), v1=b"one")
    store.renew("r", 5.0, 0)
    bucket = store._bucket
    (kept,) = bucket.objects("traffic/generations/a1/kept/s")
    bucket.delete(f"traffic/generations/a1/kept/s/{kept.name}")
    with pytest.raises(Unavailable, match=r"kept/s/1-.* cannot be read: it is missing"):
        store.load_kept("s", 1)
    path = "traffic/generations/a1/heads/s"
    whole = bucket.get(path)
    assert whole is not None
    broken = (b"", b"GIF89a", whole.content[:40], whole.content[:-4], whole.content + b"1234", b"tta-head" + b"\0" * 80)
    for content in broken:
        bucket.put(path, content)
        with pytest.raises(Unavailable, match=f"{path} in memory://.* cannot be read"):
            store.load("s")
    for name in ("page", "save"):
        bucket.put(path, b"tta-head" + b"\0" * 80)
        with pytest.raises(Unavailable, match=f"{path} .*cannot be read"):
            METHODS[name](store)
    bucket.put("traffic/members/r", b"[")
    check_unavailable(store, "traffic/members/r .*cannot be read", ("members", "prune"))
    bucket.put("traffic/floor", b"?")
    check_unavailable(in_memory(), "traffic/floor .*cannot be read", ("announce", "renew"))
    (key,) = store._log.listed(None)
    bucket.put(f"traffic/changes/{key:020d}", b"{}00")
    bucket.put("traffic/floor", b"0")
    check_unavailable(in_memory(), f"traffic/changes/0*{key} .*cannot be read", ("changes",))


def test_heads_as_bytes() -> None:
    start = Start(2, 7, ALIVE, 4095, 1.5, "w1", {5: "5-w0"}, 5)
    content = encode_head(start, {"a": "ü"}, b"state")
    assert decode_head(content) == (start, Head(2, 7, {"a": "ü"}, b"state", (5,)))
    assert [state_of(len(encode_head(start._replace(state=each), {}, b"12"))) for each in range(3)] == [0, 1, 2]
    with pytest.raises(Unreadable, match="bytes, which is not"):
        decode_head(content + bytes(4))


def test_changes_as_bytes() -> None:
    change = Change("w1", 1.5, (Entry("a1", "ü", 1, 2, False, ("3-w1",), True),), None)
    notice = Change("w2", 1.5, (), ("forget", "{}"))
    for state in (OPEN, SETTLED):
        for each in (change, notice):
            content = encode_change(each, state)
            assert (decode_change(content), state_of(len(content))) == (each, state)
    with pytest.raises(Unreadable, match="damaged"):
        decode_change(b"[1]")


@given(st.text(max_size=128), st.text(max_size=128))
def test_names_are_keys(one: str, other: str) -> None:
    assert name_of(segment(one)) == one
    assert len(segment(one)) <= 700
    assert (segment(one) == segment(other)) == (one == other)
    assert set(segment(one)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_%~=")


REFUSED: Mapping[str, str] = {
    "file:///var/states": "give a plain path",
    "http://host/x": "http scheme is none of s3://, ",
    "/var/states": "no scheme is none of",
    "s3://": "names no bucket",
    "s3:///x": "names no bucket",
    "s3://key:secret@bucket/x": "credentials do not belong into a URL",
    "s3://bucket/x?secret=1": "settings are given in the environment",
    "s3://[": "no URL",
}


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_are_refused(url: str) -> None:
    assert REFUSED[url] in (refusal(url) or "")
    with pytest.raises(ConfigError, match=REFUSED[url]) as caught:
        Bucket(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/a/b", "gs://bucket/x", "az://container/x", "memory://x"])
def test_urls_that_are_accepted(url: str) -> None:
    assert refusal(url) is None


def test_an_account_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match=r"az://container/x: .*Account must be specified"):
        Bucket("az://container/x")
