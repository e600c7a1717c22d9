"""Units that are scored and judged one by one, such as denoising steps, and what of a batch goes forward and back at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from mmrl.batching import micro_batches
from mmrl.types import Batch, Trace


@runtime_checkable
class UnitPolicy(Protocol):
    """Each unit of a decision is scored in a pass of its own, so that some can be asked for and the others left out."""

    by_unit: bool  # whether that costs nothing: no more passes, of no other network either

    def units(self, trace: Trace, piece: slice) -> Trace:
        """The trace of some units of every decision."""
        ...


@runtime_checkable
class UnitAlgorithm(Protocol):
    """A rollout algorithm that may judge units one by one."""

    by_unit: bool  # whether the loss of a batch is the sum of those of its units, of which each reads its own numbers alone


def parts(batch: Batch, policy: Any, algorithm: Any, micro_batch: int | None, together: int) -> Iterator[tuple[slice, Batch]]:
    """Micro-batches and their rows; of one unit each, where policy and algorithm know these one by one.

    So a pass is forgotten before the next one, and memory holds that of one denoising step, not of all.
    """
    apart = isinstance(algorithm, UnitAlgorithm) and algorithm.by_unit and isinstance(policy, UnitPolicy) and policy.by_unit
    for piece in micro_batches(len(batch), micro_batch, together):
        part = batch.map(lambda tensor, piece=piece: tensor[piece])
        trained = part.mask_NK.any(0).nonzero()[:, 0].tolist() if apart else []
        if not trained:
            yield piece, part
        for k in trained:
            yield piece, part.units(slice(k, k + 1), policy.units(part.trace, slice(k, k + 1)))
