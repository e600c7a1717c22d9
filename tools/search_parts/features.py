"""Pictures as unit vectors: colours and edges, the same on every machine, or a CLIP model's view.

Colours: a histogram over hue, saturation and value, as square roots (their product is the Bhattacharyya coefficient).
Edges: histograms of oriented gradients (Dalal and Triggs 2005): cells of 16 x 16 pixels of the grey picture, scaled to 128 x 128,
9 unsigned directions, each pixel's gradient shared by the two nearest; blocks of 2 x 2 cells, each of length 1. Departures: no
Gaussian window, no interpolation between cells, no clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from mmrl.caching import digest
from mmrl.errors import ConfigError

SIDE, CELL, DIRECTIONS = 128, 16, 9
HUES, SATURATIONS, VALUES = 12, 3, 3
_VERSION = 2  # of the numbers below; another one builds every index anew


class Features(Protocol):
    """digest: what decides the vectors."""

    digest: str

    def pictures(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors [N, D] of length 1, float32."""
        ...


class Classical:
    """Colours and edges side by side; their shares of the cosine are ``colour`` and 1 - ``colour``."""

    def __init__(self, colour: float) -> None:
        self._colour, self.digest = colour, digest("classical", _VERSION, colour)

    def pictures(self, images: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([self._one(image) for image in images]).astype(np.float32)

    def _one(self, image: Image.Image) -> np.ndarray:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        parts = np.sqrt(self._colour) * colours(small), np.sqrt(1 - self._colour) * edges(small)
        return _unit(np.concatenate(parts))


def colours(image: Image.Image) -> np.ndarray:
    """Square roots of the shares of HUES x SATURATIONS x VALUES bins, float64, of length 1."""
    hsv = np.asarray(image.convert("HSV"), np.int64).reshape(-1, 3)
    hue, saturation, value = (hsv * (HUES, SATURATIONS, VALUES) // 256).T
    bins = (hue * SATURATIONS + saturation) * VALUES + value
    return np.sqrt(np.bincount(bins, minlength=HUES * SATURATIONS * VALUES) / len(bins))


def edges(image: Image.Image) -> np.ndarray:
    """Blocks of gradient histograms, float64, of length 1 (0 where nothing changes)."""
    grey = np.asarray(image.convert("L"), np.float64)
    dy, dx = np.gradient(grey)
    place = (np.degrees(np.arctan2(dy, dx)) % 180) / (180 / DIRECTIONS)  # in bins; bin i is centred at i
    lower, share = np.floor(place).astype(int), place - np.floor(place)
    strength, side = np.hypot(dx, dy), SIDE // CELL
    rows, columns = np.indices(grey.shape) // CELL
    cells = np.zeros((side, side, DIRECTIONS))
    np.add.at(cells, (rows, columns, lower % DIRECTIONS), strength * (1 - share))
    np.add.at(cells, (rows, columns, (lower + 1) % DIRECTIONS), strength * share)
    blocks = np.concatenate([cells[:-1, :-1], cells[:-1, 1:], cells[1:, :-1], cells[1:, 1:]], axis=2)
    length = np.sqrt((blocks**2).sum(2, keepdims=True) + 1.0)  # the 1 keeps a flat block's noise small
    return _unit((blocks / length).ravel())


def _unit(vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 0 else vector


class Clip:
    """A CLIP model's projected vectors of pictures and of texts. Raises ConfigError if it cannot be loaded."""

    def __init__(self, path: str, device: str) -> None:
        try:
            self._model = CLIPModel.from_pretrained(path, dtype=torch.float32).to(device).eval()  # type: ignore[arg-type]
            self._processor: Any = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"clip '{path}' cannot be loaded ({reason}); give a folder or hub id of a CLIP model") from error
        self._device = device
        weights = [name.encode() + value.cpu().numpy().tobytes() for name, value in sorted(self._model.state_dict().items())]
        self.digest = digest(*weights, self._processor.image_processor.to_json_string())

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> np.ndarray:
        inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(self._device)
        seen = self._model.vision_model(pixel_values=inputs["pixel_values"]).pooler_output
        return self._unit(self._model.visual_projection(seen))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        config: Any = self._model.config.text_config
        longest = config.max_position_embeddings
        inputs = self._processor(text=list(texts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        inputs = inputs.to(self._device)
        read = self._model.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        return self._unit(self._model.text_projection(read))

    @staticmethod
    def _unit(vectors: torch.Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
