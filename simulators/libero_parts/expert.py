"""A scripted expert for tasks in which one thing is put into another: libero_object.

Works from the scene as it is, without memory, and never turns the hand: for cans and small boxes, not for bottles and cartons.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrl.errors import MMRLError

Array = np.ndarray[Any, Any]
_REACH = 0.05  # metres of an action of 1, in robosuite's OSC_POSE controller
OPEN, CLOSED = -1.0, 1.0
_HOVER = 0.14  # metres above a thing from which the hand goes straight down
_CARRY = 0.26  # metres above the container at which a thing is carried and let go: over its rim
_OVER = 0.03  # metres in the plane from the container's middle at which it is let go
_NEAR = 0.012  # metres in the plane within which the hand goes straight down


def expert_action(env: Any, observation: Any) -> Array:
    """The next action [7] for a task whose objects of interest are a thing and where it belongs. ``env`` is LIBERO's."""
    names = list(env.obj_of_interest)
    if len(names) != 2 or any(f"{name}_pos" not in observation for name in names):
        raise MMRLError(
            f"there is no scripted expert for the task '{env.language_instruction}'; there is one for the tasks of libero_object"
        )
    thing, place, hand = (np.asarray(observation[f"{name}_pos"]) for name in (*names, "robot0_eef"))
    held = env.env._check_grasp(gripper=env.robots[0].gripper, object_geoms=env.env.objects_dict[names[0]])
    apart = float(np.linalg.norm((thing - place)[:2]))
    if apart < _OVER:
        return _go(hand, hand + np.array([0, 0, 0.03]), OPEN)
    if held:
        rising = thing[2] < place[2] + 0.8 * _CARRY
        aim = thing if rising else place
        return _go(thing, np.array([aim[0], aim[1], place[2] + _CARRY]), CLOSED)
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
