"""What tools and rewards promise; ``mmrl.protocols``, where all promises are, has them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from mmrl.transcripts import Transcript


class Tool(Protocol):
    """A typed function offered to a model; its schema comes from its hints and docstring."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class Reward(Protocol):
    """Scores conversations. Built as ``cls(config)``.

    It may have a ``failure``, a sentence that says why the last score that failed did, and ``terms``, name -> mean of what its
    last scores were made of, for the log. One that can work apart has a ``begin(transcripts)``, which returns at once with the
    function that waits for the scores, as ``mmrl.rewards.apart:Workers`` does.
    """

    def __call__(self, transcripts: Sequence[Transcript], /) -> Sequence[float]:
        """A score for each conversation of a rollout; those of one task_id are a group. NaN: scoring failed, never a silent 0."""
        ...


@runtime_checkable
class AsyncReward(Reward, Protocol):
    """A reward that can score in the background, while a policy makes more."""

    def begin(self, transcripts: Sequence[Transcript], /) -> Callable[[], Sequence[float]]:
        """Returns at once, with the function that waits for what ``__call__`` would have given."""
        ...


@runtime_checkable
class TurnReward(Protocol):
    """Scores the turns of conversations. Built as ``cls(config)``, and with what else a Reward may have."""

    def per_turn(self, transcripts: Sequence[Transcript], /) -> Sequence[Sequence[float]]:
        """A score for each turn of each conversation; a NaN among them means that scoring this conversation failed."""
        ...
