"""A policy that talks learns from rewards alone: conversations, an algorithm and its updates, with the signs they must have."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.ppo import PPO
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


def learn(folder: Path, algorithm: Any, **fields: Any) -> tuple[list[float], list[dict[str, float]]]:
    """The mean mark of each of 20 rollouts, and what their updates report."""
    policy = tiny_chat.build(tiny_chat.write(folder), max_new_tokens=6, dtype="float32", temperature=2.0, **fields)
    questions = Component("anything", Anything, Anything.Config())
    environment = ToolEnvironment(ToolEnvironment.Config(questions=questions, max_turns=1), num_envs=32, device=CPU)
    environment._ending = lambda slot, turn: "answer"  # type: ignore[method-assign]  # a random model never ends a turn
    optimization = Optimization(OptimizerConfig(lr=3e-3), policy.trainable(), 40, max_skipped=3)
    dice = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    update = RolloutUpdate(policy, algorithm, optimization, *dice, 20, 16)
    options: dict[str, Any] = {"group_size": algorithm.group_size, "auto_reset": False}
    collector = Collector([environment], decisions=1, seed=0, device=CPU, **options)  # type: ignore[list-item]
    marks, reports = [], []
    for iteration in range(20):
        rollout = collector.collect(policy, policy.value if policy.has_critic else None)
        marks.append(float(rollout.rewards_TB.mean()))
        batch, _ = update.prepare(rollout)
        reports.append(update.run(batch, iteration))
    return marks, reports


def test_rewards_raise_what_is_rewarded(tmp_path: Path) -> None:
    marks, _ = learn(tmp_path, GRPO(GRPO.Config(group_size=8, minibatches=2)))
    assert fmean(marks[-4:]) > fmean(marks[:4]) + 0.2, marks


def test_values_of_tokens_teach_what_is_rewarded_and_learn_what_it_is_worth(tmp_path: Path) -> None:
    algorithm = PPO(PPO.Config(gamma=1.0, lam=0.95, minibatches=2, value_clip=None))
    marks, reports = learn(tmp_path, algorithm, critic={"granularity": "token", "hidden": (32,)})
    losses = [report["value_loss"] for report in reports]
    assert fmean(marks[-4:]) > fmean(marks[:4]) + 0.2, marks
    assert fmean(losses[-4:]) < fmean(losses[:4]) / 2, losses
