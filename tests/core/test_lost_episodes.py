"""Episodes that the simulator loses: they count for nothing, are counted, and evaluation plays them again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.config import MeasuringConfig
from mmrl.data.demonstrations import record
from mmrl.errors import TrainingError
from mmrl.evaluation import EvaluationResult, evaluate
from mmrl.numerics.advantages import gae
from mmrl.numerics.draws import Draws
from mmrl.progress import Quiet
from mmrl.rollout import Collector
from mmrl.types import Decision, Observation, Rollout, ShapeError, Step
from tests.core.test_rollout import SCRIPTS, ScriptedEnvironment, ScriptedPolicy


class Losing(ScriptedEnvironment):
    """Loses the tasks of ``times`` (task -> how often) with the second decision of their episode."""

    def __init__(self, num_envs: int, times: dict[int, int], scripts: Any = SCRIPTS) -> None:
        super().__init__(scripts, num_envs)
        self.times, self.lost = dict(times), [False] * num_envs

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        for slot, chosen in enumerate([True] * self.num_envs if where_B is None else where_B.tolist()):
            self.lost[slot] &= not chosen
        return super().reset(task_ids_B, where_B)

    def step(self, actions_BCA: Tensor) -> Step:
        step = super().step(actions_BCA)
        for moment in self.seen[-1]:
            if moment.before == 2 and self.times.get(moment.task, 0) > 0:
                self.times[moment.task] -= 1
                self.lost[moment.slot] = True
        lost_B = torch.tensor(self.lost)
        return replace(
            step,
            lost_B=lost_B,
            valid_BC=step.valid_BC & ~lost_B[:, None],
            terminated_B=step.terminated_B & ~lost_B,
            truncated_B=step.truncated_B & ~lost_B,
        )


def collect(environment: Losing, **options: Any) -> Rollout:
    policy: Any = ScriptedPolicy()
    return Collector([environment], seed=0, device=torch.device("cpu"), **options).collect(policy, policy.value)


def advantages(rollout: Rollout) -> Tensor:
    flags = rollout.terminated_TB, rollout.truncated_TB
    return gae(rollout.rewards_TB, rollout.values_TBV[..., 0], rollout.next_values_TB, *flags, gamma=0.9, lam=0.8)[0]


def test_a_lost_episode_is_invalid_from_its_first_decision_and_the_slot_goes_on() -> None:
    # Slot 0: task 0 ends with its second decision, task 2 is lost with its second, task 4 starts. Slot 1: tasks 1 and 3.
    rollout = collect(Losing(2, {2: 1}), decisions=6)
    assert rollout.task_ids_TB[:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert rollout.valid_TB[:, 0].tolist() == [True, True, False, False, True, True]
    assert rollout.valid_TB[:, 1].all()
    assert rollout.lost == 1 and rollout.decisions == 10
    assert 2 not in rollout.episodes.task_ids_M.tolist()
    row = rollout.episodes.task_ids_M.tolist().index(4)
    assert float(rollout.episodes.returns_M[row]) == 5 and int(rollout.episodes.lengths_M[row]) == 4  # nothing of task 2's
    assert not rollout.rewards_TB[2:4, 0].any()
    # The episodes before and after are worth what they are worth where nothing is lost.
    alone = collect(Losing(2, {}), decisions=2)
    assert torch.equal(advantages(rollout)[:2], advantages(alone))


def test_whole_episodes_leave_the_lost_slot_out() -> None:
    rollout = collect(Losing(4, {2: 1}), decisions=9, auto_reset=False)
    assert rollout.valid_TB.any(0).tolist() == [True, True, False, True]
    assert rollout.episodes.task_ids_M.tolist() == [0, 1, 3] and rollout.lost == 1


def test_a_rollout_of_lost_episodes_alone_is_empty() -> None:
    rollout = collect(Losing(1, {0: 1}), decisions=9, auto_reset=False)
    assert rollout.decisions == 0 and rollout.lost == 1 and len(rollout.episodes.task_ids_M) == 0


def test_grpo_leaves_an_incomplete_group_out() -> None:
    scripts = [([1.0] * 3, False), ([2.0] * 4, True)]
    whole, torn = (collect(Losing(8, times, scripts), decisions=9, auto_reset=False, group_size=2) for times in ({}, {1: 1}))
    for rollout in (whole, torn):
        rollout.rewards_TB[0, ::2] += 1.0  # a spread within each group
    for scale in ("group_std", "batch_std"):
        algorithm = GRPO(GRPO.Config(group_size=2, scale=scale))  # type: ignore[arg-type]
        full, part = algorithm.advantages(whole), algorithm.advantages(torn)
        assert full.metrics["groups_incomplete"] == 0 and part.metrics["groups_incomplete"] == 0.25
        assert part.metrics["groups_without_spread"] == 0
        # Task 1 was in slots 2 and 3; both were hit, for both play it. Nothing of the group is kept.
        assert not part.keep_TB[:, 2:4].any() and part.keep_TB[:, [0, 1, 4, 5, 6, 7]].any(0).all()
    assert torch.equal(part.keep_TB[:, :2], full.keep_TB[:, :2])
    # As if the group had never been: its returns move no other group's scale.
    kept = torn.rewards_TB[:, [0, 1, 4, 5, 6, 7]].sum(0)
    assert float(part.advantages_TB[0, 0]) == pytest.approx(float((kept[0] - kept[:2].mean()) / (kept.std() + 1e-6)))


def test_demonstrations_leave_lost_episodes_out() -> None:
    class Guided(Losing):
        def expert_action(self) -> Tensor:
            return torch.zeros(self.num_envs, 1)

        def step(self, actions_BCA: Tensor) -> Step:
            return super().step(actions_BCA.expand(-1, 2, -1))

    examples = record(Guided(2, {0: 1}), torch.tensor([0, 3]), 1, only_successes=False)
    assert examples.observation.state is not None
    assert examples.observation.state[:, 0].unique().tolist() == [3]


def play(environment: Losing, episodes: int) -> EvaluationResult:
    class Still(ScriptedPolicy):
        def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
            return super().act(observation, draws, explore=True)

    policy: Any = Still()
    settings = MeasuringConfig(episodes=episodes, first_task=0)
    return evaluate(policy, environment, settings, seed=0, device=torch.device("cpu"), progress=Quiet())


def test_evaluation_plays_lost_episodes_again() -> None:
    whole, torn = play(Losing(3, {}), 7), play(Losing(3, {1: 2, 4: 1}), 7)
    assert torn.episodes == 7 and torn.lost == 0
    assert {**torn.row(), "seconds": 0} == {**whole.row(), "seconds": 0}


def test_evaluation_counts_what_it_cannot_play() -> None:
    # Tasks 0, 3 and 6 succeed after three actions, 1 and 4 run out of time after four, 2 and 5 succeed after six.
    result = play(Losing(3, {1: 99}), 7)
    assert (result.episodes, result.lost) == (6, 1)
    assert result.success == pytest.approx(5 / 6) and "(1 more were lost" in result.sentence()
    with pytest.raises(TrainingError, match=r"lost each of 2 evaluation episodes 3 times"):
        play(Losing(2, {0: 99, 1: 99}), 2)


def test_a_step_without_a_word_about_it_lost_nothing() -> None:
    environment = ScriptedEnvironment(SCRIPTS, 2)
    environment.reset(torch.tensor([0, 1]))
    step = environment.step(torch.zeros(2, 2, 1))
    assert step.lost_B.tolist() == [False, False]
    with pytest.raises(ShapeError, match="lost_B"):
        replace(step, lost_B=torch.zeros(3, dtype=torch.bool))
