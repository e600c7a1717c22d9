"""A single environment for the tests of the workers: it counts, and breaks down where its config says so."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.errors import MMRLError
from mmrl.types import ActionSpec
from mmrl.workers.single import Description, Outcome, View


@dataclass(frozen=True)
class Config:
    """trouble: task id -> what happens with the third action of its episode (or, with a leading ``reset:``, when it is reset).

    Where ``once`` is a folder, each trouble happens once for all workers: it leaves a file there.
    """

    length: int = 6
    trouble: dict[int, str] | None = None
    once: str | None = None
    slow_start: float = 0.0


class Counting:
    """Task i succeeds after ``length - i % 3`` actions if i is even, and runs out of time after ``length`` if it is odd."""

    def __init__(self, config: Config) -> None:
        time.sleep(config.slow_start)
        self.config, self.task, self.clock, self.total = config, 0, 0, 0.0
        self.description = Description(
            ActionSpec(2, (-1.0, -1.0), (1.0, 1.0)),
            max_steps=config.length,
            cameras={"left": (4, 6), "right": (3, 3)},
            state_dim=3,
            metrics=("success", "clock"),
            families=("even", "odd"),
        )

    def reset(self, task_id: int) -> str:
        self.task, self.clock, self.total = task_id, 0, 0.0
        self._trouble("reset:")
        return f"count {task_id}"

    def step(self, action_A: np.ndarray[Any, Any]) -> Outcome:
        self.clock += 1
        self.total += float(action_A.sum())
        if self.clock == 3:
            self._trouble("")
        solved = self.task % 2 == 0 and self.clock >= self.config.length - self.task % 3
        late = not solved and self.clock >= self.config.length
        return Outcome(self.total, solved, late, {"clock": self.clock, "success": float(solved)})

    def observe(self) -> View:
        left = np.full((4, 6, 3), self.task % 256, np.uint8)
        right = np.full((3, 3, 3), self.clock, np.uint8)
        return View({"left": left, "right": right}, np.array([self.task, self.clock, self.total], np.float32))

    def expert_action(self) -> np.ndarray[Any, Any]:
        return np.array([0.5, self.clock / 10])

    def render(self) -> np.ndarray[Any, Any]:
        return np.full((8, 8, 3), self.task, np.uint8)

    def close(self) -> None: ...

    def _trouble(self, when: str) -> None:
        what = (self.config.trouble or {}).get(self.task, "")
        if not what or what.startswith("reset:") != bool(when):
            return
        if self.config.once is not None:
            mark = Path(self.config.once) / f"{self.task}"
            if mark.exists():
                return
            mark.touch()
        TROUBLES[what.removeprefix("reset:")]()


def _raise(error: Exception) -> None:
    raise error


TROUBLES = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(7),
    "bug": lambda: _raise(ZeroDivisionError("a bug of the simulator")),
    "sentence": lambda: _raise(MMRLError("Vulkan is missing; install it")),
}
