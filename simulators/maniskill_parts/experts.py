"""Scripted experts for a Panda arm, from privileged state: where the hand should go next, and an action that takes it there.

Each works from the scene as it is, without memory, so it also takes over from any other policy in the middle of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrl.errors import MMRLError

_REACH = 0.1  # metres (or radians) of an action of 1, in ManiSkill's Panda controllers
OPEN, CLOSED = 1.0, -1.0
_HOVER = 0.08  # metres above an object from which the hand goes straight down
_NEAR = 0.012  # metres in the plane within which it may
_STEEP, _LOWER = 8.0, 0.03  # of the funnel through which things are put down: its slope, and metres an action


class Goal(NamedTuple):
    """Where the hand should go (metres, world frame), the gripper's command, and the object to align the fingers with."""

    place_B3: Tensor
    grip_B: Tensor
    yaw_B: Tensor  # radians


def expert_action(env: Any, task: str, control_mode: str | None, speed: float) -> Tensor:
    """The next action, [B, A] in [-1, 1]. Raises MMRLError for a task or control mode without an expert."""
    if task not in EXPERTS or control_mode is None or control_mode not in _ENCODERS:
        raise MMRLError(
            f"there is no scripted expert for {task} in {control_mode}; there is one for {', '.join(EXPERTS)} "
            f"in {' and '.join(_ENCODERS)}"
        )
    goal = EXPERTS[task](env)
    move_B3 = (goal.place_B3 - env.agent.tcp.pose.p) / _REACH
    move_B3 = move_B3 * (speed / move_B3.norm(dim=1, keepdim=True).clamp(min=speed))
    return _ENCODERS[control_mode](env, move_B3, goal)


def _position(env: Any, move_B3: Tensor, goal: Goal) -> Tensor:
    return torch.cat([move_B3, goal.grip_B[:, None]], dim=1)


def _pose(env: Any, move_B3: Tensor, goal: Goal) -> Tensor:
    # A square looks the same every quarter turn; and ManiSkill's controller turns the other way (its rot_lower is negative).
    turn_B = (goal.yaw_B - _yaw(env.agent.tcp.pose.q) + math.pi / 4) % (math.pi / 2) - math.pi / 4
    turn_B = (-turn_B / _REACH).clamp(-1, 1)
    nothing_B2 = torch.zeros_like(move_B3[:, :2])
    return torch.cat([move_B3, nothing_B2, turn_B[:, None], goal.grip_B[:, None]], dim=1)


_ENCODERS: dict[str, Callable[[Any, Tensor, Goal], Tensor]] = {"pd_ee_delta_pos": _position, "pd_ee_delta_pose": _pose}


def _yaw(q_B4: Tensor) -> Tensor:
    """Angle about the vertical of a body's x axis, radians; q is (w, x, y, z)."""
    w, x, y, z = q_B4.unbind(1)
    return torch.atan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))


def _shift(place_B3: Tensor, dx: float = 0.0, dz: float = 0.0) -> Tensor:
    return place_B3 + torch.tensor([dx, 0.0, dz], device=place_B3.device)


def _choose(where_B: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(where_B.reshape(-1, *[1] * (yes.dim() - 1)), yes, no)


def _grip(env: Any, where_B: Tensor) -> Tensor:
    return torch.where(where_B, OPEN, CLOSED)


def _slide(env: Any, direction: float) -> Goal:
    """Shove the cube along x with closed fingers, from its far side."""
    hand_B3, cube_B3 = env.agent.tcp.pose.p, env.obj.pose.p
    start_B3 = _shift(cube_B3, dx=-direction * 0.06)
    side_B = (hand_B3[:, 1] - cube_B3[:, 1]).abs() < _NEAR
    behind_B = direction * (cube_B3[:, 0] - hand_B3[:, 0]) > 0.03
    low_B = hand_B3[:, 2] < 0.04
    lowering_B = side_B & ((hand_B3 - start_B3)[:, 0].abs() < 2 * _NEAR)
    place_B3 = _choose(lowering_B, start_B3, _shift(start_B3, dz=_HOVER))
    place_B3 = _choose(low_B & side_B & (behind_B | lowering_B), _shift(cube_B3, dx=direction * 0.1), place_B3)
    pushing_B = low_B & side_B & (direction * (cube_B3[:, 0] - hand_B3[:, 0]) > 0.0)
    place_B3 = _choose(pushing_B, _shift(cube_B3, dx=direction * 0.1), place_B3)
    return Goal(place_B3, torch.full_like(hand_B3[:, 0], CLOSED), torch.zeros_like(hand_B3[:, 0]))


def _fetch(env: Any, thing: Any, grasped_B: Tensor, dz: float = 0.0) -> Goal:
    """Go above the thing with open fingers, down, and close them."""
    hand_B3, thing_B3 = env.agent.tcp.pose.p, _shift(thing.pose.p, dz=dz)
    apart_B = (hand_B3 - thing_B3)[:, :2].norm(dim=1)
    above_B = (hand_B3 - thing_B3)[:, 2]
    lined_up_B = apart_B < _NEAR
    at_it_B = (apart_B < 2 * _NEAR) & (above_B.abs() < 0.012)
    place_B3 = _choose(lined_up_B | at_it_B, thing_B3, _shift(thing_B3, dz=_HOVER))
    return Goal(place_B3, _grip(env, ~(at_it_B | grasped_B)), _yaw(thing.pose.q))


def _pick(env: Any) -> Goal:
    grasped_B = env.agent.is_grasping(env.cube)
    fetch = _fetch(env, env.cube, grasped_B)
    carried_B3 = env.agent.tcp.pose.p + env.goal_site.pose.p - env.cube.pose.p
    return fetch._replace(place_B3=_choose(grasped_B, carried_B3, fetch.place_B3), yaw_B=_kept(env, grasped_B, fetch))


def _kept(env: Any, grasped_B: Tensor, fetch: Goal) -> Tensor:
    """Once something is held, the hand need not turn any more."""
    return torch.where(grasped_B, _yaw(env.agent.tcp.pose.q), fetch.yaw_B)


def _put(env: Any, thing: Any, onto_B3: Tensor, tolerance: float, drop: float, dz: float = 0.0) -> Goal:
    """Fetch the thing, carry it over the place, lower it to ``drop`` metres above and let go; then stay clear of it."""
    hand_B3, thing_B3 = env.agent.tcp.pose.p, thing.pose.p
    grasped_B = env.agent.is_grasping(thing)
    fetch = _fetch(env, thing, grasped_B, dz)
    offset_B3 = thing_B3 - onto_B3
    apart_B, above_B = offset_B3[:, :2].norm(dim=1), offset_B3[:, 2]
    rising_B = (apart_B > 0.03) & (above_B < 0.05)
    # A funnel: the nearer in the plane, the lower. Never fast, for the arm sways to the side as it goes down.
    height_B = (_STEEP * (apart_B - tolerance)).clamp(0, _HOVER).maximum(above_B - _LOWER)
    funnel_B3 = torch.cat([onto_B3[:, :2], onto_B3[:, 2:] + height_B[:, None]], 1)
    target_B3 = _choose(rising_B, torch.cat([thing_B3[:, :2], onto_B3[:, 2:] + _HOVER], 1), funnel_B3)
    there_B = (apart_B < 2 * tolerance) & (above_B < drop)
    place_B3 = _choose(grasped_B, hand_B3 + target_B3 - thing_B3, fetch.place_B3)
    place_B3 = _choose(there_B, _choose(grasped_B, hand_B3, _shift(hand_B3, dz=0.05)), place_B3)
    return Goal(place_B3, torch.where(there_B, OPEN, fetch.grip_B), _kept(env, grasped_B | there_B, fetch))


def _stack(env: Any) -> Goal:
    return _put(env, env.cubeA, _shift(env.cubeB.pose.p, dz=0.04), tolerance=0.008, drop=0.004)


def _place(env: Any) -> Goal:
    return _put(env, env.obj, _shift(env.bin.pose.p, dz=0.0225), tolerance=0.004, drop=0.008)


EXPERTS: dict[str, Callable[[Any], Goal]] = {
    "PushCube-v1": lambda env: _slide(env, 1.0),
    "PullCube-v1": lambda env: _slide(env, -1.0),
    "PickCube-v1": _pick,
    "StackCube-v1": _stack,
    "PlaceSphere-v1": _place,
}
