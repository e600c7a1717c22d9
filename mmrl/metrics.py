"""What a run wrote down: ``metrics.jsonl`` (one JSON object a line, the truth) and TensorBoard events (a view of it).

Two kinds of rows, told apart by ``kind``:

``{"kind": "train", "stage": "improve", "iteration": 3, "step": 17, "seconds": 41.2, "loss/policy": 0.1, ...}``
``{"kind": "evaluation", "stage": "improve", "iteration": 3, "label": "after", "step": 17, "seconds": 44.0, "success": 0.91,
"episodes": 512, "families": {"reach": {"success": 0.95, "episodes": 256, "low": 0.92, "high": 0.97}}}``

``step`` counts training rows over all stages, ``seconds`` is wall-clock since the run began, resumed parts added up.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mmrl.errors import CheckpointError, MMRLError, TrainingError

FILE_NAME = "metrics.jsonl"
SHARED_FIELDS = ("kind", "stage", "iteration", "label", "step", "seconds", "nonfinite")  # of every row; all others are metrics
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no word for these, so they are written as strings


class MetricsWriter:
    """Appends rows to ``run_dir/metrics.jsonl`` and, if asked, to TensorBoard events in ``run_dir/tensorboard``.

    position: byte offset from an earlier ``position()``, as a checkpoint keeps it; rows behind it are dropped, so a resumed run
    does not repeat them. None appends after the last whole row. elapsed: seconds the run had taken before this process.
    Raises TrainingError if the folder cannot be written, CheckpointError if the file is not the one of ``position``.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, position: int | None = None, elapsed: float = 0.0) -> None:
        self._path = run_dir / FILE_NAME
        self._started = time.monotonic() - elapsed
        self._events: SummaryWriter | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # unbuffered: a row is in the file when train() returns, and a failed write leaves nothing behind for close() to retry
            self._file = self._path.open("a+b", buffering=0)
        except OSError as error:
            _cannot_write(self._path, error)
        try:
            kept = _keep(self._file, self._path, position)
            self._position = len(kept)
            self._step = 1 + max((row["step"] for row in _rows(kept) if row["kind"] == "train"), default=-1)
            if tensorboard:
                self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=self._step)
        except OSError as error:
            self._file.close()
            _cannot_write(self._path, error)
        except BaseException:
            self._file.close()
            raise

    def train(self, stage: str, iteration: int, metrics: Mapping[str, float | Tensor]) -> None:
        """One iteration's numbers (floats or one-element tensors), named like ``loss/policy`` or ``seconds/collect``."""
        header = {
            "kind": "train",
            "stage": stage,
            "iteration": iteration,
            "step": self._step,
            "seconds": round(self.seconds(), 3),
        }
        self._append(header, {name: float(value) for name, value in metrics.items()})
        self._step += 1

    def evaluation(self, stage: str, iteration: int, label: str, result: Mapping[str, Any]) -> None:
        """One evaluation; ``label`` is before, during or after.

        A ``seconds`` in ``result``, how long it took, is written as ``seconds/evaluate``.
        """
        header = {"kind": "evaluation", "stage": stage, "iteration": iteration, "label": label}
        # the evaluation shows the weights of the last training row, and shares its place on the axis
        header |= {"step": max(self._step - 1, 0), "seconds": round(self.seconds(), 3)}
        self._append(header, {("seconds/evaluate" if name == "seconds" else name): value for name, value in result.items()})

    def position(self) -> int:
        """Bytes written so far: what a checkpoint keeps, and a resumed run hands back to the constructor."""
        return self._position

    def seconds(self) -> float:
        """Wall-clock seconds since the run began, those of earlier processes included."""
        return time.monotonic() - self._started

    def close(self) -> None:
        """Flush and close both files; safe to call twice."""
        try:
            self._file.close()
            if self._events is not None:
                self._events.close()
        except OSError as error:
            _cannot_write(self._path, error)

    def _append(self, header: dict[str, Any], values: Mapping[str, Any]) -> None:
        taken = sorted(header.keys() & values.keys())
        if taken:
            raise ValueError(f"a metric may not be named {taken[0]!r}: the row's header uses that name")
        plain, nonfinite = _plain(values)
        row = header | plain | ({"nonfinite": nonfinite} if nonfinite else {})
        try:
            self._write(json.dumps(row, allow_nan=False, ensure_ascii=False).encode() + b"\n")
            if self._events is not None:
                self._event(header, values)
        except OSError as error:
            _cannot_write(self._path, error)

    def _write(self, line: bytes) -> None:
        """All of the line or nothing of it."""
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            if written:
                self._file.truncate(self._position)
            raise
        self._position += len(line)

    def _event(self, header: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        assert self._events is not None
        prefix = header["stage"] + ("/evaluation" if header["kind"] == "evaluation" else "")
        for name, value in _flat(values):
            self._events.add_scalar(f"{prefix}/{name}", value, header["step"])
        self._events.flush()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All whole rows of ``run_dir/metrics.jsonl``, oldest first; none if there is no file.

    A half-written last line, as a killed run may leave it, is ignored. Raises MMRLError if any other line is not a row.
    """
    path = run_dir / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MMRLError(f"cannot read {path}: {error.strerror or error}") from error
    return _rows(_whole(content), path)


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise TrainingError(f"cannot write {path}: {reason}; free some space or choose another folder for runs") from error


def _keep(file: Any, path: Path, position: int | None) -> bytes:
    """Truncate the file to ``position`` (None: to its last whole row) and return what stays."""
    file.seek(0)
    content = file.read()
    keep = len(_whole(content)) if position is None else position
    if keep > len(content):
        raise CheckpointError(
            f"{path} has {len(content)} bytes, but the checkpoint was saved when it had {keep}; "
            "restore the file that belongs to the checkpoint, or start a new run"
        )
    if keep and content[keep - 1 : keep] != b"\n":
        raise CheckpointError(
            f"byte {keep} of {path}, where the checkpoint continues it, is not the end of a row; "
            "restore the file that belongs to the checkpoint, or start a new run"
        )
    if keep < len(content):
        file.truncate(keep)
        os.fsync(file.fileno())
    return content[:keep]


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _rows(content: bytes, path: Path | None = None) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MMRLError(f"line {number} of {path or FILE_NAME} is not a metrics row ({error}); delete that line") from error
        if not isinstance(row, dict) or row.get("kind") not in ("train", "evaluation"):
            raise MMRLError(
                f"line {number} of {path or FILE_NAME} is not a metrics row (it has no known 'kind'); delete that line"
            )
        rows.append({name: value if name in SHARED_FIELDS else _restored(value) for name, value in row.items()})
    return rows


def _plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Values as JSON can hold them (tensors to floats, NaN and infinities to strings), and how many were not finite."""
    plain, nonfinite = {}, 0
    for name, value in values.items():
        value = value.item() if isinstance(value, Tensor) else value
        if isinstance(value, Mapping):
            value, inner = _plain(value)
            nonfinite += inner
        elif isinstance(value, float) and not math.isfinite(value):
            value = str(value)
            nonfinite += 1
        plain[name] = value
    return plain, nonfinite


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restored(inner) for name, inner in value.items()}
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every number in a nested mapping, under its path."""
    found = []
    for name, value in values.items():
        value = value.item() if isinstance(value, Tensor) else value
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found
