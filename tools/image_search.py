"""Search in a collection of pictures: by one of the conversation's pictures, and with a CLIP model also by text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.caching import cache_folder, digest
from mmrl.messages import Picture, ToolContext, ToolError, ToolResult
from tools.search_parts.caching import build_once, shown
from tools.search_parts.features import Classical, Clip, Features
from tools.search_parts.gallery import Entry, Gallery

_BATCH = 16


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class GalleryConfig:
    """What every search in pictures is told."""

    images: str
    """Folder of pictures, or JSONL file with lines {"id", "image" or "images", optional "title", "caption"}; a corpus too."""
    name: str = "image_search"
    """What the model calls it by."""
    top_k: int = Field(default=5, ge=1)
    """Entries that a search gives; of an entry with several pictures, the one that matches best."""
    thumbnail: int = Field(default=224, ge=0)
    """Longer side of the pictures that are shown, in pixels; 0: none is shown."""
    cache: str | None = None
    """Folder for the index; null: mmrl in the user's cache folder."""


class _Index:
    """Vectors of all pictures of a gallery, mapped into memory."""

    def __init__(self, config: GalleryConfig, features: Features) -> None:
        self._config, self._features, self._gallery = config, features, Gallery(config.images)
        key = digest(self._gallery.digest, features.digest)
        folder = build_once(cache_folder(config.cache), f"pictures-{key}", self._build)
        self._vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r")

    def search(self, vector_D: np.ndarray) -> ToolResult:
        """The entries nearest to a unit vector."""
        cosines_N = self._vectors_ND @ vector_D
        best: dict[str, tuple[Entry, float]] = {}
        for row in np.argsort(-cosines_N, kind="stable"):
            entry = self._gallery.entries[int(row)]
            best.setdefault(entry.id, (entry, float(cosines_N[row])))
            if len(best) == self._config.top_k:
                break
        lines = [self._line(number, entry, score) for number, (entry, score) in enumerate(best.values(), 1)]
        pictures = tuple(self._thumbnail(entry) for entry, _ in best.values()) if self._config.thumbnail else ()
        note = "\nTheir pictures follow in this order." if pictures else ""
        return ToolResult(
            "\n".join(lines) + note,
            pictures,
            metrics={"hits": float(len(best)), "similarity": max(score for _, score in best.values())},
            details={"ids": tuple(best), "scores": tuple(score for _, score in best.values())},
        )

    @staticmethod
    def _line(number: int, entry: Entry, score: float) -> str:
        said = ": ".join(part for part in (entry.title, entry.caption) if part) or entry.id
        return f"[{number}] {said} (id: {entry.id}, similarity {score:.3f})"

    def _thumbnail(self, entry: Entry) -> Picture:
        image = entry.open()
        image.thumbnail((self._config.thumbnail, self._config.thumbnail))
        return Picture(image)

    def _build(self, folder: Path) -> None:
        entries = self._gallery.entries
        batches = [entries[at : at + _BATCH] for at in range(0, len(entries), _BATCH)]
        vectors = [
            self._features.pictures([entry.open() for entry in batch])
            for batch in shown(batches, "Reading pictures", len(batches))
        ]
        np.save(folder / "vectors.npy", np.concatenate(vectors))


class ImageSearch:
    """By picture, on colours and edges. Safe between threads; the index is shared by processes."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config(GalleryConfig):
        """Fields of a ``tools.image_search:ImageSearch`` block."""

        colour: float = Field(default=0.5, ge=0, le=1)
        """How much of the similarity is colour; the rest is edges."""

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, config.name
        self._features = Classical(config.colour)
        self._index = _Index(config, self._features)

    def __call__(self, image: int, ctx: ToolContext) -> ToolResult:
        """Find pictures that look like an image of the conversation. Gives titles, ids and the pictures, most similar first.

        image: number of the image, from 1.
        """
        return self._index.search(self._features.pictures([ctx.picture(image).image])[0])


class ClipImageSearch:
    """By picture or by text, on a CLIP model's vectors. Safe between threads; the index is shared by processes."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config(GalleryConfig):
        """Fields of a ``tools.image_search:ClipImageSearch`` block."""

        clip: str
        """Folder or hub id of a CLIP model."""
        device: str = "cpu"
        """Where it runs."""

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, config.name
        self._features = Clip(config.clip, config.device)
        self._index = _Index(config, self._features)

    def __call__(self, ctx: ToolContext, image: int | None = None, query: str | None = None) -> ToolResult:
        """Find pictures, either by an image of the conversation or by words. Gives titles, ids and the pictures, best first.

        image: number of the image to compare with, from 1.
        query: what is to be seen in the pictures, in a few words.
        """
        if (image is None) == (not (query or "").strip()):
            raise ToolError("Give either 'image' or 'query', and not both.")
        if image is not None:
            return self._index.search(self._features.pictures([ctx.picture(image).image])[0])
        return self._index.search(self._features.texts([query or ""])[0])
