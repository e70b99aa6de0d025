"""The figures of all protocols for people: tables and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from loadtests import plots
from loadtests.errors import LoadTestError
from loadtests.protocol_figures import Cell, Estimate, Row
from loadtests.protocol_full_rate import Costs
from loadtests.protocol_jobs import MethodName
from loadtests.protocol_orders import VISITS, Protocol

TITLES: Mapping[MethodName, str] = {
    "frozen": "frozen",
    "batch_statistics": "batch statistics",
    "eata": "EATA",
    "eata_per_stream": "EATA per id",
    "default": "default",
}
# of the library mariodoebler/test-time-adaptation on the same images and weights
REFERENCE: Mapping[Protocol, Mapping[MethodName, float]] = {
    "per_shift": {"frozen": 41.13, "batch_statistics": 24.61, "eata": 24.45},
    "continual": {"frozen": 41.13, "batch_statistics": 24.61, "eata": 23.71},
    "interleaved": {"frozen": 41.13, "batch_statistics": 24.61, "eata": 23.83},
    "mixed": {"frozen": 41.13, "batch_statistics": 38.60, "eata": 36.30},
    "correlated": {"frozen": 41.13, "batch_statistics": 51.33, "eata": 51.32},
}


def errors(rows: Sequence[Row], methods: Sequence[MethodName], *, reference: bool) -> Table:
    """Mean errors, below each the paired difference to the default's with its standard error."""
    caption = (
        "below each: its difference to the server's default ± paired standard error; "
        "EATA per id: a state per stream id; lowest: the default, or within two standard errors"
    )
    if reference:
        caption += "; reference: mariodoebler/test-time-adaptation, same images and weights"
    table = Table(title="Mean error in %, severity 5", caption=caption)
    table.add_column("protocol", no_wrap=True)
    for method in methods:
        table.add_column(TITLES[method], justify="right", no_wrap=len(TITLES[method]) < 12)
    table.add_column("lowest")
    for row in rows:
        cells = [_error(row, method) for method in methods]
        elsewhere = REFERENCE.get(row.protocol) if reference else None
        table.add_row(row.protocol, *cells, verdict(row.lowest), end_section=elsewhere is None)
        if elsewhere:
            figures = [f"{elsewhere[method]:.2f}" if method in elsewhere else "" for method in methods]
            table.add_row("  reference", *figures, style="dim", end_section=True)
    return table


def memory(rows: Sequence[Row], methods: Sequence[MethodName]) -> Table:
    """Forgetting and source mismatch of the methods that learn."""
    table = Table(
        title="On clean images afterwards",
        caption="forgetting in points ± standard error, mismatch with the source in %: means over the streams; "
        "held: the default's forgetting is at most 0.5 and one standard error",
    )
    table.add_column("protocol", no_wrap=True)
    for method in methods:
        for what in ("forgetting", "mismatch"):
            table.add_column(f"{TITLES[method]}\n{what}", justify="right", no_wrap=True)
    table.add_column("held")
    for row in rows:
        cells = [text for method in methods for text in _memory(row, method)]
        table.add_row(row.protocol, *cells, verdict(row.remembers))
    return table


def visits(row: Row) -> Table:
    """`recurring`: the error at each visit of each corruption, and their mean."""
    table = Table(title="recurring: error in % at visits 1 · 2 · 3")
    table.add_column("corruption", no_wrap=True)
    for method in row.cells:
        table.add_column(TITLES[method], justify="right")
    names = dict.fromkeys(part.partition("/")[0] for cell in row.cells.values() for part in cell.parts)
    for name in names:
        table.add_row(name, *(_visits(cell, [name]) for cell in row.cells.values()))
    table.add_section()
    table.add_row("mean", *(_visits(cell, list(names)) for cell in row.cells.values()), style="bold")
    return table


def _visits(cell: Cell, names: Sequence[str]) -> str:
    means = (statistics.mean(cell.parts[f"{name}/{number + 1}"] for name in names) for number in range(VISITS))
    return " · ".join(f"{mean:.2f}" for mean in means)


def costs_line(costs: Costs, row: Row) -> str:
    """What `full_rate` was played with."""
    shares = ", ".join(f"{TITLES[m]} {cell.share_learned:.0%}" for m, cell in row.cells.items() if cell.forgetting)
    return (
        f"full_rate: a frozen forward of one batch took {1000 * costs.forward_s:.0f} ms; a step costs EATA "
        f"{costs.eata:.2f}, rounded up, and the default {costs.default:.2f} of these; rows learned from: {shares}"
    )


def plot(file: Path, rows: Sequence[Row], methods: Sequence[MethodName]) -> None:
    """Write a picture: the errors of all methods in each protocol, and what the learning ones forget.

    Raises:
        LoadTestError: no protocol has a result of every method.
    """
    shown = [row for row in rows if set(row.cells) == set(methods)]  # a bar needs a height
    if not shown:
        raise LoadTestError("no protocol has a result of every method: there is nothing to draw")
    learning = [method for method in ("eata", "default") if method in methods]
    panels = [
        plots.Bars(
            title="Error under corruption (severity 5), by protocol",
            unit="mean error (%), lower is better",
            labels=[row.protocol for row in shown],
            series={TITLES[method]: [row.cells[method].error for row in shown] for method in methods},
        )
    ]
    if learning:
        estimates = {m: [_estimate(row, m) for row in shown] for m in learning}
        panels.append(
            plots.Bars(
                title="Forgetting: error on clean images over the source parameters', ± standard error",
                unit="points, lower is better",
                labels=[row.protocol for row in shown],
                series={TITLES[m]: [each.mean for each in several] for m, several in estimates.items()},
                ranges={
                    TITLES[m]: [(e.mean - e.standard_error, e.mean + e.standard_error) for e in several]
                    for m, several in estimates.items()
                },
            )
        )
    plots.draw(file, panels)


def verdict(held: bool | None) -> str:
    return "–" if held is None else "yes" if held else "NO"


def _error(row: Row, method: MethodName) -> str:
    if method not in row.cells:
        return "failed"
    cell = row.cells[method]
    if cell.over_default is None or method == "default":
        return f"{cell.error:.2f}"
    return f"{cell.error:.2f}\n{cell.over_default.mean:+.2f} ± {cell.over_default.standard_error:.2f}"


def _memory(row: Row, method: MethodName) -> tuple[str, str]:
    cell = row.cells.get(method)
    if cell is None or cell.forgetting is None:
        return "–", "–"
    found = cell.forgetting
    return f"{found.mean:+.2f} ± {found.standard_error:.2f}", f"{cell.source_mismatch:.2f}"


def _estimate(row: Row, method: MethodName) -> Estimate:
    found = row.cells[method].forgetting
    assert found is not None  # of a method that learns
    return found
