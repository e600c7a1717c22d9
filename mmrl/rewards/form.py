"""Whether what the policy wrote has the form that it was asked for: thoughts and answer in tags.

All its messages of a conversation are read as one text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.transcripts import Transcript

Tag = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FormConfig:
    """Fields of every reward that looks at form."""

    think: Tag | None = "think"
    """Tag of thoughts, with which the text must begin; null: none is asked for."""
    answer: Tag | None = "answer"
    """Tag of the answer, of which there must be one, at the end; null: any answer will do."""


def written(transcript: Transcript) -> str:
    """What the policy wrote, a line between messages."""
    return "\n".join(turn.message.text for turn in transcript.turns)


def has_tag(text: str, tag: str) -> bool:
    return f"<{tag}>" in text or f"</{tag}>" in text


def balanced(text: str, tag: str) -> bool:
    """Whether each ``<tag>`` is closed before the next one opens, and nothing is closed that was not open."""
    marks = re.findall(f"<(/?){re.escape(tag)}>", text)
    return marks == ["", "/"] * (len(marks) // 2)


def well_formed(transcript: Transcript, form: FormConfig) -> bool:
    """Starts with thoughts, whose tags are balanced, and ends with exactly one answer (CodeVision's R_fmt)."""
    text = written(transcript).strip()
    thinks = form.think is None or (text.startswith(f"<{form.think}>") and balanced(text, form.think))
    if form.answer is None:
        return thinks and transcript.answer is not None
    opened, closed = text.count(f"<{form.answer}>"), text.count(f"</{form.answer}>")
    answers = opened == closed == 1 and balanced(text, form.answer) and text.endswith(f"</{form.answer}>")
    return thinks and answers


class Form:
    """``good`` for a conversation that is well formed, ``bad`` for another."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(FormConfig):
        """Fields of a ``mmrl.rewards.form:Form`` block."""

        good: float = 1.0
        """Score of the right form."""
        bad: float = 0.0
        """Score of any other."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        good, bad = self.config.good, self.config.bad
        return [good if well_formed(transcript, self.config) else bad for transcript in transcripts]


class Penalties:
    """1 less a penalty for each flaw, the format reward of ICRL (arXiv 2603.08068): its R is 0.8 ``Correct`` + 0.2 this."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.form:Penalties`` block."""

        think: Tag = "think"
        """Tag of thoughts."""
        answer: Tag = "answer"
        """Tag of the answer."""
        no_answer: float = 0.5
        """There is no tag of an answer."""
        unbalanced_answer: float = 0.2
        """A tag of an answer is not closed, or not opened."""
        no_think: float = 0.15
        """There is no tag of thoughts."""
        unbalanced_think: float = 0.1
        """A tag of thoughts is not closed, or not opened."""
        no_search: float = 0.1
        """No tool was called."""
        empty_answer: float = 0.2
        """There is nothing in the last answer's tags."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [1.0 - self._flaws(transcript) for transcript in transcripts]

    def _flaws(self, transcript: Transcript) -> float:
        config, text = self.config, written(transcript)
        answers = has_tag(text, config.answer)
        contents = re.findall(f"<{config.answer}>(.*?)</{config.answer}>", text, re.DOTALL)
        thinks = has_tag(text, config.think)
        flaws = (
            (config.no_answer, not answers),
            (config.unbalanced_answer, answers and not balanced(text, config.answer)),
            (config.empty_answer, bool(contents) and not contents[-1].strip()),
            (config.no_think, not thinks),
            (config.unbalanced_think, thinks and not balanced(text, config.think)),
            (config.no_search, not transcript.calls),
        )
        return sum(penalty for penalty, found in flaws if found)
