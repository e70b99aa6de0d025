"""The `tta-serve` command."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import httpx
import typer
from rich.console import Console
from rich.table import Column, Table

from tta_serve import __version__, config, runfolder
from tta_serve.errors import ConfigError, TTAError
from tta_serve.runfolder import RunFolder, ServerStatus
from tta_serve.state_cli import state
from tta_serve.train_translator_cli import train_translator

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out = Console()
err = Console(stderr=True)

START_WAIT_S = 1860.0  # a little more than the server gives itself
DEMO_CONFIG = """\
http: {{port: {port}}}
models:
  - name: {model}
    source: {{builtin: {model}}}
"""
DIGITS, SCENES = "digits", "digit-scenes"  # the built-in models that the demo plays
DEMO_DRAWS = {DIGITS: 1024, SCENES: 200}
DEMO_PICTURE = Path("digit-scenes.png")
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration file (YAML).")]
Port = Annotated[int | None, typer.Option(help="Of the server; needed only where several run.")]


def main() -> None:
    """Entry point: every error that we raise on purpose is one message and exit code 2."""
    try:
        app()
    except TTAError as error:
        fail(error)


def fail(error: TTAError) -> NoReturn:
    err.print(f"[bold red]error[/] {'' if isinstance(error, ConfigError) else type(error).__name__ + ': '}", end="")
    err.print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


@app.command()
def up(
    config_file: ConfigFile,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the server is ready; `down` stops it.")] = False,
) -> None:
    """Start a server and stay until Ctrl-C; where one runs on that port, let it go over to this configuration."""
    settings = config.load(config_file)
    if (folder := RunFolder(settings.http.port)).alive():
        show_ready(update_running(folder, config_file))
        return
    if detach:
        show_ready(start_detached(config_file, settings.http.port))
        return
    from tta_serve import app as server  # reads the environment for Ray, and is slow to import

    with err.status("starting") as spinner:

        def ready(status: ServerStatus) -> None:
            spinner.stop()
            show_ready(status)
            out.print("Ctrl-C stops it.", style="dim")

        def progress(text: str) -> None:
            spinner.update(text)
            if text == "stopping":
                spinner.start()

        server.run(settings, config_file, progress, ready)


@app.command()
def check(config_file: ConfigFile) -> None:
    """Validate a configuration file, and do nothing else."""
    settings = config.load(config_file)
    config.read_tokens(settings.auth)
    names = ", ".join(model.name for model in settings.models)
    said = f"{config_file}: good. Models: {names}. Port: {settings.http.port}."
    out.print(said, highlight=False, soft_wrap=True, markup=False)


@app.command()
def status() -> None:
    """Show the servers of this user that run, and whether their models are ready."""
    servers = runfolder.running()
    if not servers:
        out.print("No server runs. Start one with `tta-serve up CONFIG`.", highlight=False)
        raise typer.Exit(3)
    table = Table(*(Column(name, no_wrap=True) for name in ("URL", "phase", "process")))
    for name in ("models", "config"):
        table.add_column(name, overflow="fold")  # whole on any width: a cropped path is no path
    for server in servers:
        models = ", ".join(f"{name} {state}" for name, state in _readiness(server).items())
        table.add_row(server.url, server.phase, str(server.pid), models, server.config)
    out.print(table)


def _readiness(server: ServerStatus) -> dict[str, str]:
    try:
        answer = httpx.get(f"{server.url}/v2/health/ready", timeout=5).json()["models"]
    except (httpx.HTTPError, ValueError, KeyError):
        return dict.fromkeys(server.models, "not answering")
    return {name: "ready" if ready else "not ready" for name, ready in answer.items()}


@app.command()
def down(port: Port = None) -> None:
    """Stop a server."""
    servers = [server for server in runfolder.running() if port in (None, server.port)]
    if not servers:
        raise ConfigError("no server runs" + (f" on port {port}" if port else ""))
    if len(servers) > 1:
        raise ConfigError(
            f"several servers run; say which: --port {' or '.join(str(server.port) for server in servers)}"
        )
    with err.status(f"stopping {servers[0].url}"):
        runfolder.stop(servers[0])
    out.print(f"Stopped {servers[0].url}.", highlight=False)


@app.command()
def demo(
    once: Annotated[
        bool, typer.Option("--once", help="Stop the server at the end; exit code 1 if adapting lost.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of the server that the demo starts.")] = 8000,
    draws: Annotated[int | None, typer.Option(min=32, help="Images in each phase (1024; of scenes 200).")] = None,
    detection: Annotated[
        bool, typer.Option("--detection", help="Show a detector that finds digits in colour and in infrared instead.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help=f"Where --detection draws what it found ({DEMO_PICTURE}).", metavar="FILE")
    ] = None,
) -> None:
    """Start a server with the built-in digits model, and show it adapting while the images change."""
    if picture and not detection:
        raise ConfigError("--picture goes with --detection: the digits demo draws none")
    if detection:
        picture = (picture or DEMO_PICTURE).absolute()
        if not picture.parent.is_dir() or picture.is_dir():
            raise ConfigError(f"--picture: {picture} cannot be a file; give one in a folder that is there")
    model = SCENES if detection else DIGITS
    folder = RunFolder(port)
    server = folder.read() if folder.alive() else None
    if server and model not in server.models:
        raise ConfigError(f"the server on port {port} has no model `{model}`; choose another --port")
    started = server is None
    if server is None:
        folder.make()
        path = folder.path / "demo.yaml"
        path.write_text(DEMO_CONFIG.format(port=port, model=model))
        server = start_detached(path, port)
    stays = not (once and started)
    passed = None
    try:
        passed = _play(server.url, model, draws or DEMO_DRAWS[model], picture)
    except KeyboardInterrupt:
        err.print("Interrupted." if stays else "Interrupted; the server is stopped too.")
    finally:
        if not stays:
            with err.status("stopping the server"):
                runfolder.stop(server)
    if stays:
        show_ready(server)
        out.print(f"It stays up; `tta-serve down --port {port}` stops it.", style="dim", highlight=False)
    raise typer.Exit(130 if passed is None else 0 if passed else 1)


def _play(url: str, model: str, draws: int, picture: Path | None) -> bool:
    """Play the demo of a model, draw it where there is something to draw, and say whether adapting won."""
    stream = f"demo-{time.strftime('%H%M%S')}"
    if picture is None:
        from tta_serve import demo as player

        return player.play(url, model, stream=stream, draws=draws, console=out).passed
    from tta_serve import demo_detection

    outcome = demo_detection.play(url, model, stream=stream, draws=draws, console=out)
    try:
        demo_detection.draw(outcome).save(picture, "PNG")
    except OSError as error:
        raise ConfigError(f"--picture: {picture} cannot be written: {error.strerror or error}") from None
    out.print(f"The first scenes, drawn: {picture}", highlight=False, soft_wrap=True, markup=False)
    return outcome.summary.passed


app.command("train-translator")(train_translator)
app.add_typer(state, name="state")


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__, highlight=False)


def show_ready(server: ServerStatus) -> None:
    """Name the URLs of a server that is ready."""
    out.print(f"[bold green]ready[/] {server.url}", highlight=False, soft_wrap=True)
    for name in server.models:
        out.print(f"  predict  POST {server.url}/v2/models/{name}/predict", highlight=False, soft_wrap=True)
    for what, path in (("docs", "/docs"), ("metrics", "/metrics")):
        out.print(f"  {what:<8} {server.url}{path}", highlight=False, soft_wrap=True)


def update_running(folder: RunFolder, config_file: Path) -> ServerStatus:
    """Let a running server go over to another configuration, replica by replica, and wait until it has.

    Raises:
        ConfigError: it cannot, and goes on as it was; the message is the server's own.
    """
    before = folder.read()
    if before is None or before.phase != "ready":
        doing = before.phase if before else "starting"
        raise ConfigError(f"the server on port {folder.port} is {doing}; wait until it is ready")
    update = folder.ask_for(config_file)
    with err.status(f"updating {before.url}"):
        until_s = time.monotonic() + START_WAIT_S
        while time.monotonic() < until_s and folder.alive():
            server = folder.read()
            if server and server.update == update.id and server.phase == "ready":
                if server.message:
                    raise ConfigError(server.message)
                return server
            time.sleep(0.1)
    raise ConfigError(f"{before.url} did not go over to {config_file}; its log is {folder.log}")


def start_detached(config_file: Path, port: int) -> ServerStatus:
    """Start a server in a session of its own and wait until it is ready.

    Raises:
        ConfigError: it could not start; the message is the server's own.
    """
    folder = RunFolder(port)
    folder.make()
    if folder.alive():
        raise ConfigError(f"a tta-serve already runs on port {port}; `tta-serve down --port {port}` stops it")
    (folder.path / "status.json").unlink(missing_ok=True)
    with folder.log.open("w") as log, err.status("starting the server (10 to 30 seconds)"):
        process = subprocess.Popen(  # noqa: S603  # ourselves
            [sys.executable, "-m", "tta_serve", "up", str(config_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
        )
        try:
            return _wait_until_ready(folder, process)
        except BaseException:  # Ctrl-C too: a server that nobody waits for shall not come up
            process.terminate()
            raise


def _wait_until_ready(folder: RunFolder, process: "subprocess.Popen[bytes]") -> ServerStatus:
    until_s = time.monotonic() + START_WAIT_S
    while time.monotonic() < until_s:
        server = folder.read()
        if server and server.phase == "ready":
            return server
        if process.poll() is not None:
            said = folder.log.read_text().strip().removeprefix("error ") if folder.log.exists() else ""
            raise ConfigError(
                (server.message if server else "") or said or f"the server ended with {process.returncode}"
            )
        time.sleep(0.1)
    raise ConfigError(f"the server did not start in {START_WAIT_S:g} s; its log is {folder.log}")
