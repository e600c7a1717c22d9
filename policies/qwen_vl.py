"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as policies: vision-language models that talk, look at pictures and call tools.

Any of these models as transformers loads it; a conversation is given with its pictures, which qwen-vl-utils sizes (both sides
multiples of a merged patch, the area between two limits) and the model's own image processor cuts.

Departures from transformers' ``generate``: nothing but temperature shapes the distribution (no top-k, top-p or repetition
penalty, whatever generation_config.json says), so that what is drawn is what is scored; tokens that stand for pictures are never
drawn; a picture that occurs several times in a batch is encoded once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from transformers import AutoImageProcessor

from mmrl.errors import MMRLError
from policies.chat_parts.policy import STRICT, ChatConfig, ChatPolicy
from policies.chat_parts.qwen import QwenNetwork
from policies.shared.checkpoints import first_line
from policies.shared.vision_language import load_model

MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_PICTURES = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class QwenVL(ChatPolicy):
    """See the module."""

    kind: ClassVar[str] = "qwen_vl"

    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class Config(ChatConfig):
        """Fields of a ``policies.qwen_vl:QwenVL`` block."""

        min_pixels: int | None = Field(default=None, ge=1)
        """Pictures with a smaller area are enlarged; null: what the checkpoint's image processor says."""
        max_pixels: int | None = Field(default=None, ge=1)
        """Pictures with a larger area are reduced; null: what the checkpoint's image processor says."""

    config: Config

    def _load(self, dtype: torch.dtype) -> Any:
        config = self.config
        model = load_model(config.checkpoint, config.weights, dtype, config.attention, config.seed)
        if model.config.model_type not in MODELS:
            raise MMRLError(
                f"policy.checkpoint = {config.checkpoint}: is a {model.config.model_type}, not one of {', '.join(MODELS)}"
            )
        return model

    def _network(self) -> QwenNetwork:
        config = self.config
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(config.checkpoint, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            raise MMRLError(f"policy.checkpoint = {config.checkpoint}: has no image processor ({first_line(error)})") from error
        size = dict(self.processor.size)
        size["shortest_edge"] = config.min_pixels or size["shortest_edge"]
        size["longest_edge"] = config.max_pixels or size["longest_edge"]
        if size["shortest_edge"] > size["longest_edge"]:
            raise MMRLError(
                f"policy.min_pixels = {size['shortest_edge']} is more than policy.max_pixels = {size['longest_edge']}"
            )
        self.processor.size = size
        pad = self.model.config.get_text_config().pad_token_id
        return QwenNetwork(self.model, 0 if pad is None else pad, self.processor)

    def _image_id(self) -> int:
        return self.model.config.image_token_id

    def _unsayable(self) -> set[int]:
        return {token for name in _PICTURES if (token := getattr(self.model.config, name, None)) is not None}

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.processor.save_pretrained(folder)
