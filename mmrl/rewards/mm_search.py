"""MMSearch-R1's reward: a right answer, a little less where it was searched for, and the form of the search.

    R = (1 - p_f) s + p_f fmt,   s = 1 for a right answer, times (1 - p_s) where any search was used, else 0

With ``each_search`` it is (1 - p_s)^n for n searches. Well formed are: an answer; a search by image or by text and an answer; a
search by image, then one by text, and an answer. Source: MMSearch-R1's reward file (p_f = p_s = 0.1; GRPO over groups of 4, at
most 3 rounds). Departure: a call of any other tool is ill-formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.rewards.answers import AnswerConfig, Answers
from mmrl.rewards.form import FormConfig, well_formed
from mmrl.transcripts import Transcript

_ROUNDS = ([], ["image"], ["text"], ["image", "text"])


class MMSearch:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(AnswerConfig, FormConfig):
        """Fields of a ``mmrl.rewards.mm_search:MMSearch`` block."""

        form: float = Field(default=0.1, ge=0, le=1)
        """p_f, the form's share of the reward."""
        search: float = Field(default=0.1, ge=0, le=1)
        """p_s, what a search costs a right answer."""
        each_search: bool = False
        """Whether every search costs it, and not only whether there was one."""
        image_search: tuple[str, ...] = ("image_search",)
        """Tools that search by image."""
        text_search: tuple[str, ...] = ("text_search", "web_search")
        """Tools that search by text."""

    def __init__(self, config: Config) -> None:
        self.config, self._answers = config, Answers(config)
        self._kinds = {**dict.fromkeys(config.image_search, "image"), **dict.fromkeys(config.text_search, "text")}

    @property
    def failure(self) -> str | None:
        return self._answers.failure

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        marks = self._answers.marks(transcripts)
        return [self._score(transcript, mark) for transcript, mark in zip(transcripts, marks, strict=True)]

    def _score(self, transcript: Transcript, mark: float) -> float:
        config = self.config
        if math.isnan(mark):
            return mark
        searches = sum(call.name in self._kinds for call in transcript.calls)
        charged = searches if config.each_search else min(searches, 1)
        right = (1 - config.search) ** charged if self._answers.correct(mark) else 0.0
        return (1 - config.form) * right + config.form * float(self._well_formed(transcript))

    def _well_formed(self, transcript: Transcript) -> bool:
        rounds = [[self._kinds.get(call.name, "other") for call in turn.calls] for turn in transcript.turns if turn.calls]
        one_each = all(len(calls) == 1 for calls in rounds)
        return one_each and [calls[0] for calls in rounds] in _ROUNDS and well_formed(transcript, self.config)
