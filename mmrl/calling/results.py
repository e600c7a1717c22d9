"""What a tool may return, as a ToolResult."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from mmrl.messages import Picture, ToolResult


def as_result(value: Any) -> ToolResult:
    """Text, a PIL image, a Picture, a ToolResult, a list or tuple of these, or anything that JSON can write.

    Of a list, texts become lines, pictures keep their order, and one failed result makes the whole one failed. Raises TypeError
    for anything else and ValueError for a picture without pixels.
    """
    if isinstance(value, ToolResult):
        return replace(value, text=_text(value.text), pictures=tuple(_picture(each) for each in value.pictures))
    if isinstance(value, str):
        return ToolResult(_text(value))
    if isinstance(value, Picture | Image.Image):
        return ToolResult(pictures=(_picture(value),))
    if value is None:
        return ToolResult("The tool returned nothing.")
    if isinstance(value, list | tuple) and _speaks(value):
        return _joined([as_result(each) for each in value])
    return ToolResult(json.dumps(value, ensure_ascii=True, default=_plain))


def cut(text: str, limit: int) -> str:
    """The first ``limit`` characters, and a note of how many there were."""
    return text if len(text) <= limit else f"{text[:limit]}\n[cut: {limit} of {len(text)} characters are shown]"


def short(text: str, limit: int) -> str:
    """One line of at most ``limit`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def _speaks(values: Sequence[Any]) -> bool:
    """Whether a list is one of texts and pictures, not of numbers: then it is shown part by part."""
    return any(isinstance(each, Picture | Image.Image | ToolResult) for each in values) or (
        len(values) > 0 and all(isinstance(each, str) for each in values)
    )


def _joined(results: Sequence[ToolResult]) -> ToolResult:
    return ToolResult(
        text="\n".join(result.text for result in results if result.text),
        pictures=tuple(picture for result in results for picture in result.pictures),
        error=any(result.error for result in results),
        metrics={key: value for result in results for key, value in result.metrics.items()},
        details={key: value for result in results for key, value in result.details.items()},
    )


def _text(text: str) -> str:
    """``text`` without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _picture(value: Any) -> Picture:
    picture = value if isinstance(value, Picture) else Picture(value)
    picture.image.load()  # a file that is damaged fails here and not in the policy
    if 0 in picture.image.size:
        raise ValueError(f"returned a picture of {picture.image.width} x {picture.image.height} pixels")
    return picture


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, which have ``tolist``, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"returned a {type(value).__name__}, which is neither text nor a picture nor JSON")
