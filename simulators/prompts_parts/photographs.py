"""Photographs that come with scikit-image, some of them held out."""

from __future__ import annotations

import functools
import random
from typing import Literal

from PIL import Image

from mmrl.errors import EnvironmentMissing
from mmrl.registry import install_command

try:
    from skimage import data
except ModuleNotFoundError as error:
    raise EnvironmentMissing("scikit-image, which brings the photographs,", install_command("scikit-image")) from error

Split = Literal["train", "held_out"]
# Those that lie within the package; the others would have to be fetched.
_ANY = {
    "train": ("camera", "coffee", "rocket", "brick", "gravel", "coins", "moon", "retina", "hubble_deep_field", "cell"),
    "held_out": ("astronaut", "chelsea", "grass", "immunohistochemistry"),
}
# Of these a person sees how they stand.
_STANDING = {"train": ("camera", "coffee", "rocket"), "held_out": ("astronaut", "chelsea")}
_SPARE = 1.25  # how much larger than a question's picture a photograph is kept, so that each takes another part of it


@functools.lru_cache(maxsize=32)
def _scaled(name: str, side: int) -> Image.Image:
    """The photograph with a shorter side of ``side``."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    scale = side / min(image.size)
    return image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))), Image.Resampling.LANCZOS)


class Photographs:
    """Square parts of photographs. standing: only of those whose top a person can tell."""

    def __init__(self, split: Split, standing: bool) -> None:
        self.names = (_STANDING if standing else _ANY)[split]

    def part(self, generator: random.Random, size: int) -> Image.Image:
        """A square part, never mirrored or turned."""
        image = _scaled(generator.choice(self.names), round(size * _SPARE))
        left, top = generator.randint(0, image.width - size), generator.randint(0, image.height - size)
        return image.crop((left, top, left + size, top + size))
