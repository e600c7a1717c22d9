"""One iteration's optimisation: epochs, mini-batches and micro-batches over a rollout, or one batch of examples.

Micro-batch losses are shares of the mini-batch's loss, so accumulating their gradients gives the whole mini-batch's gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmrl.batching import make_batch, micro_batches, minibatch_indices
from mmrl.optim import Optimization
from mmrl.protocols import Advantages, ExampleSource, LikelihoodPolicy, LossContext, RolloutAlgorithm, SupervisedAlgorithm
from mmrl.types import Batch, Loss, Rollout

# How a metric is merged over micro-batches and updates; the mean for every other.
_MERGE = {"ratio_min": min, "ratio_max": max, "log_prob_gap_max": max}


class MetricMerger:
    """Averages what the updates of one iteration report (extremes of the metrics that are extremes), weighted by sample counts."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        for name, value in metrics.items():
            self._values[name].append((float(value), weight))

    def result(self) -> dict[str, float]:
        merged = {}
        for name, entries in self._values.items():
            merge = _MERGE.get(name)
            total = sum(weight for _, weight in entries)
            merged[name] = merge(v for v, _ in entries) if merge else sum(v * w for v, w in entries) / max(total, 1e-12)
        return merged


@dataclass
class SupervisedTerm:
    """A supervised loss added to every update of a stage: ``weight`` x the policy's imitation loss, one batch per micro-batch."""

    source: ExampleSource
    batch_size: int
    weight_from: float
    weight_to: float

    def weight(self, iteration: int, iterations: int) -> float:
        """Linear from the first to the last iteration of the stage."""
        progress = iteration / max(iterations - 1, 1)
        return self.weight_from + (self.weight_to - self.weight_from) * progress

    def backward(self, policy: Any, generator: torch.Generator, scale: float) -> Mapping[str, Tensor | float]:
        loss = policy.supervised_loss(self.source.batch(self.batch_size), generator)
        (scale * loss.value).backward()
        return {"supervised_loss": loss.value.detach(), **loss.metrics}


@dataclass
class RolloutUpdate:
    """Everything an update from rollouts needs; ``run`` makes the updates of one iteration."""

    policy: LikelihoodPolicy
    algorithm: RolloutAlgorithm
    optimization: Optimization
    minibatch_generator: torch.Generator
    supervised_generator: torch.Generator
    iterations: int
    micro_batch: int | None = None
    supervised: SupervisedTerm | None = None
    reference: LikelihoodPolicy | None = None

    def prepare(self, rollout: Rollout) -> tuple[Batch, Advantages]:
        """Advantages, and the batch with the reference's log-probabilities where the algorithm reads them."""
        advantages = self.algorithm.advantages(rollout)
        batch = make_batch(rollout, advantages, self.policy)
        if self.reference is not None and len(batch):
            with self.reference.compute_mode(train=False):
                scores = [
                    self.reference.evaluate(batch.select(_rows(s)).trace) for s in micro_batches(len(batch), self.micro_batch)
                ]
            batch = replace(batch, reference_log_probs_NK=torch.cat([s.log_probs_NK for s in scores]))
        return batch, advantages

    def run(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Epochs of updates; ends early, as counted in ``updates``, once an update's approximate KL exceeds the algorithm's bound."""
        merger, updates, first_gap = MetricMerger(), 0, None
        for _ in range(self.algorithm.epochs):
            for index in minibatch_indices(len(batch), self.algorithm.minibatches, self.minibatch_generator):
                metrics = self._update(batch.select(index), iteration)
                if first_gap is None:
                    # Only the first update scores with the weights the rollout was made with.
                    first_gap = {
                        "log_prob_mismatch": metrics["log_prob_gap"],
                        "log_prob_mismatch_max": metrics["log_prob_gap_max"],
                    }
                merger.add({name: value for name, value in metrics.items() if not name.startswith("log_prob_gap")})
                updates += 1
                if self.algorithm.max_kl is not None and metrics["approx_kl"] > self.algorithm.max_kl:
                    return merger.result() | first_gap | {"updates": float(updates), "stopped_by_kl": 1.0}
        return merger.result() | (first_gap or {}) | {"updates": float(updates)}

    def _update(self, batch: Batch, iteration: int) -> dict[str, float]:
        trained = batch.mask_NK
        context = LossContext(units=max(int(trained.sum()), 1), samples=max(int(trained.any(1).sum()), 1), iteration=iteration)
        merger, total = MetricMerger(), 0.0
        pieces = list(micro_batches(len(batch), self.micro_batch))
        self.optimization.zero_grad()
        with self.policy.compute_mode(train=True):
            for piece in pieces:
                rows = _rows(piece)
                loss: Loss = self.algorithm.loss(self.policy, batch.select(rows), context)
                loss.value.backward()
                total += float(loss.value.detach())
                merger.add(_undo_share(loss.metrics, len(pieces)), weight=len(rows))
                if self.supervised is not None:
                    weight = self.supervised.weight(iteration, self.iterations)
                    merger.add(self.supervised.backward(self.policy, self.supervised_generator, weight / len(pieces)))
        merged = merger.result() | {"loss": total}
        return merged | _step(self.optimization, self.policy, total)


@dataclass
class SupervisedUpdate:
    """Everything an update from examples needs; ``run`` makes one update."""

    policy: Any
    algorithm: SupervisedAlgorithm
    optimization: Optimization
    source: ExampleSource
    generator: torch.Generator
    micro_batch: int | None = None

    def run(self) -> dict[str, float]:
        size = self.algorithm.batch_size
        merger, total = MetricMerger(), 0.0
        self.optimization.zero_grad()
        with self.policy.compute_mode(train=True):
            for piece in micro_batches(size, self.micro_batch):
                count = piece.stop - piece.start
                loss = self.algorithm.loss(self.policy, self.source.batch(count), share=count / size, generator=self.generator)
                loss.value.backward()
                total += float(loss.value.detach())
                merger.add(loss.metrics, weight=count)
        return merger.result() | {"loss": total} | _step(self.optimization, self.policy, total)


def _step(optimization: Optimization, policy: Any, loss: float) -> dict[str, float]:
    report = optimization.step(math.isfinite(loss), loss=loss)
    policy.version += not report.skipped
    rates = {f"lr_{name}": value for name, value in report.lr.items()}
    return {"grad_norm": report.grad_norm, "skipped": float(report.skipped), **rates}


def _undo_share(metrics: Mapping[str, Tensor | float], pieces: int) -> dict[str, Tensor | float]:
    """Loss-like metrics are shares that add up; scaled by the number of pieces their mean is the whole's value (equal pieces)."""
    return {name: value * pieces if name in _SHARES else value for name, value in metrics.items()}


_SHARES = frozenset({"policy_loss", "value_loss", "entropy", "kl_reference"})


def _rows(piece: slice) -> Tensor:
    return torch.arange(piece.start, piece.stop)
