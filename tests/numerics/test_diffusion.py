"""Steps of noise-predicting models. Oracle: diffusers' DDIMScheduler, with and without noise."""

import itertools

import pytest
import torch

from mmrl.numerics import diffusion, flow

diffusers = pytest.importorskip("diffusers")

LEVELS = torch.tensor([0.01, 0.2, 0.7, 0.99], dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [5, 20])
def test_a_step_is_diffusers(eta: float, steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        noise, drawn = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        before = t - 1000 // steps
        share, share_next = (scheduler.alphas_cumprod[i] if i >= 0 else scheduler.final_alpha_cumprod for i in (t, before))
        mean, std = diffusion.ddim(x, noise, share, share_next, eta=eta)
        theirs = scheduler.step(noise, t, x, eta=eta, variance_noise=drawn).prev_sample
        torch.testing.assert_close(mean + std * drawn, theirs, rtol=1e-5, atol=1e-5)
        assert (float(std) > 0) == (eta > 0 and t > 0)  # the schedule ends where it stands at t = 0
        x = theirs


def test_with_eta_one_the_variance_is_the_posterior_s() -> None:
    """Given x0, DDPM's posterior of the state before: its mean and variance in Ho et al.'s form (arXiv 2006.11239, formula 7)."""
    share, share_next = torch.tensor([0.3, 0.6], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)
    x0, noise = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = diffusion.noised(x0, noise, share)
    mean, std = diffusion.ddim(x, noise, share, share_next, eta=1.0)
    s, n = share[:, None], share_next[:, None]
    beta = 1 - s / n
    expected = n.sqrt() * beta / (1 - s) * x0 + (s / n).sqrt() * (1 - n) / (1 - s) * x
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(std**2, (1 - n) / (1 - s) * beta)


def test_without_noise_it_is_an_euler_step_of_the_flow_in_other_coordinates() -> None:
    x0, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for share, share_next in itertools.pairwise(LEVELS):
        x = diffusion.noised(x0, noise, share)
        predicted = 0.7 * noise + 0.1 * x0
        t, t_next = diffusion.flow_time(share), diffusion.flow_time(share_next)
        z = x / (share.sqrt() + (1 - share).sqrt())
        torch.testing.assert_close(z, flow.interpolate(x0, noise, t))
        clean = (x - (1 - share).sqrt() * predicted) / share.sqrt()
        euler = flow.transition(z, predicted - clean, t, t_next, rule="ode").mean
        mean = diffusion.ddim(x, predicted, share, share_next, eta=0.0).mean
        torch.testing.assert_close(mean / (share_next.sqrt() + (1 - share_next).sqrt()), euler)


def test_shares_and_times_are_inverse() -> None:
    torch.testing.assert_close(diffusion.share_at(diffusion.flow_time(LEVELS)), LEVELS)
    assert float(diffusion.flow_time(torch.tensor(0.5))) == pytest.approx(0.5)


def test_a_step_to_the_data_has_no_noise_and_no_nan() -> None:
    x, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3))
    mean, std = diffusion.ddim(x, noise, torch.tensor(0.9), torch.tensor(1.0), eta=1.0)
    assert float(std) == 0
    torch.testing.assert_close(mean, (x - 0.1**0.5 * noise) / 0.9**0.5)


def test_an_eta_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eta 1\.5 is out of range"):
        diffusion.ddim(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor(0.5), torch.tensor(0.6), eta=1.5)
