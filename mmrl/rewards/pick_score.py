"""PickScore (Kirstain et al. 2023, arXiv 2305.01569):  score = s cos(picture, prompt), s the model's own scale, about 100.

The scores of good pictures lie around 20 to 23; ``divisor: 26`` is Flow-GRPO's, which brings them near to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.rewards.encoders import EncoderConfig, clip
from mmrl.rewards.pictures import in_batches, prompt_of
from mmrl.transcripts import Transcript


class PickScore:
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(EncoderConfig):
        """Fields of a ``mmrl.rewards.pick_score:PickScore`` block."""

        checkpoint: str = "yuvalkirstain/PickScore_v1"
        """Folder or hub id of the model."""
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        """Folder or hub id of its tokenizer and picture processor."""
        divisor: float = Field(default=1.0, gt=0)
        """What the score is divided by."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._clip = clip(config.checkpoint, config.processor, config.device, config.dtype)

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        scale = self._clip.scale / self.config.divisor
        scores = in_batches(
            transcripts,
            self.config.batch,
            lambda images, questions: self._clip.cosines(images, [prompt_of(question) for question in questions]).tolist(),
        )
        return [scale * score for score in scores]
