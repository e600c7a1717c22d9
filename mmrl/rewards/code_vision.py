"""CodeVision's dense process reward: outcome, the tools that the question needs, and a price for the others.

    R = [R_acc + w_f R_fmt] + [alpha R_mand + beta R_nec + R_exact + R_emerge] - gamma (C_usage + R_spur)

Expected are the question's operations, which undo what was done to the picture, ``crop`` among them; where it names none,
``crop`` if the evidence is a detail with a box.

R_acc    the answer's mark (or a judge's).
R_fmt    1 where the text is well formed (mmrl/rewards/form.py).
R_mand   (|expected turns that were used| + the best IoU of a crop with the box, where crop is expected) / |expected|.
R_nec    max(0, share of correct answers with tools - share without), over the rollouts of the task; for correct ones that used a
         tool, if fewer than two were correct without; 0 where none did without.
R_exact  0.1 where the core operations used (turns, mirrors, crop) are exactly the expected ones, and there are any.
R_emerge w_e for a correct answer with any other operation.
C_usage  calls beyond max(2, |expected|).
R_spur   turns and mirrors where none was expected.
Gate     where crop is expected and R_mand < 0.1, R_acc is multiplied by R_mand, and R_nec is 0.

Source: CodeVision's agent loop. The defaults below are its code's; the recipe that ships for Qwen3-VL sets ``mandatory: 1.0``,
``necessary: 0.0``, ``excess: 0.5`` and the same form and emerging weights, with GRPO over groups of 8. Departures: a call that
failed counts as a call and not as a use of its operation; the source's own scores of tool errors (-0.05) enter no total there,
and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.rewards.answers import AnswerConfig, Answers
from mmrl.rewards.evidence import CROP, derived_pictures, expected_box, iou
from mmrl.rewards.form import FormConfig, well_formed
from mmrl.rewards.operations import expected, is_core, operation, turns
from mmrl.transcripts import Transcript, by_task

GATE = 0.1  # R_mand below which an answer without the crop it needs is not believed


class CodeVision:
    """See the module. ``terms`` are the means of R_acc, R_fmt and so on, before their weights."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(AnswerConfig, FormConfig):
        """Fields of a ``mmrl.rewards.code_vision:CodeVision`` block."""

        form: float = 0.1
        """w_f, of the form."""
        mandatory: float = 0.5
        """alpha, of the operations that the question needs."""
        necessary: float = 0.2
        """beta, of what tools add over the rollouts of a task."""
        exact: float = 0.1
        """R_exact, for the expected operations and no other."""
        emerging: float = 0.2
        """w_e, for a correct answer with another kind of tool."""
        excess: float = 0.2
        """gamma, the price of a call too many, and of a turn that nothing asked for."""

    def __init__(self, config: Config) -> None:
        self.config, self._answers = config, Answers(config)
        self.terms: dict[str, float] = {}

    @property
    def failure(self) -> str | None:
        return self._answers.failure

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        config, marks = self.config, self._answers.marks(transcripts)
        necessary = self._necessary(transcripts, marks)
        weights = {
            "accuracy": 1.0,
            "form": config.form,
            "mandatory": config.mandatory,
            "necessary": config.necessary,
            "exact": 1.0,
            "emerging": 1.0,
            "usage": -config.excess,
            "spurious": -config.excess,
        }
        rows = [self._terms(*each) for each in zip(transcripts, marks, necessary, strict=True)]
        scored = [row for row, mark in zip(rows, marks, strict=True) if not math.isnan(mark)]
        self.terms = {name: fmean(row[name] for row in scored) for name in weights} if scored else {}
        return [sum(weight * row[name] for name, weight in weights.items()) for row in rows]

    def _necessary(self, transcripts: Sequence[Transcript], marks: Sequence[float]) -> list[float]:
        """R_nec of each, before the gate. A rollout that could not be marked has no part in its group."""
        found = [0.0] * len(transcripts)
        for members in by_task(transcripts).values():
            marked = [place for place in members if not math.isnan(marks[place])]
            correct = {place: self._answers.correct(marks[place]) for place in marked}
            with_tools = [place for place in marked if transcripts[place].calls]
            without = [place for place in marked if not transcripts[place].calls]
            if not with_tools or not without or sum(correct[place] for place in without) >= 2:
                continue
            gain = fmean(correct[place] for place in with_tools) - fmean(correct[place] for place in without)
            for place in with_tools:
                found[place] = max(0.0, gain) if correct[place] else 0.0
        return found

    def _terms(self, transcript: Transcript, mark: float, necessary: float) -> dict[str, float]:
        wanted = expected(transcript.question)
        used = [name for call in transcript.calls if (name := operation(call)) is not None]
        core, wanted_core = ({name for name in names if is_core(name)} for names in (used, wanted))
        others = {name for name in used if not is_core(name)} - wanted
        mandatory = _mandatory(transcript, wanted, set(used))
        shut = CROP in wanted and mandatory < GATE
        return {
            "accuracy": mark * mandatory if shut else mark,
            "form": float(well_formed(transcript, self.config)),
            "mandatory": mandatory,
            "necessary": 0.0 if shut else necessary,
            "exact": self.config.exact if wanted_core and core == wanted_core else 0.0,
            "emerging": self.config.emerging if others and self._answers.correct(mark) else 0.0,
            "usage": float(max(0, len(transcript.calls) - max(2, len(wanted)))),
            "spurious": 0.0 if any(map(turns, wanted)) else float(sum(map(turns, used))),
        }


def _mandatory(transcript: Transcript, wanted: frozenset[str], used: set[str]) -> float:
    """R_mand; 0 where nothing is expected."""
    if not wanted:
        return 0.0
    best, box = 0.0, expected_box(transcript.question)
    if CROP in wanted and box is not None:
        crops = [call for call in transcript.calls if operation(call) == CROP]
        shown = [picture.box_in_source() for call in crops for picture in derived_pictures(transcript, call)]
        best = max((iou(box, each) for each in shown), default=0.0)
    return min(1.0, (len((wanted - {CROP}) & used) + best) / len(wanted))
