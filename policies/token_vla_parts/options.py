"""The nested blocks of a token VLA's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class CriticConfig:
    """The value head."""

    input: Literal["prompt", "first_action"] = "prompt"
    """Whose hidden state it reads: the prompt's last token, or the first action token, whose value depends on what was drawn."""
    time: bool = False
    """Whether it also reads how many decisions were made: where a time limit ends episodes for good, value depends on that."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    detach: bool = True
    """Whether the value loss stops at the head instead of reaching the model."""


@dataclass(frozen=True, config=STRICT)
class LoraOptions:
    """Low-rank adapters (peft) on the language model's linear layers."""

    rank: int = Field(default=32, gt=0)
    """Rank of the adapters."""
    alpha: int = 16
    """Their output is multiplied by alpha / rank."""
    modules: str = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Regular expression over module names."""
