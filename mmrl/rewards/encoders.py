"""Models of pictures and text that rewards score with: found on disk or on a hub, loaded once for a process, asked in batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.hub import cached_file

from mmrl.errors import ConfigError

T = TypeVar("T")
DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EncoderConfig:
    """Fields of every reward that runs a model."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    dtype: DType = "float32"
    """Of the model's weights; what is made of its outputs is computed in float32."""
    batch: int = Field(default=16, ge=1)
    """Pictures that it sees at a time."""


def device_of(name: str) -> torch.device:
    """Raises ConfigError for what is no device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'device: {name}' is no torch device; write auto, cpu, cuda or cuda:1") from error


def opened(key: str, name: str, load: Callable[[str], T]) -> T:
    """``load(name)``, where ``name`` is a folder or a hub id. Raises ConfigError, naming the field ``key``, if there is none."""
    try:
        return load(name)
    except (OSError, ValueError) as error:  # transformers' words for what is not there, or is something else
        where = "the folder does not hold it whole" if Path(name).is_dir() else "it is no folder, and the hub did not give it"
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"'{key}: {name}' cannot be opened: {where} ({first[:200]})") from error


def file_of(key: str, name: str) -> Path:
    """A file on disk, or ``owner/repository/file`` of a hub. Raises ConfigError if there is none."""
    if Path(name).is_file():
        return Path(name)
    parts = name.split("/", 2)
    if len(parts) == 3 and not Path(name).is_absolute():
        with suppress(OSError, ValueError):  # transformers' words for what a hub does not give, or no name of a repository
            return Path(str(cached_file("/".join(parts[:2]), parts[2])))
    raise ConfigError(f"'{key}: {name}' is no file, and no file of a hub (owner/repository/file) that could be fetched")


def weights_of(key: str, name: str) -> dict[str, Tensor]:
    """The tensors of a ``torch.save`` file, by name; those under ``state_dict`` where there is one. Runs no code of the file."""
    path = file_of(key, name)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything for a damaged file
        raise ConfigError(f"'{key}: {name}' holds no weights that torch can read ({type(error).__name__})") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"'{key}: {name}' holds no weights: it must be a mapping of names to tensors")
    return content


def fill(module: nn.Module, weights: dict[str, Tensor], key: str, name: str) -> None:
    """Load ``weights`` into ``module``. Raises ConfigError unless every parameter gets one of its shape."""
    own = module.state_dict()
    missing = [each for each in own if each not in weights]
    wrong = [each for each in own if each in weights and weights[each].shape != own[each].shape]
    if missing or wrong:
        each = (missing or wrong)[0]
        raise ConfigError(
            f"'{key}: {name}' {'lacks' if missing else 'has another shape of'} '{each}' ({len(missing or wrong)} such); "
            "is it the file of this reward's own model?"
        )
    module.load_state_dict({each: weights[each] for each in own})


class Clip:
    """A CLIP model, its tokenizer and its pictures' sizes. checkpoint, processor: folders or hub ids.

    model: in place of the one in ``checkpoint``. Vectors are float32 and have length 1.
    """

    def __init__(self, checkpoint: str, processor: str, device: str, dtype: DType, model: CLIPModel | None = None) -> None:
        self.device = device_of(device)
        loaded: Any = opened("checkpoint", checkpoint, CLIPModel.from_pretrained) if model is None else model
        self.model: Any = loaded.to(self.device, getattr(torch, dtype)).eval()
        self._tokenizer: Any = opened("processor", processor, AutoTokenizer.from_pretrained)
        self._pictures: Any = opened("processor", processor, CLIPImageProcessorPil.from_pretrained)
        self._longest = int(self.model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, D]."""
        pixels = self._pictures(list(images), return_tensors="pt")["pixel_values"].to(self.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D]; a text is cut off where the model's positions end."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens.to(self.device)).pooler_output)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """[N]: of each picture with its own text."""
        distinct = list(dict.fromkeys(texts))
        rows = self.texts(distinct)[[distinct.index(text) for text in texts]]
        return (self.pictures(images) * rows).sum(-1)

    @property
    def scale(self) -> float:
        """What the model multiplies cosines with."""
        return float(self.model.logit_scale.detach().float().exp())


@functools.cache
def clip(checkpoint: str, processor: str, device: str, dtype: DType) -> Clip:
    """The model, loaded once in this process whoever asks."""
    return Clip(checkpoint, processor, device, dtype)


class RatingHead(nn.Module):
    """Five linear layers without anything between them: what LAION's aesthetic predictor and ImageReward read a feature with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Dropout stood after the first three; its places are kept because weights are named by place.
        sizes, places = (width, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(*pair) for place, pair in zip(places, itertools.pairwise(sizes), strict=True)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, width] to [N]."""
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x.float(), dim=-1)
