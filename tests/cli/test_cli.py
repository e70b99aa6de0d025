"""What the command says and how it ends, wherever no server has to be started."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tta_serve import __version__, cli, runfolder
from tta_serve.runfolder import RunFolder, ServerStatus

GOOD = """\
http: {port: 8123}
models:
  - name: digits
    source: {builtin: digits}
"""

# a server that holds its run folder and ends on SIGTERM, as far as `status` and `down` can tell
STAND_IN = """\
import os, signal, sys
from pathlib import Path
from tta_serve import runfolder
from tta_serve.runfolder import RunFolder, ServerStatus

runfolder.ROOT = Path(sys.argv[1])
folder = RunFolder(int(sys.argv[2]))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
with folder.held():
    folder.write(ServerStatus(folder.port, "127.0.0.1", os.getpid(), "some/config.yaml", ("digits",), "ready"))
    print("up", flush=True)
    signal.sigwait([signal.SIGTERM])
"""


@pytest.fixture(autouse=True)
def run_folders(tmp_path, monkeypatch) -> Path:
    """Other servers of this user neither show nor suffer."""
    root = tmp_path / "run"
    monkeypatch.setattr(runfolder, "ROOT", root)
    monkeypatch.setenv("COLUMNS", "80")
    return root


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `tta-serve` with these words; gives its exit code, output and errors."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tta-serve", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def config(tmp_path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def stand_in(run_folders):
    """Starts a process that looks like the server of a port."""
    started = []

    def start(port: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", STAND_IN, str(run_folders), str(port)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()


def test_version(command):
    assert command("version") == (0, f"{__version__}\n", "")


def test_it_is_a_module_too():
    said = subprocess.run([sys.executable, "-m", "tta_serve", "version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"{__version__}\n"


def test_help_names_every_command(command):
    code, said, _ = command("--help")
    assert code == 0
    assert all(f" {name} " in said for name in ("up", "down", "status", "check", "demo", "version"))


def test_check_says_what_a_good_file_holds(command, config):
    path = config(GOOD)
    code, said, _ = command("check", path)
    assert code == 0
    assert said == f"{path}: good. Models: digits. Port: 8123.\n"  # one line on a narrow terminal too


def test_check_takes_a_path_as_it_is_written(command, tmp_path):
    path = tmp_path / "[red]config.yaml"
    path.write_text(GOOD)
    assert command("check", path)[1].startswith(f"{path}: good.")


def test_check_reports_every_problem_with_its_line(command, config):
    path = config(
        "http: {port: 99999}\n"
        "models:\n"
        "  - name: a b\n"
        "    source: {builtin: digits}\n"
        "  - name: two\n"
        "    source: torchvision/resnet18\n"
        "    wieghts: DEFAULT\n"
        "    adaptation: {budget: 2}\n"
    )
    code, said, told = command("check", path)
    assert (code, said) == (2, "")
    lines = sorted(told.removeprefix("error ").splitlines())
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in lines] == ["1", "3", "7", "8"]
    assert "99999" in lines[0]
    assert "'a b'" in lines[1]
    assert "models.1.wieghts: there is no such key" in lines[2]
    assert "models.1.adaptation.budget" in lines[3]
    assert "not 2" in lines[3]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("models: [", 1, "expected the node content"),
        ("- 1\n", 1, "the file must be a mapping"),
        ("http: {}\n", 1, "models"),
        (GOOD + "http: {port: 1}\n", 1, "'http' is given twice"),
        (GOOD + "    weights: ./nowhere.pt\n", 3, "built-in model brings its own weights"),
        (GOOD.replace("{builtin: digits}", "torchvision/resnet18\n    weights: ./nowhere.pt"), 3, "./nowhere.pt"),
        (GOOD.replace("{builtin: digits}", "{builtin: digits}\n    prior: ./nowhere.npz"), 5, "nowhere.npz"),
        (GOOD.replace("{builtin: digits}", "digits"), 4, "torchvision/NAME"),
        (GOOD + "    adaptation: {mode: sometimes}\n", 5, "'sometimes'"),
    ],
)
def test_check_refuses(command, config, text, line, says):
    path = config(text)
    code, said, told = command("check", path)
    assert (code, said) == (2, "")
    assert told.startswith(f"error {path}:{line}: ")
    assert told.count("\n") == 1
    assert says in told


def test_check_refuses_a_file_that_is_not_there(command, tmp_path):
    path = tmp_path / "nowhere.yaml"
    code, _, told = command("check", path)
    assert code == 2
    assert told == f"error {path}: cannot be read: No such file or directory\n"


def test_check_refuses_a_token_that_is_named_and_not_set(command, config, monkeypatch):
    path = config("auth: {infer_token_env: NO_SUCH_TOKEN}\n" + GOOD)
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    code, _, told = command("check", path)
    assert code == 2
    assert "auth.infer_token_env names NO_SUCH_TOKEN, which is not set" in told
    monkeypatch.setenv("NO_SUCH_TOKEN", "secret")
    code, said, _ = command("check", path)
    assert code == 0
    assert "secret" not in said


@pytest.mark.parametrize(
    "words", [["up"], ["check"], ["nonsense"], ["down", "--port", "http"], ["demo", "--draws", "1"]]
)
def test_a_wrong_call_is_explained(command, words):
    code, said, told = command(*words)
    assert code == 2
    assert "Usage: " in said + told
    assert "Traceback" not in told


def test_no_server_runs(command):
    assert command("status") == (3, "No server runs. Start one with `tta-serve up CONFIG`.\n", "")
    code, said, told = command("down")
    assert (code, said, told) == (2, "", "error no server runs\n")
    assert command("down", "--port", "1")[2] == "error no server runs on port 1\n"


def test_what_a_server_left_behind_is_not_a_server(command):
    folder = RunFolder(1)
    with folder.held():
        folder.write(ServerStatus(1, "127.0.0.1", 1, "config.yaml", ("digits",), "ready"))
    assert command("status")[0] == 3
    assert command("down")[0] == 2  # and nobody has signalled process 1


def test_status_shows_each_server_whole(command, stand_in):
    pids = [stand_in(port).pid for port in (1, 2)]
    code, said, _ = command("status")
    assert code == 0
    for port, pid in zip((1, 2), pids, strict=True):
        line = next(line for line in said.splitlines() if f"http://127.0.0.1:{port}" in line)
        assert str(pid) in line
        assert "ready" in line
    assert said.count("answering") == 2  # nothing listens there
    assert "…" not in said


def test_down_stops_the_one_server(command, stand_in):
    process = stand_in(1)
    assert command("down")[:2] == (0, "Stopped http://127.0.0.1:1.\n")
    assert process.wait(timeout=30) == 0
    assert command("status")[0] == 3


def test_down_asks_which_of_several(command, stand_in):
    stand_in(1)
    stand_in(2)
    code, _, told = command("down")
    assert code == 2
    assert told == "error several servers run; say which: --port 1 or 2\n"
    assert command("down", "--port", "2")[:2] == (0, "Stopped http://127.0.0.1:2.\n")
    assert "http://127.0.0.1:1 " in command("status")[1]


@pytest.mark.parametrize("message", ["", "the model `traffic` does not start"])
def test_up_lets_a_server_that_runs_go_over_to_the_configuration(command, config, stand_in, monkeypatch, message):
    stand_in(8123)
    asked = []
    ask_for = RunFolder.ask_for

    def answered(folder, path):
        update = ask_for(folder, path)
        status = folder.read()
        assert folder.take_update(status) == update
        asked.append(update)
        folder.write(status._replace(update=update.id, message=message))
        assert folder.take_update(folder.read()) is None
        return update

    monkeypatch.setattr(RunFolder, "ask_for", answered)
    path = config(GOOD)
    code, said, told = command("up", path, "--detach")
    (update,) = asked
    assert (update.config, update.folder) == (str(path.absolute()), str(Path.cwd()))
    if message:
        assert (code, said) == (2, "")
        assert told == f"error {message}\n"
    else:
        assert code == 0
        assert said.startswith("ready http://127.0.0.1:8123\n")


def test_up_gives_up_on_a_server_that_does_not_answer(command, config, stand_in, monkeypatch):
    monkeypatch.setattr(cli, "START_WAIT_S", 0.2)
    stand_in(8123)
    code, _, told = command("up", config(GOOD))
    assert code == 2
    assert "did not go over to" in told


def test_demo_refuses_a_server_without_the_digits(command, run_folders):
    folder = RunFolder(1)
    with folder.held():
        folder.write(ServerStatus(1, "127.0.0.1", os.getpid(), "config.yaml", ("traffic",), "ready"))
        code, _, told = command("demo", "--port", "1")
    assert code == 2
    assert told == "error the server on port 1 has no model `digits`; choose another --port\n"


def test_demo_of_detection_refuses_a_server_without_the_scenes(command, run_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(1)
    with folder.held():
        folder.write(ServerStatus(1, "127.0.0.1", os.getpid(), "config.yaml", ("digits",), "ready"))
        code, _, told = command("demo", "--detection", "--port", "1")
    assert code == 2
    assert told == "error the server on port 1 has no model `digit-scenes`; choose another --port\n"
    assert not (tmp_path / "digit-scenes.png").exists()


def test_demo_draws_no_picture_of_digits(command):
    code, _, told = command("demo", "--picture", "a.png")
    assert (code, told) == (2, "error --picture goes with --detection: the digits demo draws none\n")


def test_a_run_folder_of_somebody_else_is_refused(command, config, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = tmp_path / "link"
    link.symlink_to(elsewhere)
    monkeypatch.setattr(runfolder, "ROOT", link)
    code, _, told = command("up", config(GOOD), "--detach")
    assert code == 2
    assert "is not a folder of this user" in told


def test_looking_for_a_server_brings_nothing_back(command):
    folder = RunFolder(1)
    with folder.held():
        folder.write(ServerStatus(1, "127.0.0.1", os.getpid(), "config.yaml", ("digits",), "ready"))
    (folder.path / "lock").unlink()  # as far as a server that ends may have come with its folder
    assert command("status")[0] == 3
    assert command("down")[0] == 2
    assert [path.name for path in folder.path.iterdir()] == ["status.json"]
