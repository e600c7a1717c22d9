"""What runs in the process of a remote environment: a batched ``Environment``, and the methods that its parent calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmrl.errors import MMRLError
from mmrl.protocols import Environment
from mmrl.types import ActionSpec, Observation
from mmrl.workers.board import Board
from mmrl.workers.process import load
from mmrl.workers.shared import Layout, SharedArrays
from mmrl.workers.single import Description

_NESTED = "daemonic processes are not allowed to have children"  # Python's words


@dataclass(frozen=True)
class Share:
    """What a process is given. threads: torch's within an operation."""

    num_envs: int
    device: str
    threads: int


@dataclass(frozen=True)
class Outcomes:
    """What a chunk did in all slots, as ``Step`` has it; None where the instructions are those of before."""

    rewards_BC: np.ndarray[Any, Any]
    valid_BC: np.ndarray[Any, Any]
    terminated_B: np.ndarray[Any, Any]
    truncated_B: np.ndarray[Any, Any]
    lost_B: np.ndarray[Any, Any]
    metrics: dict[str, np.ndarray[Any, Any]]
    instructions: tuple[str, ...] | None


class Batch:
    """The environment ``target`` with all slots; each public method is a command of the parent's.

    A slot is held from its first reset in this process on. Where the process replaces another, the others' episodes are none of
    the parent's, and nothing of them is shown. Raises MMRLError where the environment itself wants to start processes.
    """

    def __init__(self, target: str, config: Any, share: Share) -> None:
        torch.set_num_threads(share.threads)
        self._device = torch.device(share.device)
        try:
            self._environment: Environment = load(target)(config, num_envs=share.num_envs, device=self._device)
        except AssertionError as error:
            if str(error) != _NESTED:
                raise
            raise MMRLError(
                f"{target} starts processes of its own, so it cannot be put into one; set 'collect.parts' to 1, or let it "
                "simulate within its own process"
            ) from error
        self.description = _describe(self._environment, self._device)
        self._held_B = np.zeros(share.num_envs, bool)
        self._instructions: tuple[str, ...] = ()
        self._board: Board | None = None
        self._actions: SharedArrays | None = None

    def attach(self, name: str, num_envs: int) -> None:
        self._board = Board(self.description, num_envs, name)

    def reset(self, task_ids_B: np.ndarray[Any, Any], where_B: np.ndarray[Any, Any]) -> tuple[str, ...]:
        """Start these episodes in the slots ``where_B``; the instructions of all slots."""
        tasks_B = torch.from_numpy(task_ids_B).to(self._device)
        observation = self._environment.reset(tasks_B, None if where_B.all() else torch.from_numpy(where_B).to(self._device))
        self._held_B |= where_B
        self._show(observation)
        return self._instructions

    def step(self, name: str, layout: Layout) -> Outcomes:
        """Execute the array ``actions`` of the shared memory ``name``."""
        if self._actions is None or self._actions.name != name:
            if self._actions is not None:
                self._actions.close()
            self._actions = SharedArrays(layout, name)
        step = self._environment.step(torch.from_numpy(self._actions["actions"].copy()).to(self._device))
        before = self._instructions
        self._show(step.observation)
        return Outcomes(
            step.rewards_BC.numpy(force=True),
            step.valid_BC.numpy(force=True),
            step.terminated_B.numpy(force=True),
            step.truncated_B.numpy(force=True),
            step.lost_B.numpy(force=True),
            {key: value.numpy(force=True) for key, value in step.metrics.items()},
            None if self._instructions == before else self._instructions,
        )

    def families(self, task_ids_M: np.ndarray[Any, Any]) -> tuple[str, ...]:
        return self._environment.family_of(torch.from_numpy(task_ids_M).to(self._device))

    def _show(self, observation: Observation) -> None:
        assert self._board is not None
        self._board.write_rows(observation, self._held_B)
        self._instructions = observation.instructions


def _describe(environment: Environment, device: torch.device) -> Description:
    """What it shows and measures, from the start of an episode that nobody plays: task 0 and one action, as still as can be."""
    tasks_B = torch.zeros(environment.num_envs, dtype=torch.int64, device=device)
    observation = environment.reset(tasks_B)
    state_BS = observation.state
    if state_BS is not None and state_BS.dtype != torch.float32:
        raise TypeError(f"the state is {state_BS.dtype}, but states are torch.float32 (see mmrl.types.Observation)")
    step = environment.step(_still(environment.action_spec).expand(environment.num_envs, 1, -1).to(device))
    return Description(
        environment.action_spec,
        environment.max_steps,
        cameras={camera: (image.shape[1], image.shape[2]) for camera, image in observation.images.items()},
        state_dim=0 if state_BS is None else state_BS.shape[1],
        metrics=tuple(step.metrics),
        families=(),
    )


def _still(spec: ActionSpec) -> torch.Tensor:
    """The action within the bounds that is nearest to 0: [A]."""
    return torch.zeros(spec.dim).clamp(torch.tensor(spec.low), torch.tensor(spec.high))
