"""A batched ``Environment`` that simulates in a supervised process of its own, beside the process that acts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrl.errors import refuse_other_actions
from mmrl.types import Observation, Step
from mmrl.workers.batch import Batch, Outcomes, Share
from mmrl.workers.board import Board
from mmrl.workers.pool import START_LIMIT, TIME_LIMIT, Call, WorkerPool
from mmrl.workers.shared import Layout, SharedArrays


class RemoteEnvironment:
    """The environment ``target(config, num_envs=..., device=...)``, step for step the same numbers, and no more than a collector
    needs of it: no expert, no videos.

    Observations and actions travel through shared memory, the rest - some numbers a slot - through a pipe. threads: torch's in
    the process. time_limit: seconds for an action or a reset of all slots. start_limit: seconds for the process to start.

    Should the process die or hang, it is replaced and the episodes that ran are lost: their slots are idle until they are reset,
    and say so in ``Step.lost_B``. A reset that the process does not survive is tried again in its replacement.
    """

    def __init__(
        self,
        target: str,
        config: Any,
        *,
        num_envs: int,
        device: torch.device,
        threads: int = 1,
        time_limit: float = TIME_LIMIT,
        start_limit: float = START_LIMIT,
    ) -> None:
        self.num_envs, self.device = num_envs, device
        share = Share(num_envs, str(device), threads)
        self.pool = WorkerPool(Batch, target, config, [share], time_limit=time_limit, start_limit=start_limit)
        description = self.pool.description
        self.action_spec, self.max_steps = description.action_spec, description.max_steps
        self._board = Board(description, num_envs, device=device)
        self.pool.attach(self._board.name, num_envs)
        self._actions: SharedArrays | None = None
        self._layout: Layout = {}
        self._instructions = ("-",) * num_envs  # before the first reset there is nothing to do
        self._held_B, self._terminated_B, self._truncated_B, self._lost_B = np.zeros((4, num_envs), bool)
        self._metrics = {name: np.zeros(num_envs, np.float32) for name in description.metrics}

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        return self.begin_reset(task_ids_B, where_B)()

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        if task_ids_B.shape != (self.num_envs,):
            raise ValueError(f"reset needs one task id per slot, shape ({self.num_envs},); got {tuple(task_ids_B.shape)}")
        tasks_B = task_ids_B.numpy(force=True).astype(np.int64)
        chosen_B = np.ones(self.num_envs, bool) if where_B is None else where_B.numpy(force=True).astype(bool)
        for array in (self._held_B, self._terminated_B, self._truncated_B, self._lost_B, *self._metrics.values()):
            array[chosen_B] = 0
        return partial(self._finish_reset, tasks_B, chosen_B, self.pool.send("reset", {0: (tasks_B, chosen_B)}))

    def _finish_reset(self, tasks_B: np.ndarray[Any, Any], chosen_B: np.ndarray[Any, Any], call: Call) -> Observation:
        while not (answers := self.pool.collect(call)):  # lost now or before; the pool gives up if it is lost again and again
            self._drop()
            self.pool.start(0)
            call = self.pool.send("reset", {0: (tasks_B, chosen_B)})
        self._held_B |= chosen_B
        self._tell(answers[0])
        return self._observe()

    def step(self, actions_BCA: Tensor) -> Step:
        return self.begin_step(actions_BCA)()

    def begin_step(self, actions_BCA: Tensor) -> Callable[[], Step]:
        refuse_other_actions(tuple(actions_BCA.shape), self.num_envs, self.action_spec.dim)
        name = self._hand_over(actions_BCA.numpy(force=True))
        call = self.pool.send("step", {0: (name, self._layout)}, units=actions_BCA.shape[1])
        return partial(self._finish_step, actions_BCA.shape[1], call)

    def _finish_step(self, count: int, call: Call) -> Step:
        answers: dict[int, Outcomes] = self.pool.collect(call)
        held_B = self._held_B.copy()
        if answers:
            done = answers[0]
            rewards_BC, valid_BC = done.rewards_BC, done.valid_BC & held_B[:, None]
            for ours, theirs in (
                (self._terminated_B, done.terminated_B),
                (self._truncated_B, done.truncated_B),
                (self._lost_B, done.lost_B),
            ):
                ours[held_B] = theirs[held_B]
            for name, value_B in done.metrics.items():
                self._metrics[name] = np.where(held_B, value_B, self._metrics[name]).astype(value_B.dtype)
            self._tell(done.instructions)
        else:
            self._drop()
            rewards_BC = np.zeros((self.num_envs, count), np.float32)
            valid_BC = np.zeros((self.num_envs, count), bool)
        return Step(
            observation=self._observe(),
            rewards_BC=self._tensor(np.where(held_B[:, None], rewards_BC, 0)),
            valid_BC=self._tensor(valid_BC),
            terminated_B=self._tensor(self._terminated_B),
            truncated_B=self._tensor(self._truncated_B),
            metrics={name: self._tensor(value) for name, value in self._metrics.items()},
            lost_B=self._tensor(self._lost_B),
        )

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        while not (answers := self.pool.call("families", {0: (task_ids_M.numpy(force=True),)})):
            self._drop()
            self.pool.start(0)
        return answers[0]

    def close(self) -> None:
        self.pool.close()
        self._board.close()
        if self._actions is not None:
            self._actions.close()
            self._actions = None

    def _hand_over(self, actions_BCA: np.ndarray[Any, Any]) -> str:
        """Put them where the process finds them; the name of that memory. A pipe may be full, and its reader may hang."""
        layout = {"actions": (actions_BCA.shape, actions_BCA.dtype.name)}
        if self._actions is None or layout != self._layout:
            if self._actions is not None:
                self._actions.close()
            self._actions, self._layout = SharedArrays(layout), layout
        self._actions["actions"][:] = actions_BCA
        return self._actions.name

    def _drop(self) -> None:
        """Mark the episodes that ran as lost; those that were over stay as they ended."""
        running_B = self._held_B & ~(self._terminated_B | self._truncated_B | self._lost_B)
        for slot in running_B.nonzero()[0].tolist():
            self._board.clear(slot)
        self._lost_B |= running_B
        self._held_B[:] = False

    def _tell(self, instructions: tuple[str, ...] | None) -> None:
        """Take over the sentences of the slots that are held."""
        if instructions is not None:
            rows = zip(self._held_B.tolist(), instructions, self._instructions, strict=True)
            self._instructions = tuple(theirs if held else ours for held, theirs, ours in rows)

    def _observe(self) -> Observation:
        images, state_BS = self._board.read()
        return Observation(images, state_BS, self._instructions)

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)
