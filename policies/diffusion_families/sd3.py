"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and, where there is one, a T5."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from policies.diffusion_families.base import Embedding, Family


class SD3(Family):
    """See the module."""

    def encode(self, texts: Sequence[str], *, negative: bool = False) -> Embedding:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, do_classifier_free_guidance=False, device=self.network.device, **self.text_options()
        )
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, x: Tensor, time_B: Tensor, embedding: Embedding, guidance_B: Tensor | None) -> Tensor:
        return self.network(
            hidden_states=x,
            timestep=time_B,
            encoder_hidden_states=embedding["embeds"],
            pooled_projections=embedding["pooled"],
            return_dict=False,
        )[0]
