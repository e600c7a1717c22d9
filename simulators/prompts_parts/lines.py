"""A data set of questions: a JSONL file of OpenAI-style messages, pictures and answers, read line by line.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}]}],
     "answer": "cat", "check": {"kind": "normalised"}, "family": "animals", "details": {"box": [10, 20, 30, 40]}}

``answers``: several, instead of ``answer``. ``{"type": "image_url", "image_url": {"url": "cat.png"}}`` is the same as ``image``.
The last message is the question. A system message may be the first, and what users and assistants said may stand in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mmrl.answers import Check, parse_check
from mmrl.errors import ConfigError, DataError
from mmrl.messages import Message, Picture, Role, as_seen, encodable
from mmrl.registry import did_you_mean
from mmrl.transcripts import Question

SHOWN = 10  # bad lines that a message names
_Parts = tuple[str | Path, ...]
_KEYS = ("messages", "answer", "answers", "check", "family", "details", "id")


class _Bad(Exception):
    """What is wrong with a line, naming its key."""


@dataclass(frozen=True)
class Line:
    """A question whose pictures are still files. where: for messages. said: by whom, the question last. share: in [0, 1), from
    what the line says alone."""

    where: str
    family: str
    system: str
    said: tuple[tuple[Role, _Parts], ...]
    references: tuple[str, ...]
    check: Check
    details: Mapping[str, Any]
    share: float

    def question(self) -> Question:
        """Raises DataError for a picture that cannot be read."""
        before = [Message(role, tuple(map(self._open, parts))) for role, parts in self.said]
        parts = before.pop().parts
        return Question(self.family, parts, self.references, self.check, self.details, self.system, tuple(before))

    def _open(self, path: str | Path) -> str | Picture:
        if isinstance(path, str):
            return path
        try:
            with Image.open(path) as image:
                return Picture(as_seen(ImageOps.exif_transpose(image)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.where}: the picture {path} cannot be read; mend it or take the line out") from error


def read(path: str, default_check: str, seed: int) -> list[Line]:
    """All lines, in order; empty ones are skipped. Raises ConfigError without such a file, DataError naming every bad line."""
    file = Path(path)
    try:
        raw = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: the data set cannot be read ({error.strerror}); set 'path' to a JSONL file") from error
    lines, wrong = [], []
    for number, data in enumerate(raw, 1):
        if data.strip():
            try:
                lines.append(_line(data, f"{path}, line {number}", file.parent, default_check, seed))
            except _Bad as error:
                wrong.append(f"{path}, line {number}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise DataError("\n".join([*wrong[:SHOWN], *more]))
    return lines


def _line(raw: bytes, where: str, folder: Path, default_check: str, seed: int) -> Line:
    try:
        data = json.loads(raw)
    except ValueError as error:  # a UnicodeDecodeError is one, too
        raise _Bad(f"is not JSON ({error}); each line must be one JSON object in UTF-8") from error
    if not isinstance(data, dict):
        raise _Bad(f"must be a JSON object, got {_short(data)}")
    if not encodable(json.dumps(data, ensure_ascii=False)):
        raise _Bad("holds half of a surrogate pair, which no tokenizer takes")
    for key in data:
        if key not in _KEYS:
            raise _Bad(f"unknown key '{key}'{did_you_mean(key, _KEYS)}")
    references = _references(data)
    try:
        check = parse_check(data.get("check", default_check), references)
    except ValueError as error:
        raise _Bad(str(error)) from error
    family, details = data.get("family", "questions"), data.get("details", {})
    if not isinstance(family, str) or not family:
        raise _Bad(f"'family' must be a string that is not empty, got {_short(family)}")
    if not isinstance(details, dict):
        raise _Bad(f"'details' must be a JSON object, got {_short(details)}")
    own = json.dumps(data.get("id", data), sort_keys=True).encode()
    digest = hashlib.blake2b(f"{seed}:".encode() + own, digest_size=7).digest()
    system, said = _messages(data, folder)
    return Line(where, family, system, said, references, check, details, int.from_bytes(digest, "big") / 2**56)


def _references(data: Mapping[str, Any]) -> tuple[str, ...]:
    if ("answer" in data) == ("answers" in data):
        raise _Bad("must have either 'answer' or 'answers'")
    key = "answer" if "answer" in data else "answers"
    values = [data[key]] if key == "answer" else data[key]
    if not isinstance(values, list) or not values:
        raise _Bad(f"'answers' must be a list of at least one answer, got {_short(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise _Bad(f"'{key}' must be text or a number, got {_short(value)}")
    return tuple(map(str, values))


def _messages(data: Mapping[str, Any], folder: Path) -> tuple[str, tuple[tuple[Role, _Parts], ...]]:
    """What the system message says, and what was said by whom, the question last."""
    messages = data.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Bad(f"'messages' must be a list of messages, got {_short(messages)}")
    roles = [message.get("role") for message in messages]
    first = int(roles[:1] == ["system"])
    if set(map(str, roles[first:])) - {"user", "assistant"} or roles[-1:] != ["user"]:
        raise _Bad(
            f"'messages' must be messages of users and assistants after at most one of the system, and end with a user's, got "
            f"{_short(roles)}; the environment says all others"
        )
    said = [_parts(message.get("content"), f"messages.{place}.content", folder) for place, message in enumerate(messages)]
    if not all(isinstance(part, str) for parts in said[:first] for part in parts):
        raise _Bad("'messages.0.content' shows a picture, but the system's message must be text")
    system = "".join(part for parts in said[:first] for part in parts if isinstance(part, str))
    return system, tuple(zip(roles[first:], said[first:], strict=True))


def _parts(content: Any, key: str, folder: Path) -> _Parts:
    if isinstance(content, str) and content:
        return (content,)
    if not isinstance(content, list) or not content:
        raise _Bad(f"'{key}' must be text or a list of parts, got {_short(content)}")
    return tuple(_part(part, f"{key}.{place}", folder) for place, part in enumerate(content))


def _part(part: Any, key: str, folder: Path) -> str | Path:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image_url" and isinstance(part.get("image_url"), dict):
        name = part["image_url"].get("url")
    else:
        name = part.get("image") if kind == "image" else None
    if not isinstance(name, str) or not name:
        raise _Bad(f"'{key}' must be {{type: text, text: ...}} or {{type: image, image: FILE}}, got {_short(part)}")
    if name.startswith(("http:", "https:", "data:")):
        raise _Bad(f"'{key}' must name a file beside the data set, got {_short(name)}")
    path = folder / name.removeprefix("file://")
    if not path.is_file():
        raise _Bad(f"'{key}' names {path}, which is no file")
    return path


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
