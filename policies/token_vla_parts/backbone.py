"""A vision-language model of transformers as a policy uses it: a prompt encoded once, then action tokens over its cache.

Works on any model that AutoModelForImageTextToText loads, whose images stand before the text as in the prompts of ``eyes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from policies.token_vla_parts.eyes import PADDING, Eyes


@dataclass
class Prompt:
    """The encoded prompt of B rows, P tokens long; some of them are padding, wherever they stand.

    last: float [B, W], the hidden state of the last token that is none. cache: transformers', which grows with every
    ``Backbone.extend``. mask: int64 [B, P], 0 on padding. positions: int64 [..., B, K], those of the K tokens that may follow.
    """

    last: Tensor
    cache: Cache
    mask: Tensor
    positions: Tensor


class Backbone:
    """The passes of ``model``, and its head over the ``bins`` action tokens: the last ones before ``end``."""

    def __init__(self, model: Any, eyes: Eyes, *, bins: int, end: int, most_tokens: int) -> None:
        self.model, self.eyes = model, eyes
        self.bins, self.end, self.most_tokens = bins, end, most_tokens
        self._template: dict[tuple[Any, ...], Tensor] = {}

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def ids(self, bins: Tensor) -> Tensor:
        """Bins -> token ids, descending from the end of the vocabulary as OpenVLA has them."""
        return self.end - 1 - bins

    def encode(self, trace: Mapping[str, Tensor]) -> Prompt:
        """One pass over images and prompt: ``trace`` holds what ``Eyes.read`` made (the prompt may have grown)."""
        prompt_BP = trace["prompt"]
        mask_BP = (prompt_BP != PADDING).long()
        pad = self.model.config.get_text_config().pad_token_id or 0
        ids_BP = torch.where(mask_BP.bool(), prompt_BP, pad)
        images = self.eyes.see(trace)
        images = {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in images.items()}
        template = self._positions(prompt_BP, mask_BP, images)
        index_BP = (mask_BP.cumsum(1) - 1).clamp(min=0)
        output = self.model.base_model(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=template[..., index_BP],
            use_cache=True,
            **images,
            **self.eyes.token_types(prompt_BP),
        )
        follow_BK = mask_BP.sum(1, keepdim=True) + torch.arange(self.most_tokens, device=mask_BP.device)
        last_B = (mask_BP * torch.arange(mask_BP.shape[1], device=mask_BP.device)).argmax(1)
        last_BW = output.last_hidden_state[torch.arange(len(last_B), device=last_B.device), last_B]
        return Prompt(last_BW, output.past_key_values, mask_BP, template[..., follow_BK])

    def extend(self, prompt: Prompt, bins_BJ: Tensor, start: int) -> Tensor:
        """One pass over J more action tokens, of which ``start`` came before; they join the cache. Hidden states [B, J, W]."""
        count = start + bins_BJ.shape[1]
        output = self.model.base_model(
            input_ids=self.ids(bins_BJ),
            attention_mask=F.pad(prompt.mask, (0, count), value=1),
            position_ids=prompt.positions[..., start:count],
            past_key_values=prompt.cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] -> logits of the action tokens in the order of their bins, [..., V].

        In float32 or better, also within autocast: in bfloat16 probabilities have two or three digits.
        """
        head = self.model.get_output_embeddings()
        rows = slice(self.end - self.bins, self.end)
        wide = torch.promote_types(head.weight.dtype, torch.float32)
        bias = None if head.bias is None else head.bias[rows].flip(0).to(wide)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), head.weight[rows].flip(0).to(wide), bias)

    def _positions(self, prompt_BP: Tensor, mask_BP: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """Positions in the language model of a row's tokens, counted from its first: int64 [P + K] or, with axes, [3, P + K].

        Prompts share what stands before the text, so one row tells the positions of all, by the model's own rule.
        """
        total = prompt_BP.shape[1] + self.most_tokens
        grid = images.get("image_grid_thw")
        if grid is None or not hasattr(self.model.base_model, "get_rope_index"):
            return torch.arange(total, device=prompt_BP.device) + self.eyes.first_position
        per_row = len(grid) // len(prompt_BP)
        key = (total, prompt_BP.device, *grid[:per_row].flatten().tolist())
        if key not in self._template:
            row_1L = prompt_BP[:1, mask_BP[0].bool()]
            kinds_1L = (row_1L == self.eyes.image_id).int()
            known = self.model.base_model.get_rope_index(row_1L, mm_token_type_ids=kinds_1L, image_grid_thw=grid[:per_row])[0]
            rest = torch.arange(1, total - row_1L.shape[1] + 1, device=row_1L.device)
            self._template[key] = torch.cat([known[:, 0], known[:, 0, -1:] + rest], 1)
        return self._template[key]
