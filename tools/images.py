"""What the image tools share: colours, and checks of what a model asked for, in pixels as ``mmrl.messages.Picture`` counts."""

from __future__ import annotations

from typing import Literal

from mmrl.messages import Picture, ToolError

Box = tuple[int, int, int, int]
Colour = Literal["red", "green", "blue", "yellow", "magenta", "cyan", "black", "white"]
MAX_SIDE = 4096  # of a picture that a tool makes, in pixels


def check_box(picture: Picture, box: Box) -> Box:
    """``box`` (left, top, right, bottom), if it has an area and lies within the picture. Raises ToolError."""
    left, top, right, bottom = box
    width, height = picture.image.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ToolError(
            f"The box {list(box)} must have left < right and top < bottom and lie within the image, "
            f"which is {width} wide and {height} high."
        )
    return box


def check_size(width: int, height: int) -> tuple[int, int]:
    """(width, height), if a picture may be of that size. Raises ToolError."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise ToolError(f"The new image would be {width} wide and {height} high; each must be from 1 to {MAX_SIDE} pixels.")
    return width, height
