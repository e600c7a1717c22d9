"""A collection of pictures: a folder, or a JSONL file with lines {"id", "image" or "images", optional "title", "caption"}.

A corpus of documents with images is such a file too. In a folder, a picture's id is its path and its title the file's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from mmrl.caching import digest
from mmrl.errors import ConfigError, DataError
from mmrl.messages import as_seen
from tools.search_parts.corpus import parse_object

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Entry:
    """A picture and what is said of it. where: file and line that name it, for messages."""

    id: str
    title: str
    caption: str
    path: Path
    where: str

    def open(self) -> Image.Image:
        """The picture as RGB, upright. Raises DataError naming it."""
        try:
            with Image.open(self.path) as image:
                return as_seen(ImageOps.exif_transpose(image))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where}: the picture {self.path} cannot be read; mend it or take it out") from error


class Gallery:
    """See the module. digest: hash of the pictures' ids and contents. Raises ConfigError or DataError, naming file and line."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ConfigError(f"{path}: there are no pictures; set 'images' to a folder or a JSONL file")
        self.entries = list(self._folder() if self.path.is_dir() else self._lines())
        if not self.entries:
            raise DataError(f"{path}: holds no picture; give a folder with pictures or a JSONL file that names some")
        self.digest = digest(*((entry.id, _content(entry)) for entry in self.entries))

    def _folder(self) -> Iterator[Entry]:
        for file in sorted(self.path.rglob("*")):
            if file.suffix.lower() in _SUFFIXES:
                title = file.stem.replace("_", " ")
                yield Entry(file.relative_to(self.path).as_posix(), title, "", file, str(self.path))

    def _lines(self) -> Iterator[Entry]:
        seen: dict[str, int] = {}
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{self.path}, line {number}"
                    entries = list(self._line(line, where))
                    name = entries[0].id if entries else ""
                    if entries and (first := seen.setdefault(name, number)) != number:
                        raise DataError(f"{where}: has the id of line {first}; ids must differ")
                    yield from entries

    def _line(self, line: bytes, where: str) -> Iterator[Entry]:
        """The pictures of a line; a document may have none."""
        data = parse_object(line, where)
        name, title, caption = data.get("id"), data.get("title", ""), data.get("caption", "")
        images = data["images"] if "images" in data else [data["image"]] if "image" in data else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: 'id' must be a string that is not empty")
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise DataError(f"{where}: 'image' must be a file name, or 'images' a list of some, got {json.dumps(images)[:40]}")
        for key, value in (("title", title), ("caption", caption)):
            if not isinstance(value, str):
                raise DataError(f"{where}: '{key}' must be a string, but it is {json.dumps(value)[:40]}")
        for image in images:
            yield Entry(name, title, caption, self.path.parent / image, where)


def _content(entry: Entry) -> str:
    try:
        with entry.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{entry.where}: the picture {entry.path} cannot be read ({error.strerror})") from error
