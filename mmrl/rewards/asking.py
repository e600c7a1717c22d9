"""What a reward that asks a judge, or has pictures read, must know of whom it asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

from mmrl.component import Component


def _asks(block: Component) -> Component:
    if not hasattr(block.cls, "ask"):
        raise ValueError(f"{block.target} cannot be asked; name a judge, such as mmrl.rewards.judge:Judge")
    return block


def _reads(block: Component) -> Component:
    if not hasattr(block.cls, "read"):
        raise ValueError(f"{block.target} reads no pictures; use mmrl.rewards.ocr:OCR")
    return block


JudgeBlock = Annotated[Component, AfterValidator(_asks)]
ReaderBlock = Annotated[Component, AfterValidator(_reads)]


def filled(template: str, fields: Mapping[str, str]) -> str:
    """``template`` with each {name} replaced; other braces, and those in what is filled in, stay as they are.

    >>> filled("{a} and {b}: {x}", {"a": "{b}", "b": "B"})
    '{b} and B: {x}'
    """
    return re.sub(r"\{(\w+)\}", lambda field: fields.get(field[1], field[0]), template)
