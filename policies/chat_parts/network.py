"""A language model of transformers, with eyes or without, as policies that talk use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmrl.messages import Picture
from policies.chat_parts.pieces import Line, Rows, Seen

LONGEST = 200  # qwen-vl-utils' MAX_RATIO


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


class QwenNetwork(Network):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions of pictures have time, height and width.

    A picture that occurs several times in a pass, as that of a group's question does, is encoded once.
    """

    axes = 3

    def __init__(self, model: Any, pad: int, processor: Any) -> None:
        super().__init__(model, pad)
        self.processor = processor

    def _positions(self, positions_ANL: Tensor) -> Tensor:
        return positions_ANL

    def _line_positions(self, line: Line) -> Tensor:
        """Places, by which the model knows where conversations begin, then time, height and width: [4, 1, T]."""
        return torch.cat([line.places_T[None], line.positions_AT])[:, None]

    def see(self, picture: Picture) -> Seen:
        processor, image = self.processor, _less_long(picture.image)
        factor, size = processor.patch_size * processor.merge_size, processor.size
        rows, columns = smart_size(image.height, image.width, factor, size["shortest_edge"], size["longest_edge"])
        made = processor(images=[image.resize((columns, rows))], do_resize=False, return_tensors="pt")
        t, h, w = made["image_grid_thw"][0].tolist()
        tokens = t * h * w // self.processor.merge_size**2
        return Seen(made["pixel_values"], (t, h, w), tokens, f"{picture.key}:{t}x{h}x{w}")

    def place(self, seen: Seen) -> tuple[Tensor, int]:
        t, h, w = seen.grid
        h, w = h // self.processor.merge_size, w // self.processor.merge_size
        grids = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        return torch.stack(grids).flatten(1), max(h, w)

    def sights(self, pictures: Sequence[Seen]) -> dict[str, Any]:
        if not pictures:
            return {}
        unique = tuple(dict.fromkeys(pictures))
        places = {seen: place for place, seen in enumerate(unique)}
        order = [places[seen] for seen in pictures]
        output = self.model.base_model.get_image_features(
            torch.cat([seen.patches for seen in unique]).to(self.device),
            torch.tensor([seen.grid for seen in unique], device=self.device),
            return_dict=True,
        )
        return {"mm_encoder_outputs": {"image": _in_order(output, order)}}


def smart_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """qwen-vl-utils' smart_resize: multiples of ``factor``, the area from ``least`` to ``most``, hardly another ratio.

    Its area may still exceed ``most`` where one side is a single ``factor`` (there qwen-vl-utils makes it 0).
    """
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def _less_long(image: Image.Image) -> Image.Image:
    """A picture that is more than LONGEST times as long as wide, such as a thin crop, is widened: the processor refuses it."""
    least = math.ceil(max(image.size) / LONGEST)
    if min(image.size) >= least:
        return image
    return image.resize((max(image.width, least), max(image.height, least)))


def _in_order(output: BaseModelOutputWithPooling, order: Sequence[int]) -> BaseModelOutputWithPooling:
    """What the encoder made of pictures, for a sequence in which they occur in another order, and several times."""
    for name in ("pooler_output", "deepstack_features"):
        made: Any = getattr(output, name, None)
        if name == "pooler_output":
            output[name] = tuple(made[i] for i in order)
        elif made is not None:
            output[name] = [tuple(layer[i] for i in order) for layer in made]
    return output
