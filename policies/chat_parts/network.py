"""A language model of transformers, with eyes or without, as policies that talk use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from mmrl.messages import Picture
from policies.chat_parts.pieces import Line, Rows, Seen


class Network:
    """A model that reads words alone; subclasses see. ``axes``: of its positions. ``processor``: what cuts pictures.

    branches: whether stretches of a line may continue others, which takes a mask of each token's own; flash attention knows none.
    """

    axes = 1
    processor: Any = None

    def __init__(self, model: Any, pad: int) -> None:
        self.model, self.pad = model, pad
        self._reader = model.get_decoder()  # what reads words, without the eyes
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        attention, full = config._attn_implementation, kinds == {"full_attention"}
        self._takes_masks = full and attention == "sdpa"
        self.branches = full and attention in ("sdpa", "eager")

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def continues(self) -> bool:
        """Whether gradients reach what a cache holds: transformers drops the cache where it computes activations again."""
        return not self.model.is_gradient_checkpointing

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    def hidden(self, rows: Rows, *, cache: Cache | None = None, past_NP: Tensor | None = None) -> Tensor:
        """Last hidden states [N, L, W] of ``rows``, which follow what the cache holds (mask ``past_NP``) and join it."""
        mask = rows.mask_NL if past_NP is None else torch.cat([past_NP, rows.mask_NL], 1)
        sights = self.sights(rows.pictures)
        single = rows.ids_NL.shape[1] == 1 and self._takes_masks  # a token sees all that is not padding: nothing to be worked out
        output = (self.model.base_model if sights else self._reader)(
            input_ids=rows.ids_NL,
            attention_mask=mask[:, None, None] if single else mask.long(),
            position_ids=self._positions(rows.positions_ANL),
            past_key_values=cache,
            use_cache=cache is not None,
            **sights,
        )
        return output.last_hidden_state

    def hidden_of_line(self, line: Line) -> Tensor:
        """Last hidden states [T, W] of conversations that stand end to end; none of them sees another.

        transformers finds where they begin: given no mask and no cache, it takes a place that does not follow the one before it
        for the first of another sequence (its find_packed_sequence_indices; prepare_fa_kwargs_from_position_ids for flash).
        """
        sights = self.sights(line.pictures)
        output = (self.model.base_model if sights else self._reader)(
            input_ids=line.ids_T[None],
            attention_mask=self._mask(line) if line.branches else None,
            position_ids=self._line_positions(line),
            use_cache=False,
            **sights,
        )
        return output.last_hidden_state[0]

    def _mask(self, line: Line) -> Any:
        """What each token of the line may see, as the model's attention takes it: its own stretch and the one that continues."""
        assert self.branches

        def sees(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
            stretch_T, before_T = line.stretch_T, line.before_T
            return (stretch_T[key] == stretch_T[query]) | (stretch_T[key] == before_T[query])

        like = torch.empty(1, len(line.ids_T), 0, dtype=self.model.dtype, device=self.device)
        return create_causal_mask(
            self.model.config.get_text_config(),
            inputs_embeds=like,
            attention_mask=None,
            past_key_values=None,
            and_mask_function=sees,
        )

    def _positions(self, positions_ANL: Tensor) -> Tensor:
        return positions_ANL[0]

    def _line_positions(self, line: Line) -> Tensor:
        return line.positions_AT

    def sights(self, pictures: Sequence[Seen]) -> dict[str, Any]:
        """Arguments of the model's forward pass that carry the pictures."""
        assert not pictures
        return {}

    def see(self, picture: Picture) -> Seen:
        raise TypeError("this model has no eyes")

    def place(self, seen: Seen) -> tuple[Tensor, int]:
        """A picture's positions, counted from its first, int64 [A, tokens], and how far positions go on over it."""
        raise TypeError("this model has no eyes")
