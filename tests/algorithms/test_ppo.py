"""PPO against twins written with loops and python's floats, and the gradient that each of its terms leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.algorithms.ppo import PPO
from mmrl.protocols import LossContext
from mmrl.types import Batch, EpisodeRecord, Rollout


def ppo(**fields: Any) -> PPO:
    return PPO(PPO.Config(**fields))


def context_of(batch: Batch, iteration: int = 0) -> LossContext:
    units, values, samples = (int(mask.sum()) for mask in (batch.mask_NK, batch.trained_NV, batch.mask_NK.any(1)))
    return LossContext(units, values, samples, iteration)


def rollout(t: int, b: int, k: int = 1, v: int = 1) -> Rollout:
    """Random numbers, with ends of both kinds, decisions that do not count, and some of no to k units; v values a decision."""
    kind_TB = torch.randint(0, 4, (t, b))
    nothing = torch.zeros(0)
    values_TBV, last_TB = torch.randn(t, b, v, dtype=torch.float64), torch.randn(t, b, dtype=torch.float64)
    following_TB = torch.cat([values_TBV[1:, :, 0], last_TB[-1:]])
    return Rollout(
        trace={},
        log_probs_TBK=torch.randn(t, b, k, dtype=torch.float64),
        mask_TBK=torch.arange(k) < torch.randint(int(k == 1), k + 1, (t, b, 1)),
        rewards_TB=torch.randn(t, b, dtype=torch.float64),
        values_TBV=values_TBV,
        next_values_TB=torch.where((kind_TB == 1) | (kind_TB == 2), last_TB, following_TB),
        valid_TB=torch.rand(t, b) < 0.8,
        terminated_TB=kind_TB == 1,
        truncated_TB=kind_TB == 2,
        task_ids_TB=torch.zeros(t, b, dtype=torch.long),
        episodes=EpisodeRecord(nothing.long(), nothing, nothing, nothing.long()),
        env_steps=0,
    )


def valued(r: Rollout) -> Tensor:
    """Which values are learned from: of decisions that count and have a unit, or of such units."""
    there_TBK = r.mask_TBK & r.valid_TB[..., None]
    return there_TBK if r.values_TBV.shape[2] > 1 else there_TBK.any(2, keepdim=True)


def naive_advantages(r: Rollout, gamma: float, lam: float, earned_TBV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """By the definition: a sum of discounted errors to the end of the trace, for every decision, or unit, on its own.

    A decision that counts for nothing, or has no unit, is no step: what it was paid, the step before it was.
    """
    advantages = torch.zeros_like(r.values_TBV)
    there_TBV = valued(r).tolist()
    for slot in range(r.rewards_TB.shape[1]):
        steps: list[tuple[int, int]] = []
        rewards: list[float] = []
        for t in range(len(r.rewards_TB)):
            for v, there in enumerate(there_TBV[t][slot]):
                if there:
                    steps.append((t, v))
                    rewards.append(0.0 if earned_TBV is None else float(earned_TBV[t, slot, v]))
            if steps:
                rewards[-1] += float(r.rewards_TB[t, slot])
            terminated, truncated = bool(r.terminated_TB[t, slot]), bool(r.truncated_TB[t, slot])
            if not (terminated or truncated or t == len(r.rewards_TB) - 1):
                continue
            values = [float(r.values_TBV[u, slot, v]) for u, v in steps] + [
                0.0 if terminated else float(r.next_values_TB[t, slot])
            ]
            errors = [rewards[i] + gamma * values[i + 1] - values[i] for i in range(len(steps))]
            for i, (u, v) in enumerate(steps):
                advantages[u, slot, v] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(steps)))
            steps, rewards = [], []
    return advantages, (advantages + r.values_TBV) * valued(r)


VALUES = pytest.mark.parametrize(("k", "v"), [(1, 1), (3, 1), (3, 3)], ids=["decisions", "decisions of units", "units"])


@VALUES
def test_advantages_equal_a_naive_sum_and_are_standardised_over_what_counts(k: int, v: int) -> None:
    r = rollout(9, 5, k, v)
    there, counts = valued(r), valued(r).sum(2)
    naive, returns = naive_advantages(r, 0.9, 0.8)
    plain = ppo(gamma=0.9, lam=0.8, normalize_advantages=None).advantages(r)
    torch.testing.assert_close(plain.advantages_TB, naive.sum(2) / counts.clamp(min=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.returns_TBV, returns, rtol=1e-12, atol=1e-12)
    assert torch.equal(plain.keep_TB, r.valid_TB) and int(there.sum()) > 20
    kept = naive[there].tolist()
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((x - mean) ** 2 for x in kept) / (len(kept) - 1))
    normal = ppo(gamma=0.9, lam=0.8).advantages(r)
    expected = torch.tensor([(x - mean) / (std + 1e-5) for x in kept], dtype=torch.float64)
    if v == 1:
        assert normal.units_TBK is None
        torch.testing.assert_close(normal.advantages_TB[there[..., 0]], expected)
    else:
        assert normal.units_TBK is not None and plain.units_TBK is not None
        torch.testing.assert_close(plain.units_TBK, naive, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(normal.units_TBK[there], expected)
    assert normal.metrics["advantage_std"] == pytest.approx(std)
    left = (returns - r.values_TBV)[there]
    assert normal.metrics["explained_variance"] == pytest.approx(1 - float(left.var() / returns[there].var()))


@VALUES
def test_a_time_limit_that_is_part_of_the_task_ends_the_episode_for_good(k: int, v: int) -> None:
    """With bootstrap_truncated: false the advantages are those of a rollout in which every truncation is a termination."""
    r = rollout(9, 5, k, v)
    ended = replace(r, terminated_TB=r.terminated_TB | r.truncated_TB, truncated_TB=torch.zeros_like(r.truncated_TB))
    naive, returns = naive_advantages(ended, 0.9, 0.8)
    fields = {"gamma": 0.9, "lam": 0.8, "normalize_advantages": None}
    strict = ppo(**fields, bootstrap_truncated=False).advantages(r)
    torch.testing.assert_close(strict.advantages_TB * valued(r).sum(2), naive.sum(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(strict.returns_TBV, returns, rtol=1e-12, atol=1e-12)
    differs_TB = (strict.advantages_TB - ppo(**fields).advantages(r).advantages_TB).abs() > 1e-9
    assert bool(differs_TB[r.truncated_TB & valued(r).any(2)].all())


def test_the_kl_in_rewards_is_each_unit_s_own_where_units_have_values() -> None:
    r = rollout(6, 4, 3, 3)
    r = replace(r, reference_log_probs_TBK=r.log_probs_TBK - torch.rand(6, 4, 3, dtype=torch.float64))
    assert r.reference_log_probs_TBK is not None
    naive, _ = naive_advantages(r, 0.9, 0.8, -0.5 * (r.log_probs_TBK - r.reference_log_probs_TBK))
    fields: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "normalize_advantages": None}
    result = ppo(**fields, kl_weight=0.5, kl_kind="k1", kl_in="reward").advantages(r)
    torch.testing.assert_close(result.units_TBK, naive, rtol=1e-12, atol=1e-12)


def test_values_of_units_are_values_of_decisions_where_each_has_one_unit() -> None:
    of_decisions = rollout(9, 5, 3, 1)
    mask_TBK = of_decisions.mask_TBK & (torch.arange(3) == 0)
    of_decisions = replace(of_decisions, mask_TBK=mask_TBK)
    of_units = replace(of_decisions, values_TBV=torch.cat([of_decisions.values_TBV, torch.full((9, 5, 2), math.nan)], 2))
    expected, actual = (ppo(gamma=0.9, lam=0.8).advantages(r) for r in (of_decisions, of_units))
    torch.testing.assert_close(actual.advantages_TB, expected.advantages_TB, rtol=1e-12, atol=1e-12)
    assert expected.advantages_TB.any() and actual.returns_TBV is not None and expected.returns_TBV is not None
    torch.testing.assert_close(actual.returns_TBV, expected.returns_TBV * (torch.arange(3) == 0), rtol=1e-12, atol=1e-12)
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-12)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("micro", [None, 5])
def test_advantages_standardised_per_minibatch_are_those_of_the_rows_that_are_trained(
    micro: int | None, units: bool, case: Callable[..., Any]
) -> None:
    """As CleanRL: the loss is that of a batch whose advantages had mean 0 and deviation 1 from the start."""
    policy, batch = case(n=12, k=4, j=2, spread=0.5)
    trained = batch.trained_NJ
    assert not trained.all()
    kept = batch.advantages_NJ[trained].tolist()
    if units:
        batch = replace(batch, unit_advantages_NK=torch.randn(12, 4, dtype=torch.float64))
        kept = batch.advantages_NK[batch.mask_NK].tolist()
    mean, std = fmean(kept), stdev(kept)
    scaled = {
        name: (getattr(batch, name) - mean) / (std + 1e-5) for name in ("advantages_NJ", *["unit_advantages_NK"][: int(units)])
    }
    expected = ppo(normalize_advantages=None).loss(policy, replace(batch, **scaled), context_of(batch))
    context = replace(context_of(batch), advantage_mean=mean, advantage_std=std)
    pieces = [batch.select(torch.arange(12)[i : i + (micro or 12)]) for i in range(0, 12, micro or 12)]
    actual = sum(float(ppo(normalize_advantages="minibatch").loss(policy, piece, context).value.detach()) for piece in pieces)
    assert actual == pytest.approx(float(expected.value.detach()), rel=1e-9)
    rollout_wide = ppo().loss(policy, batch, context)
    assert actual != pytest.approx(float(rollout_wide.value.detach()), rel=1e-3)


def huber(error: float, delta: float) -> float:
    return error * error / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)


def naive_loss(policy: Any, batch: Batch, config: PPO.Config) -> float:
    """The whole mini-batch's loss, unit by unit."""
    policy_terms, entropies, divergences, value_terms = [], [], [], []
    each = batch.mask_NK.shape[1] // batch.old_values_NV.shape[1]
    for n in range(len(batch)):
        units = batch.mask_NK[n].nonzero()[:, 0].tolist()
        for k in units:
            new, advantage = float(policy.log_probs_NK.detach()[n, k]), float(batch.advantages_NK[n, k])
            ratio = math.exp(new - float(batch.old_log_probs_NK[n, k]))
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            term = max(-advantage * ratio, -advantage * clipped)
            if config.dual_clip is not None and advantage < 0:
                term = min(term, -config.dual_clip * advantage)
            policy_terms.append(term)
            entropies.append(float(policy.entropy_NK.detach()[n, k]))
            assert batch.reference_log_probs_NK is not None
            gap = new - float(batch.reference_log_probs_NK[n, k])
            divergences.append(math.exp(-gap) - 1 + gap)
        for j in sorted({k // each for k in units}):
            value, old = float(policy.values_NV.detach()[n, j]), float(batch.old_values_NV[n, j])
            assert config.value_clip is not None and config.huber_delta is not None
            near = old + min(max(value - old, -config.value_clip), config.value_clip)
            errors = (float(batch.returns_NV[n, j]) - value, float(batch.returns_NV[n, j]) - near)
            value_terms.append(max(huber(error, config.huber_delta) for error in errors))
    units = len(policy_terms)
    actor = (sum(policy_terms) - config.entropy_weight * sum(entropies) + config.kl_weight * sum(divergences)) / units
    return actor + config.value_weight * sum(value_terms) / len(value_terms)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"clip_low": 0.05, "clip_high": 0.4, "dual_clip": 1.2, "huber_delta": 0.5, "value_clip": 0.1, "value_weight": 0.3},
        {"entropy_weight": 0.05, "kl_weight": 0.2, "kl_kind": "k3"},
    ],
)
@pytest.mark.parametrize(("k", "j", "v"), [(3, 1, 1), (6, 3, 3), (4, 4, 4), (6, 2, 6)])
def test_the_loss_equals_a_naive_twin(k: int, j: int, v: int, fields: dict[str, Any], case: Callable[..., Any]) -> None:
    policy, batch = case(n=12, k=k, j=j, v=v, spread=0.5)
    if v > j:
        batch = replace(batch, unit_advantages_NK=torch.randn(12, k, dtype=torch.float64))
    algorithm = ppo(**fields)
    loss = algorithm.loss(policy, batch, context_of(batch))
    assert float(loss.value.detach()) == pytest.approx(naive_loss(policy, batch, algorithm.config), rel=1e-12)


def test_micro_batch_losses_add_up_to_the_whole_batch_s(case: Callable[..., Any]) -> None:
    policy, batch = case(n=10, k=4, j=2)
    algorithm = ppo(entropy_weight=0.1, kl_weight=0.1, reduce="sample_mean")
    whole = algorithm.loss(policy, batch, context_of(batch)).value
    pieces = [batch.select(torch.arange(*piece)) for piece in ((0, 1), (1, 5), (5, 10))]
    parts = [algorithm.loss(policy, piece, context_of(batch)).value for piece in pieces]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


# A field of the configuration, and which of the gradients (log-probabilities, entropies, values) it must change.
TERMS = {
    "entropy_weight": (False, True, False),
    "kl_weight": (True, False, False),
    "value_weight": (False, False, True),
}


@pytest.mark.parametrize("field", TERMS)
def test_every_weight_changes_the_gradient_of_its_term_and_no_other(field: str, case: Callable[..., Any]) -> None:
    gradients = []
    for weight in (0.5, 1.0):
        torch.manual_seed(1)
        policy, batch = case()
        ppo(**{field: weight}).loss(policy, batch, context_of(batch)).value.backward()
        gradients.append(policy.gradients())
    changed = tuple(not torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert changed == TERMS[field]


def test_the_policy_term_follows_the_advantages(case: Callable[..., Any]) -> None:
    policy, batch = case(spread=0.0, masked=False)
    ppo(value_weight=0.0).loss(policy, batch, context_of(batch)).value.backward()
    gradient_NK, entropy_NK, values_N = policy.gradients()
    # At ratio 1 the gradient is REINFORCE's: - A / number of units.
    expected_NK = (-batch.advantages_NJ / batch.mask_NK.numel()).expand_as(gradient_NK)
    torch.testing.assert_close(gradient_NK, expected_NK, rtol=1e-12, atol=1e-12)
    assert not entropy_NK.any() and not values_N.any()


def test_at_unchanged_weights_every_ratio_is_one_and_nothing_is_clipped(case: Callable[..., Any]) -> None:
    policy, batch = case(spread=0.0, masked=False)
    metrics = ppo().loss(policy, batch, context_of(batch)).metrics
    for name, expected in {"ratio_min": 1, "ratio_max": 1, "clip_fraction": 0, "approx_kl": 0, "log_prob_gap_max": 0}.items():
        assert float(metrics[name]) == expected, name


def test_while_the_critic_warms_up_no_gradient_reaches_the_actor(case: Callable[..., Any]) -> None:
    algorithm = ppo(critic_warmup=2, entropy_weight=0.1, kl_weight=0.1)
    reached = []
    for iteration in range(4):
        policy, batch = case()
        algorithm.loss(policy, batch, context_of(batch, iteration)).value.backward()
        assert policy.values_NV.grad is not None and policy.values_NV.grad.any()
        reached.append(policy.log_probs_NK.grad is not None)  # None, not zero: AdamW would decay what has a zero gradient
    assert reached == [False, False, True, True]


@pytest.mark.parametrize(("j", "v"), [(1, 1), (2, 2), (2, 4)])
def test_untrained_units_and_their_values_get_no_gradient(j: int, v: int, case: Callable[..., Any]) -> None:
    policy, batch = case(n=20, k=4, j=j, v=v)
    ppo(entropy_weight=0.1, kl_weight=0.1).loss(policy, batch, context_of(batch)).value.backward()
    log_probs_NK, entropy_NK, values_N = policy.gradients()
    assert not log_probs_NK[~batch.mask_NK].any() and not entropy_NK[~batch.mask_NK].any()
    assert not values_N[~batch.trained_NV].any() and values_N.any() and not batch.trained_NV.all()


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"gamma": 1.1}, {"clip_low": 0.0}, {"dual_clip": 1.0}, {"lamda": 0.9}])
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, TypeError)):
        ppo(**fields)
