"""Pictures of figures: bars in groups. matplotlib is imported when one is drawn, so that scripts run without it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loadtests.errors import MissingTool

COLOURS = ("#9aa5b1", "#1f6fb4", "#e08a1e", "#4c9a6a", "#8d6cab")  # told apart in grey and by the colour-blind


class Bars(NamedTuple):
    """One panel: a group of bars for each label, one bar in it for each series."""

    title: str
    unit: str  # of the axis, with its name
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]  # name → one value a label
    ranges: Mapping[str, Sequence[tuple[float, float]]] = {}  # name → lowest and highest of each value
    levels: Mapping[str, float] = {}  # name → a dashed line at this height
    groups: str = ""  # what the labels are
    numbers: bool = False  # write each value above its bar
    logarithmic: bool = False


def blank(width: float, height: float) -> Any:
    """A picture without anything in it, matplotlib's.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        MissingTool: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        message = "a picture needs matplotlib: pip install matplotlib (it is in the dependency group `load`)"
        raise MissingTool(message) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(file: Path, panels: Sequence[Bars]) -> None:
    """Draw panels below one another and write them as PNG.

    Raises:
        MissingTool: matplotlib is not installed.
    """
    most = max(len(panel.labels) for panel in panels)
    figure = blank(max(7.0, 1.5 + 0.6 * most), 4.2 * len(panels))
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        width = 0.8 / len(panel.series)
        for number, (name, values) in enumerate(panel.series.items()):
            places = [i + (number - (len(panel.series) - 1) / 2) * width for i in range(len(panel.labels))]
            colour = COLOURS[number % len(COLOURS)]
            whiskers = _whiskers(values, panel.ranges[name]) if name in panel.ranges else None
            line = {"ecolor": "#333333", "capsize": 2, "elinewidth": 1}
            bars = axes.bar(
                places, values, width * 0.92, label=name, color=colour, yerr=whiskers, error_kw=line, zorder=2
            )
            if panel.numbers:
                axes.bar_label(bars, [_three_digits(value) for value in values], padding=2, fontsize=8)
        for number, (name, height) in enumerate(panel.levels.items()):
            axes.axhline(height, ls="--", lw=1, color=COLOURS[number % len(COLOURS)], label=name, zorder=1)
        rotation = 40 if len(panel.labels) > 8 else 0
        axes.set_xticks(range(len(panel.labels)), panel.labels, rotation=rotation, ha="right" if rotation else "center")
        axes.set_ylabel(panel.unit)
        axes.set_xlabel(panel.groups)
        axes.set_title(panel.title, fontsize=11, pad=24)  # the legend stands below it
        axes.margins(x=0.02, y=0.1)
        if panel.logarithmic:
            axes.set_yscale("log")
        axes.grid(axis="y", lw=0.5, alpha=0.5, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        entries = len(panel.series) + len(panel.levels)
        axes.legend(fontsize=9, frameon=False, ncols=entries, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(file, dpi=120, format="png")


def _whiskers(values: Sequence[float], ranges: Sequence[tuple[float, float]]) -> list[list[float]]:
    """How far each range reaches below and above its value."""
    pairs = list(zip(values, ranges, strict=True))
    return [[value - low for value, (low, _) in pairs], [high - value for value, (_, high) in pairs]]


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
