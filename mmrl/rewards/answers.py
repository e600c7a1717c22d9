"""The answer's mark: what the question's own check says of it, or a judge where the check is not convinced."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.rewards.asking import JudgeBlock
from mmrl.transcripts import Transcript


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AnswerConfig:
    """Fields of every reward that asks whether an answer is right."""

    correct_above: float = Field(default=0.5, ge=0, lt=1)
    """An answer with a higher mark counts as correct."""
    judge: JudgeBlock | None = None
    """Who is asked about answers that the question's check takes to be wrong: a ``mmrl.rewards.judge:Judge``; null: nobody."""


class Answers:
    """Marks of answers, for the rewards whose Config is an AnswerConfig. failure: why the judge's last failure was one."""

    def __init__(self, config: AnswerConfig) -> None:
        self._config = config
        self._judge = None if config.judge is None else config.judge.build()

    @property
    def failure(self) -> str | None:
        return getattr(self._judge, "failure", None)

    def marks(self, transcripts: Sequence[Transcript]) -> list[float]:
        """The check's mark, or the judge's where that is higher; NaN where the judge failed."""
        marks = [transcript.mark for transcript in transcripts]
        doubted = [
            place
            for place, (mark, transcript) in enumerate(zip(marks, transcripts, strict=True))
            if mark <= self._config.correct_above and transcript.answer is not None
        ]
        if self._judge is not None and doubted:
            verdicts = self._judge([transcripts[place] for place in doubted])
            for place, verdict in zip(doubted, verdicts, strict=True):
                marks[place] = max(verdict, marks[place])  # NaN first: max keeps it
        return marks

    def correct(self, mark: float) -> bool:
        return mark > self._config.correct_above


class Correct:
    """1 for a right answer, 0 for a wrong one or none, or the mark between them."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(AnswerConfig):
        """Fields of a ``mmrl.rewards.answers:Correct`` block."""

        partial: bool = True
        """Whether a mark between 0 and 1 counts as it is; if not, it is 1 where the answer counts as correct, else 0."""

    def __init__(self, config: Config) -> None:
        self.config, self._answers = config, Answers(config)
        self.terms: dict[str, float] = {}

    @property
    def failure(self) -> str | None:
        return self._answers.failure

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        marks = self._answers.marks(transcripts)
        self.terms = {"answered": fmean(transcript.answer is not None for transcript in transcripts)}
        if self.config.partial:
            return marks
        return [mark if mark != mark else float(self._answers.correct(mark)) for mark in marks]
