"""Brightness and sharpness of a picture, **for debugging only**: whether a generator learns at all is seen in a few updates.

They say nothing of a picture's worth, and a generator soon paints white or noise for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.rewards.pictures import each_picture
from mmrl.transcripts import Transcript


class Brightness:
    """Mean of the pixels' grey, 0 (black) to 1 (white). For debugging only."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.brightness:Brightness`` block."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return each_picture(transcripts, lambda image, _: float(_grey(image).mean()))


class Sharpness:
    """Mean size of the step of grey from a pixel to its right and lower neighbours, 0 to 1. For debugging only."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.rewards.brightness:Sharpness`` block."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return each_picture(transcripts, lambda image, _: _sharpness(_grey(image)))


def _grey(image: Image.Image) -> np.ndarray:
    """[height, width], 0 to 1."""
    return np.asarray(image.convert("L"), np.float64) / 255


def _sharpness(grey_HW: np.ndarray) -> float:
    steps = [np.abs(np.diff(grey_HW, axis=axis)).ravel() for axis in (0, 1)]
    joined = np.concatenate(steps)
    return float(joined.mean()) if joined.size else 0.0
