import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tta_serve import runfolder
from tta_serve.errors import ConfigError, Unavailable
from tta_serve.runfolder import RunFolder, ServerStatus, running, stop

READY = ServerStatus(8000, "127.0.0.1", 4242, "server.yaml", ("digits", "noop"), "ready")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runfolder, "ROOT", tmp_path / "tta")
    return tmp_path / "tta"


@pytest.fixture
def serving() -> Iterator[contextlib.ExitStack]:
    """Folders entered here are held until the end of the test, or its `close()`."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("gpu1", "http://gpu1:8000"),
    ],
)
def test_the_url_is_one_that_can_be_asked(host: str, url: str) -> None:
    assert READY._replace(host=host).url == url


def test_a_folder_is_for_this_user_alone(root: Path) -> None:
    folder = RunFolder(8000)
    folder.make()
    folder.make()  # a second time changes nothing
    assert folder.path == root / "8000"
    assert folder.log == root / "8000" / "server.log"
    assert [path.stat().st_mode & 0o777 for path in (root, folder.path)] == [0o700, 0o700]


def test_a_root_that_is_a_link_or_somebody_elses_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not a folder of this user's alone; remove it"):
        RunFolder(8000).make()
    root.unlink()
    root.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="is not a folder of this user"):
        RunFolder(8000).make()


def test_a_folder_is_held_by_one_server() -> None:
    folder = RunFolder(8000)
    assert not folder.alive()
    with folder.held():
        assert folder.alive()
        assert RunFolder(8000).alive()
        assert not RunFolder(8001).alive()
        with (
            pytest.raises(ConfigError, match=r"already runs on port 8000; `tta-serve down --port 8000` stops it"),
            RunFolder(8000).held(),
        ):
            pass
        with RunFolder(8001).held():
            assert RunFolder(8001).alive()
        assert folder.alive()
    assert not folder.alive()
    with folder.held():  # and can be held again
        assert folder.alive()


def test_asking_does_not_take_the_lock_away() -> None:
    folder = RunFolder(8000)
    folder.make()
    assert not folder.alive()
    with folder.held():
        assert folder.alive()


def test_a_server_that_fails_lets_go() -> None:
    folder = RunFolder(8000)
    with pytest.raises(ZeroDivisionError), folder.held():
        raise ZeroDivisionError
    assert not folder.alive()


def test_a_server_may_remove_its_folder_while_it_holds_it() -> None:
    folder = RunFolder(8000)
    with folder.held():
        folder.write(READY)
        folder.remove()
    assert not folder.path.exists()
    assert not folder.alive()
    assert folder.read() is None
    folder.remove()  # a second time changes nothing


def test_what_is_written_is_read() -> None:
    folder = RunFolder(8000)
    folder.make()
    assert folder.read() is None
    for status in (READY._replace(phase="starting"), READY, READY._replace(phase="failed", message="no weights — ö")):
        folder.write(status)
        assert folder.read() == status
    assert not list(folder.path.glob("*.part"))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"models": 3}', '{"port": 1, "models": []}'])
def test_what_cannot_be_read_is_nothing(content: str) -> None:
    folder = RunFolder(8000)
    folder.make()
    (folder.path / "status.json").write_text(content)
    assert folder.read() is None


def test_a_status_of_another_version_is_nothing() -> None:
    folder = RunFolder(8000)
    folder.make()
    (folder.path / "status.json").write_text(json.dumps({**READY._asdict(), "colour": "red"}))
    assert folder.read() is None


def test_running_lists_who_is_alive_by_port(root: Path, serving: contextlib.ExitStack) -> None:
    assert running() == []
    for port in (9000, 8000):
        folder = RunFolder(port)
        serving.enter_context(folder.held())
        folder.write(READY._replace(port=port))
    dead, silent = RunFolder(7000), RunFolder(7001)
    dead.make()
    dead.write(READY._replace(port=7000))
    serving.enter_context(silent.held())  # alive, and has said nothing yet
    (root / "notes.txt").touch()
    assert [status.port for status in running()] == [8000, 9000]


def test_stop_asks_and_waits_until_the_server_has_let_go(
    monkeypatch: pytest.MonkeyPatch, serving: contextlib.ExitStack
) -> None:
    asked: list[tuple[int, int]] = []
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            serving.close()

    serving.enter_context(RunFolder(8000).held())
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append((pid, number)))
    monkeypatch.setattr(runfolder.time, "sleep", sleep)
    stop(READY)
    assert asked == [(4242, signal.SIGTERM)]
    assert len(waited) == 3


def test_stop_says_so_when_the_server_stays(monkeypatch: pytest.MonkeyPatch, serving: contextlib.ExitStack) -> None:
    serving.enter_context(RunFolder(8000).held())
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with pytest.raises(Unavailable, match=r"port 8000 \(process 4242\) has not stopped after -1 s"):
        stop(READY, wait_s=-1)


def test_stop_of_a_server_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    stop(READY)
