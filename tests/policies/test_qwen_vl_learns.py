"""A policy that talks learns from rewards alone: conversations, GRPO and its updates together, with the signs they must have."""

from __future__ import annotations

from pathlib import Path

import torch

from mmrl.algorithms.grpo import GRPO
from mmrl.component import Component
from mmrl.optim import Optimization, OptimizerConfig
from mmrl.rollout import Collector
from mmrl.tool_use import ToolEnvironment
from mmrl.transcripts import Question
from mmrl.updates import RolloutUpdate
from tests.policies import tiny_chat

CPU = torch.device("cpu")


def even(text: str) -> float:
    """The share of characters whose code is even."""
    return sum(ord(sign) % 2 == 0 for sign in text) / len(text) if text else 0.0


class Anything:
    """Whatever is said is marked by ``even``."""

    class Config:
        """No fields."""

    def __init__(self, config: Config) -> None: ...

    def question(self, task_id: int) -> Question:
        return Question("any", (tiny_chat.picture(task_id % 5), f"Say {task_id % 7}."), ("bdfh",), even)


def test_rewards_raise_what_is_rewarded(tmp_path: Path) -> None:
    policy = tiny_chat.build(tiny_chat.write(tmp_path), max_new_tokens=6, dtype="float32", temperature=2.0)
    questions = Component("anything", Anything, Anything.Config())
    environment = ToolEnvironment(ToolEnvironment.Config(questions=questions, max_turns=1), num_envs=32, device=CPU)
    environment._ending = lambda slot, turn: "answer"  # type: ignore[method-assign]  # a random model never ends a turn
    algorithm = GRPO(GRPO.Config(group_size=8, minibatches=2))
    optimization = Optimization(OptimizerConfig(lr=3e-3), policy.trainable(), 40, max_skipped=3)
    dice = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    update = RolloutUpdate(policy, algorithm, optimization, *dice, 20, 16)
    collector = Collector([environment], decisions=1, seed=0, device=CPU, group_size=8, auto_reset=False)  # type: ignore[list-item]
    marks = []
    for iteration in range(20):
        rollout = collector.collect(policy)
        marks.append(float(rollout.rewards_TB.mean()))
        batch, _ = update.prepare(rollout)
        update.run(batch, iteration)
    assert sum(marks[-4:]) / 4 > sum(marks[:4]) / 4 + 0.2, marks
