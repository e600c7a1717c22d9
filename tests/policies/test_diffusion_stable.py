"""Tiny U-Nets of Stable Diffusion 1.5, 2 and XL, sampled by DDIM: they draw what diffusers' pipelines draw."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.policies import tiny_diffusion as tiny

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLER = {"sampler": "ddim", "noise_level": 1.0}


def unet(**fields: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": 16, **fields},
    )


def write(folder: Path, **scheduler: Any) -> str:
    text_encoder, tokenizer = tiny.clip(projection=False)
    pipeline = StableDiffusionPipeline(
        vae=tiny.vae(scaling_factor=0.9, shift_factor=None),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **BETAS, **scheduler),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    return tiny.save(pipeline, folder / "sd")


def write_xl(folder: Path) -> str:
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = tiny.clip(projection=False), tiny.clip(projection=True)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}
    pipeline = StableDiffusionXLPipeline(
        vae=tiny.vae(scaling_factor=0.9, shift_factor=None),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        unet=unet(cross_attention_dim=32, **added),
        scheduler=DDIMScheduler(set_alpha_to_one=False, steps_offset=1, clip_sample=False, **BETAS),  # type: ignore[arg-type]
    )
    return tiny.save(pipeline, folder / "xl")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_xl(tmp_path_factory.mktemp("xl"))


def images(pipeline: Any, noise: torch.Tensor) -> Any:
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": tiny.STEPS}
    return pipeline(list(tiny.TEXTS), latents=noise, guidance_scale=3.0, output_type="np", eta=0.0, **size).images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion(tmp_path: Path, prediction: str) -> None:
    policy = tiny.load(write(tmp_path, prediction_type=prediction), **SAMPLER)
    tiny.assert_follows(policy, images)
    tiny.assert_replays(policy)
    tiny.assert_learns_and_travels(policy, tmp_path)


def test_stable_diffusion_xl(xl: str, tmp_path: Path) -> None:
    policy = tiny.load(xl, **SAMPLER)
    tiny.assert_follows(policy, images)
    tiny.assert_replays(policy)
    tiny.assert_learns_and_travels(policy, tmp_path)


def test_what_is_drawn_is_the_scheduler_s_step_and_scored_by_its_formula(sd: str) -> None:
    policy = tiny.load(sd, **SAMPLER, dtype="float64", guidance=1.0)
    made = policy.act(tiny.observe(), tiny.draws(), explore=True)
    scheduler: Any = DDIMScheduler.from_config(policy.family.pipeline.scheduler.config)
    scheduler.set_timesteps(tiny.STEPS)
    stream = tiny.draws()
    x = stream.normal(*policy.family.latent_shape, dtype=torch.float64)
    embeds, _ = policy.family.pipeline.encode_prompt(list(tiny.TEXTS), tiny.CPU, 1, False)
    for k, t in enumerate(scheduler.timesteps[:-1]):
        noise = policy.network(x, t, encoder_hidden_states=embeds, return_dict=False)[0].detach()
        drawn = stream.normal(*x.shape[1:], dtype=torch.float64)
        after = scheduler.step(noise, int(t), x, eta=1.0, variance_noise=drawn).prev_sample
        torch.testing.assert_close(made.trace["x_after"][:, k], after, rtol=1e-5, atol=1e-5)
        std = float(scheduler._get_variance(int(t), int(t) - 1000 // tiny.STEPS)) ** 0.5
        expected = -math.log(std) - 0.5 * math.log(2 * math.pi) - 0.5 * drawn.pow(2).flatten(1).mean(1)
        torch.testing.assert_close(made.log_probs_BK[:, k], expected, rtol=1e-4, atol=1e-4)
        x = made.trace["x_after"][:, k]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_denoising_one(tmp_path: Path, prediction: str) -> None:
    policy = tiny.load(write(tmp_path, prediction_type=prediction), **SAMPLER, dtype="float64", prompt_dropout=0.0)
    talks, generator = tiny.lessons(3), torch.Generator().manual_seed(4)
    loss = policy.supervised_loss(talks, torch.Generator().manual_seed(4)).value.detach()
    clean = policy.clean(policy.examine(talks))
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    normal = torch.randn(3, generator=generator, dtype=torch.float64)
    times = (torch.distributions.Normal(0, 1).cdf(normal) * 1000).long()
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction)  # type: ignore[arg-type]
    noisy = scheduler.add_noise(clean, noise, times)  # type: ignore[arg-type]
    embeds, _ = policy.family.pipeline.encode_prompt([t[0].text for t in talks.conversations], tiny.CPU, 1, False)
    said = policy.network(noisy, times, encoder_hidden_states=embeds, return_dict=False)[0].detach()
    target = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, times)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(float((said - target).pow(2).mean()), rel=1e-6)


def test_its_velocity_is_that_of_the_flow_with_as_much_noise(sd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that sees the noise exactly has the velocity noise - x0, whatever the time."""
    policy = tiny.load(sd, **SAMPLER, dtype="float64")
    talks = tiny.lessons(3)
    trace = policy.examine(talks)
    clean = policy.clean(trace)
    noise = torch.randn(clean.shape, dtype=torch.float64)
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(policy.family, "predict", lambda x, time, *_: (asked.append(time), noise)[1])
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = (1 - t[:, None, None, None]) * clean + t[:, None, None, None] * noise
    torch.testing.assert_close(policy.velocity(trace, x, t), noise - clean)
    shares = policy.family.pipeline.scheduler.alphas_cumprod.double()
    sigma, alpha = (1 - shares).sqrt(), shares.sqrt()
    at = sigma / (sigma + alpha)
    for time, wanted in zip(asked[0].tolist(), t.tolist(), strict=True):
        low, high = float(at[math.floor(time)]), float(at[math.ceil(time)])
        assert low - 1e-9 <= wanted <= high + 1e-9


def test_adapters_and_windows(sd: str) -> None:
    tiny.assert_replays(tiny.load(sd, **SAMPLER, train="lora", trained_steps={"which": "window", "size": 2, "start": 1}))
