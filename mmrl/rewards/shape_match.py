"""The same question as ``mmrl.rewards.shapes``, answered by other means: a reward to watch, with which nothing is trained.

A policy that learns what the reader of shapes takes for a star, and not to draw stars, is found out by a scorer that errs in
other places. The paper is the commonest colour of the picture, not the rim's. A pixel is of the colour of the palette (or the
paper) that is nearest to it. Things are told apart by the empty rows and columns between them (recursive XY-cut, Nagy and Seth
1984), not by what is connected. A thing is the shape whose templates, drawn into its box, it overlaps best. And a picture is
right only if it shows what is asked for and nothing else at all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.rewards.geneval_rules import Detected, Rules, judge
from mmrl.rewards.shape_reading import INSIDE, LARGEST, Colour, blurred
from mmrl.rewards.shapes import ReadingConfig, each_scene
from mmrl.transcripts import Transcript

INK = 0.35  # of the way from the paper to a colour, from which a pixel is no paper
OVERLAP = 0.75  # of a thing and its best template (intersection over union), below which it is no shape
_SHRUNK = 0.012  # of the picture: smaller things are specks
_COARSE = 16  # levels of a channel between which the commonest colour is not told apart
_RIM = 1  # pixels around a thing that are looked at as well
_REACH = (-0.25, 0.35)  # pixels by which a shape reaches beyond the box of its ink, at each end,
_SMALL = 20  # where the box has so few pixels a side that it matters
_BLURS = (0.0, 0.8)  # of templates, in pixels
_FINE = 4  # points a side of a pixel of a template
_STRETCH = 1.6  # times wider than high, or higher than wide, which no shape is
_ALL = Rules(threshold=0.0, counting_threshold=0.0)


def match(image: Image.Image, palette: Mapping[str, Colour], shapes: Sequence[str]) -> list[Detected]:
    """The things in a picture (RGB), those that overlap a template best first."""
    shrink = math.ceil(max(image.size) / LARGEST)
    pixels = np.asarray(image.reduce(shrink) if shrink > 1 else image, np.float32)
    paper, colours = _commonest(pixels), np.array(list(palette.values()), np.float32)
    away = np.linalg.norm(pixels - paper, axis=2)
    nearest = (np.square(colours).sum(1) - 2 * (pixels @ colours.T)).argmin(2)
    lengths = np.linalg.norm(colours - paper, axis=1)
    away = np.maximum(away - 1.3 * _noise(away[away < lengths[nearest] / 2]), 0)  # what noise adds everywhere
    ink = _without_specks(away >= INK * lengths[nearest])
    found = []
    for top, bottom, left, right in _cut(ink, 0, 0):
        part, width, height = ink[top:bottom, left:right], right - left, bottom - top
        if part.sum() < max(4.0, _SHRUNK * ink.size) or max(width, height) > _STRETCH * min(width, height):
            continue
        colour = int(np.bincount(nearest[top:bottom, left:right][_core(part)]).argmax())
        around = np.pad(away / max(float(lengths[colour]), 1.0), _RIM)[top : bottom + 2 * _RIM, left : right + 2 * _RIM]
        name, overlap = _template(np.clip(around, 0.0, 1.0), tuple(shapes))
        if overlap >= OVERLAP:
            box = (float(left * shrink), float(top * shrink), float(right * shrink), float(bottom * shrink))
            found.append(Detected(name, box, list(palette)[colour], overlap))
    return sorted(found, key=lambda thing: -thing.score)


def _noise(away: np.ndarray) -> float:
    return float(np.median(away)) if away.size else 0.0


def _commonest(pixels: np.ndarray) -> np.ndarray:
    """The mean of the pixels in the fullest of the cells into which the colours are divided, and around it."""
    coarse = (pixels // _COARSE).astype(np.int64).reshape(-1, 3)
    keys = coarse @ np.array([1, 256 // _COARSE, (256 // _COARSE) ** 2])
    fullest = coarse[keys == np.bincount(keys).argmax()][0]
    alike = (np.abs(coarse - fullest) <= 1).all(1)
    return np.median(pixels.reshape(-1, 3)[alike], axis=0)


def _cut(ink: np.ndarray, top: int, left: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right) without an empty row or column, cut until there is none."""
    rows, columns = _runs(np.any(ink, axis=1)), _runs(np.any(ink, axis=0))
    if len(rows) == 1 and len(columns) == 1:
        (y, bottom), (x, right) = rows[0], columns[0]
        if (y, x, bottom, right) == (0, 0, *ink.shape):
            yield top, top + bottom, left, left + right
            return
    for y, bottom in rows:
        for x, right in columns:
            part = ink[y:bottom, x:right]
            if part.any():
                yield from _cut(part, top + y, left + x)


def _runs(full: Any) -> list[tuple[int, int]]:
    """First and last + 1 of each run of True."""
    ends = np.flatnonzero(np.diff(full.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(ends[::2], ends[1::2], strict=True))


def _core(part: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours are ink as well; all of it where there are none."""
    padded = np.pad(part, 1)
    inner = part & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.any() else part


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """Without the pixels that have none of their eight neighbours: noise that would bridge the empty rows."""
    padded = np.pad(ink, 1).astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return ink & (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] > 1)


def _template(share: np.ndarray, shapes: tuple[str, ...]) -> tuple[str, float]:
    """The best one's name, and how well it overlaps."""
    templates = _templates(shapes, *share.shape)
    thing = share.reshape(-1).astype(np.float32)
    common = np.minimum(templates, thing).sum(1)
    overlaps = common / (templates.sum(1) + thing.sum() - common)
    best = int(overlaps.argmax())
    return shapes[best * len(shapes) // len(overlaps)], float(overlaps[best])


@functools.lru_cache(maxsize=256)
def _templates(shapes: tuple[str, ...], height: int, width: int) -> np.ndarray:
    """How much of each pixel a shape fills that fills a box but for its rim, or a little more or less: [templates, pixels]."""
    reaches = list(itertools.product(_REACH if max(height, width) <= _SMALL else (0.0,), repeat=2))
    across = [_unit(width, *reach) for reach in reaches]
    down = [_unit(height, *reach) for reach in reaches]
    templates = []
    for name, x, y in itertools.product(shapes, across, down):
        u, v = np.meshgrid(x, y)
        inside = INSIDE[name](u, v) & (abs(u - 0.5) <= 0.5) & (abs(v - 0.5) <= 0.5)
        share = inside.reshape(height, _FINE, width, _FINE).mean((1, 3))
        templates += [blurred(share, sigma).reshape(-1) for sigma in _BLURS]
    return np.array(templates, np.float32)


def _unit(pixels: int, before: float, after: float) -> np.ndarray:
    """Points across a box with a rim, as parts of a shape that reaches so far into the rim at both ends."""
    points = (np.arange(pixels * _FINE) + 0.5) / _FINE - _RIM
    return (points + before) / (pixels - 2 * _RIM + before + after)


class ShapeMatch:
    """1 for a scene of shapes that fulfils its prompt and shows nothing else, else 0. See the module.

    failure: why the last score that failed did. terms: the mean number of things that a picture shows.
    """

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config(ReadingConfig):
        """Fields of a ``mmrl.rewards.shape_match:ShapeMatch`` block."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failure: str | None = None
        self.terms: dict[str, float] = {}

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        numbers: list[int] = []

        def score(metadata: Mapping[str, Any], image: Image.Image) -> float:
            things = match(image, self.config.colours, self.config.shapes)
            numbers.append(len(things))
            asked = sum(clause["count"] for clause in metadata["include"])
            return float(judge(metadata, things, _ALL).exact and len(things) == asked)

        scores, failure = each_scene(transcripts, score)
        self.failure = failure or self.failure
        self.terms = {"things": fmean(numbers)} if numbers else {}
        return scores
