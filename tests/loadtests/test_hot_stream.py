"""Requests, rounds and figures by hand; no server runs here."""

import io
import math

import pytest
from rich.console import Console

from loadtests import hot_stream, plots
from loadtests.errors import LoadTestError
from loadtests.hot_stream import HEADER, LEASTCONN, Interval
from loadtests.wrk import Load

LOAD = Load(answered=200, refused=0, failed=0, duration_s=2.0, p50_ms=1.0, p99_ms=2.0)


def some_rounds(header_answered=150, header_p99_ms=5.0):
    header = LOAD._replace(answered=header_answered, p99_ms=header_p99_ms)
    return [{LEASTCONN: Interval(LOAD, 0.5), HEADER: Interval(header, 0.9)} for _ in range(3)]


class FakeServer:
    """Answers as many as it can."""

    def __init__(self, rps):
        self.rps = rps
        self.asked = []

    def load(self, rate, seconds):
        self.asked.append((rate, round(rate * seconds)))
        reached = min(rate, self.rps)
        count = round(rate * seconds)
        return Interval(LOAD._replace(answered=count, duration_s=count / reached if reached else math.inf), 0.5)


def test_the_hot_stream_has_four_fifths():
    pytest.importorskip("sklearn")
    streams = [request.headers["x-session-id"] for request in hot_stream.requests()]
    assert len(streams) == 20
    assert streams.count("hot") == 16
    assert len(set(streams)) == 5
    assert len({request.body for request in hot_stream.requests()}) > 10  # its images differ


def test_both_are_measured_as_fast_as_they_answer_and_at_one_rate():
    servers = {LEASTCONN: FakeServer(400), HEADER: FakeServer(300)}
    saturated, paced, rate = hot_stream.measure(servers, pairs=3, seconds=3, told=lambda _: None)
    assert rate == 280  # 70 % of 400
    # 400 to warm (and once more, 800, to see how fast it is), then 3 s of what leastconn answers, then 3 s of the rate
    assert servers[LEASTCONN].asked == [(2000.0, 400), (2000.0, 800), *[(2000.0, 1200)] * 3, *[(280.0, 840)] * 3]
    assert servers[HEADER].asked == [(2000.0, 400), *[(2000.0, 1200)] * 3, *[(280.0, 840)] * 3]
    assert [list(each) for each in saturated] == [[LEASTCONN, HEADER], [HEADER, LEASTCONN], [HEADER, LEASTCONN]]
    assert paced[0][HEADER].load.rps == pytest.approx(280)


def test_a_server_that_answers_nothing_is_an_error():
    servers = {name: FakeServer(0) for name in (LEASTCONN, HEADER)}
    with pytest.raises(LoadTestError, match="answered nothing"):
        hot_stream.measure(servers, pairs=3, seconds=3, told=lambda _: None)


def test_figures():
    found = hot_stream.figures(some_rounds(), some_rounds(header_p99_ms=8.0), 70.0)
    assert found["rps/leastconn"] == 100
    assert found["rps/header"] == 75
    assert found["ratio/header_over_leastconn"] == 0.75
    assert found["ratio/p99_header_over_leastconn"] == 4.0
    assert found["p99_ms/header"] == 5.0
    assert found["p99_ms_at_70/header"] == 8.0
    assert found["largest_share/header"] == 0.9
    assert found["rps_asked_at_70/leastconn"] == 70.0
    assert found["failed_requests/header"] == 0


def test_what_is_printed_and_drawn(tmp_path):
    out = io.StringIO()
    rounds = some_rounds()
    Console(file=out, width=100).print(hot_stream.table(rounds, "hot"), hot_stream.summary(rounds, rounds))
    text = out.getvalue()
    assert "75.0 (75.0–75.0)" in text
    assert "90%" in text
    assert "requests/s 0.75 (0.75–0.75)" in text
    plots.draw(tmp_path / "out.png", hot_stream.picture(rounds, rounds))
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_the_servers_learn_and_share_a_store():
    (model,) = hot_stream.configuration()
    assert model["replicas"] == 2
    assert model["adaptation"] == {"gate": False}
    assert hot_stream.BALANCE[HEADER] == "hdr(x-session-id)"
