"""pi0 against transformers' own ``PI0ForConditionalGeneration``: velocity, acting, imitation loss, and the images it sees.

Weights are float64; transformers' norms still compute in float32, so numbers agree to about 1e-7, not to 1e-15.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.types import Examples, Observation
from policies.pi0 import Pi0
from policies.pi0_parts.prefix import preprocess
from tests.policies import tiny

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def normalised(policy: Pi0, actions_BHA: Tensor) -> Tensor:
    """Actions as the network sees them, padded: [B, H, 6]."""
    assert policy.statistics is not None
    dim = policy.action_dim
    mean, std = (
        torch.tensor(x[:dim], dtype=torch.float64) for x in (policy.statistics.actions_mean, policy.statistics.actions_std)
    )
    padded = torch.zeros(*actions_BHA.shape[:2], tiny.PADDED_ACTION, dtype=torch.float64)
    padded[..., :dim] = (actions_BHA[..., :dim].double() - mean) / std
    return padded


def flow_draws(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The noise and the times that ``supervised_loss`` draws from a generator of this seed."""
    generator = tiny.generator(seed)
    noise = torch.randn(rows, tiny.HORIZON, tiny.PADDED_ACTION, generator=generator, dtype=torch.float64)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    return noise, 0.999 * uniform ** (2 / 3) + 0.001


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_velocity_over_the_cached_prefix_is_upstream_s(architecture: str, attention: str) -> None:
    policy = tiny.build(architecture, dtype="float64", attention=attention)
    seen = tiny.observation(5)
    x = torch.randn(5, tiny.HORIZON, tiny.PADDED_ACTION, dtype=torch.float64)
    t_B = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.003], dtype=torch.float64)
    inputs = policy._inputs(seen)
    prefix = policy._encode(inputs)
    assert (prefix.mask == 0).any(), "no padding, so the test would not see it attended to"
    for _ in range(2):  # a second pass over the same prefix sees the same prefix
        ours = policy._expert(prefix, inputs["state"], x, t_B)[0]
        upstream = policy.model(noise=x, timestep=t_B, **tiny.upstream_inputs(policy, seen)).logits
        close(ours, upstream)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_acting_without_exploration_is_upstream_s_sample_actions(architecture: str, steps: int) -> None:
    policy = tiny.build(architecture, dtype="float64", denoising_steps=steps)
    seen = tiny.observation(5)
    noise = tiny.draws(4).normal(tiny.HORIZON, tiny.PADDED_ACTION, dtype=torch.float64)
    inputs: dict[str, Any] = {"noise": noise, **tiny.upstream_inputs(policy, seen)}
    chunk = policy.model.sample_actions(num_steps=steps, **inputs)
    assert policy.statistics is not None
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (policy.statistics.actions_mean, policy.statistics.actions_std))
    expected = chunk[:, : tiny.EXECUTE, : tiny.ACTION] * std + mean
    decision = policy.act(seen, tiny.draws(4), explore=False)
    torch.testing.assert_close(decision.action, expected, rtol=1e-4, atol=1e-4)  # rounding grows over the chain


def test_supervised_loss_is_upstream_s_where_nothing_is_padded(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.write_architecture(tmp_path_factory.mktemp("pi0"), statistics=False)
    policy = tiny.build(folder, dtype="float64", action_dim=tiny.PADDED_ACTION)
    examples = tiny.examples(5, dim=tiny.PADDED_ACTION, ended=False)
    policy.fit_statistics(examples)
    noise, t_B = flow_draws(5, seed=7)
    inputs = tiny.upstream_inputs(policy, examples.observation)
    upstream = policy.model(actions=normalised(policy, examples.actions_BHA), noise=noise, timestep=t_B, **inputs).loss
    ours = policy.supervised_loss(examples, tiny.generator(7)).value
    close(ours, upstream)


def upstream_errors(policy: Pi0, examples: Examples, noise: Tensor, t_B: Tensor) -> list[float]:
    """Squared velocity errors of the real entries, one by one."""
    actions = normalised(policy, examples.actions_BHA)
    x_t = t_B[:, None, None] * noise + (1 - t_B[:, None, None]) * actions
    velocity = policy.model(noise=x_t, timestep=t_B, **tiny.upstream_inputs(policy, examples.observation)).logits
    return [
        float(velocity[b, h, d] - (noise[b, h, d] - actions[b, h, d])) ** 2
        for b in range(len(examples))
        for h in range(tiny.HORIZON)
        for d in range(tiny.ACTION)
        if examples.mask_BH[b, h]
    ]


@torch.no_grad()
def test_supervised_loss_leaves_padding_out(architecture: str) -> None:
    policy = tiny.build(architecture, dtype="float64")
    examples = tiny.examples(5)
    assert not examples.mask_BH.all()
    errors = upstream_errors(policy, examples, *flow_draws(5, seed=2))
    loss = policy.supervised_loss(examples, tiny.generator(2)).value
    assert float(loss) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@torch.no_grad()
def test_several_flow_samples_are_the_mean_over_draws(architecture: str) -> None:
    policy = tiny.build(architecture, dtype="float64", flow_samples=3)
    examples = tiny.examples(4)
    noise, t = flow_draws(4 * 3, seed=5)
    losses = [upstream_errors(policy, examples, noise[draw::3], t[draw::3]) for draw in range(3)]
    expected = sum(sum(errors) / len(errors) for errors in losses) / 3
    assert float(policy.supervised_loss(examples, tiny.generator(5)).value) == pytest.approx(expected, rel=1e-5)


def test_flow_times_follow_beta_of_1_5_and_1(architecture: str) -> None:
    policy = tiny.build(architecture)
    size = 20_000
    ours = (policy._flow_times(size, tiny.generator(1), torch.float32) - 0.001) / 0.999
    beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))
    assert float(ours.mean()) == pytest.approx(float(beta.mean), abs=4 * float(beta.stddev) / size**0.5)
    assert float(ours.var()) == pytest.approx(float(beta.variance), rel=0.03)
    torch.manual_seed(2)
    theirs = beta.sample((size,))
    grid = torch.linspace(0, 1, 501)
    gap = torch.searchsorted(ours.sort().values, grid) - torch.searchsorted(theirs.sort().values, grid)
    assert float(gap.abs().max()) / size < 1.63 * (2 / size) ** 0.5  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_images_keep_their_aspect_and_are_padded_with_black(dtype: torch.dtype) -> None:
    image = torch.full((1, 20, 40, 3), 204, dtype=torch.uint8)
    pixels = preprocess(image, 32, dtype)
    assert pixels.dtype == dtype
    expected = torch.full((1, 3, 32, 32), -1.0)
    expected[:, :, 8:24] = 204 / 127.5 - 1
    torch.testing.assert_close(pixels.float(), expected, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_shrinking_averages_over_what_a_pixel_covers() -> None:
    """A checkerboard of single pixels becomes grey inside; sampling without antialiasing would keep black or white."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    image = board.to(torch.uint8)[None, :, :, None].expand(1, 64, 64, 3)
    torch.testing.assert_close(
        preprocess(image, 16, torch.float32)[..., 2:-2, 2:-2], torch.zeros(1, 3, 12, 12), rtol=0, atol=0.02
    )


def test_cameras_are_told_apart(architecture: str) -> None:
    """Swapping the two images changes the action, and ``cameras`` orders them."""
    policy = tiny.build(architecture)
    other = tiny.build(architecture, cameras=tuple(reversed(tiny.CAMERAS)))
    seen = tiny.observation(5)
    front, wrist = tiny.CAMERAS
    swapped = Observation({front: seen.images[wrist], wrist: seen.images[front]}, seen.state, seen.instructions)
    plain, crossed = (policy.act(o, tiny.draws(), explore=False).action for o in (seen, swapped))
    assert (plain - crossed).abs().max() > 1e-4
    assert torch.equal(other.act(swapped, tiny.draws(), explore=False).action, plain)
