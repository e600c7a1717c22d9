"""The loss that PPO and GRPO share: clipping at its bounds, the KL estimators, ratios per decision, and what is logged."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.policy_gradient import PolicyGradientConfig, policy_loss
from mmrl.algorithms.ppo import PPO
from mmrl.algorithms.sft import SFT
from mmrl.protocols import LossContext
from mmrl.types import Batch, Evaluation


def one_unit(ratio: float, advantage: float, **fields: Any) -> tuple[float, float]:
    """(loss, gradient of the log-probability) of a single unit."""
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    batch = Batch({}, zero, torch.ones(1, 1, dtype=torch.bool), torch.tensor([[advantage]]).double(), zero, zero)
    loss = policy_loss(PolicyGradientConfig(**fields), Evaluation(new, zero, None), batch, LossContext(1, 1, 1, 0))
    loss.value.backward()
    assert new.grad is not None
    return float(loss.value.detach()), float(new.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2 * 1.3, 0.0),  # far enough: earns nothing further
        (0.5, 2.0, -1.0, -1.0),  # the wrong way: pulled back however far
        (0.5, -2.0, 2 * 0.9, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipping_at_both_bounds(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert one_unit(ratio, advantage, clip_low=0.1, clip_high=0.3) == pytest.approx((loss, gradient))


def test_the_dual_clip_bounds_the_loss_of_negative_advantages_alone() -> None:
    assert one_unit(10.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
    assert one_unit(2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 4.0))
    assert one_unit(10.0, 2.0, dual_clip=3.0) == one_unit(10.0, 2.0)


ESTIMATES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}


@pytest.mark.parametrize("kind", ESTIMATES)
def test_the_kl_term(kind: Any, case: Callable[..., Any]) -> None:
    policy, batch = case()
    context = LossContext(int(batch.mask_NK.sum()), len(batch), len(batch), 0)
    scored = policy.evaluate(batch.trace)
    config = PolicyGradientConfig(kl_weight=0.7, kl_kind=kind)
    loss = policy_loss(config, scored, batch, context)
    without = policy_loss(PolicyGradientConfig(), scored, batch, context)
    gaps = (policy.log_probs_NK - batch.reference_log_probs_NK)[batch.mask_NK].tolist()
    expected = sum(ESTIMATES[kind](gap) for gap in gaps) / len(gaps)
    assert float(loss.metrics["kl_reference"]) == pytest.approx(expected)
    assert float((loss.value - without.value).detach()) == pytest.approx(0.7 * expected)


def test_a_sequence_s_ratio_is_the_geometric_mean_over_its_units(case: Callable[..., Any]) -> None:
    policy, batch = case(n=9, k=4)
    config = PolicyGradientConfig(ratio="sequence", reduce="sample_mean", clip_low=1e-6, clip_high=1e6)
    samples = int(batch.mask_NK.any(1).sum())
    loss = policy_loss(config, policy.evaluate(batch.trace), batch, LossContext(int(batch.mask_NK.sum()), samples, samples, 0))
    total, ratios = 0.0, []
    for n in range(len(batch)):
        gaps = (policy.log_probs_NK - batch.old_log_probs_NK)[n][batch.mask_NK[n]].tolist()
        if gaps:
            ratios.append(math.exp(sum(gaps) / len(gaps)))
            advantage = float(batch.advantages_NJ[n])
            total += max(-advantage * ratios[-1], -advantage * max(ratios[-1], 1 - 1e-6))
    assert float(loss.value.detach()) == pytest.approx(total / samples)
    assert float(loss.metrics["ratio_min"]) == pytest.approx(min(ratios))
    assert float(loss.metrics["ratio_max"]) == pytest.approx(max(ratios))


def test_what_is_logged(case: Callable[..., Any]) -> None:
    policy, batch = case(n=30, spread=0.4)
    context = LossContext(int(batch.mask_NK.sum()), len(batch), len(batch), 0)
    metrics = policy_loss(PolicyGradientConfig(), policy.evaluate(batch.trace), batch, context).metrics
    gaps = (policy.log_probs_NK - batch.old_log_probs_NK)[batch.mask_NK].tolist()
    assert float(metrics["ratio_min"]) == pytest.approx(math.exp(min(gaps)))
    assert float(metrics["ratio_max"]) == pytest.approx(math.exp(max(gaps)))
    assert float(metrics["approx_kl"]) == pytest.approx(sum(math.expm1(gap) - gap for gap in gaps) / len(gaps))
    assert float(metrics["log_prob_gap"]) == pytest.approx(sum(map(abs, gaps)) / len(gaps))
    assert float(metrics["log_prob_gap_max"]) == pytest.approx(max(map(abs, gaps)))
    assert float(metrics["entropy"]) == pytest.approx(float(policy.entropy_NK.detach()[batch.mask_NK].mean()))
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("algorithm", [PPO, GRPO, SFT])
def test_every_field_of_a_config_is_read(algorithm: Any) -> None:
    """By name, somewhere in the algorithm's module or in what it shares with others."""
    trees = [ast.parse(inspect.getsource(inspect.getmodule(part) or part)) for part in (algorithm, policy_loss)]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(algorithm.Config.__pydantic_fields__) - read == set()
