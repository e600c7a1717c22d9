"""What the questions' pictures are made of: colours, shapes, writing, backgrounds. The same pixels where Pillow is the same."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (225, 35, 35),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (240, 210, 30),
    "cyan": (30, 200, 215),
    "purple": (165, 50, 200),
    "orange": (245, 140, 25),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
_GREY = 128
_MARGIN = 0.12  # of a sign's side, around its writing
_HALO = 0.05  # of a sign's height: how wide the halo of faded writing is
_BOOST = 2.2  # of faded writing, of which the halo takes about half
_BLOTCH = 0.18  # of a sign's height
_BYTE_STD = 74.0  # standard deviation of a random byte


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which is the same on every machine."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


@functools.lru_cache(maxsize=512)
def writing(text: str, width: int, height: int) -> Image.Image:
    """``text`` as large as it fits into the middle of a grey-level picture: 0 is paper, 255 is ink."""
    left, top, right, bottom = font(100).getbbox(text)
    size = max(4, int(100 * min(width / (right - left), height / (bottom - top))))
    left, top, right, bottom = font(size).getbbox(text)
    page = Image.new("L", (width, height))
    at = ((width - left - right) / 2, (height - top - bottom) / 2)
    ImageDraw.Draw(page).text(at, text, fill=255, font=font(size), stroke_width=size // 24)
    return page


def sign(generator: random.Random, kind: str, value: str, size: tuple[int, int], blotches: float | None) -> Image.Image:
    """A small sign that shows ``value``: dots of that colour if ``kind`` is colour, else writing.

    blotches: None writes in black on white. A number writes what is only there from near, the fine half of a hybrid image (Oliva
    et al. 2006): ink has a halo that cancels it, so that over a few pixels the mean is the same grey whatever is written, and
    blotches of that standard deviation drown what the cancelling leaves, where the picture is shown so small that a blotch is a
    pixel.
    """
    values = _paper(kind, value, *size, blotches is not None)
    if blotches:
        values = values + _blotches(generator, *size, coloured=kind == "colour") * (blotches / _BYTE_STD)
    made = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    ImageDraw.Draw(made).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(60, 60, 60))
    return made


def _blotches(generator: random.Random, width: int, height: int, coloured: bool) -> np.ndarray:
    """Of mean 0, each about _BLOTCH of the sign's height."""
    coarse = (max(2, round(width / height / _BLOTCH)), round(1 / _BLOTCH))
    mode, bands = ("RGB", 3) if coloured else ("L", 1)
    drawn = Image.frombytes(mode, coarse, generator.randbytes(bands * coarse[0] * coarse[1]))
    values = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 127.5
    return values.reshape(height, width, bands)


@functools.lru_cache(maxsize=2048)
def _paper(kind: str, value: str, width: int, height: int, fading: bool) -> np.ndarray:
    """A sign without blotches, float32 [height, width, 3]."""
    rim = round(min(width, height) * _MARGIN)
    inner = (width - 2 * rim, height - 2 * rim)
    ink = np.array(COLOURS[value] if kind == "colour" else (0, 0, 0), np.float32)
    paper = np.array((_GREY,) * 3 if fading else (255,) * 3, np.float32)
    strength = np.zeros((height, width, 1), np.float32)
    strength[rim : height - rim, rim : width - rim, 0] = _dots(*inner, fading) if kind == "colour" else _ink(value, *inner)
    if fading and kind != "colour":
        whole = Image.fromarray((strength[..., 0] * 255).round().astype(np.uint8))
        blurred = np.asarray(whole.filter(ImageFilter.GaussianBlur(height * _HALO)), np.float32) / 255
        strength = (strength - blurred[..., None]) * _BOOST
    return paper + strength * (ink - paper)


def _ink(text: str, width: int, height: int) -> np.ndarray:
    return np.asarray(writing(text, width, height), np.float32) / 255


def _dots(width: int, height: int, ringed: bool) -> np.ndarray:
    """Three by three dots, each in a ring that is its negative: together nothing."""
    y, x = np.mgrid[:height, :width] + 0.5
    step = min(width, height) / 3
    away = np.hypot(x % step - step / 2, y % step - step / 2)
    radius = step * 0.33
    dot, ring = away <= radius, (away > radius) & (away <= radius * 2**0.5)
    return dot.astype(np.float32) - ring.astype(np.float32) * (ringed * dot.sum() / max(1, ring.sum()))


def shape(draw: ImageDraw.ImageDraw, name: str, box: Sequence[float], colour: Colour) -> None:
    """One of SHAPES, filling a box."""
    left, top, right, bottom = box
    third = (right - left) / 3
    if name == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif name == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif name == "triangle":
        draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=colour)
    elif name == "cross":
        draw.rectangle((left + third, top, right - third, bottom), fill=colour)
        draw.rectangle((left, top + third, right, bottom - third), fill=colour)
    else:
        draw.ellipse((left, top, right, bottom), outline=colour, width=max(2, round(third * 0.7)))


def pale(generator: random.Random) -> Colour:
    """A light colour, for paper."""
    return generator.randint(200, 250), generator.randint(200, 250), generator.randint(200, 250)


def plain(generator: random.Random, size: int) -> Image.Image:
    return Image.new("RGB", (size, size), pale(generator))


def texture(generator: random.Random, size: int) -> Image.Image:
    """Soft blotches of any colour."""
    return Image.frombytes("RGB", (6, 6), generator.randbytes(108)).resize((size, size), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------- letters that turn into one another


@functools.cache
def turning_letters(side: int) -> dict[str, Image.Image]:
    """b, d, p and q, u and n as grey-level pictures, of which each is exactly another one turned by 180 degrees or mirrored."""
    b, u = Image.new("L", (side, side)), Image.new("L", (side, side))
    stroke = max(2, round(side * 0.16))
    pen = ImageDraw.Draw(b)
    pen.ellipse((round(side * 0.2), round(side * 0.4), round(side * 0.8), side - 1), outline=255, width=stroke)
    pen.rectangle((round(side * 0.2), 0, round(side * 0.2) + stroke - 1, side - 1), fill=255)
    pen = ImageDraw.Draw(u)
    pen.arc((round(side * 0.2), round(side * 0.3), side - 1 - round(side * 0.2), side - 1), 0, 180, fill=255, width=stroke)
    pen.rectangle((round(side * 0.2), round(side * 0.15), round(side * 0.2) + stroke - 1, round(side * 0.65)), fill=255)
    u = ImageChops.lighter(u, u.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    across, over, half = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180
    return {"b": b, "d": b.transpose(across), "p": b.transpose(over), "q": b.transpose(half), "u": u, "n": u.transpose(over)}
