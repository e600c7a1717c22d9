"""Conversations made by hand, for rewards to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmrl.messages import Message, Picture, ToolContext, ToolError, ToolResult
from mmrl.transcripts import CallRecord, Ending, Question, Transcript, Turn
from tools.crop import crop
from tools.flip import flip
from tools.rotate import rotate

WIDTH, HEIGHT = 100, 80
PICTURE = Picture(Image.new("RGB", (WIDTH, HEIGHT), (9, 99, 199)))
TOOLS = {"crop": crop, "flip": flip, "rotate": rotate}
WELL = "<think>hm</think><answer>yes</answer>"


def question(pictures: Sequence[Picture] = (PICTURE,), **details: Any) -> Question:
    """Is answered rightly by 'yes', half rightly by 'maybe'."""
    marks = {"yes": 1.0, "maybe": 0.5}
    return Question("tale", (*pictures, "Is it so?"), ("yes",), lambda answer: marks.get(answer, 0.0), details)


def used(name: str, *, on: Sequence[Picture] = (PICTURE,), rewards: Any = (), **arguments: Any) -> CallRecord:
    """A call of an image tool, which runs."""
    try:
        picture = TOOLS[name](**{"image": 1, **arguments}, ctx=ToolContext(on))  # type: ignore[operator]
    except ToolError as error:
        return CallRecord(name, arguments, ToolResult(str(error), error=True), "tool_error")
    return CallRecord(name, arguments, ToolResult(pictures=(picture,)), seconds=0.25, rewards=rewards)


def said(
    name: str, text: str = "", error: str | None = None, details: Mapping[str, Any] | None = None, **more: Any
) -> CallRecord:
    """A call that gave text."""
    return CallRecord(name, {}, ToolResult(text, error=error is not None, details=details or {}), error, **more)


def tale(
    *rounds: Sequence[CallRecord],
    task: int = 0,
    about: Question | None = None,
    answer: str | None = "yes",
    text: str | None = None,
    ended: Ending = "answer",
    tokens: int = 0,
    thought: str = "",
    opening: tuple[Message, ...] | None = None,
) -> Transcript:
    """A turn for each of ``rounds``, in which ``thought`` is said, and one for the answer: ``text``, or a well-formed one."""
    about = question() if about is None else about
    last = f"<think>hm</think><answer>{answer}</answer>" if text is None else text
    ids = tuple(range(tokens))
    turns = [Turn(Message("assistant", (thought,), token_ids=ids), tuple(calls)) for calls in rounds]
    turns.append(Turn(Message("assistant", (last,), token_ids=ids)))
    return Transcript(task, about, opening or (Message("user", about.parts),), tuple(turns), answer, ended)
