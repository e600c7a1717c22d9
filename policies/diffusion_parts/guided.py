"""The denoising network with its prompts and guidance: what the sampler asks."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence

import torch
from torch import Tensor

from policies.diffusion_families.base import Embedding, Family
from policies.diffusion_parts.prompts import Embeddings, Prompt


class Guided:
    """The network for B prompts under classifier-free guidance of ``scale``; 1 is none.

    detached: no gradient flows through the branch without prompt. drop_N: rows that are shown without their prompt (bool [N]).
    The embeddings are looked up once, when this is made. apart: what the branch without prompt said last, where it is detached.
    joint: for which sizes both branches may share a pass where the detached one needs no gradient (``_sampled``); None: for none.
    """

    def __init__(
        self,
        family: Family,
        embeddings: Embeddings,
        prompts: Sequence[Prompt],
        scale: float,
        *,
        detached: bool,
        joint: MutableMapping[Hashable, bool] | None = None,
        drop_N: Tensor | None = None,
    ) -> None:
        self._family, self._scale, self._detached, self._joint = family, scale, detached, joint
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
        alike = all(known[name].shape == unknown[name].shape for name in known)
        if alike and not self._detached:
            without, conditional = self._both(x, time_B, unknown, known)
        elif alike and apart is None and self._joint is not None and not torch.is_grad_enabled():
            without, conditional = self._sampled(self._joint, x, time_B, unknown, known)
        else:
            conditional = self._ask(x, time_B, known)
            without = self._alone(x, time_B, unknown) if apart is None else apart
        return self._family.guide(conditional, without, self._scale)

    def _both(self, x: Tensor, time_B: Tensor, unknown: Embedding, known: Embedding) -> tuple[Tensor, ...]:
        both = {name: torch.cat([unknown[name], known[name]]) for name in known}
        without, conditional = self._ask(torch.cat([x, x]), torch.cat([time_B, time_B]), both).chunk(2)
        return without, conditional

    def _sampled(
        self, joint: MutableMapping[Hashable, bool], x: Tensor, time_B: Tensor, unknown: Embedding, known: Embedding
    ) -> tuple[Tensor, ...]:
        """Both branches in one pass, which is quicker, if each then says bit for bit what it says alone, as in training.

        That is up to the machine's matrix products: some round a row otherwise among more rows. It is tried once for each size.
        """
        key = (x.dtype, x.shape, *(values.shape for values in known.values()))
        if not joint.get(key, False):
            said = self._alone(x, time_B, unknown), self._ask(x, time_B, known)
            if key not in joint:
                joint[key] = all(map(torch.equal, self._both(x, time_B, unknown, known), said))
            return said
        said = self._both(x, time_B, unknown, known)
        self.apart = said[0]
        return said

    def _alone(self, x: Tensor, time_B: Tensor, unknown: Embedding) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detached):
            without = self._ask(x, time_B, unknown)
        self.apart = without if self._detached else None
        return without

    def _ask(self, x: Tensor, time_B: Tensor, embedding: Embedding) -> Tensor:
        guidance_B = torch.full((len(x),), self._scale, device=x.device) if self._family.distilled else None
        return self._family.predict(x, time_B, embedding, guidance_B)
