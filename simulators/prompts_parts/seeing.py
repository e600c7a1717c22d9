"""Questions about one picture that need no tool: what it shows, and how many of what."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

from mmrl.answers import Choice, Number
from mmrl.messages import Picture
from mmrl.transcripts import Question
from simulators.prompts_parts.common import Split
from simulators.prompts_parts.drawing import COLOURS, SHAPES, pale, shape

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_THINKING = " First think in <think> </think>, then answer."  # CLS-RL's two instructions (Li et al. 2025), shorter
_DIRECT = " Answer at once."
_GRID = 4  # fields a side in a picture of things to count


def classification(config: Any, images: Mapping[str, Sequence[Image.Image]], generator: random.Random) -> Question:
    """A question of ``simulators.prompts:ClassificationQuestions``. images: of the split, by class."""
    name = generator.choice(list(images))
    image = generator.choice(images[name])
    others = generator.sample([other for other in images if other != name], config.options - 1)
    options = [name, *others]
    generator.shuffle(options)
    asked = f"What is this: {', '.join(options)}?"
    return Question(
        f"classification_{config.data}",
        (Picture(image), asked + (_THINKING if config.thinking else _DIRECT)),
        (name,),
        Choice((name,), tuple(options)),
    )


def drawn_examples(classes: Sequence[str], size: int, split: Split, shots: int, seed: int) -> dict[str, list[Image.Image]]:
    """``shots`` pictures of each class for training; as many again, and at least 50, that are held out."""
    examples: dict[str, list[Image.Image]] = {}
    for name in classes:
        generator = random.Random(f"{name}/{split}/{seed if split == 'train' else 'any'}")
        examples[name] = [_one_shape(generator, name, size) for _ in range(shots if split == "train" else max(50, shots))]
    return examples


def _one_shape(generator: random.Random, name: str, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), pale(generator))
    side = generator.uniform(0.35, 0.7) * size
    left, top = generator.uniform(0, size - side), generator.uniform(0, size - side)
    shape(ImageDraw.Draw(image), name, (left, top, left + side, top + side), generator.choice(list(COLOURS.values())))
    return image


# ---------------------------------------------------------------- counting

Thing = tuple[str, str]  # colour, shape


def things(split: Split) -> list[Thing]:
    """What a split asks about: every fourth pair of colour and shape is held out."""
    pairs = [(colour, name) for colour in COLOURS for name in SHAPES]
    ranked = [(colour, name, place // len(SHAPES) + 2 * (place % len(SHAPES))) for place, (colour, name) in enumerate(pairs)]
    return [(colour, name) for colour, name, rank in ranked if (rank % 4 == 0) == (split == "held_out")]


def counting(config: Any, generator: random.Random) -> Question:
    """A question of ``simulators.prompts:CountingQuestions``: how many there are, or of which there are more."""
    family = generator.choice(config.families)
    first, second = generator.sample(things(config.split), 2)
    if family == "count":
        counts = {first: generator.randint(1, config.most)}
        asked, answer = f"How many {_plural(first)} are there?", str(counts[first])
        check: Any = Number((answer,))
    else:
        many = generator.randint(2, config.most)
        few = generator.randint(1, many - 1)
        counts = {first: many, second: few}
        options = [first, second]
        generator.shuffle(options)
        asked, answer = f"Which are more, {_plural(options[0])} or {_plural(options[1])}?", _plural(first)
        check = Choice((answer,), tuple(map(_plural, options)))
    rest = [(colour, name) for colour in COLOURS for name in SHAPES if (colour, name) not in (first, second)]
    shown = [thing for thing, count in counts.items() for _ in range(count)]
    shown += generator.choices(rest, k=generator.randint(*config.others))
    details = {"counts": {" ".join(thing): count for thing, count in counts.items()}}
    return Question(f"counting_{family}", (Picture(_scatter(generator, shown, config.size)), asked), (answer,), check, details)


def _plural(thing: Thing) -> str:
    colour, name = thing
    return f"{colour} {name}{'es' if name.endswith('s') else 's'}"


def _scatter(generator: random.Random, shown: Sequence[Thing], size: int) -> Image.Image:
    """Each thing in a field of its own."""
    image = Image.new("RGB", (size, size), pale(generator))
    pen, step = ImageDraw.Draw(image), size / _GRID
    for place, (colour, name) in zip(generator.sample(range(_GRID**2), len(shown)), shown, strict=True):
        side = generator.uniform(0.55, 0.8) * step
        left = (place % _GRID) * step + generator.uniform(0.05, 0.95) * (step - side)
        top = (place // _GRID) * step + generator.uniform(0.05, 0.95) * (step - side)
        shape(pen, name, (left, top, left + side, top + side), COLOURS[colour])
    return image


FIELDS = _GRID**2
