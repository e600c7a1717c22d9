"""Questions about one picture that must be turned, cropped, or both: how they are made, and how an expert answers them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image, ImageDraw

from mmrl.answers import Choice, Normalised
from mmrl.messages import Picture, ToolCall
from mmrl.registry import resolve
from mmrl.transcripts import Question, Turn
from simulators.prompts_parts.common import WORDS, Said, Split, of_split, pictures_of, succeeded
from simulators.prompts_parts.drawing import COLOURS, Box, plain, sign, texture, turning_letters, writing
from simulators.prompts_parts.turning import TURNINGS, box_before, undo

Background = Literal["plain", "texture", "photograph"]
Kind = Literal["digit", "letter", "colour", "number", "word"]
Where = Literal["words", "cell", "box", "spot"]

LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without those that look like digits
_VALUES: dict[str, tuple[str, ...]] = {
    "digit": tuple("0123456789"),
    "letter": tuple(LETTERS),
    "colour": tuple(COLOURS),
    "number": tuple(str(number) for number in range(100, 1000)),
    "word": WORDS,
}
WIDER = {"number": 1.7, "word": 2.4}  # than high; other signs are square
_ALONE = ("number", "word")  # kinds of which values are held out, and not pairs of value and place
PLACES = {
    1: ("centre",),  # a sign that is anywhere is not asked about by its place
    2: ("upper left", "upper right", "lower left", "lower right"),
    3: tuple(" ".join((row, column)) for row in ("upper", "middle", "lower") for column in ("left", "centre", "right")),
}
INKS = ("red", "green", "blue", "purple", "black")  # that show on light paper
_NOTHING = "nothing"


def painter(background: Background, split: Split, standing: bool = False) -> Callable[[random.Random, int], Image.Image]:
    """What paints a square background. Raises EnvironmentMissing where photographs need a package that is not there."""
    if background == "photograph":
        photographs: Any = resolve("simulators.prompts_parts.photographs:Photographs")
        return photographs(split, standing).part
    return {"plain": plain, "texture": texture}[background]


def cell(place: int, grid: int, size: int) -> Box:
    """The ``place``-th field, row by row, of a picture that ``grid`` x ``grid`` fields divide."""
    row, column = divmod(place, grid)
    return column * size // grid, row * size // grid, (column + 1) * size // grid, (row + 1) * size // grid


def allowed(kind: str, place: int, split: Split) -> tuple[str, ...]:
    """What a sign at ``place`` may show so that its question belongs to ``split``; never empty, and each split's own."""
    if kind in _ALONE:
        return of_split(_VALUES[kind], split)
    return tuple(value for rank, value in enumerate(_VALUES[kind]) if ((rank + 2 * place) % 5 == 0) == (split == "held_out"))


_allowed = functools.cache(allowed)


def detail(config: Any, paint: Callable[[random.Random, int], Image.Image], generator: random.Random) -> Question:
    """A question of ``simulators.prompts:DetailQuestions``."""
    kind = generator.choice(config.kinds)
    cells = generator.sample(range(config.grid**2), generator.randint(*config.signs))
    answer = generator.choice(_VALUES[kind] if config.grid == 1 else _allowed(kind, cells[0], config.split))
    values = [answer, *generator.choices([value for value in _VALUES[kind] if value != answer], k=len(cells) - 1)]
    spots = generator.sample(list(COLOURS), len(cells)) if config.where == "spot" else []
    image = paint(generator, config.size)
    operation = generator.choice(config.turned) if config.turned else None
    if operation is not None:
        mark_top(image)
    areas = [cell(place, config.grid, config.size) for place in cells]
    boxes = [
        _put(generator, image, config, kind, value, area, spot)
        for value, area, spot in zip(values, areas, spots or [None] * len(areas), strict=True)
    ]
    area = _around(boxes[0], image.size) if config.where == "box" else areas[0]
    wanted = {
        "words": lambda: f"at the {PLACES[config.grid][cells[0]]}",
        "cell": lambda: f"in {list(area)}",
        "box": lambda: f"in {list(area)}",
        "spot": lambda: f"near the {spots[0]} spot",
    }[config.where]()
    wanted, cropped = (f" {wanted}", ("crop",)) if config.grid > 1 else ("", ())
    top = " The bar marks the top." if operation else ""
    shown = image if operation is None else undo(operation, image)
    evidence = boxes[0] if operation is None else box_before(operation, boxes[0], image.size)
    return Question(
        f"detail_{kind}",
        (Picture(shown), f"What {kind} is on the sign{wanted}?{top}"),
        (answer,),
        Normalised((answer,)),
        {
            "operations": (*((operation,) if operation else ()), *cropped),
            "box": evidence,
            "area": area,
            "enlarge": config.enlarge,
            "place": cells[0],
        },
    )


def _put(generator: random.Random, image: Image.Image, config: Any, kind: str, value: str, area: Box, spot: str | None) -> Box:
    """Paste a sign anywhere in ``area``, beside a spot of the colour named ``spot`` if there is one; where it lies."""
    height = generator.randint(*config.sign)
    width = round(height * WIDER.get(kind, 1))
    left, top, right, bottom = area
    if spot is not None:  # the sign lies in one half, the spot in the other
        middle, across = (top + bottom) // 2, (right - left) // 4
        sign_below = generator.random() < 0.5
        x = generator.randint(left + across, right - across)
        y = (top + middle) // 2 if sign_below else (middle + bottom) // 2
        ImageDraw.Draw(image).ellipse((x - across // 2, y - across // 2, x + across // 2, y + across // 2), fill=COLOURS[spot])
        top, bottom = (middle + 1, bottom) if sign_below else (top, middle - 1)
    x, y = generator.randint(left, right - width), generator.randint(top, bottom - height)
    image.paste(sign(generator, kind, value, (width, height), config.blotches if config.fading else None), (x, y))
    return x, y, x + width, y + height


def _around(box: Box, size: tuple[int, int]) -> Box:
    """``box`` and half its height on each side, within the picture."""
    left, top, right, bottom = box
    more = (bottom - top) // 2
    return max(0, left - more), max(0, top - more), min(size[0], right + more), min(size[1], bottom + more)


def mark_top(image: Image.Image) -> None:
    """Draw a bar along the top, whose left end is red: it tells every way to turn and mirror the picture from every other."""
    width, high = image.width, max(4, image.height // 12)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, width - 1, high - 1), fill=(0, 0, 0))
    pen.rectangle((0, 0, width // 3 - 1, high - 1), fill=COLOURS["red"])


# ---------------------------------------------------------------- orientation


def orientation(config: Any, paint: dict[str, Callable[[random.Random, int], Image.Image]], generator: random.Random) -> Question:
    """A question of ``simulators.prompts:OrientationQuestions``. paint: for each kind of it."""
    kind = generator.choice(config.kinds)
    operation = None if generator.random() < config.upright else generator.choice(_operations(kind, config.operations))
    image = paint[kind](generator, config.size)
    if kind == "photograph":
        options = [*(TURNINGS[name].words for name in _operations(kind, config.operations)), _NOTHING]
        answer, ink = (_NOTHING if operation is None else TURNINGS[operation].words), None
        asked = f"What makes this picture upright: {', '.join(options)}?"
        check: Any = Choice((answer,), tuple(options))
    else:
        answer = generator.choice(of_split(WORDS, config.split) if kind == "word" else config.letters)
        inks = INKS if kind == "word" else turned_inks(config.letters.index(answer), operation, config)
        ink = generator.choice(inks)
        _write(generator, image, kind, answer, ink)
        asked = f"What {kind} is this? The bar marks the top."
        check = Normalised((answer,))
    shown = image if operation is None else undo(operation, image)
    details = {"operations": (operation,) if operation else (), "box": (0, 0, *shown.size), "ink": ink}
    return Question(f"orientation_{kind}", (Picture(shown), asked), (answer,), check, details)


def _operations(kind: str, operations: Sequence[str]) -> tuple[str, ...]:
    """Those that a kind can have: nobody sees whether a photograph is mirrored."""
    return tuple(name for name in operations if kind != "photograph" or TURNINGS[name].tool == "rotate")


def turned_inks(rank: int, operation: str | None, config: Any) -> tuple[str, ...]:
    """Inks of the ``rank``-th letter in a picture that ``operation`` makes upright, so that its question belongs to the split.

    A letter is held out by its ink: were it by letter and operation alone, whoever sees the operation could rule the letter out.
    """
    turn = 0 if operation is None else 1 + list(config.operations).index(operation)
    held_out = config.split == "held_out"
    return tuple(name for number, name in enumerate(INKS) if ((rank + turn + number) % len(INKS) == 0) == held_out)


def _write(generator: random.Random, image: Image.Image, kind: str, value: str, ink: str) -> None:
    side = image.width
    mask = turning_letters(side // 2)[value] if kind == "letter" else writing(value, round(side * 0.8), round(side * 0.4))
    free = side // 12
    x = (side - mask.width) // 2 + generator.randint(-free, free)
    y = (side - mask.height) // 2 + generator.randint(0, free)
    image.paste(Image.new("RGB", mask.size, COLOURS[ink]), (x, y), mask)
    mark_top(image)


# ---------------------------------------------------------------- the expert

_CROP_THOUGHT, _TURN_THOUGHT = "I look closer.", "I turn it."


def picture_turn(question: Question, turns: tuple[Turn, ...]) -> Said:
    """What an expert says: one operation of the question's details after the other, each on the newest picture, then the answer.

    A call that went wrong is said again.
    """
    operations, done = question.details["operations"], succeeded(turns)
    if done >= len(operations):
        return question.references[0], ()
    newest = sum(isinstance(part, Picture) for part in question.parts) + pictures_of(turns)
    if operations[done] == "crop":
        arguments: dict[str, Any] = {"image": newest, "box": list(question.details["area"])}
        enlarge = question.details["enlarge"]
        return _CROP_THOUGHT, (ToolCall("crop", arguments if enlarge == 1 else {**arguments, "enlarge": enlarge}),)
    turning = TURNINGS[operations[done]]
    return _TURN_THOUGHT, (ToolCall(turning.tool, {"image": newest, **turning.arguments}),)
