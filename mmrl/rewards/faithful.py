"""Faithful use of tools: did they bring up what the answer rests on? After TAPO (CodeV, arXiv 2511.19661).

    R = R_acc + w_f R_fmt + w_t mean_t r_step,t - c max(0, calls - k)

r_step,t, 0 to 1, looks at the question and at what the tools of turn t gave, never at the policy's own words: at where a cut
lies, at texts, at what can be read in a picture (``reader``); or a judge does (``judge``). As a list of rewards:
``mmrl.rewards.answers:Correct``, ``mmrl.rewards.form:Form`` (weight w_f), ``Faithful`` (weight w_t) and
``mmrl.rewards.tool_rewards:CallCost`` (weight c, ``free: k``). The paper's equation could not be checked: this is its idea, not
its formula. ``FaithfulTurns`` pays each r_step,t to its own turn instead of their mean to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Self

from pydantic import ConfigDict, model_validator
from pydantic.dataclasses import dataclass

from mmrl.messages import Picture
from mmrl.rewards.asking import JudgeBlock, ReaderBlock, filled
from mmrl.rewards.evidence import Measure, call_score, can_be_read
from mmrl.transcripts import CallRecord, Transcript, Turn

PROMPT = """A question was asked, and a tool was called to find evidence for its answer.

Question: {question}
Answer that is known to be right: {references}

What the tool gave: {output}

Does what the tool gave show the evidence that the question asks for? Judge nothing but that output.
End with a line "Score: 1" if it does or "Score: 0" if it does not."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FaithfulConfig:
    """Fields of ``Faithful`` and ``FaithfulTurns``."""

    measure: Measure = "containment"
    """How well a picture shows the evidence's box: the share of the box in it (0 for a cut that is hardly one), or IoU."""
    reader: ReaderBlock | None = None
    """Who reads what is written in pictures that tools made: a ``mmrl.rewards.ocr:OCR``. One in which an evidence text can be
    read, or the answer where the question knows of no such text, is evidence too; null: nobody."""
    judge: JudgeBlock | None = None
    """Who says whether a turn's output holds the evidence: a ``mmrl.rewards.judge:Judge``; null: ``Question.details`` do."""
    prompt: str = PROMPT
    """What the judge is asked; {question}, {references} and {output} are filled in."""
    only_correct: bool = False
    """Whether only conversations with a right answer are paid."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.judge is not None and self.reader is not None:
            raise ValueError(
                "reader and judge are both set, but a judge is asked instead of what is known; leave one of them out"
            )
        return self


class _Steps:
    """r_step of every turn of every conversation; 0 for a turn without a call."""

    def __init__(self, config: FaithfulConfig) -> None:
        self.config = config
        self._judge = None if config.judge is None else config.judge.build()
        self._reader = None if config.reader is None else config.reader.build()

    @property
    def failure(self) -> str | None:
        return getattr(self._judge, "failure", None)

    def steps(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        if self._judge is not None:
            return self._judged(transcripts)
        return [[self._step(transcript, turn) for turn in transcript.turns] for transcript in transcripts]

    def _step(self, transcript: Transcript, turn: Turn) -> float:
        if not self._paid(transcript):
            return 0.0
        scores = (max(call_score(transcript, call, self.config.measure), self._legible(transcript, call)) for call in turn.calls)
        return max(scores, default=0.0)

    def _legible(self, transcript: Transcript, call: CallRecord) -> float:
        """1 where the evidence can be read in a picture that the call made, which is none of the question's."""
        if self._reader is None or call.error is not None:
            return 0.0
        known = {picture.key for picture in transcript.question.pictures}
        made = (picture.image for picture in call.result.pictures if picture.key not in known)
        return float(any(can_be_read(transcript.question, "\n".join(self._reader.read(image))) for image in made))

    def _judged(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        assert self._judge is not None
        asked = [(row, t) for row, each in enumerate(transcripts) if self._paid(each) for t in range(len(each.turns))]
        asked = [(row, t) for row, t in asked if any(call.error is None for call in transcripts[row].turns[t].calls)]
        steps = [[0.0] * len(transcript.turns) for transcript in transcripts]
        prompts = [_prompt(self.config.prompt, transcripts[row], transcripts[row].turns[t]) for row, t in asked]
        for (row, t), verdict in zip(asked, self._judge.ask(prompts) if prompts else (), strict=True):
            steps[row][t] = verdict
        return steps

    def _paid(self, transcript: Transcript) -> bool:
        return not self.config.only_correct or transcript.mark > 0.5


class Faithful(_Steps):
    """The mean of r_step over the turns with a call; 0 without a call."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(FaithfulConfig):
        """Fields of a ``mmrl.rewards.faithful:Faithful`` block."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        scores = []
        for transcript, steps in zip(transcripts, self.steps(transcripts), strict=True):
            called = [step for step, turn in zip(steps, transcript.turns, strict=True) if turn.calls]
            scores.append(fmean(called) if called else 0.0)
        return scores


class FaithfulTurns(_Steps):
    """r_step of each turn, paid there."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(FaithfulConfig):
        """Fields of a ``mmrl.rewards.faithful:FaithfulTurns`` block."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)

    def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        return self.steps(transcripts)


def _prompt(template: str, transcript: Transcript, turn: Turn) -> tuple[str | Picture, ...]:
    """The question with its pictures, and what the turn's tools gave with theirs."""
    question, good = transcript.question, [call.result for call in turn.calls if call.error is None]
    fields = {
        "question": "".join(part for part in question.parts if isinstance(part, str)),
        "references": " or ".join(question.references),
        "output": "\n".join(result.text for result in good) or "pictures",
    }
    asked = [part for part in question.parts if isinstance(part, Picture)]
    given = [picture for result in good for picture in result.pictures]
    labels = (["The question's pictures:", *asked] if asked else []) + (["The tool's pictures:", *given] if given else [])
    return (filled(template, fields), *labels)
