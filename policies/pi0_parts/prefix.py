"""Images and instruction to the prefix of a pi0: tokenised, embedded, and encoded once per decision into keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PI0ForConditionalGeneration, PreTrainedTokenizerBase

from mmrl.errors import MMRLError


@dataclass(frozen=True)
class Prefix:
    """The encoded prefix of B observations, S tokens long.

    keys and values: [B, L layers, heads, S, head dim], what every denoising step attends to. mask: int64 [B, S], 0 on padding.
    pooled: float [B, W], mean of the last hidden states over the unpadded tokens.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    pooled: Tensor

    def cache(self) -> DynamicCache:
        """A fresh transformers cache over these tensors; a step appends to its own copy, so the prefix stays as it is."""
        return DynamicCache(zip(self.keys.unbind(1), self.values.unbind(1), strict=True))

    def repeat(self, times: int) -> Prefix:
        """Each row ``times`` times, consecutively."""
        return Prefix(*(tensor.repeat_interleave(times, 0) for tensor in (self.keys, self.values, self.mask, self.pooled)))

    def trace(self) -> dict[str, Tensor]:
        return {"prefix_keys": self.keys, "prefix_values": self.values, "prefix_mask": self.mask, "prefix_pooled": self.pooled}

    @staticmethod
    def from_trace(trace: Mapping[str, Tensor]) -> Prefix:
        return Prefix(*(trace[f"prefix_{name}"] for name in ("keys", "values", "mask", "pooled")))


class Tokenizer:
    """Sentences to padded ids, remembering every sentence it has seen: the same few hundred come back all the time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._pad = tokenizer.pad_token_id or 0
        self._seen: dict[str, list[int]] = {}

    def __call__(self, sentences: Sequence[str], device: torch.device) -> Tensor:
        """ids int64 [B, max_tokens], padded with -1 (so that padding cannot be mistaken for a token)."""
        return torch.tensor([self._ids(sentence) for sentence in sentences], device=device)

    def _ids(self, sentence: str) -> list[int]:
        ids = self._seen.get(sentence)
        if ids is None:
            # The prompt layout of transformers' PI0Processor (after the image tokens): bos, sentence, newline.
            text = f"{self._tokenizer.bos_token or ''}{sentence}\n"
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > self._max_tokens:
                most = f"policy.max_text_tokens = {self._max_tokens}"
                raise MMRLError(f"instruction {sentence!r} has {len(ids)} tokens, more than {most}: raise it")
            ids = ids + [-1] * (self._max_tokens - len(ids))
            self._seen[sentence] = ids
        return ids


def preprocess(image_BHWC: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """uint8 [B, h, w, 3] -> [B, 3, size, size] in [-1, 1]; resized keeping its aspect, padded with black, as openpi does."""
    pixels = image_BHWC.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32)) / 127.5 - 1.0
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels.to(dtype)
    scale = size / max(height, width)
    new_h, new_w = round(height * scale), round(width * scale)
    pixels = F.interpolate(pixels, (new_h, new_w), mode="bilinear", align_corners=False, antialias=scale < 1)
    top, left = (size - new_h) // 2, (size - new_w) // 2
    return F.pad(pixels, (left, size - new_w - left, top, size - new_h - top), value=-1.0).to(dtype)


def encode(model: PI0ForConditionalGeneration, pixels_BN3HW: Tensor, ids_BT: Tensor) -> Prefix:
    """One pass of the vision-language model over N cameras and the text.

    Equals ``PI0Model.embed_prefix`` and its vlm call when every camera is there (held by a test), but loops over no batch.
    """
    vlm = model.model.vlm
    batch = ids_BT.shape[0]
    features = vlm.get_image_features(pixels_BN3HW.flatten(0, 1)).pooler_output
    features = features.reshape(batch, -1, features.shape[-1])
    present = ids_BT >= 0
    text = vlm.get_input_embeddings()(ids_BT.clamp(min=0))
    embeds = torch.cat([features.to(text.dtype), text], dim=1)
    mask = torch.cat([present.new_ones(batch, features.shape[1]), present], dim=1).long()
    output = vlm(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=mask.cumsum(-1) - 1,
        token_type_ids=torch.zeros_like(mask),
        use_cache=True,
    )
    layers = output.past_key_values.layers
    weights = mask.unsqueeze(-1).to(embeds.dtype)
    pooled = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
    return Prefix(torch.stack([la.keys for la in layers], 1), torch.stack([la.values for la in layers], 1), mask, pooled)
