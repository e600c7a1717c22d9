"""A scripted expert for tasks in which one thing is put onto or into another: the tasks of libero_object.

Works from the scene as it is, without memory, and never turns the hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrl.errors import MMRLError

Array = np.ndarray[Any, Any]
_REACH = 0.05  # metres of an action of 1, in robosuite's OSC_POSE controller
OPEN, CLOSED = -1.0, 1.0
_HOVER = 0.14  # metres above things at which they are carried, so that nothing is knocked over
_NEAR = 0.012  # metres in the plane within which the hand goes straight down
_CLEAR = 0.06  # metres above the container at which the thing is let go


def expert_action(env: Any, observation: Any) -> Array:
    """The next action [7] for a task whose objects of interest are a thing and where it belongs. ``env`` is LIBERO's."""
    names = list(env.obj_of_interest)
    if len(names) != 2 or any(f"{name}_pos" not in observation for name in names):
        raise MMRLError(
            f"there is no scripted expert for the task '{env.language_instruction}'; there is one for the tasks of libero_object"
        )
    thing, place, hand = (np.asarray(observation[f"{name}_pos"]) for name in (*names, "robot0_eef"))
    held = env.env._check_grasp(gripper=env.robots[0].gripper, object_geoms=env.env.objects_dict[names[0]])
    if np.linalg.norm((thing - place)[:2]) < 0.05:
        return _go(hand, hand + np.array([0, 0, 0.05]), OPEN)
    if held:
        apart = float(np.linalg.norm((thing - place)[:2]))
        rising = thing[2] < place[2] + _CLEAR and apart > 0.05
        aim = thing if rising else place
        return _go(thing, np.array([aim[0], aim[1], place[2] + _HOVER]), CLOSED)
    return _fetch(hand, thing)


def _fetch(hand: Array, thing: Array) -> Array:
    """Go above the thing with open fingers, down, and close them."""
    apart, above = float(np.linalg.norm((hand - thing)[:2])), float(hand[2] - thing[2])
    if apart < 2 * _NEAR and above < 0.015:
        return _go(hand, thing, CLOSED)
    if apart < _NEAR or (apart < 2 * _NEAR and above < 0.05):
        return _go(hand, thing, OPEN)
    return _go(hand, thing + np.array([0, 0, max(_HOVER / 2, min(_HOVER, apart))]), OPEN)


def _go(now: Array, then: Array, grip: float) -> Array:
    move = (then - now) / _REACH
    move = np.clip(move * 2.0, -1, 1)  # the controller falls short of small motions
    return np.concatenate([move, np.zeros(3), [grip]]).astype(np.float32)
