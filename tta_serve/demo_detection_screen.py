"""How `tta-serve demo --detection` looks."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from tta_serve.demo_detection_figures import DetectionFigures
from tta_serve.demo_screen import Layout, PhaseScreen

COLUMNS = (  # right of the phase's name
    "frozen\nAP50",
    "translated\nAP50",
    "recognised\n%",
    "pace\nimages/s",
    "p50\nms",
    "p99\nms",
)


def screen(console: Console, model: str, phases: Sequence[str], draws: int) -> PhaseScreen[DetectionFigures]:
    """An empty table.

    Args:
        console: where to.
        model: its name, for the title.
        phases: names of all.
        draws: scenes in each phase.
    """
    title = f"{model}: one frozen detector, alone and with translators"
    return PhaseScreen(console, Layout(title, COLUMNS, tuple(phases), cells, line), draws)


def cells(phase: DetectionFigures, mark: str) -> tuple[str | Text, ...]:
    """One row of the table: the marked name, then what `COLUMNS` says."""
    return (
        f"{mark} {phase.name}",
        f"{phase.frozen_ap50:.3f}",
        Text(f"{phase.translated_ap50:.3f}", style="bold green" if phase.good else "bold red"),
        f"{100 * phase.recognised / phase.draws:.1f}",
        f"{phase.images_per_s:.1f}",
        f"{phase.p50_ms:.0f}",
        f"{phase.p99_ms:.0f}",
    )


def line(phase: DetectionFigures) -> str:
    """A phase that has ended, for a log."""
    return (
        f"{phase.name}: AP50 {phase.frozen_ap50:.3f} frozen, {phase.translated_ap50:.3f} translated, "
        f"{phase.recognised:,} of {phase.draws:,} recognised"
    )
