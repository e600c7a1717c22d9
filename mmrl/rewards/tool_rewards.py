"""What tool calls earn and cost by themselves, and what long answers cost."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.transcripts import Transcript


class Emitted:
    """What tools emitted through ``ctx.emit_reward``, summed, at the turn of their call."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.tool_rewards:Emitted`` block."""

        names: tuple[str, ...] | None = None
        """Names of the rewards that count; null: all do."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        wanted = self.config.names
        return [
            [
                float(sum(value for call in turn.calls for name, value in call.rewards if wanted is None or name in wanted))
                for turn in transcript.turns
            ]
            for transcript in transcripts
        ]


class CallOutcomes:
    """A score for each call, at its turn: one if it went well, another if it failed."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.tool_rewards:CallOutcomes`` block."""

        success: float = 0.0
        """Score of a call that went well."""
        error: float = -0.05
        """Score of a call that failed."""
        kinds: tuple[str, ...] | None = None
        """Kinds of failure that count (see ``mmrl.calling.ErrorKind``), such as malformed; null: all do."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        return [[sum((self._of(c.error) for c in turn.calls), 0.0) for turn in each.turns] for each in transcripts]

    def _of(self, error: str | None) -> float:
        if error is None:
            return self.config.success
        return self.config.error if self.config.kinds is None or error in self.config.kinds else 0.0


class CallCost:
    """- max(0, calls - free): the cost of calls beyond the first few, failed ones included."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.tool_rewards:CallCost`` block."""

        free: int = Field(default=2, ge=0)
        """Calls that cost nothing."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [-float(max(0, len(transcript.calls) - self.config.free)) for transcript in transcripts]


class Overlong:
    """DAPO's soft punishment of length (arXiv 2503.14476), over the tokens that the policy wrote in all turns.

    0 up to ``limit - buffer`` tokens, from there linearly to -1 at ``limit``, and -1 beyond.
    """

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.tool_rewards:Overlong`` block."""

        limit: int = Field(gt=0)
        """Tokens from which on the punishment is -1."""
        buffer: int = Field(gt=0)
        """Tokens below the limit at which it begins."""

        @model_validator(mode="after")
        def _begins(self) -> Overlong.Config:
            if self.buffer > self.limit:
                raise ValueError(f"buffer is {self.buffer}, more than limit ({self.limit}); lower it")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        limit, buffer = self.config.limit, self.config.buffer
        tokens = [sum(len(turn.message.token_ids) for turn in transcript.turns) for transcript in transcripts]
        return [min(0.0, max(-1.0, (limit - buffer - count) / buffer)) for count in tokens]
