"""Turns training rows into curves: what belongs on which chart, smoothed, thinned out and ready for page.js to draw."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrl.metrics import SHARED_FIELDS
from mmrl.picturing import SCORE
from mmrl.report.summary import Rate

MAX_POINTS = 600  # of a curve: more than a screen has room for, few enough for a page that opens at once
Curve = list[float | None]


@dataclass(frozen=True)
class Panel:
    """A chart: the metrics whose name (prefix and all) matches ``pattern``, and one sentence on how to read it.

    unit: shown at the axis; "%" multiplies by 100. low, high: fixed ends of the axis, None where the data decides.
    group: the section it stands in. noisy: whether the curve is smoothed. log: whether a logarithmic axis may serve it better.
    named: whether even a single curve needs its name beside it, as the title does not say which it is.
    """

    key: str
    title: str
    note: str
    pattern: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    group: str = "optimisation"
    noisy: bool = True
    log: bool = False
    named: bool = False


SUCCESS = Panel(
    "success",
    "Success rate",
    "Training episodes; dots are evaluations with their 95 % intervals.",
    r"(^|/)success$",
    "%",
    0,
    1,
    "learning",
)
# Of conversations: "agent/..." is how tools were used, "reward/NAME" what a reward gave, "reward/NAME/..." what that was made of.
_TALKING = (
    Panel(
        "scores",
        "Scores",
        "Mean of each reward over a rollout, before its weight.",
        r"^reward/[^/]+$|^rollout/score_",
        group="rewards",
        named=True,
    ),
    Panel(
        "failed",
        "Failed scores",
        "Episodes that a reward could not score.",
        r"^reward/[^/]+/failed$",
        "%",
        0,
        group="other",
        named=True,
    ),
    Panel("terms", "Parts of scores", "What rewards that say so are made of.", r"^reward/[^/]+/", group="rewards", named=True),
    Panel(
        "tools",
        "Tool use",
        "Conversations with a call; calls that worked; right answers whose tools brought the evidence up.",
        r"^agent/(tool|tool_success|faithful)_rate$",
        "%",
        0,
        1,
        "agents",
    ),
    Panel(
        "endings",
        "Endings",
        "Conversations that ended with an answer, and those cut for length.",
        r"^agent/(answered|truncated)$",
        "%",
        0,
        1,
        "agents",
    ),
    Panel("turns", "Turns and calls", "Of a conversation.", r"^agent/(turns|calls)$", low=0, group="agents"),
    Panel("tokens", "Tokens of a turn", "What the policy says at a time.", r"^agent/tokens_per_turn$", low=0, group="agents"),
    Panel("tool_seconds", "Time of a call", "Mean of each tool.", r"^agent/seconds/", "s", 0, group="agents", named=True),
    Panel(
        "tool_errors", "Failed calls", "Of a rollout, by what went wrong.", r"^agent/errors/", low=0, group="agents", named=True
    ),
)
# A metric goes to the first panel that matches. Names are the last part of "prefix/name", whatever wrote the prefix.
PANELS = (
    *_TALKING,
    SUCCESS,
    Panel(
        "reward",
        "Reward",
        "Mean return of training episodes, undiscounted.",
        r"(^|/)(return|reward|returns|rewards)(_mean)?$",
        group="learning",
    ),
    Panel(
        "policy_loss",
        "Policy loss",
        "The clipped surrogate; its level says little, jumps say a lot.",
        r"(^|/)policy_loss$|loss/policy$",
    ),
    Panel(
        "value_loss",
        "Value loss",
        "How far the critic is from the returns.",
        r"(^|/)(value|critic)_loss$|loss/(value|critic)$",
        log=True,
    ),
    Panel(
        "loss",
        "Loss",
        "The whole objective, and the supervised one where a stage imitates.",
        r"(^|/)(\w+_)?loss$|loss/(flow|total|supervised)\w*$",
        log=True,
    ),
    Panel(
        "kl",
        "KL divergence",
        "From the policy that collected, and from the reference where there is one.",
        r"(^|/)(approx_)?kl(_\w+)?$",
        "nats",
        log=True,
    ),
    Panel("clip", "Clip fraction", "Share of units whose ratio the loss cut off.", r"(^|/)(value_|dual_)?clip_fraction$", "%", 0),
    Panel("ratio", "Probability ratio", "Smallest and largest, new policy to old; near 1 is on-policy.", r"(^|/)ratio(_\w+)?$"),
    Panel("entropy", "Entropy", "How much the policy still explores.", r"(^|/)entropy$", "nats"),
    Panel(
        "explained",
        "Explained variance",
        "Of the returns by the critic: 1 is perfect, 0 no better than their mean.",
        r"(^|/)explained_variance$",
    ),
    Panel("grad", "Gradient norm", "Before clipping.", r"(^|/)grad(ient)?_norm", log=True),
    Panel(
        "mismatch",
        "Log-probability mismatch",
        "Rollout against recomputation; at unchanged weights it should be zero.",
        r"mismatch",
        "nats",
        log=True,
    ),
    Panel("lr", "Learning rate", "Of each parameter group.", r"(^|/)(lr|learning_rate)(/|_|$)", low=0, noisy=False),
    Panel("speed", "Environment steps", "Collected per second.", r"(^|/)env_steps_per_s$", "steps/s", 0, group="speed"),
    Panel("decisions", "Decisions", "Made per second.", r"(^|/)decisions_per_s$", "decisions/s", 0, group="speed"),
)
HELD_OUT = Panel(
    "held_out",
    "Scores in evaluations",
    "Means over the episodes of each evaluation. Nothing is trained on a watched score (dashed): where it falls while a trained "
    "one rises, the reward is being hacked.",
    "",
    group="rewards",
    noisy=False,
    named=True,
)
APART = 5.0  # times as large: a score beside which another cannot be read
_TIMES = re.compile(r"^seconds/")  # shown as the wall-clock split


def chart_data(rows: Sequence[Mapping[str, Any]], trained: frozenset[str] | None = None) -> dict[str, Any]:
    """What page.js draws: axes shared by all curves, and the panels that have data, as plain JSON values (no NaN).

    trained: the scores that something was trained on, of those that evaluations measured; None: not known.
    """
    binned = _binned([row for row in rows if row["kind"] == "train"])
    names = sorted(
        {name for row in binned for name, value in row.items() if name not in SHARED_FIELDS and _finite(value) is not None}
    )
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    panels: dict[str, dict[str, Any]] = {}
    for name in names:
        if not _TIMES.match(name):
            panel = _panel(name)
            curve = [_finite(row.get(name)) for row in binned]
            smoothed = smooth(curve, [row["stage"] for row in binned]) if panel.noisy else curve
            _add(panels.setdefault(panel.key, _empty(panel))["series"], _series(name, curve, smoothed))
    points = [
        _point(row, rate) | {"stage": stages.index(row["stage"])}
        for row in rows
        if row["kind"] == "evaluation" and not row.get("changed") and (rate := Rate.of(row))  # of the task that was set
    ]
    if points:
        panels.setdefault("success", _empty(SUCCESS))["points"] = points
    evaluated = _evaluated([row for row in rows if row["kind"] == "evaluation"], stages, trained)
    order = [panel.key for panel in PANELS]
    return {
        "axes": {"step": [row["step"] for row in binned], "minutes": [_round(row["seconds"] / 60) for row in binned]},
        "stages": stages,
        "stage": [stages.index(row["stage"]) for row in binned],
        "iteration": [row["iteration"] for row in binned],
        "panels": evaluated
        + sorted(panels.values(), key=lambda panel: order.index(panel["key"]) if panel["key"] in order else len(order)),
    }


def _evaluated(rows: Sequence[Mapping[str, Any]], stages: Sequence[str], trained: frozenset[str] | None) -> list[dict[str, Any]]:
    """What rewards gave in evaluations: all in one panel with axes of its own, and where they lie apart each also alone."""
    measured = [(row, scores) for row in rows if row["label"] in ("before", "during", "after") and (scores := _scores(row))]
    names = sorted({name for _, scores in measured for name in scores}, key=lambda name: (_is_watched(name, trained), name))
    axes = {
        "axes": {
            "step": [row["step"] for row, _ in measured],
            "minutes": [_round(row["seconds"] / 60) for row, _ in measured],
        },
        "stage": [stages.index(row["stage"]) for row, _ in measured],
        "iteration": [row["iteration"] for row, _ in measured],
        "label": [row["label"] for row, _ in measured],
    }
    series = []
    for place, name in enumerate(names):
        curve = [scores.get(name) for _, scores in measured]
        watched = _is_watched(name, trained)
        told = name if trained is None else f"{name} ({'watched' if watched else 'trained on'})"
        series.append({**_series(told, curve, curve), "watched": watched, "colour": place})
    if not series:
        return []
    together = {**_empty(HELD_OUT), **axes, "series": series}
    largest = [max(abs(value) for value in each["raw"] if value is not None) for each in series]
    if max(largest) <= APART * min(largest):
        return [together]
    alone = [
        {
            **_empty(replace(HELD_OUT, key=f"held_out:{name}", title=f"{name} in evaluations", note="On a scale of its own.")),
            **axes,
        }
        for name in names
    ]
    return [together, *({**panel, "series": [each]} for panel, each in zip(alone, series, strict=True))]


def _is_watched(name: str, trained: frozenset[str] | None) -> bool:
    return trained is not None and name not in trained


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The mean of each of the environment's rewards in an evaluation."""
    known = row.get("metrics")
    numbers = {name: _finite(value) for name, value in known.items()} if isinstance(known, Mapping) else {}
    return {name.removeprefix(SCORE): value for name, value in numbers.items() if name.startswith(SCORE) and value is not None}


def smooth(values: Sequence[float | None], stages: Sequence[str]) -> Curve:
    """Exponential moving average, unbiased at its start, anew in every stage; gaps stay gaps.

    It weighs the last 0.4 sqrt(n) or so of n values: noise shrinks as curves grow longer, while a fast start still shows as one.
    """
    keep = 1 - 1 / max(1.0, 0.4 * math.sqrt(sum(value is not None for value in values)))
    total = weight = 0.0
    smoothed: Curve = []
    for i, value in enumerate(values):
        if i and stages[i] != stages[i - 1]:
            total = weight = 0.0
        if value is not None:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(None if value is None else total / weight)
    return smoothed


def _panel(name: str) -> Panel:
    fallback = Panel(f"other:{name}", name, "", "", group="other")
    return next((panel for panel in PANELS if re.search(panel.pattern, name)), fallback)


def _empty(panel: Panel) -> dict[str, Any]:
    shown = ("key", "title", "note", "unit", "low", "high", "group", "log", "named")
    return {**{name: getattr(panel, name) for name in shown}, "series": [], "points": []}


def _add(series: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """One line for curves that are the same, under both names: of two lines on top of one another only one is seen."""
    for old in series:
        if old["raw"] == new["raw"]:
            old["name"] += f" = {new['name']}"
            return
    series.append(new)


def _series(name: str, curve: Curve, smoothed: Curve) -> dict[str, Any]:
    known = [value for value in curve if value is not None]
    return {
        "name": name,
        "raw": [_round(value) for value in curve],
        "smooth": [_round(value) for value in smoothed],
        "first": _round(known[0]),
        "last": _round(next(value for value in reversed(smoothed) if value is not None)),
    }


def _point(row: Mapping[str, Any], rate: Rate) -> dict[str, Any]:
    return {
        "step": row["step"],
        "minutes": _round(row["seconds"] / 60),
        "label": f"{row['label']} {row['stage']}",
        "kind": row["label"],
        "y": _round(rate.success),
        "low": _round(rate.low),
        "high": _round(rate.high),
        "episodes": rate.episodes,
    }


def _binned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most about MAX_POINTS rows: means over equally many neighbours of one stage."""
    size = math.ceil(len(rows) / MAX_POINTS)
    if size <= 1:
        return list(rows)
    bins: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if bins and len(bins[-1]) < size and bins[-1][-1]["stage"] == row["stage"]:
            bins[-1].append(row)
        else:
            bins.append([row])
    return [_mean(rows) for rows in bins]


def _mean(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last row, with the mean over all rows in place of each of its metrics."""
    mean = {name: rows[-1][name] for name in SHARED_FIELDS if name in rows[-1]}
    for name in {name for row in rows for name in row} - mean.keys():
        values = [value for row in rows if (value := _finite(row.get(name))) is not None]
        if values:
            mean[name] = math.fsum(values) / len(values)
    return mean


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _round(value: float | None) -> float | None:
    """Five digits: what a screen can show."""
    return None if value is None else float(f"{value:.5g}")
