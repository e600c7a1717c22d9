"""Finds coloured shapes in a small picture: which, of what colour, where. No network, and about a millisecond a picture.

The paper's colour is the median along the rim. A pixel belongs to the colour c of the palette for which

    pixel = paper + a (c - paper),  0 <= a <= 1

fits best, and to a thing where a > 1/2, so that smoothed edges take the colour of what they are the edge of. Things are
connected pixels; where two colours touch they are parted. A thing's shape is that of the nearest of many exact shapes of about
its size, by numbers that neither place nor size changes much: how much of its box and of the box's corners, edges and middle it
fills, where its centre of gravity is, how far it spreads. What is near to none is no thing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from mmrl.rewards.geneval_rules import Detected

Colour = tuple[int, int, int]

PALETTE: Mapping[str, Colour] = {
    "red": (225, 35, 35),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (240, 210, 30),
    "purple": (165, 50, 200),
    "orange": (245, 140, 25),
    "black": (25, 25, 25),
}
LARGEST = 64  # pixels a side; a larger picture is shrunk first
SMALLEST = 0.012  # of the picture: what is smaller is a speck
MINORITY = 0.25  # of a thing's pixels that another colour must have to be a thing of its own
CONTRAST = 60.0  # between paper and a colour, below which nobody sees it
_SIDES = (6, 7, 8, 9, 10, 12, 14, 17, 20, 25, 31, 40)  # of the exact shapes, in pixels
_FINE = 8  # points a side of a pixel of an exact shape
_BLURS = (0.0, 0.7)  # pixels
# What the numbers of ``_measure`` are divided by before they are compared: about how much a small shape's differ by chance.
_SCALES = np.array([0.05, 0.03, 0.03, 0.012, 0.15, 0.12, 0.08, 0.08])
NEAR = 1.5  # of an exact shape, in these units


def read(image: Image.Image, palette: Mapping[str, Colour], shapes: Sequence[str]) -> list[Detected]:
    """The things in a picture (RGB), the surest first; boxes in its pixels, names of ``shapes``, colours of ``palette``."""
    shrink = math.ceil(max(image.size) / LARGEST)
    pixels = np.asarray(image.reduce(shrink) if shrink > 1 else image, np.float32)
    nearest, strength = _explain(pixels, np.array(list(palette.values()), np.float32))
    found = []
    for where, colour in _things(strength > 0.5, nearest, max(4.0, SMALLEST * strength.size)):
        shape, box, sure = _shape(where, strength, tuple(shapes))
        if shape:
            found.append(Detected(shape, tuple(edge * shrink for edge in box), list(palette)[colour], sure))  # type: ignore[arg-type]
    return sorted(found, key=lambda thing: -thing.score)


def _explain(pixels: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each pixel the number of the colour that explains it best, and how much of it is that colour, 0 (paper) to 1."""
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    away = (pixels - np.median(rim, 0)).reshape(-1, 3)
    ways = colours - np.median(rim, 0)  # [C, 3]
    lengths = np.square(ways).sum(1)
    along = away @ ways.T  # [pixels, C]
    share = np.clip(along / np.maximum(lengths, 1.0), 0.0, 1.0)
    # |away - share way|^2 without |away|^2, which is the same for all colours
    misfit = share * (share * lengths - 2 * along)
    misfit[:, lengths < CONTRAST**2] = np.inf
    nearest = misfit.argmin(1)
    strength = share[np.arange(len(share)), nearest]
    return nearest.reshape(pixels.shape[:2]), strength.reshape(pixels.shape[:2])


def _things(solid: np.ndarray, nearest: np.ndarray, least: float) -> list[tuple[np.ndarray, int]]:
    """The pixels of each thing, and the number of its colour."""
    things = []
    for where in pieces(solid):
        number = int(where.sum())
        if number < least:
            continue
        counts = np.bincount(nearest[where])
        main = [int(colour) for colour in counts.argsort()[::-1] if counts[colour] >= max(MINORITY * number, least)]
        if len(main) <= 1:
            things.append((where, int(counts.argmax())))
            continue
        for colour in main:
            own = [piece for piece in pieces(where & (nearest == colour)) if piece.sum() >= least]
            things += [(piece, colour) for piece in own]
    return things


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces of a mask [height, width], each as a mask; pixels that share an edge are connected."""
    parents: list[int] = []
    spans: list[tuple[int, int, int]] = []  # row, first column, last column + 1
    above: list[int] = []
    for row, line in enumerate(np.diff(mask.astype(np.int8), prepend=0, append=0, axis=1)):
        ends = np.flatnonzero(line).tolist()
        here: list[int] = []
        for first, last in zip(ends[::2], ends[1::2], strict=True):
            own = len(spans)
            spans.append((row, first, last))
            parents.append(own)
            here.append(own)
            for other in above:
                if spans[other][1] < last and first < spans[other][2]:
                    parents[_root(parents, other)] = _root(parents, own)
        above = here
    found: dict[int, np.ndarray] = {}
    for own, (row, first, last) in enumerate(spans):
        found.setdefault(_root(parents, own), np.zeros_like(mask, bool))[row, first:last] = True
    return list(found.values())


def _root(parents: list[int], at: int) -> int:
    while parents[at] != at:
        parents[at] = parents[parents[at]]
        at = parents[at]
    return at


def _shape(where: np.ndarray, strength: np.ndarray, shapes: tuple[str, ...]) -> tuple[str, tuple[float, ...], float]:
    """The name of a thing's shape (empty: none), its box, and how sure that is."""
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    top, bottom = max(0, rows[0] - 1), min(where.shape[0], rows[-1] + 2)
    left, right = max(0, columns[0] - 1), min(where.shape[1], columns[-1] + 2)
    part, own = strength[top:bottom, left:right], where[top:bottom, left:right]
    numbers, inner = _measure(np.where(own | ((part <= 0.5) & _beside(own)), part, 0.0))
    box = (float(left + inner[0]), float(top + inner[1]), float(left + inner[2]), float(top + inner[3]))
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    names, examples, sides = _exact(shapes)
    alike = (sides >= 0.75 * side) & (sides <= 1.34 * side)
    if not alike.any():
        return "", box, 0.0
    distances = np.sqrt((np.square(examples[alike] - numbers / _SCALES)).mean(1))
    at = int(distances.argmin())
    near = float(distances[at])
    return (str(names[alike][at]) if near <= NEAR else ""), box, max(0.0, 1 - 0.1 * near / NEAR)


def _beside(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels that share an edge or a corner with it."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    whole = wide.copy()
    whole[:, 1:] |= wide[:, :-1]
    whole[:, :-1] |= wide[:, 1:]
    return whole


def _measure(share: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """What is compared of a thing of which each pixel has a share [height, width], and its box in it.

    Of its box: the part that is filled; where the centre of gravity is, down and across; how far the pixels are spread around it
    (the polar moment of inertia over the area's square, 1/2pi for a circle); how much wider than high they are; how much of the
    middle, the corners and the middles of the edges is filled.
    """
    height, width = share.shape
    solid = np.sort(share[share > 0.5])
    if len(solid):  # a thing that is pale throughout, or that noise made so, is solid all the same
        share = np.minimum(share / solid[int(0.75 * len(solid))], 1.0)
    area = float(share.sum()) + 1e-6
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    across, down = share.sum(0), share.sum(1)
    cx, cy = float(across @ x) / area, float(down @ y) / area
    xx, yy = float(across @ np.square(x - cx)) / area, float(down @ np.square(y - cy)) / area
    left, right = _ends(share.max(0))
    top, bottom = _ends(share.max(1))
    w, h = max(right - left, 1e-3), max(bottom - top, 1e-3)
    u, v = (x - left) / w, (y - top) / h
    low_u, high_u, low_v, high_v = (_hump(values, at) for values, at in ((u, 0.14), (u, 0.86), (v, 0.14), (v, 0.86)))
    mid_u, mid_v = _hump(u, 0.5), _hump(v, 0.5)
    corners = (low_v + high_v) @ share @ (low_u + high_u) / 4
    edges = ((low_v + high_v) @ share @ mid_u + mid_v @ share @ (low_u + high_u)) / 4
    numbers = np.array(
        [
            area / (w * h),
            (cy - top) / h,
            (cx - left) / w,
            (xx + yy) / area,
            math.log((xx + 1e-3) / (yy + 1e-3)),
            float(mid_v @ share @ mid_u),
            float(corners),
            float(edges),
        ]
    )
    return numbers, (left, top, right, bottom)


def _ends(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile of shares rises to a half and falls from it, to parts of a pixel: a pixel of share a begins 1 - a late."""
    solid = np.flatnonzero(profile > 0.5)
    if not len(solid):
        return 0.0, float(len(profile))
    first, last = int(solid[0]), int(solid[-1])
    before = float(profile[first - 1]) if first else 0.0
    after = float(profile[last + 1]) if last + 1 < len(profile) else 0.0
    return first + (1 - float(profile[first])) - before, last + float(profile[last]) + after


def _hump(places: np.ndarray, at: float) -> np.ndarray:
    """Weights of places of a side of 1, around ``at``; they add up to 1."""
    weights = np.exp(-np.square((places - at) / 0.1) / 2) + 1e-9
    return weights / weights.sum()


# ---------------------------------------------------------------- exact shapes


def _inside_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turns = [(math.pi * i / 5, 0.45 if i % 2 else 1.0) for i in range(10)]
    points = np.array([(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in turns])
    points = (points - points.min(0)) / (points.max(0) - points.min(0))
    inside = np.zeros(u.shape, bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, 0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > v) != (y2 > v)) & (u < (x2 - x1) * (v - y1) / (y2 - y1) + x1)
    return inside


def _round(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u - 0.5, v - 0.5)


# Whether points of a box of side 1, (0, 0) its upper left corner, are in the shape.
INSIDE: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: _round(u, v) <= 0.5,
    "square": lambda u, v: np.ones(u.shape, bool),
    "triangle": lambda u, v: np.abs(u - 0.5) <= v / 2,
    "star": _inside_star,
    "cross": lambda u, v: (np.abs(u - 0.5) <= 1 / 6) | (np.abs(v - 0.5) <= 1 / 6),
    "ring": lambda u, v: (_round(u, v) <= 0.5) & (_round(u, v) >= 0.24),
}


def rendered(name: str, side: float, shift: tuple[float, float]) -> np.ndarray:
    """The share of each pixel that an exact shape covers, with two empty pixels around: [height, width]."""
    count = math.ceil(side + max(shift)) + 4
    points = (np.arange(count * _FINE) + 0.5) / _FINE
    u, v = np.meshgrid((points - 2 - shift[0]) / side, (points - 2 - shift[1]) / side)
    inside = INSIDE[name](u, v) & (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    return inside.reshape(count, _FINE, count, _FINE).mean((1, 3))


def blurred(share: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of ``sigma`` pixels."""
    if not sigma:
        return share
    reach = 3
    kernel = np.exp(-np.square(np.arange(-reach, reach + 1) / sigma) / 2)
    kernel /= kernel.sum()
    height, width = share.shape
    padded = np.pad(share, reach)
    down = sum(weight * padded[at : at + height] for at, weight in enumerate(kernel))
    return np.asarray(sum(weight * down[:, at : at + width] for at, weight in enumerate(kernel)))


@functools.lru_cache(maxsize=8)
def _exact(shapes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names, what is measured of them, over its scale, and sides of the exact shapes that things are compared with."""
    names, numbers, sides = [], [], []
    for name in shapes:
        for side in _SIDES:
            for shift in ((0.0, 0.0), (0.5, 0.25), (0.25, 0.5), (0.75, 0.75)):
                for sigma in _BLURS:
                    share = blurred(rendered(name, side, shift), sigma)
                    measured, box = _measure(np.where(share > 0.02, share, 0.0))
                    names.append(name)
                    numbers.append(measured / _SCALES)
                    sides.append(math.sqrt((box[2] - box[0]) * (box[3] - box[1])))
    return np.array(names), np.array(numbers), np.array(sides)
