"""What tool calls earn and cost by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ConfigDict, Field
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
