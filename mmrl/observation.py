"""What an environment shows and accepts: frozen, and shape-checked once. mmrl.types, where the letters are, has them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.columns import Column
from mmrl.messages import Message

Conversation = tuple[Message, ...]  # append-only: what was said stands as it is


class ShapeError(ValueError):
    """A tensor does not have the shape its name promises."""


def expect(owner: str, name: str, value: Tensor | Column, *shape: int | None) -> None:
    """Raise ShapeError unless ``value.shape`` starts with ``shape`` (None matches anything) and has no fewer axes."""
    actual = tuple(value.shape)
    wanted = len(actual) >= len(shape) and all(w is None or w == a for w, a in zip(shape, actual, strict=False))
    if not wanted:
        raise ShapeError(f"{owner}.{name} has shape {actual}, expected {shape} (None: any size)")


@dataclass(frozen=True)
class ActionSpec:
    """What an environment accepts: ``dim`` numbers between ``low`` and ``high`` (one bound per dimension).

    discrete: the numbers are choices, whole ones from ``low`` to ``high``, both included; they travel as floats all the same.
    """

    dim: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    discrete: bool = False

    def __post_init__(self) -> None:
        if len(self.low) != self.dim or len(self.high) != self.dim:
            raise ShapeError(f"ActionSpec has dim {self.dim} but {len(self.low)} lower and {len(self.high)} upper bounds")
        if self.discrete and not all(float(bound).is_integer() for bound in (*self.low, *self.high)):
            raise ShapeError(f"ActionSpec is discrete, so its bounds must be whole numbers; got {self.low} and {self.high}")


@dataclass(frozen=True)
class Observation:
    """What B environments show at one moment.

    images: camera name -> uint8 [B, height, width, 3]. state: float32 [B, S] or None. instructions: B sentences.
    elapsed_B: int64, decisions made so far in the episode; None where nobody counts (in demonstrations, say).
    conversations: B conversations, in which the next message is the policy's; None where nobody talks.
    anchors_B: int64, a key of the state each environment is in, so that equal keys in episodes of one task are equal states (a
    hash of the state, say); None where the environment gives none. Policies do not see it; credit by state needs it (GiGPO).

    >>> import torch
    >>> o = Observation({"front": torch.zeros(2, 64, 64, 3, dtype=torch.uint8)}, torch.zeros(2, 4), ("reach red", "push blue"))
    >>> o.select(torch.tensor([1])).instructions
    ('push blue',)
    """

    images: Mapping[str, Tensor]
    state: Tensor | None
    instructions: tuple[str, ...]
    elapsed_B: Tensor | None = None
    conversations: tuple[Conversation, ...] | None = None
    anchors_B: Tensor | None = None

    def __post_init__(self) -> None:
        b = len(self.instructions)
        if self.conversations is not None and len(self.conversations) != b:
            raise ShapeError(f"Observation has {b} instructions and {len(self.conversations)} conversations")
        for camera, image in self.images.items():
            expect("Observation", f"images[{camera!r}]", image, b, None, None, 3)
            if image.dtype != torch.uint8:
                raise ShapeError(f"Observation.images[{camera!r}] is {image.dtype}, expected torch.uint8")
        if self.state is not None:
            expect("Observation", "state", self.state, b, None)
        if self.elapsed_B is not None:
            expect("Observation", "elapsed_B", self.elapsed_B, b)
        if self.anchors_B is not None:
            expect("Observation", "anchors_B", self.anchors_B, b)

    @property
    def batch_size(self) -> int:
        return len(self.instructions)

    def select(self, index_N: Tensor) -> Observation:
        """The rows ``index_N`` (int64 [N]), in that order."""
        return Observation(
            {name: image[index_N] for name, image in self.images.items()},
            None if self.state is None else self.state[index_N],
            tuple(self.instructions[i] for i in index_N.tolist()),
            None if self.elapsed_B is None else self.elapsed_B[index_N],
            None if self.conversations is None else tuple(self.conversations[i] for i in index_N.tolist()),
            None if self.anchors_B is None else self.anchors_B[index_N],
        )

    def to(self, device: torch.device) -> Observation:
        return Observation(
            {name: image.to(device) for name, image in self.images.items()},
            None if self.state is None else self.state.to(device),
            self.instructions,
            None if self.elapsed_B is None else self.elapsed_B.to(device),
            self.conversations,
            None if self.anchors_B is None else self.anchors_B.to(device),
        )

    @staticmethod
    def concat(parts: Sequence[Observation]) -> Observation:
        """Stack along the batch axis; all parts share cameras and state size, and all count decisions or none does."""
        return Observation(
            {name: torch.cat([p.images[name] for p in parts]) for name in parts[0].images},
            None if parts[0].state is None else torch.cat([p.state for p in parts if p.state is not None]),
            tuple(sentence for p in parts for sentence in p.instructions),
            None if parts[0].elapsed_B is None else torch.cat([p.elapsed_B for p in parts if p.elapsed_B is not None]),
            None if parts[0].conversations is None else tuple(c for p in parts for c in p.conversations or ()),
            None if parts[0].anchors_B is None else torch.cat([p.anchors_B for p in parts if p.anchors_B is not None]),
        )
