"""What the parts of mmrl promise one another. A part knows nothing but these.

Adding a policy, simulator, tool, reward or algorithm means one new file with a class that keeps one of these promises, a nested
``Config`` (a pydantic dataclass), and one YAML that names it as ``target: package.module:Name``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmrl.judging import AsyncReward as AsyncReward  # every part of mmrl finds these here
from mmrl.judging import Reward as Reward
from mmrl.judging import Tool as Tool
from mmrl.judging import TurnReward as TurnReward
from mmrl.numerics.draws import Draws
from mmrl.sources import Advance as Advance
from mmrl.sources import EpisodeSink as EpisodeSink
from mmrl.sources import ExampleSource as ExampleSource
from mmrl.sources import StatisticsSource as StatisticsSource
from mmrl.types import (
    ActionSpec,
    Batch,
    Decision,
    Evaluation,
    Examples,
    Loss,
    Observation,
    Packing,
    Rollout,
    Step,
    Talks,
    Trace,
)


@runtime_checkable
class Environment(Protocol):
    """``num_envs`` episodes in lock-step. Built as ``cls(config, num_envs=..., device=...)``.

    A task id (int64) and the config determine an episode completely: layout, instruction, every random event in it. The same id
    gives the same episode in any slot, for any ``num_envs``; a group for GRPO is one id in G slots.
    """

    num_envs: int
    action_spec: ActionSpec
    max_steps: int  # actions until truncation, the longest of the tasks in the mixture

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        """Start the episodes ``task_ids_B`` in the slots where ``where_B`` is True (None: all); observations of all slots."""
        ...

    def step(self, actions: Any, /) -> Step:
        """Execute C actions in each slot ([B, C, A]), or take the message of each (a Column of B): Decision.action.

        Slots that are done ignore actions until they are reset.
        """
        ...

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        """The name under which each task is reported (a task family, a suite); one word per task id."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class AsyncEnvironment(Protocol):
    """An environment that simulates in processes of its own, so that a policy can act elsewhere in the meantime.

    The first half of a reset or a step returns at once, with the function that waits for its end. That must have been called
    before anything else is asked of the environment. ``reset`` and ``step`` are both halves in one. Where it depends on the
    configuration whether there are such processes, a static ``simulates_apart(config)`` says so.
    """

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]: ...

    def begin_step(self, actions: Any, /) -> Callable[[], Step]: ...


@runtime_checkable
class GradualEnvironment(Protocol):
    """An environment in which what follows an action begins with it, whatever the other slots' actions are.

    With ``collect.parts`` above 1 it stays one environment, and the policy acts for a part of its slots at a time.
    """

    def hand_in(self, actions: Any, rows_N: Tensor, /) -> None:
        """Begin with what follows these actions of the slots ``rows_N`` (int64 [N]), and return at once.

        Called for some slots after the others, never for two at the same time, but in any thread.
        """
        ...

    def end_step(self) -> Step:
        """Wait for all that was handed in: what ``step`` gives where all actions are there at once."""
        ...


@runtime_checkable
class ExpertEnvironment(Protocol):
    """An environment that knows how its tasks are solved."""

    def expert_action(self) -> Tensor:
        """The scripted expert's next action in each slot, from privileged state: [B, A]."""
        ...


@runtime_checkable
class RenderEnvironment(Protocol):
    """An environment that can show itself to a person."""

    def render_video(self, index_M: Tensor) -> Tensor:
        """A frame of each of the slots ``index_M``, as large as a person wants it: uint8 [M, height, width, 3]."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Decides, and can say again how likely each decision was. Built as ``cls(config, device=...)``.

    Knows no reward, advantage, algorithm or simulator. ``version`` counts optimizer steps; the trainer sets it.
    """

    version: int

    def act(self, observation: Observation, draws: Draws, *, explore: bool) -> Decision:
        """Decide for B observations without gradients. ``explore=False`` is the deterministic policy used for evaluation.

        Every random number comes from ``draws``, so that a row's decision does not depend on the rows beside it.
        """
        ...

    def trainable(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Trained parameters by group name (``actor``, ``critic``, ``noise_head``...); an optimizer config keys on the names."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything a fresh process needs to load this policy (safetensors and json, no pickle)."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...

    def fingerprint(self) -> str:
        """Architecture in one line: two policies with equal fingerprints can exchange state dicts."""
        ...

    def compute_mode(self, *, train: bool) -> AbstractContextManager[None]:
        """Autocast and module modes for a scope that trains (True) or acts (False)."""
        ...

    def example_observation(self, batch_size: int) -> Observation:
        """A valid random observation, for contract tests and dry runs."""
        ...


class Fitted(Protocol):
    """A policy part that must see data once before it can be trained (normalisation statistics)."""

    def needs_statistics(self) -> bool: ...

    def fit_statistics(self, examples: Examples) -> None: ...


@runtime_checkable
class LikelihoodPolicy(Policy, Protocol):
    """Its decisions have units with a log-probability."""

    def pack(self, rollout: Rollout) -> Packing:
        """The rollout's valid decisions as samples: ``rollout.by_decision()``, or what can be scored in one piece."""
        ...

    def evaluate(self, trace: Trace) -> Evaluation:
        """Score decisions again, with gradients. At unchanged weights the numbers equal those of ``act``."""
        ...

    def reference(self) -> LikelihoodPolicy:
        """A frozen copy of the policy as it is now (or its base without the adapter), for KL terms."""
        ...


@runtime_checkable
class SchedulingPolicy(Protocol):
    """What it draws at random, or trains, changes in the course of a stage."""

    def at_iteration(self, iteration: int) -> None:
        """Told before the rollout of each iteration of a stage, counted from 0; after a resume too."""
        ...


@runtime_checkable
class AsyncPolicy(Protocol):
    """A policy that has something left to do when it has decided, such as decoding, and can do it while it decides for others."""

    def begin_act(self, observation: Observation, draws: Draws, *, explore: bool) -> Callable[[], Decision]:
        """Decide, and return the function that finishes what ``act`` would have given, in any thread, one at a time."""
        ...


@runtime_checkable
class EnginePolicy(Protocol):
    """Another program may decide for it, with the same weights and slightly other arithmetic."""

    rescores: bool  # whether ``act`` gives that program's log-probabilities, so that ``evaluate`` is asked for the policy's own


@runtime_checkable
class ValuePolicy(Protocol):
    """It has a critic, of decisions or of their units (see Decision.values_BV)."""

    has_critic: bool

    def value(self, observation: Observation, draws: Draws) -> Tensor:
        """The (first) value of a decision for B observations, without gradients: [B]. As ``act`` and ``evaluate`` have it."""
        ...


@runtime_checkable
class LegiblePolicy(Protocol):
    """It talks in tokens that a person can read; a decision's units are the tokens of its message."""

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a message, special ones by name; all of them together are the message.

        A token that ends in the middle of a character has an empty text, and the one that completes it the whole character.
        """
        ...


@runtime_checkable
class AdaptivePolicy(Protocol):
    """It learns from what it sees beside the gradient, such as running statistics of its inputs."""

    def adapt(self, trace: Trace) -> None:
        """See a rollout's decisions (as ``pack`` gives them), after its last update and before the next rollout."""
        ...


@runtime_checkable
class SupervisedPolicy(Fitted, Protocol):
    """It can imitate what its kind of policy does: ``examples`` are Examples, or Talks."""

    horizon: int  # H, the actions an example needs

    def supervised_weight(self, examples: Any) -> Tensor:
        """How much each example counts: its real actions, or the tokens to learn from it. [B]"""
        ...

    def supervised_loss(self, examples: Any, generator: torch.Generator) -> Loss:
        """The mean over what ``supervised_weight`` counts, so that micro-batches are weighted by it."""
        ...


@dataclass(frozen=True)
class Check:
    """Something that was tried on a policy: its name, whether it holds, and what was measured, in words."""

    name: str
    ok: bool
    measured: str


@runtime_checkable
class SelfCheckingPolicy(Protocol):
    """It can try what its kind of policy may get wrong and the contract does not show; ``mmrl check-policy`` prints it."""

    def checks(self) -> Iterator[Check]: ...


@runtime_checkable
class VelocityPolicy(Policy, Protocol):
    """A flow model that shows its velocity field, for algorithms that regress it (SOAR, DiffusionNFT, AWM, Diffusion-DPO).

    Times and velocities as in ``mmrl.numerics.flow``: t = 1 is noise, v = noise - x0.
    """

    def pack(self, rollout: Rollout) -> Packing:
        """As a LikelihoodPolicy's."""
        ...

    def reference(self) -> VelocityPolicy:
        """As a LikelihoodPolicy's."""
        ...

    def clean(self, trace: Trace) -> Tensor:
        """What the N decisions of a trace ended in, before it was decoded: x0 [N, ...], without gradients."""
        ...

    def velocity(self, trace: Trace, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor:
        """The field at x_t [N, ...] and times t_N under what the decisions were made for, with gradients.

        guidance: of classifier-free guidance; None and 1: that of the conditional branch alone.
        """
        ...

    def examine(self, talks: Talks) -> Trace:
        """The trace of decisions that had made what the assistant shows there, for ``clean`` and ``velocity``."""
        ...


@dataclass(frozen=True)
class DataContext:
    """What a data source may ask of the run: environments like the run's (with overrides), the chunk length, seed, device."""

    make_environment: Callable[[int, Mapping[str, Any]], Environment]
    horizon: int
    seed: int
    device: torch.device


@runtime_checkable
class VelocityField(Protocol):
    """What ``VelocityPolicy.velocity`` is, of weights that are not trained; without gradients."""

    def velocity(self, trace: Trace, x_t: Tensor, t_N: Tensor, *, guidance: float | None = None) -> Tensor: ...


@dataclass(frozen=True)
class LossContext:
    """What a micro-batch's loss must know of its surroundings.

    units, values, samples: those trained in the whole mini-batch - dividing by them, not by its own, makes micro-batch losses add
    up. iteration: of the stage, from 0. advantage_mean, advantage_std (unbiased): of its decisions, or units where they differ.
    For a VelocityAlgorithm also: rows, all samples of the mini-batch, for where velocities are compared it does not matter which
    units are trained; draws, random numbers for each row of the micro-batch; and the fields of other weights: reference, of the
    policy the stage started from, behaviour, of the policy that collected, average, a running average. None: not asked for.
    """

    units: int
    values: int
    samples: int
    iteration: int
    advantage_mean: float = 0.0
    advantage_std: float = 1.0
    rows: int = 1
    draws: Draws | None = None
    reference: VelocityField | None = None
    behaviour: VelocityField | None = None
    average: VelocityField | None = None


@dataclass(frozen=True)
class Advantages:
    """What an algorithm made of a rollout: keep_TB is valid_TB less what it filters out; a critic, if any, regresses returns_TBV.

    units_TBK: what each unit was worth, where those of a decision differ; None where advantages_TB says it all.
    """

    advantages_TB: Tensor
    returns_TBV: Tensor | None
    keep_TB: Tensor
    metrics: Mapping[str, float]
    units_TBK: Tensor | None = None


class Algorithm(Protocol):
    """Turns what was collected into a loss. Built as ``cls(config)``. Knows no model class and no logger."""

    needs: ClassVar[frozenset[str]]  # of {"rollout", "examples", "critic", "likelihood", "velocity"}


@runtime_checkable
class RolloutAlgorithm(Algorithm, Protocol):
    """An algorithm that learns from its own rollouts."""

    epochs: int  # passes over a rollout
    minibatches: int  # optimizer updates per pass
    max_kl: float | None  # leave the remaining updates of a rollout out once the approximate KL of one exceeds this
    group_size: int  # G episodes of one task; 1 where the algorithm compares nothing
    whole_episodes: bool  # whether it judges episodes as wholes, so that none may be cut by the end of the rollout
    uses_reference: bool  # whether it reads the reference: its log-probabilities, of the rollout or of a batch, or its velocity

    def advantages(self, rollout: Rollout) -> Advantages: ...

    def loss(self, policy: Any, batch: Batch, context: LossContext) -> Loss:
        """This micro-batch's share of the mini-batch's loss; shares add up to the loss of the whole mini-batch."""
        ...


Decay = Callable[[int], float]  # iteration n of the stage -> how much of the average before it stays


@runtime_checkable
class VelocityAlgorithm(Protocol):
    """A rollout algorithm that regresses the velocity of a VelocityPolicy and knows no log-probability.

    Before the rollout of iteration n, an average becomes decay(n) of what it was and 1 - decay(n) of the weights as they are.
    The first rollout is always that of the weights as they are.
    """

    together: int  # how many consecutive samples of a batch its loss must see at once
    behaviour: Decay | None  # of the average that collects, LossContext.behaviour; 0: the policy as it is. None: neither
    average: Decay | None  # of LossContext.average; None: there is none

    def loss(self, policy: VelocityPolicy, batch: Batch, context: LossContext) -> Loss:
        """As a RolloutAlgorithm's. Its metrics are shares as well, which are summed over the micro-batches."""
        ...


@runtime_checkable
class MeansAlgorithm(Protocol):
    """A rollout algorithm that may compare the means of Gaussian units, which are large."""

    uses_means: bool  # whether it reads Batch.old_means_NKD
    uses_reference_means: bool  # whether it reads Batch.reference_means_NKD


@runtime_checkable
class StatefulAlgorithm(Protocol):
    """A rollout algorithm that remembers something from one rollout to the next."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...


@runtime_checkable
class SelectiveAlgorithm(Protocol):
    """A rollout algorithm that judges whole episodes and learns from some of its groups only."""

    max_refills: int  # how often a rollout's other groups are replaced by groups played anew; 0: never
    judges_by_reference: (
        bool  # whether ``advantages`` reads the reference, so that it is asked about all decisions, not these alone
    )

    def taught(self, rollout: Rollout) -> Tensor:
        """The slots whose episodes it would learn from: bool [B], the same for all of a group. Reads no reference."""
        ...


@runtime_checkable
class SupervisedAlgorithm(Algorithm, Protocol):
    """An algorithm that learns from examples."""

    batch_size: int

    def loss(self, policy: Any, examples: Examples | Talks, *, share: float, generator: torch.Generator) -> Loss:
        """``share`` is this micro-batch's part of the batch, so that shares add up to the whole batch's loss."""
        ...
