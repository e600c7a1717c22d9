"""Prompts to try a policy with."""

from __future__ import annotations

from PIL import Image

from mmrl.messages import Message, Picture
from mmrl.types import Conversation
from policies.diffusion_families.base import Family

_COLOURS, _SHAPES = ("red", "green", "blue"), ("circle", "square", "triangle", "star")


def example_conversations(size: int, family: Family) -> tuple[Conversation, ...]:
    """One message each; with a picture where the model edits."""
    texts = [f"a {_COLOURS[i % 3]} {_SHAPES[i % 4]}" for i in range(size)]
    if not family.edits:
        return tuple((Message("user", (text,)),) for text in texts)
    grey = Image.linear_gradient("L").resize((family.width, family.height))
    return tuple((Message("user", (Picture(grey.rotate(90 * i).convert("RGB")), text)),) for i, text in enumerate(texts))
