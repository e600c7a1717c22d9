"""Gaussian steps compared: against torch.distributions, and GRPO-Guard's promise that its log-ratio is 0 on average."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from mmrl.numerics.flow import transition
from mmrl.numerics.steps import step_kl, step_log_ratio

N, K, D = 3, 4, 5


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def steps() -> tuple[torch.Tensor, ...]:
    """Means of two policies, standard deviations and lengths of steps."""
    return draw(N, K, D), draw(N, K, D), 0.1 + torch.rand(N, K, dtype=torch.float64), torch.rand(N, K, dtype=torch.float64)


def test_the_exact_kl_is_that_of_torch_distributions_for_a_number(steps: tuple[torch.Tensor, ...]) -> None:
    means, reference, stds, deltas = steps
    exact = kl_divergence(Normal(means, stds[..., None]), Normal(reference, stds[..., None])).mean(-1)
    torch.testing.assert_close(step_kl(means, reference, stds, deltas, form="exact"), exact, rtol=1e-12, atol=1e-12)
    # Flow-GRPO's code: std without sqrt(delta).
    published = (means - reference).pow(2).mean(-1) / (2 * (stds / deltas.sqrt()) ** 2)
    torch.testing.assert_close(step_kl(means, reference, stds, deltas, form="flow_grpo"), published, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(step_kl(means, reference, stds, deltas, form="means"), (means - reference).pow(2).mean(-1))


def test_the_exact_kl_is_the_paper_s_formula_of_velocities() -> None:
    """delta / 2 (s (1 - t) / (2 t) + 1 / s)^2 mean (v - v_ref)^2 for flow_sde."""
    x, v, v_ref = draw(N, D), draw(N, D), draw(N, D)
    t, t_next, a = 0.7, 0.55, 0.8
    s = a * (t / (1 - t)) ** 0.5
    one, other = (transition(x, velocity, t, t_next, rule="flow_sde", noise_level=a) for velocity in (v, v_ref))
    std = one.std.reshape(1, 1).expand(N, 1).double()
    got = step_kl(one.mean[:, None], other.mean[:, None], std, torch.full_like(std, t - t_next), form="exact")
    expected = (t - t_next) / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * (v - v_ref).pow(2).mean(-1)
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-9, atol=1e-12)


def test_steps_without_noise_add_nothing_and_have_finite_gradients(steps: tuple[torch.Tensor, ...]) -> None:
    means, reference, stds, deltas = steps
    means.requires_grad_()
    stds[0] = 0
    for form in ("exact", "flow_grpo"):
        kl = step_kl(means, reference, stds, deltas, form=form)
        assert not kl[0].any() and kl[1:].all()
        (gradient,) = torch.autograd.grad(kl.sum(), means)
        assert not gradient[0].any() and gradient.isfinite().all()


def log_prob(x: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> torch.Tensor:
    return Normal(means, stds[..., None]).log_prob(x).mean(-1)


def test_guards_log_ratio_has_no_mean_and_a_variance_that_knows_no_step(steps: tuple[torch.Tensor, ...]) -> None:
    means, old, stds, _ = steps
    z = draw(20000, N, K, D)
    x = old + stds[..., None] * z
    args = {"stds_NK": stds, "means_NKD": means, "old_means_NKD": old}
    new_log_probs, old_log_probs = log_prob(x, means, stds), log_prob(x, old, stds)
    guarded = step_log_ratio(new_log_probs, old_log_probs, form="guard", **args)
    # In closed form: mean z (mu - mu_old), whatever the standard deviation.
    torch.testing.assert_close(guarded, (z * (means - old)).mean(-1), rtol=1e-9, atol=1e-9)
    plain = step_log_ratio(new_log_probs, old_log_probs, form="likelihood", **args)
    bias = (means - old).pow(2).mean(-1) / (2 * stds**2)
    error = 5 * (means - old).norm(dim=-1) / D / 20000**0.5  # five standard errors
    assert (guarded.mean(0).abs() < error).all()
    assert ((plain.mean(0) + bias).abs() < error / stds).all() and (bias > error / stds).all()


def test_the_unscaled_log_ratio_is_that_of_squared_distances(steps: tuple[torch.Tensor, ...]) -> None:
    means, old, stds, _ = steps
    x = draw(N, K, D)
    got = step_log_ratio(log_prob(x, means, stds), log_prob(x, old, stds), form="unscaled", stds_NK=stds)
    expected = -(x - means).pow(2).mean(-1) + (x - old).pow(2).mean(-1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_unknown_forms_are_refused(steps: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="use one of exact, flow_grpo, means"):
        step_kl(*steps, form="x")
    with pytest.raises(ValueError, match="use one of guard, likelihood, unscaled"):
        step_log_ratio(steps[2], steps[3], form="x")
