"""LIBERO for a pi0 checkpoint, as openpi's ``LiberoInputs`` and ``LiberoOutputs`` have it.

Slots: the scene (``agentview``) and the left wrist (``wrist``); the right wrist stays empty. State: the hand's position (metres),
its turn (axis times angle) and both fingers, 8 numbers. Actions: robosuite's OSC_POSE, 7 numbers, of which the last is the
gripper's (-1 opens). ``simulators/libero.py`` gives and takes exactly these, pictures turned as openpi turns them.
"""

from __future__ import annotations

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.errors import MMRLError
from policies.pi0_adapters.base import shifted

STATE, ACTION = 8, 7
_MOTION = 6  # numbers of an action that move the hand


class Libero:
    """See the module and ``base.Adapter``."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``policies.pi0_adapters.libero:Libero`` block."""

        cameras: tuple[str, ...] = ("agentview", "wrist")
        """The simulator's cameras for the checkpoint's image slots, in order."""
        relative: bool = False
        """Whether the checkpoint predicts motions less the hand's pose, as openpi's older LIBERO checkpoints do
        (``extra_delta_transform``); its statistics are then of these differences."""

    def __init__(self, config: Config) -> None:
        self.cameras = config.cameras
        self.changes, self._relative = config.relative, _MOTION if config.relative else 0

    def state(self, state_BS: Tensor) -> Tensor:
        if state_BS.shape[1] != STATE:
            raise MMRLError(f"policy.adapter is LIBERO's, whose state has {STATE} numbers, but here are {state_BS.shape[1]}")
        return state_BS

    def to_policy(self, actions_BHA: Tensor, state_BS: Tensor) -> Tensor:
        return shifted(_checked(actions_BHA), state_BS, self._relative, -1)

    def to_simulator(self, actions_BCA: Tensor, state_BS: Tensor) -> Tensor:
        return shifted(_checked(actions_BCA), state_BS, self._relative, 1)

    def example_state(self, size: int, batch: int, generator: torch.Generator) -> Tensor:
        return torch.rand(batch, STATE, generator=generator)


def _checked(actions: Tensor) -> Tensor:
    if actions.shape[2] != ACTION:
        raise MMRLError(
            f"policy.adapter is LIBERO's, whose actions have {ACTION} numbers, but here are {actions.shape[2]}; "
            f"set policy.action_dim to {ACTION}"
        )
    return actions
