"""The loss that PPO and GRPO share: clipping at its bounds, every switch against a twin of loops, and what is logged."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

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


def twin(policy: Any, batch: Batch, config: PolicyGradientConfig, worth: Callable[[int, int], float]) -> tuple[float, Tensor]:
    """The loss of the whole batch and its gradient by log-probabilities, unit by unit; ``worth(n, k)`` is a unit's advantage."""
    new, old, reference = (x.tolist() for x in (policy.log_probs_NK, batch.old_log_probs_NK, batch.reference_log_probs_NK))
    units = [[k for k in range(batch.mask_NK.shape[1]) if batch.mask_NK[n, k]] for n in range(len(batch))]
    samples, total = sum(map(bool, units)), sum(map(len, units))
    loss, gradient = 0.0, torch.zeros_like(batch.old_log_probs_NK)
    for n, k in batch.mask_NK.nonzero().tolist():
        weight = {
            "unit_mean": 1 / total,
            "sample_mean": 1 / (samples * len(units[n])),
            "constant": 1 / (samples * (config.units_per_sample or 0.0)) if config.units_per_sample else 0.0,
        }[config.reduce]
        own = math.exp(new[n][k] - old[n][k])
        mean_gap = sum(new[n][i] - old[n][i] for i in units[n]) / len(units[n])
        ratio, advantage = (math.exp(mean_gap) if config.ratio == "sequence" else own), worth(n, k)
        bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        if config.objective == "cispo":
            value, slope = -advantage * bounded * new[n][k], -advantage * bounded
        else:
            value = max(-advantage * ratio, -advantage * bounded)
            slope = -advantage * ratio if value == -advantage * ratio else 0.0
            if config.dual_clip is not None and advantage < 0 and value > -config.dual_clip * advantage:
                value, slope = -config.dual_clip * advantage, 0.0
        d = new[n][k] - reference[n][k]
        kl, kl_slope = math.exp(-d) - 1 + d, 1 - math.exp(-d)
        if config.kl_corrected:
            kl, kl_slope = own * kl, own * (kl + kl_slope)
        if config.kl_in == "loss":
            value, slope = value + config.kl_weight * kl, slope + config.kl_weight * kl_slope
        loss += weight * value
        gradient[n, k] = weight * slope
    return loss, gradient


SWITCHES: list[dict[str, Any]] = [
    {"clip_high": 0.28},
    {"reduce": "sample_mean"},
    {"reduce": "constant", "units_per_sample": 50.0},
    {"ratio": "sequence", "reduce": "sample_mean", "clip_low": 0.05, "clip_high": 0.1},
    {"ratio": "sequence", "dual_clip": 1.05, "clip_low": 0.02, "clip_high": 0.02},
    {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    {"objective": "cispo", "clip_low": 0.2, "clip_high": 0.3, "ratio": "sequence", "reduce": "constant", "units_per_sample": 7.0},
    {"kl_weight": 0.4, "reduce": "sample_mean"},
    {"kl_weight": 0.4, "reduce": "constant", "units_per_sample": 9.0},
    {"kl_weight": 0.4, "kl_corrected": True},
    {"kl_weight": 0.4, "kl_in": "reward"},
]


@pytest.mark.parametrize("fields", SWITCHES, ids=lambda fields: ", ".join(f"{k} {v}" for k, v in fields.items()))
@pytest.mark.parametrize("each", ["sample", "decision", "unit"])
def test_loss_and_gradient_equal_a_twin(each: str, fields: dict[str, Any], case: Callable[..., Any]) -> None:
    """Samples of three decisions of two units, worth the same or not; in two micro-batches."""
    policy, batch = case(n=9, k=6, j=3, spread=0.5)
    units_NK = torch.randn(9, 6, dtype=torch.float64)
    if each == "sample":
        batch = replace(batch, advantages_NJ=batch.advantages_NJ[:, :1].expand(9, 3))
    if each == "unit":
        batch = replace(batch, unit_advantages_NK=units_NK)
    config = PolicyGradientConfig(**fields)
    trained = batch.mask_NK
    context = LossContext(int(trained.sum()), int(batch.trained_NJ.sum()), int(trained.any(1).sum()), 0)
    total = 0.0
    for rows in (torch.arange(0, 4), torch.arange(4, 9)):
        part = batch.select(rows)
        loss = policy_loss(config, policy.evaluate(part.trace), part, context)
        loss.value.backward()
        total += float(loss.value.detach())
    worth = (lambda n, k: float(units_NK[n, k])) if each == "unit" else (lambda n, k: float(batch.advantages_NJ[n, k // 2]))
    wanted, gradient = twin(policy, batch, config, worth)
    assert total == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(policy.gradients()[0], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("algorithm", [PPO, GRPO, SFT])
def test_every_field_of_a_config_is_read(algorithm: Any) -> None:
    """By name, somewhere in the algorithm's module or in what it shares with others."""
    trees = [ast.parse(inspect.getsource(inspect.getmodule(part) or part)) for part in (algorithm, policy_loss)]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(algorithm.Config.__pydantic_fields__) - read == set()
