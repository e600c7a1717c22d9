"""Truncated importance sampling between the engine that draws and the policy that learns: twins of loops, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.algorithms.policy_gradient import PolicyGradientConfig, policy_loss
from mmrl.numerics.losses import importance_weights
from mmrl.protocols import LossContext
from mmrl.types import Batch

CONTEXT = LossContext(20, 5, 7, 0)


def weight(batch: Batch, n: int, k: int, kind: str, cap: float) -> float:
    assert batch.engine_log_probs_NK is not None
    old, engine, mask = batch.old_log_probs_NK[n].tolist(), batch.engine_log_probs_NK[n].tolist(), batch.mask_NK[n].tolist()
    if kind == "token":
        return min(math.exp(old[k] - engine[k]), cap)
    product = 1.0
    for p, q, kept in zip(old, engine, mask, strict=True):
        product *= math.exp(p - q) if kept else 1.0
    return min(product, cap)


@pytest.fixture
def drawn(case: Callable[..., Any]) -> Callable[..., tuple[Any, Batch]]:
    """A case whose units an engine drew; what is not trained has no number there."""

    def make(spread: float = 0.4, **options: Any) -> tuple[Any, Batch]:
        policy, batch = case(n=9, k=6, j=3, spread=0.5, **options)
        engine_NK = batch.old_log_probs_NK + spread * torch.randn(9, 6, dtype=torch.float64)
        return policy, replace(batch, engine_log_probs_NK=torch.where(batch.mask_NK, engine_NK, torch.nan))

    return make


def total(policy: Any, batch: Batch, config: PolicyGradientConfig) -> tuple[float, Tensor]:
    """The loss, in two micro-batches, and its gradient by log-probabilities."""
    policy.log_probs_NK.grad, value = None, 0.0
    for rows in (torch.arange(0, 4), torch.arange(4, 9)):
        part = batch.select(rows)
        loss = policy_loss(config, policy.evaluate(part.trace), part, CONTEXT)
        loss.value.backward()
        value += float(loss.value.detach())
    return value, policy.gradients()[0]


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("cap", [1.0, 1.3, 50.0])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_loss_and_gradient_equal_a_twin(kind: Any, cap: float, objective: Any, drawn: Callable[..., Any]) -> None:
    policy, batch = drawn()
    config = PolicyGradientConfig(importance=kind, importance_cap=cap, objective=objective, clip_low=0.1, clip_high=0.2)
    value, gradient_NK = total(policy, batch, config)
    expected, slopes_NK = 0.0, torch.zeros(9, 6, dtype=torch.float64)
    for n, k in batch.mask_NK.nonzero().tolist():
        new, old = float(policy.log_probs_NK[n, k].detach()), float(batch.old_log_probs_NK[n, k])
        advantage, ratio = float(batch.advantages_NJ[n, k // 2]), math.exp(new - old)
        bounded = min(max(ratio, 0.9), 1.2)
        if objective == "cispo":
            loss, slope = -advantage * bounded * new, -advantage * bounded
        else:
            loss = max(-advantage * ratio, -advantage * bounded)
            slope = -advantage * ratio if loss == -advantage * ratio else 0.0
        w = weight(batch, n, k, kind, cap)
        expected += w * loss / CONTEXT.units
        slopes_NK[n, k] = w * slope / CONTEXT.units
    assert value == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(gradient_NK, slopes_NK, rtol=1e-9, atol=1e-12)


def test_none_leaves_the_loss_as_it_is_and_logs_the_gap(drawn: Callable[..., Any]) -> None:
    policy, batch = drawn()
    without = total(policy, replace(batch, engine_log_probs_NK=None), PolicyGradientConfig())
    value, gradient_NK = total(policy, batch, PolicyGradientConfig(importance="none"))
    assert value == without[0] and torch.equal(gradient_NK, without[1])
    metrics = policy_loss(PolicyGradientConfig(importance="none"), policy.evaluate(batch.trace), batch, CONTEXT).metrics
    gaps = (batch.old_log_probs_NK - batch.engine_log_probs_NK)[batch.mask_NK].abs().tolist()
    assert float(metrics["engine_gap"]) == pytest.approx(sum(gaps) / len(gaps))
    assert float(metrics["engine_gap_max"]) == pytest.approx(max(gaps))
    assert float(metrics["engine_weight"]) == 1 and float(metrics["engine_capped"]) == 0


def test_what_is_logged(drawn: Callable[..., Any]) -> None:
    policy, batch = drawn()
    config = PolicyGradientConfig(importance="token", importance_cap=1.2)
    metrics = policy_loss(config, policy.evaluate(batch.trace), batch, CONTEXT).metrics
    weights = [weight(batch, n, k, "token", 1.2) for n, k in batch.mask_NK.nonzero().tolist()]
    capped = [w for w in weights if w == 1.2]
    assert 0 < len(capped) < len(weights)
    assert float(metrics["engine_capped"]) == pytest.approx(len(capped) / len(weights))
    assert float(metrics["engine_weight"]) == pytest.approx(sum(weights) / len(weights))


def test_the_kl_and_the_entropy_are_not_weighed(drawn: Callable[..., Any]) -> None:
    """They are the policy's own, averaged as before."""
    policy, batch = drawn()
    nothing = replace(batch, advantages_NJ=torch.zeros_like(batch.advantages_NJ))
    config = PolicyGradientConfig(kl_weight=0.5, entropy_weight=0.1, importance="sequence", importance_cap=1.1)
    alone = total(policy, replace(nothing, engine_log_probs_NK=None), config)
    weighed = total(policy, nothing, config)
    assert weighed[0] == alone[0] and torch.equal(weighed[1], alone[1])


def test_a_policy_that_draws_itself_logs_no_engine(case: Callable[..., Any]) -> None:
    policy, batch = case()
    metrics = policy_loss(PolicyGradientConfig(), policy.evaluate(batch.trace), batch, CONTEXT).metrics
    assert not [name for name in metrics if name.startswith("engine")]


def test_weights_bring_an_engine_s_mean_to_the_policy_s() -> None:
    """E_q[min(p / q, cap) f] is E_p[f] but for what the cap takes away."""
    p, q, f = (
        torch.tensor([0.5, 0.3, 0.2]).double(),
        torch.tensor([0.2, 0.4, 0.4]).double(),
        torch.tensor([1.0, -2.0, 4.0]).double(),
    )
    ones = torch.ones(3, 1, dtype=torch.bool)
    free, capped = (
        importance_weights(p.log()[:, None], q.log()[:, None], ones, kind="token", cap=cap)[:, 0] for cap in (9.0, 1.5)
    )
    assert float((q * free * f).sum()) == pytest.approx(float((p * f).sum()))
    assert capped.tolist() == pytest.approx([1.5, 0.75, 0.5])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'word' is unknown; use one of none, sequence, token"):
        importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), kind="word", cap=2.0)
