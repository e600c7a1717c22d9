"""LAION's aesthetic score, about 1 to 10:  score = head(v), v the picture's CLIP vector of length 1, head five linear layers.

Schuhmann 2022, improved-aesthetic-predictor, with ``sac+logos+ava1-l14-linearMSE.pth`` for CLIP ViT-L/14: the reward of DDPO and
Flow-GRPO. The prompt is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.rewards.encoders import EncoderConfig, RatingHead, clip, fill, weights_of
from mmrl.rewards.pictures import in_batches
from mmrl.transcripts import Question, Transcript


class Aesthetic:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(EncoderConfig):
        """Fields of a ``mmrl.rewards.aesthetic:Aesthetic`` block."""

        weights: str
        """The head's file (.pth): on disk, or owner/repository/file of a hub."""
        checkpoint: str = "openai/clip-vit-large-patch14"
        """Folder or hub id of the CLIP model with its processor."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._clip = clip(config.checkpoint, config.checkpoint, config.device, config.dtype)
        self._head = RatingHead(self._clip.model.config.projection_dim)
        fill(self._head, weights_of("weights", config.weights), "weights", config.weights)
        self._head.to(self._clip.device).requires_grad_(False)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return in_batches(transcripts, self.config.batch, self._scores)

    @torch.inference_mode()
    def _scores(self, images: list[Image.Image], _: list[Question]) -> list[float]:
        return self._head(self._clip.pictures(images)).tolist()
