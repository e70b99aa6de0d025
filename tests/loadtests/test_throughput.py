import argparse
import io
import json
import math
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from rich.console import Console

from loadtests import plots, throughput
from loadtests.client import Client
from loadtests.errors import LoadTestError
from loadtests.rounds import Interval, Paced
from loadtests.wrk import Load

LOAD = Load(answered=200, refused=0, failed=0, duration_s=2.0, p50_ms=1.0, p99_ms=2.0)


def some_rounds():
    variants = ("adapting", "learning", "frozen", "noop")
    share = {"adapting": 0.0, "learning": 0.5}
    return {
        count: [{name: Interval(LOAD, share.get(name, math.nan)) for name in variants} for _ in range(3)]
        for count in (1, 16)
    }


def some_paced(rate=100.0):
    slow = LOAD._replace(answered=120, p99_ms=6.0)
    several = [{**each, "learning": Interval(slow, 0.25)} for each in some_rounds()[16]]
    return Paced(rate, several)


def printed(*tables):
    out = io.StringIO()
    Console(file=out, width=80).print(*tables)  # what a file or a pipe gets
    return out.getvalue()


def row(text, variant):
    """The cells of a variant's row, between blanks."""
    (found,) = (line.split() for line in text.splitlines() if line.split()[:1] == [variant])
    return found


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


def test_the_table_at_one_rate_says_who_could_not_keep_pace():
    text = printed(throughput.paced_table(some_paced()))
    assert "100 requests/s over 16 connections: 70 % of frozen at saturation" in text
    assert row(text, "learning")[:3] == ["learning", "60.0*", "1.00"]
    assert "3.00 (3.00–3.00)" in text  # 6 ms ÷ 2 ms
    assert row(text, "adapting")[:3] == ["adapting", "100", "1.00"]
    assert "* too slow for 100 requests/s: learning" in text
    assert "too slow" not in printed(throughput.paced_table(some_paced(rate=60)))


def test_tables_fit_into_eighty_columns():
    loads = [
        LOAD._replace(answered=n, p50_ms=430.0, p99_ms=p99_ms) for n, p99_ms in ((170, 99.4), (139, 85.1), (2217, 1311))
    ]
    variants = ("adapting", "learning", "frozen", "noop")
    several = [{name: Interval(load._replace(refused=123), 0.5) for name in variants} for load in loads]
    tables = throughput.table({64: several}, "HTTP"), throughput.paced_table(Paced(1152.0, several))
    assert "…" not in printed(*tables)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "throughput.png"
    panels = throughput.panels(some_rounds(), "digits")
    assert [list(panel.series) for panel in panels] == [["frozen", "adapting", "learning", "noop"]] * 2
    assert [panel.series["adapting"] for panel in panels] == [[100, 100], [2, 2]]
    paced = throughput.paced_panel(some_paced(), "digits")
    assert dict(zip(paced.labels, paced.series["100 requests/s"], strict=True)) == {
        "frozen": 2,
        "adapting": 2,
        "learning": 6,
        "noop": 2,
    }
    plots.draw(file, [*panels, paced])
    assert file.read_bytes().startswith(b"\x89PNG")


def test_digits_are_bright_on_black_and_the_shifted_ones_the_negative():
    samples = throughput.digits()
    assert samples.like_source.shape == (throughput.IMAGES, 3, 32, 32)
    assert samples.like_source.dtype == np.uint8
    assert samples.like_source[:, :, 0, 0].max() == 0
    assert samples.shifted[:, :, 0, 0].min() == 255
    assert samples.of("resnet20_learning") is samples.shifted
    assert samples.of("adapting") is samples.of("frozen") is samples.like_source
    assert len({request.body for request in throughput.requests(samples.like_source, "s")}) == throughput.IMAGES


def test_digits_are_enlarged_as_the_model_was_trained():
    from tta_serve.builtin import digits

    small = np.zeros((1, 8, 8))
    small[0, 0, :2] = 16, 8
    large = throughput.enlarged(small)
    # centres of the large pixels, in small ones: −0.375, −0.125, 0.125, 0.375, 0.625, 0.875, 1.125 …
    assert large[0, 0, 0, :7].tolist() == [255, 255, 239, 207, 175, 143, 112]
    held_out = {image.tobytes() for image in digits.split().held_out_images.transpose(0, 3, 1, 2)}
    train = {image.tobytes() for image in digits.split().train_images.transpose(0, 3, 1, 2)}
    assert all(image.tobytes() in held_out | train for image in throughput.digits().like_source)


def test_the_learning_model_is_the_adapting_one_without_its_gate():
    adapting, learning, *_ = throughput.own_models()
    assert learning == {**adapting, "name": "learning", "adaptation": {"mode": "async", "gate": False}}
    assert "gate" not in adapting["adaptation"]


@pytest.fixture
def serve(monkeypatch):
    """A server whose adapting stream's views come from a list; and what was sent: variants, of wrk and of hey."""

    def build(views, **models):
        given = iter(views)
        sent, said = [], []

        def handle(request):
            return httpx.Response(200, json={"pending_rows": 0, **next(given)})

        def load(url, requests, connections, seconds):
            sent.append((url, len(requests), connections, seconds))
            return LOAD

        monkeypatch.setattr(throughput.wrk, "load", load)
        monkeypatch.setattr(throughput.hey, "load", load)
        models = models or {"adapting": "digits", "frozen": "frozen"}
        server = throughput.Server("http://test/", models, throughput.digits(), 3, said.append)
        for variant in models:
            server.clients[variant] = Client("http://test", models[variant], transport=httpx.MockTransport(handle))
        return server, sent, said

    return build


def test_share_learned_is_of_the_interval(serve):
    views = [{"seen": 100}, {"seen": 150}, {"seen": 999}]  # before, after, and when all is drained
    server, sent, _ = serve(views, learning="other", frozen="frozen")
    with server:
        assert server.measure("learning", 16) == (LOAD, 0.25)
        assert math.isnan(server.measure("frozen", 16).share_learned)
    assert sent == [(f"http://test/v2/models/{name}/infer", 32, 16, 3) for name in ("other", "frozen")]


def test_the_gate_is_closed_before_an_adapting_interval(serve):
    opened, closed = {"seen": 100, "gated": False}, {"seen": 200, "gated": True}
    drained = {}
    views = [opened, opened, closed, drained, closed, closed, drained]
    server, sent, said = serve(views)
    with server:
        assert server.measure("adapting", 64) == (LOAD, 0.0)
    assert [each[2:] for each in sent] == [(16, 1), (16, 1), (64, 3)]
    assert said == []


def test_a_gate_that_stays_open_is_told_once(serve, monkeypatch):
    now_s = iter([0.0, 1.0, 99.0])  # the end is set, there is time, there is none
    views = [{}, {}, {}, {"seen": 10}, {"seen": 20}, {}, {"seen": 20}, {"seen": 50}, {}]
    server, _, said = serve(views)
    with server, monkeypatch.context() as patched:
        patched.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: next(now_s)))
        assert server.measure("adapting", 1).share_learned == 0.05
        assert server.measure("adapting", 1).share_learned == 0.15
    assert [text[:46] for text in said] == ["adapting: the gate did not close within 30 s; "]


def test_a_paced_interval_has_one_image_a_connection(serve):
    server, sent, _ = serve([])
    with server:
        assert server.measure_paced("frozen", 70.0).load == LOAD
    assert sent == [("http://test/v2/models/frozen/infer", 16, 70.0, 6)]


def run_with(monkeypatch, frozen):
    """The rounds, and what was measured at one rate; `frozen`: its answers for each connection."""
    asked = []

    class Fake:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def warm(self):
            pass

        def measure(self, variant, connections):
            load = LOAD._replace(answered=frozen * connections) if variant == "frozen" else LOAD
            return Interval(load, math.nan)

        def measure_paced(self, variant, rate):
            asked.append((variant, rate))
            return Interval(LOAD, math.nan)

    monkeypatch.setattr(throughput, "Server", Fake)
    args = argparse.Namespace(seconds=1, pairs=3)
    console = Console(file=io.StringIO(), width=160)
    models = {"adapting": "digits", "frozen": "still"}
    return *throughput.measure_server("http://test", models, throughput.digits(), args, console), asked


def test_all_get_the_rate_of_the_frozen_model(monkeypatch):
    rounds, paced, asked = run_with(monkeypatch, frozen=10)
    assert list(rounds) == [1, 16, 64]
    assert paced.rate == pytest.approx(224)  # 0.7 × 640 answers in 2 s
    assert [variant for variant, _ in asked] == ["adapting", "frozen", "frozen", "adapting", "frozen", "adapting"]
    assert {rate for _, rate in asked} == {paced.rate}


def test_a_frozen_model_that_answers_nothing_is_an_error(monkeypatch):
    with pytest.raises(LoadTestError, match="'still' answered nothing"):
        run_with(monkeypatch, frozen=0)


def test_figures_and_picture_are_written(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    args = argparse.Namespace(json=tmp_path / "figures.json", plot=tmp_path / "figures.png")
    measured = [throughput.Measured("digits", "", some_rounds(), some_paced())]
    out = io.StringIO()
    throughput.tell(measured, Console(file=out, width=160), args)
    assert "failed: 0, refused (429): 0" in out.getvalue()
    found = json.loads(args.json.read_text())["figures"]
    assert (found["ratio/learning_over_frozen"], found["share_learned/learning"]) == (1, 0.5)
    assert (found["ratio/p99_learning_over_frozen"], found["p99_ms_at_70/learning"]) == (3, 6)
    assert args.plot.stat().st_size > 0


def test_a_missing_model_is_told_before_the_run(monkeypatch):
    def handle(request):
        return httpx.Response(404 if "noop" in request.url.path else 200, json={})

    transport = httpx.MockTransport(handle)
    monkeypatch.setattr(throughput, "Client", lambda url, model: Client(url, model, transport=transport))
    models = {"adapting": "digits", "noop": "noop"}
    assert dict(throughput.present("http://test", models, optional=("noop",))) == {"adapting": "digits"}
    with pytest.raises(LoadTestError, match="no model 'noop'"):
        dict(throughput.present("http://test", models))
