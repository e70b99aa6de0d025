import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tta_serve import cli, demo, runfolder
from tta_serve.builtin import digits
from tta_serve.demo import DemoError, play
from tta_serve.demo_figures import PhaseFigures, Summary
from tta_serve.demo_screen import Screen
from tta_serve.protocol import parse_infer
from tta_serve.runfolder import RunFolder, ServerStatus
from tta_serve.shifts import PHASES, Phase

URL = "http://server/v2/models/digits"
SHOW_CURSOR = "\x1b[?25h"

Command = Callable[..., tuple[int, str, str, list[int]]]


def _mark(number: int) -> Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]:
    """A stand-in for a shift: writes the phase's number into the second row of each image."""

    def shift(images: NDArray[np.uint8], generator: np.random.Generator) -> NDArray[np.uint8]:
        marked = images.copy()
        marked[:, 1] = number
        return marked

    return shift


@pytest.fixture(autouse=True)
def _readable_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that tell the fake server their label (first row) and phase (second row); no waiting."""
    labels = np.arange(10)
    images = np.zeros((10, 32, 32, 3), np.uint8)
    images[:, 0] = labels[:, None, None]
    phases = tuple(phase._replace(shift=_mark(i)) for i, phase in enumerate(PHASES))
    monkeypatch.setattr(demo, "PHASES", phases)
    monkeypatch.setattr(digits, "split", lambda: digits.Split(images, labels, images, labels))


class FakeServer:
    """Answers right, but for the first image of each request in the phases told; learns half of what it sees."""

    def __init__(self, frozen_wrong: tuple[int, ...] = (1, 2, 3, 4), adapting_wrong: tuple[int, ...] = ()) -> None:
        self.frozen_wrong = frozen_wrong
        self.adapting_wrong = adapting_wrong
        self.requests: list[httpx.Request] = []
        self.seen = 0
        self.refusals: list[httpx.Response] = []
        self.pending: list[int] = []

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.handle))

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            assert str(request.url) == f"{URL}/streams/cam-1"
            return self._state()
        self.requests.append(request)
        if self.refusals:
            return self.refusals.pop(0)
        assert str(request.url) == f"{URL}/infer"
        asked = parse_infer(request.content, request.headers["Inference-Header-Content-Length"])
        assert asked.outputs == ("labels", "frozen_labels")
        x = asked.tensors["images"]
        labels, phase = x[:, 0, 0, 0].astype(np.int64), int(x[0, 0, 1, 0])
        self.seen += len(x)
        return httpx.Response(
            200,
            json={
                "model_name": "digits",
                "outputs": [
                    _output("labels", _spoilt(labels, phase in self.adapting_wrong)),
                    _output("frozen_labels", _spoilt(labels, phase in self.frozen_wrong)),
                ],
            },
        )

    def _state(self) -> httpx.Response:
        if not self.seen:
            return httpx.Response(404, json={"error": "no such stream"})
        state = {
            "stream": "cam-1",
            "version": 7,
            "steps": self.seen // 4,
            "seen": self.seen,
            "reliable": self.seen,
            "selected": self.seen // 2,
            "entropy": 0.25,
            "pending_rows": self.pending.pop(0) if self.pending else 0,
        }
        return httpx.Response(200, json=state)


def _spoilt(labels: NDArray[np.int64], wrong: bool) -> NDArray[np.int64]:
    spoilt = labels.copy()
    spoilt[0] = (labels[0] + wrong) % 10
    return spoilt


def _output(name: str, values: NDArray[np.int64]) -> dict[str, Any]:
    return {"name": name, "datatype": "INT64", "shape": [len(values)], "data": values.tolist()}


def quiet(width: int = 80, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=terminal, legacy_windows=False), out


def played(server: FakeServer, console: Console | None = None) -> Summary:
    with server.client() as client:
        return play(
            "http://server/",
            "digits",
            stream="cam-1",
            draws=16,
            images_per_request=4,
            console=console or quiet()[0],
            requests_per_s=math.inf,
            client=client,
        )


def figures(**changed: Any) -> PhaseFigures:
    values: dict[str, Any] = {
        "name": "noise",
        "shifted": True,
        "draws": 1024,
        "frozen_accuracy": 0.5,
        "adapting_accuracy": 0.9,
        "entropy": 0.1,
        "selected_share": 0.5,
        "steps": 32,
        "requests_per_s": 12.0,
        "p50_ms": 20.0,
        "p99_ms": 40.0,
    }
    return PhaseFigures(**{**values, **changed})


def test_figures_are_counted_phase_by_phase() -> None:
    summary = played(FakeServer())
    assert [phase.name for phase in summary.phases] == [phase.name for phase in PHASES]
    assert [phase.frozen_accuracy for phase in summary.phases] == [1.0, 0.75, 0.75, 0.75, 0.75, 1.0]
    assert [phase.adapting_accuracy for phase in summary.phases] == [1.0] * 6
    assert {phase.draws for phase in summary.phases} == {16}
    assert {phase.steps for phase in summary.phases} == {4}  # differences, not the stream's totals
    assert {phase.selected_share for phase in summary.phases} == {0.5}
    assert {phase.entropy for phase in summary.phases} == {0.25}
    assert all(0 <= phase.p50_ms <= phase.p99_ms and phase.requests_per_s > 0 for phase in summary.phases)
    assert summary.passed


def test_requests_ask_for_both_answers_on_the_stream() -> None:
    server = FakeServer()
    played(server)
    assert len(server.requests) == 6 * 4
    for request in server.requests:
        assert request.headers["x-answer"] == "both"
        assert request.headers["x-session-id"] == "cam-1"
        head = request.content[: int(request.headers["inference-header-content-length"])]
        assert json.loads(head)["inputs"][0] == {
            "name": "images",
            "shape": [4, 3, 32, 32],
            "datatype": "UINT8",
            "parameters": {"binary_data_size": 4 * 3 * 32 * 32},
        }


def test_not_passed_where_adapting_is_behind_on_a_shift() -> None:
    summary = played(FakeServer(adapting_wrong=(3,)))  # equal is not ahead
    assert not summary.passed
    assert [phase.name for phase in summary.failures] == ["inverted"]
    assert "better here: inverted (75.0% against 75.0%)" in summary.sentence()


def test_not_passed_where_the_last_clean_phase_is_worse() -> None:
    summary = played(FakeServer(adapting_wrong=(5,)))
    assert [phase.name for phase in summary.failures] == ["clean again"]
    assert not summary.passed


@pytest.mark.parametrize(
    ("shifted", "adapting", "good"),
    [(True, 0.501, True), (True, 0.5, False), (False, 0.481, True), (False, 0.479, False)],
)
def test_good_is_ahead_on_a_shift_and_within_two_points_without(shifted: bool, adapting: float, good: bool) -> None:
    assert figures(shifted=shifted, adapting_accuracy=adapting).good == good


def test_a_phase_waits_for_rows_that_are_still_to_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(demo.time, "sleep", slept.append)
    server = FakeServer()
    # after each of the four requests of the phase 32 rows may wait, at its end none
    server.pending = [64, 33, 32, 32, 0, 32, 32, 8, 0]
    assert played(server).passed
    assert slept == [demo.POLL_S] * 4
    assert server.pending == []


def test_a_learner_that_never_catches_up_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(demo.time, "sleep", sleep)
    monkeypatch.setattr(demo, "LEARNER_WAIT_S", 0.2)
    server = FakeServer()
    server.pending = [64] * 1_000
    played(server)
    waits = 6 * (4 + 1)
    assert now[0] == pytest.approx(waits * demo.LEARNER_WAIT_S, rel=0.11)


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(demo.time, "sleep", slept.append)
    server = FakeServer()
    server.refusals = [
        httpx.Response(429, headers={"retry-after": "0.2"}),
        httpx.Response(429, headers={"retry-after": "99"}),
    ]
    assert played(server).passed
    assert slept == [0.2, demo.RETRY_S_MAX]


def test_a_server_that_is_not_there_is_an_error() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    server = FakeServer()
    server.handle = refuse  # type: ignore[method-assign]
    with pytest.raises(DemoError, match=f"{URL} does not answer: connection refused"):
        played(server)


def test_a_refusal_is_told_in_the_servers_words() -> None:
    server = FakeServer()
    server.refusals = [httpx.Response(503, json={"error": "the server is starting"})]
    with pytest.raises(DemoError, match="infer: 503, the server is starting"):
        played(server)


def test_a_server_that_stays_busy_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.time, "sleep", lambda _: None)
    server = FakeServer()
    server.refusals = [httpx.Response(429, json={"error": "the queue is full"})] * demo.RETRIES
    with pytest.raises(DemoError, match="429, the queue is full"):
        played(server)


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, json={"outputs": [_output("labels", np.arange(4))]}),
        httpx.Response(
            200, json={"outputs": [_output("labels", np.arange(3)), _output("frozen_labels", np.arange(4))]}
        ),
        httpx.Response(200, json={}),
        httpx.Response(200, json=[1]),
        httpx.Response(200, text="hello"),
    ],
)
def test_an_answer_that_is_none_is_an_error(reply: httpx.Response) -> None:
    server = FakeServer()
    server.refusals = [reply]
    with pytest.raises(DemoError):
        played(server)


def test_the_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds

    monkeypatch.setattr(demo.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(demo.time, "sleep", sleep)
    pace = demo._Pace(10.0)
    pace.wait()  # the first goes at once
    now[0] += 0.03
    pace.wait()
    now[0] += 1.0  # a slow answer is not made up for by a burst
    pace.wait()
    pace.wait()
    assert slept == [0.07, 0.1]


@pytest.mark.parametrize("width", [80, 100])
def test_without_a_terminal_a_line_for_each_phase_and_one_table(width: int) -> None:
    console, out = quiet(width)
    summary = played(FakeServer(), console)
    text = out.getvalue()
    lines = text.splitlines()
    assert "\x1b" not in text
    assert lines[1] == "noise: 75.0% frozen, 100.0% adapting (+25.0 points), 16 images, 4 steps"
    assert text.count("selected") == 1  # one table
    assert all(len(line) <= width for line in lines)
    assert "✓ low contrast" in text
    assert " ".join(lines).split()[-5:] == summary.sentence().split()[-5:]


def test_a_terminal_shows_the_phase_in_progress() -> None:
    console, out = quiet(terminal=True)
    with console:
        played(FakeServer(), console)
    assert "✓ clean again" in out.getvalue()
    screen = Screen(console, "digits", 1024)
    console.begin_capture()
    console.print(screen.table([figures(name="clean", shifted=False), figures(draws=512)], running=True))
    text = console.end_capture()
    assert "▸ noise: 512 of 1,024 images" in text
    assert "blur" in text  # still to come


def test_interrupted_it_leaves_the_screen_and_says_so_to_its_caller() -> None:
    server = FakeServer()
    answer = server.handle

    def interrupted(request: httpx.Request) -> httpx.Response:
        if len(server.requests) == 6:  # in the second phase
            raise KeyboardInterrupt
        return answer(request)

    server.handle = interrupted  # type: ignore[method-assign]
    console, out = quiet(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        played(server, console)
    assert "✓ clean" in out.getvalue()
    assert out.getvalue().endswith(SHOW_CURSOR)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `tta-serve demo` with these words on a server that is none, and a play that ends like this.

    Gives its exit code, output, errors, and the ports of the servers that it stopped.
    """

    def run(*words: str, play: Callable[[], Summary]) -> tuple[int, str, str, list[int]]:
        server = ServerStatus(8000, "127.0.0.1", 1, "demo.yaml", ("digits",), "ready")
        stopped: list[int] = []
        monkeypatch.setattr(runfolder, "ROOT", tmp_path / "run")
        monkeypatch.setattr(runfolder, "stop", lambda status: stopped.append(status.port))
        monkeypatch.setattr(cli, "start_detached", lambda *_: server)
        monkeypatch.setattr(demo, "play", lambda *_, **__: play())
        monkeypatch.setattr(sys, "argv", ["tta-serve", "demo", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err, stopped

    return run


def interrupt() -> Summary:
    raise KeyboardInterrupt


def test_the_command_interrupted_leaves_the_server_running(command: Command) -> None:
    code, said, told, stopped = command(play=interrupt)
    assert (code, told, stopped) == (130, "Interrupted.\n", [])
    assert said.startswith("ready http://127.0.0.1:8000\n")
    assert said.endswith("It stays up; `tta-serve down --port 8000` stops it.\n")


def test_the_command_interrupted_stops_its_server_with_once(command: Command) -> None:
    code, said, told, stopped = command("--once", play=interrupt)
    assert (code, said, stopped) == (130, "", [8000])
    assert told.startswith("Interrupted; the server is stopped too.\n")


def test_the_command_leaves_a_server_alone_that_ran_before(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runfolder, "ROOT", tmp_path / "run")
    folder = RunFolder(8000)
    with folder.held():
        folder.write(ServerStatus(8000, "127.0.0.1", 1, "config.yaml", ("digits",), "ready"))
        code, said, told, stopped = command("--once", play=interrupt)
    assert (code, told, stopped) == (130, "Interrupted.\n", [])
    assert "It stays up" in said


@pytest.mark.parametrize(("adapting", "expected"), [(0.9, 0), (0.4, 1)])
@pytest.mark.parametrize("words", [(), ("--once",)])
def test_the_commands_exit_code_says_whether_adapting_won(
    command: Command, words: tuple[str, ...], adapting: float, expected: int
) -> None:
    summary = Summary((figures(name="clean", shifted=False), figures(adapting_accuracy=adapting)))
    code, _, told, stopped = command(*words, play=lambda: summary)
    assert code == expected
    assert "Interrupted" not in told
    assert stopped == ([8000] if words else [])


def test_requests_are_cut_to_size() -> None:
    assert demo._sizes(70, 32) == [32, 32, 6]
    assert demo._sizes(64, 32) == [32, 32]


def test_phases_are_drawn_from_the_held_out_digits() -> None:
    source = demo._Source(np.zeros((3, 32, 32, 3), np.uint8), np.array([4, 5, 6]), np.random.default_rng(0))
    images, labels = source.draw(Phase("bright", lambda x, _: x + 9, shifted=True), 20)
    assert images.shape == (20, 3, 32, 32)
    assert images.flags.c_contiguous
    assert set(labels.tolist()) == {4, 5, 6}
    assert (images == 9).all()
