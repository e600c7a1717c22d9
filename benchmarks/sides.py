"""Programs that are measured side by side: each is a process that makes a step when it is told to, and says what that cost.

A process writes a line of JSON when it is ready, then one for each line that it reads, which asks for a step. Sides that take
turns, step by step, are all hit alike by what else the machine does.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


class Process:
    """A side that waits to be told to make a step. module: what runs, given ``task``. about: what it said of itself."""

    def __init__(self, name: str, module: str, task: str, threads: int, log: Path) -> None:
        self.name, self._log = name, log
        surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "benchmarks")}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, task],
                cwd=ROOT,
                env=surroundings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.about: dict[str, Any] = {}
        self.steps: list[dict[str, float]] = []

    def wait(self) -> None:
        """Until it is ready."""
        self.about = self._read()

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.steps.append(self._read())

    def of(self, name: str) -> list[float]:
        """A cost of every step."""
        return [step[name] for step in self.steps]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)


class Stopwatch:
    """Seconds spent within ``with``, by the clock and of the process; on a GPU until its work is done."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Stopwatch:
        _settle()
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        _settle()
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory() -> float:
    """MiB that the process has had at most: of the GPU's if it uses one, else of the machine's (ru_maxrss)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(step: Callable[[], Mapping[str, float]], about: Mapping[str, Any]) -> None:
    """The side's end: say what it is, then make steps and say their costs, as long as they are asked for.

    What others print goes to the errors; ``memory`` is told beside each.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: Mapping[str, Any]) -> None:
        out.write(json.dumps({**what, "memory": memory()}) + "\n")
        out.flush()

    say(about)
    while sys.stdin.readline().strip():
        say(step())
