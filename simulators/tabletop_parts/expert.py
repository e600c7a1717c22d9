"""A scripted expert: from the present state alone to a waypoint, and from there to a smooth action.

It has no memory, so a policy that sees one image can imitate it. Each behaviour gives a waypoint in space and whether the
fingers should be closed; the action is proportional to the way left and clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulators.tabletop_parts.physics import CONTACT, length
from simulators.tabletop_parts.scene import PUSH, REACH, SORT, Layout, State
from simulators.tabletop_parts.tasks import Verdict

_GAIN = 0.65  # share of the remaining way covered per step
_HOVER = 0.13  # height at which the gripper travels
_GRASP_Z = 0.01
_ALIGNED = 0.03
_STRIDE = 0.055  # length of a pushing step
_ASTRAY = 0.06  # a pushing gripper this far out of line starts anew

Waypoint = tuple[Tensor, Tensor]  # target [B, 3] and closed [B]


def expert_action(layout: Layout, state: State, verdict: Verdict, *, speed: float, expert_speed: float) -> Tensor:
    """The next action in each environment, at most ``expert_speed`` along an axis: [B, 4]."""
    target_B3, close_B = _fetch(layout, state, verdict)
    for family, behaviour in ((REACH, _reach), (PUSH, _push)):
        other_B3, other_close_B = behaviour(layout, state, verdict)
        mine_B = layout.family_B == family
        target_B3 = torch.where(mine_B[:, None], other_B3, target_B3)
        close_B = torch.where(mine_B, other_close_B, close_B)
    way_B3 = (target_B3 - state.gripper_B3) * (_GAIN / speed)
    largest_B = way_B3.abs().amax(1).clamp(min=expert_speed)
    motion_B3 = way_B3 * (expert_speed / largest_B)[:, None]
    return torch.cat([motion_B3, torch.where(close_B, 1.0, -1.0)[:, None]], dim=1)


def _funnel(distance_B: Tensor) -> Tensor:
    """Height above the target: hover while far, come down while closing in."""
    return ((distance_B - 0.015) * 2.5).clamp(0.0, _HOVER)


def _above(place_B3: Tensor, distance_B: Tensor) -> Tensor:
    return torch.cat([place_B3[:, :2], (place_B3[:, 2] + _GRASP_Z + _funnel(distance_B))[:, None]], dim=1)


def _reach(layout: Layout, state: State, verdict: Verdict) -> Waypoint:
    block_B3 = state.blocks_BK3[:, 0]
    distance_B = length(block_B3 - state.gripper_B3, 2)
    return _above(block_B3, distance_B), torch.zeros_like(layout.stacked_B)


def _fetch(layout: Layout, state: State, verdict: Verdict) -> Waypoint:
    """Pick up the block that is due and release it at its goal; when sorting, block 0 comes first."""
    sort_B = layout.family_B == SORT
    due_B = torch.where(sort_B & ((state.held_B == 1) | (verdict.placed_B2[:, 0] & (state.held_B != 0))), 1, 0)
    row_B = torch.arange(due_B.shape[0], device=due_B.device)
    holding_B = state.held_B == due_B
    block_B3, goal_B3 = state.blocks_BK3[row_B, due_B], verdict.goal_B23[row_B, due_B]
    place_B3 = torch.where(holding_B[:, None], goal_B3, block_B3)
    distance_B = length(place_B3 - state.gripper_B3, 2)
    there_B = (distance_B < _ALIGNED) & (state.gripper_B3[:, 2] < place_B3[:, 2] + _GRASP_Z + 0.02)
    fingers_open_B = state.open_B > 0.5
    close_B = torch.where(holding_B, ~there_B, there_B & fingers_open_B)
    return _above(place_B3, distance_B), close_B


def _push(layout: Layout, state: State, verdict: Verdict) -> Waypoint:
    """Come down behind the block, as seen from the goal, and drive it there with closed fingers."""
    block_B3, gripper_B3 = state.blocks_BK3[:, 0], state.gripper_B3
    to_goal_B2 = verdict.goal_B23[:, 0, :2] - block_B3[:, :2]
    goal_distance_B = verdict.goal_distance_B2[:, 0]
    ahead_B2 = to_goal_B2 / (goal_distance_B + 1e-6)[:, None]
    from_block_B2 = gripper_B3[:, :2] - block_B3[:, :2]
    along_B = from_block_B2[:, 0] * ahead_B2[:, 0] + from_block_B2[:, 1] * ahead_B2[:, 1]
    aside_B = (from_block_B2[:, 0] * ahead_B2[:, 1] - from_block_B2[:, 1] * ahead_B2[:, 0]).abs()
    low_B = gripper_B3[:, 2] < 0.04
    pushing_B = low_B & (along_B < -0.02) & (along_B > -0.2) & (aside_B < _ASTRAY)
    start_B2 = block_B3[:, :2] - ahead_B2 * (CONTACT + 0.02)
    stride_B = goal_distance_B.clamp(max=_STRIDE / _GAIN)
    target_B2 = torch.where(pushing_B[:, None], gripper_B3[:, :2] + ahead_B2 * stride_B[:, None], start_B2)
    height_B = torch.where(pushing_B, 0.01, 0.01 + _funnel(length(start_B2 - gripper_B3[:, :2], 2)))
    close_by_B = length(from_block_B2, 2) < 0.15
    under_B = close_by_B & (gripper_B3[:, 2] < 0.08)
    blocked_B = under_B & ~pushing_B & (height_B > gripper_B3[:, 2])  # rise before going around the block
    target_B2 = torch.where(blocked_B[:, None], gripper_B3[:, :2], target_B2)
    around_B = (state.open_B > 0.5) & under_B  # closing here would grasp it
    return torch.cat([target_B2, height_B[:, None]], dim=1), (state.held_B < 0) & ~around_B
