"""One gymnasium environment, and what its spaces mean to mmrl: the same for those of a batch and of a worker process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from gymnasium.wrappers import FlattenObservation

from mmrl.errors import MMRLError
from mmrl.types import ActionSpec
from simulators.gymnasium_parts.options import Options

Array = np.ndarray[Any, Any]
CAMERA = "camera"  # the name of an image observation
SUCCESS_KEYS = ("is_success", "success")  # where environments say in ``info`` whether the task is done; the first counts


@dataclass(frozen=True)
class Facts:
    """What every environment of these options has in common. success_return: None where no return is a success."""

    action_spec: ActionSpec
    max_steps: int
    success_return: float | None
    is_image: bool


def make(options: Options) -> gymnasium.Env:
    """An environment that ``facts_of`` accepts, its observations a Box. Raises MMRLError, saying what does not fit."""
    arguments: dict[str, Any] = {"render_mode": "rgb_array"} if options.render else {}
    arguments |= {} if options.max_steps is None else {"max_episode_steps": options.max_steps}
    try:
        made = gymnasium.make(options.id, **{**options.kwargs, **arguments})
        environment = made if isinstance(made.observation_space, Box) else FlattenObservation(made)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise MMRLError(f"environment.id = {options.id}: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise MMRLError(
            f"environment.kwargs = {options.kwargs} do not fit {options.id}: {' '.join(str(error).split())}"
        ) from error
    try:
        facts_of(options, environment)
    except MMRLError:
        environment.close()
        raise
    return environment


def facts_of(options: Options, environment: gymnasium.Env) -> Facts:
    """Raises MMRLError for an environment without a time limit, or with spaces that no policy could act in."""
    seen, spec = environment.observation_space, environment.spec
    if not isinstance(seen, Box):
        raise MMRLError(f"{options.id} has observations of {seen}, which have no fixed size; wrap it into one with a Box")
    limit = options.max_steps or (None if spec is None else spec.max_episode_steps)
    if limit is None:
        raise MMRLError(f"{options.id} is registered without a time limit: set environment.max_steps")
    threshold = None if spec is None else spec.reward_threshold
    return Facts(
        action_spec(environment.action_space, options.id),
        limit,
        threshold if options.success_return is None else options.success_return,
        seen.dtype == np.uint8 and len(seen.shape) == 3 and seen.shape[2] == 3,
    )


def seed_of(task: int, seed: int) -> int:
    """The seed of a task's reset: 32 bits, which every environment takes, mixed by numpy's SeedSequence."""
    return int(np.random.SeedSequence((seed, task)).generate_state(1)[0])


def action_spec(space: Space, name: str) -> ActionSpec:
    """The actions of a gymnasium space, flat. Raises MMRLError for a space of another kind; ``name`` is the environment's."""
    if isinstance(space, Discrete):
        return ActionSpec(1, (0.0,), (float(space.n) - 1,), discrete=True)
    if isinstance(space, MultiDiscrete) and len(space.shape) == 1:
        return ActionSpec(len(space.nvec), (0.0,) * len(space.nvec), tuple((space.nvec - 1.0).tolist()), discrete=True)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low, high = (bound.astype(float).ravel().tolist() for bound in (space.low, space.high))
        return ActionSpec(len(low), tuple(low), tuple(high))
    raise MMRLError(f"{name} has actions of {space}; wrap it into one with Box, Discrete or flat MultiDiscrete actions")


def native(space: Space, action_XA: Array) -> Any:
    """Actions of ours (float32 [..., A]) as an environment takes them, those of a Box clipped to its bounds."""
    if isinstance(space, Box):
        shaped = action_XA.reshape(*action_XA.shape[:-1], *space.shape)
        # In float32 first, as WorkerEnvironment does: a bound that is none in float32 comes out the same everywhere.
        rounded = np.clip(shaped, space.low.astype(np.float32), space.high.astype(np.float32))
        return np.clip(rounded.astype(space.dtype), space.low, space.high)
    whole_XA = action_XA.astype(np.int64)
    return space.start + (whole_XA[..., 0] if isinstance(space, Discrete) else whole_XA)  # type: ignore[attr-defined]
