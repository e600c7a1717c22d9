"""What a run ran on: hardware, versions and the commit, for environment.json and the report."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mmrl-framework", "torch", "torchvision", "transformers", "diffusers", "peft", "numpy")
_GIBIBYTE = 2**30


def describe_system() -> dict[str, Any]:
    """``{"hardware": {...}, "versions": {...}}``, plain values that JSON can hold; what cannot be found out is left out."""
    hardware = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "git commit": _commit()}
    return {"hardware": _known(hardware), "versions": _known(versions)}


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory() -> str | None:
    """What this process may use: the machine's memory, or the container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such limit, or the word "max"
        limit = total
    return f"{min(total, limit) / _GIBIBYTE:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit mmrl is checked out at, with a word if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    head, changes = _git(root, "rev-parse", "--short=12", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head} with uncommitted changes" if head and changes else head


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
