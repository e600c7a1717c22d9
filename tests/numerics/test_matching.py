"""Regressions of velocity fields: DiffusionNFT's, AWM's, Diffusion-DPO's and SOAR's formulas, one sample after the other."""

from __future__ import annotations

import math

import pytest
import torch

from mmrl.numerics import matching
from mmrl.numerics.flow import interpolate

N, SHAPE = 5, (2, 3)


def draw() -> torch.Tensor:
    return torch.randn(N, *SHAPE, dtype=torch.float64)


def times() -> torch.Tensor:
    return torch.rand(N, dtype=torch.float64)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_nft_sample_by_sample() -> None:
    v, old, x0, noise, t, r, strength = draw(), draw(), draw(), draw(), times(), times(), 0.3
    x_t = interpolate(x0, noise, t)
    got = matching.nft_loss(v, old, x_t, x0, t, r, strength=strength)
    for n in range(N):
        distances = []
        for field in (strength * v[n] + (1 - strength) * old[n], (1 + strength) * old[n] - strength * v[n]):
            errors = (x_t[n] - t[n] * field - x0[n]).flatten().tolist()
            distances.append(mean([e * e for e in errors]) / mean([abs(e) for e in errors]))
        expected = (float(r[n]) * distances[0] + (1 - float(r[n])) * distances[1]) / strength
        assert float(got[n]) == pytest.approx(expected)


def test_nft_at_strength_1_and_preference_1_is_flow_matching_over_its_own_size() -> None:
    v, old, x0, noise, t = draw(), draw(), draw(), draw(), times()
    x_t = interpolate(x0, noise, t)
    got = matching.nft_loss(v.requires_grad_(), old, x_t, x0, t, torch.ones(N, dtype=torch.float64), strength=1.0)
    weight = t**2 / (t * matching.per_sample((v - (noise - x0)).detach().abs()))  # without a gradient of its own
    expected = weight * matching.matching_error(v, x0, noise)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(x.sum(), v, retain_graph=True)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_nft_at_unchanged_weights_pulls_by_2_r_minus_1_whatever_the_strength(strength: float) -> None:
    old, x0, noise, t, r = draw(), draw(), draw(), times(), times()
    v = old.clone().requires_grad_()
    x_t = interpolate(x0, noise, t)
    matching.nft_loss(v, old, x_t, x0, t, r, strength=strength).sum().backward()
    u = old.clone().requires_grad_()
    matching.clean_error(u, x_t, x0, t).sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(v.grad, (2 * r - 1)[:, None, None] * u.grad, rtol=1e-9, atol=1e-12)
    v.grad = None
    matching.nft_loss(v, old, x_t, x0, t, torch.full_like(r, 0.5), strength=strength).sum().backward()
    assert v.grad is not None and v.grad.abs().max() < 1e-12


def test_a_perfect_field_divides_by_no_0() -> None:
    x0, noise, t = draw(), draw(), times()
    v = (noise - x0).requires_grad_()
    error = matching.clean_error(v, interpolate(x0, noise, t), x0, t)
    error.sum().backward()
    assert error.abs().max() < 1e-20 and v.grad is not None and v.grad.isfinite().all()


@pytest.mark.parametrize(
    ("weighting", "weighted"),
    [
        ("uniform", lambda e, t: e),
        ("time", lambda e, t: t * e),
        ("time_squared", lambda e, t: t * t * e),
        ("huber", lambda e, t: t * (math.sqrt(e + 1e-10) - 1e-5)),
        ("power", lambda e, t: t * ((e + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25),
    ],
)
def test_awm_weightings(weighting: str, weighted) -> None:  # type: ignore[no-untyped-def]
    error, t = torch.rand(N, dtype=torch.float64), times()
    got = matching.matching_log_prob(error, t, weighting=weighting)
    assert got.tolist() == pytest.approx([-weighted(e, s) for e, s in zip(error.tolist(), t.tolist(), strict=True)])
    nothing = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    matching.matching_log_prob(nothing, t[:1], weighting=weighting).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_matching_error_is_a_mean_over_a_sample() -> None:
    v, x0, noise = draw(), draw(), draw()
    for n, got in enumerate(matching.matching_error(v, x0, noise).tolist()):
        assert got == pytest.approx(mean([e * e for e in (v[n] - noise[n] + x0[n]).flatten().tolist()]))


def test_dpo_pair_by_pair() -> None:
    best, worst, best_ref, worst_ref = (torch.rand(N, dtype=torch.float64).requires_grad_() for _ in range(4))
    loss = matching.dpo_loss(matching.dpo_margin(best, worst, best_ref, worst_ref, beta=3.0))
    for n in range(N):
        inside = -3.0 / 2 * float((best[n] - best_ref[n] - worst[n] + worst_ref[n]).detach())
        assert float(loss[n].detach()) == pytest.approx(-math.log(1 / (1 + math.exp(-inside))))
    loss.sum().backward()
    assert (best.grad > 0).all() and (worst.grad < 0).all()  # type: ignore[operator]  (a larger error of the best costs)


def test_soars_target_on_the_ray_is_that_of_flow_matching() -> None:
    z0, z1, s1 = draw(), draw(), 0.9 * times()
    s = s1 + times() * (1 - s1)
    point, target = matching.soar_point(z0, z1, interpolate(z0, z1, s1), s1, s)
    torch.testing.assert_close(point, interpolate(z0, z1, s), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(target, z1 - z0, rtol=1e-7, atol=1e-9)


def test_soars_target_leads_back_to_the_picture_from_wherever_it_starts() -> None:
    z0, z1, rolled, s1 = draw(), draw(), draw(), 0.9 * times()
    s = s1 + times() * (1 - s1)
    point, target = matching.soar_point(z0, z1, rolled, s1, s)
    torch.testing.assert_close(point - s[:, None, None] * target, z0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matching.soar_point(z0, z1, rolled, s1, s1)[0], rolled)
    torch.testing.assert_close(matching.soar_point(z0, z1, rolled, s1, torch.ones(N).double())[0], z1)


def test_shifted_times_are_those_of_sd3_and_come_back() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert matching.shifted(u, 3.0).tolist() == pytest.approx([0.0, 0.5, 0.75, 1.0])
    torch.testing.assert_close(matching.unshifted(matching.shifted(u, 3.0), 3.0), u)
    assert torch.equal(matching.shifted(u, 1.0), u)
