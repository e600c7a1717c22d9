"""When a task is solved, and how far along it is.

Progress goes from 0 at the start to about 1 at success, in stages per named block: the gripper comes near, the block is
grasped, the block comes to its goal. A dense reward is the difference of two progresses, so it sums to what was achieved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.tabletop_parts.physics import SUPPORT_RADIUS, constant, length
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


def _goals(layout: Layout, blocks_B23: Tensor) -> Tensor:
    on_top_B3 = blocks_B23[:, 1] + constant((0.0, 0.0, BLOCK_HEIGHT), blocks_B23.device)
    first_B3 = torch.where(layout.stacked_B[:, None], on_top_B3, layout.zone_B23[:, 0])
    return torch.stack([first_B3, layout.zone_B23[:, 1]], dim=1)


def judge(layout: Layout, state: State, tolerance: float) -> Verdict:
    """Success, distances and progress of every environment; ``tolerance`` is the reach family's, in the plane."""
    blocks_B23 = state.blocks_BK3[:, :NAMED]
    goal_B23 = _goals(layout, blocks_B23)
    to_goal_B23 = goal_B23 - blocks_B23
    goal_distance_B2 = length(to_goal_B23, 2)
    held_B2 = constant(range(NAMED), state.held_B.device) == state.held_B[:, None]
    placed_B2 = (goal_distance_B2 < layout.radius_B2) & (to_goal_B23[..., 2].abs() < _LEVEL) & ~held_B2
    to_block_B23 = blocks_B23 - state.gripper_B3[:, None]
    plane_B2, reach_distance_B2 = length(to_block_B23, 2), length(to_block_B23, 3)
    near_B2 = (plane_B2 < tolerance) & (state.gripper_B3[:, 2:] < REACH_HEIGHT)
    done_B2 = torch.where(layout.reach_B1, near_B2, placed_B2)
    success_B = torch.where(layout.sort_B1, done_B2.all(1, keepdim=True), done_B2)[:, 0]
    left_B2 = torch.where(layout.reach_B1, reach_distance_B2, goal_distance_B2)
    distance_B = torch.where(layout.sort_B1, left_B2.amax(1, keepdim=True), left_B2)[:, 0]
    closer_B2 = 1 - (reach_distance_B2 / layout.start_reach_B2).clamp(max=1.0)
    there_B2 = 1 - (goal_distance_B2 / layout.start_goal_B2).clamp(max=1.0)
    closer_B1, held_B1, there_B1 = layout.weight_B3[:, None].unbind(-1)
    stages_B2 = closer_B2 * closer_B1 + held_B2 * held_B1 + there_B2 * there_B1
    progress_B2 = torch.where(placed_B2 & ~layout.reach_B1, 1.0, stages_B2)
    first_B, second_B = progress_B2.unbind(1)
    progress_B = torch.where(layout.sort_B1[:, 0], (first_B + second_B) * 0.5, first_B)
    return Verdict(success_B, placed_B2, goal_B23, goal_distance_B2, reach_distance_B2, distance_B, progress_B)


def measure_start(layout: Layout, state: State) -> None:
    """Write what judging a freshly drawn layout is relative to into it: its family's rules and the distances at the start."""
    layout.reach_B1, layout.sort_B1 = ((layout.family_B == family)[:, None] for family in (REACH, SORT))
    layout.radius_B2 = torch.where(layout.stacked_B, SUPPORT_RADIUS, GOAL_RADIUS)[:, None].repeat(1, NAMED)
    layout.weight_B3 = constant(_STAGES, layout.family_B.device)[layout.family_B]
    layout.start_goal_B2 = layout.start_reach_B2 = torch.ones_like(layout.radius_B2)
    verdict = judge(layout, state, tolerance=0.0)
    layout.start_goal_B2 = verdict.goal_distance_B2.clamp(min=0.05)
    layout.start_reach_B2 = verdict.reach_distance_B2.clamp(min=0.05)
