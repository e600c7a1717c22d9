"""Reads a run's folder for the report, forgiving whatever an unfinished or killed run may have left undone."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmrl import metrics
from mmrl.errors import MMRLError

MAX_CLIPS = 60
MAX_CLIP_BYTES = 16 * 2**20  # base64 adds a third, and a report should still open at once and travel by mail
_MIME = {".webp": "image/webp", ".gif": "image/gif", ".png": "image/png", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Clip:
    """One recorded episode. ``image`` is a data URI, None where the recording is missing."""

    label: str
    stage: str
    task_id: str
    family: str
    instruction: str
    success: bool
    timed_out: bool
    steps: int | None
    total_reward: float | None
    image: str | None

    @property
    def when(self) -> str:
        return f"{self.label} {self.stage}".strip()

    @property
    def outcome(self) -> str:
        return "success" if self.success else "out of time" if self.timed_out else "failure"


@dataclass(frozen=True)
class Run:
    """Everything the report shows, as found. ``notices`` are sentences about what could not be read."""

    name: str
    rows: list[dict[str, Any]]
    config_text: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    clips: list[Clip]
    clips_left_out: int
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
    rows = metrics.read(run_dir)
    clips, left_out = clips_of(run_dir / "trajectories", notices)
    return Run(
        name=run_dir.resolve().name,
        rows=rows,
        config_text=config_text,
        config=_mapping(config_text, run_dir / "config.yaml", notices),
        environment=_mapping(_text(run_dir / "environment.json", notices), run_dir / "environment.json", notices),
        clips=_side_by_side(clips, [row["stage"] for row in rows]),
        clips_left_out=left_out,
        notices=notices,
    )


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


def clips_of(folder: Path, notices: list[str]) -> tuple[list[Clip], int]:
    """As many recordings as fit, evenly from each stage, label, family and outcome; and how many were left out."""
    records, damaged = [], 0
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.append({**record, "instruction": str(record["instruction"]), "success": bool(record["success"])})
        except (OSError, ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        notices.append(f"{damaged} recorded rollout{'s' * (damaged > 1)} could not be read.")
    shown, room = [], MAX_CLIP_BYTES
    for record in _evenly(records):
        video = _video(folder, record)
        size = video.stat().st_size if video else 0
        if len(shown) < MAX_CLIPS and size <= room:
            room -= size
            shown.append(_clip(record, video))
    return shown, len(records) - len(shown)


def _side_by_side(clips: Iterable[Clip], stages: Iterable[str]) -> list[Clip]:
    """The same task's recordings next to one another, from the beginning of the run to its end."""
    order = {stage: position for position, stage in enumerate(dict.fromkeys(stages))}
    return sorted(clips, key=lambda c: (c.family, c.task_id, order.get(c.stage, len(order)), c.label != "before"))


def _evenly(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """First one of each kind, then a second of each, and so on."""
    kinds: dict[tuple[Any, ...], int] = defaultdict(int)
    ranked = []
    for record in records:
        kind = tuple(str(record.get(name)) for name in ("stage", "label", "family", "success"))
        ranked.append((kinds[kind], record))
        kinds[kind] += 1
    return [record for _, record in sorted(ranked, key=lambda pair: pair[0])]


def _video(folder: Path, record: Mapping[str, Any]) -> Path | None:
    path = folder / Path(str(record.get("video", ""))).name  # the name alone: a record cannot reach outside its folder
    return path if path.suffix in _MIME and path.is_file() else None


def _clip(record: Mapping[str, Any], video: Path | None) -> Clip:
    encoded = base64.b64encode(video.read_bytes()).decode() if video else ""
    steps, total = record.get("steps"), record.get("return")
    return Clip(
        label=str(record.get("label", "")),
        stage=str(record.get("stage", "")),
        task_id=str(record.get("task_id", "")),
        family=str(record.get("family", "")),
        instruction=record["instruction"],
        success=record["success"],
        timed_out=record.get("timed_out") is True,
        steps=steps if isinstance(steps, int) else None,
        total_reward=float(total) if isinstance(total, int | float) else None,
        image=f"data:{_MIME[video.suffix]};base64,{encoded}" if video else None,
    )
