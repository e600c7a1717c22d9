"""What all generated questions share: their splits, their random numbers, and what is held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from mmrl.messages import ToolCall
from mmrl.transcripts import Turn

Split = Literal["train", "held_out"]
Said = tuple[str, tuple[ToolCall, ...]]  # what an expert says: text and calls

_WORDS = """
apple bird boat book bread chair clock cloud coin door duck fish flag frog gate glass goat hand hat house key king lamp leaf lion
moon nest owl pear piano plane queen ring road rope rose shoe ship spoon star stone sun table tent tower train tree wheel
wolf zebra
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Drawn:
    """What every block of generated questions is told."""

    split: Split = "train"
    """held_out asks what train never asks: see the class."""
    seed: int = 0
    """Another seed gives other questions for the same task ids; what is held out stays the same."""


def generator_of(config: Drawn, task_id: int) -> random.Random:
    """Random numbers of one question; the same in every process."""
    return random.Random(f"{config.seed}/{config.split}/{task_id}")


def share_of(*parts: object) -> float:
    """A number in [0, 1) that depends on ``parts`` alone, and evenly."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big") / 2**56


def of_split(items: Iterable[str], split: Split, share: float = 0.2) -> tuple[str, ...]:
    """Those of ``items`` that belong to ``split``; about ``share`` of them are held out."""
    return tuple(item for item in items if (share_of(item) < share) == (split == "held_out"))


def succeeded(turns: Iterable[Turn]) -> int:
    """Calls of these turns that did not go wrong."""
    return sum(call.error is None for turn in turns for call in turn.calls)


def pictures_of(turns: Iterable[Turn]) -> int:
    """Pictures that the calls of these turns brought."""
    return sum(len(call.result.pictures) for turn in turns for call in turn.calls)
