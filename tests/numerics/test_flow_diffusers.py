"""Oracle: diffusers' own Euler scheduler, which our rules must reproduce when they add no noise."""

import pytest
import torch

from mmrl.numerics import flow

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("rule", "noise_level"), [("ode", None), ("flow_sde", 0.0), ("cps", 0.0), ("constant", 0.0)])
def test_without_noise_we_walk_like_diffusers(rule, noise_level, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 4, 3, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 4, 3, generator=generator)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        t, t_next = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        t_star = flow.guarded_time(t, t_next)
        ours = flow.transition(ours, velocity, t, t_next, rule=rule, noise_level=noise_level, t_star=t_star).mean
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
