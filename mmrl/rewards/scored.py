"""A score that the environment has given already, as a reward of a stage: nothing is scored twice.

An environment of generated pictures scores them with ``rewards`` of its own (see ``Transcript.scores``). A stage that combines
the same scores otherwise - each on the scale of its group, ``scoring: {combine: normalised}`` - names them here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.errors import ConfigError
from mmrl.transcripts import Transcript


class Scored:
    """The environment's score of that name; NaN where the environment could not give it."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.scored:Scored`` block."""

        score: str
        """Name of one of the environment's rewards."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Raises ConfigError where the environment has scores, but none of that name."""
        name = self.config.score
        scores = [each.scores.get(name, math.nan) for each in transcripts]
        known = {known for each in transcripts for known in each.scores}
        if transcripts and name not in known:
            hint = f"its 'rewards' are {', '.join(sorted(known))}" if known else "it has no 'rewards' of its own"
            raise ConfigError(f"'score: {name}' is no reward of the environment; {hint}")
        if any(math.isnan(score) for score in scores):
            self.failure = f"the environment could not score it with '{name}'"
        return scores
