"""Qwen-Image (arXiv 2508.02324) and Qwen-Image-Edit: a vision-language model reads the prompt.

Its length is its own, so batches are padded. Guidance keeps the length of each token's conditional velocity, as in the pipeline.
The VAE is one of videos, here of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmrl.errors import MMRLError
from mmrl.messages import Picture
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

        def padded(row: Embedding) -> Embedding:
            missing = longest - row["mask"].shape[1]
            text = {
                "embeds": nn.functional.pad(row["embeds"], (0, 0, 0, missing)),
                "mask": nn.functional.pad(row["mask"], (0, missing)),
            }
            return {**row, **text}

        return super().collate([padded(row) for row in rows])

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        mask, shown = embedding["mask"], [embedding["picture"]] if "picture" in embedding else []
        shape = (1, self.height // self.multiple(), self.width // self.multiple())
        said = self.network(
            hidden_states=torch.cat([x, *shown], 1),
            timestep=time_B.to(x.dtype) / 1000,
            guidance=guidance_B,
            encoder_hidden_states=embedding["embeds"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[shape] * (1 + len(shown))] * len(x),
            return_dict=False,
        )[0]
        return said[:, : x.shape[1]]

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


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: the language model sees the picture to edit, and its tokens stand behind the noisy ones.

    As with FLUX.1 Kontext the picture is resized to the size that is drawn; the pipeline makes it 1024 x 1024 pixels, or as many
    of another shape, whatever size is asked for.
    """

    edits = True

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        raise MMRLError("a prompt shows no picture, but Qwen-Image-Edit needs one to edit; draw from text with Qwen-Image")

    def read(self, text: str, pictures: Sequence[Picture], *, negative: bool = False) -> Embedding:
        if len(pictures) > 1:
            raise MMRLError("a prompt shows several pictures, but Qwen-Image-Edit edits one; leave the others out")
        if not pictures:
            return self.encode([text])
        pipeline, device = self.pipeline, self.network.device
        image = pipeline.image_processor.resize(pictures[0].image, self.height, self.width)
        embeds, mask = pipeline.encode_prompt([text], image=image, device=device, **self.text_options())
        pixels = pipeline.image_processor.preprocess(image, self.height, self.width)
        picture = self.encode_pixels(pixels.to(device)).to(self.network.dtype)
        there = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        return {"embeds": embeds, "mask": there if mask is None else mask, "picture": picture}
