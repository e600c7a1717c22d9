"""Tiny pipelines of diffusers' own classes with random weights, and what tests ask of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from assets.make_tiny_sd3 import build_tokenizer, text_config, transformer_config, vae_config, write
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.types import Conversation, Observation, Talks
from policies.diffusion import Diffusion

CPU = torch.device("cpu")
SIZE, STEPS = 16, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ("a red circle", "two blue squares", "a red circle", "a green star above a ring", "one")


def write_sd3(folder: Path, **scheduler: Any) -> str:
    """The architecture of an SD3 of two layers for pictures of 16 x 16; ``scheduler``: fields of its scheduler."""
    tokenizer = build_tokenizer(("a", "red", "circle", "blue", "two", "squares"), 12)
    transformer = transformer_config(text_width=16, heads=2, head_dim=8, layers=2)
    text = text_config(tokenizer, width=16, layers=2)
    write(folder, transformer=transformer, vae=vae_config(widths=(8, 8, 16)), tokenizer=tokenizer, text=text)
    options = {"shift": 3.0, **scheduler}
    diffusers.FlowMatchEulerDiscreteScheduler(**options).save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]
    return str(folder)


def config(checkpoint: str, **fields: Any) -> Diffusion.Config:
    """Random weights, pictures of 16 x 16, guidance 3; flow_sde with noise 0.7 unless ``fields`` say otherwise."""
    sampler = fields.setdefault("sampler", "flow_sde")
    if sampler != "ode":
        fields.setdefault("noise_level", 0.7)
    defaults: dict[str, Any] = {
        "weights": "random",
        "height": SIZE,
        "width": SIZE,
        "steps": STEPS,
        "guidance": 3.0,
        "max_text_tokens": 0,
    }
    return Diffusion.Config(checkpoint=checkpoint, **{**defaults, **fields})


def build(checkpoint: str, **fields: Any) -> Diffusion:
    """A policy whose weights are stirred, so that nothing is zero just because it starts there."""
    policy = Diffusion(config(checkpoint, **fields), device=CPU)
    return stir(policy)


@torch.no_grad()
def stir(policy: Any, seed: int = 3, size: float = 0.5) -> Any:
    """Add noise to the network's weights, by name, so that equal names get equal noise."""
    for name, parameter in policy.network.named_parameters():
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter += size * noise / parameter[0].numel() ** 0.5
    return policy


def talk(text: str, *pictures: Picture) -> Conversation:
    return (Message("user", (*pictures, text)),)


def observe(texts: tuple[str, ...] = TEXTS, pictures: tuple[Picture, ...] = ()) -> Observation:
    shown = [(pictures[i],) if pictures else () for i in range(len(texts))]
    return Observation({}, None, texts, conversations=tuple(talk(t, *s) for t, s in zip(texts, shown, strict=True)))


def draws(seed: int = 0, rows: int = len(TEXTS)) -> Draws:
    return Draws.of(seed, torch.arange(rows))


def picture(seed: int, size: int = SIZE) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def lessons(count: int = 3) -> Talks:
    """Conversations to imitate."""
    return Talks(tuple((*talk(TEXTS[i]), Message("assistant", (picture(i),))) for i in range(count)))


def pixels(column: Any) -> Tensor:
    """The pictures of a decision's action as numbers from 0 to 255: [B, height, width, 3]."""
    shown = [message.pictures[0].image for message in column.tolist()]
    return torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in shown]).long()


def assert_replays(policy: Any, observation: Observation | None = None, atol: float = 0.0) -> None:
    """Scoring again at unchanged weights gives the numbers of acting, and a gradient."""
    observation = observe() if observation is None else observation
    decision = policy.act(observation, draws(1, observation.batch_size), explore=True)
    with policy.compute_mode(train=True):
        scored = policy.evaluate(decision.trace)
    torch.testing.assert_close(scored.log_probs_NK, decision.log_probs_BK, rtol=0, atol=atol)
    torch.testing.assert_close(scored.means_NKD, decision.means_BKD, rtol=0, atol=atol)
    assert scored.log_probs_NK.std() > 1e-3 and scored.log_probs_NK.isfinite().all()
    scored.log_probs_NK.sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in policy.parameters())
    policy.zero_grad(set_to_none=True)


# -- other families ----------------------------------------------------------------------------------------------------


def t5(width: int = 16) -> tuple[Any, Any]:
    """A tiny T5 encoder and its tokenizer, which knows letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=12)
    size = {"vocab_size": len(tokenizer), "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**size)), tokenizer


def clip(*, projection: bool, width: int = 16) -> tuple[Any, Any]:
    tokenizer = build_tokenizer(("a", "red", "circle", "blue", "two", "squares"), 12)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(text_config(tokenizer, width=width, layers=2)), tokenizer


def vae(channels: int = 4, **fields: Any) -> Any:
    settings = vae_config(widths=(8, 8))
    return diffusers.AutoencoderKL(**{**settings, "latent_channels": channels, **fields})  # type: ignore[attr-defined]


def save(pipeline: Any, folder: Path) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)


def write_flux(folder: Path, kind: Any, *, distilled: bool = True) -> str:
    """A FLUX.1 of two blocks; ``kind``: its pipeline."""
    torch.manual_seed(0)
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = clip(projection=False), t5()
    transformer = diffusers.FluxTransformer2DModel(  # type: ignore[attr-defined]
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=distilled,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # type: ignore[attr-defined]
    return save(
        kind(
            scheduler=scheduler,
            vae=vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        ),
        folder / "flux",
    )


def load(folder: str, **fields: Any) -> Diffusion:
    return stir(Diffusion(config(folder, weights="pretrained", **{"max_text_tokens": None, **fields}), device=CPU))


def assert_follows(policy: Diffusion, images: Any, observation: Observation | None = None, atol: float = 1e-4) -> None:
    """Without exploration it draws what diffusers' pipeline draws; ``images`` makes its pictures of noise, numbers 0 to 1."""
    observation = observe() if observation is None else observation
    made = policy.act(observation, draws(0, observation.batch_size), explore=False)
    noise = draws(0, observation.batch_size).normal(*policy.family.latent_shape).to(policy.network.dtype)
    policy.family.pipeline.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(images(policy.family.pipeline, noise) * 255).round().long()
    assert (pixels(made.action) - theirs).abs().max() <= 1 and theirs.float().std() > 2
    for other in (made.action.tolist()[0], made.action.tolist()[1]):
        assert other.pictures[0].image.size == (policy.family.width, policy.family.height)


def assert_learns_and_travels(policy: Diffusion, folder: Path, talks: Talks | None = None) -> None:
    """It imitates, knows its velocity, and what it saves opens as the same policy."""
    talks = lessons() if talks is None else talks
    loss = policy.supervised_loss(talks, torch.Generator().manual_seed(0))
    loss.value.backward()
    assert loss.value.isfinite() and any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in policy.parameters())
    policy.zero_grad(set_to_none=True)
    trace = policy.examine(talks)
    t = torch.full((len(talks),), 0.5)
    clean = policy.clean(trace)
    assert policy.velocity(trace, clean, t).shape == clean.shape == (len(talks), *policy.family.latent_shape)
    back = torch.stack([torch.from_numpy(np.asarray(p.image).copy()) for p in policy.pictures(clean)])
    assert back.shape == (len(talks), policy.family.height, policy.family.width, 3)
    policy.save(folder / "saved")
    again = Diffusion(replace(policy.config, checkpoint=str(folder / "saved"), weights="pretrained"), device=CPU)
    seen = Observation({}, None, ("",) * len(talks), conversations=tuple(talk[:1] for talk in talks.conversations))
    ours, theirs = (p.act(seen, draws(0, len(talks)), explore=False).action for p in (policy, again))
    assert (pixels(ours) - pixels(theirs)).abs().max() <= 1
