import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio.from_thread
import httpx
import numpy as np
import pytest
import spots
import torch
from PIL import Image
from rich.console import Console

from tta_serve import cli, demo, demo_detection, modalities, models, runfolder
from tta_serve.builtin import scene_detector, scenes
from tta_serve.builtin.scenes import Scene
from tta_serve.config import ModTrSettings, Tokens
from tta_serve.demo import DemoError, Model
from tta_serve.demo_detection import PHASES, Kept, Outcome, draw, play
from tta_serve.demo_detection_figures import DetectionFigures, DetectionSummary
from tta_serve.demo_detection_screen import screen
from tta_serve.detection import DetectionEngine
from tta_serve.detection_service import DetectionService
from tta_serve.detectors import Detector
from tta_serve.http import model_app
from tta_serve.http_detection import DetectionRoutes
from tta_serve.learner import Pools
from tta_serve.metrics import Metrics
from tta_serve.model_service import Limits
from tta_serve.remembered import Remembered
from tta_serve.runfolder import ServerStatus

URL = "http://server/v2/models/digit-scenes"
DRAWS = 6
SEEN = 4 * DRAWS  # pictures in all phases

Command = Callable[..., tuple[int, str, str, list[int]]]
Found = list[dict[str, Any]]


class FakeServer:
    """Finds all there is in RGB; in infrared nothing without the translator, and all with it.

    Args:
        unlike: pictures, by their number from 0, that the translator is of no use for.
        taken_for: modality by number of the picture, where it is recognised as another than it is.
        frozen_sees: whether the frozen detector finds everything in infrared too.
    """

    def __init__(
        self, unlike: tuple[int, ...] = (), taken_for: dict[int, str] | None = None, frozen_sees: bool = False
    ) -> None:
        self.unlike = unlike
        self.taken_for = taken_for or {}
        self.frozen_sees = frozen_sees
        self.requests: list[httpx.Request] = []
        self.instead: list[httpx.Response] = []
        self.known = {
            scene.image.tobytes(): (modality, scene)
            for modality, made in (("rgb", scenes.scenes), ("ir", scenes.infrared_scenes))
            for scene in made(DRAWS, demo_detection.SEED, True)
        }

    def handle(self, request: httpx.Request) -> httpx.Response:
        if self.instead:
            return self.instead.pop(0)
        assert (request.method, str(request.url)) == ("POST", f"{URL}/predict")
        number = len(self.requests)
        self.requests.append(request)
        modality, scene = self.known[np.asarray(Image.open(io.BytesIO(request.content))).tobytes()]
        name = self.taken_for.get(number, modality)
        translated = [] if number in self.unlike else _all(scene)
        frozen = _all(scene) if modality == "rgb" or self.frozen_sees else []
        return httpx.Response(200, json=_reply(name, translated, frozen))


def _all(scene: Scene) -> Found:
    return [
        {"box": box, "label": str(label - 1), "index": label, "score": 0.9}
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)
    ]


def _reply(modality: str, translated: Found, frozen: Found) -> dict[str, Any]:
    routed = {"width": 128, "height": 128, "modality": {"name": modality, "decided": "recognised", "confidence": 1.0}}
    return {
        "predictions": [{**routed, "detections": translated}],
        "frozen_predictions": [{**routed, "detections": frozen}],
    }


def quiet(width: int = 80, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=terminal, legacy_windows=False), out


def played(server: FakeServer, console: Console | None = None) -> Outcome:
    with httpx.Client(transport=httpx.MockTransport(server.handle)) as client:
        return play(
            "http://server/",
            "digit-scenes",
            stream="cam-1",
            draws=DRAWS,
            console=console or quiet()[0],
            client=client,
        )


def figures(**changed: Any) -> DetectionFigures:
    values: dict[str, Any] = {
        "name": "ir",
        "infrared": True,
        "draws": 200,
        "frozen_ap50": 0.004,
        "translated_ap50": 0.85,
        "recognised": 200,
        "images_per_s": 20.0,
        "p50_ms": 50.0,
        "p99_ms": 90.0,
    }
    return DetectionFigures(**{**values, **changed})


def summary(ir_ap50: float = 0.85) -> DetectionSummary:
    rgb = {"infrared": False, "frozen_ap50": 0.96, "translated_ap50": 0.96}
    phases = (figures(name="rgb", **rgb), figures(translated_ap50=ir_ap50), figures(name="rgb again", **rgb))
    return DetectionSummary(phases, same_answers=200)


def test_figures_are_counted_phase_by_phase() -> None:
    outcome = played(FakeServer())
    phases = outcome.summary.phases
    assert [phase.name for phase in phases] == ["rgb", "ir", "mixed", "rgb again"]
    assert [phase.infrared for phase in phases] == [False, True, True, False]
    frozen = [phase.frozen_ap50 for phase in phases]
    assert frozen[:2] == [1.0, 0.0]
    assert 0 < frozen[2] < 1  # every other scene of it is infrared
    assert frozen[3] == 1.0
    assert [phase.translated_ap50 for phase in phases] == [1.0] * 4
    assert {phase.draws for phase in phases} == {phase.recognised for phase in phases} == {DRAWS}
    assert all(0 <= phase.p50_ms <= phase.p99_ms and phase.images_per_s > 0 for phase in phases)
    assert outcome.summary.same_answers == DRAWS
    assert outcome.summary.passed


def test_pictures_are_sent_without_their_modality() -> None:
    server = FakeServer()
    played(server)
    assert len(server.requests) == SEEN
    for request in server.requests:
        assert request.headers["x-answer"] == "both"
        assert request.headers["x-session-id"] == "cam-1"
        assert request.headers["content-type"] == "image/png"
        assert "x-modality" not in request.headers
        assert not request.url.query
    modes = [Image.open(io.BytesIO(request.content)).mode for request in server.requests]
    assert modes == ["RGB"] * DRAWS + ["L"] * DRAWS + ["RGB", "L"] * (DRAWS // 2) + ["RGB"] * DRAWS
    assert [r.content for r in server.requests[:DRAWS]] == [r.content for r in server.requests[-DRAWS:]]


def test_a_modality_that_is_mistaken_counts() -> None:
    outcome = played(FakeServer(taken_for={0: "ir", DRAWS: "rgb", DRAWS + 1: "uv"}))
    assert [phase.recognised for phase in outcome.summary.phases] == [5, 4, 6, 6]
    assert "the server recognised 21 of 24." in outcome.summary.sentence()


def test_not_passed_where_the_translator_is_not_ahead_on_infrared() -> None:
    outcome = played(FakeServer(frozen_sees=True))  # equal is not ahead
    assert [phase.name for phase in outcome.summary.failures] == ["ir", "mixed"]
    assert not outcome.summary.passed
    assert outcome.summary.sentence().endswith("better here: ir (1.000 against 1.000), mixed (1.000 against 1.000).")


def test_not_passed_where_rgb_ends_worse() -> None:
    outcome = played(FakeServer(unlike=(SEEN - 1, SEEN - 2)))
    assert [phase.name for phase in outcome.summary.failures] == ["rgb again"]
    assert outcome.summary.same_answers == DRAWS - 2


def test_the_sentence_says_how_many_answers_are_the_same() -> None:
    assert "all 200 scenes got the very boxes that they got at first." in summary().sentence()
    other = DetectionSummary(summary().phases, same_answers=198)
    assert "198 of 200 scenes got the very boxes" in other.sentence()
    assert other.sentence().startswith(
        "On infrared scenes the frozen detector alone has AP50 0.004, with its translator 0.850; on RGB it has 0.960."
    )


@pytest.mark.parametrize(
    ("infrared", "translated", "good"),
    [(True, 0.501, True), (True, 0.5, False), (False, 0.481, True), (False, 0.479, False)],
)
def test_good_is_ahead_on_infrared_and_within_two_points_without(infrared: bool, translated: float, good: bool) -> None:
    assert figures(infrared=infrared, frozen_ap50=0.5, translated_ap50=translated).good == good


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(demo.time, "sleep", slept.append)
    server = FakeServer()
    server.instead = [httpx.Response(429, headers={"retry-after": "0.2"})]
    assert played(server).summary.passed
    assert slept == [0.2]


def test_a_refusal_is_told_in_the_servers_words() -> None:
    server = FakeServer()
    server.instead = [httpx.Response(503, json={"error": "the server is starting"})]
    with pytest.raises(DemoError, match="predict: 503, the server is starting"):
        played(server)


ONE: Found = [{"box": [1, 2, 3, 4], "label": "0", "index": 1, "score": 0.5}]


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"predictions": _reply("rgb", ONE, ONE)["predictions"]},
        {**_reply("rgb", ONE, ONE), "frozen_predictions": []},
        {"predictions": ["0"], "frozen_predictions": ["0"]},  # of a classifier
        _reply("rgb", ONE, [{**ONE[0], "box": [1, 2, 3]}]),
        _reply("rgb", ONE, [{**ONE[0], "box": "1234"}]),
        _reply("rgb", ONE, [{**ONE[0], "index": None}]),
        _reply("rgb", [{**ONE[0], "score": 1e999}], ONE),
        _reply("rgb", [{"box": [1, 2, 3, 4]}], ONE),
    ],
)
def test_an_answer_that_is_none_is_an_error(content: dict[str, Any]) -> None:
    text = demo.json.dumps(content)  # 1e999 is Infinity there, which httpx would not write
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    with httpx.Client(transport=transport) as client, pytest.raises(DemoError, match="should answer one picture with"):
        demo_detection.find(Model.at("http://server", "digit-scenes", client), "s", np.zeros((8, 8, 1), np.uint8))


@pytest.mark.parametrize("width", [80, 100])
def test_without_a_terminal_a_line_for_each_phase_and_one_table(width: int) -> None:
    console, out = quiet(width)
    outcome = played(FakeServer(), console)
    text = out.getvalue()
    lines = text.splitlines()
    assert "\x1b" not in text
    assert lines[1] == "ir: AP50 0.000 frozen, 1.000 translated, 6 of 6 recognised"
    assert text.count("p50") == 1  # one table
    assert all(len(line) <= width for line in lines)
    assert "✓ rgb again" in text
    assert " ".join(lines).split()[-5:] == outcome.summary.sentence().split()[-5:]


def test_a_terminal_shows_the_phase_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_detection, "SHOWN_EVERY", 2)
    console, out = quiet(terminal=True)
    with console:
        played(FakeServer(), console)
    assert "✓ rgb again" in out.getvalue()
    table = screen(console, "digit-scenes", [phase.name for phase in PHASES], 200)
    console.begin_capture()
    console.print(table.table([figures(name="rgb", infrared=False), figures(draws=40)], running=True))
    text = console.end_capture()
    assert "▸ ir: 40 of 200 images" in text
    assert "mixed" in text  # still to come


@pytest.mark.parametrize(("terminal", "looks"), [(True, 4 * 2 + 4), (False, 4)])
def test_figures_are_reckoned_where_somebody_sees_them(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, looks: int
) -> None:
    reckoned = []
    reckon = demo_detection._Tally.figures
    monkeypatch.setattr(demo_detection._Tally, "figures", lambda tally: reckoned.append(tally) or reckon(tally))
    monkeypatch.setattr(demo_detection, "SHOWN_EVERY", 2)  # after 2 and 4 of 6, and at the end of each phase
    played(FakeServer(), quiet(terminal=terminal)[0])
    assert len(reckoned) == looks


def test_the_first_scenes_are_kept_and_drawn() -> None:
    outcome = played(FakeServer())
    assert len(outcome.kept) == 4
    first = next(scenes.infrared_scenes(1, demo_detection.SEED, True))
    kept = outcome.kept[0]
    assert (kept.infrared.image == first.image).all()
    assert kept.rgb.image.shape[2] == 3
    assert kept.infrared_answer.frozen.scores.tolist() == []
    assert kept.infrared_answer.translated.boxes.tolist() == first.boxes.tolist()
    picture = draw(outcome)
    assert picture.width > 3 * 3 * 128
    assert picture.height > 4 * 3 * 128


@pytest.fixture(scope="module")
def kept() -> tuple[Kept, ...]:
    return played(FakeServer()).kept


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `tta-serve demo --detection` with these words on a server that is none, and a play that ends like this.

    Gives its exit code, output, errors, and the ports of the servers that it stopped.
    """

    def run(*words: str | Path, play: Callable[[], Outcome]) -> tuple[int, str, str, list[int]]:
        server = ServerStatus(8000, "127.0.0.1", 1, "demo.yaml", ("digit-scenes",), "ready")
        stopped: list[int] = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(runfolder, "ROOT", tmp_path / "run")
        monkeypatch.setattr(runfolder, "stop", lambda status: stopped.append(status.port))
        monkeypatch.setattr(cli, "start_detached", lambda *_: server)
        monkeypatch.setattr(demo_detection, "play", lambda *_, **__: play())
        monkeypatch.setattr(sys, "argv", ["tta-serve", "demo", "--detection", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err, stopped

    return run


@pytest.mark.parametrize(("ir_ap50", "expected"), [(0.85, 0), (0.001, 1)])
@pytest.mark.parametrize("words", [(), ("--once",)])
def test_the_commands_exit_code_says_whether_the_translator_won(
    command: Command, kept: tuple[Kept, ...], tmp_path: Path, words: tuple[str, ...], ir_ap50: float, expected: int
) -> None:
    code, said, _, stopped = command(*words, play=lambda: Outcome(summary(ir_ap50), kept))
    assert code == expected
    assert stopped == ([8000] if words else [])
    assert said.startswith(f"The first scenes, drawn: {tmp_path}/digit-scenes.png\n")
    assert kind(tmp_path / "digit-scenes.png") == "PNG"
    written = (tmp_path / "run" / "8000" / "demo.yaml").read_text()
    assert written == "http: {port: 8000}\nmodels:\n  - name: digit-scenes\n    source: {builtin: digit-scenes}\n"


def test_the_picture_goes_where_it_is_told(command: Command, kept: tuple[Kept, ...], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "[red]before and after"  # PNG whatever its name
    code, said, _, _ = command("--picture", path, play=lambda: Outcome(summary(), kept))
    assert code == 0
    assert f"drawn: {path}\n" in said
    assert kind(path) == "PNG"
    assert not (tmp_path / "digit-scenes.png").exists()


def test_a_picture_that_cannot_be_written_is_refused_before_anything_starts(command: Command, tmp_path: Path) -> None:
    code, said, told, stopped = command("--picture", tmp_path / "nowhere" / "a.png", play=_must_not)
    assert (code, said, stopped) == (2, "", [])
    assert told.startswith(f"error --picture: {tmp_path}/nowhere/a.png cannot be a file")


def test_interrupted_it_draws_nothing_and_stops_its_server(command: Command, tmp_path: Path) -> None:
    def interrupt() -> Outcome:
        raise KeyboardInterrupt

    code, said, told, stopped = command("--once", play=interrupt)
    assert (code, said, stopped) == (130, "", [8000])
    assert told.startswith("Interrupted; the server is stopped too.\n")
    assert not (tmp_path / "digit-scenes.png").exists()


def kind(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.format


def _must_not() -> Outcome:
    raise AssertionError


@contextmanager
def _serving(detector: torch.nn.Module) -> Iterator[httpx.Client]:
    """A client of a detector in this process, with a translator for `ir` that has learned nothing yet."""
    digest, settings = models.digest_of(detector), ModTrSettings()
    frozen = Detector(detector).freeze()
    modality = modalities.begin(spots.translator_file(detector=detector, plain=True), frozen, settings)
    engine = DetectionEngine(frozen, {"ir": modality}, settings, digest, 1, streams_max=10)
    service = DetectionService(
        engine,
        scene_detector.LABELS,
        Metrics("digit-scenes", "test"),
        mode="async",
        limits=Limits(128 * 128, 4),
        batch_rows_max=4,
        queue_rows=8,
        remembered=Remembered(8, 2**20, 600),
        pools=Pools(step_rows=8, step_wait_s=0.5, queue_rows=64),
        budget=0.3,
    )
    routes = DetectionRoutes("digit-scenes", lambda: service, Tokens(infer=None, admin=None))
    app = model_app(routes, service).app
    prefix = "/v2/models/digit-scenes"

    async def answer(request: httpx.Request) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            url = request.url.copy_with(path=request.url.path.removeprefix(prefix))
            said = await client.post(url, content=request.content, headers=request.headers)
        return httpx.Response(said.status_code, headers=said.headers, content=said.content)

    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.router.lifespan_context(app)),
        httpx.Client(transport=httpx.MockTransport(lambda request: portal.call(answer, request))) as client,
    ):
        yield client


def test_the_built_in_detector_over_http() -> None:
    detector = scene_detector.load()
    with _serving(detector) as client:
        outcome = play("http://server", "digit-scenes", stream="cam-1", draws=4, console=quiet()[0], client=client)
    rgb, infrared, mixed, again = outcome.summary.phases
    assert [phase.recognised for phase in outcome.summary.phases] == [4] * 4
    assert rgb.frozen_ap50 == rgb.translated_ap50 == again.frozen_ap50 == again.translated_ap50 > 0.8
    assert infrared.frozen_ap50 < mixed.frozen_ap50 < rgb.frozen_ap50
    assert outcome.summary.same_answers == 4
    scene, answer = outcome.kept[0].rgb, outcome.kept[0].rgb_answer
    image = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255
    with torch.inference_mode():
        (direct,) = detector([image])
    assert answer.frozen.labels.tolist() == direct["labels"].tolist()
    assert answer.frozen.boxes.numpy() == pytest.approx(direct["boxes"].numpy(), abs=0.02)
