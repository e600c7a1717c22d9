"""Recorded episodes in a run's or an evaluation's ``trajectories``: videos, and conversations (see mmrl.report.conversations)."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_CLIPS = 60
MAX_CLIP_BYTES = 16 * 2**20  # base64 adds a third, and a report should still open at once and travel by mail
MIME = {".webp": "image/webp", ".gif": "image/gif", ".png": "image/png", ".jpg": "image/jpeg"}


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


def read_records(folder: Path, notices: list[str]) -> list[dict[str, Any]]:
    """Every record in ``folder``, in the order of their names; those that cannot be read are a notice."""
    records, damaged = [], 0
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.append({**record, "instruction": str(record["instruction"]), "success": bool(record["success"])})
        except (OSError, ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        notices.append(f"{damaged} recorded rollout{'s' * (damaged > 1)} could not be read.")
    return records


def clips_of(records: Sequence[Mapping[str, Any]], folder: Path) -> tuple[list[Clip], int]:
    """As many recordings as fit, evenly from each stage, label, family and outcome; and how many were left out."""
    shown, room = [], MAX_CLIP_BYTES
    for record in evenly(records, ("stage", "label", "family", "success")):
        video = _video(folder, record)
        size = video.stat().st_size if video else 0
        if len(shown) < MAX_CLIPS and size <= room:
            room -= size
            shown.append(_clip(record, video))
    return shown, len(records) - len(shown)


def evenly(records: Iterable[Mapping[str, Any]], kind_of: Sequence[str]) -> list[Mapping[str, Any]]:
    """First one of each kind, then a second of each, and so on; ``kind_of``: the entries that make a kind."""
    kinds: dict[tuple[Any, ...], int] = defaultdict(int)
    ranked = []
    for record in records:
        kind = tuple(str(record.get(name)) for name in kind_of)
        ranked.append((kinds[kind], record))
        kinds[kind] += 1
    return [record for _, record in sorted(ranked, key=lambda pair: pair[0])]


def _video(folder: Path, record: Mapping[str, Any]) -> Path | None:
    path = folder / Path(str(record.get("video", ""))).name  # the name alone: a record cannot reach outside its folder
    return path if path.suffix in MIME and path.is_file() else None


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
        image=f"data:{MIME[video.suffix]};base64,{encoded}" if video else None,
    )
