"""Any gymnasium environment by id, vectorised by gymnasium's own ``SyncVectorEnv`` or ``AsyncVectorEnv``.

A task id becomes the seed of its episode's reset, so an episode is the same in any slot. gymnasium restarts an environment by
itself at the step after its end; what it shows from then on is ignored until the slot is reset here.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.vector.utils import create_empty_array
from gymnasium.wrappers import FlattenObservation
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.errors import ActionError, MMRLError, refuse_other_actions
from mmrl.types import ActionSpec, Observation, Step
from mmrl.workers.process import die_with_the_parent

CAMERA = "camera"  # the name of an image observation
_SUCCESS_KEYS = ("is_success", "success")  # where environments say in ``info`` whether the task is done
_VECTORS = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}


class Gymnasium:
    """See the module. Built as ``Gymnasium(config, num_envs=8, device=torch.device("cpu"))``.

    Observations: a Box of uint8 [height, width, 3] is the image ``camera``, every other Box the ``state``, flat, float32 [B, S];
    other spaces go through gymnasium's FlattenObservation (Discrete becomes one-hot). Actions: Box, clipped to its bounds as
    CleanRL does; Discrete and MultiDiscrete, as whole numbers from 0. Metrics: success (see ``success_return``).
    """

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``simulators.gymnasium:Gymnasium`` block."""

        id: str = "CartPole-v1"
        """As gymnasium.make takes it; 'package:Name-v0' first imports the package that registers it."""
        kwargs: dict[str, Any] = field(default_factory=dict)
        """Further arguments of gymnasium.make."""
        vectorization: Literal["sync", "async"] = "sync"
        """sync: one environment after the other in this process; async: each in a process of its own, for slow ones. gymnasium
        replaces none that dies: the run ends then. With collect.parts above 1 sync has processes too, which are replaced."""
        time_limit: float = Field(default=120.0, gt=0)
        """async: seconds that an action or a reset of all environments may take, before the run ends."""
        seed: int = Field(default=0, ge=0)
        """Another seed gives other episodes for the same task ids."""
        max_steps: int | None = Field(default=None, gt=0)
        """Actions until truncation; null: as many as the environment is registered with."""
        instruction: str | None = None
        """What the policy is told to do; null: the id."""
        success_return: float | None = None
        """Return at which an episode becomes a success, where the environment does not report is_success or success itself;
        null: the reward threshold it is registered with (without one nothing is a success)."""
        render: bool = False
        """Whether episodes can be filmed (render_mode 'rgb_array')."""

    def __init__(self, config: Config, *, num_envs: int, device: torch.device) -> None:
        self.config, self.num_envs, self._device = config, num_envs, device
        self._vector = _make_vector(config, num_envs)
        spec = self._vector.get_attr("spec")[0]
        limit = config.max_steps or (None if spec is None else spec.max_episode_steps)
        if limit is None:
            self.close()
            raise MMRLError(f"{config.id} is registered without a time limit: set environment.max_steps")
        self.max_steps = limit
        threshold = None if spec is None else spec.reward_threshold
        self._success_return = threshold if config.success_return is None else config.success_return
        self._space = self._vector.single_action_space
        try:
            self.action_spec = action_spec(self._space, config.id)
        except MMRLError:
            self.close()
            raise
        self._is_image = _is_image(self._vector.single_observation_space)
        self._seen: Any = create_empty_array(self._vector.single_observation_space, num_envs)  # of each slot's own episode
        self._return_B = np.zeros(num_envs)
        self._terminated_B, self._truncated_B = np.zeros(num_envs, bool), np.ones(num_envs, bool)
        self._success_B = np.zeros(num_envs, bool)
        if config.render:
            self.render_video = self._frames  # without it this is no RenderEnvironment

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        """Start these episodes in the slots where ``where_B`` is True (None: all); observations of all slots."""
        if task_ids_B.shape != (self.num_envs,):
            raise ValueError(f"reset needs one task id per environment, shape ({self.num_envs},); got {tuple(task_ids_B.shape)}")
        chosen_B = np.ones(self.num_envs, bool) if where_B is None else where_B.cpu().numpy().astype(bool)
        if chosen_B.any():
            seeds = [seed_of(task, self.config.seed) for task in task_ids_B.tolist()]
            seen, _ = self._ask("reset", seed=seeds, options={"reset_mask": chosen_B.copy()})
            self._seen[chosen_B] = seen[chosen_B]
            for state in (self._return_B, self._terminated_B, self._truncated_B, self._success_B):
                state[chosen_B] = 0
        return self._observe()

    def step(self, actions_BCA: Tensor) -> Step:
        """Execute C actions per slot. Slots that are done ignore actions. Raises ValueError for what is no action."""
        refuse_other_actions(tuple(actions_BCA.shape), self.num_envs, self.action_spec.dim)
        rewards, valid = [], []
        for action_BA in actions_BCA.detach().cpu().double().numpy().swapaxes(0, 1):
            alive_B = ~(self._terminated_B | self._truncated_B)
            rewards.append(self._advance(action_BA, alive_B) if alive_B.any() else np.zeros(self.num_envs))
            valid.append(alive_B)
        return Step(
            observation=self._observe(),
            rewards_BC=self._tensor(np.stack(rewards, 1), torch.float32),
            valid_BC=self._tensor(np.stack(valid, 1)),
            terminated_B=self._tensor(self._terminated_B),
            truncated_B=self._tensor(self._truncated_B),
            metrics={"success": self._tensor(self._success_B, torch.float32)},
        )

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return (self.config.id,) * len(task_ids_M)

    def close(self) -> None:
        self._vector.close()

    def _ask(self, command: str, *arguments: Any, **options: Any) -> Any:
        """What gymnasium's ``command`` (reset, step, call) gives. Raises MMRLError where a process of ``async`` died or hangs."""
        vector = self._vector
        if isinstance(vector, SyncVectorEnv):
            return getattr(vector, command)(*arguments, **options)
        try:
            getattr(vector, f"{command}_async")(*arguments, **options)
            return getattr(vector, f"{command}_wait")(timeout=self.config.time_limit)
        except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
            for process in vector.processes:
                process.kill()
            vector._state = AsyncState.DEFAULT  # closing would wait for answers
            vector.close(terminate=True)
            hung = isinstance(error, multiprocessing.TimeoutError)
            what = f"took more than {self.config.time_limit:g} seconds ('environment.time_limit')" if hung else "died"
            raise MMRLError(
                f"a process of {self.config.id} {what} in '{command}', and gymnasium replaces none; set "
                "environment.vectorization to 'sync' and collect.parts to 2 or more for processes that are replaced"
            ) from error

    def _advance(self, action_BA: np.ndarray, alive_B: np.ndarray) -> np.ndarray:
        """One action in every slot that is not done; the rewards [B]."""
        seen, reward_B, terminated_B, truncated_B, info = self._ask("step", self._native(action_BA, alive_B))
        reward_B = np.where(alive_B, reward_B, 0.0)
        self._seen[alive_B] = seen[alive_B]
        self._return_B += reward_B
        self._terminated_B |= alive_B & terminated_B
        self._truncated_B |= alive_B & truncated_B & ~terminated_B
        self._success_B = np.where(alive_B, self._judge(info), self._success_B)
        return reward_B

    def _native(self, action_BA: np.ndarray, alive_B: np.ndarray) -> Any:
        """The actions as the environments take them; slots that are done get one that is valid."""
        low_A, high_A = np.array(self.action_spec.low), np.array(self.action_spec.high)
        action_BA = np.where(alive_B[:, None], action_BA, np.clip(0.0, low_A, high_A))
        if isinstance(self._space, Box):
            shape = (self.num_envs, *self._space.shape)
            return np.clip(action_BA, low_A, high_A).reshape(shape).astype(self._space.dtype)
        if ((action_BA < low_A) | (action_BA > high_A) | (action_BA != np.round(action_BA))).any():
            raise ActionError(
                f"actions of {self.config.id} are whole numbers from {low_A.tolist()} to {high_A.tolist()}; give the policy "
                "these choices ('policy.choices' of an MLP)"
            )
        whole_BA = action_BA.astype(np.int64)
        return self._space.start + (whole_BA[:, 0] if isinstance(self._space, Discrete) else whole_BA)  # type: ignore[attr-defined]

    def _judge(self, info: Mapping[str, Any]) -> np.ndarray:
        for key in _SUCCESS_KEYS:
            if key in info:
                return np.asarray(info[key]).astype(bool) & info[f"_{key}"]
        reached = -np.inf if self._success_return is None else self._return_B - self._success_return
        return np.broadcast_to(reached >= 0, (self.num_envs,))

    def _observe(self) -> Observation:
        sentences = (self.config.instruction or self.config.id,) * self.num_envs
        if self._is_image:
            return Observation({CAMERA: self._tensor(self._seen)}, None, sentences)
        return Observation({}, self._tensor(self._seen.reshape(self.num_envs, -1), torch.float32), sentences)

    def _tensor(self, array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """A copy, so that nothing changes what was handed out."""
        return torch.tensor(array, dtype=dtype, device=self._device)

    def _frames(self, index_M: Tensor) -> Tensor:
        """A frame of each of the slots ``index_M``: uint8 [M, height, width, 3]."""
        if isinstance(self._vector, SyncVectorEnv):
            frames: Any = [self._vector.envs[i].render() for i in index_M.tolist()]
        else:
            rendered = self._ask("call", "render")
            frames = [rendered[i] for i in index_M.tolist()]
        return torch.from_numpy(np.stack(frames))


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


def _is_image(space: Space) -> bool:
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def _make(config: Gymnasium.Config, builder: int) -> gymnasium.Env:
    """``builder``: the id of the process that holds the vector of environments."""
    if os.getpid() != builder:  # in a process of gymnasium's own, which would stay if it hung
        die_with_the_parent(builder)
    arguments: dict[str, Any] = {"render_mode": "rgb_array"} if config.render else {}
    arguments |= {} if config.max_steps is None else {"max_episode_steps": config.max_steps}
    environment = gymnasium.make(config.id, **{**config.kwargs, **arguments})
    return environment if isinstance(environment.observation_space, Box) else FlattenObservation(environment)


def _make_vector(config: Gymnasium.Config, num_envs: int) -> Any:
    try:
        vector = _VECTORS[config.vectorization]([partial(_make, config, os.getpid())] * num_envs, copy=False)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise MMRLError(f"environment.id = {config.id}: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError, NotImplementedError) as error:
        raise MMRLError(f"environment.kwargs = {config.kwargs} do not fit {config.id}: {' '.join(str(error).split())}") from error
    if not isinstance(vector.single_observation_space, Box):
        space = vector.single_observation_space
        vector.close()
        raise MMRLError(f"{config.id} has observations of {space}, which have no fixed size; wrap it into one with a Box")
    return vector
