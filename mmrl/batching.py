"""From a rollout to mini-batches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmrl.protocols import Advantages, LikelihoodPolicy
from mmrl.types import Batch, Rollout


def make_batch(rollout: Rollout, advantages: Advantages, policy: LikelihoodPolicy) -> Batch:
    """The decisions the algorithm keeps, in (T, B) order."""
    valid, kept = rollout.valid_TB, advantages.keep_TB
    batch = Batch(
        trace=policy.pack(rollout),
        old_log_probs_NK=rollout.log_probs_TBK[valid],
        mask_NK=rollout.mask_TBK[valid],
        advantages_N=advantages.advantages_TB[valid],
        returns_N=advantages.returns_TB[valid],
        old_values_N=rollout.values_TB[valid],
    )
    keep_N = kept[valid]
    return batch if bool(keep_N.all()) else batch.select(keep_N)


def minibatch_indices(size: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A fresh permutation of ``range(size)`` in ``count`` nearly equal parts (fewer where there are too few rows)."""
    order = torch.randperm(size, generator=generator, device=generator.device)
    yield from order.tensor_split(min(count, size)) if size else ()


def micro_batches(size: int, micro: int | None) -> Iterator[slice]:
    """Consecutive slices of at most ``micro`` rows (None: one slice of all)."""
    step = micro or max(size, 1)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
