"""Streams that learn and are attached, a few of them in process; starts and figures by hand. No server runs here."""

import io

import httpx
import numpy as np
import pytest
from rich.console import Console

from loadtests import many_streams, many_streams_attach, plots
from loadtests.client import Encoded
from loadtests.errors import LoadTestError
from loadtests.many_streams import EMPTY, FULL, Start
from loadtests.many_streams_attach import Attached, Disk, Memory

ATTACHED = Attached(np.array([0.0001, 0.0002, 0.0003]), np.array([0.002, 0.003, 0.004]))
PAIRS = [{FULL: Start(10.0 + i, 500.0), EMPTY: Start(10.0, 500.0)} for i in range(3)]


class FakeServer:
    """Starts at once, and remembers when its store was there."""

    def __init__(self, folder, events):
        self.url = "http://server"
        self.folder = folder
        self.name = folder.name
        self.events = events
        folder.mkdir()

    def start(self):
        store = self.folder / many_streams.STORE
        self.events.append((self.name, store.exists()))
        store.mkdir(exist_ok=True)

    def stop(self):
        self.events.append((self.name, "stopped"))


@pytest.fixture
def post(monkeypatch):
    """Answers all requests with this status."""

    def answer_with(status):
        monkeypatch.setattr(many_streams.httpx, "post", lambda *_, **__: httpx.Response(status, text="said"))

    return answer_with


@pytest.fixture
def found():
    return many_streams.figures(ATTACHED, Memory(8000.0, 5), Disk(40_000, 4), PAIRS, streams=5)


# -- in process -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streams_learn_are_stored_and_are_attached_again(tmp_path):
    model = many_streams_attach.settings("digits", resident=4, streams_max=20)
    names = many_streams_attach.names(6)
    assert names[:2] == ["camera-00000", "camera-00001"]
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    filling = many_streams_attach.open_engine(model, tmp_path)
    told = []
    many_streams_attach.populate(filling, names, images, told.append)
    assert told == [6]
    filling.streams.durable.store.close()

    engine = many_streams_attach.open_engine(model, tmp_path)
    assert engine.streams.names() == []
    attached, memory = many_streams_attach.measure(engine.streams, names)
    assert attached.store.shape == attached.working_set.shape == (6,)
    assert (attached.working_set > 0).all()
    assert memory.records == 4  # what it may have at hand
    assert 1000 < memory.state_bytes < 10**6
    disk = many_streams_attach.disk(tmp_path, "digits", engine, names)
    assert disk.learned == 6
    assert disk.bytes > 6 * 1000
    engine.streams.durable.store.close()


# -- starts -----------------------------------------------------------------------------------------------------------


def test_both_start_in_turn_and_the_empty_one_forgets(tmp_path, post):
    post(200)
    events = []
    full, empty = FakeServer(tmp_path / FULL, events), FakeServer(tmp_path / EMPTY, events)
    (full.folder / many_streams.STORE).mkdir()
    pairs = many_streams.restarts(full, empty, Encoded({}, b""), 3, Console(file=io.StringIO()))
    assert [list(pair) for pair in pairs] == [[FULL, EMPTY], [EMPTY, FULL], [EMPTY, FULL]]
    assert [event for event in events if event[1] != "stopped"] == [
        *[(FULL, True), (EMPTY, False)],
        *[(EMPTY, False), (FULL, True)],
        *[(EMPTY, False), (FULL, True)],
    ]
    assert events.count((FULL, "stopped")) == events.count((EMPTY, "stopped")) == 3


def test_a_first_answer_that_is_an_error_is_told_and_the_server_stopped(tmp_path, post):
    post(503)
    events = []
    with pytest.raises(LoadTestError, match="503: said"):
        many_streams.start(FakeServer(tmp_path / FULL, events), Encoded({}, b""))
    assert events[-1] == (FULL, "stopped")


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures(found):
    assert found["attach_p50_ms/working_set"] == pytest.approx(0.2)
    assert found["attach_p50_ms/store"] == pytest.approx(3.0)
    assert found["attach_p99_ms/store"] == pytest.approx(3.98)  # 3 + 0.98 · 1
    assert found["database_bytes/stream"] == 8000
    assert found["ready_s/full"] == 11.0
    assert found["ready_s_max/full"] == 12.0
    assert found["ratio/start_full_over_empty"] == pytest.approx(11.5 / 10.5)
    assert many_streams.missed(found) == []


def test_a_slow_attach_misses_the_target(found):
    slow = found | {"attach_p50_ms/working_set": 1.0}
    assert many_streams.missed(slow) == ["attach p50 from the working set 1.00 ms, not below 1 ms"]


def test_what_is_printed_and_drawn(found, tmp_path):
    out = io.StringIO()
    Console(file=out, width=300).print(*many_streams.tables(found, PAIRS), many_streams.summary(found, PAIRS))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["working", "set", "0.200", "0.298"] in lines
    assert ["5", "streams", "11.0", "(10.0–12.0)", "500", "(500–500)"] in lines
    assert "8.0 kB of state in memory" in out.getvalue()
    plots.draw(tmp_path / "out.png", many_streams.picture(found, PAIRS))
    assert (tmp_path / "out.png").stat().st_size > 1000
