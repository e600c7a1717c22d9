"""Whether a drawn scene shows what its prompt asks for: GenEval (arXiv 2310.11513) with a reader of shapes as the detector.

The prompt's facts are ``include`` and ``exclude`` of the question's details, in GenEval's form; the rules are those of
``mmrl.rewards.geneval_rules``, the detector is ``mmrl.rewards.shape_reading``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from statistics import fmean

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
        scores, right = [], []
        for transcript in transcripts:
            metadata, image = transcript.question.details, drawn(transcript)
            wrong = problem(metadata) or ("there is no picture" if image is None else None)
            if wrong is not None or image is None:
                self.failure = f"the prompt '{metadata.get('prompt', '')}' cannot be judged: {wrong}"
                scores.append(math.nan)
                continue
            things = read(image, self.config.colours, self.config.shapes)
            verdict = judge(metadata, things, _ALL)
            right.append(verdict.correct)
            scores.append(verdict.graded if self.config.graded else float(verdict.correct))
        self.terms = {"correct": fmean(right)} if right else {}
        return scores
