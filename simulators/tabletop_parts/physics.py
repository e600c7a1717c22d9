"""How the table moves: quasi-static, one action at a time, for all environments at once.

A closed gripper below a block's top pushes it; an open one straddles it. Closing around a block grasps it, opening drops it
onto whatever is below. Only exactly rounded operations are used, so a result does not depend on the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simulators.tabletop_parts.domains import Domain
from simulators.tabletop_parts.hashing import normal
from simulators.tabletop_parts.scene import BLOCK_HEIGHT, BLOCK_RADIUS, CEILING, Layout, State

ACTION_DIM = 4
TIP_RADIUS = 0.02
CONTACT = BLOCK_RADIUS + TIP_RADIUS  # distance of the centres of a block and of the gripper that pushes it
GRASP_RADIUS = 0.05
GRASP_HEIGHT = 0.04
SUPPORT_RADIUS = 0.08  # a block lies on another when their centres are closer than this
_SLACK = 0.03  # how far below a block's top a released block may be and still come to lie on it
_EPS = 1e-6


def length(xy: Tensor) -> Tensor:
    """Euclidean length over the last axis of size 2, as separately rounded operations."""
    x, y = xy.unbind(-1)
    return (x * x + y * y).sqrt()


@dataclass(frozen=True)
class Physics:
    """The laws of one domain. ``speed`` is the distance an action of size one moves the gripper, per axis."""

    domain: Domain
    speed: float
    noise_key: int

    def advance(self, state: State, layout: Layout, action_BA: Tensor) -> State:
        """The state one action later."""
        command_BA = action_BA.clamp(-1.0, 1.0)
        executed_BA = state.queued_BA if self.domain.delayed else command_BA
        gripper_B3 = self._move(state, layout, executed_BA)
        closed_B = executed_BA[:, 3] > 0
        held_B = self._grasp(state, gripper_B3, closed_B)
        blocks_BK3 = _carry(state.blocks_BK3, gripper_B3, held_B)
        free_BK = layout.present_BK & (torch.arange(blocks_BK3.shape[1], device=held_B.device) != held_B[:, None])
        fist_B = closed_B & (held_B < 0)
        xy_BK2 = self._push(blocks_BK3, gripper_B3, fist_B, layout.drift_B)
        xy_BK2, z_BK = _settle(xy_BK2, blocks_BK3[..., 2], free_BK)
        xy_BK2 = torch.where(free_BK[..., None], xy_BK2.clamp(BLOCK_RADIUS, 1 - BLOCK_RADIUS), xy_BK2)
        blocks_BK3 = torch.cat([xy_BK2, z_BK[..., None]], dim=-1)
        return State(gripper_B3, (~closed_B).float(), blocks_BK3, held_B, command_BA, state.step_B + 1)

    def foresee(self, state: State) -> State:
        """The state with the gripper where it will be when a command given now takes effect, noise aside."""
        if not self.domain.delayed:
            return state
        return replace(state, gripper_B3=self._displace(state.gripper_B3, state.queued_BA[:, :3]))

    def _move(self, state: State, layout: Layout, executed_BA: Tensor) -> Tensor:
        motion_B3 = executed_BA[:, :3]
        if self.domain.action_noise > 0:
            noise_B3 = normal(self.noise_key, layout.task_B, state.step_B, 3)
            motion_B3 = motion_B3 + noise_B3 * self.domain.action_noise
        return self._displace(state.gripper_B3, motion_B3)

    def _displace(self, gripper_B3: Tensor, motion_B3: Tensor) -> Tensor:
        moved_B3 = (gripper_B3 + motion_B3 * self.speed).clamp(min=0.0)
        return torch.minimum(moved_B3, moved_B3.new_tensor((1.0, 1.0, CEILING)))

    def _grasp(self, state: State, gripper_B3: Tensor, closed_B: Tensor) -> Tensor:
        """The held slot after the fingers moved: an opening gripper loses it, a closing one takes the nearest block."""
        closing_B = closed_B & (state.open_B > 0.5)
        offset_BK3 = state.blocks_BK3 - gripper_B3[:, None]
        distance_BK = length(offset_BK3[..., :2])
        reachable_BK = (distance_BK < GRASP_RADIUS) & (offset_BK3[..., 2].abs() < GRASP_HEIGHT)
        nearest_B = torch.where(reachable_BK, distance_BK, 9.0).argmin(1)
        takes_B = closing_B & reachable_BK.any(1)
        return torch.where(closed_B, torch.where(takes_B, nearest_B, state.held_B), -1)

    def _push(self, blocks_BK3: Tensor, gripper_B3: Tensor, fist_B: Tensor, drift_B: Tensor) -> Tensor:
        """Block positions in the plane after the closed gripper shoved those it overlaps: [B, K, 2]."""
        offset_BK2 = blocks_BK3[..., :2] - gripper_B3[:, None, :2]
        distance_BK = length(offset_BK2)
        below_BK = gripper_B3[:, None, 2] < blocks_BK3[..., 2] + BLOCK_HEIGHT
        depth_BK = torch.where(fist_B[:, None] & below_BK, (CONTACT - distance_BK).clamp(min=0.0), 0.0)
        shove_BK2 = offset_BK2 * (depth_BK / (distance_BK + _EPS))[..., None] * self.domain.push_grip
        if self.domain.push_drift > 0:
            sideways_BK2 = torch.stack([-shove_BK2[..., 1], shove_BK2[..., 0]], dim=-1)
            shove_BK2 = shove_BK2 + sideways_BK2 * (drift_B * self.domain.push_drift)[:, None, None]
        return blocks_BK3[..., :2] + shove_BK2


def _carry(blocks_BK3: Tensor, gripper_B3: Tensor, held_B: Tensor) -> Tensor:
    mine_BK = torch.arange(blocks_BK3.shape[1], device=held_B.device) == held_B[:, None]
    return torch.where(mine_BK[..., None], gripper_B3[:, None], blocks_BK3)


def _settle(xy_BK2: Tensor, z_BK: Tensor, free_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Free blocks fall onto what is below them, and those that overlap on one level move apart (one relaxation step)."""
    offset_BKK2 = xy_BK2[:, :, None] - xy_BK2[:, None]
    distance_BKK = length(offset_BKK2)
    other_KK = ~torch.eye(z_BK.shape[1], dtype=torch.bool, device=z_BK.device)
    pair_BKK = free_BK[:, :, None] & free_BK[:, None] & other_KK
    top_BK = z_BK + BLOCK_HEIGHT
    lies_BKK = pair_BKK & (distance_BKK < SUPPORT_RADIUS) & (z_BK[:, :, None] > top_BK[:, None] - _SLACK)
    support_BK = torch.where(lies_BKK, top_BK[:, None], 0.0).amax(-1)
    level_BKK = pair_BKK & ((support_BK[:, :, None] - support_BK[:, None]).abs() < BLOCK_HEIGHT / 2)
    overlap_BKK = torch.where(level_BKK, (2 * BLOCK_RADIUS - distance_BKK).clamp(min=0.0), 0.0)
    apart_BKK2 = offset_BKK2 * (overlap_BKK * 0.5 / (distance_BKK + _EPS))[..., None]
    moved_BK2 = xy_BK2 + _sum_in_order(apart_BKK2)
    return moved_BK2, torch.where(free_BK, support_BK, z_BK)


def _sum_in_order(parts_BKK2: Tensor) -> Tensor:
    """Sum over the third axis one by one: a reduction kernel may choose its order by the batch size."""
    total = parts_BKK2[:, :, 0]
    for j in range(1, parts_BKK2.shape[2]):
        total = total + parts_BKK2[:, :, j]
    return total
