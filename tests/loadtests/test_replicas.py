"""Rounds, paired differences and metrics by hand; no server runs here."""

import io
import threading

import httpx
import numpy as np
import pytest
from rich.console import Console

from loadtests import plots, replicas, replicas_metrics
from loadtests.errors import RequestFailed
from loadtests.replicas import Played

METRICS = """\
# HELP tta_pending_rows Rows waiting to be learned from.
tta_pending_rows{model="cifar",replica="%s"} %.1f
tta_images_total{model="cifar",replica="%s"} 96.0
tta_images_total{model="digits",replica="other"} 5.0
tta_skipped_rows_total{model="cifar",reason="off",replica="r1"} 7.0
"""


@pytest.fixture
def metrics():
    """Metrics of two replicas, from answers in turn: of which replica, with how many pending rows."""

    def make(*answers):
        left = list(answers)

        def answer(request):
            assert request.url.path == "/metrics"
            status, replica, pending = left.pop(0) if len(left) > 1 else left[0]
            return httpx.Response(status, text=METRICS % (replica, pending, replica))

        http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))
        return replicas_metrics.ReplicaMetrics(http, "cifar", 2), left

    return make


def some_played(wrong, share=1.0, round_s=2.0):
    frozen = np.array([[True, True, True, False], [True, False, False, False]])
    return Played(np.array(wrong, dtype=bool), frozen, share, round_s)


@pytest.fixture
def played():
    return {1: some_played([[1, 0, 0, 0], [0, 0, 0, 0]]), 2: some_played([[1, 1, 0, 0], [0, 0, 0, 1]], 0.625, 2.5)}


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_every_stream_sends_all_its_images_in_order_and_the_learner_is_waited_for_each_round():
    # 20 images, 16 a request: image i of each stream is i, the right label; "b" is answered one too much
    images = {name: np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1) for name in ("a", "b")}
    asked, lock, drained, told = [], threading.Lock(), [], []

    def ask(stream, x):
        with lock:
            asked.append((stream, x[:, 0, 0, 0].tolist()))
        right = x[:, 0, 0, 0].astype(np.int64)
        return right + (stream == "b"), right

    def drain():
        drained.append(len(asked))

    wrong, frozen, _ = replicas.play(
        ask, drain, images, np.arange(20), lambda done, rounds: told.append((done, rounds)), round_s=0.0
    )
    first, second = list(range(16)), list(range(16, 20))
    assert sorted(asked[:2]) == [("a", first), ("b", first)]
    assert sorted(asked[2:]) == [("a", second), ("b", second)]
    assert drained == [2, 4]
    assert told == [(1, 2), (2, 2)]
    assert wrong.sum(axis=1).tolist() == [0, 20]
    assert not frozen.any()


def test_a_round_takes_no_less_than_it_shall(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(replicas.time, "monotonic", lambda: now_s[0])
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        now_s[0] += seconds

    monkeypatch.setattr(replicas.time, "sleep", sleep)

    def drain():
        now_s[0] += 0.5 if not waited else 3.0

    images = {"a": np.zeros((32, 1, 1, 1), dtype=np.uint8)}
    _, _, round_s = replicas.play(lambda _, x: (x[:, 0, 0, 0],) * 2, drain, images, np.zeros(32), round_s=2.0)
    assert waited == [1.5, 0.0]
    assert round_s == 2.5  # 2 and 3


def test_the_error_of_a_difference_is_that_over_images():
    # image by image, mean of both streams: 0, 1/2, 0, 1/2; s² = 1/12, s/√4 = 0.1443
    difference = replicas.paired(
        np.array([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=bool), np.array([[1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    )
    assert difference.mean == 25.0
    assert difference.standard_error == pytest.approx(14.434, abs=1e-3)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures(played):
    found = replicas.figures(["fog", "snow"], played)
    assert found["error/interleaved/frozen"] == 50.0
    assert found["error/interleaved/one_replica"] == 12.5
    assert found["error/interleaved/two_replicas"] == 37.5
    assert found["error/interleaved/two_replicas/fog"] == 50.0
    assert found["error/interleaved/two_replicas/snow"] == 25.0
    assert found["difference/two_replicas_minus_one"] == 25.0
    assert found["largest_share/two_replicas"] == 0.625
    assert found["images/stream"] == 4


def test_what_is_printed_and_drawn(played, tmp_path):
    out = io.StringIO()
    Console(file=out, width=80).print(replicas.table(["fog", "snow"], played), replicas.summary(played))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["fog", "75.00", "25.00", "50.00", "+25.00"] in lines
    assert ["mean", "of", "2", "50.00", "12.50", "37.50", "+25.00"] in lines
    assert "+25.00 ± 14.43 points" in out.getvalue()
    plots.draw(tmp_path / "out.png", replicas.picture(["fog", "snow"], played))
    assert (tmp_path / "out.png").stat().st_size > 1000


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_drained_is_when_every_replica_has_said_so(metrics):
    both, left = metrics((200, "r1", 3), (200, "r1", 0), (200, "r1", 0), (200, "r2", 1), (200, "r2", 0), (200, "x", 9))
    both.drain()
    assert left == [(200, "x", 9)]


def test_one_that_never_says_so_is_an_error(metrics):
    both, _ = metrics((200, "r1", 0))
    with pytest.raises(RequestFailed, match="only 1 of 2 replicas"):
        both.drain(max_s=0.0)


def test_images_of_each_replica(metrics):
    both, _ = metrics((200, "r1", 0), (200, "r2", 0))
    assert both.images() == {"r1": 96.0, "r2": 96.0}


def test_a_replica_that_has_answered_nothing_has_no_images():
    text = METRICS.replace("tta_images_total", "tta_other_total") % ("r1", 0, "r1")
    http = httpx.Client(
        base_url="http://server", transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    )
    assert replicas_metrics.ReplicaMetrics(http, "cifar", 1).images() == {"r1": 0.0}


def test_metrics_that_are_refused_are_an_error(metrics):
    both, _ = metrics((503, "r1", 0))
    with pytest.raises(RequestFailed, match="503"):
        both.images()
