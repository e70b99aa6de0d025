"""The figures of `incremental.py`: their names, what they ought to be, tables and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from loadtests.incremental_images import Labels
from loadtests.incremental_orders import RARITY, Compared
from loadtests.incremental_play import mean_drop
from loadtests.plots import COLOURS, blank

CEILING = "ceiling"
# name in the JSON form → for people
TITLES = {
    "sgd_best": "SGD, linear, best rate",
    "sgd_1e-3": "SGD, linear, rate 1e-3",
    "class_means": "class means",
    "ridge": "ridge",
    "gradient": "key-value, gradient",
    "counts": "key-value, counts",
    CEILING: "ceiling: linear, all at once",
}
# there are more methods than colours
LINES = {
    "sgd_best": ("--", COLOURS[0]),
    "sgd_1e-3": (":", COLOURS[0]),
    "class_means": ("-", COLOURS[2]),
    "ridge": ("-", COLOURS[3]),
    "gradient": ("-", COLOURS[4]),
    "counts": ("-", COLOURS[1]),
}


class Wanted(NamedTuple):
    """A bound that a figure has to keep; of a gap or a change, whatever its sign."""

    figure: str
    least: float = -math.inf
    most: float = math.inf
    below: bool = False  # `most` itself is too much

    def kept(self, value: float) -> bool:
        size = abs(value)
        return self.least <= value and (size < self.most if self.below else size <= self.most)  # NaN keeps nothing


WANTED = (
    Wanted("ratio/counts_over_ceiling", least=0.93),
    Wanted("ratio/ridge_over_ceiling", least=0.97),
    *(
        wanted
        for rare in ("", "rare/")
        for wanted in (
            Wanted(f"order_gap/{rare}counts", most=0.0),
            Wanted(f"order_gap/{rare}class_means", most=0.1, below=True),
            Wanted(f"order_gap/{rare}ridge", most=0.1, below=True),
        )
    ),
    Wanted("one_label_ms/p99", most=5.0, below=True),
    Wanted("pairs_per_label_max", most=256),
    Wanted("teach_ms/counts", most=5.0, below=True),
    *(
        wanted
        for head in ("class_means", "ridge", "gradient", "counts")
        for wanted in (
            Wanted(f"next_request/{head}", least=1.0),
            Wanted(f"forget_recall_after/{head}", most=0.0),
            Wanted(f"forget_others_change/{head}", most=0.2),
            Wanted(f"forget_others_lost/{head}", most=0.2),  # of the change; the rest of it is gain
            Wanted(f"forget_verified/{head}", least=1.0),
        )
    ),
)


def figures_of(name: str, compared: Compared, test: Labels, rare: int) -> dict[str, float]:
    """Accuracies and recall in %, drop and order gaps in points, of one method.

    Args:
        name: of the method.
        compared: what it came to in each order.
        test: labels of the test.
        rare: number of the rare class.
    """
    accuracy = {which: percent(played.answers, test) for which, played in compared.items()}
    in_order, few = compared["in_order"], test == rare
    found = {
        f"accuracy/{name}": accuracy["in_order"],
        f"drop/{name}": mean_drop(in_order.recalls),
        f"order_gap/{name}": accuracy["shuffled"] - accuracy["in_order"],
        f"prequential/{name}": 100 * in_order.right_before,
        f"accuracy/rare/{name}": accuracy["rare_in_order"],
        f"order_gap/rare/{name}": accuracy["rare_shuffled"] - accuracy["rare_in_order"],
        f"recall/rare/{name}": percent(compared["rare_in_order"].answers[few], test[few]),
    }
    return found | {f"accuracy/task_{i}/{name}": 100 * share for i, share in enumerate(in_order.accuracies, start=1)}


def ceiling_figures(balanced: Labels, rarer: Labels, test: Labels, rare: int) -> dict[str, float]:
    """The same of the ceiling, as far as it has them.

    Args:
        balanced: its answers to the test.
        rarer: its answers where one class was rare.
        test: labels of the test.
        rare: number of the rare class.
    """
    few = test == rare
    return {
        f"accuracy/{CEILING}": percent(balanced, test),
        f"accuracy/rare/{CEILING}": percent(rarer, test),
        f"recall/rare/{CEILING}": percent(rarer[few], test[few]),
    }


def ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """How much of the ceiling's accuracy each method reaches."""
    return {
        f"ratio/{rare}{name}_over_{CEILING}": figures[f"accuracy/{rare}{name}"] / figures[f"accuracy/{rare}{CEILING}"]
        for rare in ("", "rare/")
        for name in TITLES
        if name != CEILING and f"accuracy/{rare}{name}" in figures
    }


def percent(answers: Labels, labels: Labels) -> float:
    """How many are right, in %."""
    right: NDArray[np.bool_] = answers == labels
    return 100 * float(right.mean())


def accuracy_table(figures: Mapping[str, float]) -> Table:
    """All labels: a row for each method that was measured."""
    table = Table(
        title=f"{figures['labels']:.0f} labels, two classes at a time",
        caption="accuracy in %; drop of each class from its best, order gap (shuffled minus in class order): points",
        box=box.SIMPLE_HEAD,
    )
    columns = {"accuracy": ".2f", "of ceiling": ".3f", "drop": ".2f", "order gap": "+.2f"}
    return _filled(table, columns, figures, "")


def rare_table(figures: Mapping[str, float]) -> Table:
    """The same with one class much rarer."""
    table = Table(title=f"One class with {RARITY} times fewer labels", box=box.SIMPLE_HEAD)
    columns = {"accuracy": ".2f", "of ceiling": ".3f", "order gap": "+.2f", "recall": ".1f"}
    return _filled(table, columns, figures, "rare/")


def _filled(table: Table, columns: Mapping[str, str], figures: Mapping[str, float], rare: str) -> Table:
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, title in TITLES.items():
        if f"accuracy/{rare}{name}" in figures:
            cells = []
            for column, form in columns.items():
                ratio = f"ratio/{rare}{name}_over_{CEILING}"
                figure = ratio if column == "of ceiling" else f"{column.replace(' ', '_')}/{rare}{name}"
                cells.append(format(figures[figure], form) if figure in figures else "–")
            table.add_row(title, *cells)
    return table


def wanted_table(figures: Mapping[str, float]) -> Table:
    """What was measured of that which has to keep a bound; what does not is in red."""
    table = Table(title="Measured and wanted", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("figure", no_wrap=True)
    for name in ("measured", "wanted"):
        table.add_column(name, justify="right")
    for wanted in WANTED:
        if wanted.figure in figures:
            value = figures[wanted.figure]
            bound = (
                f"≥ {wanted.least:g}"
                if math.isfinite(wanted.least)
                else f"{'<' if wanted.below else '≤'} {wanted.most:g}"
            )
            table.add_row(wanted.figure, f"{value:.4f}", bound, style=None if wanted.kept(value) else "red")
    return table


def plot(file: Path, figures: Mapping[str, float], tasks: int) -> None:
    """Write a picture: accuracy on the classes seen after each task, a line for each method.

    Args:
        file: PNG.
        figures: of all methods that were measured.
        tasks: how many.

    Raises:
        MissingTool: matplotlib is not installed.
    """
    figure = blank(7.5, 4.6)
    axes = figure.subplots()
    numbers: Sequence[int] = range(1, tasks + 1)
    shown = [name for name in TITLES if f"accuracy/task_1/{name}" in figures]
    for name in shown:
        heights = [figures[f"accuracy/task_{number}/{name}"] for number in numbers]
        line, colour = LINES[name]
        axes.plot(numbers, heights, line, marker="o", ms=4, color=colour, label=TITLES[name])
    axes.axhline(figures[f"accuracy/{CEILING}"], ls="--", lw=1, color="#333333", label=TITLES[CEILING])
    axes.set_xticks(list(numbers))
    axes.set_xlabel("tasks taught, two classes each")
    axes.set_ylabel("accuracy on the classes seen (%)")
    axes.set_title("Classes that arrive two at a time, each image once", fontsize=11)
    axes.grid(axis="y", lw=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(file, dpi=120, format="png")
