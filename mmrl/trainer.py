"""The trainer: one loop over stages - collect, advantages, update, log, evaluate, save.

It knows no concrete class; everything is built from the configuration. A run's folder:
config.yaml, environment.json, metrics.jsonl, tensorboard/, checkpoints/, trajectories/, policy/ (the final one), report.html.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from mmrl import checkpoint
from mmrl.building import build_environment, build_parts, build_policy, choose_device, exclusive, load_weights
from mmrl.component import Component
from mmrl.config import RunConfig, dump, load
from mmrl.errors import CheckpointError, ConfigError, MMRLError, TrainingError
from mmrl.evaluation import evaluate, slots_of, to_film
from mmrl.learners import Setting, make_learner
from mmrl.metrics import MetricsWriter
from mmrl.playing import reel_within, stage_reel
from mmrl.progress import Progress
from mmrl.protocols import DataContext, Environment, ExampleSource
from mmrl.report.system import describe_system
from mmrl.seeding import Streams, configure_torch, seed_everything

_KEEP_FOLDER = (TrainingError, CheckpointError)  # a run that these stop can go on


class Saved(NamedTuple):
    """A checkpoint in memory."""

    path: Path
    sections: Mapping[str, Mapping[str, Tensor]]
    meta: Mapping[str, Any]


def train(config: RunConfig, run_dir: Path, progress: Progress) -> Path:
    """Run all stages of ``config`` in ``run_dir``, which must be empty or not there; returns it.

    A configuration that turns out impossible before an iteration was trained leaves no folder behind.
    """
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir}: is not empty; a run needs a folder of its own, so choose another name")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {run_dir}: {error.strerror}; choose another with output=FOLDER") from error
    run: Run | None = None
    try:
        with exclusive(run_dir):
            checkpoint.atomic_write_text(run_dir / "config.yaml", dump(config))
            _describe_machine(run_dir)
            run = Run(config, run_dir, progress)
            return run.execute()
    except MMRLError as error:
        can_go_on = (run_dir / "config.yaml").is_file() and isinstance(error, _KEEP_FOLDER)
        if not can_go_on and not (run is not None and run.trained):
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def resume(run_dir: Path, progress: Progress) -> Path:
    """Continue ``run_dir`` from its newest complete checkpoint (from the start where it has none yet)."""
    config = load(run_dir / "config.yaml")
    with exclusive(run_dir):
        saved = _newest(run_dir, progress)
        if not (run_dir / "environment.json").exists():  # killed before it was written
            _describe_machine(run_dir)
        return Run(config, run_dir, progress, saved).execute()


def _describe_machine(run_dir: Path) -> None:
    checkpoint.atomic_write_text(run_dir / "environment.json", json.dumps(describe_system(), indent=1) + "\n")


def _newest(run_dir: Path, progress: Progress) -> Saved | None:
    folder = run_dir / "checkpoints"
    if not checkpoint.any_saved(folder):
        progress.note(f"{run_dir} has no checkpoint yet; starting it from the beginning")
        return None
    found = checkpoint.latest(folder)
    if found.warning:
        progress.note(found.warning)
    return Saved(found.path, *checkpoint.load(found.path))


class Run:
    """One run in one process: what outlives its stages."""

    def __init__(self, config: RunConfig, run_dir: Path, progress: Progress, saved: Saved | None = None) -> None:
        self.config, self.dir, self.progress, self.saved = config, run_dir, progress, saved
        self.device = choose_device(config.device)
        configure_torch(config.threads, deterministic=False)
        seed_everything(config.seed)
        self.streams = Streams(config.seed)
        self.saves = -1 if saved is None else int(saved.meta["number"])
        self.trained = False  # whether there was an iteration

    def execute(self) -> Path:
        """All remaining stages, and the final policy beside them."""
        meta = {"stage": 0} if self.saved is None else self.saved.meta
        first, stages = int(meta["stage"]), self.config.stages
        if first >= len(stages):
            raise CheckpointError(f"{self.dir}: the checkpoint is of stage {first + 1}, but config.yaml has fewer; restore it")
        stage = Stage(self, first, None, self.saved)  # what does not fit is refused before anything is written
        self.metrics = MetricsWriter(
            self.dir,
            tensorboard=self.config.tensorboard,
            position=meta.get("metrics_position", 0),
            elapsed=meta.get("elapsed", 0.0),
        )
        try:
            policy = stage.run()
            for index in range(first + 1, len(stages)):
                policy = self._next(index, policy).run()
            _save_policy(policy, self.dir / "policy")
        finally:
            self.metrics.close()
        return self.dir

    def _next(self, index: int, policy: Any) -> Stage:
        """A stage after the first: where its configuration does not fit, what was trained before it must not be lost."""
        try:
            return Stage(self, index, policy, None)
        except ConfigError as error:
            config = self.dir / "config.yaml"
            raise ConfigError(
                f"{error}; the stages before are saved: mend {config}, then go on with --resume {self.dir}"
            ) from error

    def save(self, sections: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
        self.saves += 1
        full = {**meta, "number": self.saves, "metrics_position": self.metrics.position(), "elapsed": self.metrics.seconds()}
        checkpoint.save(self.dir / "checkpoints", self.saves, sections, full, self.config.checkpoint.keep)


class Stage:
    """One stage of a run, from building its parts to its last checkpoint.

    previous: the policy that the stage before it trained. saved: the checkpoint that this stage goes on from.
    """

    def __init__(self, run: Run, index: int, previous: Any, saved: Saved | None) -> None:
        self.run_, self.index, self.config = run, index, run.config.stages[index]
        self.where = f"stages.{self.config.name}"
        self.algorithm: Any = self.config.algorithm.build()
        self.policy: Any = build_policy(run.config, self.config, run.device)
        self._take_weights(previous, saved)
        self.sources: dict[str, ExampleSource] = {}
        self.evaluation_environment: Environment | None = None
        self._filmed: list[int] = []
        self.learner = make_learner(self._setting())
        self.iteration = 0
        if saved is not None:
            self._restore(saved)

    # -- building ------------------------------------------------------------------------------------------------------

    def _take_weights(self, previous: Any, saved: Saved | None) -> None:
        if saved is not None:
            checkpoint.check_fingerprint(saved.meta, self.policy.fingerprint(), saved.path)
            load_weights(self.policy, saved.sections["policy"], f"{saved.path} does not hold this policy's weights")
            self.policy.version = int(saved.meta["policy_version"])
        elif previous is not None:
            problem = f"'{self.where}.policy' needs other weights than the stage before it has; change 'policy' for all stages"
            load_weights(self.policy, previous.state_dict(), problem, ConfigError)
            self.policy.version = previous.version

    def _setting(self) -> Setting:
        run = self.run_

        def environments(num_envs: int, parts: int) -> Sequence[Environment]:
            return build_parts(run.config, num_envs, parts, run.device, self._environment_changes())

        return Setting(
            self.where,
            self.index,
            self.config,
            self.policy,
            self.algorithm,
            run.streams,
            run.device,
            environments,
            self._make_source,
            run.progress.note,
            run.dir / "trajectories",
        )

    def _environment_changes(self) -> tuple[str, Mapping[str, Any]]:
        return f"{self.where}.environment", self.config.environment

    def _make_source(self, name: str, component: Component) -> ExampleSource:
        """A data source of this stage; its cursor is saved under ``name``."""
        run = self.run_

        def environment(num_envs: int, overrides: Mapping[str, Any]) -> Environment:
            changes = (self._environment_changes(), (f"{self.where}.{name}.environment", overrides))
            return build_environment(run.config, num_envs, run.device, *changes)

        context = DataContext(environment, self.policy.horizon, run.config.seed, run.device)
        self.sources[name] = component.build(context=context)
        return self.sources[name]

    # -- running ---------------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """All remaining iterations; returns the trained policy, with averaged weights where the optimizer averages them."""
        try:
            if self.iteration == 0:
                self.save()
                if self.index == 0:
                    self.evaluate("before")
            self._iterate()
            # Saved before it is evaluated: a run killed during the evaluation repeats only that.
            self.save()
            self.evaluate("after")
        finally:
            self.close()
        return self._result()

    def _iterate(self) -> None:
        config, run = self.config, self.run_
        with run.progress.stage(config.name, config.iterations, done=self.iteration) as display:
            while self.iteration < config.iterations:
                metrics = self._iteration()
                self.iteration += 1
                run.trained = True
                run.metrics.train(config.name, self.iteration, metrics)
                display.update(self.iteration, _displayed(metrics))
                if self.iteration < config.iterations:
                    self._pause()

    def _iteration(self) -> dict[str, float]:
        try:
            return self.learner.iterate(self.iteration)
        except TrainingError as error:
            raise TrainingError(f"stage {self.config.name!r}, iteration {self.iteration + 1}: {error}") from error

    def _pause(self) -> None:
        """What is due between two iterations."""
        every, save_every = self.run_.config.evaluation.every, self.run_.config.checkpoint.every
        evaluate_every = every if self.config.evaluate_every is None else self.config.evaluate_every
        if evaluate_every and self.iteration % evaluate_every == 0:
            self.evaluate("during")
        if self.iteration % save_every == 0:
            self.save()

    def _result(self) -> Any:
        if self.config.optimizer.ema is None:
            return self.policy
        with self.learner.optimization.ema_scope():
            averaged = {name: tensor.clone() for name, tensor in self.policy.state_dict().items()}
        self.policy.load_state_dict(averaged)
        return self.policy

    def evaluate(self, label: str) -> None:
        run, evaluation = self.run_, self.run_.config.evaluation
        if self.evaluation_environment is None:
            slots = slots_of(evaluation)
            changes = (self._environment_changes(), ("evaluation.environment", evaluation.environment))
            self.evaluation_environment = build_environment(run.config, slots, run.device, *changes)
            self._filmed = to_film(self.evaluation_environment, evaluation)  # the same at every evaluation
        settings, reel = evaluation, stage_reel(run.dir / "trajectories", self.config.name, label)
        if label == "during":
            settings = evaluation.model_copy(update={"episodes": evaluation.episodes_during or evaluation.episodes})
            reel = reel_within(run.dir / "trajectories", self.config.name, self.iteration)
        with self.learner.optimization.ema_scope():
            result = evaluate(
                self.policy,
                self.evaluation_environment,
                settings,
                seed=run.config.seed,
                device=run.device,
                progress=run.progress,
                reel=reel,
                filmed=self._filmed,
            )
        run.metrics.evaluation(self.config.name, self.iteration, label, result.row())
        run.progress.note(f"{self.config.name}, {label}: {result.sentence()}")

    def close(self) -> None:
        if self.evaluation_environment is not None:
            self.evaluation_environment.close()
        self.learner.close()

    # -- saving ------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        optimizer_tensors, optimizer_meta = self.learner.optimization.state()
        sections: dict[str, Mapping[str, Tensor]] = {
            "policy": self.policy.state_dict(),
            "optimizer": optimizer_tensors,
            "generators": self.run_.streams.state(),
            **{f"data_{name}": source.state_dict() for name, source in self.sources.items()},
            **self.learner.sections(),
        }
        meta = {
            "stage": self.index,
            "iteration": self.iteration,
            "policy_version": self.policy.version,
            "fingerprint": self.policy.fingerprint(),
            "optimizer": optimizer_meta,
            "learner": self.learner.meta(),
        }
        self.run_.save(sections, meta)

    def _restore(self, saved: Saved) -> None:
        sections, meta = saved.sections, saved.meta
        missing = [name for name in self.sources if f"data_{name}" not in sections]
        if missing:
            raise CheckpointError(
                f"{saved.path} knows no '{self.where}.{missing[0]}'; the run's config.yaml was changed since, so restore it"
            )
        self.learner.optimization.load(sections.get("optimizer", {}), meta["optimizer"])
        self.run_.streams.load(sections["generators"])
        for name, source in self.sources.items():
            source.load_state_dict(sections[f"data_{name}"])
        self.learner.restore(sections, meta["learner"])
        self.iteration = int(meta["iteration"])


def _save_policy(policy: Any, folder: Path) -> None:
    """``policy.save(folder)``, whole or not at all. Raises TrainingError where it cannot be written."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        policy.save(writing)
        if folder.exists():
            shutil.rmtree(folder)
        writing.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise TrainingError(f"cannot write {folder}: {error}; free some space, then go on with --resume") from error


def _displayed(metrics: Mapping[str, float]) -> dict[str, float]:
    shown = {
        "success": "rollout/success",
        "return": "rollout/return",
        "env_steps_per_s": "speed/env_steps_per_s",
        "samples_per_s": "speed/samples_per_s",
        "loss": "loss/loss",
    }
    return {name: metrics[key] for name, key in shown.items() if key in metrics}
