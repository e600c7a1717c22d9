"""Mirror an image."""

from __future__ import annotations

from typing import Literal

from PIL import Image

from mmrl.messages import Picture, ToolContext


def flip(image: int, direction: Literal["horizontal", "vertical"], ctx: ToolContext) -> Picture:
    """Mirror an image.

    image: number of the image, from 1.
    direction: horizontal swaps left and right, vertical swaps top and bottom.
    """
    picture = ctx.picture(image)
    width, height = picture.image.size
    how, to_this = {
        "horizontal": (Image.Transpose.FLIP_LEFT_RIGHT, (-1.0, 0.0, float(width), 0.0, 1.0, 0.0)),
        "vertical": (Image.Transpose.FLIP_TOP_BOTTOM, (1.0, 0.0, 0.0, 0.0, -1.0, float(height))),
    }[direction]
    return picture.derived(picture.image.transpose(how), to_this, image - 1)
