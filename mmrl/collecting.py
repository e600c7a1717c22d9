"""Recording episodes as a data set: ``mmrl collect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from mmrl.building import choose_device
from mmrl.component import Component
from mmrl.config import Block, device_name
from mmrl.errors import ConfigError, MMRLError
from mmrl.numerics.draws import Draws
from mmrl.progress import Progress
from mmrl.protocols import Environment, EpisodeSink, ExpertEnvironment
from mmrl.seeding import configure_torch, derive_seed
from mmrl.types import Episode, Observation

HOPELESS = 1000  # failed episodes in a row after which there is no point in waiting for a success

_CPU = torch.device("cpu")
# An observation of all slots, their tasks, and how many decisions their episodes have -> the actions to execute [B, C, A].
Act = Callable[[Observation, Tensor, int], Tensor]


class _Moment(NamedTuple):
    """One action of all slots: what was seen before it, and whether it belongs to the slot's episode."""

    observation: Observation
    action_BA: Tensor
    rewards_B: Tensor
    valid_B: Tensor


class CollectionConfig(Block):
    """Everything that determines a recorded data set."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$")]
    """The data set's folder under ``output``."""
    output: str = "datasets"
    """The folder that holds data sets."""
    seed: NonNegativeInt = 0
    """Source of the policy's random numbers."""
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:1."""
    threads: PositiveInt | None = None
    """Torch's threads within an operation; null leaves torch's choice."""
    environment: Component
    """Where the episodes are played."""
    policy: Component | None = None
    """Who plays them; null: the environment's scripted expert."""
    explore: bool = False
    """Whether the policy draws its actions at random, as in training, instead of taking its best."""
    episodes: PositiveInt
    """Episodes to save."""
    only_successes: bool = True
    """Save no failures; others are played instead of them."""
    num_envs: PositiveInt = 64
    """Environments that run in lock-step."""
    first_task: NonNegativeInt = 500_000
    """Task id of the first episode."""
    data: Component
    """What the episodes are kept in, such as ``mmrl.data.lerobot_write:LeRobotWriter``."""


def collect(config: CollectionConfig, progress: Progress) -> Path:
    """Play and save the episodes; the data set's folder, which appears whole or not at all."""
    configure_torch(config.threads, deterministic=False)
    device = choose_device(config.device)
    folder = Path(config.output) / config.name
    if not callable(getattr(config.data.cls, "add", None)):
        raise ConfigError(f"'data.target' ({config.data.target}) keeps no episodes; use mmrl.data.lerobot_write:LeRobotWriter")
    sink: EpisodeSink = config.data.build(folder, name=config.environment.target.rpartition(":")[2].lower())
    environment: Environment = config.environment.build(num_envs=min(config.num_envs, config.episodes), device=device)
    try:
        act = _actor(config, environment, device)
        with sink, progress.task("collecting", config.episodes) as advance:
            for episode in _wanted(config, environment, act, device):
                sink.add(episode)
                advance(1)
            sink.finish()
    finally:
        environment.close()
    return folder


def _actor(config: CollectionConfig, environment: Environment, device: torch.device) -> Act:
    if config.policy is not None:
        policy: Any = config.policy.build(device=device)
        seed = derive_seed(config.seed, "collect")

        def act(observation: Observation, task_ids_B: Tensor, decision: int) -> Tensor:
            return policy.act(observation, Draws.of(seed, task_ids_B, decision), explore=config.explore).action

        return act
    if config.explore:
        raise ConfigError("'explore' is true, but there is no 'policy': the scripted expert draws nothing; name a policy")
    if not isinstance(environment, ExpertEnvironment):
        raise ConfigError(f"'policy' is missing, and {config.environment.target} has no scripted expert; name a policy")
    expert: ExpertEnvironment = environment
    return lambda observation, task_ids_B, decision: expert.expert_action()[:, None]


def _wanted(config: CollectionConfig, environment: Environment, act: Act, device: torch.device) -> Iterator[Episode]:
    """``config.episodes`` episodes, in the order of their task ids."""
    task, found, failures = config.first_task, 0, 0
    while found < config.episodes:
        task_ids_B = torch.arange(task, task + environment.num_envs, device=device)
        task += environment.num_envs
        for episode in play(environment, act, task_ids_B):
            failures = 0 if episode.success else failures + 1
            if episode.success or not config.only_successes:
                yield episode
                found += 1
                if found == config.episodes:
                    return
        if config.only_successes and failures >= HOPELESS:
            raise MMRLError(f"none of the last {failures} episodes succeeded; raise the time limit or set only_successes: false")


@torch.no_grad()
def play(environment: Environment, act: Act, task_ids_B: Tensor) -> list[Episode]:
    """One episode per slot, whole. Chunks are executed one action at a time, so that every moment is seen.

    An episode that the simulator lost is left out.
    """
    observation, moments = environment.reset(task_ids_B), []
    running_B = torch.ones(environment.num_envs, dtype=torch.bool)
    success_B, terminated_B, lost_B = (torch.zeros_like(running_B) for _ in range(3))
    for decision in count():
        if not bool(running_B.any()):
            break
        for action_B1A in act(observation, task_ids_B, decision).split(1, dim=1):
            step = environment.step(action_B1A)
            valid_B = running_B & step.valid_BC[:, 0].cpu()
            moments.append(
                _Moment(observation.to(_CPU), action_B1A[:, 0].float().cpu(), step.rewards_BC[:, 0].float().cpu(), valid_B)
            )
            success_B = torch.where(running_B, (step.metrics["success"] > 0.5).cpu(), success_B)
            terminated_B = torch.where(running_B, step.terminated_B.cpu(), terminated_B)
            lost_B |= running_B & step.lost_B.cpu()
            running_B = running_B & ~step.done_B.cpu()
            observation = step.observation
    ends = zip(task_ids_B.tolist(), success_B.tolist(), terminated_B.tolist(), strict=True)
    return [_episode(moments, slot, *end) for slot, end in enumerate(ends) if not bool(lost_B[slot])]


def _episode(moments: list[_Moment], slot: int, task_id: int, success: bool, terminated: bool) -> Episode:
    """What happened in one slot while its episode lasted."""
    own = [moment for moment in moments if bool(moment.valid_B[slot])]
    return Episode(
        observation=Observation.concat([moment.observation.select(torch.tensor([slot])) for moment in own]),
        actions_TA=torch.stack([moment.action_BA[slot] for moment in own]),
        rewards_T=torch.stack([moment.rewards_B[slot] for moment in own]),
        success=success,
        terminated=terminated,
        task_id=task_id,
    )
