"""The fields of a gymnasium block. Imports nothing of gymnasium's."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Options:
    """Fields of a ``simulators.gymnasium:Gymnasium`` block."""

    id: str = "CartPole-v1"
    """As gymnasium.make takes it; 'package:Name-v0' first imports the package that registers it (a worker process knows no other
    that gymnasium itself does not register)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of gymnasium.make."""
    workers: int = Field(default=0, ge=0)
    """0: all environments in this process, one after the other, in gymnasium's SyncVectorEnv; else so many worker processes, for
    slow environments, which they share: one that dies or hangs is replaced. The episodes are the same, bit for bit."""
    time_limit: float = Field(default=120.0, gt=0)
    """Seconds that a worker may take for an action or a reset of one environment before it is replaced."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other episodes for the same task ids."""
    max_steps: int | None = Field(default=None, gt=0)
    """Actions until truncation; null: as many as the environment is registered with."""
    instruction: str | None = None
    """What the policy is told to do; null: the id."""
    success_return: float | None = None
    """Return at which an episode becomes a success, where the environment does not report is_success or success itself;
    null: the reward threshold it is registered with (without one nothing is a success)."""
    render: bool = False
    """Whether episodes can be filmed (render_mode 'rgb_array')."""

    @property
    def sentence(self) -> str:
        """What the policy is told to do."""
        return self.instruction or self.id
