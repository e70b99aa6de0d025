"""How the demo looks: a table that grows on a terminal, lines in a log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tta_serve.demo_figures import PhaseFigures
from tta_serve.shifts import PHASES

COLUMNS = (  # right of the phase's name
    "frozen\n% right",
    "adapting\n% right",
    "entropy\nnats",
    "selected\n%",
    "\nsteps",
    "pace\nreq/s",
    "p50\nms",
    "p99\nms",
)


class Played(Protocol):
    """What one phase came to, so far."""

    @property
    def name(self) -> str: ...
    @property
    def draws(self) -> int:
        """Images answered."""
        ...

    @property
    def good(self) -> bool: ...


F = TypeVar("F", bound=Played)
F_co = TypeVar("F_co", bound=Played, covariant=True)


class Concluded(Protocol[F_co]):
    """All phases, and what they show."""

    @property
    def phases(self) -> tuple[F_co, ...]: ...
    @property
    def passed(self) -> bool: ...
    def sentence(self) -> str: ...


@dataclass(frozen=True)
class Layout(Generic[F]):
    """What a table holds."""

    title: str
    columns: tuple[str, ...]  # right of the phase's name
    phases: tuple[str, ...]  # names of all, in their order
    cells: Callable[[F, str], tuple[str | Text, ...]]  # one row: the marked name, then what `columns` says
    line: Callable[[F], str]  # a phase that has ended, for a log


class PhaseScreen(Generic[F]):
    """Shows phases: a table that grows on a terminal; elsewhere a line for each, and the table at the end.

    Args:
        console: where to.
        layout: of the table.
        draws: images in each phase.
    """

    def __init__(self, console: Console, layout: Layout[F], draws: int) -> None:
        self.console = console
        self.layout = layout
        self.draws = draws
        self.live = Live(console=console, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, phases: Sequence[F], running: bool) -> None:
        """The phases so far; `running`: the last of them still goes on."""
        if self.live:
            self.live.update(self.table(phases, running))
        elif not running:
            self.console.print(self.layout.line(phases[-1]), soft_wrap=True)

    def close(self, summary: Concluded[F]) -> None:
        """All phases, and what happened in plain words."""
        style = "green" if summary.passed else "red"
        end = Group(self.table(summary.phases, running=False), Text(summary.sentence(), style=style))
        if self.live:
            self.live.update(end)
        else:
            self.console.print()
            self.console.print(end)

    def table(self, phases: Sequence[F], running: bool) -> Table:
        """Fits 80 columns."""
        title = self.layout.title
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
        table.add_column("\nphase", no_wrap=True)
        for header in self.layout.columns:
            table.add_column(header, justify="right", no_wrap=True)
        for i, phase in enumerate(phases):
            now = running and i == len(phases) - 1
            mark = "▸" if now else "✓" if phase.good else "✗"
            table.add_row(*self.layout.cells(phase, mark), style="bold" if now else "")
        for waiting in self.layout.phases[len(phases) :]:
            table.add_row(f"  {waiting}", style="dim")
        table.title_justify = table.caption_justify = "left"
        if running:
            table.caption = f"▸ {phases[-1].name}: {phases[-1].draws:,} of {self.draws:,} images"
        return table


class Screen(PhaseScreen[PhaseFigures]):
    """The digits' phases.

    Args:
        console: where to.
        model: its name, for the title.
        draws: images in each phase.
    """

    def __init__(self, console: Console, model: str, draws: int) -> None:
        title = f"{model}: frozen and adapting, side by side"
        super().__init__(console, Layout(title, COLUMNS, tuple(phase.name for phase in PHASES), cells, line), draws)


def cells(phase: PhaseFigures, mark: str) -> tuple[str | Text, ...]:
    """One row of the table: the marked name, then what `COLUMNS` says."""
    return (
        f"{mark} {phase.name}",
        f"{100 * phase.frozen_accuracy:.1f}",
        Text(f"{100 * phase.adapting_accuracy:.1f}", style="bold green" if phase.good else "bold red"),
        "–" if phase.entropy is None else f"{phase.entropy:.2f}",
        "–" if phase.selected_share is None else f"{100 * phase.selected_share:.0f}",
        f"{phase.steps:,}",
        f"{phase.requests_per_s:.1f}",
        f"{phase.p50_ms:.0f}",
        f"{phase.p99_ms:.0f}",
    )


def line(phase: PhaseFigures) -> str:
    """A phase that has ended, for a log."""
    frozen, adapting = 100 * phase.frozen_accuracy, 100 * phase.adapting_accuracy
    return (
        f"{phase.name}: {frozen:.1f}% frozen, {adapting:.1f}% adapting ({adapting - frozen:+.1f} points), "
        f"{phase.draws:,} images, {phase.steps:,} steps"
    )
