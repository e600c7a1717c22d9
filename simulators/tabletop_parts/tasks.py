"""When a task is solved, and how far along it is.

Progress goes from 0 at the start to about 1 at success, in stages per named block: the gripper comes near, the block is
grasped, the block comes to its goal. A dense reward is the difference of two progresses, so it sums to what was achieved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.tabletop_parts.physics import SUPPORT_RADIUS, length
from simulators.tabletop_parts.scene import BLOCK_HEIGHT, NAMED, REACH, SORT, Layout, State

GOAL_RADIUS = 0.09  # how close to a zone's centre a block must lie
REACH_HEIGHT = 0.05  # below this the gripper counts as touching
_LEVEL = 0.02
# weight of (near, grasped, at the goal) per family, in the order of FAMILIES
_STAGES = ((1.0, 0.0, 0.0), (0.3, 0.0, 0.7), (0.25, 0.15, 0.6), (0.25, 0.15, 0.6))


@dataclass(frozen=True)
class Verdict:
    """How B episodes stand."""

    success_B: Tensor  # bool
    placed_B2: Tensor  # bool: block 0 / 1 lies released at its goal
    goal_B23: Tensor  # where blocks 0 and 1 belong
    goal_distance_B2: Tensor
    reach_distance_B2: Tensor  # gripper to blocks 0 and 1, in space
    distance_B: Tensor  # what still separates the task from success
    progress_B: Tensor


def _space(xyz: Tensor) -> Tensor:
    x, y, z = xyz.unbind(-1)
    return (x * x + y * y + z * z).sqrt()


def _goals(layout: Layout, blocks_B23: Tensor) -> Tensor:
    ground_B23 = torch.cat([layout.zone_xy_B22, torch.zeros_like(layout.zone_xy_B22[..., :1])], dim=-1)
    on_top_B3 = blocks_B23[:, 1] + blocks_B23.new_tensor((0.0, 0.0, BLOCK_HEIGHT))
    first_B3 = torch.where(layout.stacked_B[:, None], on_top_B3, ground_B23[:, 0])
    return torch.stack([first_B3, ground_B23[:, 1]], dim=1)


def judge(layout: Layout, state: State, tolerance: float) -> Verdict:
    """Success, distances and progress of every environment; ``tolerance`` is the reach family's, in the plane."""
    blocks_B23 = state.blocks_BK3[:, :NAMED]
    goal_B23 = _goals(layout, blocks_B23)
    to_goal_B23 = goal_B23 - blocks_B23
    goal_distance_B2 = length(to_goal_B23[..., :2])
    radius_B2 = torch.where(layout.stacked_B, SUPPORT_RADIUS, GOAL_RADIUS)[:, None]
    slot_2 = torch.arange(NAMED, device=radius_B2.device)
    held_B2 = slot_2 == state.held_B[:, None]
    placed_B2 = (goal_distance_B2 < radius_B2) & (to_goal_B23[..., 2].abs() < _LEVEL) & ~held_B2
    to_block_B23 = blocks_B23 - state.gripper_B3[:, None]
    reach_distance_B2 = _space(to_block_B23)
    near_B = (length(to_block_B23[:, 0, :2]) < tolerance) & (state.gripper_B3[:, 2] < REACH_HEIGHT)
    reach_B, sort_B = layout.family_B == REACH, layout.family_B == SORT
    done_B2 = torch.where(reach_B[:, None], near_B[:, None], placed_B2)
    success_B = done_B2[:, 0] & (done_B2[:, 1] | ~sort_B)
    left_B2 = torch.where(reach_B[:, None], reach_distance_B2, goal_distance_B2)
    distance_B = torch.where(sort_B, torch.maximum(left_B2[:, 0], left_B2[:, 1]), left_B2[:, 0])
    near_B2 = 1 - (reach_distance_B2 / layout.start_reach_B2).clamp(max=1.0)
    there_B2 = 1 - (goal_distance_B2 / layout.start_goal_B2).clamp(max=1.0)
    weight_B3 = near_B2.new_tensor(_STAGES)[layout.family_B]
    stages_B2 = near_B2 * weight_B3[:, :1] + held_B2 * weight_B3[:, 1:2] + there_B2 * weight_B3[:, 2:]
    progress_B2 = torch.where(placed_B2 & ~reach_B[:, None], 1.0, stages_B2)
    progress_B = torch.where(sort_B, (progress_B2[:, 0] + progress_B2[:, 1]) * 0.5, progress_B2[:, 0])
    return Verdict(success_B, placed_B2, goal_B23, goal_distance_B2, reach_distance_B2, distance_B, progress_B)


def measure_start(layout: Layout, state: State) -> None:
    """Write the distances that progress is relative to into a freshly drawn layout."""
    verdict = judge(layout, state, tolerance=0.0)
    layout.start_goal_B2 = verdict.goal_distance_B2.clamp(min=0.05)
    layout.start_reach_B2 = verdict.reach_distance_B2.clamp(min=0.05)
