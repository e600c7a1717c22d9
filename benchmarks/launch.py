"""What the benchmarks that train share: ``mmrl`` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def mmrl(*arguments: str | Path) -> None:
    """Run an mmrl command; where it fails, end with what it said."""
    command = [sys.executable, "-m", "mmrl", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
