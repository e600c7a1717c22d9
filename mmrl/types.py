"""The values that flow through mmrl: frozen, and shape-checked once, when they are made.

Shape letters, here and in every name: B samples (or environments), T decisions of an episode, K units of a decision (tokens or
denoising steps), C executed actions of a chunk, H predicted actions of a chunk, A action dimensions, S state dimensions,
P prompts (tasks), G group size, N samples of a batch (what is scored in one piece: a decision, or a conversation), J decisions
of a sample, V values of a decision: 1, or K where the critic has one before each unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from mmrl.columns import Column, Values, apply, cat, put
from mmrl.numerics.losses import Loss as Loss  # every part of mmrl finds these here
from mmrl.observation import ActionSpec as ActionSpec
from mmrl.observation import Conversation as Conversation
from mmrl.observation import Observation as Observation
from mmrl.observation import ShapeError as ShapeError
from mmrl.observation import expect
from mmrl.transcripts import Transcript

Action = Tensor | Column  # [B, C, A] numbers, or a column of B messages: whatever the environment executes
Trace = Mapping[str, Tensor | Column]


def _expect_values(owner: str, name: str, values: Tensor, units: Tensor) -> None:
    """Values stand beside ``units`` [..., K]: [..., V], one for all of a decision's or one for each."""
    *leading, k = units.shape
    expect(owner, name, values, *leading, None)
    if values.shape[len(leading)] not in (1, k):
        raise ShapeError(
            f"{owner}.{name} has {values.shape[len(leading)]} values a decision; it has 1, or one for each of {k} units"
        )


@dataclass(frozen=True)
class Decision:
    """What a policy decided for B observations, and everything needed to score it again.

    action: what to execute, a chunk or a message for each. trace: name -> [B, ...], all that ``evaluate`` reads. log_probs_BK and
    mask_BK: one column per unit (token, denoising step, or chunk entry; the policy says which), mask True where the unit is
    trained.
    values_BV: the critic's estimates of what is still to be earned, one before the decision or one before each unit (anything
    where there is no unit); None without a critic. policy_version: optimizer steps the policy had taken. means_BKD: where units
    are draws of D numbers from Gaussians (denoising steps of a picture), the means of these; else None.
    """

    action: Action
    trace: Trace
    log_probs_BK: Tensor
    mask_BK: Tensor
    values_BV: Tensor | None
    policy_version: int = 0
    means_BKD: Tensor | None = None

    def __post_init__(self) -> None:
        b = len(self.action)
        if isinstance(self.action, Tensor):
            expect("Decision", "action", self.action, b, None, None)
        expect("Decision", "log_probs_BK", self.log_probs_BK, b, None)
        expect("Decision", "mask_BK", self.mask_BK, *self.log_probs_BK.shape)
        if self.values_BV is not None:
            _expect_values("Decision", "values_BV", self.values_BV, self.log_probs_BK)
        if self.means_BKD is not None:
            expect("Decision", "means_BKD", self.means_BKD, *self.log_probs_BK.shape, None)
        for name, value in self.trace.items():
            expect("Decision", f"trace[{name!r}]", value, b)

    @staticmethod
    def concat(parts: Sequence[Decision]) -> Decision:
        """Decisions of one policy for some observations and for others, one after the other."""
        values_BV = [part.values_BV for part in parts if part.values_BV is not None]
        means_BKD = [part.means_BKD for part in parts if part.means_BKD is not None]
        return Decision(
            cat([part.action for part in parts]),
            {name: cat([part.trace[name] for part in parts]) for name in parts[0].trace},
            torch.cat([part.log_probs_BK for part in parts]),
            torch.cat([part.mask_BK for part in parts]),
            torch.cat(values_BV) if values_BV else None,
            parts[0].policy_version,
            torch.cat(means_BKD) if means_BKD else None,
        )

    def spread(self, index_N: Tensor, size: int) -> Decision:
        """These N rows as the rows ``index_N`` of ``size``; the others are zeros, whose units are not trained."""

        return Decision(
            put(self.action, index_N, size),
            {name: put(values, index_N, size) for name, values in self.trace.items()},
            put(self.log_probs_BK, index_N, size),
            put(self.mask_BK, index_N, size),
            None if self.values_BV is None else put(self.values_BV, index_N, size),
            self.policy_version,
            None if self.means_BKD is None else put(self.means_BKD, index_N, size),
        )


@dataclass(frozen=True)
class Step:
    """What followed a chunk of C actions in B environments.

    observation: after the chunk, before any reset (so it is the final observation of an environment that is done).
    rewards_BC and valid_BC: per executed action; an environment that ends inside the chunk ignores the rest (valid False,
    reward 0).
    terminated_B: the task ended by itself (success or failure). truncated_B: the time limit ended it; never both.
    lost_B: the simulator broke down in the middle of the episode, which therefore must not count; as with the other two, the slot
    stays so until it is reset. Neither terminated nor truncated; left out, no slot is lost.
    metrics: name -> float tensor [B]; ``success`` (0 or 1, at this moment) is always there.
    """

    observation: Observation
    rewards_BC: Tensor
    valid_BC: Tensor
    terminated_B: Tensor
    truncated_B: Tensor
    metrics: Mapping[str, Tensor]
    lost_B: Tensor = None  # pyright: ignore[reportAssignmentType]  (filled in below)

    def __post_init__(self) -> None:
        b = self.observation.batch_size
        if self.lost_B is None:
            object.__setattr__(self, "lost_B", torch.zeros_like(self.terminated_B))
        expect("Step", "rewards_BC", self.rewards_BC, b, None)
        expect("Step", "valid_BC", self.valid_BC, *self.rewards_BC.shape)
        for name in ("terminated_B", "truncated_B", "lost_B"):
            expect("Step", name, getattr(self, name), b)
        if "success" not in self.metrics:
            raise ShapeError("Step.metrics lacks 'success'; every environment reports it")
        for name, value in self.metrics.items():
            expect("Step", f"metrics[{name!r}]", value, b)

    @property
    def done_B(self) -> Tensor:
        """Where nothing more happens until a reset."""
        return self.terminated_B | self.truncated_B | self.lost_B


@dataclass(frozen=True)
class Rollout:
    """T decisions of each of B environments, lock-step; the input of every advantage estimator.

    Worked example: T = 2, B = 1, one environment that succeeds with its second decision gives rewards_TB [[0.], [1.]],
    valid_TB [[True], [True]], terminated_TB [[False], [True]], truncated_TB all False, values_TBV [[[0.4]], [[0.7]]] and
    next_values_TB [[0.7], [v]]: v is the value of the final observation, which termination makes irrelevant.

    trace: name -> [T, B, ...]. values_TBV: the critic's (see Decision.values_BV), zeros without one; next_values_TB: of what was
    seen after each decision, which is the first of the next one's where the episode goes on. valid_TB False marks decisions after
    the end of an episode (no auto-reset), and all those of an episode that the simulator lost (see Step.lost_B) - they carry no
    loss. lost: how many episodes it lost.
    task_ids_TB: which task each decision belongs to. episodes: finished episodes, one row each (see EpisodeRecord).
    anchor_TB: a key of the state that each decision was made in (see Observation.anchors_B), None without.
    reference_log_probs_TBK: of the policy the stage started from, 0 where nobody reads it; None without.
    engine_log_probs_TBK: of the engine that drew the units, where it is not the policy that scores them; None: it is.
    means_TBKD and reference_means_TBKD: of units that are Gaussian (see Decision.means_BKD), of the policy and of the reference,
    kept for algorithms that compare them alone; else None.
    """

    trace: Trace
    log_probs_TBK: Tensor
    mask_TBK: Tensor
    rewards_TB: Tensor
    values_TBV: Tensor
    next_values_TB: Tensor
    valid_TB: Tensor
    terminated_TB: Tensor
    truncated_TB: Tensor
    task_ids_TB: Tensor
    episodes: EpisodeRecord
    env_steps: int
    lost: int = 0
    anchor_TB: Tensor | None = None
    reference_log_probs_TBK: Tensor | None = None
    engine_log_probs_TBK: Tensor | None = None
    means_TBKD: Tensor | None = None
    reference_means_TBKD: Tensor | None = None

    def __post_init__(self) -> None:
        t, b = self.rewards_TB.shape
        expect("Rollout", "log_probs_TBK", self.log_probs_TBK, t, b, None)
        expect("Rollout", "mask_TBK", self.mask_TBK, *self.log_probs_TBK.shape)
        if self.anchor_TB is not None:
            expect("Rollout", "anchor_TB", self.anchor_TB, t, b)
        for name in ("reference_log_probs_TBK", "engine_log_probs_TBK"):
            if getattr(self, name) is not None:
                expect("Rollout", name, getattr(self, name), *self.log_probs_TBK.shape)
        for name in ("means_TBKD", "reference_means_TBKD"):
            if getattr(self, name) is not None:
                expect("Rollout", name, getattr(self, name), *self.log_probs_TBK.shape, None)
        _expect_values("Rollout", "values_TBV", self.values_TBV, self.log_probs_TBK)
        for name in ("next_values_TB", "valid_TB", "terminated_TB", "truncated_TB", "task_ids_TB"):
            expect("Rollout", name, getattr(self, name), t, b)
        for name, value in self.trace.items():
            expect("Rollout", f"trace[{name!r}]", value, t, b)

    @property
    def decisions(self) -> int:
        return int(self.valid_TB.sum())

    @property
    def valued_TBV(self) -> Tensor:
        """Values of valid decisions, or units, that have something to train: what a critic learns from."""
        there_TBK = self.mask_TBK & self.valid_TB[..., None]
        return there_TBK.unflatten(2, (self.values_TBV.shape[2], -1)).any(3)

    def by_decision(self) -> Packing:
        """Each valid decision is a sample, in (T, B) order: the trace is [N, ...]."""
        index_N = self.valid_TB.flatten().nonzero()[:, 0]
        trace = {name: apply(values, lambda x: x.flatten(0, 1)[index_N]) for name, values in self.trace.items()}
        return Packing(trace, index_N[:, None])

    def by_episode(self) -> Packing:
        """Each episode is a sample of as many decisions as the longest has, by slots: the trace is [N, J, ...].

        An episode's valid decisions stand first; after them nothing follows (zeros). One that was lost has none and is left out.
        """
        over_TB = self.terminated_TB | self.truncated_TB
        t, b = over_TB.shape
        episodes: list[list[int]] = []
        for slot in range(b):
            ends = [*(over_TB[:, slot].nonzero()[:, 0] + 1).tolist(), t]
            for first, last in pairwise([0, *ends]):
                episodes.append([i * b + slot for i in range(first, last) if self.valid_TB[i, slot]])
        episodes = [episode for episode in episodes if episode]
        longest = max(map(len, episodes), default=1)
        padded = [episode + [-1] * (longest - len(episode)) for episode in episodes]
        index_NJ = torch.tensor(padded, dtype=torch.long, device=over_TB.device).reshape(-1, longest)
        return Packing({name: gather(values, index_NJ) for name, values in self.trace.items()}, index_NJ)


def gather(values_TB: Values, index_NJ: Tensor) -> Values:
    """What a [T, B, ...] tensor or column holds at the flat (T, B) places ``index_NJ``; zeros (or nothing) where that is -1."""

    def take(tensor: Tensor) -> Tensor:
        taken = tensor.flatten(0, 1)[index_NJ.clamp(min=0)]
        return taken.masked_fill((index_NJ < 0).reshape(*index_NJ.shape, *[1] * (taken.dim() - 2)), 0)

    return apply(values_TB, take)


@dataclass(frozen=True)
class Packing:
    """How a rollout's decisions make N samples, each of which a policy scores in one piece.

    trace: what ``evaluate`` takes, name -> [N, ...]. index_NJ: int64, the flat (T, B) places of a sample's J decisions in their
    order, -1 where it has fewer.
    """

    trace: Trace
    index_NJ: Tensor

    def __post_init__(self) -> None:
        for name, value in self.trace.items():
            expect("Packing", f"trace[{name!r}]", value, len(self.index_NJ))


@dataclass(frozen=True)
class EpisodeRecord:
    """M finished episodes: task id, undiscounted return, success, env steps, and any further metric at the end, each [M].

    spans_M3: int64, the slot of a rollout, the first and the last decision of each; None: they are of no rollout.
    transcripts: of each, where the environment talks; else empty. scores: what each reward gave before its weight, NaN where it
    failed.
    """

    task_ids_M: Tensor
    returns_M: Tensor
    success_M: Tensor
    lengths_M: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    spans_M3: Tensor | None = None
    transcripts: tuple[Transcript, ...] = ()
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m = self.task_ids_M.shape[0]
        if self.spans_M3 is not None:
            expect("EpisodeRecord", "spans_M3", self.spans_M3, m, 3)
        if self.transcripts and len(self.transcripts) != m:
            raise ShapeError(f"EpisodeRecord has {m} episodes and {len(self.transcripts)} transcripts")
        for name in ("returns_M", "success_M", "lengths_M"):
            expect("EpisodeRecord", name, getattr(self, name), m)
        for name, value in self.metrics.items():
            expect("EpisodeRecord", f"metrics[{name!r}]", value, m)
        for name, value in self.scores.items():
            expect("EpisodeRecord", f"scores[{name!r}]", value, m)

    def select(self, index_M: Tensor) -> EpisodeRecord:
        return EpisodeRecord(
            self.task_ids_M[index_M],
            self.returns_M[index_M],
            self.success_M[index_M],
            self.lengths_M[index_M],
            {name: value[index_M] for name, value in self.metrics.items()},
            None if self.spans_M3 is None else self.spans_M3[index_M],
            tuple(self.transcripts[m] for m in index_M.tolist()) if self.transcripts else (),
            {name: value[index_M] for name, value in self.scores.items()},
        )

    @staticmethod
    def concat(parts: Sequence[EpisodeRecord]) -> EpisodeRecord:
        return EpisodeRecord(
            torch.cat([part.task_ids_M for part in parts]),
            torch.cat([part.returns_M for part in parts]),
            torch.cat([part.success_M for part in parts]),
            torch.cat([part.lengths_M for part in parts]),
            {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics},
            None if parts[0].spans_M3 is None else torch.cat([part.spans_M3 for part in parts if part.spans_M3 is not None]),
            tuple(transcript for part in parts for transcript in part.transcripts),
            {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
        )


@dataclass(frozen=True)
class Batch:
    """N samples ready for a loss: what to score again, the rollout's numbers, and what the decisions were worth.

    A sample has J decisions (1, or those of a conversation) of K / J units each: unit k belongs to decision k // (K / J). So what
    is known of decisions reaches their units by ``per_unit``. mask_NK is False at units that are not trained, those of decisions
    that are not there among them. returns_NV and old_values_NV, zero without a critic, are of decisions (V = J) or of units
    (V = K). engine_log_probs_NK, old_means_NKD and reference_means_NKD: as in a Rollout.

    Worked example: N = 1 conversation of J = 2 turns, of at most 3 tokens each, the second of them cut after 2 tokens, gives
    mask_NK [[1, 1, 1, 1, 1, 0]] and with advantages_NJ [[0.5, -1.]] per unit [[0.5, 0.5, 0.5, -1., -1., -1.]].
    """

    trace: Trace
    old_log_probs_NK: Tensor
    mask_NK: Tensor
    advantages_NJ: Tensor
    returns_NV: Tensor
    old_values_NV: Tensor
    reference_log_probs_NK: Tensor | None = None
    unit_advantages_NK: Tensor | None = None
    engine_log_probs_NK: Tensor | None = None
    old_means_NKD: Tensor | None = None
    reference_means_NKD: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.old_log_probs_NK.shape
        expect("Batch", "mask_NK", self.mask_NK, n, k)
        expect("Batch", "advantages_NJ", self.advantages_NJ, n, None)
        j = self.advantages_NJ.shape[1]
        if k % j:
            raise ShapeError(f"Batch has {k} units a sample, which its {j} decisions cannot share equally")
        expect("Batch", "old_values_NV", self.old_values_NV, n, None)
        if self.old_values_NV.shape[1] not in (j, k):
            raise ShapeError(
                f"Batch.old_values_NV has {self.old_values_NV.shape[1]} columns, not one a decision ({j}) or unit ({k})"
            )
        expect("Batch", "returns_NV", self.returns_NV, *self.old_values_NV.shape)
        for name in ("reference_log_probs_NK", "unit_advantages_NK", "engine_log_probs_NK"):
            if getattr(self, name) is not None:
                expect("Batch", name, getattr(self, name), n, k)
        for name in ("old_means_NKD", "reference_means_NKD"):
            if getattr(self, name) is not None:
                expect("Batch", name, getattr(self, name), n, k, None)
        for name, value in self.trace.items():
            expect("Batch", f"trace[{name!r}]", value, n)

    def __len__(self) -> int:
        return self.old_log_probs_NK.shape[0]

    @property
    def trained_NJ(self) -> Tensor:
        """Decisions of which some unit is trained."""
        return self.mask_NK.unflatten(1, (self.advantages_NJ.shape[1], -1)).any(2)

    @property
    def trained_NV(self) -> Tensor:
        """Values of decisions or units of which some unit is trained."""
        return self.mask_NK.unflatten(1, (self.old_values_NV.shape[1], -1)).any(2)

    @property
    def advantages_NK(self) -> Tensor:
        """What each unit was worth."""
        return self.per_unit(self.advantages_NJ) if self.unit_advantages_NK is None else self.unit_advantages_NK

    def per_unit(self, x_NJ: Tensor) -> Tensor:
        """Each unit's share of what is known of its decision: [N, K]."""
        return x_NJ.repeat_interleave(self.old_log_probs_NK.shape[1] // x_NJ.shape[1], 1)

    def units(self, piece: slice, trace: Trace) -> Batch:
        """Some units of every sample, where a sample is one decision; ``trace``: what scores these."""
        if self.advantages_NJ.shape[1] != 1:
            raise ShapeError(f"Batch has {self.advantages_NJ.shape[1]} decisions a sample, whose units are not taken apart")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("_NK", "_NKD"))}
        return replace(self, trace=trace, **{name: x if x is None else x[:, piece] for name, x in values.items()})

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Apply ``fn`` to every tensor (to move it, or to index its rows)."""
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = fn(value)
            elif isinstance(value, Mapping):
                changed[f.name] = {name: apply(values, fn) for name, values in value.items()}
        return replace(self, **changed)

    def select(self, index: Tensor) -> Batch:
        return self.map(lambda tensor: tensor[index])


@dataclass(frozen=True)
class Examples:
    """B supervised examples: an observation and the H actions that followed it.

    mask_BH is False where the demonstration had ended (the actions there are padding and carry no loss).
    """

    observation: Observation
    actions_BHA: Tensor
    mask_BH: Tensor

    def __post_init__(self) -> None:
        b = self.observation.batch_size
        expect("Examples", "actions_BHA", self.actions_BHA, b, None, None)
        expect("Examples", "mask_BH", self.mask_BH, b, self.actions_BHA.shape[1])

    def __len__(self) -> int:
        return self.observation.batch_size

    def select(self, index_N: Tensor) -> Examples:
        """The rows ``index_N`` (int64 [N]), in that order."""
        return Examples(self.observation.select(index_N), self.actions_BHA[index_N], self.mask_BH[index_N])

    @staticmethod
    def concat(parts: Sequence[Examples]) -> Examples:
        """One after the other."""
        return Examples(
            Observation.concat([part.observation for part in parts]),
            torch.cat([part.actions_BHA for part in parts]),
            torch.cat([part.mask_BH for part in parts]),
        )


@dataclass(frozen=True)
class Talks:
    """B whole conversations to imitate: what the assistant says in each of them is to be learned, by its messages' weights."""

    conversations: tuple[Conversation, ...]

    def __len__(self) -> int:
        return len(self.conversations)

    def select(self, index_N: Tensor) -> Talks:
        return Talks(tuple(self.conversations[i] for i in index_N.tolist()))

    @staticmethod
    def concat(parts: Sequence[Talks]) -> Talks:
        """One after the other."""
        return Talks(tuple(talk for part in parts for talk in part.conversations))


@dataclass(frozen=True)
class Episode:
    """One recorded episode of T moments: what was seen, done and earned at each.

    observation: its T rows are the moments before each action. actions_TA and rewards_T: what followed. success and terminated:
    how it ended (an episode that did not terminate was cut by its time limit). task_id: of the environment.
    """

    observation: Observation
    actions_TA: Tensor
    rewards_T: Tensor
    success: bool
    terminated: bool
    task_id: int

    def __post_init__(self) -> None:
        t = self.observation.batch_size
        if t == 0:
            raise ShapeError("Episode.observation has no rows; an episode has at least one moment")
        expect("Episode", "actions_TA", self.actions_TA, t, None)
        expect("Episode", "rewards_T", self.rewards_T, t)

    def __len__(self) -> int:
        return self.observation.batch_size


@dataclass(frozen=True)
class Evaluation:
    """A policy's second look at N samples, with gradients: log-probabilities and entropies of their units, and values.

    values_NV: of decisions or of units, as those of acting (see Decision.values_BV); None without a critic.
    means_NKD, stds_NK, deltas_NK: where units are draws of D numbers from Gaussians (see Decision.means_BKD), the means, standard
    deviations and lengths t - t' of these steps; else None.
    """

    log_probs_NK: Tensor
    entropy_NK: Tensor
    values_NV: Tensor | None
    means_NKD: Tensor | None = None
    stds_NK: Tensor | None = None
    deltas_NK: Tensor | None = None
