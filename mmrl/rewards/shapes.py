"""Whether a drawn scene shows what its prompt asks for: GenEval (arXiv 2310.11513) with a reader of shapes as the detector.

The prompt's facts are ``include`` and ``exclude`` of the question's details, in GenEval's form; the rules are those of
``mmrl.rewards.geneval_rules``, the detector is ``mmrl.rewards.shape_reading``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from statistics import fmean
from typing import Any

from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.rewards.geneval_rules import COLOURS, Rules, judge, problem
from mmrl.rewards.shape_reading import INSIDE, PALETTE, read
from mmrl.transcripts import Transcript

_ALL = Rules(threshold=0.0, counting_threshold=0.0)  # the reader leaves out what it is not sure of


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class ReadingConfig:
    """What a reward must know of the shapes and colours that pictures may show."""

    shapes: tuple[str, ...] = tuple(INSIDE)
    """Shapes that are told apart, of circle, square, triangle, star, cross, ring."""
    colours: Mapping[str, tuple[int, int, int]] = field(default_factory=lambda: dict(PALETTE))
    """Colours that are told apart, by GenEval's names; those of ``simulators.image_prompts:ShapePrompts``."""

    def __post_init__(self) -> None:
        for key, values, known in (("shapes", self.shapes, tuple(INSIDE)), ("colours", self.colours, COLOURS)):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise ValueError(f"{key} must be names out of {', '.join(known)}; got {list(values)}")


def drawn(transcript: Transcript) -> Image.Image | None:
    """The last picture of the last message; None: it has none."""
    pictures = transcript.turns[-1].message.pictures if transcript.turns else ()
    return pictures[-1].image if pictures else None


def each_scene(
    transcripts: Sequence[Transcript], score: Callable[[Mapping[str, Any], Image.Image], float]
) -> tuple[list[float], str | None]:
    """``score`` of each prompt's facts and picture, NaN where there is nothing to judge, and why the last such could not be."""
    scores: list[float] = []
    failure = None
    for transcript in transcripts:
        metadata, image = transcript.question.details, drawn(transcript)
        wrong = problem(metadata) or ("there is no picture" if image is None else None)
        if wrong is not None or image is None:
            failure = f"the prompt '{metadata.get('prompt', '')}' cannot be judged: {wrong}"
            scores.append(math.nan)
        else:
            scores.append(score(metadata, image))
    return scores, failure


class Shapes:
    """1 where a scene of shapes fulfils its prompt, else 0, or how much of it.

    failure: why the last score that failed did. terms: the share of pictures that are right by GenEval's rules.
    """

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config(ReadingConfig):
        """Fields of a ``mmrl.rewards.shapes:Shapes`` block."""

        graded: bool = False
        """Whether a picture that is partly right earns a part: the mean over what is asked for (Flow-GRPO's reward)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        right: list[bool] = []

        def score(metadata: Mapping[str, Any], image: Image.Image) -> float:
            verdict = judge(metadata, read(image, self.config.colours, self.config.shapes), _ALL)
            right.append(verdict.correct)
            return verdict.graded if self.config.graded else float(verdict.correct)

        scores, failure = each_scene(transcripts, score)
        self.failure = failure or self.failure
        self.terms = {"correct": fmean(right)} if right else {}
        return scores
