"""Prompts for image generators: scenes of shapes and signs with words, which are also drawn, and prompt files as published.

Each class keeps ``mmrl.transcripts.Questions``; those that draw also ``DrawingQuestions``. A task id and the config determine a
prompt, in any process, and a prompt and a generator the picture. What is held out, training never asks. What rewards need to know
is in a question's details: ``prompt``, ``tag``, ``include`` and ``exclude`` as in GenEval's metadata, ``words``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.errors import DataError
from mmrl.messages import Picture
from mmrl.transcripts import Question, unmarked
from simulators.image_prompts_parts import files, signs
from simulators.image_prompts_parts.scenes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    TAGS,
    Tag,
    Vocabulary,
    arrange,
    metadata,
    paint,
    smallest_side,
)
from simulators.prompts_parts.common import Drawn, Split, generator_of, of_split
from simulators.prompts_parts.drawing import pale

__all__ = ["GenEvalPrompts", "OcrPrompts", "PicturePrompts", "ShapePrompts", "WordPrompts"]
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_WHITE = (255, 255, 255)
LEGIBLE = 9.0  # pixels of a shape's side, below which nobody tells a star from a circle
NARROWEST = 9  # pixels of a letter of a sign


def _known(key: str, values: tuple[str, ...], known: Any) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values or len(set(values)) != len(values):
        raise ValueError(f"{key} must be distinct names out of {', '.join(known)}; got {list(values)}")


class ShapePrompts:
    """Scenes of coloured shapes, asked for as GenEval asks for things (Ghosh et al. 2023): six tags, its metadata.

    Held out is about a quarter of what each tag can combine (``image_prompts_parts.scenes.Vocabulary``); of single shapes nothing
    is, so that ``held_out`` has five tags. A picture shows what is asked for and nothing else; a shape whose colour is not asked
    for has one that training asks for.
    """

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.image_prompts:ShapePrompts`` block."""

        tags: tuple[Tag, ...] = TAGS
        """What is asked for, equally often: single_object, two_object, counting, colors, position, color_attr."""
        shapes: tuple[str, ...] = ("circle", "square", "triangle", "star")
        """Shapes, of circle, square, triangle, star, cross, ring."""
        colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
        """Colours, of red, green, blue, yellow, purple, orange, black."""
        most: int = Field(default=4, ge=2, le=max(NUMBERS))
        """Largest number of shapes that is asked for."""
        size: int = Field(default=32, ge=16)
        """Side of the picture, in pixels."""
        background: Literal["white", "pale"] = "white"
        """Of the pictures that are drawn: white, or a light colour, another one each."""
        opening: str = "a picture of "
        """How a prompt begins."""

        @model_validator(mode="after")
        def _possible(self) -> ShapePrompts.Config:
            _known("tags", self.tags, TAGS)
            _known("shapes", self.shapes, SHAPES)
            _known("colours", self.colours, COLOURS)
            if len(self.shapes) < 2 or len(self.colours) < 2:
                raise ValueError(f"shapes and colours must be two at least; got {list(self.shapes)} and {list(self.colours)}")
            side = smallest_side(self.most if "counting" in self.tags else 2) * self.size
            if side < LEGIBLE:
                raise ValueError(f"most {self.most} makes shapes {side:.1f} pixels wide, too small; raise size or lower most")
            vocabulary = Vocabulary(self.shapes, self.colours, self.most)
            if not any(vocabulary.has(tag, self.split) for tag in self.tags):
                raise ValueError(f"tags {list(self.tags)} have nothing in split '{self.split}'; add tags, shapes or colours")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.vocabulary = Vocabulary(config.shapes, config.colours, config.most)
        self._tags: list[Tag] = [tag for tag in config.tags if self.vocabulary.has(tag, config.split)]
        self._colours = {
            name: [colour for colour, of in self.vocabulary.coloured["train"] if of == name] for name in config.shapes
        }

    def question(self, task_id: int) -> Question:
        generator = generator_of(self.config, task_id)
        tag = generator.choice(self._tags)
        about = metadata(tag, self.vocabulary.clauses(tag, self.config.split, generator), self.config.opening)
        return _question(tag, about)

    def draw(self, question: Question, generator: random.Random) -> Picture:
        things = arrange(question.details["include"], self.config.size, self._colours, generator)
        paper = pale(generator) if self.config.background == "pale" else _WHITE
        return Picture(paint(things, self.config.size, paper))


def _question(family: str, details: Mapping[str, Any]) -> Question:
    return Question(family, (details["prompt"],), (), unmarked, details)


class WordPrompts:
    """Signs with a short word: a sign that says "CAT". Held out are words, about a fifth of them."""

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(Drawn):
        """Fields of a ``simulators.image_prompts:WordPrompts`` block."""

        longest: int = Field(default=4, ge=3, le=6)
        """Letters of a word at most; the shortest have three."""
        words: tuple[str, ...] | None = None
        """Words to ask for instead of the list's; all of them, in either split."""
        width: int = Field(default=64, ge=16)
        """Of the picture, in pixels."""
        height: int = Field(default=32, ge=12)
        """Of the picture, in pixels."""
        background: Literal["white", "pale"] = "white"
        """Of the pictures that are drawn: white with black letters, or a light colour, with dark letters."""
        opening: str = "a sign that says "
        """What a prompt says before the word, which stands in double quotes."""

        @model_validator(mode="after")
        def _possible(self) -> WordPrompts.Config:
            letters = max(map(len, self.words)) if self.words else self.longest
            if self.words is not None and not all(word.strip() and '"' not in word for word in self.words):
                raise ValueError(f"words must be texts without double quotes; got {list(self.words)}")
            if self.width < NARROWEST * letters:
                raise ValueError(f"width {self.width} is too little for {letters} letters; make it {NARROWEST * letters} or more")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.words = config.words or of_split(signs.words(config.longest), config.split)

    def question(self, task_id: int) -> Question:
        word = generator_of(self.config, task_id).choice(self.words)
        return _question("words", {"prompt": f'{self.config.opening}"{word}"', "tag": "words", "words": (word,)})

    def draw(self, question: Question, generator: random.Random) -> Picture:
        size, plain = (self.config.width, self.config.height), self.config.background == "white"
        return Picture(signs.paint(question.details["words"][0], size, plain, generator))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class FileConfig:
    """Fields of every block that reads a file of prompts."""

    path: str
    """The file."""
    split: Split = "train"
    """Which lines."""
    held_out_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the lines that are held out, by a hash of what each says; 0 where another file is held out."""
    seed: int = 0
    """Another seed holds out other lines."""


class _Lines:
    """A file's prompts: a task id counts round through the split's lines, in the file's order.

    Raises ConfigError or DataError, naming file, line and key.
    """

    def __init__(self, config: FileConfig, parse: Any) -> None:
        self.config = config
        lines = files.read(config.path, parse, config.seed)
        if not lines:
            raise DataError(f"{config.path}: has no prompts; set 'path' to a file with a prompt a line")
        self._lines = [line for line in lines if (line.share < config.held_out_share) == (config.split == "held_out")]
        if not self._lines:
            raise DataError(
                f"{config.path}: none of its {len(lines)} lines is of split '{config.split}'; change held_out_share or seed"
            )

    def __len__(self) -> int:
        return len(self._lines)

    def question(self, task_id: int) -> Question:
        return self._lines[task_id % len(self._lines)].question()


class GenEvalPrompts(_Lines):
    """GenEval's evaluation_metadata.jsonl, or another file of its form; see ``image_prompts_parts/files.py``."""

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(FileConfig):
        """Fields of a ``simulators.image_prompts:GenEvalPrompts`` block."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, files.geneval)


class OcrPrompts(_Lines):
    """A text file with a prompt a line, in which what is to be read stands in double quotes, as Flow-GRPO's OCR set is."""

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(FileConfig):
        """Fields of a ``simulators.image_prompts:OcrPrompts`` block."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, files.quoted)


class PicturePrompts(_Lines):
    """A JSONL file of prompts, with metadata and, for editing, pictures; see ``image_prompts_parts/files.py``."""

    @dataclass(frozen=True, kw_only=True, config=_STRICT)
    class Config(FileConfig):
        """Fields of a ``simulators.image_prompts:PicturePrompts`` block."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, files.pictured)
