"""What people, models and tools say to one another: messages, pictures, and the promises between a tool and a conversation.

A message is plain: a role, and parts that are text or pictures. Tokens are the policy's affair (see ``mmrl.types``).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from PIL import Image

Role = Literal["system", "user", "assistant", "tool"]
Affine = tuple[float, float, float, float, float, float]
IDENTITY: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class ToolError(Exception):
    """What a tool cannot do, in a sentence for the model. Never ends a run."""


def encodable(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can name but no file, tokenizer or screen can show."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_seen(image: Image.Image) -> Image.Image:
    """``image`` in RGB as a person sees it: on white where it is transparent, as qwen-vl-utils shows it; 16 bits become 8.

    Pillow's own conversion shows what transparent pixels hide, black as a rule, and makes all of a grey of 16 bits white.
    """
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


@dataclass(frozen=True)
class Picture:
    """An image of a conversation, RGB (see ``as_seen``), and where its points lie in the picture it was made from.

    source: the number (from 0, in the order in which the conversation showed them, as calls count them) of the picture it was
    first made from; None: of its own. to_source: (a, b, c, d, e, f) with x_source = a x + b y + c, y_source = d x + e y + f, in
    pixels, of which (0, 0) is the upper left corner of the upper left pixel. A crop of a rotated picture still points into the
    picture that was rotated.
    """

    image: Image.Image
    source: int | None = None
    to_source: Affine = IDENTITY

    def __post_init__(self) -> None:
        if self.image.mode != "RGB":
            object.__setattr__(self, "image", as_seen(self.image))

    @cached_property
    def key(self) -> str:
        """A name for the pixels: equal where size and content are."""
        head = f"{self.image.width}x{self.image.height}:".encode()
        return hashlib.sha256(head + self.image.tobytes()).hexdigest()

    def point_in_source(self, x: float, y: float) -> tuple[float, float]:
        a, b, c, d, e, f = self.to_source
        return a * x + b * y + c, d * x + e * y + f

    def box_in_source(self) -> tuple[float, float, float, float]:
        """The smallest upright box of the source that holds the whole picture: left, top, right, bottom."""
        w, h = self.image.size
        xs, ys = zip(*(self.point_in_source(x, y) for x, y in ((0, 0), (w, 0), (0, h), (w, h))), strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def derived(self, image: Image.Image, to_this: Affine, number: int) -> Picture:
        """A picture made from this one, which is the conversation's ``number``-th; ``to_this`` maps its points into this one."""
        source = number if self.source is None else self.source
        return Picture(image, source, compose(self.to_source, to_this))


def compose(outer: Affine, inner: Affine) -> Affine:
    """The map that applies ``inner`` and then ``outer``."""
    a, b, c, d, e, f = outer
    p, q, r, s, t, u = inner
    return (a * p + b * s, a * q + b * t, a * r + b * u + c, d * p + e * s, d * q + e * t, d * r + e * u + f)


@dataclass(frozen=True)
class ToolSchema:
    """A tool as a model sees it. parameters: a JSON schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def function(self) -> dict[str, Any]:
        """In OpenAI's function format, which chat templates take."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it: the tool's name and its arguments, not yet checked."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: text and pictures for the model, in this order.

    error: the call went wrong, and ``text`` says how. metrics: numbers for the log, never shown to the model. details: what a
    reward may want to know (the ids of the documents that were found, say), never shown to the model either.
    """

    text: str = ""
    pictures: tuple[Picture, ...] = ()
    error: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class ToolContext:
    """What a tool may see of the conversation that calls it: its parameter ``ctx``, which the model does not see.

    pictures: those shown so far, in order; a tool's argument ``image`` is a number from 1. state: the conversation's own, kept
    between calls (a search's last page, a Python session); what has a ``close()`` is closed at the conversation's end.
    generator: random numbers that belong to this call, so that a rollout can be repeated. rewards: (name, value) pairs.
    timeout_s: how long the call may take; whoever waits for something else passes it on.
    """

    pictures: Sequence[Picture] = ()
    state: dict[str, Any] = field(default_factory=dict)
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    timeout_s: float = 10.0
    rewards: list[tuple[str, float]] = field(default_factory=list)

    def picture(self, number: int) -> Picture:
        """The ``number``-th picture, from 1. Raises ToolError with a sentence for the model."""
        if not 1 <= number <= len(self.pictures):
            have = f"images 1 to {len(self.pictures)}" if self.pictures else "no image"
            raise ToolError(f"There is no image {number}; the conversation has {have}.")
        return self.pictures[number - 1]

    def emit_reward(self, name: str, value: float) -> None:
        """A reward for this turn."""
        self.rewards.append((name, value))


@dataclass(frozen=True)
class Message:
    """One message: parts in order. calls: what an assistant's message asks of tools, in training data.

    token_ids: the tokens of a message that a policy has said, which are never made from its text again; empty for any other.
    finish: how a policy's message ended: by itself ("stop"), because it was long enough, or because the conversation was
    ("length"); empty for any other.
    weight: how much each token of an assistant's message counts where the conversation is imitated; with 0 it is only heard.
    """

    role: Role
    parts: tuple[str | Picture, ...]
    calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish: Literal["", "stop", "length"] = ""
    weight: float = 1.0

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if isinstance(part, Picture))
