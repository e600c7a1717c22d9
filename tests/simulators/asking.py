"""What the tests of questions share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmrl.calling import Toolbox, load_tools
from mmrl.component import Component
from mmrl.messages import Picture
from mmrl.transcripts import CallRecord, Question
from simulators.prompts import play


def build(name: str, **fields: Any) -> Any:
    """The component ``simulators.prompts:NAME``, as a YAML file builds it."""
    return Component.parse({"target": f"simulators.prompts:{name}", **fields}).build()


def image_tools() -> Toolbox:
    return Toolbox(load_tools(["tools.crop:crop", "tools.rotate:rotate", "tools.flip:flip"]))


def search_tools(corpus: Path, cache: Path, top_k: int = 3) -> Toolbox:
    """As a YAML file would name them."""
    common = {"cache": str(cache), "top_k": top_k}
    pictures = {"target": "tools.image_search:ImageSearch", "images": str(corpus), "thumbnail": 0, **common}
    return Toolbox(load_tools([pictures, {"target": "tools.text_search:TextSearch", "corpus": str(corpus), **common}]))


def picture(question: Question) -> Picture:
    """The only one."""
    (found,) = (part for part in question.parts if isinstance(part, Picture))
    return found


def text(question: Question) -> str:
    return "".join(part for part in question.parts if isinstance(part, str))


def played(questions: Any, question: Question, tools: Toolbox) -> tuple[str, list[CallRecord]]:
    """The expert's answer, and its calls."""
    turns = play(questions, question, tools)
    assert all(len(turn.calls) == len(turn.message.calls) == 1 for turn in turns[:-1])
    return turns[-1].message.text, [call for turn in turns for call in turn.calls]
