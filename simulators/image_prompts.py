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

from mmrl.messages import Picture
from mmrl.transcripts import Question, unmarked
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
from simulators.prompts_parts.common import Drawn, generator_of
from simulators.prompts_parts.drawing import pale

__all__ = ["ShapePrompts"]
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
_WHITE = (255, 255, 255)
LEGIBLE = 9.0  # pixels of a shape's side, below which nobody tells a star from a circle


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
