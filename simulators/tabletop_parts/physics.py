"""How the table moves: quasi-static, one action at a time, for all environments at once.

A closed gripper below a block's top pushes it along with its own motion, as a flat paddle does; an open one straddles it.
Closing around a block grasps it, opening drops it onto whatever is below. Only operations that round each number by
itself are used, so a result does not depend on the batch size. All but the root round exactly; torch's root on a CPU may be one
unit in the last place off, so other processors may give other last bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simulators.tabletop_parts.domains import Domain
from simulators.tabletop_parts.hashing import normal
from simulators.tabletop_parts.scene import BLOCK_HEIGHT, BLOCK_RADIUS, CEILING, Layout, State
from simulators.tabletop_parts.vectors import constant, length, squared

ACTION_DIM = 4
TIP_RADIUS = 0.02
CONTACT = BLOCK_RADIUS + TIP_RADIUS  # distance of the centres of a block and of the gripper that pushes it
GRASP_RADIUS = 0.05
GRASP_HEIGHT = 0.04
SUPPORT_RADIUS = 0.08  # a block lies on another when their centres are closer than this
_SLACK = 0.03  # how far below a block's top a released block may be and still come to lie on it
_EPS = 1e-6


@dataclass(frozen=True)
class Physics:
    """The laws of one domain. ``speed`` is the distance an action of size one moves the gripper, per axis."""

    domain: Domain
    speed: float
    noise_key: int

    def advance(self, state: State, layout: Layout, action_AB: Tensor) -> State:
        """The state one action later."""
        command_AB = action_AB.clamp(-1.0, 1.0)
        executed_AB = state.queued_AB if self.domain.delayed else command_AB
        gripper_3B = self._move(state, layout, executed_AB)
        closed_B = executed_AB[3] > 0
        offset_3KB = state.blocks_3KB - gripper_3B[:, None]
        square_KB = squared(offset_3KB[:2])
        held_B = _grasp(state, offset_3KB[2], square_KB, closed_B)
        mine_KB = _slots(square_KB.shape[0], held_B.device) == held_B
        free_KB = layout.present_KB & ~mine_KB
        fist_B = closed_B & (held_B < 0)
        # A fist holds nothing, so what it pushes is still where it was.
        motion_2B = gripper_3B[:2] - state.gripper_3B[:2]
        shove_2KB = self._shove(offset_3KB, square_KB, motion_2B, fist_B, layout.drift_B)
        carried_3KB = torch.where(mine_KB, gripper_3B[:, None], state.blocks_3KB)
        xy_2KB, z_KB = _settle(carried_3KB[:2] + shove_2KB, carried_3KB[2], free_KB)
        settled_3KB = torch.cat([xy_2KB.clamp(BLOCK_RADIUS, 1 - BLOCK_RADIUS), z_KB[None]])
        blocks_3KB = torch.where(free_KB, settled_3KB, carried_3KB)
        return State(gripper_3B, (~closed_B).float(), blocks_3KB, held_B, command_AB, state.step_B + 1)

    def foresee(self, state: State) -> State:
        """The state with the gripper where it will be when a command given now takes effect, noise aside."""
        if not self.domain.delayed:
            return state
        return replace(state, gripper_3B=self._displace(state.gripper_3B, state.queued_AB[:3]))

    def _move(self, state: State, layout: Layout, executed_AB: Tensor) -> Tensor:
        motion_3B = executed_AB[:3]
        if self.domain.action_noise > 0:
            noise_3B = normal(self.noise_key, layout.task_B, state.step_B, 3).t()
            motion_3B = motion_3B + noise_3B * self.domain.action_noise
        return self._displace(state.gripper_3B, motion_3B)

    def _displace(self, gripper_3B: Tensor, motion_3B: Tensor) -> Tensor:
        low_31, high_31 = constant((((0.0,), (0.0,), (0.0,)), ((1.0,), (1.0,), (CEILING,))), gripper_3B.device)
        return (gripper_3B + motion_3B * self.speed).clamp(low_31, high_31)

    def _shove(self, offset_3KB: Tensor, square_KB: Tensor, motion_2B: Tensor, fist_B: Tensor, drift_B: Tensor) -> Tensor:
        """How far the closed gripper pushes the blocks in its way, in the plane: [2, K, B]. Offsets: from gripper to block.

        A block is pushed along the motion until it is out of contact, so pushing is stable: off-centre contact does not turn
        the block away. What the gripper has passed, or comes down on without moving in the plane, stays where it is.
        """
        way_B = length(motion_2B)
        ahead_21B = (motion_2B / (way_B + _EPS))[:, None]
        forward_KB, rest_KB = (offset_3KB[:2] * ahead_21B).unbind(0)
        forward_KB = forward_KB + rest_KB
        reach_KB = forward_KB * forward_KB + (CONTACT**2 - square_KB)  # contact^2 - way aside^2
        met_KB = fist_B & (offset_3KB[2] > -BLOCK_HEIGHT) & (reach_KB > 0) & (forward_KB > -way_B)
        depth_KB = torch.where(met_KB, (reach_KB.sqrt() - forward_KB).clamp(min=0.0), 0.0) * self.domain.push_grip
        shove_2KB = ahead_21B * depth_KB
        if self.domain.push_drift > 0:
            sideways_2KB = torch.stack([-shove_2KB[1], shove_2KB[0]])
            shove_2KB = shove_2KB + sideways_2KB * (drift_B * self.domain.push_drift)
        return shove_2KB


def _grasp(state: State, above_KB: Tensor, square_KB: Tensor, closed_B: Tensor) -> Tensor:
    """The held slot after the fingers moved: an opening gripper loses it, a closing one takes the nearest block."""
    reachable_KB = (square_KB < GRASP_RADIUS**2) & (above_KB.abs() < GRASP_HEIGHT)
    # min would do, but on the CPU it wakes all of torch's threads for however little; argmin is slow along a first axis.
    nearest_B = torch.where(reachable_KB, square_KB, 9.0).t().contiguous().argmin(1)
    takes_B = (state.open_B > 0.5) & reachable_KB.any(0)
    return torch.where(closed_B, torch.where(takes_B, nearest_B, state.held_B), -1)


def _settle(xy_2KB: Tensor, z_KB: Tensor, free_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Where free blocks go: they fall onto what is below them, and those that overlap on one level move apart (one step)."""
    offset_2KKB = xy_2KB[:, :, None] - xy_2KB[:, None]
    distance_KKB = length(offset_2KKB)
    pair_KKB = free_KB[:, None] & free_KB & _others(z_KB.shape[0], z_KB.device)
    top_KB = z_KB + BLOCK_HEIGHT
    lies_KKB = pair_KKB & (distance_KKB < SUPPORT_RADIUS) & (z_KB[:, None] > top_KB - _SLACK)
    support_KB = torch.where(lies_KKB, top_KB, 0.0).amax(1)
    level_KKB = pair_KKB & ((support_KB[:, None] - support_KB).abs() < BLOCK_HEIGHT / 2)
    overlap_KKB = torch.where(level_KKB, (2 * BLOCK_RADIUS - distance_KKB).clamp(min=0.0), 0.0)
    apart_2KKB = offset_2KKB * (overlap_KKB * 0.5 / (distance_KKB + _EPS))
    return xy_2KB + _sum_in_order(apart_2KKB), support_KB


@functools.cache
def _slots(k: int, device: torch.device) -> Tensor:
    """[K, 1]: the number of each slot."""
    return torch.arange(k, device=device)[:, None]


@functools.cache
def _others(k: int, device: torch.device) -> Tensor:
    """[K, K, 1]: whether two slots are different blocks."""
    return ~torch.eye(k, dtype=torch.bool, device=device)[..., None]


def _sum_in_order(parts_2KKB: Tensor) -> Tensor:
    """Sum over the third axis one by one: a reduction kernel may choose its order by the batch size."""
    total, *others = parts_2KKB.unbind(2)
    for part in others:
        total = total + part
    return total
