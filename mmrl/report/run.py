"""Reads a run's folder for the report, forgiving whatever an unfinished or killed run may have left undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mmrl import metrics
from mmrl.errors import MMRLError
from mmrl.report.conversations import Talks, is_conversation, talks_of
from mmrl.report.pictures import Pictures, is_picture, pictures_of
from mmrl.report.recordings import Clip, clips_of, read_records
from mmrl.report.trained import trained_scores

TRAJECTORIES = "trajectories"  # the folder of recorded episodes, of a run as of an evaluation


@dataclass(frozen=True)
class Recorded:
    """What ``trajectories`` holds and the page shows."""

    clips: list[Clip]
    clips_left_out: int
    talks: Talks
    pictures: Pictures


@dataclass(frozen=True)
class Run:
    """Everything the report shows, as found. ``notices`` are sentences about what could not be read."""

    name: str
    rows: list[dict[str, Any]]
    config_text: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    recorded: Recorded
    notices: list[str] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """The classes this run is made of, as its config names them, each once, and its seed."""
        stages = self.config.get("stages")
        blocks = [self.config.get("policy"), self.config.get("environment")]
        blocks += [stage.get("algorithm") for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
        named = [str(block["target"]) for block in blocks if isinstance(block, Mapping) and "target" in block]
        seed = [f"seed {self.config['seed']}"] if "seed" in self.config else []
        return list(dict.fromkeys(named)) + seed

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "train"]

    @property
    def evaluation_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "evaluation"]


def load(run_dir: Path) -> Run:
    """Raises MMRLError if ``run_dir`` is no run (neither metrics.jsonl nor config.yaml in it)."""
    if not any((run_dir / name).is_file() for name in (metrics.FILE_NAME, "config.yaml")):
        raise MMRLError(
            f"{run_dir} holds neither metrics.jsonl nor config.yaml; name the folder of a run, such as runs/quickstart"
        )
    notices: list[str] = []
    config_text = _text(run_dir / "config.yaml", notices)
    config = _mapping(config_text, run_dir / "config.yaml", notices)
    rows = metrics.read(run_dir)
    recorded = recorded_in(run_dir / TRAJECTORIES, rows, config, notices)
    return Run(
        name=run_dir.resolve().name,
        rows=rows,
        config_text=config_text,
        config=config,
        environment=_mapping(_text(run_dir / "environment.json", notices), run_dir / "environment.json", notices),
        recorded=replace(recorded, clips=_side_by_side(recorded.clips, [row["stage"] for row in rows])),
        notices=notices,
    )


def recorded_in(folder: Path, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], notices: list[str]) -> Recorded:
    """``rows``: of metrics.jsonl, which say in what order stages came."""
    records = read_records(folder, notices)
    clips, left_out = clips_of([record for record in records if not is_conversation(record)], folder)
    drawn = [record for record in records if is_picture(record)]
    said = [record for record in records if is_conversation(record) and not is_picture(record)]
    talks = talks_of(said, folder, [row["stage"] for row in rows], notices)
    return Recorded(clips, left_out, talks, pictures_of(drawn, folder, rows, trained_scores(config), notices))


def _text(path: Path, notices: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        notices.append(f"{path.name} is missing.")
    except (OSError, UnicodeDecodeError) as error:
        notices.append(f"{path.name} could not be read ({error}).")
    return ""


def _mapping(text: str, path: Path, notices: list[str]) -> Mapping[str, Any]:
    """YAML, of which JSON is a part, as a mapping; anything else counts as empty."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        notices.append(f"{path.name} is damaged.")
        return {}
    return value if isinstance(value, Mapping) else {}


def _side_by_side(clips: Iterable[Clip], stages: Iterable[str]) -> list[Clip]:
    """The same task's recordings next to one another, from the beginning of the run to its end."""
    order = {stage: position for position, stage in enumerate(dict.fromkeys(stages))}
    return sorted(clips, key=lambda c: (c.family, c.task_id, order.get(c.stage, len(order)), c.label != "before"))
