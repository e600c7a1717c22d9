"""scikit-learn's handwritten digits (UCI, 1797 pictures of 8 x 8 pixels)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image

from mmrl.errors import EnvironmentMissing
from mmrl.registry import install_command
from simulators.prompts_parts.common import Split
from simulators.prompts_parts.seeing import DIGITS

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise EnvironmentMissing("scikit-learn, which brings the digits,", install_command("scikit-learn")) from error

_TRAIN = 0.75  # of each class; training never sees the rest


class Digits:
    """Pictures by class: ``shots`` of each for training, drawn by ``seed`` from three quarters of them; the rest is held out."""

    def __init__(self, size: int, split: Split, shots: int, seed: int) -> None:
        bunch: Any = load_digits()
        self.examples: dict[str, list[Image.Image]] = {}
        for digit, name in enumerate(DIGITS):
            rows = np.flatnonzero(bunch.target == digit)
            border = round(len(rows) * _TRAIN)
            seen = random.Random(f"{name}/{seed}").sample(list(rows[:border]), min(shots, border))
            chosen = seen if split == "train" else rows[border:]
            self.examples[name] = [_enlarged(bunch.images[row], size) for row in chosen]


def _enlarged(values: np.ndarray, size: int) -> Image.Image:
    """Black on white."""
    return Image.fromarray((255 - values * 15.9).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
