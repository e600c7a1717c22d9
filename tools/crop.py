"""Zoom: a rectangle of an image by itself, larger if that helps."""

from __future__ import annotations

from PIL import Image

from mmrl.messages import Picture, ToolContext, ToolError
from tools.images import Box, check_box, check_size

MAX_ENLARGE = 16


def crop(image: int, box: Box, ctx: ToolContext, enlarge: float = 1.0) -> Picture:
    """Cut a rectangle out of an image, to look at it more closely.

    image: number of the image, from 1.
    box: left, top, right and bottom of the rectangle, in pixels from the upper left corner of the image.
    enlarge: how many times larger the rectangle is shown, from 1 (as it is) to 16; for what is too small to be read.
    """
    picture = ctx.picture(image)
    left, top, right, bottom = check_box(picture, box)
    if not 1 <= enlarge <= MAX_ENLARGE:
        raise ToolError(f"'enlarge' must be from 1 to {MAX_ENLARGE}, got {enlarge:g}.")
    width, height = right - left, bottom - top
    size = check_size(round(width * enlarge), round(height * enlarge))
    cut = picture.image.crop((left, top, right, bottom))
    cut = cut if size == cut.size else cut.resize(size, Image.Resampling.BICUBIC)
    return picture.derived(cut, (width / size[0], 0, left, 0, height / size[1], top), image - 1)
