"""Oracles: a twin of each loss as a Python loop over scalars, REINFORCE's gradient, torch's own losses and divergences."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from mmrl.numerics import losses

close = torch.testing.assert_close


def random_units(seed, b=4, k=5, spread=0.3):
    """(log_probs, old, advantages, mask); every sample keeps a unit, but for odd seeds the last keeps none."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(b, k, dtype=torch.float64, generator=generator)
    log_probs = old + spread * torch.randn(b, k, dtype=torch.float64, generator=generator)
    advantages = torch.randn(b, k, dtype=torch.float64, generator=generator)
    mask = torch.rand(b, k, generator=generator) < 0.6
    mask[:, 0] = True
    mask[-1] &= seed % 2 == 0
    return log_probs.requires_grad_(), old, advantages, mask


def naive_surrogate(log_probs, old, advantages, mask, *, clip_low, clip_high, dual_clip, objective, ratio, reduce, normalizer):
    """The objective, unit by unit; returns the loss and the metrics."""
    per_sample, ratios, clipped_units, kls = [], [], [], []
    for lp, ol, adv, keep in zip(log_probs, old, advantages, mask, strict=True):
        units = [k for k in range(len(lp)) if keep[k]]
        unit_losses = []
        for k in units:
            r = math.exp(lp[k] - ol[k])
            kls.append(r - 1 - math.log(r))
            if ratio == "sequence":
                r = math.prod(math.exp(lp[j] - ol[j]) for j in units) ** (1 / len(units))
            bounded = min(max(r, 1 - clip_low), 1 + clip_high)
            worth = bounded * adv[k] * lp[k] if objective == "cispo" else min(r * adv[k], bounded * adv[k])
            clipped_units.append(float(bounded != r if objective == "cispo" else bounded * adv[k] < r * adv[k]))
            if dual_clip is not None and adv[k] < 0:
                worth = max(worth, dual_clip * adv[k])
            ratios.append(r)
            unit_losses.append(-worth)
        per_sample.append(unit_losses)
    n = len(ratios)
    if reduce == "sample_mean":
        filled = [u for u in per_sample if u]
        value = sum(sum(u) / len(u) for u in filled) / (normalizer or len(filled))
    else:
        value = sum(sum(u) for u in per_sample) / (normalizer or n)
    return value, {
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "clip_fraction": sum(clipped_units) / n,
        "approx_kl": sum(kls) / n,
    }


@settings(derandomize=True, max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    clip_low=st.floats(0.01, 0.5),
    clip_high=st.floats(0.01, 0.5),
    objective=st.sampled_from([("clip", None), ("clip", 1.2), ("clip", 3.0), ("cispo", None)]),
    ratio=st.sampled_from(["unit", "sequence"]),
    reduce=st.sampled_from(["unit_mean", "sample_mean", "constant"]),
    normalizer=st.sampled_from([None, 7, 12.5]),
)
def test_clipped_surrogate_is_its_loop(seed, clip_low, clip_high, objective, ratio, reduce, normalizer):
    objective, dual_clip = objective
    units = random_units(seed)
    options: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "objective": objective,
        "ratio": ratio,
        "reduce": reduce,
        "normalizer": 7 if reduce == "constant" and normalizer is None else normalizer,
    }
    got = losses.clipped_surrogate(*units, **options)
    value, metrics = naive_surrogate(*(x.tolist() for x in units), **options)
    assert got.value.item() == pytest.approx(value, rel=1e-10, abs=1e-12)
    assert {name: float(metric) for name, metric in got.metrics.items()} == pytest.approx(metrics, rel=1e-9, abs=1e-12)
    assert not any(torch.is_tensor(metric) and metric.requires_grad for metric in got.metrics.values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (1.5, -2.0, 3.0), (0.5, -2.0, 1.8), (9.0, -2.0, 6.0), (1.0, 1.0, -1.0)],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss):
    """clip 0.1 below and 0.2 above, dual clip 3: each branch once."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    got = losses.clipped_surrogate(
        log_probs, torch.zeros_like(log_probs), torch.tensor([[advantage]]), mask, clip_low=0.1, clip_high=0.2, dual_clip=3.0
    )
    assert got.value.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"dual_clip": 3.0}, {"objective": "cispo"}])
@pytest.mark.parametrize("ratio", ["unit", "sequence"])
def test_gradient_at_ratio_one_is_that_of_reinforce(ratio, options):
    """Per-sample advantages, so that the sequence ratio's gradient is REINFORCE's as well."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    actions = torch.randint(3, (6, 4), generator=generator)
    advantages = torch.randn(6, 1, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    mask[:, 0] = True
    log_probs = Categorical(logits=logits).log_prob(actions)
    loss = losses.clipped_surrogate(
        log_probs, log_probs.detach(), advantages, mask, clip_low=0.2, clip_high=0.2, ratio=ratio, **options
    )
    reinforce = -(advantages * log_probs)[mask].sum() / mask.sum()
    (got,) = torch.autograd.grad(loss.value, logits, retain_graph=True)
    (want,) = torch.autograd.grad(reinforce, logits)
    close(got, want, rtol=1e-12, atol=1e-14)
    assert loss.metrics["ratio_min"] == loss.metrics["ratio_max"] == 1
    assert loss.metrics["clip_fraction"] == loss.metrics["approx_kl"] == 0


def test_cispo_s_gradient_is_reinforce_s_weighted_by_bounded_ratios():
    """The weights carry no gradient, and units beyond the bounds keep theirs."""
    log_probs, old, advantages, mask = random_units(7, spread=0.8)
    loss = losses.clipped_surrogate(log_probs, old, advantages, mask, clip_low=0.3, clip_high=0.4, objective="cispo")
    (got,) = torch.autograd.grad(loss.value, log_probs)
    for b, k in mask.nonzero().tolist():
        weight = min(max(math.exp(log_probs[b, k] - old[b, k]), 0.7), 1.4)
        assert got[b, k].item() == pytest.approx(-weight * advantages[b, k].item() / int(mask.sum()))
    assert not got[~mask].any() and float(loss.metrics["clip_fraction"]) > 0.2


def test_the_sequence_ratio_s_gradient_is_that_of_each_unit_s_advantage():
    """GSPO-token: the unit's own A and log p, times the sample's ratio; nothing where that is clipped on the advantage's side."""
    log_probs, old, advantages, mask = random_units(8, b=6, spread=0.6)
    loss = losses.clipped_surrogate(log_probs, old, advantages, mask, clip_low=0.1, clip_high=0.1, ratio="sequence")
    (got,) = torch.autograd.grad(loss.value, log_probs)
    cut = 0
    for b in range(6):
        units = mask[b].nonzero()[:, 0].tolist()
        s = math.exp(sum(float(log_probs[b, k] - old[b, k]) for k in units) / len(units))
        for k in units:
            a = advantages[b, k].item()
            cut += stopped if (stopped := (a > 0 and s > 1.1) or (a < 0 and s < 0.9)) else 0
            assert got[b, k].item() == pytest.approx(0.0 if stopped else -s * a / int(mask.sum()))
    assert 0 < cut < int(mask.sum())


def test_the_sequence_ratio_of_one_advantage_is_gspo():
    """The gradient is that of s itself, which runs through the mean of all log-ratios."""
    log_probs, old, advantages, mask = random_units(10, b=6)
    options: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.1, "reduce": "sample_mean"}
    loss = losses.clipped_surrogate(log_probs, old, advantages[:, :1], mask, ratio="sequence", **options)
    gap = torch.where(mask, log_probs - old, 0).sum(1) / mask.sum(1)
    s, a = gap.exp(), advantages[:, 0]
    gspo = -torch.minimum(s * a, s.clamp(0.9, 1.1) * a).mean()
    close(loss.value, gspo, rtol=1e-12, atol=1e-14)
    (got,), (want,) = (torch.autograd.grad(value, log_probs) for value in (loss.value, gspo))
    close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("reduce", ["unit_mean", "sample_mean", "constant"])
@pytest.mark.parametrize("ratio", ["unit", "sequence"])
def test_micro_batches_add_up_to_the_whole(reduce, ratio, objective):
    """Loss and gradient; the parts hold unequal numbers of units, so averaging them would differ."""
    log_probs, old, advantages, mask = random_units(3, b=7)
    mask[:-1] |= torch.rand(6, 1, generator=torch.Generator().manual_seed(9)) < 0.5
    mask[-1, 0] = True
    divisor = {"unit_mean": int(mask.sum()), "sample_mean": 7, "constant": 7 * 5}[reduce]
    options: dict[str, Any] = {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "objective": objective,
        "reduce": reduce,
        "ratio": ratio,
    }
    whole = losses.clipped_surrogate(log_probs, old, advantages, mask, **options, normalizer=35 if reduce == "constant" else None)
    (want,) = torch.autograd.grad(whole.value, log_probs, retain_graph=True)
    parts = [
        losses.clipped_surrogate(log_probs[i:j], old[i:j], advantages[i:j], mask[i:j], **options, normalizer=divisor)
        for i, j in ((0, 1), (1, 3), (3, 7))
    ]
    total = torch.stack([part.value for part in parts]).sum()
    (got,) = torch.autograd.grad(total, log_probs)
    close(total, whole.value, rtol=1e-12, atol=1e-14)
    close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [{"dual_clip": 3.0}, {"objective": "cispo"}])
@pytest.mark.parametrize("reduce", ["unit_mean", "sample_mean"])
@pytest.mark.parametrize("ratio", ["unit", "sequence"])
def test_units_that_are_masked_may_hold_anything(ratio, reduce, objective):
    log_probs, old, advantages, mask = random_units(4)
    poison = lambda x: torch.where(mask, x, torch.full_like(x, math.nan))  # noqa: E731
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "ratio": ratio, "reduce": reduce, **objective}
    clean = losses.clipped_surrogate(log_probs, old, advantages, mask, **options)
    (want,) = torch.autograd.grad(clean.value, log_probs)
    poisoned = poison(log_probs.detach()).requires_grad_()
    got = losses.clipped_surrogate(poisoned, poison(old), poison(advantages), mask, **options)
    assert torch.equal(got.value, clean.value)
    assert {k: float(v) for k, v in got.metrics.items()} == {k: float(v) for k, v in clean.metrics.items()}
    assert torch.equal(torch.autograd.grad(got.value, poisoned)[0], want)
    assert not want[~mask].any() and want[mask].any()


def test_an_advantage_per_sample_spreads_over_its_units():
    log_probs, old, advantages, mask = random_units(5)
    column = advantages[:, :1]
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
    narrow = losses.clipped_surrogate(log_probs, old, column, mask, **options)
    assert torch.equal(narrow.value, losses.clipped_surrogate(log_probs, old, column.repeat(1, 5), mask, **options).value)


def test_a_batch_without_units_has_loss_zero_and_zero_gradient():
    log_probs, old, advantages, mask = random_units(6)
    loss = losses.clipped_surrogate(log_probs, old, advantages, torch.zeros_like(mask), clip_low=0.2, clip_high=0.2)
    assert loss.value.item() == 0
    assert not torch.autograd.grad(loss.value, log_probs)[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "constant"}, "divides by normalizer"),
        ({"reduce": "mean"}, "reduce 'mean' is unknown; use one of constant, sample_mean, unit_mean"),
        ({"ratio": "token"}, "ratio 'token' is unknown"),
        ({"dual_clip": 1.0}, "use more than 1"),
        ({"objective": "ppo"}, "objective 'ppo' is unknown; use one of cispo, clip"),
        ({"objective": "cispo", "dual_clip": 3.0}, "belongs to objective 'clip'; with 'cispo' leave it None"),
    ],
)
def test_clipped_surrogate_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        losses.clipped_surrogate(*random_units(0), clip_low=0.2, clip_high=0.2, **options)


def test_importance_mismatch():
    mask = torch.tensor([[True, True, False]])
    mean, largest = losses.importance_mismatch(torch.tensor([[1.0, -2.0, 9.0]]), torch.tensor([[1.5, -1.0, 0.0]]), mask)
    assert (mean.item(), largest.item()) == (0.75, 1.0)
    assert losses.importance_mismatch(torch.ones(1, 3), torch.ones(1, 3), mask) == (0, 0)


def naive_value_loss(values, old_values, returns, mask, *, clip, huber_delta, normalizer):
    def penalty(e):
        if huber_delta is None or abs(e) <= huber_delta:
            return e * e / 2
        return huber_delta * (abs(e) - huber_delta / 2)

    total, clipped_entries, n = 0.0, 0, 0
    for v, old, ret, keep in zip(values, old_values, returns, mask, strict=True):
        if not keep:
            continue
        n += 1
        free = penalty(ret - v)
        bounded = penalty(ret - (old + max(-clip, min(clip, v - old)))) if clip is not None else 0.0
        total += max(free, bounded)
        clipped_entries += bounded > free
    return total / (normalizer or n), clipped_entries / n


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("huber_delta", [None, 0.7])
@pytest.mark.parametrize("normalizer", [None, 50])
def test_value_loss_is_its_loop(clip, huber_delta, normalizer):
    generator = torch.Generator().manual_seed(10)
    values, old_values, returns = torch.randn(3, 40, dtype=torch.float64, generator=generator).unbind()
    mask = torch.rand(40, generator=generator) < 0.7
    options = {"clip": clip, "huber_delta": huber_delta, "normalizer": normalizer}
    got = losses.value_loss(values, old_values, returns, mask, **options)
    value, fraction = naive_value_loss(*(x.tolist() for x in (values, old_values, returns, mask)), **options)
    assert got.value.item() == pytest.approx(value, rel=1e-12)
    assert float(got.metrics["value_clip_fraction"]) == pytest.approx(fraction)


def test_value_loss_without_clip_is_torchs_huber_loss():
    values, returns = 3 * torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    everything = torch.ones(30, dtype=torch.bool)
    got = losses.value_loss(values, values, returns, everything, clip=None, huber_delta=1.5)
    close(got.value, torch.nn.functional.huber_loss(values, returns, delta=1.5))
    half = losses.value_loss(values, values, returns, everything, clip=None, huber_delta=None)
    close(half.value, 0.5 * torch.nn.functional.mse_loss(values, returns))


def test_value_loss_adds_up_and_ignores_masked_nan():
    generator = torch.Generator().manual_seed(12)
    values, old_values, returns = torch.randn(3, 10, dtype=torch.float64, generator=generator).unbind()
    mask = torch.tensor([True, False] * 5)
    options: dict[str, Any] = {"clip": 0.2, "huber_delta": 1.0}
    whole = losses.value_loss(values, old_values, returns, mask, **options).value
    poison = lambda x: torch.where(mask, x, torch.full_like(x, math.nan))  # noqa: E731
    poisoned = poison(values).requires_grad_()
    cut = [slice(0, 3), slice(3, 10)]
    parts = [
        losses.value_loss(poisoned[c], poison(old_values)[c], poison(returns)[c], mask[c], **options, normalizer=5) for c in cut
    ]
    total = parts[0].value + parts[1].value
    close(total, whole)
    (gradient,) = torch.autograd.grad(total, poisoned)
    assert gradient.isfinite().all() and not gradient[~mask].any() and gradient[mask].any()


def test_clipping_a_value_that_moved_towards_the_return_stops_its_gradient():
    values = torch.tensor([0.8], requires_grad=True)
    one, zero, everything = torch.ones(1), torch.zeros(1), torch.ones(1, dtype=torch.bool)
    loss = losses.value_loss(values, zero, one, everything, clip=0.2, huber_delta=None)
    assert loss.value.item() == pytest.approx(0.5 * 0.8**2)  # the error of the clipped value, 0.2
    assert torch.autograd.grad(loss.value, values)[0].item() == 0


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 99.0])
    mask = torch.tensor([True, True, True, False])
    constant = torch.zeros(4)
    assert losses.explained_variance(returns + 5, returns, mask).item() == 1  # a shift does not count against a critic
    assert losses.explained_variance(constant, returns, mask).item() == 0
    assert losses.explained_variance(-returns, returns, mask).item() == pytest.approx(1 - 4)
    assert losses.explained_variance(torch.tensor([1.0, 2.0, 2.0, 0.0]), returns, mask).item() == pytest.approx(1 - (1 / 3) / 1)
    assert losses.explained_variance(returns, constant, mask).item() == 0


@pytest.fixture
def two_policies():
    generator = torch.Generator().manual_seed(13)
    logits = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    return logits[0].clone().requires_grad_(), logits[1]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimates_are_unbiased(kind, two_policies):
    """The exact expectation under the policy, by summing over all outcomes."""
    policy, reference = (Categorical(logits=logits) for logits in two_policies)
    estimate = losses.kl_estimate(policy.logits, reference.logits, kind)
    close((policy.probs * estimate).sum(), kl_divergence(policy, reference), rtol=1e-12, atol=1e-14)


def test_k2_has_the_gradient_of_the_kl_on_policy(two_policies):
    logits, reference = two_policies
    policy = Categorical(logits=logits)
    k2 = losses.kl_estimate(policy.logits, Categorical(logits=reference).logits, "k2")
    (got,) = torch.autograd.grad((policy.probs.detach() * k2).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad(kl_divergence(policy, Categorical(logits=reference)), logits)
    close(got, want, rtol=1e-12, atol=1e-14)


def test_kl_estimates_by_hand():
    d = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    zero = torch.zeros_like(d)
    assert losses.kl_estimate(d, zero, "k1").tolist() == [0, 0.5, -0.5]
    assert losses.kl_estimate(d, zero, "k2").tolist() == [0, 0.125, 0.125]
    assert losses.kl_estimate(d, zero, "k3").tolist() == pytest.approx([0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5])
    assert (losses.kl_estimate(torch.linspace(-5, 5, 101), torch.zeros(101), "k3") >= 0).all()
    with pytest.raises(ValueError, match="kind 'k4' is unknown; use one of k1, k2, k3"):
        losses.kl_estimate(d, zero, "k4")
