"""CLIP score (Hessel et al. 2021, arXiv 2104.08718):  score = w max(cos(picture, prompt), 0), w = 2.5.

Departure: the paper writes "A photo depicts" before a caption; a prompt stands as it is unless ``prefix`` says otherwise.
Flow-GRPO takes the model's own scale over 30, which for OpenAI's weights is ``scale: 3.3333, floor: false``.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.rewards.encoders import EncoderConfig, clip
from mmrl.rewards.pictures import in_batches, prompt_of
from mmrl.transcripts import Transcript


class ClipScore:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(EncoderConfig):
        """Fields of a ``mmrl.rewards.clip_score:ClipScore`` block."""

        checkpoint: str = "openai/clip-vit-large-patch14"
        """Folder or hub id of a CLIP model with its processor."""
        scale: float = Field(default=2.5, gt=0)
        """w above."""
        floor: bool = True
        """Whether a cosine below 0 counts as 0."""
        prefix: str = ""
        """Stands before every prompt."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._clip = clip(config.checkpoint, config.checkpoint, config.device, config.dtype)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        scores = in_batches(
            transcripts,
            self.config.batch,
            lambda images, questions: self._clip.cosines(
                images, [self.config.prefix + prompt_of(question) for question in questions]
            ).tolist(),
        )
        low = 0.0 if self.config.floor else -1.0
        return [self.config.scale * (score if score >= low or score != score else low) for score in scores]
