"""Qwen-Image (arXiv 2508.02324): a vision-language model reads the prompt, whose length is its own, so batches are padded.

Guidance keeps the length of each token's conditional velocity, as in the pipeline. The VAE is one of videos, here of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from policies.diffusion_families.base import Embedding
from policies.diffusion_families.flux import Flux


class QwenImage(Flux):
    """See the module. Tokens, times and dynamic shifting are as FLUX's."""

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        embeds, mask = self.pipeline.encode_prompt(list(texts), device=self.network.device, **self.text_options())
        there = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        return {"embeds": embeds, "mask": there if mask is None else mask}

    def collate(self, rows: Sequence[Embedding]) -> dict[str, Tensor]:
        longest = max(row["mask"].shape[1] for row in rows)

        def padded(x: Tensor) -> Tensor:
            return nn.functional.pad(x, (0,) * (2 * x.ndim - 3) + (longest - x.shape[1],))

        return {name: torch.cat([padded(row[name]) for row in rows]) for name in rows[0]}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        mask = embedding["mask"]
        shape = (1, self.height // self.multiple(), self.width // self.multiple())
        return self.network(
            hidden_states=x,
            timestep=time_B.to(x.dtype) / 1000,
            guidance=guidance_B,
            encoder_hidden_states=embedding["embeds"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[shape]] * len(x),
            return_dict=False,
        )[0]

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        both = super().guide(conditional, unconditional, scale)
        return both * (conditional.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))

    def to_latents(self, encoded: Tensor) -> Tensor:
        mean, std = self._moments(encoded)
        latents = ((encoded - mean) / std)[:, :, 0]
        return self.pipeline._pack_latents(latents, *latents.shape)

    def from_latents(self, latents: Tensor) -> Tensor:
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        mean, std = self._moments(unpacked)
        return unpacked * std + mean

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (like.new_tensor(values).reshape(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean, std

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return super().encode_pixels(pixels[:, :, None])

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, :, 0]
