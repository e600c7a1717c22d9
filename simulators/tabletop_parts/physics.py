"""How the table moves: quasi-static, one action at a time, for all environments at once.

A closed gripper below a block's top pushes it along with its own motion, as a flat paddle does; an open one straddles it.
Closing around a block grasps it, opening drops it onto whatever is below. Only exactly rounded operations are used, so a result
does not depend on the batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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


def squared(vectors: Tensor, axes: int) -> Tensor:
    """Squared Euclidean length along the first ``axes`` entries of the last axis, as separately rounded operations."""
    total, *others = (vectors * vectors).unbind(-1)[:axes]
    for square in others:
        total = total + square
    return total


def length(vectors: Tensor, axes: int) -> Tensor:
    """The root of ``squared``."""
    return squared(vectors, axes).sqrt()


@functools.cache
def constant(values: Sequence[Any], device: torch.device) -> Tensor:
    """These numbers as a tensor, made once: in a step of a few milliseconds even small copies count."""
    return torch.tensor(values, device=device)


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
        offset_BK3 = state.blocks_BK3 - gripper_B3[:, None]
        square_BK = squared(offset_BK3, 2)
        held_B = _grasp(state, offset_BK3[..., 2], square_BK, closed_B)
        mine_BK = constant(range(square_BK.shape[1]), held_B.device) == held_B[:, None]
        free_BK = layout.present_BK & ~mine_BK
        fist_B = closed_B & (held_B < 0)
        # A fist holds nothing, so what it pushes is still where it was.
        motion_B2 = gripper_B3[:, :2] - state.gripper_B3[:, :2]
        shove_BK2 = self._shove(offset_BK3, square_BK, motion_B2, fist_B, layout.drift_B)
        blocks_BK3 = torch.where(mine_BK[..., None], gripper_B3[:, None], state.blocks_BK3)
        xy_BK2, z_BK = _settle(blocks_BK3[..., :2] + shove_BK2, blocks_BK3[..., 2], free_BK)
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
        low_3, high_3 = constant(((0.0, 0.0, 0.0), (1.0, 1.0, CEILING)), gripper_B3.device)
        return (gripper_B3 + motion_B3 * self.speed).clamp(low_3, high_3)

    def _shove(self, offset_BK3: Tensor, square_BK: Tensor, motion_B2: Tensor, fist_B: Tensor, drift_B: Tensor) -> Tensor:
        """How far the closed gripper pushes the blocks in its way, in the plane: [B, K, 2]. Offsets: from gripper to block.

        A block is pushed along the motion until it is out of contact, so pushing is stable: off-centre contact does not turn
        the block away. What the gripper has passed, or comes down on without moving in the plane, stays where it is.
        """
        way_B1 = length(motion_B2, 2)[:, None]
        ahead_B2 = motion_B2 / (way_B1 + _EPS)
        forward_BK, rest_BK = (offset_BK3[..., :2] * ahead_B2[:, None]).unbind(-1)
        forward_BK = forward_BK + rest_BK
        reach_BK = forward_BK * forward_BK + (CONTACT**2 - square_BK)  # contact^2 - way aside^2
        met_BK = fist_B[:, None] & (offset_BK3[..., 2] > -BLOCK_HEIGHT) & (reach_BK > 0) & (forward_BK > -way_B1)
        depth_BK = torch.where(met_BK, (reach_BK.sqrt() - forward_BK).clamp(min=0.0), 0.0) * self.domain.push_grip
        shove_BK2 = ahead_B2[:, None] * depth_BK[..., None]
        if self.domain.push_drift > 0:
            sideways_BK2 = torch.stack([-shove_BK2[..., 1], shove_BK2[..., 0]], dim=-1)
            shove_BK2 = shove_BK2 + sideways_BK2 * (drift_B * self.domain.push_drift)[:, None, None]
        return shove_BK2


def _grasp(state: State, above_BK: Tensor, square_BK: Tensor, closed_B: Tensor) -> Tensor:
    """The held slot after the fingers moved: an opening gripper loses it, a closing one takes the nearest block."""
    reachable_BK = (square_BK < GRASP_RADIUS**2) & (above_BK.abs() < GRASP_HEIGHT)
    least_B, nearest_B = torch.where(reachable_BK, square_BK, 9.0).min(1)
    takes_B = (state.open_B > 0.5) & (least_B < GRASP_RADIUS**2)
    return torch.where(closed_B, torch.where(takes_B, nearest_B, state.held_B), -1)


def _settle(xy_BK2: Tensor, z_BK: Tensor, free_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Free blocks fall onto what is below them, and those that overlap on one level move apart (one relaxation step)."""
    offset_BKK2 = xy_BK2[:, :, None] - xy_BK2[:, None]
    distance_BKK = length(offset_BKK2, 2)
    pair_BKK = free_BK[:, :, None] & free_BK[:, None] & _others(z_BK.shape[1], z_BK.device)
    top_BK = z_BK + BLOCK_HEIGHT
    lies_BKK = pair_BKK & (distance_BKK < SUPPORT_RADIUS) & (z_BK[:, :, None] > top_BK[:, None] - _SLACK)
    support_BK = torch.where(lies_BKK, top_BK[:, None], 0.0).amax(-1)
    level_BKK = pair_BKK & ((support_BK[:, :, None] - support_BK[:, None]).abs() < BLOCK_HEIGHT / 2)
    overlap_BKK = torch.where(level_BKK, (2 * BLOCK_RADIUS - distance_BKK).clamp(min=0.0), 0.0)
    apart_BKK2 = offset_BKK2 * (overlap_BKK * 0.5 / (distance_BKK + _EPS))[..., None]
    moved_BK2 = xy_BK2 + _sum_in_order(apart_BKK2)
    return moved_BK2, torch.where(free_BK, support_BK, z_BK)


@functools.cache
def _others(k: int, device: torch.device) -> Tensor:
    """[K, K]: whether two slots are different blocks."""
    return ~torch.eye(k, dtype=torch.bool, device=device)


def _sum_in_order(parts_BKK2: Tensor) -> Tensor:
    """Sum over the third axis one by one: a reduction kernel may choose its order by the batch size."""
    total, *others = parts_BKK2.unbind(2)
    for part in others:
        total = total + part
    return total
