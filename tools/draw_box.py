"""A rectangle drawn on a copy of an image."""

from __future__ import annotations

from mmrl.messages import IDENTITY, Picture, ToolContext, ToolError
from tools.images import Box, Colour, check_box

MAX_THICKNESS = 100


def draw_box(image: int, box: Box, ctx: ToolContext, color: Colour = "red", thickness: int = 3) -> Picture:
    """Draw the outline of a rectangle on a copy of an image, to mark or check a place.

    image: number of the image, from 1.
    box: left, top, right and bottom of the rectangle, in pixels from the upper left corner of the image.
    color: of the outline.
    thickness: of the outline, in pixels, inwards; from 1 to 100.
    """
    picture = ctx.picture(image)
    left, top, right, bottom = check_box(picture, box)
    if not 1 <= thickness <= MAX_THICKNESS:
        raise ToolError(f"'thickness' must be from 1 to {MAX_THICKNESS}, got {thickness}.")
    copy = picture.image.copy()
    width = min(thickness, right - left, bottom - top)
    for edge in (  # Pillow's own rectangle is a pixel too high where a box is one pixel high
        (left, top, right, top + width),
        (left, bottom - width, right, bottom),
        (left, top, left + width, bottom),
        (right - width, top, right, bottom),
    ):
        copy.paste(color, edge)
    return picture.derived(copy, IDENTITY, image - 1)
