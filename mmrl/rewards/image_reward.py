"""ImageReward (Xu et al. 2023, arXiv 2304.05977):  score = (head(h) - 0.16717) / 1.03334, h the prompt's first state in BLIP.

BLIP's text encoder reads the prompt (at most 35 tokens) while it looks at the picture, and five linear layers read the state of
its first token. The published file (``ImageReward.pt``) is read into transformers' Blip classes; only its tokenizer and the sizes
of its text encoder come from a BLIP folder. Departures: prompts are padded to the longest of a batch and not to 35, which changes
nothing but rounding, because padding is masked.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import AutoTokenizer, BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmrl.rewards.encoders import EncoderConfig, RatingHead, device_of, fill, opened, weights_of
from mmrl.rewards.pictures import in_batches, prompt_of
from mmrl.transcripts import Question, Transcript

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's outputs, as published
_TOKENS = 35
_EPS = 1e-6  # of the picture encoder's norms, which is timm's; transformers' own BLIP has 1e-5


class ImageReward:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config(EncoderConfig):
        """Fields of a ``mmrl.rewards.image_reward:ImageReward`` block."""

        weights: str = "THUDM/ImageReward/ImageReward.pt"
        """The published file: on disk, or owner/repository/file of a hub."""
        blip: str = "Salesforce/blip-itm-large-coco"
        """Folder or hub id of a BLIP model of the same sizes; its config and tokenizer are read."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = device_of(config.device)
        self._words: Any = opened("blip", config.blip, AutoTokenizer.from_pretrained)
        weights = renamed(weights_of("weights", config.weights))
        sizes = _sizes(opened("blip", config.blip, BlipConfig.from_pretrained), weights)
        size = {"height": sizes.vision_config.image_size, "width": sizes.vision_config.image_size}
        self._pictures: Any = CLIPImageProcessorPil(size={"shortest_edge": size["height"]}, crop_size=size)
        modules: tuple[tuple[str, Any], ...] = (
            ("vision.", BlipVisionModel(sizes.vision_config)),
            ("text.", BlipTextModel(sizes.text_config, add_pooling_layer=False)),
            ("head.", RatingHead(sizes.text_config.hidden_size)),
        )
        for prefix, module in modules:
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            fill(module, own, "weights", config.weights)
        self._seeing, self._reading, self._head = (module.to(self.device).eval() for _, module in modules)
        for module in (self._seeing, self._reading):
            module.to(getattr(torch, config.dtype))

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return in_batches(transcripts, self.config.batch, self._scores)

    @torch.inference_mode()
    def _scores(self, images: list[Image.Image], questions: list[Question]) -> list[float]:
        prompts = [prompt_of(question) for question in questions]
        tokens = self._words(prompts, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt").to(self.device)
        dtype = getattr(torch, self.config.dtype)
        pixels = self._pictures(images, return_tensors="pt")["pixel_values"].to(self.device, dtype)
        seen_NPD = self._seeing(pixel_values=pixels).last_hidden_state
        read_NTD = self._reading(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=seen_NPD
        ).last_hidden_state
        return ((self._head(read_NTD[:, 0].float()) - MEAN) / STD).tolist()


# The published file's names -> ours; BLIP's text encoder is called alike in both.
_NAMES = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head.layers."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published file's weights by the names of transformers' modules, after ``vision.``, ``text.`` and ``head.``."""
    named = {}
    for name, value in weights.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    return named


def _sizes(config: Any, weights: Mapping[str, Tensor]) -> Any:
    """BLIP's sizes, for pictures of the size that the weights' positions are for."""
    config = copy.deepcopy(config)
    positions = weights.get("vision.embeddings.position_embedding")
    if positions is not None:
        config.vision_config.image_size = math.isqrt(positions.shape[1] - 1) * config.vision_config.patch_size
    config.vision_config.layer_norm_eps = _EPS
    config.text_config.encoder_hidden_size = config.vision_config.hidden_size
    return config
