"""Prompt files in their published formats, read line by line; whatever is wrong with a line is one sentence that names it.

GenEval's evaluation_metadata.jsonl (Ghosh et al. 2023), an object a line:
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
     "prompt": "a photo of two clocks"}

OCR prompts as Flow-GRPO's (Liu et al. 2025), a sentence a line, with what is to be read in double quotes:
    A street sign that says "ONE WAY".

Prompts with pictures and metadata, an object a line, of which only ``prompt`` must be there; pictures lie beside the file:
    {"prompt": "make the car blue", "image": "car.png", "tag": "colour", "words": [], "details": {"requirement": "..."}}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mmrl.errors import ConfigError, DataError
from mmrl.messages import Picture, as_seen
from mmrl.registry import did_you_mean
from mmrl.transcripts import Question, unmarked

SHOWN = 10  # bad lines that a message names
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_KEYS = ("prompt", "image", "tag", "include", "exclude", "words", "details", "id")


class _Bad(Exception):
    """What is wrong with a line, naming its key."""


@dataclass(frozen=True)
class Line:
    """A prompt whose pictures are still files. where: for messages. share: in [0, 1), from what the line says alone."""

    where: str
    family: str
    details: Mapping[str, Any]
    pictures: tuple[Path, ...]
    share: float

    def question(self) -> Question:
        """Raises DataError for a picture that cannot be read."""
        pictures = tuple(self._open(path) for path in self.pictures)
        return Question(self.family, (self.details["prompt"], *pictures), (), unmarked, self.details)

    def _open(self, path: Path) -> Picture:
        try:
            with Image.open(path) as image:
                return Picture(as_seen(ImageOps.exif_transpose(image)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where}: the picture {path} cannot be read; mend it or take the line out") from error


_Parsed = tuple[str, dict[str, Any], tuple[Path, ...]]  # family, details, pictures


def read(path: str, parse: Callable[[bytes, Path], _Parsed], seed: int) -> list[Line]:
    """All lines, in order; empty ones are skipped. Raises ConfigError without such a file, DataError naming every bad line."""
    file = Path(path)
    try:
        raw = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: the prompts cannot be read ({error.strerror}); set 'path' to a file of prompts") from error
    lines, wrong = [], []
    for number, data in enumerate(raw, 1):
        if data.strip():
            where = f"{path}, line {number}"
            digest = hashlib.blake2b(f"{seed}:".encode() + data.strip(), digest_size=7).digest()
            try:
                lines.append(Line(where, *parse(data, file.parent), int.from_bytes(digest, "big") / 2**56))
            except _Bad as error:
                wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise DataError("\n".join([*wrong[:SHOWN], *more]))
    return lines


def geneval(raw: bytes, folder: Path) -> _Parsed:
    data = _object(raw)
    for key in ("tag", "include", "prompt"):
        if key not in data:
            raise _Bad(f"lacks the key '{key}'; a line of GenEval's metadata has tag, include and prompt")
    return _text(data, "tag"), _checked(data), ()


def quoted(raw: bytes, folder: Path) -> _Parsed:
    prompt = _decoded(raw).strip()
    words = tuple(straight or curly for straight, curly in _QUOTED.findall(prompt))
    if not words:
        raise _Bad('has no text in double quotes; a line is a prompt such as: a sign that says "OPEN"')
    return "words", {"prompt": prompt, "tag": "words", "words": words}, ()


def pictured(raw: bytes, folder: Path) -> _Parsed:
    data = _object(raw)
    for key in data:
        if key not in _KEYS:
            raise _Bad(f"unknown key '{key}'{did_you_mean(key, _KEYS)}; what rewards want to know goes into 'details'")
    if "prompt" not in data:
        raise _Bad("lacks the key 'prompt'")
    more = data.get("details", {})
    if not isinstance(more, dict):
        raise _Bad(f"'details' must be an object, got {_short(more)}")
    images = data.get("image", [])
    pictures = tuple(_file(image, folder) for image in ([images] if isinstance(images, str) else _list(images, "image")))
    family = _text(data, "tag") if "tag" in data else "editing" if pictures else "prompts"
    own = {key: value for key, value in data.items() if key not in ("image", "details", "id")}
    return family, {**more, **_checked(own)}, pictures


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    """The details of a prompt, if they are what rewards expect."""
    _text(data, "prompt")
    for key in ("include", "exclude"):
        for place, clause in enumerate(_list(data.get(key, []), key)):
            _clause(clause, f"{key}.{place}", place)
    if "words" in data:
        words = _list(data["words"], "words")
        if not all(isinstance(word, str) and word for word in words):
            raise _Bad(f"'words' must be texts that are not empty, got {_short(words)}")
        data = {**data, "words": tuple(words)}
    return data


def _clause(clause: Any, key: str, place: int) -> None:
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        raise _Bad(f"'{key}' must be an object with a 'class', got {_short(clause)}")
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise _Bad(f"'{key}.count' must be a number from 1 on, got {_short(count)}")
    if "color" in clause and not isinstance(clause["color"], str):
        raise _Bad(f"'{key}.color' must be a name, got {_short(clause['color'])}")
    position = clause.get("position", ["", 0])
    whole = isinstance(position, list) and len(position) == 2 and isinstance(position[0], str) and isinstance(position[1], int)
    if not whole or ("position" in clause and not 0 <= position[1] < place):
        raise _Bad(
            f"'{key}.position' must be like [\"left of\", 0], with the number of an earlier clause, got {_short(position)}"
        )


def _file(name: Any, folder: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise _Bad(f"'image' must name a file beside the prompts, got {_short(name)}")
    path = folder / name
    if not path.is_file():
        raise _Bad(f"'image' names {path}, which is no file")
    return path


def _object(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(_decoded(raw))
    except ValueError as error:
        raise _Bad(f"is not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(data, dict):
        raise _Bad(f"must be a JSON object, got {_short(data)}")
    return data


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Bad(f"is not UTF-8 (at byte {error.start})") from error


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str) or not value.strip():
        raise _Bad(f"'{key}' must be a text that is not empty, got {_short(value)}")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Bad(f"'{key}' must be a list, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
