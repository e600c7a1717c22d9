"""Rollouts filled up with groups worth learning from: which groups, in which order, what is counted, and that a run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.config import load
from mmrl.progress import Quiet
from mmrl.refilling import gather_rollout
from mmrl.rollout import Collector
from mmrl.trainer import resume, train
from mmrl.types import Batch, Rollout
from mmrl.updates import RolloutUpdate
from tests.core import tiny_run
from tests.core.test_lost_episodes import Losing
from tests.core.test_rollout import SCRIPTS, ScriptedEnvironment, ScriptedPolicy

G, GROUPS = 2, 3
# One script a task: of the first three tasks only the second teaches, of the next three the first two, then all.
TEACHES = [False, True, False, True, True, False, True, True, True]


class Game:
    """Six slots in two environments; a task teaches if its number says so."""

    def __init__(self, environments: list[Any] | None = None, teaches: list[bool] = TEACHES) -> None:
        self.environments = environments or [ScriptedEnvironment(SCRIPTS, n, bias=[0.0, 0.5] * (n // 2)) for n in (2, 4)]
        self.collector = Collector(
            self.environments, decisions=9, seed=0, device=torch.device("cpu"), group_size=G, auto_reset=False
        )
        self.teaches, self.played = teaches, list[Rollout]()

    def collect(self) -> Rollout:
        policy: Any = ScriptedPolicy()
        self.played.append(self.collector.collect(policy))
        return self.played[-1]

    def taught(self, rollout: Rollout) -> Tensor:
        whole_B = rollout.valid_TB.any(0).reshape(-1, G).all(1).repeat_interleave(G)
        return whole_B & torch.tensor([self.teaches[int(task) % len(self.teaches)] for task in rollout.task_ids_TB[0]])

    def gather(self, max_refills: int) -> Any:
        return gather_rollout(self.collect, self.taught, max_refills)


def test_groups_that_teach_nothing_are_replaced_until_the_rollout_is_full() -> None:
    game = Game()
    got = game.gather(5)
    assert got.rollout.task_ids_TB[0].tolist() == [1, 1, 3, 3, 4, 4]
    assert got.metrics == {"refills": 1.0, "taught_share": 0.5}
    assert game.collector.next_task == 6
    # Each slot is what was played there: rewards, scores, trace, ends, and one episode a slot, in the order of the slots.
    slots = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    for slot, (number, there) in enumerate(slots):
        part, t = game.played[number], len(game.played[number].rewards_TB)
        for name in ("rewards_TB", "values_TBV", "log_probs_TBK", "mask_TBK", "terminated_TB", "truncated_TB", "valid_TB"):
            assert torch.equal(getattr(got.rollout, name)[:t, slot], getattr(part, name)[:, there]), name
            assert not getattr(got.rollout, name)[t:, slot].any()
        assert torch.equal(got.rollout.trace["state"][:t, slot], part.trace["state"][:, there])
    assert got.rollout.episodes.task_ids_M.tolist() == [1, 1, 3, 3, 4, 4]
    torch.testing.assert_close(got.rollout.episodes.returns_M, got.rollout.rewards_TB.sum(0).float())
    # Everything that was played is counted.
    assert got.episodes.task_ids_M.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert got.env_steps == sum(part.env_steps for part in game.played) == int(got.episodes.lengths_M.sum())
    assert got.decisions == sum(part.decisions for part in game.played)
    assert got.rollout.env_steps == int(got.rollout.episodes.lengths_M.sum()) < got.env_steps


def test_groups_that_are_too_many_are_left_out() -> None:
    game = Game(teaches=[False, True, True, True, True, True])
    got = game.gather(5)
    assert got.rollout.task_ids_TB[0].tolist() == [1, 1, 2, 2, 3, 3]
    assert got.metrics == {"refills": 1.0, "taught_share": 5 / 6}


def test_a_full_rollout_is_not_refilled_and_is_the_rollout_itself() -> None:
    game, plain = Game(teaches=[True]), Game()
    got, alone = game.gather(5).rollout, plain.collect()
    assert game.collector.next_task == GROUPS
    for name in ("task_ids_TB", "rewards_TB", "values_TBV", "next_values_TB", "log_probs_TBK", "mask_TBK", "valid_TB"):
        assert torch.equal(getattr(got, name), getattr(alone, name)), name
    assert (got.env_steps, got.lost, got.decisions) == (alone.env_steps, alone.lost, alone.decisions)


@pytest.mark.parametrize(("max_refills", "kept"), [(1, [3, 3]), (2, [3, 3, 6, 6])])
def test_no_more_rounds_than_allowed(max_refills: int, kept: list[int]) -> None:
    game = Game(teaches=[False, False, False, True, False, False, True, False, False])
    got = game.gather(max_refills)
    assert got.rollout.task_ids_TB[0].tolist() == kept
    assert got.metrics["refills"] == max_refills and len(game.played) == max_refills + 1


def test_where_nothing_teaches_the_first_round_stands_for_all() -> None:
    game = Game(teaches=[False])
    got = game.gather(2)
    assert got.rollout is game.played[0] and len(got.episodes.task_ids_M) == 18
    assert got.metrics == {"refills": 2.0, "taught_share": 0.0}


def test_a_group_that_lost_an_episode_is_replaced_and_counted() -> None:
    game = Game([Losing(6, {1: 1})], teaches=[True])
    got = game.gather(3)
    assert got.rollout.task_ids_TB[0].tolist() == [0, 0, 2, 2, 3, 3]
    assert got.lost == 1 and got.rollout.lost == 0 and len(got.episodes.task_ids_M) == 11
    assert got.rollout.episodes.task_ids_M.tolist() == [0, 0, 2, 2, 3, 3]


def test_grpo_learns_from_a_refilled_rollout_as_from_any() -> None:
    algorithm = GRPO(GRPO.Config(group_size=G, max_refills=3))
    game = Game([ScriptedEnvironment([([1.0, 2.0], False)], 6, bias=[0.0, 0.0, 0.0, 1.0, 0.0, 0.0])])
    got = gather_rollout(game.collect, algorithm.taught, algorithm.max_refills)
    assert got.rollout.task_ids_TB[0].tolist() == [1, 1, 4, 4, 7, 7]  # the slots in the middle differ, round by round
    result = algorithm.advantages(got.rollout)
    assert torch.equal(result.keep_TB, got.rollout.valid_TB) and result.metrics["groups_without_spread"] == 0
    assert (result.advantages_TB[0, 1::2] > 0).all() and (result.advantages_TB[0, ::2] < 0).all()
    assert got.metrics == {"refills": 2.0, "taught_share": pytest.approx(1 / 3)}


CONFIG = """
name: refilled
threads: 1
tensorboard: false
policy: {target: policies.mlp:MLP, state_dim: 4, action_dim: 4, hidden: [8]}
environment: {target: simulators.tabletop:Tabletop, families: [reach], render: false, max_steps: {reach: 16}, tolerance: 0.2}
evaluation: {episodes: 2, num_envs: 2, videos: 0}
checkpoint: {every: 1}
stages:
  - name: improve
    algorithm: {target: mmrl.algorithms.grpo:GRPO, group_size: 4, max_refills: 3, minibatches: 2, kl_weight: 0.01, kl_in: reward}
    iterations: 4
    collect: {num_envs: 8}
    optimizer: {lr: 0.003}
"""


def test_a_resumed_run_refills_as_the_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped between the refills of its third iteration and the updates from them."""
    path = tmp_path / "refilled.yaml"
    path.write_text(CONFIG)
    whole, calls, run = train(load(path), tmp_path / "whole", Quiet()), list[int](), RolloutUpdate.run

    def stopping(self: RolloutUpdate, batch: Batch, iteration: int) -> dict[str, float]:
        calls.append(iteration)
        if calls == [0, 1, 2]:
            raise RuntimeError("the power is gone")
        return run(self, batch, iteration)

    monkeypatch.setattr(RolloutUpdate, "run", stopping)
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(load(path), tmp_path / "broken", Quiet())
    resume(tmp_path / "broken", Quiet())
    assert calls == [0, 1, 2, 2, 3]
    assert tiny_run.rows(tmp_path / "broken") == tiny_run.rows(whole)
    assert tiny_run.weights(tmp_path / "broken") == tiny_run.weights(whole)
    rows = [row for row in tiny_run.rows(whole) if row["kind"] == "train"]
    assert all(row["rollout/episodes"] == 8 * (row["rollout/refills"] + 1) for row in rows)
    assert len({row["rollout/refills"] for row in rows}) > 1 and any(row["update/updates"] for row in rows)
    assert all(row["policy/kl_reference"] != 0 for row in rows[1:] if row["update/updates"])
