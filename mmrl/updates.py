"""One iteration's optimisation: epochs, mini-batches and micro-batches over a rollout, or one batch of examples.

Micro-batch losses are shares of the mini-batch's loss, so accumulating their gradients gives the whole mini-batch's gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrl.batching import make_batch, micro_batches, minibatch_indices
from mmrl.numerics import masked
from mmrl.numerics.draws import Draws, random_keys
from mmrl.optim import Optimization
from mmrl.protocols import (
    Advantages,
    EnginePolicy,
    ExampleSource,
    LikelihoodPolicy,
    LossContext,
    MeansAlgorithm,
    RolloutAlgorithm,
    SelectiveAlgorithm,
    SupervisedAlgorithm,
    VelocityAlgorithm,
    VelocityPolicy,
)
from mmrl.snapshots import Frozen, Snapshot
from mmrl.types import Batch, Examples, Loss, Rollout, Talks, gather
from mmrl.units import parts

Merge = Callable[[Iterable[float]], float]
# How a metric is merged; the mean for every other. The micro-batches' losses are shares of their mini-batch's.
_EXTREMES: dict[str, Merge] = {"ratio_min": min, "ratio_max": max, "log_prob_gap_max": max, "engine_gap_max": max}
_SHARES = ("loss", "policy_loss", "value_loss", "entropy", "kl_reference")
_OVER_MICRO_BATCHES: dict[str, Merge] = {**_EXTREMES, **dict.fromkeys(_SHARES, sum)}
_VALUE_MEANS = ("value_clip_fraction",)  # means over values; the others are means over units
_OVER_UPDATES: dict[str, Merge] = {**_EXTREMES, "skipped": sum}


class MetricMerger:
    """Averages what several micro-batches or updates report, weighted, but for the metrics that ``merges`` treats otherwise.

    merge: how all the metrics are merged that ``merges`` does not name, instead of being averaged.
    """

    def __init__(self, merges: Mapping[str, Merge], merge: Merge | None = None) -> None:
        self._merges, self._merge = merges, merge
        self._values: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, metrics: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        for name, value in metrics.items():
            self._values[name].append((float(value), weight))

    def result(self) -> dict[str, float]:
        merged = {}
        for name, entries in self._values.items():
            merge, total = self._merges.get(name, self._merge), sum(weight for _, weight in entries)
            merged[name] = merge(v for v, _ in entries) if merge else sum(v * w for v, w in entries) / max(total, 1e-12)
        return merged


def accumulate(
    examples: Examples | Talks, weight_B: Tensor, micro_batch: int | None, loss_of: Callable[[Any, float], Loss]
) -> dict[str, float]:
    """Add the gradient of the mean over what ``weight_B`` counts of ``examples`` to ``.grad``, part by part; its metrics.

    ``loss_of(part, share)`` is ``share`` times the mean loss of a part. Padding carries no loss, so a part's share is that of its
    real actions (or tokens), not of its rows: only then do the parts add up to the mean over all.
    """
    merger = MetricMerger(_OVER_MICRO_BATCHES)
    real = max(float(weight_B.sum()), 1e-12)
    for piece in micro_batches(len(examples), micro_batch):
        part = examples.select(torch.arange(piece.start, piece.stop))
        share = float(weight_B[piece].sum()) / real
        loss = loss_of(part, share)
        loss.value.backward()
        merger.add(loss.metrics, weight=share)
        merger.add({"loss": loss.value.detach()})
    return merger.result()


@dataclass
class SupervisedTerm:
    """A supervised loss added to every update of a stage: ``weight`` x the policy's imitation loss on ``batch_size`` examples."""

    source: ExampleSource
    batch_size: int
    weight_from: float
    weight_to: float

    def weight(self, iteration: int, iterations: int) -> float:
        """Linear from the first to the last iteration of the stage."""
        progress = iteration / max(iterations - 1, 1)
        return self.weight_from + (self.weight_to - self.weight_from) * progress

    def backward(self, policy: Any, generator: torch.Generator, weight: float, micro_batch: int | None) -> dict[str, float]:
        """Add the term's gradient; its metrics, of which ``loss`` is weighted and ``supervised_loss`` is not."""

        def loss_of(part: Examples | Talks, share: float) -> Loss:
            loss = policy.supervised_loss(part, generator)
            return Loss(weight * share * loss.value, {**loss.metrics, "supervised_loss": loss.value.detach()})

        examples = self.source.batch(self.batch_size)
        return accumulate(examples, policy.supervised_weight(examples), micro_batch, loss_of)


@dataclass
class RolloutUpdate:
    """Everything an update from rollouts needs; ``run`` makes the updates of one iteration."""

    policy: Any
    algorithm: RolloutAlgorithm
    optimization: Optimization
    minibatch_generator: torch.Generator
    supervised_generator: torch.Generator
    iterations: int
    micro_batch: int | None = None
    supervised: SupervisedTerm | None = None
    reference: Any = None
    rows_generator: torch.Generator = field(default_factory=torch.Generator)
    behaviour: Snapshot | None = None
    average: Snapshot | None = None

    @torch.no_grad()
    def prepare(self, rollout: Rollout) -> tuple[Batch, Advantages]:
        """Advantages and the batch. A reference comes first: an algorithm may count the distance from it among the rewards.

        Where an engine drew that is not the policy, the policy's own log-probabilities take the place of the engine's.
        """
        read_TB = self._read(rollout)
        policy = self.policy
        if isinstance(policy, EnginePolicy) and policy.rescores:
            own = self._score(rollout, self.policy, read_TB)
            rollout = replace(rollout, log_probs_TBK=own.log_probs_TBK, engine_log_probs_TBK=rollout.log_probs_TBK)
        if self.reference is not None and not isinstance(self.algorithm, VelocityAlgorithm):
            means = isinstance(self.algorithm, MeansAlgorithm) and self.algorithm.uses_reference_means
            scores = self._score(rollout, self.reference, read_TB, means=means)
            rollout = replace(rollout, reference_log_probs_TBK=scores.log_probs_TBK, reference_means_TBKD=scores.means_TBKD)
        advantages = self.algorithm.advantages(rollout)
        return make_batch(rollout, advantages, self.policy), advantages

    def _read(self, rollout: Rollout) -> Tensor:
        """The decisions [T, B] whose log-probabilities the algorithm reads."""
        if isinstance(self.algorithm, SelectiveAlgorithm) and not self.algorithm.judges_by_reference:
            return rollout.valid_TB & self.algorithm.taught(rollout)
        return rollout.valid_TB

    def _score(self, rollout: Rollout, policy: LikelihoodPolicy, read_TB: Tensor, *, means: bool = False) -> _Scores:
        """What ``policy`` says of all decisions, with the means of their units if asked; 0 in samples that nobody reads."""
        packing, (t, b, k) = self.policy.pack(rollout), rollout.log_probs_TBK.shape
        rows_N = gather(read_TB, packing.index_NJ).any(1).nonzero()[:, 0]
        scores_MK = rollout.log_probs_TBK.new_zeros(t * b, k)
        means_MKD: Tensor | None = None
        with policy.compute_mode(train=False):
            for piece in micro_batches(len(rows_N), self.micro_batch):
                rows = rows_N[piece]
                scored = policy.evaluate({name: values[rows] for name, values in packing.trace.items()})
                places_NJ = packing.index_NJ[rows]
                there_NJ = places_NJ >= 0
                units_NJK = scored.log_probs_NK.unflatten(1, (-1, k))
                scores_MK[places_NJ[there_NJ]] = units_NJK[there_NJ].to(scores_MK.dtype)
                if means and scored.means_NKD is not None:
                    means_NJKD = scored.means_NKD.unflatten(1, (-1, k))
                    if means_MKD is None:
                        means_MKD = means_NJKD.new_zeros(t * b, *means_NJKD.shape[2:])
                    means_MKD[places_NJ[there_NJ]] = means_NJKD[there_NJ]
        return _Scores(scores_MK.reshape(t, b, k), None if means_MKD is None else means_MKD.unflatten(0, (t, b)))

    def run(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Epochs of updates; ends early, as counted in ``updates``, once an update's approximate KL exceeds its bound.

        An empty batch (every group was filtered out) gives no update, of the supervised term neither.
        """
        merger, updates, stopped = MetricMerger(_OVER_UPDATES), 0, False
        first_gap: dict[str, float] = {}
        for index in self._minibatches(len(batch)):
            metrics = self._update(batch.select(index), iteration)
            if not first_gap:
                # Only the first update scores with the weights the rollout was made with.
                ends = [end for end in ("", "_max") if f"log_prob_gap{end}" in metrics]
                first_gap = {f"log_prob_mismatch{end}": metrics[f"log_prob_gap{end}"] for end in ends}
            merger.add({name: value for name, value in metrics.items() if not name.startswith("log_prob_gap")})
            updates += 1
            stopped = self.algorithm.max_kl is not None and metrics["approx_kl"] > self.algorithm.max_kl
            if stopped:
                break
        return merger.result() | first_gap | {"updates": float(updates), "stopped_by_kl": float(stopped)}

    def _minibatches(self, size: int) -> Iterator[Tensor]:
        for _ in range(self.algorithm.epochs):
            yield from minibatch_indices(size, self.algorithm.minibatches, self.minibatch_generator, self._together)

    @property
    def _together(self) -> int:
        return self.algorithm.together if isinstance(self.algorithm, VelocityAlgorithm) else 1

    def _update(self, batch: Batch, iteration: int) -> dict[str, float]:
        context, keys_N = self._context(batch, iteration), None
        merger = MetricMerger(_OVER_MICRO_BATCHES)
        if isinstance(self.algorithm, VelocityAlgorithm):
            merger = MetricMerger({}, sum)
            # A key for each row: what it draws must not depend on the micro-batch it is in.
            keys_N = random_keys(len(batch), self.rows_generator)
        self.optimization.zero_grad()
        with self.policy.compute_mode(train=True):
            for piece, part in parts(batch, self.policy, self.algorithm, self.micro_batch, self._together):
                if keys_N is not None:
                    context = replace(context, draws=Draws(keys_N[piece]))
                loss = self.algorithm.loss(self.policy, part, context)
                loss.value.backward()
                weights = {name: part.trained_NV.sum() for name in _VALUE_MEANS}
                for name, value in (*loss.metrics.items(), ("loss", loss.value.detach())):
                    merger.add({name: value}, weight=int(weights.get(name, part.mask_NK.sum())))
            if self.supervised is not None:
                weight = self.supervised.weight(iteration, self.iterations)
                merger.add(self.supervised.backward(self.policy, self.supervised_generator, weight, self.micro_batch))
        metrics = merger.result()
        return metrics | _step(self.optimization, self.policy, metrics["loss"])

    def _context(self, batch: Batch, iteration: int) -> LossContext:
        trained, worth, where = batch.mask_NK, batch.advantages_NJ, batch.trained_NJ
        if batch.unit_advantages_NK is not None:
            worth, where = batch.unit_advantages_NK, trained
        return LossContext(
            units=max(int(trained.sum()), 1),
            samples=max(int(trained.any(1).sum()), 1),
            values=max(int(batch.trained_NV.sum()), 1),
            iteration=iteration,
            advantage_mean=float(masked.mean(worth, where)),
            advantage_std=float(masked.std(worth, where)),
            rows=len(batch),
            reference=Frozen(self.reference) if isinstance(self.reference, VelocityPolicy) else None,
            behaviour=self.behaviour,
            average=self.average,
        )


class _Scores(NamedTuple):
    log_probs_TBK: Tensor
    means_TBKD: Tensor | None


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
        def loss_of(part: Examples | Talks, share: float) -> Loss:
            return self.algorithm.loss(self.policy, part, share=share, generator=self.generator)

        examples = self.source.batch(self.algorithm.batch_size)
        self.optimization.zero_grad()
        with self.policy.compute_mode(train=True):
            metrics = accumulate(examples, self.policy.supervised_weight(examples), self.micro_batch, loss_of)
        return metrics | _step(self.optimization, self.policy, metrics["loss"])


def _step(optimization: Optimization, policy: Any, loss: float) -> dict[str, float]:
    report = optimization.step(math.isfinite(loss), loss=loss)
    policy.version += not report.skipped
    rates = {f"lr_{name}": value for name, value in report.lr.items()}
    return {"grad_norm": report.grad_norm, "skipped": float(report.skipped), **rates}
