"""This framework's side of benchmarks/vlm_grpo.py: Collector, GRPO and RolloutUpdate around policies/qwen_vl.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vlm_grpo_parts.task import Costs, Stopwatch, Task, begin, closer, question, reward, serve

from mmrl.algorithms.grpo import GRPO
from mmrl.messages import Message
from mmrl.optim import Optimization, OptimizerConfig
from mmrl.rollout import Collector
from mmrl.types import Conversation, Observation, Step
from mmrl.updates import RolloutUpdate
from policies.qwen_vl import QwenVL


class Talks:
    """A question about a picture; after every message of the model, a part of the picture; ``turns`` messages in all."""

    action_spec: Any = None

    def __init__(self, size: int, turns: int) -> None:
        self.num_envs, self.max_steps = size, turns
        self.tasks: list[int] = []
        self.talks: list[Conversation] = []
        self.turn = 0

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        self.tasks, self.turn = task_ids_B.tolist(), 0
        opening = {task: (Message("user", question(task)),) for task in set(self.tasks)}
        self.talks = [opening[task] for task in self.tasks]
        return self._observe()

    def step(self, actions: Any) -> Step:
        said = actions.tolist()
        self.turn += 1
        over = self.turn == self.max_steps
        shown = {task: () if over else (Message("tool", (closer(task, self.turn),)),) for task in set(self.tasks)}
        self.talks = [(*talk, said[b], *shown[self.tasks[b]]) for b, talk in enumerate(self.talks)]
        marks = [reward(_said(talk)) if over else 0.0 for talk in self.talks]
        over_B, never_B = torch.full((self.num_envs,), over), torch.zeros(self.num_envs, dtype=torch.bool)
        here_B1 = torch.ones(self.num_envs, 1, dtype=torch.bool)
        return Step(self._observe(), torch.tensor(marks)[:, None], here_B1, over_B, never_B, {"success": over_B.float()})

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("talk",) * len(task_ids_M)

    def close(self) -> None:
        """Nothing is held."""

    def _observe(self) -> Observation:
        return Observation({}, None, ("",) * self.num_envs, conversations=tuple(self.talks))


def _said(talk: Conversation) -> str:
    return "".join(message.text for message in talk if message.role == "assistant")


class Side:
    """See the module."""

    def __init__(self, task: Task) -> None:
        self.task = task
        config = QwenVL.Config(checkpoint=task.checkpoint, max_new_tokens=task.tokens)
        self.policy = QwenVL(config, device=torch.device("cpu"))
        sampling = self.policy.engine.sampling
        assert sampling.forbidden is not None
        forbidden = torch.cat([sampling.forbidden, torch.tensor(sampling.ends)])
        self.policy.engine.sampling = replace(sampling, forbidden=forbidden, ends=())  # every turn has as many tokens
        if not task.keep:
            self.policy.engine.keep = lambda messages: self.policy.engine.forget()  # type: ignore[method-assign]
        algorithm: Any = GRPO(GRPO.Config(group_size=task.group))
        self.environment = Talks(task.completions, task.turns)
        environments: list[Any] = [self.environment]
        self.collector = Collector(
            environments,
            decisions=task.turns,
            seed=0,
            device=self.policy.device,
            group_size=task.group,
            auto_reset=False,
        )
        optimizer = OptimizerConfig(lr=task.lr, betas=(0.9, 0.999), weight_decay=0.0, clip_norm=1.0)
        optimization = Optimization(optimizer, self.policy.trainable(), 1000, max_skipped=1)
        dice = torch.Generator().manual_seed(0)
        self.update = RolloutUpdate(self.policy, algorithm, optimization, dice, dice, 1000)

    def step(self) -> Costs:
        with Stopwatch() as whole:
            with Stopwatch() as generating:
                rollout = self.collector.collect(self.policy)
            batch, _ = self.update.prepare(rollout)
            self.update.run(batch, 0)
        return Costs(whole.wall, whole.cpu, generating.wall, generating.cpu, int(rollout.mask_TBK.sum()))

    @property
    def prompt_tokens(self) -> int:
        talks = [(Message("user", question(task)),) for task in range(self.task.prompts)]
        return sum(len(piece) for talk in talks for piece in self.policy.ears.listen(talk)[0])


def main() -> None:
    side = Side(begin())
    parameters = sum(p.numel() for p in side.policy.parameters())
    serve(side.step, {"parameters": parameters, "prompt_tokens": side.prompt_tokens})


if __name__ == "__main__":
    main()
