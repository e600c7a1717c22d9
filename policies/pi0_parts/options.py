"""The nested blocks of a pi0's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class CriticConfig:
    """The value head."""

    inputs: tuple[Literal["prefix", "state_token", "suffix", "time"], ...] = ("state_token",)
    """Concatenated features: mean of the prefix, the expert's state token, mean of its action tokens at the trained steps, and
    how many decisions were made. Where a time limit ends episodes for good, what is left to gain depends on the time."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    detach: bool = True
    """Whether the value loss stops at the head instead of reaching the expert and the prefix."""


@dataclass(frozen=True, config=STRICT)
class LoraOptions:
    """Low-rank adapters (peft) on the action expert's and the language model's linear layers."""

    rank: int = Field(default=16, gt=0)
    alpha: int = 16
    modules: str = r".*(dit|language_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Regular expression over module names."""
