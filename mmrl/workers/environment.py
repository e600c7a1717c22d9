"""A batched ``Environment`` of single ones that run in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrl.errors import refuse_other_actions, refuse_other_choices
from mmrl.types import Observation, Step
from mmrl.workers.board import Board
from mmrl.workers.pool import START_LIMIT, TIME_LIMIT, Call, WorkerPool
from mmrl.workers.process import Chunk, Worker


class WorkerEnvironment:
    """``num_envs`` slots in lock-step over ``workers`` processes (None: one a slot, but no more than there are processors).

    target, config: the class of one environment, ``package.module:Name`` (see SingleEnvironment), and what it is built with.
    time_limit: seconds for one action, or one reset, of all the slots of a worker. start_limit: seconds for a worker to start.

    An episode whose worker dies or hangs is lost: its slot is idle until it is reset, and says so in ``Step.lost_B``; the worker
    is replaced. A reset that a worker does not survive is tried again in its replacement.
    """

    def __init__(
        self,
        target: str,
        config: Any,
        *,
        num_envs: int,
        device: torch.device,
        workers: int | None = None,
        time_limit: float = TIME_LIMIT,
        start_limit: float = START_LIMIT,
    ) -> None:
        self.num_envs, self.device = num_envs, device
        count = min(num_envs, workers or os.cpu_count() or 1)
        parts = [part.tolist() for part in torch.arange(num_envs).tensor_split(count)]
        self._slots = parts
        self._worker_of = {slot: index for index, part in enumerate(parts) for slot in part}
        self.pool = WorkerPool(Worker, target, config, parts, time_limit=time_limit, start_limit=start_limit)
        self.description = self.pool.description
        self._board = Board(self.description, num_envs, device=device)
        self.pool.attach(self._board.name, num_envs)
        self.action_spec, self.max_steps = self.description.action_spec, self.description.max_steps
        self._low_A, self._high_A = np.array(self.action_spec.low, np.float32), np.array(self.action_spec.high, np.float32)
        self._instructions = ["-"] * num_envs  # before the first reset there is nothing to do
        self._running_B = torch.zeros(num_envs, dtype=torch.bool)
        self._held_B = torch.zeros_like(self._running_B)  # slots whose episode, over or not, a worker still holds
        self._lost_B, self._terminated_B, self._truncated_B = (torch.zeros_like(self._running_B) for _ in range(3))
        self._black = np.zeros((2, 2, 3), np.uint8)  # as large as a frame, once there was one
        self._metrics_BM = torch.zeros(num_envs, len(self.description.metrics))

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        return self.begin_reset(task_ids_B, where_B)()

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        if task_ids_B.shape != (self.num_envs,):
            raise ValueError(f"reset needs one task id per slot, shape ({self.num_envs},); got {tuple(task_ids_B.shape)}")
        chosen = range(self.num_envs) if where_B is None else where_B.nonzero()[:, 0].tolist()
        tasks = {slot: int(task_ids_B[slot]) for slot in chosen}
        for tensor in (self._running_B, self._held_B, self._lost_B, self._terminated_B, self._truncated_B):
            tensor[list(tasks)] = False
        self._metrics_BM[list(tasks)] = 0.0
        return partial(self._finish_reset, tasks, self._send_reset(tasks))

    def _send_reset(self, tasks: dict[int, int]) -> Call:
        asked = self._by_worker(list(tasks))
        arguments = {index: ({slot: tasks[slot] for slot in slots},) for index, slots in asked.items()}
        return self.pool.send("reset", arguments, units=max(map(len, asked.values()), default=1))

    def _finish_reset(self, tasks: dict[int, int], call: Call) -> Observation:
        while True:
            asked = self._by_worker(list(tasks))
            answers = self.pool.collect(call)
            for instructions in answers.values():
                for slot, sentence in instructions.items():
                    self._instructions[slot] = sentence
                    self._running_B[slot] = self._held_B[slot] = True
                    del tasks[slot]
            self._drop(set(asked) - set(answers))
            if not tasks:
                return self._observe()
            for index in self._by_worker(list(tasks)):  # lost now or before; the pool gives up if it is lost again and again
                self.pool.start(index)
            call = self._send_reset(tasks)

    def step(self, actions_BCA: Tensor) -> Step:
        return self.begin_step(actions_BCA)()

    def begin_step(self, actions_BCA: Tensor) -> Callable[[], Step]:
        refuse_other_actions(tuple(actions_BCA.shape), self.num_envs, self.action_spec.dim)
        actions = actions_BCA.detach().cpu().float().numpy()
        if self.action_spec.discrete:
            refuse_other_choices(actions[self._running_B.numpy()], self.action_spec.low, self.action_spec.high)
        actions = actions.clip(self._low_A, self._high_A)
        asked = self._by_worker(self._running_B.nonzero()[:, 0].tolist())
        arguments = {index: ({slot: actions[slot] for slot in slots},) for index, slots in asked.items()}
        units = actions.shape[1] * max(map(len, asked.values()), default=1)
        return partial(self._finish_step, asked, actions.shape[1], self.pool.send("step", arguments, units=units))

    def _finish_step(self, asked: dict[int, list[int]], count: int, call: Call) -> Step:
        rewards_BC = torch.zeros(self.num_envs, count)
        valid_BC = torch.zeros(self.num_envs, count, dtype=torch.bool)
        answers: dict[int, Chunk] = self.pool.collect(call)
        for index, chunk in answers.items():
            slots = asked[index]
            rewards_BC[slots] = torch.from_numpy(chunk.rewards_kC)
            valid_BC[slots] = torch.from_numpy(chunk.valid_kC)
            self._terminated_B[slots] = torch.from_numpy(chunk.terminated_k)
            self._truncated_B[slots] = torch.from_numpy(chunk.truncated_k)
            self._metrics_BM[slots] = torch.from_numpy(chunk.metrics_kM)
        self._running_B &= ~(self._terminated_B | self._truncated_B)
        self._drop(set(asked) - set(answers))
        metrics = {name: self._metrics_BM[:, m].to(self.device) for m, name in enumerate(self.description.metrics)}
        return Step(
            observation=self._observe(),
            rewards_BC=rewards_BC.to(self.device),
            valid_BC=valid_BC.to(self.device),
            terminated_B=self._terminated_B.to(self.device, copy=True),
            truncated_B=self._truncated_B.to(self.device, copy=True),
            metrics={name: value.clone() for name, value in metrics.items()},
            lost_B=self._lost_B.to(self.device, copy=True),
        )

    def expert_action(self) -> Tensor:
        """The scripted expert's next action in each slot that runs, 0 in the others: [B, A]."""
        actions_BA = torch.zeros(self.num_envs, self.action_spec.dim)
        for slot, action_A in self._ask_slots("expert", self._running_B.nonzero()[:, 0].tolist()).items():
            actions_BA[slot] = torch.from_numpy(action_A)
        return actions_BA.to(self.device)

    def render_video(self, index_M: Tensor) -> Tensor:
        """A frame of each of the slots ``index_M``: uint8 [M, height, width, 3]; black where no worker holds the episode."""
        wanted = index_M.tolist()
        frames = self._ask_slots("render", [slot for slot in wanted if self._held_B[slot]])
        self._black = next((np.zeros_like(frame) for frame in frames.values()), self._black)
        return torch.from_numpy(np.stack([frames.get(slot, self._black) for slot in wanted])).to(self.device)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        families = self.description.families
        return tuple(families[task % len(families)] for task in task_ids_M.tolist())

    def close(self) -> None:
        self.pool.close()
        self._board.close()

    def _by_worker(self, slots: list[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for slot in slots:
            found.setdefault(self._worker_of[slot], []).append(slot)
        return found

    def _ask_slots(self, command: str, slots: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        """Slot -> answer, of those whose worker answered."""
        asked = self._by_worker(slots)
        answers = self.pool.call(command, {index: (part,) for index, part in asked.items()}, units=max(len(slots), 1))
        self._drop(set(asked) - set(answers))
        return {slot: value for answer in answers.values() for slot, value in answer.items()}

    def _drop(self, workers: set[int]) -> None:
        """Mark the episodes that ran in these workers as lost; those that were over stay as they ended."""
        for slot in (slot for index in workers for slot in self._slots[index]):
            self._held_B[slot] = False
            if self._running_B[slot]:
                self._board.clear(slot)
                self._running_B[slot], self._lost_B[slot] = False, True

    def _observe(self) -> Observation:
        images, state_BS = self._board.read()
        return Observation(images, state_BS, tuple(self._instructions))
