"""Operations on pictures, by the names that a question's ``details["operations"]`` has, and the calls of tools that do them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from simulators.prompts_parts.drawing import Box

_Transpose = Image.Transpose


@dataclass(frozen=True)
class Turning:
    """What an operation does (``transpose``) and what undoes it, and the tool's arguments beside ``image``."""

    transpose: Image.Transpose
    inverse: Image.Transpose
    tool: str
    arguments: dict[str, Any]
    words: str


# A rotation is clockwise, as in tools/rotate.py; Pillow's are counterclockwise.
TURNINGS = {
    "rotate_90": Turning(_Transpose.ROTATE_270, _Transpose.ROTATE_90, "rotate", {"degrees": 90}, "rotate 90"),
    "rotate_180": Turning(_Transpose.ROTATE_180, _Transpose.ROTATE_180, "rotate", {"degrees": 180}, "rotate 180"),
    "rotate_270": Turning(_Transpose.ROTATE_90, _Transpose.ROTATE_270, "rotate", {"degrees": 270}, "rotate 270"),
    "flip_horizontal": Turning(
        _Transpose.FLIP_LEFT_RIGHT, _Transpose.FLIP_LEFT_RIGHT, "flip", {"direction": "horizontal"}, "flip horizontal"
    ),
    "flip_vertical": Turning(
        _Transpose.FLIP_TOP_BOTTOM, _Transpose.FLIP_TOP_BOTTOM, "flip", {"direction": "vertical"}, "flip vertical"
    ),
}


def undo(name: str, upright: Image.Image) -> Image.Image:
    """The picture of which the operation ``name`` makes ``upright``."""
    return upright.transpose(TURNINGS[name].inverse)


def box_before(name: str, box: Box, size: tuple[int, int]) -> Box:
    """Where a box of the upright picture, which has this size, lies in the picture that ``undo`` gives."""
    left, top, right, bottom = box
    width, height = size
    return {
        "rotate_90": (top, width - right, bottom, width - left),
        "rotate_180": (width - right, height - bottom, width - left, height - top),
        "rotate_270": (height - bottom, left, height - top, right),
        "flip_horizontal": (width - right, top, width - left, bottom),
        "flip_vertical": (left, height - bottom, right, height - top),
    }[name]
