"""What a person sees while a run works: a live display on a terminal, a line every few seconds in a log, nothing in tests.

>>> progress = Quiet()
>>> with progress.stage("improve", 60) as stage:
...     stage.update(1, {"success": 0.53, "env_steps_per_s": 812.0})
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 5.0
Advance = Callable[..., None]  # advance(n: int = 1, text: str = "")

_FORMATS: Mapping[str, Callable[[float], str]] = {
    "success": lambda value: f"success {100 * value:.1f} %",
    "env_steps_per_s": lambda value: f"{value:,.0f} env steps/s",
    "samples_per_s": lambda value: f"{value:,.0f} samples/s",
}


class Stage(Protocol):
    """One stage of a run, as it is shown."""

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """``iteration`` iterations are done; ``metrics`` are this one's (``success`` is a share, names in _FORMATS get units)."""
        ...


class Progress(Protocol):
    """Where long work reports to."""

    def stage(self, name: str, total_iterations: int, *, done: int = 0) -> AbstractContextManager[Stage]:
        """Show a stage of ``total_iterations``, of which a resumed run has ``done`` behind it."""
        ...

    def task(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show any work longer than a second; call the yielded ``advance(n)`` after each n of ``total`` pieces."""
        ...

    def track(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """``task``, under the name that mmrl.protocols.Progress gives it."""
        ...

    def note(self, text: str) -> None:
        """A sentence that stays on the screen."""
        ...


def make(stream: TextIO | None = None) -> Progress:
    """The display that suits ``stream`` (default: standard error): live on a terminal, lines elsewhere."""
    console = Console(file=stream or sys.stderr)
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Lines(stream or sys.stderr)


class Pace:
    """Smoothed seconds per iteration, and the time left that follows from it.

    Each iteration weighs ``1 - smoothing`` of the estimate, corrected for its start at zero: the first estimate is already right.
    """

    def __init__(self, total: int, *, done: int = 0, smoothing: float = 0.9, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._done = total, done
        self._smoothing, self._clock = smoothing, clock
        self._last = clock()
        self._sum = self._weight = 0.0

    def update(self, iteration: int) -> None:
        now, finished = self._clock(), iteration - self._done
        if finished > 0:
            keep = self._smoothing**finished
            self._sum = keep * self._sum + (1 - keep) * (now - self._last) / finished
            self._weight = keep * self._weight + (1 - keep)
        self._last, self._done = now, iteration

    def seconds_left(self) -> float | None:
        """None until an iteration has been seen."""
        if self._weight == 0.0:
            return None
        return max(0, self._total - self._done) * self._sum / self._weight


class Live:
    """A bar for the stage and one for the task within it, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._display: RichProgress | None = None

    @contextmanager
    def stage(self, name: str, total_iterations: int, *, done: int = 0) -> Iterator[Stage]:
        with self._row(f"[bold]{escape(name)}[/bold]", total_iterations, done=done) as (display, row):
            yield _LiveStage(display, row, Pace(total_iterations, done=done))

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        with self._row(f"[dim]{escape(title)}[/dim]", total) as (display, row):

            def advance(n: int = 1, text: str = "") -> None:
                display.update(row, advance=n, detail=escape(text))

            yield advance

    def track(self, title: str, total: int) -> AbstractContextManager[Advance]:
        return self.task(title, total)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def _row(self, description: str, total: int, *, done: int = 0) -> Iterator[tuple[RichProgress, TaskID]]:
        """A row in the display. The outermost opens the display and stays on the screen; those within vanish when they end."""
        opens = self._display is None
        display = self._display or self._open()
        row = display.add_task(description, total=total, completed=done, detail="")
        try:
            yield display, row
        finally:
            if opens:
                self._display = None
                display.stop()
            else:
                display.update(row, visible=False)

    def _open(self) -> RichProgress:
        bar, count, detail = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[detail]}")
        self._display = RichProgress(
            TextColumn("{task.description}"), bar, count, detail, console=self._console, refresh_per_second=4
        )
        self._display.start()
        return self._display


class _LiveStage:
    def __init__(self, display: RichProgress, row: TaskID, pace: Pace) -> None:
        self._display, self._row, self._pace = display, row, pace

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._pace.update(iteration)
        self._display.update(self._row, completed=iteration, detail=escape(describe(metrics, self._pace.seconds_left())))


class Lines:
    """A plain line at most every few seconds; the first and the last of a stage always."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._last_line = -math.inf

    @contextmanager
    def stage(self, name: str, total_iterations: int, *, done: int = 0) -> Iterator[Stage]:
        yield _LineStage(self, name, total_iterations, Pace(total_iterations, done=done, clock=self._clock))

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        done = 0

        def advance(n: int = 1, text: str = "") -> None:
            nonlocal done
            done += n
            self.line(f"{title}  {done}/{total}  {text}".rstrip(), always=False)

        yield advance

    def track(self, title: str, total: int) -> AbstractContextManager[Advance]:
        return self.task(title, total)

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def line(self, text: str, *, always: bool) -> None:
        now = self._clock()
        if always or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(text, file=self._stream, flush=True)


class _LineStage:
    def __init__(self, lines: Lines, name: str, total: int, pace: Pace) -> None:
        self._lines, self._name, self._total, self._pace = lines, name, total, pace
        self._fresh = True

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._pace.update(iteration)
        text = f"{self._name}  {iteration}/{self._total}  {describe(metrics, self._pace.seconds_left())}"
        self._lines.line(text, always=self._fresh or iteration >= self._total)
        self._fresh = False


class Quiet:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total_iterations: int, *, done: int = 0) -> Iterator[Stage]:
        yield _QuietStage()

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        yield lambda n=1, text="": None

    def track(self, title: str, total: int) -> AbstractContextManager[Advance]:
        return self.task(title, total)

    def note(self, text: str) -> None:
        pass


class _QuietStage:
    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        pass


def describe(metrics: Mapping[str, float], seconds_left: float | None) -> str:
    """``success 53.1 %  812 env steps/s  loss 0.213  3:12 left``."""
    parts = [_FORMATS.get(name, lambda value, name=name: f"{name} {value:.3g}")(value) for name, value in metrics.items()]
    if seconds_left is not None:
        parts.append(f"{clock(seconds_left)} left")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
