"""DeepEyes' reward: a right answer, the form, and a bonus for a right answer that looked closer.

    R = 0.8 acc + 0.2 fmt + 1.2 [acc > 0.5 and a crop was used],  fmt 0 or -1

For mathematics the source uses 1.2 acc + 0.4 fmt: ``accuracy: 1.2``, ``form: 0.4``, ``bonus: 0.0``. Source: DeepEyes' reward
file, which keeps four other scales as comments. Departure: a crop that failed is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.rewards.answers import AnswerConfig, Answers
from mmrl.rewards.form import FormConfig, well_formed
from mmrl.transcripts import Transcript


class DeepEyes:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(AnswerConfig, FormConfig):
        """Fields of a ``mmrl.rewards.deep_eyes:DeepEyes`` block."""

        accuracy: float = 0.8
        """Weight of the answer."""
        form: float = 0.2
        """Weight of the form, 0 where it is right and -1 where not."""
        bonus: float = 1.2
        """For a correct answer with a tool."""
        tools: tuple[str, ...] = ("crop",)
        """Tools that earn the bonus."""

    def __init__(self, config: Config) -> None:
        self.config, self._answers = config, Answers(config)

    @property
    def failure(self) -> str | None:
        return self._answers.failure

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        marks = self._answers.marks(transcripts)
        return [self._score(transcript, mark) for transcript, mark in zip(transcripts, marks, strict=True)]

    def _score(self, transcript: Transcript, mark: float) -> float:
        config = self.config
        form = 0.0 if well_formed(transcript, config) else -1.0
        looked = any(call.error is None and call.name in config.tools for call in transcript.calls)
        bonus = config.bonus if looked and self._answers.correct(mark) else 0.0
        return config.accuracy * mark + config.form * form + bonus
