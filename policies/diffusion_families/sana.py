"""Sana (arXiv 2410.10629): a language model reads the prompt behind an instruction, and the VAE compresses 32-fold.

Every step is Euler's over the scheduler's sigmas, also where the checkpoint names a solver of higher order (DPM-Solver).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor

from policies.diffusion_families.base import Embedding, Family


class Sana(Family):
    """See the module."""

    def default_size(self) -> int:
        return self.network.config.sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        return max(32, super().multiple())  # the pipeline asks for 32

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(texts),
            do_classifier_free_guidance=False,
            device=self.network.device,
            complex_human_instruction=None if negative else instruction,
            **self.text_options(),
        )
        return {"embeds": embeds, "mask": mask}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        said = self.network(
            x,
            encoder_hidden_states=embedding["embeds"].to(x.dtype),
            encoder_attention_mask=embedding["mask"],
            timestep=time_B * self.network.config.timestep_scale,
            return_dict=False,
        )[0]
        # A network that also says a variance says it in a second half.
        return said[:, : x.shape[1]]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        with self.vae_alone:
            encoded = self.pipeline.vae.encode(pixels.to(self.pipeline.vae.dtype)).latent
        return self.to_latents(encoded)
