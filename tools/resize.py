"""An image in another size."""

from __future__ import annotations

from PIL import Image

from mmrl.messages import Picture, ToolContext
from tools.images import check_size


def resize(image: int, width: int, ctx: ToolContext, height: int | None = None) -> Picture:
    """Show an image in another size.

    image: number of the image, from 1.
    width: of the new image, in pixels.
    height: of the new image, in pixels; left out, the image keeps its proportions.
    """
    picture = ctx.picture(image)
    old_width, old_height = picture.image.size
    size = check_size(width, max(1, round(width * old_height / old_width)) if height is None else height)
    to_this = (old_width / size[0], 0.0, 0.0, 0.0, old_height / size[1], 0.0)
    return picture.derived(picture.image.resize(size, Image.Resampling.BICUBIC), to_this, image - 1)
