"""From a rollout to mini-batches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmrl.protocols import Advantages, LikelihoodPolicy
from mmrl.types import Batch, Rollout, gather


def make_batch(rollout: Rollout, advantages: Advantages, policy: LikelihoodPolicy) -> Batch:
    """The decisions the algorithm keeps, as samples of the policy's making; samples without any are left out."""
    packing = policy.pack(rollout)

    def of_decisions(x_TB: Tensor) -> Tensor:
        return gather(x_TB, packing.index_NJ)

    def of_units(x_TBK: Tensor | None) -> Tensor | None:
        """Of anything [T, B, K, ...]: [N, J K, ...]."""
        return None if x_TBK is None else of_decisions(x_TBK).flatten(1, 2)

    returns_TBV = torch.zeros_like(rollout.values_TBV) if advantages.returns_TBV is None else advantages.returns_TBV
    kept_NJ = of_decisions(advantages.keep_TB & rollout.valid_TB)
    batch = Batch(
        trace=packing.trace,
        old_log_probs_NK=of_decisions(rollout.log_probs_TBK).flatten(1),
        mask_NK=(of_decisions(rollout.mask_TBK) & kept_NJ[..., None]).flatten(1),
        advantages_NJ=of_decisions(advantages.advantages_TB),
        returns_NV=of_decisions(returns_TBV).flatten(1),
        old_values_NV=of_decisions(rollout.values_TBV).flatten(1),
        reference_log_probs_NK=of_units(rollout.reference_log_probs_TBK),
        unit_advantages_NK=of_units(advantages.units_TBK),
        engine_log_probs_NK=of_units(rollout.engine_log_probs_TBK),
        old_means_NKD=of_units(rollout.means_TBKD),
        reference_means_NKD=of_units(rollout.reference_means_TBKD),
    )
    keep_N = kept_NJ.any(1)
    return batch if bool(keep_N.all()) else batch.select(keep_N)


def minibatch_indices(size: int, count: int, generator: torch.Generator, together: int = 1) -> Iterator[Tensor]:
    """A fresh permutation of ``range(size)`` in ``count`` nearly equal parts (fewer where there are too few rows).

    together: how many consecutive rows stay so, such as the two of a pair; it divides ``size``.
    """
    order = torch.randperm(size // together, generator=generator, device=generator.device)
    for part in order.tensor_split(min(count, len(order))) if size else ():
        yield (part[:, None] * together + torch.arange(together, device=part.device)).flatten()


def micro_batches(size: int, micro: int | None, together: int = 1) -> Iterator[slice]:
    """Consecutive slices of at most ``micro`` rows (None: one slice of all), but of no fewer than ``together``, undivided."""
    step = max(micro // together, 1) * together if micro else max(size, 1)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
