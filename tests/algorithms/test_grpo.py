"""GRPO: what an episode is worth within its group, which groups are left out, and that only the group matters."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.protocols import LossContext
from mmrl.types import EpisodeRecord, Rollout


def grpo(**fields: Any) -> GRPO:
    return GRPO(GRPO.Config(**{"group_size": 4, **fields}))


def rollout(returns_B: list[float], lengths_B: list[int], success_B: list[float] | None = None) -> Rollout:
    """Episodes of the given returns (earned with the last decision) and numbers of decisions; rewards after the end are traps."""
    b, t = len(returns_B), max(lengths_B)
    valid_TB = torch.arange(t)[:, None] < torch.tensor(lengths_B)
    last_TB = torch.arange(t)[:, None] == torch.tensor(lengths_B) - 1
    rewards_TB = torch.where(last_TB, torch.tensor(returns_B, dtype=torch.float64), torch.where(valid_TB, 0.0, 99.0).double())
    success = torch.tensor(success_B if success_B is not None else [float(r > 0.5) for r in returns_B])
    zero_TB = torch.zeros(t, b)
    return Rollout(
        trace={},
        log_probs_TBK=torch.zeros(t, b, 1),
        mask_TBK=torch.ones(t, b, 1, dtype=torch.bool),
        rewards_TB=rewards_TB,
        values_TBV=zero_TB[..., None],
        next_values_TB=zero_TB,
        valid_TB=valid_TB,
        terminated_TB=last_TB,
        truncated_TB=torch.zeros(t, b, dtype=torch.bool),
        task_ids_TB=zero_TB.long(),
        episodes=EpisodeRecord(torch.arange(b), torch.tensor(returns_B), success, torch.tensor(lengths_B)),
        env_steps=int(valid_TB.sum()),
    )


MIXED = [1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0]
LENGTHS = [3, 1, 2, 3, 2, 2, 1, 3]


def test_an_episode_is_worth_its_distance_from_the_group_s_mean_in_every_decision() -> None:
    result = grpo().advantages(rollout(MIXED, LENGTHS))
    for slot, length in enumerate(LENGTHS):
        group = MIXED[slot // 4 * 4 : slot // 4 * 4 + 4]
        expected = (MIXED[slot] - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
        column = result.advantages_TB[:, slot]
        assert column[:length].tolist() == pytest.approx([expected] * length)
        assert result.keep_TB[:, slot].tolist() == [t < length for t in range(3)]
    assert result.metrics == {"groups_incomplete": 0.0, "groups_without_spread": 0.0, "groups_out_of_range": 0.0}


@pytest.mark.parametrize(("scale", "baseline"), [("batch_std", "mean"), ("none", "mean"), ("none", "leave_one_out")])
def test_scales_and_baselines(scale: str, baseline: str) -> None:
    result = grpo(scale=scale, baseline=baseline).advantages(rollout(MIXED, LENGTHS))
    for slot, value in enumerate(MIXED):
        group = MIXED[slot // 4 * 4 : slot // 4 * 4 + 4]
        others = (sum(group) - value) / 3 if baseline == "leave_one_out" else statistics.fmean(group)
        expected = (value - others) / (statistics.stdev(MIXED) + 1e-6 if scale == "batch_std" else 1.0)
        assert float(result.advantages_TB[0, slot]) == pytest.approx(expected)


def test_groups_without_spread_are_left_out_and_counted() -> None:
    returns = [1.0] * 4 + [0.0, 1.0, 0.0, 0.0] + [0.0] * 4 + [0.0, 0.0, 0.0, 1.0]
    result = grpo().advantages(rollout(returns, [2] * 16))
    assert result.keep_TB.all(0).tolist() == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4
    assert not result.keep_TB[:, :4].any()
    assert result.metrics["groups_without_spread"] == 0.5


def test_groups_whose_success_rate_is_out_of_range_are_left_out_and_counted_apart() -> None:
    # Shares of success 0.25, 0.75 and 0.5; the returns of all groups spread (a dense reward), the last group's do not.
    returns = [0.1, 0.2, 0.3, 0.9] * 3 + [0.5] * 4
    success = [0.0, 0.0, 0.0, 1.0] + [1.0, 1.0, 0.0, 1.0] + [1.0, 0.0, 0.0, 1.0] + [1.0] * 4
    result = grpo(success_range=(0.3, 0.7)).advantages(rollout(returns, [1] * 16, success))
    assert result.keep_TB[0].tolist() == [False] * 8 + [True] * 4 + [False] * 4
    assert result.metrics == {"groups_incomplete": 0.0, "groups_without_spread": 0.25, "groups_out_of_range": 0.5}
    bounds = grpo(success_range=(0.25, 0.75)).advantages(rollout(returns, [1] * 16, success))  # both belong to the range
    assert bounds.keep_TB[0].tolist() == [True] * 12 + [False] * 4


def test_turns_after_the_end_make_no_spread() -> None:
    """Every decision has a return of 1 from there on, as long as there are any."""
    result = grpo(credit="turn").advantages(rollout([1.0] * 4, [1, 2, 3, 3]))
    assert not result.keep_TB.any() and result.metrics["groups_without_spread"] == 1


def test_the_order_of_groups_and_of_episodes_within_a_group_does_not_matter() -> None:
    returns = torch.rand(16).tolist()
    lengths = torch.randint(1, 4, (16,)).tolist()
    lengths[0] = 3
    original = grpo().advantages(rollout(returns, lengths))
    order = torch.cat([torch.randperm(4) + 4 * group for group in torch.randperm(4).tolist()])
    moved = grpo().advantages(rollout([returns[i] for i in order], [lengths[i] for i in order]))
    torch.testing.assert_close(moved.advantages_TB, original.advantages_TB[:, order], rtol=1e-12, atol=1e-12)
    assert torch.equal(moved.keep_TB, original.keep_TB[:, order])


def test_groups_are_compared_alone() -> None:
    alone = grpo().advantages(rollout(MIXED[:4], LENGTHS[:4]))
    together = grpo().advantages(rollout(MIXED, LENGTHS))
    torch.testing.assert_close(alone.advantages_TB, together.advantages_TB[:, :4], rtol=1e-12, atol=1e-12)


def test_the_loss_has_no_critic_and_pulls_towards_what_did_well(case: Callable[..., Any]) -> None:
    policy, batch = case(spread=0.0, masked=False, reference=False)
    context = LossContext(units=batch.mask_NK.numel(), values=len(batch), samples=len(batch), iteration=0)
    grpo().loss(policy, batch, context).value.backward()
    log_probs_NK, _, values_N = policy.gradients()
    expected_NK: Tensor = -batch.advantages_NJ.expand_as(log_probs_NK) / batch.mask_NK.numel()
    torch.testing.assert_close(log_probs_NK, expected_NK, rtol=1e-12, atol=1e-12)
    assert not values_N.any()


def test_the_reference_is_asked_for_only_with_a_kl_term() -> None:
    assert grpo(kl_weight=0.01).uses_reference and not grpo().uses_reference
    assert grpo(kl_weight=0.01, kl_in="reward").judges_by_reference and not grpo(kl_weight=0.01).judges_by_reference


@pytest.mark.parametrize(
    "fields", [{"group_size": 1}, {"success_range": (0.7, 0.3)}, {"success_range": (0.1, 1.1)}, {"lam": 0.9}]
)
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, TypeError)):
        grpo(**fields)
