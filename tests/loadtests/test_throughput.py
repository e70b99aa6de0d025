import io
import math

import httpx
import numpy as np
import pytest
from rich.console import Console

from loadtests import plots, throughput
from loadtests.client import Client
from loadtests.errors import LoadTestError
from loadtests.rounds import Interval
from loadtests.wrk import Load

LOAD = Load(answered=200, refused=0, failed=0, duration_s=2.0, p50_ms=1.0, p99_ms=2.0)


def some_rounds():
    variants = ("adapting", "frozen", "noop")
    share = {"adapting": 0.5}
    return {
        count: [{name: Interval(LOAD, share.get(name, math.nan)) for name in variants} for _ in range(3)]
        for count in (1, 16)
    }


def printed(*tables):
    out = io.StringIO()
    Console(file=out, width=160).print(*tables)
    return out.getvalue()


def test_tables():
    text = printed(throughput.table(some_rounds(), "HTTP"), throughput.ratio_table(some_rounds()))
    for cell in (
        "100 (100–100)",
        " 0.50 ",
        "1.00 (1.00–1.00)",
        "–",
        "noop",
        "saturated at 1 connections",
    ):
        assert cell in text


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "throughput.png"
    panels = throughput.panels(some_rounds(), "digits")
    assert [list(panel.series) for panel in panels] == [["frozen", "adapting", "noop"]] * 2
    assert [panel.series["adapting"] for panel in panels] == [[100, 100], [2, 2]]
    plots.draw(file, panels)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_digits_are_dark_on_white_and_differ():
    images = throughput.inverted_digits(4)
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == np.uint8
    assert images[:, :, 0, 0].min() == 255
    assert len(throughput.requests("s")) == throughput.IMAGES
    assert len({request.body for request in throughput.requests("s")}) == throughput.IMAGES


def test_share_learned_is_of_the_interval(monkeypatch):
    seen = iter([100, 150])  # before and after; what drains later is not asked for

    def handle(request):
        return httpx.Response(200, json={"seen": next(seen, 999), "pending_rows": 0})

    monkeypatch.setattr(throughput.wrk, "load", lambda *_: LOAD)
    server = throughput.Server("http://test/", {"adapting": "digits", "frozen": "frozen"}, seconds=1)
    server.clients["adapting"] = Client("http://test", "digits", transport=httpx.MockTransport(handle))
    with server:
        assert server.measure("adapting", 16) == (LOAD, 0.25)
        assert math.isnan(server.measure("frozen", 16).share_learned)


def test_a_missing_model_is_told_before_the_run(monkeypatch):
    def handle(request):
        return httpx.Response(404 if "noop" in request.url.path else 200, json={})

    transport = httpx.MockTransport(handle)
    monkeypatch.setattr(throughput, "Client", lambda url, model: Client(url, model, transport=transport))
    models = {"adapting": "digits", "noop": "noop"}
    assert dict(throughput.present("http://test", models, optional=("noop",))) == {"adapting": "digits"}
    with pytest.raises(LoadTestError, match="no model 'noop'"):
        dict(throughput.present("http://test", models))
