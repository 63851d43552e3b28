"""What a person sees of a run: one progress bar on a terminal, plain lines in a job log, or nothing.

Nothing else in this package prints.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A moment of a stage. Rates are over this process's own work, not what an earlier one had committed."""

    stage: str
    tasks: int
    waiting: int
    running: int
    answered: int  # have a result that is not committed yet
    committed: int
    quarantined: int
    share: float  # of the predicted cost, 0 to 1
    rows: int
    rows_per_second: float | None
    seconds_left: float | None
    group_seconds_left: float  # what one group alone would need for this stage and the later ones
    groups_ready: int
    groups_starting: int  # loading the model
    groups_waiting: int  # for resources
    losses: int  # groups lost since the driver began

    @property
    def tasks_done(self) -> int:
        """Tasks that have a result."""
        return self.answered + self.committed

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "tasks_done": self.tasks_done}

    def line(self) -> str:
        return f"{self.stage}: {self.tasks_done}/{self.tasks} tasks ({self.share:.0%}){self.figures()}"

    def figures(self) -> str:
        """Rate, time left and tasks given up, as far as there are any."""
        rate = "" if self.rows_per_second is None else f", {self.rows_per_second:,.0f} rows/s"
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        quarantined = f", {self.quarantined} quarantined" if self.quarantined else ""
        return f"{rate}{left}{quarantined}"


class Display(Protocol):
    def show(self, status: Status) -> None:
        """The run has come this far; called often."""

    def say(self, text: str) -> None:
        """One line worth knowing; rare."""

    def close(self) -> None: ...


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 7m05s, 3h20m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class NoDisplay:
    def show(self, status: Status) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class LineDisplay:
    """A line every ``seconds``, and one when a stage ends, for logs."""

    def __init__(self, stream: TextIO, seconds: float = 30.0) -> None:
        self._stream, self._seconds = stream, seconds
        self._last = float("-inf")
        self._ended = ""

    def show(self, status: Status) -> None:
        now = time.monotonic()
        ends = status.tasks_done + status.quarantined == status.tasks and self._ended != status.stage
        if ends or (now - self._last >= self._seconds and self._ended != status.stage):
            self._last = now
            self.say(status.line())
        if ends:
            self._ended = status.stage

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class BarDisplay:
    """One bar for the running stage, with rate and time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Figures(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.start()
        self._bar = self._progress.add_task("starting", total=1.0, figures="")

    def show(self, status: Status) -> None:
        figures = f"{status.tasks_done}/{status.tasks} tasks{status.figures()}"
        self._progress.update(self._bar, description=status.stage, completed=status.share, figures=figures)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class _Figures(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["figures"]))


def make_display(kind: Literal["auto", "bar", "lines", "none"], stream: TextIO | None = None) -> Display:
    """``auto``: the bar on a terminal, lines otherwise. The stream (default: standard error) is kept as it is now."""
    stream = stream or sys.stderr
    if kind == "none":
        return NoDisplay()
    if kind == "bar" or (kind == "auto" and stream.isatty()):
        return BarDisplay(Console(file=stream))
    return LineDisplay(stream)
