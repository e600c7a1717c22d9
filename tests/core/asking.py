"""Questions and tools for tests of conversations: sums that need a calculator, and colours that need a crop."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.answers import Exact
from mmrl.calling import ToolBlock
from mmrl.component import Component
from mmrl.messages import Picture, ToolCall, ToolContext, ToolError
from mmrl.tool_use import ToolEnvironment
from mmrl.transcripts import Question, Turn

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30)}


def add(a: int, b: int) -> str:
    """Add two numbers.

    a: the first
    b: the second
    """
    return str(a + b)


def fail(how: str) -> str:
    """Fail.

    how: in which way
    """
    if how == "tool":
        raise ToolError("It cannot be done.")
    raise RuntimeError("broken")


def count(ctx: ToolContext) -> str:
    """Count the calls in this conversation."""
    ctx.state["calls"] = ctx.state.get("calls", 0) + 1
    ctx.emit_reward("counted", 0.5)
    return str(ctx.state["calls"])


count.ordered = True  # type: ignore[attr-defined]


def left_half(image: int, ctx: ToolContext) -> Picture:
    """Look at the left half of a picture.

    image: its number
    """
    whole = ctx.picture(image)
    w, h = whole.image.size
    return whole.derived(whole.image.crop((0, 0, w // 2, h)), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), image - 1)


class Sums:
    """Question t: what is t + 1? With ``picture``: what colour is the picture?"""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields."""

        picture: bool = False
        """Whether there is a picture."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def question(self, task_id: int) -> Question:
        if self.config.picture:
            name = sorted(COLOURS)[task_id % 3]
            shown = Picture(Image.new("RGB", (40, 32), COLOURS[name]))
            return Question("colour", (shown, "Which colour?"), (name,), Exact((name,)))
        right = str(task_id + 1)
        return Question(f"sum{task_id % 2}", (f"What is {task_id} + 1?",), (right,), Exact((right,)), {"a": task_id})

    def next_turn(self, question: Question, turns: tuple[Turn, ...]) -> tuple[str, tuple[ToolCall, ...]]:
        if turns:
            return question.references[0], ()
        if self.config.picture:
            return "I look.", (ToolCall("left_half", {"image": 1}),)
        return "", (ToolCall("add", {"a": question.details["a"], "b": 1}),)


def environment(*tools: Any, num_envs: int = 3, picture: bool = False, **fields: Any) -> ToolEnvironment:
    questions = Component("sums", Sums, Sums.Config(picture=picture))
    blocks = [ToolBlock(tool.__name__, function=tool) for tool in tools]
    return ToolEnvironment(
        ToolEnvironment.Config(questions=questions, tools=blocks, **fields), num_envs=num_envs, device=torch.device("cpu")
    )
