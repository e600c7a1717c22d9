"""Measuring the policy of a run again: ``mmrl evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl import checkpoint, metrics
from mmrl.building import build_environment, build_policy, choose_device, exclusive, load_weights
from mmrl.component import Component
from mmrl.config import MeasuringConfig, RunConfig, StageConfig, load
from mmrl.errors import CheckpointError, ConfigError, TrainingError
from mmrl.evaluation import TOOL_RATES, EvaluationResult, evaluate, slots_of
from mmrl.optim import Optimization
from mmrl.playing import stage_reel
from mmrl.progress import Progress
from mmrl.seeding import configure_torch

LABEL = "evaluate"
_READ = ("seed", "device", "threads", "tensorboard", "policy", "environment")  # of a run's configuration, beside its evaluation
# Changes that leave the task as it is: the numbers belong to the run's own curve.
_SAME_TASK = frozenset({"device", "threads", "tensorboard", "evaluation.episodes", "evaluation.num_envs", "evaluation.videos"})


class Loaded(NamedTuple):
    """A run's policy as its newest checkpoint holds it, where in the run that was, and what was wrong with newer ones."""

    policy: Any
    stage: StageConfig
    iteration: int
    warning: str | None


def load_policy(run_dir: Path, config: RunConfig, device: torch.device, component: Component | None = None) -> Loaded:
    """The policy of the newest complete checkpoint, built as ``component`` says (None: as the stage it belongs to builds it).

    Where that stage averages its weights, the policy has the averaged ones. Raises CheckpointError where there is no complete
    checkpoint, or one of another policy.
    """
    path, warning = checkpoint.latest(run_dir / "checkpoints")
    sections, meta = checkpoint.load(path)
    if int(meta["stage"]) >= len(config.stages):
        raise CheckpointError(f"{path} belongs to stage {meta['stage'] + 1}, but the run's config.yaml has fewer; restore it")
    stage = config.stages[int(meta["stage"])]
    policy = build_policy(config, stage, device) if component is None else component.build(device=device)
    remedy = f"give 'policy' the fields that {run_dir / 'config.yaml'} has, or measure {run_dir / 'policy'}, if the run has ended"
    checkpoint.check_fingerprint(meta, policy.fingerprint(), path, **({} if component is None else {"remedy": remedy}))
    load_weights(policy, sections["policy"], f"{path} does not hold this policy's weights")
    policy.version = int(meta["policy_version"])
    if stage.optimizer.ema is not None:
        optimization = Optimization(stage.optimizer, policy.trainable(), stage.iterations, max_skipped=1)
        optimization.load(sections["optimizer"], meta["optimizer"])
        with optimization.ema_scope():
            averaged = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        policy.load_state_dict(averaged)
    return Loaded(policy, stage, int(meta["iteration"]), warning)


def overridden_keys(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0].strip() for override in overrides]


def refuse_unread(path: Path, overrides: Sequence[str], own: Sequence[str], stage: str) -> None:
    """Raise ConfigError for a change to the run's configuration ``path`` that measuring its ``stage`` would not notice.

    own: the keys that are read beside those of the stage and of ``evaluation``.
    """
    of_evaluation = [f"evaluation.{name}" for name in MeasuringConfig.model_fields]
    read = [*own, *of_evaluation, f"stages.{stage}.policy", f"stages.{stage}.environment"]
    for key in overridden_keys(overrides):
        if key != "evaluation" and not any(key == one or key.startswith(f"{one}.") for one in read):
            raise ConfigError(f"{path}: '{key}' is for training; evaluating reads only {', '.join(read)}")


def evaluate_run(run_dir: Path, overrides: Sequence[str], episodes: int | None, progress: Progress) -> None:
    """Play the run's policy on its evaluation episodes and print a table of success (95 % intervals) and return per family.

    overrides: changes to the run's config.yaml (``evaluation.environment.domain=real``). episodes: how many to play (None: as
    many as the config says). The numbers are added to metrics.jsonl, labelled ``evaluate`` and with the changes under which they
    were measured (``changed``; curves of success leave those out), and videos to trajectories/ - unless another process is
    training the run at the moment, which alone may write there.
    """
    config = load(run_dir / "config.yaml", overrides)
    configure_torch(config.threads, deterministic=False)
    device = choose_device(config.device)
    policy, stage, iteration, warning = load_policy(run_dir, config, device)
    refuse_unread(run_dir / "config.yaml", overrides, _READ, stage.name)
    if warning:
        progress.note(warning)
    settings = config.evaluation if episodes is None else config.evaluation.model_copy(update={"episodes": episodes})
    changed = [change for change, key in zip(overrides, overridden_keys(overrides), strict=True) if key not in _SAME_TASK]
    environment = build_environment(
        config,
        slots_of(settings),
        device,
        (f"stages.{stage.name}.environment", stage.environment),
        ("evaluation.environment", settings.environment),
    )
    with ExitStack() as held:
        held.callback(environment.close)
        writable = _hold(held, run_dir, progress)
        result = evaluate(
            policy,
            environment,
            settings,
            seed=config.seed,
            device=device,
            progress=progress,
            reel=stage_reel(run_dir / "trajectories", stage.name, LABEL) if writable else None,
        )
        if writable:
            _write_down(run_dir, config, stage.name, iteration, {**result.row(), **({"changed": changed} if changed else {})})
    Console(width=110).print(result_table(result, f"{run_dir}, {stage.name} after {iteration} iterations"))


def _hold(held: ExitStack, run_dir: Path, progress: Progress) -> bool:
    """Whether the run is ours to write to until ``held`` is left."""
    try:
        held.enter_context(exclusive(run_dir))
    except TrainingError as error:
        progress.note(f"{error}; the evaluation is shown here only")
        return False
    return True


def _write_down(run_dir: Path, config: RunConfig, stage: str, iteration: int, row: Mapping[str, Any]) -> None:
    elapsed = max((float(row["seconds"]) for row in metrics.read(run_dir)), default=0.0)
    writer = metrics.MetricsWriter(run_dir, tensorboard=config.tensorboard, elapsed=elapsed)
    try:
        writer.evaluation(stage, iteration, LABEL, row)
    finally:
        writer.close()


def result_table(result: EvaluationResult, title: str) -> Table:
    """A line a task, for the terminal."""
    table = Table(title=escape(title))
    columns = ("task", "success", "95 % interval", "failed", "out of time", "return (± std)", "steps", "episodes")
    lost, rates = result.lost > 0, [name for name in TOOL_RATES if name in result.talk]
    for column in (*columns, *(TOOL_RATES[name] for name in rates), *(["lost"] if lost else [])):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, rate in [*result.families.items(), ("all", result)]:
        interval, returns = f"{rate.low:.1%} - {rate.high:.1%}", f"{rate.return_:.4g} ± {rate.return_std:.2g}"
        measured = (f"{rate.success:.1%}", interval, str(rate.failures), str(rate.timeouts), returns, f"{rate.length:.1f}")
        cells = measured if rate.episodes else ("-",) * len(measured)
        tools = (f"{rate.talk[name]:.1%}" if name in rate.talk else "-" for name in rates)
        table.add_row(escape(name), *cells, str(rate.episodes), *tools, *([str(rate.lost)] if lost else []))
    return table
