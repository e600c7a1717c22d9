"""Contrast and brightness of an image."""

from __future__ import annotations

from PIL import ImageEnhance

from mmrl.messages import IDENTITY, Picture, ToolContext, ToolError

MAX_FACTOR = 10


def adjust(image: int, ctx: ToolContext, contrast: float = 1.0, brightness: float = 1.0) -> Picture:
    """Change an image's contrast and brightness, to see what is faint or dark.

    image: number of the image, from 1.
    contrast: factor from 0 (all grey) over 1 (as it is) to 10.
    brightness: factor from 0 (black) over 1 (as it is) to 10; applied before contrast.
    """
    picture = ctx.picture(image)
    for name, factor in (("contrast", contrast), ("brightness", brightness)):
        if not 0 <= factor <= MAX_FACTOR:
            raise ToolError(f"'{name}' must be from 0 to {MAX_FACTOR}, got {factor:g}.")
    lit = ImageEnhance.Brightness(picture.image).enhance(brightness)
    return picture.derived(ImageEnhance.Contrast(lit).enhance(contrast), IDENTITY, image - 1)
