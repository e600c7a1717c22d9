"""Tiny pipelines of diffusers' own classes with random weights, and what tests ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from assets.make_tiny_sd3 import build_tokenizer, text_config, transformer_config, vae_config, write
from mmrl.messages import Message, Picture
from mmrl.numerics.draws import Draws
from mmrl.types import Conversation, Observation, Talks
from policies.diffusion import Diffusion

CPU = torch.device("cpu")
SIZE, STEPS = 16, 4
TEXTS = ("a red circle", "two blue squares", "a red circle", "a green star above a ring", "one")


def write_sd3(folder: Path, **scheduler: Any) -> str:
    """The architecture of an SD3 of two layers for pictures of 16 x 16; ``scheduler``: fields of FlowMatchEulerDiscreteScheduler."""
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
    defaults: dict[str, Any] = {"weights": "random", "height": SIZE, "width": SIZE, "steps": STEPS, "guidance": 3.0, "max_text_tokens": 0}
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
