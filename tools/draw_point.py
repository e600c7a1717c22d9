"""A dot drawn on a copy of an image."""

from __future__ import annotations

from PIL import ImageDraw

from mmrl.messages import IDENTITY, Picture, ToolContext, ToolError
from tools.images import Colour

MAX_RADIUS = 100


def draw_point(image: int, point: tuple[int, int], ctx: ToolContext, color: Colour = "red", radius: int = 4) -> Picture:
    """Draw a dot on a copy of an image, to mark or check a place.

    image: number of the image, from 1.
    point: x and y of the pixel in the middle of the dot, from the upper left corner of the image.
    color: of the dot.
    radius: of the dot, in pixels, from 0 to 100.
    """
    picture = ctx.picture(image)
    x, y = point
    width, height = picture.image.size
    if not (0 <= x < width and 0 <= y < height):
        raise ToolError(f"The point {list(point)} must lie within the image, which is {width} wide and {height} high.")
    if not 0 <= radius <= MAX_RADIUS:
        raise ToolError(f"'radius' must be from 0 to {MAX_RADIUS}, got {radius}.")
    copy = picture.image.copy()
    pen = ImageDraw.Draw(copy)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    pen.point((x, y), fill=color)  # an ellipse of one pixel is none
    return picture.derived(copy, IDENTITY, image - 1)
