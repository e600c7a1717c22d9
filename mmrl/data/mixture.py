"""Several sources of examples as one, mixed by weight: every example comes from source i with probability w_i / sum w."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.component import Component
from mmrl.protocols import DataContext, ExampleSource
from mmrl.types import Examples, Talks


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Part:
    """One source of a mixture."""

    data: Component
    """The source: another block with a ``target``."""
    weight: float = Field(default=1.0, gt=0)
    """Its share, relative to the other parts' weights."""


class Mixture:
    """See the module."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.data.mixture:Mixture`` block."""

        parts: list[Part] = Field(min_length=1)
        """The sources and their shares."""

    def __init__(self, config: Config, *, context: DataContext) -> None:
        self._sources: list[ExampleSource] = [part.data.build(context=context) for part in config.parts]
        self._weights_P = torch.tensor([part.weight for part in config.parts], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(context.seed)

    def batch(self, size: int) -> Examples | Talks:
        """``size`` examples, part by part (their order within a batch means nothing)."""
        part_B = torch.multinomial(self._weights_P, size, replacement=True, generator=self._generator)
        counts = part_B.bincount(minlength=len(self._sources)).tolist()
        parts: list[Any] = [source.batch(count) for source, count in zip(self._sources, counts, strict=True) if count]
        return parts[0].concat(parts)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The state of each part under its place, and which part comes next."""
        state = {f"{i}.{key}": value for i, source in enumerate(self._sources) for key, value in source.state_dict().items()}
        return {"generator": self._generator.get_state(), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
        for i, source in enumerate(self._sources):
            mine = f"{i}."
            source.load_state_dict({key.removeprefix(mine): value for key, value in state.items() if key.startswith(mine)})
