"""Supervised fine-tuning: minimise the policy's own imitation loss on examples.

    L = E_(o, a)~data [ policy.supervised_loss(o, a) ]

For a flow policy that loss is flow matching, for a token policy cross-entropy; the policy says which.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.protocols import SupervisedPolicy
from mmrl.types import Examples, Loss, Talks


class SFT:
    """See the module."""

    needs: ClassVar[frozenset[str]] = frozenset({"examples"})

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.algorithms.sft:SFT`` block."""

        batch_size: int = Field(default=128, gt=0)
        """Examples per update."""

    def __init__(self, config: Config) -> None:
        self.batch_size = config.batch_size

    def loss(self, policy: SupervisedPolicy, examples: Examples | Talks, *, share: float, generator: torch.Generator) -> Loss:
        loss = policy.supervised_loss(examples, generator)
        return Loss(loss.value * share, loss.metrics)
