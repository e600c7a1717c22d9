"""What every reward of generated pictures reads of a conversation: the picture, and what its prompt says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from PIL import Image

from mmrl.transcripts import Question, Transcript


@dataclass(frozen=True)
class Known:
    """A question's check in another process: the mark of the one answer that there is."""

    mark: float

    def __call__(self, answer: str) -> float:
        return self.mark


def scores_conversations(kind: type) -> bool:
    """Whether a reward's class gives a score to a whole conversation; every class can be called, so ``callable`` does not say."""
    return any("__call__" in vars(base) for base in kind.__mro__)


def generated(transcript: Transcript) -> Image.Image | None:
    """The last picture that the policy gave, RGB; None: it gave none."""
    pictures = [picture for turn in transcript.turns for picture in turn.message.pictures]
    return pictures[-1].image if pictures else None


def prompt_of(question: Question) -> str:
    """What the picture was to show: ``details["prompt"]``, else the question's text."""
    prompt = question.details.get("prompt")
    return prompt if isinstance(prompt, str) else "".join(part for part in question.parts if isinstance(part, str))


def each_picture(transcripts: Sequence[Transcript], score: Callable[[Image.Image, Question], float]) -> list[float]:
    """``score`` of each conversation's picture; NaN where there is none."""
    images = [generated(transcript) for transcript in transcripts]
    return [math.nan if image is None else score(image, each.question) for image, each in zip(images, transcripts, strict=True)]


def in_batches(
    transcripts: Sequence[Transcript], size: int, score: Callable[[list[Image.Image], list[Question]], Sequence[float]]
) -> list[float]:
    """``score`` of ``size`` pictures at a time, and of fewer at the end; NaN for a conversation without a picture."""
    scores = [math.nan] * len(transcripts)
    shown = [(place, image) for place, each in enumerate(transcripts) if (image := generated(each)) is not None]
    for start in range(0, len(shown), size):
        batch = shown[start : start + size]
        given: Any = score([image for _, image in batch], [transcripts[place].question for place, _ in batch])
        for (place, _), value in zip(batch, given, strict=True):
            scores[place] = float(value)
    return scores


def number(value: Any) -> float:
    """A score as a float; NaN for what is no number, or an infinite one.

    >>> number(1), number(None), number("0.5"), number(math.inf)
    (1.0, nan, nan, nan)
    """
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        return math.nan
    score = float(value)
    return score if math.isfinite(score) else math.nan
