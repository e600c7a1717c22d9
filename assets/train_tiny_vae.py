"""Train the VAE of the tiny Stable Diffusion 3 on drawn scenes and words, from random weights.

    python assets/train_tiny_vae.py [--updates 2000] [--folder assets/tiny_sd3_architecture]

The pictures' absolute error (with ``--squared`` as much of the squared, without which a narrow VAE confuses colours), and a
little of the latents' KL to a standard normal; AdamW with a cosine. Afterwards the latents'
mean and standard deviation over fresh pictures become ``shift_factor`` and ``scaling_factor``, so that the transformer sees
numbers of mean 0 and deviation 1. Prints the error on pictures that training did not see.
``configs/pretrain/tiny_sd3.yaml`` trains the rest of the base and keeps this VAE; tiny_sd3_scenes.yaml that of scenes alone.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor

from simulators.image_prompts import ShapePrompts, WordPrompts

KL_WEIGHT = 1e-5
FRESH = 10_000_000  # task ids from here on are not trained on


PROMPTS = {
    "scenes": lambda: ShapePrompts(ShapePrompts.Config()),
    "words": lambda: WordPrompts(WordPrompts.Config(width=32, height=32, longest=3)),
}


class Pictures:
    """Batches of each of ``kinds`` by turns, [N, 3, height, width] between -1 and 1."""

    def __init__(self, kinds: Sequence[str], first: int) -> None:
        self._prompts = [PROMPTS[kind]() for kind in kinds]
        self._next = first

    def batch(self, size: int) -> Tensor:
        prompts = self._prompts[self._next // size % len(self._prompts)]
        tasks = range(self._next, self._next + size)
        self._next += size
        drawn = [prompts.draw(prompts.question(task), random.Random(task)).image for task in tasks]
        return torch.stack([torch.from_numpy(np.array(image)) for image in drawn]).permute(0, 3, 1, 2) / 127.5 - 1


def train(vae: AutoencoderKL, pictures: Pictures, *, updates: int, batch: int, lr: float, squared: bool) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / updates))
    )
    for _ in track(range(updates), "training the VAE"):
        x = pictures.batch(batch)
        posterior = vae.encode(x).latent_dist  # type: ignore[union-attr]
        error = (vae.decode(posterior.sample()).sample - x).abs()  # type: ignore[union-attr]
        loss = (error + error.square() if squared else error).mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def finish(vae: AutoencoderKL, kinds: Sequence[str]) -> list[float]:
    """Sets shift and scale; the absolute error (of 255) on fresh pictures of each kind."""
    pictures, latents, errors = Pictures(kinds, FRESH), [], []
    for _ in range(4 * len(kinds)):
        x = pictures.batch(128)
        z = vae.encode(x).latent_dist.mode()  # type: ignore[union-attr]
        latents.append(z.flatten())
        errors.append(float((vae.decode(z).sample.clamp(-1, 1) - x).abs().mean() * 127.5))  # type: ignore[union-attr]
    every = torch.cat(latents)
    vae.register_to_config(shift_factor=float(every.mean()), scaling_factor=float(1 / every.std()))
    return [sum(errors[at :: len(kinds)]) / 4 for at in range(len(kinds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "tiny_sd3_architecture")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kinds", nargs="+", choices=list(PROMPTS), default=list(PROMPTS), help="of pictures")
    parser.add_argument("--squared", action="store_true", help="add the squared error")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(arguments.folder / "vae"))
    kinds: list[str] = arguments.kinds
    budget = {"updates": arguments.updates, "batch": arguments.batch, "lr": arguments.lr}
    train(vae, Pictures(kinds, 0), **budget, squared=arguments.squared)
    errors = ", ".join(f"{kind} {error:.2f}" for kind, error in zip(kinds, finish(vae, kinds), strict=True))
    vae.save_pretrained(arguments.folder / "vae")
    print(f"absolute error of 255: {errors}; wrote {arguments.folder / 'vae'}")


if __name__ == "__main__":
    main()
