"""What every environment promises (mmrl.protocols), over every implementation. A new simulator adds one line to ENVIRONMENTS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.protocols import Environment, ExpertEnvironment
from mmrl.registry import resolve
from mmrl.types import Observation, Step
from mmrl.workers.environment import WorkerEnvironment
from mmrl.workers.remote import RemoteEnvironment
from simulators.tabletop import Tabletop
from tests.core.counting import Config as CountingConfig

CPU = torch.device("cpu")
_SHORT = {"reach": 12, "push": 7, "pick_place": 9, "sort": 11}


def _tabletop(num_envs: int, **fields: Any) -> Tabletop:
    return Tabletop(Tabletop.Config(image_size=32, max_steps=_SHORT, **fields), num_envs=num_envs, device=CPU)


def _gymnasium(name: str, **fields: Any) -> Callable[[int], Any]:
    """Found by name, because gymnasium is an extra."""

    def build(num_envs: int) -> Any:
        cls: Any = resolve("simulators.gymnasium:Gymnasium")
        return cls(cls.Config(id=name, **fields), num_envs=num_envs, device=CPU)

    return build


def _workers(num_envs: int) -> WorkerEnvironment:
    return WorkerEnvironment("tests.core.counting:Counting", CountingConfig(), num_envs=num_envs, device=CPU, workers=2)


def _remote(target: str, **fields: Any) -> Callable[[int], Any]:
    def build(num_envs: int) -> RemoteEnvironment:
        cls: Any = resolve(target)
        return RemoteEnvironment(target, cls.Config(**fields), num_envs=num_envs, device=CPU)

    return build


# name -> a small, short environment of so many slots
ENVIRONMENTS: dict[str, Callable[[int], Any]] = {
    "tabletop": lambda num_envs: _tabletop(num_envs),
    "tabletop, real domain, dense reward, two cameras": lambda num_envs: _tabletop(
        num_envs, domain="real", reward="dense", wrist_camera=True
    ),
    "gymnasium: CartPole": _gymnasium("CartPole-v1", max_steps=14),
    "gymnasium: Pendulum": _gymnasium("Pendulum-v1", max_steps=10),
    "gymnasium: several choices and images": _gymnasium("tests.simulators.pixels:Pixels-v0"),
    "gymnasium in workers: Pendulum": _gymnasium("Pendulum-v1", max_steps=10, workers=2),
    "gymnasium in workers: several choices and images": _gymnasium("tests.simulators.pixels:Pixels-v0", workers=2),
    "single environments in workers": _workers,
    "tabletop in a process of its own": _remote("simulators.tabletop:Tabletop", image_size=32, max_steps=_SHORT),
    "gymnasium in a process of its own": _remote("simulators.gymnasium:Gymnasium", id="Pendulum-v1", max_steps=10),
}
# name -> the package that must be installed
NEEDS = {name: "gymnasium" for name in ENVIRONMENTS if name.startswith("gymnasium")}
TASKS = torch.tensor([7, 3, 11, 8, 20])


@pytest.fixture(params=list(ENVIRONMENTS))
def make(request: pytest.FixtureRequest, installed: Callable[[str], None]) -> Iterator[Callable[[int], Any]]:
    if request.param in NEEDS:
        installed(NEEDS[request.param])
    opened: list[Environment] = []

    def build(num_envs: int) -> Environment:
        opened.append(ENVIRONMENTS[request.param](num_envs))
        return opened[-1]

    yield build
    for environment in opened:
        environment.close()


def actions_for(environment: Environment, tasks_B: Tensor, moment: int, count: int = 1) -> Tensor:
    """Random actions [B, C, A] within the bounds (whole numbers where they are choices), the same for a task and a moment."""
    low, high = torch.tensor(environment.action_spec.low), torch.tensor(environment.action_spec.high)
    rows = []
    for task in tasks_B.tolist():
        draws = [torch.rand(len(low), generator=torch.Generator().manual_seed(1000 * task + moment + c)) for c in range(count)]
        chosen = torch.stack([low + (high - low) * draw for draw in draws])
        rows.append(chosen.round() if environment.action_spec.discrete else chosen)
    return torch.stack(rows)


def rows(observation: Observation, index: list[int]) -> Observation:
    return observation.select(torch.tensor(index))


def assert_same_observation(ours: Observation, theirs: Observation) -> None:
    assert ours.instructions == theirs.instructions
    assert ours.images.keys() == theirs.images.keys()
    for camera, image in ours.images.items():
        assert torch.equal(image, theirs.images[camera]), camera
    if ours.state is not None or theirs.state is not None:
        assert ours.state is not None and theirs.state is not None and torch.equal(ours.state, theirs.state)


def assert_same_step(ours: Step, theirs: Step, our_rows: list[int], their_rows: list[int]) -> None:
    assert_same_observation(rows(ours.observation, our_rows), rows(theirs.observation, their_rows))
    for name in ("rewards_BC", "valid_BC", "terminated_B", "truncated_B"):
        assert torch.equal(getattr(ours, name)[our_rows], getattr(theirs, name)[their_rows]), name
    for name, value in ours.metrics.items():
        assert torch.equal(value[our_rows], theirs.metrics[name][their_rows]), name


def has_expert(environment: Any) -> bool:
    return isinstance(environment, ExpertEnvironment)


def play(environment: Any, tasks_B: Tensor, *, expert: bool = False) -> list[Step]:
    """One whole episode in every slot, by the scripted expert where there is one and ``expert``."""
    guided = expert and has_expert(environment)
    environment.reset(tasks_B)
    steps: list[Step] = []
    while not steps or not bool(steps[-1].done_B.all()):
        assert len(steps) < environment.max_steps, "an episode outlives max_steps"
        action = environment.expert_action()[:, None] if guided else actions_for(environment, tasks_B, len(steps))
        steps.append(environment.step(action))
    return steps


# -- episodes ----------------------------------------------------------------------------------------------------------


def test_it_keeps_the_protocol(make: Callable[[int], Any]) -> None:
    environment = make(5)
    assert isinstance(environment, Environment)
    assert environment.num_envs == 5 and environment.max_steps > 0
    assert all(low < high for low, high in zip(environment.action_spec.low, environment.action_spec.high, strict=True))
    observation = environment.reset(TASKS)
    assert observation.batch_size == 5 and all(observation.instructions)


def test_a_task_is_the_same_episode_in_any_slot_of_any_batch(make: Callable[[int], Any]) -> None:
    many, few = make(5), make(3)
    twice_B = torch.tensor([11, 7, 11])
    first, second = many.reset(TASKS), few.reset(twice_B)
    ours, theirs = [2, 0, 2], [0, 1, 2]
    assert_same_observation(rows(first, ours), rows(second, theirs))
    for moment in range(many.max_steps):
        steps = many.step(actions_for(many, TASKS, moment)), few.step(actions_for(few, twice_B, moment))
        assert_same_step(*steps, ours, theirs)


def test_different_tasks_are_different_episodes(make: Callable[[int], Any]) -> None:
    observation = make(5).reset(TASKS)
    pictures = [tuple(int(image[b].long().sum()) for image in observation.images.values()) for b in range(5)]
    states = [() if observation.state is None else tuple(observation.state[b].tolist()) for b in range(5)]
    assert len(set(pictures if observation.images else states)) == 5


def test_an_episode_does_not_depend_on_what_was_played_before(make: Callable[[int], Any]) -> None:
    used, fresh = make(5), make(5)
    play(used, TASKS + 100)
    assert_same_observation(used.reset(TASKS), fresh.reset(TASKS))
    for moment in range(4):
        action = actions_for(used, TASKS, moment)
        assert_same_step(used.step(action), fresh.step(action), list(range(5)), list(range(5)))


def test_the_global_generator_is_neither_read_nor_moved(make: Callable[[int], Any]) -> None:
    first, second = make(5), make(5)
    torch.manual_seed(1)
    seen = first.reset(TASKS)
    step = first.step(actions_for(first, TASKS, 0))
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    assert_same_observation(second.reset(TASKS), seen)
    assert_same_step(second.step(actions_for(second, TASKS, 0)), step, list(range(5)), list(range(5)))


def test_resetting_some_slots_leaves_the_others_alone(make: Callable[[int], Any]) -> None:
    broken, whole, fresh = make(5), make(5), make(5)
    broken.reset(TASKS)
    whole.reset(TASKS)
    for moment in range(3):
        action = actions_for(broken, TASKS, moment)
        before, _ = broken.step(action), whole.step(action)
    kept, restarted = [0, 2, 4], [1, 3]
    where_B = torch.tensor([False, True, False, True, False])
    next_B = torch.where(where_B, TASKS + 50, TASKS)
    observation, start = broken.reset(next_B, where_B), fresh.reset(next_B)
    assert_same_observation(rows(observation, kept), rows(before.observation, kept))
    assert_same_observation(rows(observation, restarted), rows(start, restarted))
    for moment in range(3, 9):
        step = broken.step(actions_for(broken, next_B, moment))
        assert_same_step(step, whole.step(actions_for(whole, TASKS, moment)), kept, kept)
        assert_same_step(step, fresh.step(actions_for(fresh, next_B, moment)), restarted, restarted)


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_chunk_is_its_actions_one_by_one(make: Callable[[int], Any]) -> None:
    chunked, single = make(5), make(5)
    chunked.reset(TASKS)
    single.reset(TASKS)
    size, moment = 3, 0
    while moment < chunked.max_steps:
        action = actions_for(chunked, TASKS, moment, size)
        step = chunked.step(action)
        parts = [single.step(action[:, c : c + 1]) for c in range(size)]
        assert torch.equal(step.rewards_BC, torch.cat([p.rewards_BC for p in parts], 1))
        assert torch.equal(step.valid_BC, torch.cat([p.valid_BC for p in parts], 1))
        assert_same_observation(step.observation, parts[-1].observation)
        assert torch.equal(step.terminated_B, parts[-1].terminated_B)
        assert torch.equal(step.truncated_B, parts[-1].truncated_B)
        for name, value in step.metrics.items():
            assert torch.equal(value, parts[-1].metrics[name]), name
        moment += size
    assert not step.valid_BC.all(), "no episode ended inside a chunk"


def test_slots_that_are_done_are_frozen(make: Callable[[int], Any]) -> None:
    environment = make(5)
    last = play(environment, TASKS)[-1]
    for moment in range(3):
        step = environment.step(actions_for(environment, TASKS, 500 + moment, 2))
        assert not step.valid_BC.any() and not step.rewards_BC.any()
        assert_same_observation(step.observation, last.observation)
        assert torch.equal(step.terminated_B, last.terminated_B) and torch.equal(step.truncated_B, last.truncated_B)
        for name, value in step.metrics.items():
            assert torch.equal(value, last.metrics[name]), name


@pytest.mark.parametrize("expert", [True, False])
def test_every_episode_ends_in_exactly_one_way_within_max_steps(make: Callable[[int], Any], expert: bool) -> None:
    environment = make(16)
    steps = play(environment, torch.arange(16), expert=expert)
    ended_B = torch.zeros(16, dtype=torch.bool)
    for step in steps:
        assert not (step.terminated_B & step.truncated_B).any()
        assert torch.equal(step.valid_BC[:, 0], ~ended_B), "an action is valid as long as its slot was not done before it"
        assert (step.done_B | ~ended_B).all(), "an episode came back to life"
        assert not step.rewards_BC[ended_B].any()
        ended_B = step.done_B
    assert ended_B.all() and steps[-1].truncated_B.any()
    if expert and has_expert(environment):
        assert steps[-1].terminated_B.any(), "the expert solves none of sixteen tasks"


def test_success_is_zero_or_one_and_metrics_are_finite(make: Callable[[int], Any]) -> None:
    environment = make(16)
    for step in play(environment, torch.arange(16), expert=True):
        success_B = step.metrics["success"]
        assert success_B.is_floating_point() and ((success_B == 0) | (success_B == 1)).all()
        assert all(value.shape == (16,) and value.isfinite().all() for value in step.metrics.values())
        assert step.rewards_BC.isfinite().all()


def test_observations_are_not_written_to_afterwards(make: Callable[[int], Any]) -> None:
    """A rollout keeps every observation; the next step must not draw into it."""
    environment = make(5)
    first = environment.reset(TASKS)
    copies = {camera: image.clone() for camera, image in first.images.items()}
    state = None if first.state is None else first.state.clone()
    sentences = tuple(first.instructions)
    second = environment.step(actions_for(environment, TASKS, 0)).observation
    kept = {camera: image.clone() for camera, image in second.images.items()}
    environment.step(actions_for(environment, TASKS, 1))
    environment.reset(TASKS + 50, torch.tensor([True, False, True, False, True]))
    assert all(torch.equal(first.images[camera], image) for camera, image in copies.items())
    assert all(torch.equal(second.images[camera], image) for camera, image in kept.items())
    assert state is None or (first.state is not None and torch.equal(first.state, state))
    assert first.instructions == sentences


def test_actions_out_of_bounds_are_clamped_or_refused(make: Callable[[int], Any]) -> None:
    wild, tame = make(5), make(5)
    wild.reset(TASKS)
    tame.reset(TASKS)
    low, high = torch.tensor(wild.action_spec.low), torch.tensor(wild.action_spec.high)
    for moment in range(3):
        action = 4 * actions_for(wild, TASKS, moment)
        bounded = action.clamp(low, high)
        assert not torch.equal(action, bounded)
        try:
            step = wild.step(action)
        except ValueError:
            return
        assert_same_step(step, tame.step(bounded), list(range(5)), list(range(5)))


@pytest.mark.parametrize("shape", [(5, 1, 99), (4, 1, None), (5, None)], ids=str)
def test_actions_of_another_shape_are_refused(make: Callable[[int], Any], shape: tuple[int | None, ...]) -> None:
    environment = make(5)
    environment.reset(TASKS)
    sizes = [environment.action_spec.dim if size is None else size for size in shape]
    with pytest.raises(ValueError, match="shape"):
        environment.step(torch.zeros(sizes))


def test_each_task_has_one_family(make: Callable[[int], Any]) -> None:
    environment = make(3)
    tasks = torch.arange(40)
    families = environment.family_of(tasks)
    assert len(families) == 40 and all(families)
    assert environment.family_of(tasks.flip(0)) == families[::-1]
    assert environment.family_of(tasks[:0]) == ()
    play(environment, torch.tensor([1, 2, 3]))
    assert environment.family_of(tasks) == families
