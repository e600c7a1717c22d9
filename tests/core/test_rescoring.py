"""Rollouts of an engine: the policy's own log-probabilities take the place of the engine's, which stay beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.ppo import PPO
from mmrl.types import EpisodeRecord, Evaluation, Packing, Rollout
from mmrl.updates import RolloutUpdate

T, B, K, S = 3, 4, 2, 5


class Drawn(nn.Module):
    """Scores from a matrix; an engine drew, or (``rescores`` False) did not. Counts what it is asked to score."""

    def __init__(self, rescores: bool) -> None:
        super().__init__()
        self.rescores, self.version, self.scored = rescores, 0, 0
        self.actor = nn.Linear(S, K, dtype=torch.float64)

    def compute_mode(self, *, train: bool) -> Any:
        return torch.set_grad_enabled(train)

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Any) -> Evaluation:
        self.scored += len(trace["x"])
        log_probs_NK = self.actor(trace["x"])
        return Evaluation(log_probs_NK, log_probs_NK, None)


def rollout(returns: list[float]) -> Rollout:
    """One episode a slot; that of slot 1 ends after two decisions."""
    valid_TB = torch.ones(T, B, dtype=torch.bool)
    valid_TB[2, 1] = False
    over_TB = torch.zeros(T, B, dtype=torch.bool)
    over_TB[2], over_TB[1, 1] = valid_TB[2], True
    rewards_TB = torch.zeros(T, B, dtype=torch.float64)
    rewards_TB[0] = torch.tensor(returns).double()
    zeros_TB = torch.zeros(T, B, dtype=torch.float64)
    return Rollout(
        trace={"x": torch.randn(T, B, S, dtype=torch.float64)},
        log_probs_TBK=torch.randn(T, B, K, dtype=torch.float64),
        mask_TBK=torch.ones(T, B, K, dtype=torch.bool),
        rewards_TB=rewards_TB,
        values_TBV=zeros_TB[..., None],
        next_values_TB=zeros_TB,
        valid_TB=valid_TB,
        terminated_TB=over_TB,
        truncated_TB=torch.zeros_like(over_TB),
        task_ids_TB=torch.zeros(T, B, dtype=torch.long),
        episodes=EpisodeRecord(*(torch.ones(B) for _ in range(4))),
        env_steps=T * B,
    )


def prepare(policy: Drawn, algorithm: Any, played: Rollout, micro_batch: int | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    update = RolloutUpdate(policy, algorithm, None, generator, generator, 1, micro_batch)  # type: ignore[arg-type]
    return update.prepare(played)[0]


def expected(policy: Drawn, played: Rollout) -> tuple[Tensor, Tensor]:
    """The policy's and the engine's log-probabilities of each valid decision, one by one."""
    places = played.valid_TB.nonzero().tolist()
    own = [policy.actor(played.trace["x"][t, b]).detach() for t, b in places]  # type: ignore[index]
    return torch.stack(own), torch.stack([played.log_probs_TBK[t, b] for t, b in places])


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_policy_s_own_log_probs_take_the_place_of_the_engine_s(micro_batch: int | None) -> None:
    policy, played = Drawn(True), rollout([1.0, 0.0, 2.0, 1.0])
    batch = prepare(policy, PPO(PPO.Config()), played, micro_batch)
    own_NK, engine_NK = expected(policy, played)
    torch.testing.assert_close(batch.old_log_probs_NK, own_NK, rtol=1e-12, atol=1e-12)
    assert torch.equal(batch.engine_log_probs_NK, engine_NK) and not batch.old_log_probs_NK.requires_grad
    assert policy.scored == len(engine_NK)


def test_a_policy_that_draws_itself_is_not_asked_again() -> None:
    policy, played = Drawn(False), rollout([1.0, 0.0, 2.0, 1.0])
    batch = prepare(policy, PPO(PPO.Config()), played)
    assert policy.scored == 0 and batch.engine_log_probs_NK is None
    assert torch.equal(batch.old_log_probs_NK, expected(policy, played)[1])


def test_groups_that_teach_nothing_are_not_scored() -> None:
    policy, played = Drawn(True), rollout([1.0, 0.0, 2.0, 2.0])  # the second group has no spread
    batch = prepare(policy, GRPO(GRPO.Config(group_size=2)), played)
    assert policy.scored == len(batch) == 5
    own_NK, engine_NK = expected(policy, replace(played, valid_TB=played.valid_TB & torch.tensor([True, True, False, False])))
    torch.testing.assert_close(batch.old_log_probs_NK, own_NK, rtol=1e-12, atol=1e-12)
    assert torch.equal(batch.engine_log_probs_NK, engine_NK)


def test_a_kl_among_the_rewards_is_the_policy_s() -> None:
    """Not the engine's: it is counted after the policy was asked."""
    policy, played = Drawn(True), rollout([1.0, 0.0, 2.0, 2.0])
    algorithm = PPO(PPO.Config(kl_weight=0.5, kl_in="reward", kl_kind="k1"))
    seen: list[Rollout] = []
    advantages = algorithm.advantages
    algorithm.advantages = lambda given: (seen.append(given), advantages(given))[1]  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    RolloutUpdate(policy, algorithm, None, generator, generator, 1, reference=Drawn(False)).prepare(played)  # type: ignore[arg-type]
    own_NK, engine_NK = expected(policy, played)
    torch.testing.assert_close(seen[0].log_probs_TBK[played.valid_TB], own_NK, rtol=1e-12, atol=1e-12)
    assert seen[0].engine_log_probs_TBK is not None and torch.equal(seen[0].engine_log_probs_TBK[played.valid_TB], engine_NK)
