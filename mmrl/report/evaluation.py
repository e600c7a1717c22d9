"""Reads the folder of an evaluation for its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmrl.errors import MMRLError
from mmrl.report.run import TRAJECTORIES, Recorded, recorded_in

NUMBERS, EPISODES = "evaluation.json", "episodes.jsonl"


@dataclass(frozen=True)
class Measured:
    """What the page shows. ``overall`` and each of ``tasks`` are rows as ``mmrl.evaluation.FamilyResult`` makes them."""

    name: str
    checkpoint: str
    targets: list[str]
    seconds: float
    overall: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any]
    config_text: str
    recorded: Recorded
    notices: list[str]


def is_evaluation(folder: Path) -> bool:
    return (folder / NUMBERS).is_file()


def load(folder: Path) -> Measured:
    """Raises MMRLError if its evaluation.json is not what ``mmrl evaluate`` writes."""
    path, notices = folder / NUMBERS, []
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
        config, checkpoint = numbers["config"], numbers["checkpoint"]
        recorded = recorded_in(folder / TRAJECTORIES, (), config, notices)
        recorded.clips.sort(key=lambda clip: (clip.family, not clip.success, clip.task_id))
        where = f", {checkpoint['stage']} after {checkpoint['iteration']} iterations" if "stage" in checkpoint else ""
        return Measured(
            name=numbers["name"],
            checkpoint=f"{checkpoint['path']}{where}",
            targets=[config["policy"]["target"], config["environment"]["target"], f"seed {config['seed']}"],
            seconds=numbers["seconds"],
            overall=numbers["overall"],
            tasks=numbers["tasks"],
            environment={name: numbers[name] for name in ("hardware", "versions")},
            config_text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120),
            recorded=recorded,
            notices=notices,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MMRLError(f"{path} is not what `mmrl evaluate` wrote ({error!r}); evaluate again") from error
