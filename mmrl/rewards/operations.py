"""Calls of the image tools as names of operations: rotate_90, flip_horizontal, crop; any other tool by its own name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmrl.rewards.evidence import CROP, expected_box, listed
from mmrl.transcripts import CallRecord, Question

_TURNS = ("rotate_", "flip_")


def _rotated(arguments: Mapping[str, Any]) -> str:
    """Clockwise, as ``tools/rotate.py`` turns: 90, -270 and 450 degrees are one operation."""
    degrees = arguments.get("degrees")
    return f"rotate_{degrees % 360:g}" if isinstance(degrees, int | float) else "rotate"


_NAMES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "rotate": _rotated,
    "flip": lambda arguments: f"flip_{arguments.get('direction')}",
}


def operation(call: CallRecord) -> str | None:
    """The name of what a call did; None for one that failed, which did nothing."""
    if call.error is not None:
        return None
    named = _NAMES.get(call.name)
    return call.name if named is None else named(call.arguments)


def turns(name: str) -> bool:
    """Whether an operation turns or mirrors."""
    return name.startswith(_TURNS)


def is_core(name: str) -> bool:
    return name == CROP or turns(name)


def expected(question: Question) -> frozenset[str]:
    """The question's operations, crop among them where it says so, or where all it knows is the box of a detail."""
    crop = set() if expected_box(question) is None else {CROP}
    return frozenset(listed(question, "operations")) | crop
