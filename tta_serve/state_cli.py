"""`tta-serve state`: look at what streams have learned, take it out, put it back, throw it away; without a server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tta_serve import config
from tta_serve.errors import ConfigError, NotFound
from tta_serve.views import rfc3339

if TYPE_CHECKING:  # torch takes seconds to import, and other commands need none
    from tta_serve.state_files import StoredState

state = typer.Typer(no_args_is_help=True, help=__doc__)
out = Console()

DAY_S = 86_400.0

Stream = Annotated[str, typer.Argument(metavar="STREAM")]
StoreFolder = Annotated[Path, typer.Option("--store", help="`store.path` of the server.", metavar="FOLDER")]
Model = Annotated[str | None, typer.Option(help="The model's name; needed only where there are several.")]
Generation = Annotated[
    str | None, typer.Option(help="Which model and adapters it was learned with; the one used last, unless given.")
]
DEFAULT_STORE = Path("tta-state")


@state.command("list")
def list_(store: StoreFolder = DEFAULT_STORE, model: Model = None) -> None:
    """List the streams of every generation, those that no present configuration reads included."""
    from tta_serve import state_files

    for file in _files(store, model):
        lines = state_files.list_states(file)
        for one in state_files.generations(file):
            _say(
                f"{one.model}, generation {one.generation}: {one.streams} streams, {one.snapshot_bytes} bytes, changed "
                f"{rfc3339(one.at_s)}"
            )
            table = Table("stream", box=None, padding=(0, 2, 0, 0))
            for name in ("life", "version", "steps", "bytes", "kept"):
                table.add_column(name, justify="right", no_wrap=True)
            for each in lines:
                if (each.model, each.generation) == (one.model, one.generation):
                    numbers = map(str, (each.incarnation, each.version, each.steps, each.snapshot_bytes))
                    table.add_row(each.stream, *numbers, " ".join(map(str, each.kept)))
            out.print(table)


@state.command()
def show(
    stream: Stream, store: StoreFolder = DEFAULT_STORE, model: Model = None, generation: Generation = None
) -> None:
    """Show one stream: what its snapshot says of itself, and what happened to it."""
    from tta_serve import state_files
    from tta_serve.snapshots import read_header

    file, found = _find(store, model, generation, stream)
    out.print_json(json.dumps(found._asdict() | {"changed": rfc3339(found.at_s)}))
    if found.version and found.snapshot_bytes:
        header = read_header(state_files.load_snapshot(file, found.model, found.generation, stream))
        rounds = json.loads(header.extra)["rounds"] if header.extra else []
        told = {
            "format": header.format,
            "written": rfc3339(header.at_s),
            "learned_together": [{"sequence": each["sequence"], "replicas": each["replicas"]} for each in rounds],
        }
        out.print_json(json.dumps(told))


@state.command()
def export(
    stream: Stream,
    file: Annotated[Path | None, typer.Option("--file", help="Where to write the snapshot.", metavar="FILE")] = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="Write the adapted model as one ONNX file instead.", metavar="FILE")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Of the server; --onnx needs it.", metavar="CONFIG")
    ] = None,
    version: Annotated[int | None, typer.Option(help="A version that is kept; the present one, unless given.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    model: Model = None,
    generation: Generation = None,
) -> None:
    """Take a stream's state out: as a snapshot that `import` reads, or the adapted model as ONNX for another device."""
    from tta_serve import state_files
    from tta_serve.snapshots import read_header

    if (file is None) == (onnx is None):
        raise ConfigError("give either --file FILE, for a snapshot, or --onnx FILE, for a model")
    if onnx is not None:
        if config_file is None:
            raise ConfigError("--onnx needs --config CONFIG: the frozen model is not in the store")
        _export_onnx(stream, onnx, config_file, model)
        return
    assert file is not None
    where, found = _find(store, model, generation, stream)
    content = state_files.load_snapshot(where, found.model, found.generation, stream, version)
    try:
        file.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--file: {file} cannot be written: {error.strerror}") from None
    _say(f"{file}: {len(content)} bytes, version {read_header(content).version} of {stream}")


def _export_onnx(stream: str, file: Path, config_file: Path, model: str | None) -> None:
    from tta_serve import export_onnx  # torch and ONNX take seconds to import
    from tta_serve.building import build_engine

    settings = config.load(config_file)
    names = [each.name for each in settings.models]
    chosen = next((each for each in settings.models if each.name == (model or names[0])), None)
    if chosen is None or (model is None and len(names) > 1):
        raise ConfigError(f"--model: say which of {', '.join(names)}")
    if chosen.task == "detection":
        raise ConfigError("--onnx: of classifiers; what a detector does with its boxes has no place in an ONNX file")
    engine, loaded = build_engine(chosen, store=settings.store, tenants=frozenset(settings.auth.tenants))
    record = engine.streams.record(stream)
    single = engine.streams.state(stream)
    labels = loaded.labels
    if engine.heads is not None:
        view = engine.heads.view(stream)
        single = single._replace(head=view.table)
        labels = (*labels, *view.added)
    told = {"model": chosen.name, "stream": stream, "version": str(record.version)}
    done = export_onnx.export(engine.pipeline, single, loaded.input, labels, file, metadata=told)
    _say(
        f"{file}: {done.bytes} bytes, opset {done.opset}, version {record.version} of {stream}; probabilities of "
        f"{done.images} images differ from the server's by at most {done.max_difference:.1e}"
    )


@state.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="From `export --file`.")],
    store: StoreFolder = DEFAULT_STORE,
    model: Model = None,
) -> None:
    """Put a snapshot in the place of its stream's state: a new life, which can be rolled back to what was there."""
    from tta_serve import state_files
    from tta_serve.snapshots import read_header

    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    header = read_header(content)
    if model not in (None, header.model):
        raise ConfigError(f"{file} is of the model {header.model!r}, not of {model!r}")
    (where,) = _files(store, header.model)
    put = state_files.import_snapshot(where, content)
    _say(f"{put.stream}: version {put.version} in its life {put.incarnation} is that of {file}")


@state.command()
def prune(
    older_days: Annotated[float, typer.Option(help="Only what nobody has changed for so long.", min=0)] = 0.0,
    keep: Annotated[list[str] | None, typer.Option(help="A generation to keep; that used last always is.")] = None,
    store: StoreFolder = DEFAULT_STORE,
    model: Model = None,
) -> None:
    """Throw away generations that are no longer used, and tombstones, and give the room back."""
    from tta_serve import state_files

    for file in _files(store, model):
        known = state_files.generations(file)
        if not known:
            continue
        last = max(known, key=lambda each: each.at_s)
        gone = state_files.prune(file, last.model, keep={last.generation, *(keep or ())}, older_s=older_days * DAY_S)
        for each in gone:
            _say(f"{each.model} {each.generation}: {each.streams} streams thrown away, {each.snapshot_bytes} bytes")
        if not gone:
            _say(f"{last.model}: nothing to throw away")


def _files(store: Path, model: str | None) -> list[Path]:
    from tta_serve.store_building import STATES_FILE

    if ":/" in str(store):
        raise ConfigError("--store: a folder; states in an object store are listed over HTTP, GET …/streams")
    files = sorted(store.glob(f"{model or '*'}/{STATES_FILE}"))
    if not files:
        of = f" of the model {model!r}" if model else ""
        raise NotFound(f"there are no states{of} in {store}; --store names the server's `store.path`")
    return files


def _find(store: Path, model: str | None, generation: str | None, stream: str) -> tuple[Path, "StoredState"]:
    from tta_serve import state_files

    found = [
        (file, each)
        for file in _files(store, model)
        for each in state_files.list_states(file)
        if each.stream == stream and generation in (None, each.generation)
    ]
    if not found:
        raise NotFound(f"there is no stream {stream!r} in {store}; `tta-serve state list` lists them")
    if len({each.model for _, each in found}) > 1:
        raise ConfigError(f"several models have a stream {stream!r}; say which: --model")
    return max(found, key=lambda pair: pair[1].at_s)


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True, markup=False)
