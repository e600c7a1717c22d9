"""How Qwen2-VL, Qwen2.5-VL and Qwen3-VL see: pictures sized by qwen-vl-utils, in patches, at positions with height and width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from qwen_vl_utils.vision_process import MAX_RATIO, smart_resize
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmrl.messages import Picture
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Line, Seen


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
        rows, columns = picture_size(image.height, image.width, factor, size["shortest_edge"], size["longest_edge"])
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


def picture_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Rows and columns of pixels by qwen-vl-utils' smart_resize, but at least one ``factor`` each.

    There a side becomes 0 where the picture is so thin that its area exceeds ``most`` however short the side; here it may exceed.
    """
    rows, columns = smart_resize(height, width, factor, least, most)
    return max(factor, rows), max(factor, columns)


def _less_long(image: Image.Image) -> Image.Image:
    """A picture that is more than MAX_RATIO times as long as wide, such as a thin crop, is widened: the processor refuses it."""
    least = math.ceil(max(image.size) / MAX_RATIO)
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
