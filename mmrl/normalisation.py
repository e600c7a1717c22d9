"""Normalisation statistics of a run's data: ``mmrl statistics``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl.building import build_environment, choose_device
from mmrl.checkpoint import atomic_write_text
from mmrl.component import Component
from mmrl.config import RunConfig, StageConfig, lacks_of, load
from mmrl.errors import ConfigError
from mmrl.progress import Progress
from mmrl.protocols import DataContext, StatisticsSource

FILE = "statistics.json"
_NEED = "statistics of data"  # what a policy lacks that sees other numbers than a data set holds
SET = "mmrl.data.lerobot:LeRobot"  # what a folder is taken for


def compute(data: Path, overrides: Sequence[str], stage: str | None, output: Path | None, progress: Progress) -> str:
    """The statistics of a data set's folder, or of the data of a run's ``stage``, as json.

    output: the folder of a checkpoint, into which they go instead as statistics.json; then its path is returned. Raises
    ConfigError where there is such a file already.
    """
    file = None if output is None else output / FILE
    if file is not None and file.exists():
        raise ConfigError(f"{file}: is there already; remove it to compute it again")
    source = _of_folder(data, overrides) if data.is_dir() else _of_run(data, overrides, stage)
    with progress.task("reading states and actions", 2 * len(source)) as advance:
        found = source.statistics(advance)
    text = json.dumps(found, indent=1) + "\n"
    if file is None:
        return text.rstrip()
    atomic_write_text(file, text)
    return str(file)


def _of_folder(folder: Path, overrides: Sequence[str]) -> StatisticsSource:
    if overrides:
        raise ConfigError(f"{folder}: is a data set, which takes no overrides ({overrides[0]}); give a run's YAML file instead")

    def none(num_envs: int, changes: Any) -> Any:
        raise ConfigError(f"{folder}: is a data set, which has no environment")

    component = Component.parse({"target": SET, "path": str(folder)})
    return component.build(context=DataContext(none, 1, 0, torch.device("cpu")))


def _of_run(file: Path, overrides: Sequence[str], name: str | None) -> StatisticsSource:
    config = load(file, overrides)
    stage, key, component = _choose(file, config, name)
    if not callable(getattr(component.cls, "statistics", None)):
        raise ConfigError(
            f"{file}: '{key}' is {component.target}, whose frames are made as they are needed; statistics are for stored data"
        )
    if told := lacks_of(config.policy, stage.policy).get(_NEED):
        raise ConfigError(f"{file}: 'policy.{told[0]}' {told[1]}")
    device = choose_device(config.device)

    def environment(num_envs: int, changes: Any) -> Any:
        return build_environment(
            config, num_envs, device, (f"stages.{stage.name}.environment", stage.environment), (key, changes)
        )

    return component.build(context=DataContext(environment, 1, config.seed, torch.device("cpu")))


def _choose(file: Path, config: RunConfig, name: str | None) -> tuple[StageConfig, str, Component]:
    """The stage called ``name``, or the only one with data; the dotted key of its data, and the data."""
    found = [choice for stage in config.stages for choice in _data_of(stage) if name in (None, stage.name)]
    if len(found) != 1:
        having = ", ".join(stage.name for stage in config.stages for _ in _data_of(stage))
        what = "several stages have data" if found else f"{name or 'no stage'} has no data"
        remedy = f"choose one of {having} with --stage" if having else "give a data set's folder"
        raise ConfigError(f"{file}: {what}; {remedy}")
    return found[0]


def _data_of(stage: StageConfig) -> Iterator[tuple[StageConfig, str, Component]]:
    if stage.data is not None:
        yield stage, f"stages.{stage.name}.data", stage.data
    if stage.supervised is not None:
        yield stage, f"stages.{stage.name}.supervised.data", stage.supervised.data
