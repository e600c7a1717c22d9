"""The numbers of a report: success rates with their intervals, what changed, and where the time went."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmrl.numerics.statistics import wilson_interval
from mmrl.report.run import Run

PHASES = ("collect", "score", "update", "evaluate")


@dataclass(frozen=True)
class Rate:
    """A success rate with its 95 % Wilson interval, all in [0, 1], the mean return of its episodes and how many of them ran out
    of time (None: not logged)."""

    success: float
    episodes: int
    low: float
    high: float
    mean_return: float | None = None
    timeouts: int | None = None

    @staticmethod
    def of(result: Mapping[str, Any]) -> Rate | None:
        """None where nothing was measured (no episodes, or a rate that is not a number)."""
        success, episodes = result.get("success"), result.get("episodes")
        if not isinstance(success, int | float) or not isinstance(episodes, int | float) or episodes < 1:
            return None
        if not 0 <= success <= 1:  # NaN too
            return None
        episodes = int(episodes)
        earned = result.get("return")
        mean_return = float(earned) if isinstance(earned, int | float) and math.isfinite(earned) else None
        interval = wilson_interval(min(success * episodes, episodes), episodes)
        timeouts = result.get("timeouts")
        return Rate(success, episodes, *interval, mean_return, timeouts if isinstance(timeouts, int) else None)


@dataclass(frozen=True)
class Milestone:
    """An evaluation before or after a stage."""

    stage: str
    label: str
    overall: Rate | None
    families: Mapping[str, Rate | None]

    @property
    def title(self) -> str:
        return f"{self.label} {self.stage}"


@dataclass(frozen=True)
class Line:
    """One line of the table: a task family's rate at each milestone, and by how much the headline's two differ."""

    family: str
    rates: list[Rate | None]
    change: float | None


@dataclass(frozen=True)
class Summary:
    """What the page says in words and tables; ``before`` and ``after`` are indices of milestones, None where there is none."""

    milestones: list[Milestone]
    before: int | None
    after: int | None
    overall: Line | None
    lines: list[Line]
    progress: list[StageProgress]
    time: list[StageTime]
    seconds: float
    env_steps_per_s: float | None
    training_success: float | None
    nonfinite_numbers: int
    nonfinite_rows: int
    skipped_updates: int

    @property
    def unfinished(self) -> list[StageProgress]:
        return [stage for stage in self.progress if stage.total is not None and stage.done < stage.total]


@dataclass(frozen=True)
class StageProgress:
    """Iterations logged, and those the config asks for (None: unknown)."""

    name: str
    done: int
    total: int | None


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage by phase; ``other`` is what no phase accounts for (start-up, data, saving)."""

    stage: str
    phases: Mapping[str, float]
    total: float


def summarize(run: Run) -> Summary:
    milestones = _milestones(run.evaluation_rows)
    before, after = _headline(milestones)
    families = sorted({family for milestone in milestones for family in milestone.families})
    lines = [_line(family, [m.families.get(family) for m in milestones], before, after) for family in families]
    bad = [row["nonfinite"] for row in run.rows if row.get("nonfinite")]
    return Summary(
        milestones=milestones,
        before=before,
        after=after,
        overall=_line("all families", [m.overall for m in milestones], before, after) if milestones else None,
        lines=lines,
        progress=_progress(run),
        time=time_split(run.rows),
        seconds=max((row["seconds"] for row in run.rows), default=0.0),
        env_steps_per_s=_typical(run.train_rows, "env_steps_per_s", statistics.median),
        training_success=_typical(run.train_rows[-10:], "success", statistics.fmean),
        nonfinite_numbers=sum(bad),
        nonfinite_rows=len(bad),
        skipped_updates=round(math.fsum(_values(run.train_rows, "skipped"))),
    )


def time_split(rows: Sequence[Mapping[str, Any]]) -> list[StageTime]:
    """Wall-clock per stage. A row's time is what passed since the row before it; ``seconds/NAME`` metrics say on what."""
    totals: dict[str, float] = defaultdict(float)
    phases: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
    for row, since in zip(rows, [0.0, *(row["seconds"] for row in rows)], strict=False):
        totals[row["stage"]] += max(0.0, row["seconds"] - since)
        for name, value in row.items():
            kind, _, phase = name.partition("/")
            if kind == "seconds" and phase and math.isfinite(value):
                phases[row["stage"]][phase] = phases[row["stage"]].get(phase, 0.0) + value
    split = []
    for stage, total in totals.items():
        known = {phase: seconds for phase, seconds in phases[stage].items() if seconds > 0}
        total = max(total, sum(known.values()))
        split.append(StageTime(stage, {**known, "other": total - sum(known.values())}, total))
    return split


def _milestones(rows: Sequence[Mapping[str, Any]]) -> list[Milestone]:
    """Evaluations before and after stages; one that only repeats the numbers of the one before it is left out."""
    found: list[Milestone] = []
    for row in rows:
        if row["label"] not in ("before", "after"):
            continue
        families = {name: Rate.of(result) for name, result in (row.get("families") or {}).items()}
        milestone = Milestone(row["stage"], row["label"], Rate.of(row), families)
        repeats = found and (found[-1].overall, found[-1].families) == (milestone.overall, milestone.families)
        if not repeats or milestone.label == "after":
            found.append(milestone)
    return found


def _headline(milestones: Sequence[Milestone]) -> tuple[int | None, int | None]:
    """(before, after): the last evaluation after a stage, and the latest one before it that measured the same families.

    Rates over other families say nothing about what training changed, so without such an evaluation there is no comparison.
    """
    after = max((i for i, m in enumerate(milestones) if m.label == "after"), default=None)
    if after is None:
        return (len(milestones) - 1, None) if milestones else (None, None)
    same = [i for i, m in enumerate(milestones[:after]) if m.families.keys() == milestones[after].families.keys()]
    return (same[-1] if same else None), after


def _line(family: str, rates: list[Rate | None], before: int | None, after: int | None) -> Line:
    first = rates[before] if before is not None else None
    last = rates[after] if after is not None else None
    return Line(family, rates, last.success - first.success if first and last else None)


def _progress(run: Run) -> list[StageProgress]:
    done: dict[str, int] = defaultdict(int)
    for row in run.train_rows:
        done[row["stage"]] += 1
    stages = run.config.get("stages")
    named = [s for s in stages if isinstance(s, Mapping) and "name" in s] if isinstance(stages, list) else []
    planned = {str(stage["name"]): stage.get("iterations") for stage in named}
    return [StageProgress(name, done[name], planned.get(name)) for name in {**planned, **done}]


def _typical(rows: Sequence[Mapping[str, Any]], metric: str, average: Callable[[list[float]], float]) -> float | None:
    values = _values(rows, metric)
    return average(values) if values else None


def _values(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """A metric's finite values, whatever its prefix."""
    values = [v for row in rows for name, v in row.items() if name.rpartition("/")[2] == metric and isinstance(v, int | float)]
    return [value for value in values if math.isfinite(value)]
