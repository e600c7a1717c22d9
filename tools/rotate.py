"""Turn an image by any angle."""

from __future__ import annotations

import math

from PIL import Image

from mmrl.messages import Picture, ToolContext
from tools.images import check_size


def rotate(image: int, degrees: float, ctx: ToolContext, expand: bool = True) -> Picture:
    """Turn an image clockwise.

    image: number of the image, from 1.
    degrees: angle, clockwise; 90 makes the left side the top.
    expand: whether the new image is as large as it takes to show all of the old one; if not, it keeps the size and loses corners.
    """
    picture = ctx.picture(image)
    cos, sin = _cos_sin(degrees)
    width, height = picture.image.size
    size = (width, height)
    if expand:  # a hair less than the exact extent, so that rounding in it does not add a row
        reach = (width * abs(cos) + height * abs(sin), width * abs(sin) + height * abs(cos))
        size = check_size(math.ceil(reach[0] - 1e-6), math.ceil(reach[1] - 1e-6))
    # Centre on centre. Downward y makes (cos, -sin; sin, cos) the clockwise rotation; this is its inverse, from new to old.
    x, y = size[0] / 2, size[1] / 2
    to_this = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    turned = picture.image.transform(size, Image.Transform.AFFINE, to_this, Image.Resampling.BILINEAR)
    return picture.derived(turned, to_this, image - 1)


def _cos_sin(degrees: float) -> tuple[float, float]:
    """Exact for right angles, whose pictures are then exact, too."""
    quarter, rest = divmod(degrees % 360, 90)
    cos, sin = (math.cos(math.radians(rest)), math.sin(math.radians(rest))) if rest else (1.0, 0.0)
    for _ in range(int(quarter)):
        cos, sin = -sin, cos
    return cos, sin
