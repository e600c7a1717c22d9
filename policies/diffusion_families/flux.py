"""FLUX.1, whose latents are tokens of 2 x 2, and FLUX.1 Kontext, which edits: a picture's tokens stand behind the noisy ones.

FLUX.1-dev is guidance-distilled: the scale of guidance is an input of the network, and there is no branch without prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.messages import Picture
from policies.diffusion_families.base import Embedding, Family


class Flux(Family):
    """See the module."""

    def default_size(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.tokens(), self.network.config.in_channels)

    def tokens(self) -> int:
        return (self.height // self.multiple()) * (self.width // self.multiple())

    def set_timesteps(self, steps: int) -> None:
        self.pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self.mu())

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(texts), None, device=self.network.device, **self.text_options())
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        return self.ask(x, self._ids(x), time_B, embedding, guidance_B)

    def ask(self, tokens: Tensor, ids: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        """The network on tokens [B, S, C] at the places ``ids`` [S, 3]."""
        embeds = embedding["embeds"]
        return self.network(
            hidden_states=tokens,
            timestep=time_B.to(tokens.dtype) / 1000,
            guidance=guidance_B,
            pooled_projections=embedding["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]

    def _ids(self, x: Tensor) -> Tensor:
        height, width = self.height // self.multiple(), self.width // self.multiple()
        return self.pipeline._prepare_latent_image_ids(len(x), height, width, x.device, x.dtype)

    def to_latents(self, encoded: Tensor) -> Tensor:
        return self.pipeline._pack_latents(super().to_latents(encoded), *encoded.shape)

    def from_latents(self, latents: Tensor) -> Tensor:
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        return super().from_latents(unpacked)


class Kontext(Flux):
    """The picture to edit is resized to the size that is drawn; prompts without one are drawn from text alone."""

    edits = True

    def show(self, pictures: Sequence[Sequence[Picture]]) -> Embedding:
        if any(len(shown) != 1 for shown in pictures):
            raise MMRLError("a prompt shows several pictures, but FLUX.1 Kontext edits one; leave the others out")
        images = [shown[0].image for shown in pictures]
        pixels = self.pipeline.image_processor.preprocess(images, self.height, self.width)
        return {"picture": self.encode_pixels(pixels.to(self.network.device)).to(self.network.dtype)}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        if "picture" not in embedding:
            return super().predict(x, time_B, embedding, guidance_B)
        ids = self._ids(x)
        shown = ids.clone()
        shown[:, 0] = 1
        tokens = torch.cat([x, embedding["picture"]], 1)
        return self.ask(tokens, torch.cat([ids, shown]), time_B, embedding, guidance_B)[:, : x.shape[1]]
