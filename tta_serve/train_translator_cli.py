"""The command `tta-serve train-translator`."""

import json
import platform
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tta_serve import __version__
from tta_serve.errors import ConfigError

DETECTOR_NAME = "detector"  # of the model in messages about its settings

out_console = Console()
err_console = Console(stderr=True)


class Size(StrEnum):
    """How large a translator is."""

    tiny = "tiny"
    small = "small"
    base = "base"
    large = "large"


class Fusion(StrEnum):
    """How what the network gives becomes an image."""

    multiply = "multiply"
    add = "add"
    none = "none"


def _folder(help: str) -> Any:
    return typer.Option(metavar="DIR", exists=True, file_okay=False, help=help)


def _file(help: str, *names: str) -> Any:
    return typer.Option(*names, metavar="FILE", dir_okay=False, help=help)


def train_translator(
    model: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="The detector: builtin/digit-scenes, torchvision/NAME, or CONFIG.yaml#NAME of a configuration file.",
        ),
    ],
    data: Annotated[Path, _folder("Images of the modality with boxes, COCO format.")],
    out: Annotated[Path, _file("The translator, written at the end.")],
    modality: Annotated[str, typer.Option(help="What requests will call it.")] = "ir",
    weights: Annotated[str | None, typer.Option(help="Of the detector: a file, or a name of torchvision's.")] = None,
    labels: Annotated[str | None, typer.Option(help="The detector's, with commas between; background first.")] = None,
    val: Annotated[Path | None, _folder("Decides when to stop; else a share of --data does.")] = None,
    test: Annotated[Path | None, _folder("What the figures are of; else the validation images.")] = None,
    rgb: Annotated[Path | None, _folder("The detector's own modality: for forgetting, and the router.")] = None,
    size: Annotated[Size, typer.Option(help="0.1, 0.4, 1.8 or 6.6 million parameters.")] = Size.small,
    in_channels: Annotated[int, typer.Option(min=1, max=3, help="1: grey; 3: colours say something.")] = 3,
    fusion: Annotated[Fusion, typer.Option(help="How what the network gives becomes an image.")] = Fusion.multiply,
    epochs: Annotated[int, typer.Option(min=1, help="At most.")] = 50,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better AP50 before it stops.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 8,
    lr: Annotated[float, typer.Option(min=1e-9, max=1.0, help="AdamW's at its highest.")] = 1e-4,
    flips: Annotated[bool, typer.Option(help="Mirror every other image.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    fine_tune: Annotated[bool, typer.Option(help="Also fine-tune the detector, to compare; takes longer.")] = True,
    save_fine_tuned: Annotated[Path | None, _file("Where to keep the fine-tuned weights.")] = None,
    json_file: Annotated[Path | None, _file("Where to write the figures.", "--json")] = None,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Between checkpoints.")] = 50,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, whatever checkpoints are there.")] = False,
) -> None:
    """Train a translator for a frozen detector. After a kill, the same command goes on where it was."""
    from adapters.translator import SIZES, TranslatorConfig  # torch is slow to import
    from tta_serve import train_translator as training
    from tta_serve.training import TrainSettings

    started = time.monotonic()
    if in_channels == 2:
        raise ConfigError("--in-channels: 1 or 3, not 2")
    if save_fine_tuned and not fine_tune:
        raise ConfigError("--save-fine-tuned: there are no fine-tuned weights with --no-fine-tune")
    if json_file and not json_file.parent.is_dir():
        raise ConfigError(f"--json: {json_file.parent} is not a folder")
    loaded = load_detector(model, weights, labels, device)
    config = TranslatorConfig(in_channels, *SIZES[size], cast(Literal["multiply", "add", "none"], str(fusion)))
    settings = TrainSettings(
        modality=modality,
        translator=config,
        epochs=epochs,
        patience_epochs=patience,
        batch_images=batch,
        learning_rate=lr,
        flips=flips,
        seed=seed,
        checkpoint_steps=checkpoint_steps,
        fine_tune=fine_tune,
    )
    screen = Screen(err_console)
    try:
        result = training.train(
            loaded.detector,
            loaded.digest,
            loaded.labels,
            data,
            out,
            settings,
            validation=val,
            test=test,
            rgb=rgb,
            save_fine_tuned=save_fine_tuned,
            restart=restart,
            progress=screen,
        )
    except KeyboardInterrupt:
        screen.stop()
        err_console.print("Interrupted; the same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    finally:
        screen.stop()
    if json_file:
        json_file.write_text(json.dumps(document(result.metrics, time.monotonic() - started), indent=1) + "\n")
    show(result.figures)
    out_console.print(f"{out}: the best of {result.epochs[-1].epoch} epochs was {result.best_epoch}.", highlight=False)


def load_detector(source: str, weights: str | None, labels: str | None, device: str) -> Any:
    """The detector that the command names, where it shall run.

    Raises:
        ConfigError: there is none of that name, it cannot be loaded, or it is no detector.
    """
    import torch
    from pydantic import ValidationError

    from tta_serve import config, detector_models
    from tta_serve.config import ModelSettings

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: auto, cpu or cuda, not {device!r}")
    file, _, name = source.partition("#")
    if file.endswith((".yaml", ".yml")):
        if weights or labels:
            raise ConfigError(f"--weights, --labels: {file} says what they are; remove them")
        models = {each.name: each for each in config.load(Path(file)).models}
        if not name and len(models) > 1:
            raise ConfigError(f"--model: {file} has {len(models)} models; say FILE#NAME ({', '.join(models)})")
        if name and name not in models:
            raise ConfigError(f"--model: {file} has no model named {name!r}; it has {', '.join(models)}")
        settings = models[name or next(iter(models))]
    else:
        given = {"weights": weights, "labels": labels.split(",") if labels else None}
        wanted = {"name": DETECTOR_NAME, "source": source, **{key: each for key, each in given.items() if each}}
        try:
            settings = ModelSettings.model_validate(wanted)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ConfigError(f"--model {source}: {said}") from None
    if settings.task != "detection":
        raise ConfigError(f"--model {source} is no detector; translators are for detectors")
    loaded = detector_models.load(settings)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        loaded.detector.to(torch.device("cuda"))
    return loaded


def document(metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `--json` writes: the form that the scripts in `loadtests/` write, and the training's own metrics."""
    return {
        "script": "train-translator",
        "version": __version__,
        "machine": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        **metrics,
    }


def show(figures: dict[str, float]) -> None:
    """A table: what the detector was shown, AP50 and AP."""
    table = Table("", "AP50", "AP")
    for name in figures:
        what, _, way = name.partition("/")
        if what == "ap50":
            table.add_row(way.replace("/", ", "), f"{figures[name]:.3f}", f"{figures[f'ap/{way}']:.3f}")
    out_console.print(table)


class Screen:
    """A progress bar on a terminal; elsewhere only the lines that are worth one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.stop()
        if not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=total or None, completed=done, loss="")
        self._bar.start()

    def advance(self, loss: float | None = None) -> None:
        if self._bar:
            self._bar.update(self._task, advance=1, loss="" if loss is None else f"loss {loss:.4f}")

    def note(self, text: str) -> None:
        self.stop()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
