"""The denoising network with its prompts and guidance: what the sampler asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from policies.diffusion_families.base import Embedding, Family
from policies.diffusion_parts.prompts import Embeddings, Prompt


class Guided:
    """The network for B prompts under classifier-free guidance of ``scale``; 1 is none.

    detached: no gradient flows through the branch without prompt. drop_N: rows that are shown without their prompt (bool [N]).
    The embeddings are looked up once, when this is made. apart: what the branch without prompt said last, where it is detached.
    """

    def __init__(
        self,
        family: Family,
        embeddings: Embeddings,
        prompts: Sequence[Prompt],
        scale: float,
        *,
        detached: bool,
        drop_N: Tensor | None = None,
    ) -> None:
        self._family, self._scale, self._detached = family, scale, detached
        self.apart: Tensor | None = None
        self._with = embeddings.of(prompts)
        branches = scale != 1 and not family.distilled
        self._without = embeddings.nothing(prompts) if branches or (drop_N is not None and bool(drop_N.any())) else None
        if drop_N is not None and self._without is not None:
            self._with, self._without = self._mixed(drop_N), None

    def _mixed(self, drop_N: Tensor) -> dict[str, Tensor]:
        """The rows of either branch; where they have different lengths, the family pads them."""
        assert self._without is not None
        rows = [
            {name: values[n : n + 1] for name, values in (self._without if drop else self._with).items()}
            for n, drop in enumerate(drop_N.tolist())
        ]
        return self._family.collate(rows)

    def __call__(self, x: Tensor, time_B: Tensor, rows: Tensor | None, apart: Tensor | None = None) -> Tensor:
        """x [B, ...] in the network's type, its times [B]; rows: which prompts are meant (int64 [B]), None: all in order.

        apart: what the branch without prompt says, if that is known; it is not asked then.
        """
        known, unknown = self._with, self._without
        if rows is not None:
            known = {name: values[rows] for name, values in known.items()}
            unknown = None if unknown is None else {name: values[rows] for name, values in unknown.items()}
        if unknown is None:
            return self._ask(x, time_B, known)
        if not self._detached and all(known[name].shape == unknown[name].shape for name in known):
            both = {name: torch.cat([unknown[name], known[name]]) for name in known}
            without, conditional = self._ask(torch.cat([x, x]), torch.cat([time_B, time_B]), both).chunk(2)
        else:
            conditional = self._ask(x, time_B, known)
            without = self._alone(x, time_B, unknown) if apart is None else apart
        return self._family.guide(conditional, without, self._scale)

    def _alone(self, x: Tensor, time_B: Tensor, unknown: Embedding) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):
            without = self._ask(x, time_B, unknown)
        self.apart = without if self._detached else None
        return without

    def _ask(self, x: Tensor, time_B: Tensor, embedding: Embedding) -> Tensor:
        guidance_B = torch.full((len(x),), self._scale, device=x.device) if self._family.distilled else None
        return self._family.predict(x, time_B, embedding, guidance_B)
