"""A scripted expert: from the present state alone to a waypoint, and from there to a smooth action.

It has no memory, so a policy that sees one image can imitate it. Each behaviour gives a waypoint in space and whether the
fingers should be closed; the action is proportional to the way left and clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulators.tabletop_parts.physics import CONTACT
from simulators.tabletop_parts.scene import PUSH, REACH, SORT, Layout, State
from simulators.tabletop_parts.tasks import Verdict
from simulators.tabletop_parts.vectors import length

_GAIN = 0.65  # share of the remaining way covered per step
_HOVER = 0.13  # height at which the gripper travels
_GRASP_Z = 0.01
_ALIGNED = 0.03
_STRIDE = 0.055  # length of a pushing step
_ASTRAY = 0.06  # a pushing gripper this far out of line starts anew

Waypoint = tuple[Tensor, Tensor]  # target [3, B] and closed [B]


def expert_action(layout: Layout, state: State, verdict: Verdict, *, speed: float, expert_speed: float) -> Tensor:
    """The next action in each environment, at most ``expert_speed`` along an axis: [B, 4]."""
    target_3B, close_B = _fetch(layout, state, verdict)
    for family, behaviour in ((REACH, _reach), (PUSH, _push)):
        other_3B, other_close_B = behaviour(layout, state, verdict)
        mine_B = layout.family_B == family
        target_3B = torch.where(mine_B, other_3B, target_3B)
        close_B = torch.where(mine_B, other_close_B, close_B)
    way_3B = (target_3B - state.gripper_3B) * (_GAIN / speed)
    largest_B = way_3B.abs().amax(0).clamp(min=expert_speed)
    motion_3B = way_3B * (expert_speed / largest_B)
    return torch.stack([*motion_3B, torch.where(close_B, 1.0, -1.0)], dim=1)


def _funnel(distance_B: Tensor) -> Tensor:
    """Height above the target: hover while far, come down while closing in."""
    return ((distance_B - 0.015) * 2.5).clamp(0.0, _HOVER)


def _above(place_3B: Tensor, distance_B: Tensor) -> Tensor:
    return torch.cat([place_3B[:2], (place_3B[2] + _GRASP_Z + _funnel(distance_B))[None]])


def _reach(layout: Layout, state: State, verdict: Verdict) -> Waypoint:
    block_3B = state.blocks_3KB[:, 0]
    distance_B = length((block_3B - state.gripper_3B)[:2])
    return _above(block_3B, distance_B), torch.zeros_like(layout.stacked_B)


def _fetch(layout: Layout, state: State, verdict: Verdict) -> Waypoint:
    """Pick up the block that is due and release it at its goal; when sorting, block 0 comes first."""
    sort_B = layout.family_B == SORT
    due_B = torch.where(sort_B & ((state.held_B == 1) | (verdict.placed_2B[0] & (state.held_B != 0))), 1, 0)
    row_B = torch.arange(due_B.shape[0], device=due_B.device)
    holding_B = state.held_B == due_B
    block_3B, goal_3B = state.blocks_3KB[:, due_B, row_B], verdict.goal_32B[:, due_B, row_B]
    place_3B = torch.where(holding_B, goal_3B, block_3B)
    distance_B = length((place_3B - state.gripper_3B)[:2])
    there_B = (distance_B < _ALIGNED) & (state.gripper_3B[2] < place_3B[2] + _GRASP_Z + 0.02)
    fingers_open_B = state.open_B > 0.5
    close_B = torch.where(holding_B, ~there_B, there_B & fingers_open_B)
    return _above(place_3B, distance_B), close_B


def _push(layout: Layout, state: State, verdict: Verdict) -> Waypoint:
    """Come down behind the block, as seen from the goal, and drive it there with closed fingers."""
    block_2B, gripper_2B, height_now_B = state.blocks_3KB[:2, 0], state.gripper_3B[:2], state.gripper_3B[2]
    goal_distance_B = verdict.left_22B[0, 0]
    ahead_2B = (verdict.goal_32B[:2, 0] - block_2B) / (goal_distance_B + 1e-6)
    from_block_2B = gripper_2B - block_2B
    along_B = from_block_2B[0] * ahead_2B[0] + from_block_2B[1] * ahead_2B[1]
    aside_B = (from_block_2B[0] * ahead_2B[1] - from_block_2B[1] * ahead_2B[0]).abs()
    low_B = height_now_B < 0.04
    pushing_B = low_B & (along_B < -0.02) & (along_B > -0.2) & (aside_B < _ASTRAY)
    start_2B = block_2B - ahead_2B * (CONTACT + 0.02)
    stride_B = goal_distance_B.clamp(max=_STRIDE / _GAIN)
    target_2B = torch.where(pushing_B, gripper_2B + ahead_2B * stride_B, start_2B)
    height_B = torch.where(pushing_B, 0.01, 0.01 + _funnel(length(start_2B - gripper_2B)))
    under_B = (length(from_block_2B) < 0.15) & (height_now_B < 0.08)
    blocked_B = under_B & ~pushing_B & (height_B > height_now_B)  # rise before going around the block
    target_2B = torch.where(blocked_B, gripper_2B, target_2B)
    around_B = (state.open_B > 0.5) & under_B  # closing here would grasp it
    return torch.cat([target_2B, height_B[None]]), (state.held_B < 0) & ~around_B
