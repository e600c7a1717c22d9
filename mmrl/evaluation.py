"""Evaluation: the deterministic policy on held-out tasks, with intervals, and a few episodes on video."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

from mmrl.config import MeasuringConfig
from mmrl.conversing import summary
from mmrl.errors import ConfigError, TrainingError
from mmrl.numerics.statistics import wilson_interval
from mmrl.playing import ATTEMPTS, Played, Player, Reel
from mmrl.progress import Progress
from mmrl.protocols import Environment, Policy

TOOL_RATES = {"tool_rate": "tool rate", "faithful_rate": "faithful rate"}  # of conversations, as a person reads them
_FIRST_LOOK, _LAST_LOOK = 2**12, 2**20  # ids that are looked at for so many of each family


@dataclass(frozen=True)
class FamilyResult:
    """Success of one task family with its 95 % Wilson interval, how its episodes ended, and what they earned.

    episodes: those that count, each a success, a failure (the task ended by itself, without success) or a time-out. lost: those
    that the simulator lost at every attempt, which do not count. return_, return_std: mean and standard deviation (unbiased; 0
    where there is only one) of the undiscounted return over the episodes; length: their mean in env steps. A family without
    episodes has zeros, and an interval from 0 to 1. talk: ``mmrl.conversing.summary`` of their conversations, if they were any.
    metrics: means of what else the environment measures at the end of an episode (the scores of its rewards, say), over the
    episodes where it is a number.
    """

    success: float
    low: float
    high: float
    episodes: int
    successes: int
    failures: int
    timeouts: int
    lost: int
    return_: float
    return_std: float
    length: float
    talk: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    metrics: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, played: Sequence[Played], /, **more: Any) -> Self:
        """The result of these episodes; ``more`` are the fields that a subclass has beside."""
        counted = [episode for episode in played if episode.outcome != "lost"]
        n, ended = len(counted), [episode.outcome for episode in played]
        low, high = wilson_interval(successes := ended.count("success"), n)
        returns = [episode.return_ for episode in counted]
        return cls(
            success=successes / n if n else 0.0,
            low=low,
            high=high,
            episodes=n,
            successes=successes,
            failures=ended.count("failure"),
            timeouts=ended.count("timeout"),
            lost=ended.count("lost"),
            return_=statistics.fmean(returns) if n else 0.0,
            return_std=statistics.stdev(returns) if n > 1 else 0.0,
            length=statistics.fmean(episode.steps for episode in counted) if n else 0.0,
            talk=summary([episode.talk for episode in counted if episode.talk is not None]),
            metrics=_means([episode.metrics for episode in counted]),
            **more,
        )

    def row(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl, where the mean is called ``return``."""
        apart = ("talk", "metrics")
        own = {each.name.rstrip("_"): getattr(self, each.name) for each in fields(FamilyResult) if each.name not in apart}
        return {**own, **self.talk, **({"metrics": dict(self.metrics)} if self.metrics else {})}


@dataclass(frozen=True)
class EvaluationResult(FamilyResult):
    """The same over all episodes, by family, and the episodes themselves in the order of their ids."""

    families: Mapping[str, FamilyResult]
    played: Sequence[Played]
    seconds: float

    def row(self) -> dict[str, Any]:
        """The result as a row of metrics.jsonl, without the episodes."""
        families = {name: family.row() for name, family in self.families.items()}
        return {**super().row(), "families": families, "seconds": self.seconds}

    def sentence(self) -> str:
        success = f"success {self.success:.1%} [{self.low:.1%}, {self.high:.1%}]"
        others = f"{self.failures} failed, {self.timeouts} ran out of time"
        lost = f" ({self.lost} more were lost by the simulator)" if self.lost else ""
        returns = f"return {self.return_:.4g} ± {self.return_std:.2g} (std)"
        tools = "".join(f"; {words} {self.talk[name]:.1%}" for name, words in TOOL_RATES.items() if name in self.talk)
        measured = "".join(f"; {name.replace('_', ' ')} {mean:.4g}" for name, mean in self.metrics.items())
        return f"{success}, {returns} over {self.episodes} episodes{lost}; {others}{tools}{measured}"


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over those who have it."""
    names = sorted({name for each in measured for name in each})
    return {name: statistics.fmean(each[name] for each in measured if name in each) for name in names}


def evaluate(
    policy: Policy,
    environment: Environment,
    settings: MeasuringConfig,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    reel: Reel | None = None,
    filmed: Collection[int] | None = None,
) -> EvaluationResult:
    """Play the tasks that ``settings`` asks for once each, ``num_envs`` of the environment at a time.

    Without ``reel`` nothing is filmed; with it, those of the tasks ``filmed`` are that are played (None: ``to_film`` of
    ``settings``). The numbers depend on policy, tasks, seed and ``settings.act_batch``, and neither on ``num_envs`` nor on what
    is filmed. Raises TrainingError where the simulator lost every episode.
    """
    started = time.perf_counter()
    tasks = choose_tasks(environment, settings)
    player = Player(policy, environment, seed=seed, act_batch=settings.act_batch, device=device)
    with progress.task("evaluating", len(tasks)) as advance:
        if reel is not None and filmed is None:
            filmed = to_film(environment, settings)
        played = player.play(tasks, advance, reel, filmed or ())
    return result_of(played, time.perf_counter() - started)


def result_of(played: Sequence[Played], seconds: float) -> EvaluationResult:
    """The numbers of an evaluation. Raises TrainingError where no episode counts."""
    if all(episode.outcome == "lost" for episode in played):
        raise TrainingError(f"the simulator lost each of {len(played)} evaluation episodes {ATTEMPTS} times; see `mmrl doctor`")
    by_family: dict[str, list[Played]] = defaultdict(list)
    for episode in played:
        by_family[episode.family].append(episode)
    families = {name: FamilyResult.of(episodes) for name, episodes in sorted(by_family.items())}
    return EvaluationResult.of(played, families=families, played=played, seconds=seconds)


def choose_tasks(environment: Environment, settings: MeasuringConfig) -> list[int]:
    """The ids to play, in order: those from ``first_task`` on, or with ``per_task`` the first ``episodes`` of each family.

    The families are those that occur among the first 4096 ids. Raises ConfigError if one of them is so rare that a million ids
    do not hold enough of it.
    """
    first, wanted = settings.first_task, settings.episodes
    if not settings.per_task:
        return list(range(first, first + wanted))
    look, known = _FIRST_LOOK, list(_by_family(environment, range(first, first + _FIRST_LOOK)))
    while True:
        by_family = _by_family(environment, range(first, first + look))
        if all(len(by_family[name]) >= wanted for name in known):
            return sorted(task for name in known for task in by_family[name][:wanted])
        if look == _LAST_LOOK:
            break
        look *= 4
    rare = min(known, key=lambda name: len(by_family[name]))
    raise ConfigError(
        f"'evaluation.episodes' is {wanted} of each task, but among {look} ids only {len(by_family[rare])} are of {rare}; "
        "ask for fewer"
    )


def to_film(environment: Environment, settings: MeasuringConfig) -> list[int]:
    """The ids of which the report shows what became: ``settings.videos`` of them, from the families in turn."""
    return in_turn(_by_family(environment, choose_tasks(environment, settings)), settings.videos)


def slots_of(settings: MeasuringConfig) -> int:
    """Environments to build: ``num_envs``, or fewer where there are fewer episodes to play."""
    return settings.num_envs if settings.per_task else min(settings.num_envs, settings.episodes)


def in_turn(groups: Mapping[str, Sequence[int]], most: int) -> list[int]:
    """At most ``most`` tasks: the first of each group, then the second of each, and so on."""
    ranked = sorted((rank, name, task) for name, tasks in groups.items() for rank, task in enumerate(tasks))
    return [task for _, _, task in ranked[:most]]


def _by_family(environment: Environment, tasks: Collection[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for task, family in zip(tasks, environment.family_of(torch.tensor(list(tasks))), strict=True):
        found[family].append(task)
    return dict(sorted(found.items()))
