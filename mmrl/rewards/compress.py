"""The size of a picture as a JPEG file: the compressibility rewards of DDPO (Black et al. 2023, arXiv 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.rewards.pictures import each_picture
from mmrl.transcripts import Transcript


class Compress:
    """The number of thousand bytes, times 1 or -1."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.rewards.compress:Compress`` block."""

        better: Literal["small", "large"] = "small"
        """small: the score is minus the size; large: it is the size."""
        quality: int = Field(default=95, ge=1, le=100)
        """Of the JPEG file."""
        unit: float = Field(default=1000.0, gt=0)
        """Bytes that count as 1; Flow-GRPO's reward of small files has 500,000."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        sign = -1.0 if self.config.better == "small" else 1.0
        return each_picture(transcripts, lambda image, _: sign * self._bytes(image) / self.config.unit)

    def _bytes(self, image: Image.Image) -> int:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.config.quality)
        return file.tell()
