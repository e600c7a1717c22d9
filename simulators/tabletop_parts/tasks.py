"""When a task is solved, and how far along it is.

Progress goes from 0 at the start to about 1 at success, in stages per named block: the gripper comes near, the block is
grasped, the block comes to its goal. A dense reward is the difference of two progresses, so it sums to what was achieved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.tabletop_parts.physics import SUPPORT_RADIUS
from simulators.tabletop_parts.scene import BLOCK_HEIGHT, NAMED, REACH, SORT, Layout, State
from simulators.tabletop_parts.vectors import batch_last, constant, squared

GOAL_RADIUS = 0.09  # how close to a zone's centre a block must lie
REACH_HEIGHT = 0.05  # below this the gripper counts as touching
_LEVEL = 0.02
# weight of (near, grasped, at the goal) per family, in the order of FAMILIES
_STAGES = ((1.0, 0.0, 0.0), (0.3, 0.0, 0.7), (0.25, 0.15, 0.6), (0.25, 0.15, 0.6))


@dataclass(frozen=True)
class Verdict:
    """How B episodes stand."""

    success_B: Tensor  # bool
    placed_2B: Tensor  # bool: block 0 / 1 lies released at its goal
    goal_32B: Tensor  # where blocks 0 and 1 belong
    left_22B: Tensor  # distance in the plane of blocks 0 and 1 to their goals, and of the gripper to them in space
    distance_B: Tensor  # what still separates the task from success
    progress_B: Tensor


def judge(layout: Layout, state: State, tolerance: float) -> Verdict:
    """Success, distances and progress of every environment; ``tolerance`` is the reach family's, in the plane."""
    blocks_32B, gripper_3B = state.blocks_3KB[:, :NAMED], state.gripper_3B
    on_top_31B = blocks_32B[:, 1:] + constant((((0.0,),), ((0.0,),), ((BLOCK_HEIGHT,),)), blocks_32B.device)
    goal_32B = torch.where(layout.onto_2B, on_top_31B, layout.zone_32B)
    to_goal_32B, to_block_32B = goal_32B - blocks_32B, blocks_32B - gripper_3B[:, None]
    plane_2B = squared(to_block_32B[:2])
    space_2B = plane_2B + to_block_32B[2] * to_block_32B[2]
    lengths_32B = torch.stack([plane_2B, squared(to_goal_32B[:2]), space_2B]).sqrt()
    plane_2B, goal_2B, space_2B = lengths_32B
    held_2B = constant(((0,), (1,)), state.held_B.device) == state.held_B
    placed_2B = (goal_2B < layout.radius_B) & (to_goal_32B[2].abs() < _LEVEL) & ~held_2B
    near_2B = (plane_2B < tolerance) & (gripper_3B[2] < REACH_HEIGHT)
    first_B, second_B = torch.where(layout.reach_B, near_2B, placed_2B)
    success_B = first_B & (second_B | layout.alone_B)
    first_B, second_B = torch.where(layout.reach_B, space_2B, goal_2B)
    distance_B = torch.where(layout.alone_B, first_B, torch.maximum(first_B, second_B))
    left_22B = lengths_32B[1:]
    there_2B, closer_2B = 1 - (left_22B / layout.start_22B).clamp(max=1.0)
    closer_B, grasped_B, there_B = layout.weight_3B
    stages_2B = closer_2B * closer_B + held_2B * grasped_B + there_2B * there_B
    first_B, second_B = torch.where(placed_2B & ~layout.reach_B, 1.0, stages_2B)
    progress_B = torch.where(layout.alone_B, first_B, (first_B + second_B) * 0.5)
    return Verdict(success_B, placed_2B, goal_32B, left_22B, distance_B, progress_B)


def measure_start(layout: Layout, state: State) -> None:
    """Write what judging a freshly drawn layout is relative to into it: its family's rules and the distances at the start."""
    layout.reach_B, layout.alone_B = layout.family_B == REACH, layout.family_B != SORT
    layout.onto_2B = torch.stack([layout.stacked_B, torch.zeros_like(layout.stacked_B)])
    layout.radius_B = torch.where(layout.stacked_B, SUPPORT_RADIUS, GOAL_RADIUS)
    layout.weight_3B = batch_last(constant(_STAGES, layout.family_B.device)[layout.family_B])
    layout.start_22B = torch.ones(1, device=layout.family_B.device)
    layout.start_22B = judge(layout, state, tolerance=0.0).left_22B.clamp(min=0.05)
