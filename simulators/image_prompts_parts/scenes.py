"""Scenes of coloured shapes: what can be asked for, what of it is held out, how a prompt says it, and pictures of it.

A scene is asked for by metadata as GenEval's (Ghosh et al. 2023, arXiv 2310.11513): ``tag``, ``include``, ``exclude``. Here every
shape that is asked for is excluded with one more as well, so that a picture full of shapes fulfils nothing.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw

from simulators.prompts_parts import drawing
from simulators.prompts_parts.common import Split, share_of
from simulators.prompts_parts.drawing import Colour

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Box = tuple[float, float, float, float]
Clause = dict[str, Any]

COLOURS = {name: drawing.COLOURS[name] for name in ("red", "green", "blue", "yellow", "purple", "orange", "black")}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
OPPOSITE = {"left of": "right of", "above": "below"}
HELD_OUT = 0.25  # of the combinations of a tag
SCALE = 4  # how much larger a picture is drawn than it is shown, a side
GAP = 0.09  # between two shapes, of the picture's side
RIM = 0.03  # around all of them
# Smallest and largest side of a shape, of the picture's side, by how many there are.
_SIDES = {1: (0.34, 0.6), 2: (0.3, 0.4), 3: (0.3, 0.37), 4: (0.3, 0.37), 5: (0.2, 0.23), 6: (0.2, 0.23)}
_SIDEWAYS = 0.35  # how far two shapes side by side may be shifted the other way, of the way between them


@dataclass(frozen=True)
class Thing:
    """A shape of a scene: its name, its colour by name, and its box in the picture, in pixels."""

    shape: str
    colour: str
    box: Box


# ---------------------------------------------------------------- what is asked


class Vocabulary:
    """What prompts are made of, each combination either trained or held out: the same whatever else a config says.

    Combinations are pairs of shapes (two_object), of number and shape (counting), of colour and shape (colors; color_attr asks
    for two of them), and of two shapes and where they lie (position; "A left of B" and "B right of A" are one). About a quarter
    is held out, in an order that is shuffled once and for all, as long as every part of it is trained in another combination.
    Of single shapes none is.
    """

    def __init__(self, shapes: Sequence[str], colours: Sequence[str], most: int) -> None:
        self.shapes, self.colours = tuple(shapes), tuple(colours)
        self.pairs = _parted("two_object", itertools.combinations(sorted(shapes), 2))
        self.numbers = _parted("counting", itertools.product(range(2, most + 1), sorted(shapes)))
        self.coloured = _parted("colors", itertools.product(sorted(colours), sorted(shapes)))
        ordered = itertools.permutations(sorted(shapes), 2)
        self.places = _parted("position", ((a, where, b) for a, b in ordered for where in OPPOSITE))

    def clauses(self, tag: Tag, split: Split, generator: random.Random) -> list[Clause]:
        """What a prompt asks for. Raises IndexError where the split has nothing of the tag."""
        return _MAKERS[tag](self, split, generator)

    def has(self, tag: Tag, split: Split) -> bool:
        """Whether the split has prompts of the tag."""
        try:
            return bool(self.clauses(tag, split, random.Random(0)))
        except (IndexError, ValueError):
            return False

    def _single(self, split: Split, generator: random.Random) -> list[Clause]:
        return [_clause(generator.choice(self.shapes if split == "train" else ()))]

    def _two(self, split: Split, generator: random.Random) -> list[Clause]:
        names = list(generator.choice(self.pairs[split]))
        generator.shuffle(names)
        return [_clause(name) for name in names]

    def _count(self, split: Split, generator: random.Random) -> list[Clause]:
        number, name = generator.choice(self.numbers[split])
        return [_clause(name, number)]

    def _colour(self, split: Split, generator: random.Random) -> list[Clause]:
        colour, name = generator.choice(self.coloured[split])
        return [_clause(name, color=colour)]

    def _place(self, split: Split, generator: random.Random) -> list[Clause]:
        """As in GenEval, the second clause says where it lies to the first."""
        first, where, second = generator.choice(self.places[split])
        if generator.random() < 0.5:
            first, where, second = second, OPPOSITE[where], first
        return [_clause(second), _clause(first, position=[where, 0])]

    def _two_coloured(self, split: Split, generator: random.Random) -> list[Clause]:
        known = self.coloured[split]
        both = [(one, other) for one, other in itertools.permutations(known, 2) if one[0] != other[0] and one[1] != other[1]]
        return [_clause(name, color=colour) for colour, name in generator.choice(both)]


_MAKERS: dict[Tag, Callable[[Vocabulary, Split, random.Random], list[Clause]]] = {
    "single_object": Vocabulary._single,
    "two_object": Vocabulary._two,
    "counting": Vocabulary._count,
    "colors": Vocabulary._colour,
    "position": Vocabulary._place,
    "color_attr": Vocabulary._two_coloured,
}
TAGS: tuple[Tag, ...] = tuple(_MAKERS)


def _clause(name: str, count: int = 1, **more: Any) -> Clause:
    return {"class": name, "count": count, **more}


def _parted(tag: str, combinations: Iterable[tuple[Hashable, ...]]) -> dict[Split, list[Any]]:
    """The combinations of each split, in order."""
    everything = list(combinations)
    left, held = list(everything), []
    for combination in sorted(everything, key=lambda each: share_of(tag, *each)):
        others = {(at, part) for other in left if other != combination for at, part in enumerate(other)}
        if len(held) < round(HELD_OUT * len(everything)) and all((at, part) in others for at, part in enumerate(combination)):
            left.remove(combination)
            held.append(combination)
    return {"train": left, "held_out": sorted(held)}


def metadata(tag: Tag, include: list[Clause], opening: str) -> dict[str, Any]:
    """A line of GenEval's evaluation_metadata.jsonl."""
    exclude = [{"class": clause["class"], "count": clause["count"] + 1} for clause in include]
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": opening + said(include)}


def said(include: Sequence[Mapping[str, Any]]) -> str:
    """The clauses in words: GenEval's, with numbers written out."""
    if len(include) == 2 and "position" in include[1]:
        return f"{_noun(include[1])} {include[1]['position'][0]} {_noun(include[0])}"
    return " and ".join(map(_noun, include))


def _noun(clause: Mapping[str, Any]) -> str:
    what = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    if clause["count"] == 1:
        return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    return f"{NUMBERS.get(clause['count'], clause['count'])} {what}{'es' if what.endswith('s') else 's'}"


# ---------------------------------------------------------------- what is drawn


def arrange(
    include: Sequence[Mapping[str, Any]], size: int, colours: Mapping[str, Sequence[str]], generator: random.Random
) -> list[Thing]:
    """A scene that fulfils the clauses. colours: of each shape, from which those that are not asked for are taken.

    Raises ValueError where it would take more than six shapes, or two with a position.
    """
    wanted: list[tuple[str, str]] = []
    for clause in include:
        colour = clause.get("color") or generator.choice(colours[clause["class"]])
        wanted += [(clause["class"], colour)] * clause["count"]
    where = next((clause["position"][0] for clause in include if "position" in clause), None)
    if len(wanted) > len(_SIDES) or (where is not None and len(wanted) != 2):
        raise ValueError(f"a scene of {said(include)} cannot be drawn")
    boxes = _anywhere(len(wanted), generator) if where is None else _beside(where, generator)
    scaled = [(left * size, top * size, right * size, bottom * size) for left, top, right, bottom in boxes]
    return [Thing(name, colour, box) for (name, colour), box in zip(wanted, scaled, strict=True)]


def paint(things: Sequence[Thing], size: int, paper: Colour) -> Image.Image:
    """The picture, its edges smoothed."""
    image = Image.new("RGB", (size * SCALE, size * SCALE), paper)
    pen = ImageDraw.Draw(image)
    for thing in things:
        left, top, right, bottom = (edge * SCALE for edge in thing.box)
        _PAINTERS[thing.shape](pen, (left, top, right - 1, bottom - 1), COLOURS[thing.colour], paper)
    return image.reduce(SCALE)


def smallest_side(number: int) -> float:
    """Of the shapes of a scene of ``number``, as a share of the picture's side."""
    return _SIDES[number][0]


def _anywhere(number: int, generator: random.Random) -> list[Box]:
    """Boxes that keep their distance, in a picture of side 1: one or two wherever they fit, more in fields of a grid."""
    low, high = _SIDES[number]
    sides = [generator.uniform(low, high) for _ in range(number)]
    while number <= 2:
        boxes = [_within((RIM, RIM, 1 - RIM, 1 - RIM), side, generator) for side in sides]
        if number == 1 or _gap(*boxes) >= GAP:
            return boxes
    columns = 2 if number <= 4 else 3
    fields = [(column / columns, row / 2, (column + 1) / columns, (row + 1) / 2) for row in range(2) for column in range(columns)]
    rims = [(left + GAP / 2, top + GAP / 2, right - GAP / 2, bottom - GAP / 2) for left, top, right, bottom in fields]
    return [_within(field, side, generator) for field, side in zip(generator.sample(rims, number), sides, strict=True)]


def _beside(where: str, generator: random.Random) -> list[Box]:
    """The box of a first shape, and that of a second which lies ``where`` to it, by a good deal."""
    low, high = _SIDES[2]
    before, after = generator.uniform(low, high), generator.uniform(low, high)  # sides: to the left (above), to the right (below)
    spare = 1 - 2 * RIM - GAP - before - after
    start = generator.uniform(0, spare)
    gap = GAP + generator.uniform(0, spare - start)
    begins = RIM + start, RIM + start + before + gap
    shift = _SIDEWAYS * ((before + after) / 2 + gap)
    centre = generator.uniform(RIM + before / 2, 1 - RIM - before / 2)
    other = generator.uniform(max(RIM + after / 2, centre - shift), min(1 - RIM - after / 2, centre + shift))
    spans = [
        ((begin, begin + side), (across - side / 2, across + side / 2))
        for begin, side, across in zip(begins, (before, after), (centre, other), strict=True)
    ]
    if where in ("above", "below"):
        spans = [(across, along) for along, across in spans]
    boxes = [(x[0], y[0], x[1], y[1]) for x, y in spans]
    return boxes if where in ("right of", "below") else boxes[::-1]


def _within(field: Box, side: float, generator: random.Random) -> Box:
    left, top = generator.uniform(field[0], field[2] - side), generator.uniform(field[1], field[3] - side)
    return left, top, left + side, top + side


def _gap(one: Box, other: Box) -> float:
    """The larger of the gaps between two boxes, across and down; negative where they overlap."""
    across = max(one[0] - other[2], other[0] - one[2])
    return max(across, one[1] - other[3], other[1] - one[3])


def _at(box: Box, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    return [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]


def _spikes() -> list[tuple[float, float]]:
    """The corners of a star, in a box of side 1."""
    spikes, inner = 5, 0.45
    turns = [(math.pi * i / spikes, inner if i % 2 else 1.0) for i in range(2 * spikes)]
    points = [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in turns]
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*points, strict=True))
    return [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in points]


_STAR = _spikes()
_CROSS = [
    (x / 3, y / 3) for x, y in ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
]


def _ring(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, paper: Colour) -> None:
    pen.ellipse(box, fill=colour)
    (left, top), (right, bottom) = _at(box, ((0.26, 0.26), (0.74, 0.74)))
    pen.ellipse((left, top, right, bottom), fill=paper)


_PAINTERS = {
    "circle": lambda pen, box, colour, paper: pen.ellipse(box, fill=colour),
    "square": lambda pen, box, colour, paper: pen.rectangle(box, fill=colour),
    "triangle": lambda pen, box, colour, paper: pen.polygon(_at(box, ((0, 1), (1, 1), (0.5, 0))), fill=colour),
    "star": lambda pen, box, colour, paper: pen.polygon(_at(box, _STAR), fill=colour),
    "cross": lambda pen, box, colour, paper: pen.polygon(_at(box, _CROSS), fill=colour),
    "ring": _ring,
}
