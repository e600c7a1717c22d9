"""The nested blocks of a token VLA's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
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
