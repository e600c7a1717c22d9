"""Stable Diffusion 1.5, 2 and XL: U-Nets that predict noise (or v), sampled by DDIM whatever scheduler the checkpoint names.

So does DDPO (arXiv 2305.13301). The pipeline that is saved has the DDIM scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from policies.diffusion_families.base import Embedding, Family
from policies.diffusion_parts.schedule import NoiseSchedule, Schedule


class StableDiffusion(Family):
    """See the module."""

    network_name = "unet"

    def make_schedule(self) -> Schedule:
        scheduler: Any = DDIMScheduler.from_config(self.pipeline.scheduler.config, clip_sample=False, thresholding=False)
        self.pipeline.register_modules(scheduler=scheduler)
        return NoiseSchedule(scheduler)

    def multiple(self) -> int:
        return self.pipeline.vae_scale_factor * 2 ** (len(self.network.config.block_out_channels) - 1)

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        embeds, _ = self.pipeline.encode_prompt(
            list(texts), self.network.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeds": embeds}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        return self.network(x, time_B, encoder_hidden_states=embedding["embeds"], return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, and the size of the picture as an input."""

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        found = self.pipeline.encode_prompt(list(texts), device=self.network.device, do_classifier_free_guidance=negative)
        embeds, empty, pooled, empty_pooled = found
        return {"embeds": empty, "pooled": empty_pooled} if negative else {"embeds": embeds, "pooled": pooled}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        pooled, size = embedding["pooled"], (self.height, self.width)
        encoder = self.pipeline.text_encoder_2
        width = pooled.shape[-1] if encoder is None else encoder.config.projection_dim
        ids = self.pipeline._get_add_time_ids(size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=width)
        added = {"text_embeds": pooled, "time_ids": ids.to(x.device).expand(len(x), -1)}
        return self.network(x, time_B, encoder_hidden_states=embedding["embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def to_latents(self, encoded: Tensor) -> Tensor:
        moments = self._moments(encoded)
        return super().to_latents(encoded if moments is None else (encoded - moments[0]) / moments[1])

    def from_latents(self, latents: Tensor) -> Tensor:
        decoded, moments = super().from_latents(latents), self._moments(latents)
        return decoded if moments is None else decoded * moments[1] + moments[0]

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of each channel of the latents, where the VAE knows them."""
        config = self.pipeline.vae.config
        given = [config.get(name) for name in ("latents_mean", "latents_std")]
        if any(values is None for values in given):
            return None
        mean, std = (torch.tensor(values, device=like.device, dtype=like.dtype).reshape(1, -1, 1, 1) for values in given)
        return mean, std
