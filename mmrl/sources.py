"""What sources of data and keepers of it promise; ``mmrl.protocols``, where all promises are, has them too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mmrl.types import Episode, Examples, Talks


@runtime_checkable
class ExampleSource(Protocol):
    """Gives supervised examples. Built as ``cls(config, context=DataContext)``."""

    def batch(self, size: int) -> Examples | Talks:
        """The next ``size`` examples; the order depends on the seed and the cursor alone."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """The cursor, as tensors, such that a resumed run draws what an unbroken run would have drawn."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...


Advance = Callable[[int], None]  # told how many more pieces of a long work are done


@runtime_checkable
class StatisticsSource(Protocol):
    """A data source that can say how its states and actions are distributed."""

    def __len__(self) -> int:
        """Frames."""
        ...

    def statistics(self, advance: Advance) -> Mapping[str, Sequence[float]]:
        """``state_mean``, ``state_std``, ``state_q01``, ``state_q99``, ``state_min``, ``state_max`` and the same of ``actions``.

        Each is a list of a number per dimension. std is the unbiased one, and 1 for a dimension that never changes. A set without
        states has no entries for them. ``advance`` is told of the frames as they are read; every frame is read twice.
        """
        ...


class EpisodeSink(Protocol):
    """Keeps recorded episodes as a data set. Built as ``cls(config, folder, name=...)``; name: of what was recorded.

    ``folder`` appears, whole, when ``finish`` is called; leaving the context without that removes everything.
    """

    def __enter__(self) -> EpisodeSink: ...

    def __exit__(self, *failure: object) -> None: ...

    def add(self, episode: Episode) -> None: ...

    def finish(self) -> None: ...
