"""What both sides of benchmarks/vlm_grpo.py do: the same questions and rewards, a step when they are told to, its costs.

A side is a process. It writes a line of JSON when it is ready, then one for each line that it reads, which asks for a step.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from mmrl.messages import Picture, ToolContext
from simulators.prompts import DetailQuestions
from tools.crop import crop

_DETAILS = DetailQuestions.Config(size=168, sign=(28, 40), kinds=("digit", "colour"))
_CROP = 56  # pixels of a crop's side
DISTINCT = 128  # questions; then they come again


@dataclass(frozen=True)
class Task:
    """What is measured. checkpoint: model and tokenizer. completions: rows of a step. turns: messages of the model in each."""

    checkpoint: str
    completions: int
    group: int
    tokens: int
    turns: int
    threads: int
    lr: float = 1e-3
    keep: bool = True
    """Whether keys and values are kept between turns, where the side can."""

    @property
    def prompts(self) -> int:
        return self.completions // self.group

    def written(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Task:
        return Task(**json.loads(text))


def question(task_id: int) -> tuple[Picture, str]:
    """A picture and what is asked about it."""
    return _question(task_id % DISTINCT)


@cache
def _question(task_id: int) -> tuple[Picture, str]:
    parts = DetailQuestions(_DETAILS).question(task_id).parts
    picture = next(part for part in parts if isinstance(part, Picture))
    return picture, "".join(part for part in parts if isinstance(part, str))


@cache
def closer(task_id: int, turn: int) -> Picture:
    """What the tool shows after a turn: a part of the question's picture, through tools/crop.py."""
    picture = question(task_id)[0]
    dice = random.Random(f"{task_id % DISTINCT} {turn}")
    left, top = (dice.randrange(side - _CROP) for side in picture.image.size)
    return crop(1, (left, top, left + _CROP, top + _CROP), ToolContext((picture,)))


def reward(text: str) -> float:
    """Of all that was said in a conversation: how much of it is vowels. Any reward will do that differs within a group."""
    return sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1)


@dataclass
class Costs:
    """Of a step: seconds by the clock and of the process's own time, in all and for generation alone; tokens that were said."""

    wall: float
    cpu: float
    generate_wall: float
    generate_cpu: float
    tokens: int


class Stopwatch:
    """Seconds spent within ``with``, by the clock and of the process."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Stopwatch:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def memory() -> float:
    """MiB that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Line:
    """The side's end of the conversation with the benchmark. What others print goes to the errors."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, about: Mapping[str, Any]) -> None:
        self._say({**about, "memory": memory()})

    def done(self, costs: Costs) -> None:
        self._say({**asdict(costs), "memory": memory()})

    def asked(self) -> bool:
        """Wait for the next step; False where there is none."""
        return bool(sys.stdin.readline().strip())

    def _say(self, what: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def serve(step: Callable[[], Costs], about: Mapping[str, Any]) -> None:
    line = Line()
    line.ready(about)
    while line.asked():
        line.done(step())


def begin() -> Task:
    """The task that the command line names."""
    task = Task.read(sys.argv[1])
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    return task
