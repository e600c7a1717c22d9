"""What a stage does in an iteration: draw examples and imitate them, or collect rollouts and learn from them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.component import Component
from mmrl.config import ScoringConfig, StageConfig
from mmrl.conversing import ToolWatch, talk_metrics
from mmrl.errors import ConfigError
from mmrl.keeping import Keeper
from mmrl.optim import Optimization
from mmrl.protocols import (
    AdaptivePolicy,
    Environment,
    ExampleSource,
    MeansAlgorithm,
    SchedulingPolicy,
    SelectiveAlgorithm,
    StatefulAlgorithm,
    VelocityAlgorithm,
)
from mmrl.refilling import Gathered, counted, gather_rollout
from mmrl.rewarding import Scorer
from mmrl.rollout import Collector, episode_metrics
from mmrl.seeding import Streams, derive_seed
from mmrl.snapshots import Snapshot
from mmrl.types import Rollout
from mmrl.updates import MetricMerger, RolloutUpdate, SupervisedTerm, SupervisedUpdate

STATISTICS_EXAMPLES = 4096  # examples a policy without normalisation statistics takes them from


@dataclass
class Setting:
    """What a stage gives its learner. ``where`` names the stage in messages, ``index`` is its place in the run.

    make_environments: takes how many, and in how many parts that simulate beside one another (see build_parts). note:
    takes a sentence that a person should read. trajectories: the folder of what is kept for the report.
    """

    where: str
    index: int
    config: StageConfig
    policy: Any
    algorithm: Any
    streams: Streams
    device: torch.device
    make_environments: Callable[[int, int], Sequence[Environment]]
    make_source: Callable[[str, Component], ExampleSource]
    note: Callable[[str], None]
    trajectories: Path

    def optimization(self, total_updates: int) -> Optimization:
        config = self.config
        return Optimization(
            config.optimizer,
            self.policy.trainable(),
            total_updates,
            max_skipped=config.max_skipped_updates,
            where=f"{self.where}.optimizer",
        )


class Learner(ABC):
    """One subclass for each kind of experience."""

    optimization: Optimization

    @abstractmethod
    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration (numbered from 0); its metrics, named as they are logged."""

    def sections(self) -> dict[str, Mapping[str, Tensor]]:
        """Tensors to keep in a checkpoint beside weights, optimizer, generators and data cursors."""
        return {}

    def meta(self) -> dict[str, Any]:
        """Numbers to keep in a checkpoint."""
        return {}

    def restore(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:  # noqa: B027 (nothing by default)
        """Continue from what ``sections`` and ``meta`` returned."""

    def close(self) -> None:  # noqa: B027 (nothing by default)
        """Release what the stage held."""


class ExampleLearner(Learner):
    """Draws examples and imitates them."""

    def __init__(self, setting: Setting) -> None:
        config = setting.config
        assert config.data is not None
        source = setting.make_source("data", config.data)
        fit_statistics(setting.policy, source)
        self.optimization = setting.optimization(config.iterations)
        generator = setting.streams.get("supervised", setting.device)
        self._update = SupervisedUpdate(
            setting.policy, setting.algorithm, self.optimization, source, generator, config.micro_batch
        )

    def iterate(self, iteration: int) -> dict[str, float]:
        started = time.perf_counter()
        metrics = self._update.run()
        seconds = time.perf_counter() - started
        samples_per_s = self._update.algorithm.batch_size / seconds
        return {**grouped(metrics), "seconds/update": seconds, "speed/samples_per_s": samples_per_s}


class RolloutLearner(Learner):
    """Collects rollouts and learns from them."""

    def __init__(self, setting: Setting) -> None:
        config, algorithm, policy = setting.config, setting.algorithm, setting.policy
        assert config.collect is not None
        self._policy = policy
        self._value = policy.value if "critic" in algorithm.needs else None
        whole = algorithm.whole_episodes or bool(config.rewards)
        reset = not whole if config.collect.auto_reset is None else config.collect.auto_reset
        self._environments = setting.make_environments(config.collect.num_envs, config.collect.parts)
        self._collector = Collector(
            self._environments,
            decisions=_decisions(setting, self._environments[0], reset),
            seed=derive_seed(setting.streams.seed, "collect"),
            device=setting.device,
            group_size=algorithm.group_size,
            auto_reset=reset,
            keep_means=_uses_means(algorithm),
            pieces=config.collect.parts // len(self._environments),
        )
        # Another seed of the run, and another stage, means other tasks.
        self._collector.next_task = derive_seed(setting.streams.seed, "tasks", setting.index) % 2**40 + 2**32
        scoring = config.scoring or ScoringConfig()
        self._scorer = Scorer(config.rewards, f"{setting.where}.rewards", scoring.combine, scoring.environment)
        self._watch = ToolWatch()
        self._keeper = Keeper(config, policy, self._scorer.weights, setting.trajectories)
        self._note = setting.note
        supervised = _supervised(setting)  # may give the policy its statistics, so before the reference copies it
        self._reference = policy.reference() if algorithm.uses_reference else None
        self._snapshots = _snapshots(algorithm, policy)
        self.optimization = setting.optimization(config.iterations * algorithm.epochs * algorithm.minibatches)
        self._update = RolloutUpdate(
            policy,
            algorithm,
            self.optimization,
            setting.streams.get("minibatch", setting.device),
            setting.streams.get("supervised", setting.device),
            config.iterations,
            config.micro_batch,
            supervised,
            self._reference,
            setting.streams.get("rows", setting.device),
            **self._snapshots,
        )

    def iterate(self, iteration: int) -> dict[str, float]:
        times = [time.perf_counter()]
        if isinstance(self._policy, SchedulingPolicy):
            self._policy.at_iteration(iteration)
        for snapshot in self._snapshots.values():
            snapshot.follow(iteration)
        played, reward = self._gather()
        times.append(time.perf_counter())
        batch, advantages = self._update.prepare(played.rollout)
        times.append(time.perf_counter())
        metrics = self._update.run(batch, iteration)
        if isinstance(self._policy, AdaptivePolicy):
            self._policy.adapt(batch.trace)
        times.append(time.perf_counter())
        self._keeper.see(iteration, played.rollout, advantages)
        collect, score, update = (later - earlier for earlier, later in pairwise(times))
        return {
            **episode_metrics(played.episodes),
            **grouped(metrics),
            **{f"advantages/{name}": number for name, number in advantages.metrics.items()},
            **played.metrics,
            "rollout/decisions": float(played.decisions),
            "rollout/env_steps": float(played.env_steps),
            "rollout/lost_episodes": float(played.lost),
            "rollout/trained_decisions": float(len(batch)),
            "speed/env_steps_per_s": played.env_steps / (collect - reward),
            "speed/decisions_per_s": played.decisions / (collect + score + update),
            "seconds/collect": collect - reward,
            "seconds/reward": reward,
            "seconds/score": score,
            "seconds/update": update,
        }

    def _gather(self) -> tuple[Gathered, float]:
        """What is learned from, its rewards given, and the seconds that these took."""
        seconds, rewards = 0.0, MetricMerger({"rollout/unscored_episodes": sum})

        def collect() -> Rollout:
            nonlocal seconds
            behaviour = self._snapshots.get("behaviour")
            with nullcontext() if behaviour is None else behaviour.worn():
                rollout = self._collector.collect(self._policy, self._value)
            started = time.perf_counter()
            scored, metrics = self._scorer.score(rollout)
            rewards.add(metrics)
            seconds += time.perf_counter() - started
            return scored

        algorithm = self._update.algorithm
        if isinstance(algorithm, SelectiveAlgorithm) and algorithm.max_refills:
            played = gather_rollout(collect, algorithm.taught, algorithm.max_refills)
        else:
            rollout = collect()
            played = counted(rollout, [rollout], {})
        talk = talk_metrics(played.episodes.transcripts)
        if warning := self._watch.see(talk.get("agent/tool_rate")):
            self._note(warning)
        sums = {f"rollout/{name}": number for name, number in played.metrics.items()}
        return replace(played, metrics={**sums, **talk, **rewards.result()}), seconds

    def _kept(self) -> dict[str, Any]:
        """What goes into a section of its own of a checkpoint."""
        kept: dict[str, Any] = dict(self._snapshots)
        if self._reference is not None:
            kept["reference"] = self._reference
        if isinstance(self._update.algorithm, StatefulAlgorithm):
            kept["algorithm"] = self._update.algorithm
        return kept

    def sections(self) -> dict[str, Mapping[str, Tensor]]:
        return {name: part.state_dict() for name, part in self._kept().items()}

    def meta(self) -> dict[str, Any]:
        return {"next_task": self._collector.next_task, "tool_watch": self._watch.state()}

    def restore(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
        self._collector.next_task = int(meta["next_task"])
        if "tool_watch" in meta:  # runs that are older have none
            self._watch.restore(meta["tool_watch"])
        for name, part in self._kept().items():
            part.load_state_dict(sections[name])

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


def _uses_means(algorithm: Any) -> bool:
    return isinstance(algorithm, MeansAlgorithm) and algorithm.uses_means


def _snapshots(algorithm: Any, policy: Any) -> dict[str, Snapshot]:
    if not isinstance(algorithm, VelocityAlgorithm):
        return {}
    decays = {"behaviour": algorithm.behaviour, "average": algorithm.average}
    return {name: Snapshot(policy, decay) for name, decay in decays.items() if decay is not None}


_LEARNERS: dict[str, Callable[[Setting], Learner]] = {"rollout": RolloutLearner, "examples": ExampleLearner}


def make_learner(setting: Setting) -> Learner:
    """The learner of the experience that the stage's algorithm needs."""
    need = next(need for need in _LEARNERS if need in setting.algorithm.needs)
    return _LEARNERS[need](setting)


def fit_statistics(policy: Any, source: ExampleSource) -> None:
    """Statistics from the first examples, for a policy that has none; the source then starts where it stood."""
    if policy.needs_statistics():
        cursor = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        policy.fit_statistics(source.batch(STATISTICS_EXAMPLES))
        source.load_state_dict(cursor)


def _decisions(setting: Setting, environment: Environment, reset: bool) -> int:
    """How many decisions a rollout has. Refuses what only the built environment and policy can tell does not fit together.

    Without auto-reset a shorter rollout would cut all its episodes at the same place, and the values that stand in for what
    follows would never be compared with a reward.
    """
    algorithm, collect, target = setting.algorithm, setting.config.collect, setting.config.algorithm.target
    assert collect is not None
    key = f"{setting.where}.collect"
    if algorithm.whole_episodes and reset:
        raise ConfigError(f"'{key}.auto_reset' is true, but {target} judges whole episodes; set it to false")
    needed = -(-environment.max_steps // getattr(setting.policy, "execute", 1))
    if not reset and (collect.decisions or needed) < needed:
        why = f"{target} judges whole episodes" if algorithm.whole_episodes else "without auto_reset episodes are played whole"
        raise ConfigError(
            f"'{key}.decisions' is {collect.decisions}, but {why}, which may take {needed}; raise it or leave it out"
        )
    return collect.decisions or needed


def _supervised(setting: Setting) -> SupervisedTerm | None:
    config = setting.config.supervised
    if config is None:
        return None
    source = setting.make_source("supervised", config.data)
    fit_statistics(setting.policy, source)
    first, last = config.weight if isinstance(config.weight, list) else (config.weight, config.weight)
    return SupervisedTerm(source, config.batch_size, first, last)


# Metric names get the group under which the report and TensorBoard show them.
_GROUPS = {
    "loss": ("loss", "policy_loss", "value_loss", "supervised_loss", "flow_matching", "auxiliary_loss"),
    "update": ("grad_norm", "skipped", "updates", "stopped_by_kl"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an update as they are logged: ``loss/...``, ``update/...``, ``optimizer/lr_...`` or ``policy/...``."""

    def group(name: str) -> str:
        return "optimizer" if name.startswith("lr_") else _GROUP_OF.get(name, "policy")

    return {f"{group(name)}/{name}": value for name, value in metrics.items()}
