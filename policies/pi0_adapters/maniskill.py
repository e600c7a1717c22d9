"""ManiSkill's Panda for a pi0 checkpoint.

ManiSkill gives joints, their speeds, and what its task adds, the hand's pose among it; a checkpoint wants the few numbers that it
learned from. ``state: hand`` makes of them what openpi's LIBERO checkpoints take: position (metres), turn (axis times angle) and
both fingers. With ``actions: libero`` a checkpoint speaks LIBERO's actions here too, so that one checkpoint can act in both.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.errors import MMRLError
from policies.pi0_adapters.base import shifted

_JOINTS, _FINGERS, _POSE = 18, slice(7, 9), 7  # joints with their speeds; where the fingers are among them; numbers of a pose
# LIBERO's numbers times these are ManiSkill's (pd_ee_delta_pose). 1 is 0.05 m and 0.5 rad there; 0.1 m and -0.1 rad here, where
# controllers turn the other way; and the gripper opens at 1 instead of -1.
_FROM_LIBERO = (0.5, 0.5, 0.5, -5.0, -5.0, -5.0, -1.0)


class ManiSkill:
    """See the module and ``base.Adapter``."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``policies.pi0_adapters.maniskill:ManiSkill`` block."""

        cameras: tuple[str, ...] = ("base_camera",)
        """The simulator's cameras for the checkpoint's image slots, in order."""
        state: Literal["hand", "all"] = "hand"
        """hand: the hand's position, turn and fingers, 8 numbers as in LIBERO; all: the simulator's state as it is."""
        hand_at: int = Field(default=_JOINTS, ge=_JOINTS)
        """Where in the simulator's state the hand's pose begins: 18 in PushCube and PullCube, 19 in PickCube and others that say
        first whether something is held."""
        actions: Literal["own", "libero"] = "own"
        """own: as the simulator's control mode counts them; libero: LIBERO's, for control mode pd_ee_delta_pose."""
        relative: int = Field(default=0, ge=0)
        """So many numbers at the beginning of an action are targets to the simulator and differences from the same numbers of its
        state to the checkpoint (as openpi's DeltaActions): 7 for pd_joint_pos."""

        @model_validator(mode="after")
        def _consistent(self) -> ManiSkill.Config:
            if self.relative and self.actions == "libero":
                raise ValueError("relative must be 0 with actions 'libero', which are motions already")
            return self

    def __init__(self, config: Config) -> None:
        self.config, self.cameras = config, config.cameras
        self.changes = config.state == "hand" or config.actions == "libero" or config.relative > 0

    def state(self, state_BS: Tensor) -> Tensor:
        if self.config.state == "all":
            return state_BS
        pose = state_BS[:, self.config.hand_at : self.config.hand_at + _POSE]
        if pose.shape[1] < _POSE or bool(((pose[:, 3:].norm(dim=1) - 1).abs() > 1e-3).any()):
            raise MMRLError(
                f"policy.adapter.hand_at = {self.config.hand_at}, but no pose begins there "
                f"in a state of {state_BS.shape[1]} numbers"
            )
        # LIBERO's second finger counts the other way.
        fingers = state_BS[:, _FINGERS] * state_BS.new_tensor([1.0, -1.0])
        return torch.cat([pose[:, :3], turn(pose[:, 3:]), fingers], dim=1)

    def to_policy(self, actions_BHA: Tensor, state_BS: Tensor) -> Tensor:
        if self.config.actions == "libero":
            return actions_BHA / _scale(actions_BHA)
        return shifted(actions_BHA, state_BS, self.config.relative, -1)

    def to_simulator(self, actions_BCA: Tensor, state_BS: Tensor) -> Tensor:
        if self.config.actions == "libero":
            return actions_BCA * _scale(actions_BCA)
        return shifted(actions_BCA, state_BS, self.config.relative, 1)

    def example_state(self, size: int, batch: int, generator: torch.Generator) -> Tensor:
        if self.config.state == "all":
            return torch.rand(batch, size, generator=generator)
        state = torch.rand(batch, self.config.hand_at + _POSE, generator=generator)
        state[:, -4:] = torch.nn.functional.normalize(state[:, -4:], dim=1)
        return state


def turn(q_B4: Tensor) -> Tensor:
    """Axis times angle (radians) of the rotation q = (w, x, y, z): [B, 3].

    q and -q are the same rotation. The one with x >= 0 is taken, so that the seam, where the numbers jump, lies far from a hand
    that points down (x = 1, w = 0); there the first number is near pi, as in LIBERO.
    """
    q_B4 = torch.where(q_B4[:, 1:2] < 0, -q_B4, q_B4)
    sine_B = q_B4[:, 1:].norm(dim=1)
    angle_B = 2 * torch.atan2(sine_B, q_B4[:, 0])
    return q_B4[:, 1:] * (angle_B / sine_B.clamp(min=1e-8))[:, None]


def _scale(actions: Tensor) -> Tensor:
    if actions.shape[2] != len(_FROM_LIBERO):
        raise MMRLError(
            f"policy.adapter.actions is 'libero', of {len(_FROM_LIBERO)} numbers, but here are {actions.shape[2]}; "
            "it needs environment.control_mode pd_ee_delta_pose"
        )
    return actions.new_tensor(_FROM_LIBERO)
