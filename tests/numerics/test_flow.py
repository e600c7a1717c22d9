"""Oracles: the formulas retyped over scalars, published tables, closed-form Gaussian moments, torch.distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from mmrl.numerics import flow

NOISE_LEVEL = {"ode": None, "flow_sde": 0.7, "cps": 0.6, "flow_noise": None, "constant": 0.3}
close = torch.testing.assert_close


def naive_transition(rule, x, v, t, t_next, a, t_star, std):
    """pi_RL's and DanceGRPO's sampler tables, one number at a time: next = w0 * clean + w1 * noise + s * eps."""
    delta = t - t_next
    clean, noise = x - v * t, x + v * (1 - t)
    w0 = 1 - (t - delta)
    if rule == "ode":
        w1, s = t - delta, 0.0
    elif rule == "flow_sde":
        sigma = a * math.sqrt(t / (1 - t_star))
        w1, s = (t - delta) - sigma * sigma * delta / (2 * t), sigma * math.sqrt(delta)
    elif rule == "constant":  # as printed in DanceGRPO: Euler plus half eta^2 times the score
        dt = -delta
        return x + v * dt + 0.5 * a * a * (x - (1 - t) * clean) / (t * t) * dt, a * math.sqrt(delta)
    elif rule == "cps":
        w1, s = (t - delta) * math.cos(math.pi * a / 2), (t - delta) * math.sin(math.pi * a / 2)
    else:
        w1, s = t - delta, std
    return w0 * clean + w1 * noise, s


unit = st.floats(0.01, 0.99)
number = st.floats(-3, 3)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(x=number, v=number, times=st.tuples(unit, unit), a=st.floats(0.01, 1), std=st.floats(0.01, 2))
@pytest.mark.parametrize("rule", sorted(NOISE_LEVEL))
def test_transition_is_the_formula(rule, x, v, times, a, std):
    t, t_next = max(times) + 0.005, min(times)
    noise_level = None if NOISE_LEVEL[rule] is None else a
    given_std = torch.tensor([[std]], dtype=torch.float64) if rule == "flow_noise" else None
    x_t, velocity = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[v]], dtype=torch.float64)
    got = flow.transition(x_t, velocity, t, t_next, rule=rule, noise_level=noise_level, std=given_std)
    mean, s = naive_transition(rule, x, v, t, t_next, a, t, std)
    assert got.mean.item() == pytest.approx(mean, rel=1e-10, abs=1e-10)
    assert torch.broadcast_to(got.std, got.mean.shape).item() == pytest.approx(s, rel=1e-12, abs=1e-15)


PI_RL_TABLE = [
    (3, 0.5, [0.866, 0.707, 0.354], [0.500, 0.408, 0.204]),
    (4, 0.5, [1.0, 0.866, 0.500, 0.289], [0.500, 0.433, 0.250, 0.144]),
    (5, 0.5, [1.118, 1.0, 0.612, 0.408, 0.250], [0.500, 0.447, 0.274, 0.183, 0.112]),
    (5, 0.3, [0.671, 0.600, 0.367, 0.245, 0.150], [0.300, 0.268, 0.164, 0.110, 0.067]),
]


@pytest.mark.parametrize(("num_steps", "noise_level", "sigmas", "stds"), PI_RL_TABLE)
def test_flow_sde_has_the_noise_of_pi_rl_table(num_steps, noise_level, sigmas, stds):
    grid = flow.time_grid(num_steps, dtype=torch.float64)
    t, t_next = grid[:-1], grid[1:]
    x = torch.zeros(num_steps, 1, dtype=torch.float64)
    t_star = flow.guarded_time(t, t_next)
    got = flow.transition(x, x, t, t_next, rule="flow_sde", noise_level=noise_level, t_star=t_star)
    close(got.std[:, 0], torch.tensor(stds, dtype=torch.float64), rtol=0, atol=5.1e-4)
    close(got.std[:, 0] * math.sqrt(num_steps), torch.tensor(sigmas, dtype=torch.float64), rtol=0, atol=5.1e-4)


def test_guarded_time_moves_only_the_first_grid_point():
    assert flow.guarded_time(torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.75, 0.5, 0.25])).tolist() == [0.75, 0.75, 0.5]


@pytest.mark.parametrize(("t", "t_next", "t_star"), [(0.8, 0.6, None), (1.0, 0.75, 0.75), (0.25, 0.0, None)])
def test_flow_sde_equals_the_form_that_image_projects_print(t, t_next, t_star):
    x, v = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    a, dt = 0.9, t_next - t
    std_t = a * math.sqrt(t / (1 - (t if t_star is None else t_star)))
    printed = x * (1 + std_t**2 / (2 * t) * dt) + v * (1 + std_t**2 * (1 - t) / (2 * t)) * dt
    got = flow.transition(x[None], v[None], t, t_next, rule="flow_sde", noise_level=a, t_star=t_star)
    close(got.mean[0], printed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["flow_sde", "cps", "constant"])
def test_no_noise_is_the_ode(rule):
    x, v = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    ode = flow.transition(x, v, 0.9, 0.4, rule="ode")
    close(ode.mean, x - 0.5 * v, rtol=0, atol=1e-15)
    assert not ode.std.any()
    got = flow.transition(x, v, 0.9, 0.4, rule=rule, noise_level=0.0)
    close(got.mean, ode.mean, rtol=0, atol=1e-14)
    assert not got.std.any()
    almost = flow.transition(x, v, 0.9, 0.4, rule=rule, noise_level=1e-6)
    close(almost.mean, ode.mean, rtol=0, atol=1e-11)
    assert 0 < almost.std.max() < 1e-5


def gaussian_velocity(x, t, mean, std):
    """E[noise - x0 | x_t = x] for x0 ~ N(mean, std^2), in closed form."""
    gap = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
    return t * gap - (mean + (1 - t) * std**2 * gap)


def push_moments(mu, var, t, t_next, data, **rule):
    """Moments after one step, exactly: with Gaussian data the transition's mean is affine in x."""
    x = torch.tensor([mu, mu + 1.0], dtype=torch.float64)[:, None]
    step = flow.transition(x, gaussian_velocity(x, t, *data), t, t_next, **rule)
    slope = (step.mean[1] - step.mean[0]).item()
    return step.mean[0].item(), slope**2 * var + torch.broadcast_to(step.std, (2, 1))[0].item() ** 2


def marginal_error(steps, rule, noise_level, start=0.9, end=0.3, data=(0.7, 0.5)):
    """Error of (mean, variance) at ``end`` of particles that start from the true marginal at ``start``."""
    mean, std = data
    mu, var = (1 - start) * mean, (1 - start) ** 2 * std**2 + start**2
    for i in range(steps):
        t, t_next = start + (end - start) * i / steps, start + (end - start) * (i + 1) / steps
        mu, var = push_moments(mu, var, t, t_next, data, rule=rule, noise_level=noise_level)
    return mu - (1 - end) * mean, var - ((1 - end) ** 2 * std**2 + end**2)


@pytest.mark.parametrize(("rule", "noise_level"), [("flow_sde", 0.7), ("constant", 0.8), ("ode", None)])
def test_marginals_are_kept_to_first_order(rule, noise_level):
    coarse, fine = marginal_error(200, rule, noise_level), marginal_error(400, rule, noise_level)
    assert coarse[0] == pytest.approx(0, abs=1e-12)
    assert abs(fine[1]) < 2e-3
    assert coarse[1] / fine[1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("noise_level", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_cps_keeps_marginals_exactly_when_the_clean_estimate_is_exact(noise_level, steps):
    assert marginal_error(steps, "cps", noise_level, data=(0.7, 0.0)) == pytest.approx((0, 0), abs=1e-14)


def test_cps_loses_the_variance_its_docstring_states():
    t, std, a = 0.6, 0.5, 0.8
    data, noise = (1 - t) ** 2 * std**2, t**2
    _, var = push_moments((1 - t) * 0.7, data + noise, t, t - 1e-9, (0.7, std), rule="cps", noise_level=a)
    lost = data * noise * (1 - math.cos(a * math.pi / 2)) ** 2 / (data + noise)
    assert data + noise - var == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("rule", ["ode", "flow_sde", "cps", "constant"])
def test_a_time_per_sample_equals_one_call_per_sample_bit_for_bit(rule):
    generator = torch.Generator().manual_seed(2)
    x, v = torch.randn(5, 4, 3, generator=generator), torch.randn(5, 4, 3, generator=generator)
    t = torch.tensor([0.9, 0.7, 0.5, 0.31, 0.1])
    t_next = torch.tensor([0.8, 0.35, 0.3, 0.3, 0.0])
    together = flow.transition(x, v, t, t_next, rule=rule, noise_level=NOISE_LEVEL[rule])
    for i in range(5):
        alone = flow.transition(
            x[i : i + 1], v[i : i + 1], t[i].item(), t_next[i].item(), rule=rule, noise_level=NOISE_LEVEL[rule]
        )
        assert torch.equal(together.mean[i : i + 1], alone.mean)
        assert torch.equal(together.std[i].flatten(), alone.std.flatten())


def test_noise_level_may_differ_between_samples():
    x, v = torch.ones(2, 3), torch.full((2, 3), 0.5)
    got = flow.transition(x, v, 0.5, 0.25, rule="cps", noise_level=torch.tensor([0.2, 0.9]))
    for i, a in enumerate((0.2, 0.9)):
        mean, s = naive_transition("cps", 1.0, 0.5, 0.5, 0.25, a, 0.5, None)
        close(got.mean[i], torch.full((3,), mean))
        assert got.std[i].item() == pytest.approx(s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)).to(dtype).unbind()
    got = flow.transition(x, v, 0.7, 0.6, rule="flow_sde", noise_level=0.5)
    want = flow.transition(x.float(), v.float(), 0.7, 0.6, rule="flow_sde", noise_level=0.5)
    assert got.mean.dtype == torch.float32 and torch.equal(got.mean, want.mean)
    assert flow.gaussian_log_prob(x, v, torch.ones_like(x)).dtype == torch.float32


def test_learned_std_is_returned_as_given_and_keeps_its_gradient():
    std = torch.full((4, 3), 0.1, requires_grad=True)
    got = flow.transition(torch.zeros(2, 4, 3), torch.ones(2, 4, 3), 0.5, 0.25, rule="flow_noise", std=std)
    close(got.mean, torch.full((2, 4, 3), -0.25))
    got.std.sum().backward()
    assert std.grad is not None and std.grad.tolist() == torch.ones(4, 3).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "sde"}, "flow rule 'sde' is unknown; use one of constant, cps, flow_noise, flow_sde, ode"),
        ({"rule": "flow_sde"}, "flow rule 'flow_sde' needs noise_level"),
        ({"rule": "cps"}, "needs noise_level"),
        ({"rule": "constant"}, "needs noise_level"),
        ({"rule": "flow_noise"}, "flow rule 'flow_noise' needs std"),
        ({"rule": "ode", "noise_level": 0.5}, "'ode' does not use noise_level"),
        ({"rule": "flow_noise", "noise_level": 0.5, "std": torch.ones(1)}, "does not use noise_level"),
        ({"rule": "flow_sde", "noise_level": 0.5, "std": torch.ones(1)}, "does not use std"),
        ({"rule": "cps", "noise_level": 1.1}, "out of range for flow rule 'cps'"),
        ({"rule": "cps", "noise_level": torch.tensor([0.5, 1.1])}, "out of range"),
        ({"rule": "flow_sde", "noise_level": -0.1}, "out of range"),
        ({"rule": "flow_sde", "noise_level": 0.5, "t": 1.0}, "give t_star"),
        ({"rule": "flow_sde", "noise_level": 0.5, "t": torch.tensor([0.5, 1.0])}, "give t_star"),
        ({"rule": "flow_sde", "noise_level": 0.5, "t": 1.0, "t_star": 1.0}, "give t_star"),
    ],
)
def test_refusals(arguments, message):
    arguments = {"t": 0.5, "t_next": 0.25, **arguments}
    with pytest.raises(ValueError, match=message):
        flow.transition(torch.zeros(2, 3), torch.zeros(2, 3), **arguments)


def test_noise_level_above_one_is_fine_for_flow_sde():
    assert flow.transition(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, 0.25, rule="flow_sde", noise_level=1.2).std.item() == (
        pytest.approx(0.6)
    )


def test_log_prob_and_entropy_are_those_of_torch_distributions():
    generator = torch.Generator().manual_seed(4)
    x, mean = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator).unbind()
    std = torch.rand(6, 5, dtype=torch.float64, generator=generator) + 0.01
    close(flow.gaussian_log_prob(x, mean, std), Normal(mean, std).log_prob(x), rtol=1e-13, atol=1e-13)
    close(flow.gaussian_entropy(std), Normal(mean, std).entropy(), rtol=1e-13, atol=1e-13)


def test_log_prob_integrates_to_one():
    x = torch.linspace(-12, 14, 20001, dtype=torch.float64)
    density = flow.gaussian_log_prob(x, torch.tensor(1.0), torch.tensor(1.3)).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-7)


def test_a_deterministic_entry_has_log_prob_zero_and_no_gradient():
    x = torch.tensor([0.3, 0.4])
    mean = torch.tensor([0.1, 0.2], requires_grad=True)
    std = torch.tensor([0.0, 0.5], requires_grad=True)
    log_prob = flow.gaussian_log_prob(x, mean, std)
    entropy = flow.gaussian_entropy(std)
    assert log_prob[0].item() == 0 and entropy[0].item() == 0
    (log_prob.sum() + entropy.sum()).backward()
    assert mean.grad is not None and std.grad is not None
    assert mean.grad.tolist() == pytest.approx([0, 0.2 / 0.25])
    assert std.grad.tolist() == pytest.approx([0, (-2 + 0.2**2 / 0.5**3) + 2], abs=1e-6)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_time_grid_runs_from_noise_to_data(num_steps):
    grid = flow.time_grid(num_steps)
    assert grid.dtype == torch.float32
    assert grid.tolist() == torch.tensor([1 - i / num_steps for i in range(num_steps + 1)], dtype=torch.float64).float().tolist()
    assert (grid[0].item(), grid[-1].item()) == (1, 0)


def test_time_grid_needs_a_step():
    with pytest.raises(ValueError, match="at least one step"):
        flow.time_grid(0)


def test_estimates_invert_the_interpolation():
    generator = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=generator).unbind()
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x_t = flow.interpolate(x0, noise, t)
    close(x_t[2], 0.1 * x0[2] + 0.9 * noise[2])
    close(flow.clean_estimate(x_t, noise - x0, t), x0)
    close(flow.noise_estimate(x_t, noise - x0, t), noise)
