"""What an adapter is, and the one that changes nothing.

A checkpoint knows image slots (pi0_base: the scene, the left wrist, the right wrist), a state and an action in conventions of its
own; a simulator has named cameras, its state and its actions. An adapter says how one becomes the other. Training, acting and
bootstrapping all pass through it, and so do the normalisation statistics, which are of what the checkpoint sees. Scoring again
needs none: what a decision records is the checkpoint's side already.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mmrl.errors import MMRLError


class Adapter(Protocol):
    """``state_BS`` is the simulator's, everywhere. Built as ``cls(config)`` from a block of its own in the policy's.

    cameras: the simulator's, for the checkpoint's image slots in order. pi0 tells slots apart by their order alone, and openpi
    masks those without a camera, which equals leaving them out.

    changes: whether the checkpoint's state or actions are other numbers than the simulator's.
    """

    cameras: tuple[str, ...]
    changes: bool

    def state(self, state_BS: Tensor) -> Tensor:
        """The state as the checkpoint takes it, before normalisation: [B, S']."""
        ...

    def to_policy(self, actions_BHA: Tensor, state_BS: Tensor) -> Tensor:
        """The simulator's actions as the checkpoint counts them: [B, H, A']. state_BS: when the chunk begins."""
        ...

    def to_simulator(self, actions_BCA: Tensor, state_BS: Tensor) -> Tensor:
        """The inverse of ``to_policy``."""
        ...

    def example_state(self, size: int, batch: int, generator: torch.Generator) -> Tensor:
        """A state of the simulator from which ``state`` makes ``size`` numbers, for dry runs: [B, S]."""
        ...


class Identity:
    """Everything passes as it is; one camera, ``front``."""

    cameras: tuple[str, ...] = ("front",)
    changes = False

    def state(self, state_BS: Tensor) -> Tensor:
        return state_BS

    def to_policy(self, actions_BHA: Tensor, state_BS: Tensor) -> Tensor:
        return actions_BHA

    def to_simulator(self, actions_BCA: Tensor, state_BS: Tensor) -> Tensor:
        return actions_BCA

    def example_state(self, size: int, batch: int, generator: torch.Generator) -> Tensor:
        return torch.rand(batch, size, generator=generator)


def shifted(actions_BHA: Tensor, state_BS: Tensor, dims: int, sign: int) -> Tensor:
    """The first ``dims`` numbers of every action plus ``sign`` times those of the state at the chunk's beginning.

    sign -1: targets to differences, as openpi's DeltaActions; 1: back, as its AbsoluteActions.
    """
    if dims == 0:
        return actions_BHA
    if dims > min(actions_BHA.shape[2], state_BS.shape[1]):
        numbers = f"{actions_BHA.shape[2]} numbers of an action and {state_BS.shape[1]} of the state"
        raise MMRLError(f"policy.adapter: the first {dims} numbers cannot be relative, where there are {numbers}")
    offset_BH = sign * state_BS[:, None, :dims].to(actions_BHA)
    return torch.cat([actions_BHA[..., :dims] + offset_BH, actions_BHA[..., dims:]], dim=2)
