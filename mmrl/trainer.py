"""The trainer: one loop over stages - collect, advantages, update, log, evaluate, save.

It knows no concrete class; everything is built from the configuration. A run's folder:
config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/, trajectories/, policy/ (the final one), report.html.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl import checkpoint
from mmrl.config import RunConfig, StageConfig, dump, load
from mmrl.errors import CheckpointError, ConfigError, MMRLError, TrainingError
from mmrl.evaluation import evaluate
from mmrl.metrics import MetricsWriter
from mmrl.optim import Optimization
from mmrl.progress import Progress
from mmrl.protocols import DataContext, Environment, ExampleSource
from mmrl.report.system import describe_system
from mmrl.rollout import Collector, episode_metrics
from mmrl.seeding import Streams, configure_torch, derive_seed, seed_everything
from mmrl.updates import RolloutUpdate, SupervisedTerm, SupervisedUpdate

STATISTICS_EXAMPLES = 4096  # examples a policy without normalisation statistics takes them from


def train(config: RunConfig, run_dir: Path, progress: Progress) -> Path:
    """Run all stages of ``config`` in the empty folder ``run_dir``; returns it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.atomic_write_text(run_dir / "config.yaml", dump(config))
    checkpoint.atomic_write_text(run_dir / "environment.json", json.dumps(describe_system(), indent=1) + "\n")
    return Run(config, run_dir, progress).execute()


def resume(run_dir: Path, progress: Progress) -> Path:
    """Continue ``run_dir`` from its newest complete checkpoint (from the start where it has none yet)."""
    config = load(run_dir / "config.yaml")
    folder = run_dir / "checkpoints"
    if not folder.is_dir() or not any(folder.iterdir()):
        progress.note(f"{run_dir} has no checkpoint yet; starting it from the beginning")
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)
        return Run(config, run_dir, progress).execute()
    found = checkpoint.latest(folder)
    if found.warning:
        progress.note(found.warning)
    return Run(config, run_dir, progress, start=found.path).execute()


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


class Run:
    """One run in one process: what outlives its stages."""

    def __init__(self, config: RunConfig, run_dir: Path, progress: Progress, start: Path | None = None) -> None:
        self.config, self.dir, self.progress = config, run_dir, progress
        self.device = choose_device(config.device)
        configure_torch(config.threads, deterministic=False)
        seed_everything(config.seed)
        self.streams = Streams(config.seed)
        self.start = start
        self._sections: Mapping[str, Mapping[str, Tensor]] = {}
        self._meta: Mapping[str, Any] = {}
        if start is not None:
            self._sections, self._meta = checkpoint.load(start)
        self.metrics = MetricsWriter(
            run_dir,
            tensorboard=config.tensorboard,
            position=self._meta.get("metrics_position", 0),
            elapsed=self._meta.get("elapsed", 0.0),
        )
        self.saves = self._meta.get("number", -1)

    def execute(self) -> Path:
        first = int(self._meta.get("stage", 0))
        policy_state: Mapping[str, Tensor] | None = self._sections.get("policy")
        policy = None
        try:
            for index in range(first, len(self.config.stages)):
                stage = Stage(self, index, policy_state, self._sections if index == first and self.start else None, self._meta)
                policy = stage.run()
                policy_state = policy.state_dict()
        finally:
            self.metrics.close()
        if policy is not None:
            policy.save(self.dir / "policy")
        return self.dir

    def make_environment(self, num_envs: int, *overrides: tuple[str, Mapping[str, Any]]) -> Environment:
        component = self.config.environment
        for where, changes in overrides:
            component = component.override(changes, where=where)
        return component.build(num_envs=num_envs, device=self.device)

    def save(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
        self.saves += 1
        full = {**meta, "number": self.saves, "metrics_position": self.metrics.position(), "elapsed": self.metrics.seconds()}
        checkpoint.save(self.dir / "checkpoints", self.saves, sections, full, self.config.checkpoint.keep)


class Stage:
    """One stage of a run, from building its parts to its last checkpoint."""

    def __init__(
        self,
        run: Run,
        index: int,
        policy_state: Mapping[str, Tensor] | None,
        resumed: Mapping[str, Mapping[str, Tensor]] | None,
        meta: Mapping[str, Any],
    ) -> None:
        self.run_, self.index, self.config = run, index, run.config.stages[index]
        self.where = f"stages.{self.config.name}"
        self.algorithm: Any = self.config.algorithm.build()
        component = run.config.policy.override(self.config.policy, where=f"{self.where}.policy")
        self.policy: Any = component.build(device=run.device)
        self.policy.version = int(meta.get("policy_version", 0))
        if resumed is not None and run.start is not None:
            checkpoint.check_fingerprint(meta, self.policy.fingerprint(), run.start)
        if policy_state is not None:
            self.policy.load_state_dict(policy_state)
        self.sources: dict[str, ExampleSource] = {}
        self.evaluation_environment: Environment | None = None
        self.updater = self._build_updater()
        self.iteration = 0
        if resumed is not None:
            self._restore(resumed, meta)

    # -- building ------------------------------------------------------------------------------------------------------

    def _build_updater(self) -> _Learner:
        needs = self.algorithm.needs
        builder = _RolloutLearner if "rollout" in needs else _ExampleLearner
        return builder(self)

    def make_source(self, name: str, component: Any) -> ExampleSource:
        """A data source of this stage; its cursor is saved under ``name``."""
        run = self.run_
        horizon = getattr(self.policy, "horizon", None)
        if horizon is None:
            raise ConfigError(
                f"{self.where}.{name}: {run.config.policy.target} cannot imitate; choose a policy with a supervised loss"
            )

        def environment(num_envs: int, overrides: Mapping[str, Any]) -> Environment:
            changes = ((f"{self.where}.environment", self.config.environment), (f"{self.where}.{name}.environment", overrides))
            return run.make_environment(num_envs, *changes)

        context = DataContext(environment, horizon, run.config.seed, run.device)
        self.sources[name] = component.build(context=context)
        return self.sources[name]

    def fit_statistics(self, source: ExampleSource) -> None:
        """Statistics from the first examples, for a policy that has none; the source then starts where it stood."""
        if self.policy.needs_statistics():
            cursor = {name: tensor.clone() for name, tensor in source.state_dict().items()}
            self.policy.fit_statistics(source.batch(STATISTICS_EXAMPLES))
            source.load_state_dict(cursor)

    def optimization(self, total_updates: int) -> Optimization:
        return Optimization(
            self.config.optimizer, self.policy.trainable(), total_updates, max_skipped=self.config.max_skipped_updates
        )

    # -- running ---------------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """All remaining iterations; returns the trained policy."""
        config, run = self.config, self.run_
        if self.iteration == 0:
            self.save()
            if self.index == 0:
                self.evaluate("before")
        with run.progress.stage(config.name, config.iterations, done=self.iteration) as display:
            while self.iteration < config.iterations:
                metrics = self._iterate()
                self.iteration += 1
                run.metrics.train(config.name, self.iteration, metrics)
                display.update(self.iteration, _displayed(metrics))
                every = run.config.evaluation.every
                if every and self.iteration % every == 0 and self.iteration < config.iterations:
                    self.evaluate("during")
                if self.iteration % run.config.checkpoint.every == 0 and self.iteration < config.iterations:
                    self.save()
        # Saved before it is evaluated: a run killed during the evaluation repeats only that.
        self.save()
        self.evaluate("after")
        self.close()
        return self.policy

    def _iterate(self) -> dict[str, float]:
        try:
            return self.updater.iterate(self.iteration)
        except TrainingError as error:
            raise TrainingError(f"stage {self.config.name!r}, iteration {self.iteration + 1}: {error}") from error

    def evaluate(self, label: str) -> None:
        run, evaluation = self.run_, self.run_.config.evaluation
        if self.evaluation_environment is None:
            stage_changes = (f"{self.where}.environment", self.config.environment)
            changes = (stage_changes, ("evaluation.environment", evaluation.environment))
            self.evaluation_environment = run.make_environment(min(evaluation.num_envs, evaluation.episodes), *changes)
        episodes = evaluation.episodes
        if label == "during":
            episodes = evaluation.episodes_during or episodes
        with self.updater.optimization.ema_scope():
            result = evaluate(
                self.policy,
                self.evaluation_environment,
                episodes=episodes,
                first_task=evaluation.first_task,
                generator=run.streams.fresh("evaluation", device=run.device),
                progress=run.progress,
                videos=evaluation.videos if label != "during" else 0,
                video_folder=run.dir / "trajectories" if label != "during" and evaluation.videos else None,
                label=label,
                stage=self.config.name,
            )
        run.metrics.evaluation(self.config.name, self.iteration, label, result.row())
        run.progress.note(
            f"{self.config.name}, {label}: success {result.success:.1%} [{result.low:.1%}, {result.high:.1%}] of {result.episodes} held-out episodes"
        )

    def close(self) -> None:
        if self.evaluation_environment is not None:
            self.evaluation_environment.close()
        self.updater.close()

    # -- saving ------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        optimizer_tensors, optimizer_meta = self.updater.optimization.state()
        sections: dict[str, Mapping[str, Tensor]] = {
            "policy": self.policy.state_dict(),
            "optimizer": optimizer_tensors,
            "generators": self.run_.streams.state(),
            **{f"data_{name}": source.state_dict() for name, source in self.sources.items()},
            **self.updater.sections(),
        }
        meta = {
            "stage": self.index,
            "iteration": self.iteration,
            "policy_version": self.policy.version,
            "fingerprint": self.policy.fingerprint(),
            "optimizer": optimizer_meta,
            "learner": self.updater.meta(),
        }
        self.run_.save({name: section for name, section in sections.items() if section}, meta)

    def _restore(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
        missing = [f"data_{name}" for name in self.sources if f"data_{name}" not in sections]
        if missing:
            raise CheckpointError(
                f"{self.run_.start}: holds no section {missing[0]!r}; the run's config.yaml was changed since it was saved"
            )
        self.updater.optimization.load(sections.get("optimizer", {}), meta["optimizer"])
        self.run_.streams.load(sections["generators"])
        for name, source in self.sources.items():
            source.load_state_dict(sections[f"data_{name}"])
        self.updater.restore(sections, meta["learner"])
        self.iteration = int(meta["iteration"])


class _Learner:
    """What a stage does in an iteration; one subclass for each kind of experience."""

    optimization: Optimization

    def iterate(self, iteration: int) -> dict[str, float]:
        raise AssertionError("abstract")

    def sections(self) -> dict[str, Mapping[str, Tensor]]:
        return {}

    def meta(self) -> dict[str, Any]:
        return {}

    def restore(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
        """Continue from what ``sections`` and ``meta`` returned."""

    def close(self) -> None:
        """Release what the stage held."""


class _ExampleLearner(_Learner):
    """Draws examples and imitates them."""

    def __init__(self, stage: Stage) -> None:
        config, streams = stage.config, stage.run_.streams
        source = stage.make_source("data", config.data)
        stage.fit_statistics(source)
        self.optimization = stage.optimization(config.iterations)
        generator = streams.get("supervised", stage.run_.device)
        self._update = SupervisedUpdate(stage.policy, stage.algorithm, self.optimization, source, generator, config.micro_batch)

    def iterate(self, iteration: int) -> dict[str, float]:
        started = time.perf_counter()
        metrics = self._update.run()
        seconds = time.perf_counter() - started
        return {
            **_grouped(metrics),
            "seconds/update": seconds,
            "speed/samples_per_s": self._update.algorithm.batch_size / seconds,
        }


class _RolloutLearner(_Learner):
    """Collects rollouts and learns from them."""

    def __init__(self, stage: Stage) -> None:
        self._stage, run, config = stage, stage.run_, stage.config
        assert config.collect is not None
        algorithm, policy = stage.algorithm, stage.policy
        reset = not algorithm.whole_episodes if config.collect.auto_reset is None else config.collect.auto_reset
        self._environment = run.make_environment(config.collect.num_envs, (f"{stage.where}.environment", config.environment))
        self._check(stage, reset)
        self._collector = Collector(
            self._environment, decisions=config.collect.decisions, group_size=algorithm.group_size, auto_reset=reset
        )
        # Another seed of the run means other tasks.
        self._collector.next_task = derive_seed(run.config.seed, "tasks", stage.index) % 2**40 + 2**32
        self.optimization = stage.optimization(config.iterations * algorithm.epochs * algorithm.minibatches)
        self._reference = policy.reference() if algorithm.uses_reference else None
        self._generator = run.streams.get("collect", run.device)
        self._update = RolloutUpdate(
            policy,
            algorithm,
            self.optimization,
            run.streams.get("minibatch", run.device),
            run.streams.get("supervised", run.device),
            config.iterations,
            config.micro_batch,
            self._supervised(stage),
            self._reference,
        )

    def _check(self, stage: Stage, reset: bool) -> None:
        algorithm, collect, target = stage.algorithm, stage.config.collect, stage.config.algorithm.target
        assert collect is not None
        where = f"{stage.run_.dir / 'config.yaml'}: {stage.where}"
        if algorithm.whole_episodes and reset:
            raise ConfigError(f"{where}.collect.auto_reset is true, but {target} judges whole episodes; set it to false")
        needed = -(-self._environment.max_steps // getattr(stage.policy, "execute", 1))
        if algorithm.whole_episodes and collect.decisions < needed:
            raise ConfigError(
                f"{where}.collect.decisions = {collect.decisions}, but an episode may take {needed}; {target} needs whole episodes"
            )

    def _supervised(self, stage: Stage) -> SupervisedTerm | None:
        config = stage.config.supervised
        if config is None:
            return None
        source = stage.make_source("supervised", config.data)
        first, last = config.weight if isinstance(config.weight, list) else (config.weight, config.weight)
        return SupervisedTerm(source, config.batch_size, first, last)

    def iterate(self, iteration: int) -> dict[str, float]:
        policy = self._stage.policy
        value = policy.value if "critic" in self._stage.algorithm.needs else None
        times = [time.perf_counter()]
        rollout = self._collector.collect(policy, self._generator, value)
        times.append(time.perf_counter())
        batch, advantages = self._update.prepare(rollout)
        times.append(time.perf_counter())
        metrics = self._update.run(batch, iteration) if len(batch) else {}
        times.append(time.perf_counter())
        collect, score, update = (later - earlier for earlier, later in zip(times, times[1:], strict=False))
        return {
            **episode_metrics(rollout.episodes),
            **_grouped(metrics),
            **{f"advantages/{name}": number for name, number in advantages.metrics.items()},
            "rollout/decisions": float(rollout.decisions),
            "rollout/env_steps": float(rollout.env_steps),
            "rollout/trained_decisions": float(len(batch)),
            "speed/env_steps_per_s": rollout.env_steps / collect,
            "speed/decisions_per_s": rollout.decisions / (collect + score + update),
            "seconds/collect": collect,
            "seconds/score": score,
            "seconds/update": update,
        }

    def sections(self) -> dict[str, Mapping[str, Tensor]]:
        return {} if self._reference is None else {"reference": self._reference.state_dict()}

    def meta(self) -> dict[str, Any]:
        return {"next_task": self._collector.next_task}

    def restore(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
        self._collector.next_task = int(meta["next_task"])
        if self._reference is not None:
            self._reference.load_state_dict(sections["reference"])
        # Loading the streams replaced the generators.
        run = self._stage.run_
        self._generator = run.streams.get("collect", run.device)
        self._update.minibatch_generator = run.streams.get("minibatch", run.device)
        self._update.supervised_generator = run.streams.get("supervised", run.device)

    def close(self) -> None:
        self._environment.close()


# Metric names get the group under which the report and TensorBoard show them.
_GROUPS = {
    "loss": ("loss", "policy_loss", "value_loss", "supervised_loss", "flow_matching"),
    "update": ("grad_norm", "skipped", "updates", "stopped_by_kl"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}


def _grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    def group(name: str) -> str:
        return "optimizer" if name.startswith("lr_") else _GROUP_OF.get(name, "policy")

    return {f"{group(name)}/{name}": value for name, value in metrics.items()}


def _displayed(metrics: Mapping[str, float]) -> dict[str, float]:
    shown = {
        "success": "rollout/success",
        "env_steps_per_s": "speed/env_steps_per_s",
        "samples_per_s": "speed/samples_per_s",
        "loss": "loss/loss",
    }
    return {name: metrics[key] for name, key in shown.items() if key in metrics}


def load_policy(run_dir: Path, config: RunConfig, device: torch.device) -> Any:
    """The policy of a run as its newest checkpoint holds it, built as the stage it belongs to builds it."""
    found = checkpoint.latest(run_dir / "checkpoints")
    sections, meta = checkpoint.load(found.path)
    stage: StageConfig = config.stages[int(meta["stage"])]
    policy = config.policy.override(stage.policy, where=f"stages.{stage.name}.policy").build(device=device)
    checkpoint.check_fingerprint(meta, policy.fingerprint(), found.path)
    try:
        policy.load_state_dict(sections["policy"])
    except (KeyError, RuntimeError) as error:
        raise MMRLError(f"{found.path}: does not hold this policy's weights ({str(error).splitlines()[0]})") from error
    policy.version = int(meta["policy_version"])
    return policy
