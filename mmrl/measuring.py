"""Measuring any checkpoint under any configuration: ``mmrl evaluate CHECKPOINT CONFIG``.

What is measured lands in a folder of its own, whole or not at all: evaluation.json (the numbers, the resolved configuration, the
machine), episodes.jsonl (a line an episode), trajectories/ (videos) and report.html. The same checkpoint and configuration give
the same two files, byte for byte but for ``seconds``; another ``evaluation.num_envs`` gives the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from rich.console import Console

from mmrl import report
from mmrl.building import choose_device
from mmrl.component import Component, field_types, jsonable
from mmrl.config import Block, MeasuringConfig, device_name, load, load_as, resolved
from mmrl.errors import ConfigError
from mmrl.evaluation import EvaluationResult, choose_tasks, in_turn, result_of, slots_of
from mmrl.playback import load_policy, overridden_keys, refuse_unread, result_table
from mmrl.playing import Played, Player, Reel
from mmrl.progress import Progress
from mmrl.protocols import Environment
from mmrl.report.evaluation import EPISODES, NUMBERS
from mmrl.report.run import TRAJECTORIES
from mmrl.report.system import describe_system
from mmrl.seeding import configure_torch

# Where a policy's Config says what it starts from, and what else must be said so that it starts from that.
_CHECKPOINT, _OPENED = "checkpoint", {"weights": "pretrained"}


class MeasurementConfig(Block):
    """Everything that determines a measurement, apart from the checkpoint."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$")]
    """The measurement's folder under ``output``."""
    output: str = "evaluations"
    """The folder that holds measurements."""
    seed: NonNegativeInt = 0
    """Source of the policy's random numbers."""
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    threads: PositiveInt | None = None
    """Torch's threads within an operation; null leaves torch's choice."""
    policy: Component
    """What is measured; its checkpoint is the one that the command names."""
    environment: Component
    """Where it acts."""
    evaluation: MeasuringConfig = Field(default_factory=MeasuringConfig)
    """On which episodes."""


def load_measurement(path: Path, overrides: Sequence[str]) -> MeasurementConfig:
    """A measurement's YAML, or a run's: of that, the policy and environment of its last stage as evaluation has them.

    Raises ConfigError, for a run also where the run itself could not be trained.
    """
    if "stages" not in resolved(path, overrides):
        config = load_as(MeasurementConfig, path, overrides)
        environment = config.environment.override(config.evaluation.environment, where=f"{path}: evaluation.environment")
        return config.model_copy(update={"environment": environment})
    run = load(path, overrides)
    last = run.stages[-1]
    refuse_unread(path, overrides, [name for name in MeasurementConfig.model_fields if name != "evaluation"], last.name)
    output = {"output": run.output} if "output" in overridden_keys(overrides) else {}
    return MeasurementConfig(
        name=run.name,
        seed=run.seed,
        device=run.device,
        threads=run.threads,
        policy=run.policy.override(last.policy),
        environment=run.environment.override(last.environment).override(run.evaluation.environment),
        evaluation=MeasuringConfig(**{name: getattr(run.evaluation, name) for name in MeasuringConfig.model_fields}),
        **output,
    )


def measure(checkpoint: str, config: MeasurementConfig, folder: Path, progress: Progress) -> Path:
    """Measure ``checkpoint`` (a run's folder, or what the policy's ``checkpoint`` takes) and print a table.

    ``folder`` must not be there. Returns the path of the report.
    """
    configure_torch(config.threads, deterministic=False)
    device = choose_device(config.device)
    policy, about = _open(checkpoint, config, device, progress)
    environment: Environment = config.environment.build(num_envs=slots_of(config.evaluation), device=device)
    try:
        player = Player(policy, environment, seed=config.seed, act_batch=config.evaluation.act_batch, device=device)
        with _appearing(folder) as unfinished:
            result = _count(player, config.evaluation, progress)
            _film(player, result.played, config.evaluation.videos, unfinished / TRAJECTORIES, progress)
            _write(unfinished, {"name": config.name, "checkpoint": about, "policy": policy.fingerprint()}, config, result)
            report.build_evaluation(unfinished)
    finally:
        environment.close()
    Console(width=110).print(result_table(result, f"{config.name}: {checkpoint}"))
    return folder / report.FILE


def _open(checkpoint: str, config: MeasurementConfig, device: torch.device, progress: Progress) -> tuple[Any, Mapping[str, Any]]:
    """The policy with the checkpoint's weights, and what there is to say about the checkpoint."""
    run_dir = Path(checkpoint)
    if (run_dir / "config.yaml").is_file():
        loaded = load_policy(run_dir, load(run_dir / "config.yaml"), device, config.policy)
        if loaded.warning:
            progress.note(loaded.warning)
        return loaded.policy, {"path": checkpoint, "stage": loaded.stage.name, "iteration": loaded.iteration}
    if _is_path(run_dir) and not run_dir.exists():
        raise ConfigError(f"{checkpoint}: is not there; give a run's folder, a policy's folder or a hub id")
    known = field_types(type(config.policy.config))
    if _CHECKPOINT not in known:
        raise ConfigError(
            f"'policy.target' ({config.policy.target}) has no field '{_CHECKPOINT}', so {checkpoint} cannot be opened; "
            "give a run's folder instead"
        )
    changes = {_CHECKPOINT: checkpoint, **{name: value for name, value in _OPENED.items() if name in known}}
    return config.policy.override(changes, where="policy").build(device=device), {"path": checkpoint}


def _is_path(checkpoint: Path) -> bool:
    """Whether it cannot mean a hub id (``owner/name``), or is meant to lie in a folder that is there."""
    return checkpoint.is_absolute() or len(checkpoint.parts) != 2 or checkpoint.parent.is_dir()


def _count(player: Player, settings: MeasuringConfig, progress: Progress) -> EvaluationResult:
    started = time.perf_counter()
    tasks = choose_tasks(player.environment, settings)
    with progress.task("evaluating", len(tasks)) as advance:
        played = player.play(tasks, advance)
    return result_of(played, time.perf_counter() - started)


def _film(player: Player, played: Sequence[Played], videos: int, folder: Path, progress: Progress) -> None:
    """Play some episodes again in front of a camera: of every family a success and another, then a second of each...

    As an episode is the same every time, the videos show what was counted; where a simulator does not keep that promise, a note
    says so and the video goes.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for episode in played:
        if episode.outcome != "lost":
            groups[f"{episode.family} {episode.outcome == 'success'}"].append(episode.task_id)
    chosen, counted = in_turn(groups, videos), {episode.task_id: episode for episode in played}
    with progress.task("filming", len(chosen)) as advance:
        again = player.play(chosen, advance, Reel(folder, "episode", {}), chosen)
    changed = [episode.task_id for episode in again if episode != counted[episode.task_id]]
    for task in changed:
        for path in folder.glob(f"episode-{task}.*"):
            path.unlink()
    if changed:
        progress.note(
            f"{len(changed)} of {len(chosen)} filmed episodes went otherwise than when they were counted: the simulator does not "
            "repeat itself; their videos are left out"
        )


def _write(folder: Path, about: Mapping[str, Any], config: MeasurementConfig, result: EvaluationResult) -> None:
    """evaluation.json and episodes.jsonl."""
    row = result.row()
    numbers = {
        **about,
        "seconds": row.pop("seconds"),
        "tasks": row.pop("families"),
        "overall": row,
        "config": jsonable(config),
        **describe_system(),
    }
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(episode.row(), ensure_ascii=False) + "\n" for episode in result.played]
    (folder / EPISODES).write_text("".join(lines), encoding="utf-8")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes the name ``folder`` when the block ends well, and is gone otherwise."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
