"""A rectangle drawn on a copy of an image."""

from __future__ import annotations

from PIL import ImageDraw

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
    # Pillow means the last pixel, a box the edge behind it; and an outline that meets itself is all there is to draw.
    width = min(thickness, (right - left + 1) // 2, (bottom - top + 1) // 2)
    ImageDraw.Draw(copy).rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)
    return picture.derived(copy, IDENTITY, image - 1)
