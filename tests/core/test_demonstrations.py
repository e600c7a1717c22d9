"""Demonstrations of an expert whose actions say where they were taken, so that every window can be checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.config import MeasuringConfig
from mmrl.data.demonstrations import ExpertStream, ScriptedDemonstrations, record
from mmrl.errors import MMRLError
from mmrl.protocols import DataContext
from mmrl.types import ActionSpec, Examples, Observation, Step

HORIZON = 4
LIMIT = 6


def length_of(task: int) -> int:
    """Actions the expert needs; tasks with task % 5 == 4 it never solves."""
    return LIMIT if task % 5 == 4 else 1 + task % 4


class NumberedEnvironment:
    """In task i at step t the expert does (100 i + t); the camera shows t, the state says (i, t)."""

    max_steps = LIMIT
    action_spec = ActionSpec(1, (0.0,), (1.0,))

    def __init__(self, num_envs: int, solvable: bool = True) -> None:
        self.num_envs, self.solvable, self.closed = num_envs, solvable, False

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        self.tasks, self.clock = task_ids_B.tolist(), [0] * self.num_envs
        return self._observe()

    def _observe(self) -> Observation:
        state = torch.tensor([self.tasks, self.clock], dtype=torch.float64).T
        image = torch.tensor(self.clock, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
        return Observation(
            {"front": image.clone()}, state, tuple(f"{i}/{t}" for i, t in zip(self.tasks, self.clock, strict=True))
        )

    def expert_action(self) -> Tensor:
        return torch.tensor([[100 * i + t] for i, t in zip(self.tasks, self.clock, strict=True)], dtype=torch.float64)

    def step(self, actions_BCA: Tensor) -> Step:
        assert torch.equal(actions_BCA[:, 0], self.expert_action())
        valid, solved, late = [], [], []
        for slot, task in enumerate(self.tasks):
            valid.append(self.clock[slot] < length_of(task))
            self.clock[slot] += valid[-1]
            solved.append(self.solvable and task % 5 != 4 and self.clock[slot] == length_of(task))
            late.append(not solved[-1] and self.clock[slot] == length_of(task))
        ok = torch.tensor(solved)
        success = {"success": ok.float()}
        return Step(self._observe(), torch.zeros(self.num_envs, 1), torch.tensor(valid)[:, None], ok, torch.tensor(late), success)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("number",) * len(task_ids_M)

    def close(self) -> None:
        self.closed = True


def check(examples: Examples) -> list[tuple[int, int]]:
    """Every window against the definition; the (task, step) of each example."""
    assert examples.observation.state is not None
    where = [(int(i), int(t)) for i, t in examples.observation.state]
    for n, (task, t) in enumerate(where):
        last = length_of(task) - 1
        times = [t + h for h in range(HORIZON)]
        assert examples.actions_BHA[n, :, 0].tolist() == [100 * task + min(time, last) for time in times]
        assert examples.mask_BH[n].tolist() == [time <= last for time in times]
        assert examples.observation.instructions[n] == f"{task}/{t}"
        assert bool((examples.observation.images["front"][n] == t).all())
    return where


def test_a_recording_is_every_moment_with_the_actions_that_followed() -> None:
    tasks = torch.tensor([3, 4, 0, 2])
    everything = record(NumberedEnvironment(4), tasks, HORIZON, only_successes=False)
    assert check(everything) == [(i, t) for i in (3, 4, 0, 2) for t in range(length_of(i))]
    successes = record(NumberedEnvironment(4), tasks, HORIZON, only_successes=True)
    assert check(successes) == [(i, t) for i in (3, 0, 2) for t in range(length_of(i))]
    assert successes.actions_BHA.shape == (8, HORIZON, 1)


def test_rows_and_concat() -> None:
    one = record(NumberedEnvironment(2), torch.tensor([3, 2]), HORIZON, only_successes=True)
    assert check(one.select(torch.tensor([6, 0]))) == [(2, 2), (3, 0)]
    assert check(Examples.concat([one, one.select(torch.tensor([1]))])) == [
        *((3, t) for t in range(4)),
        *((2, t) for t in range(3)),
        (3, 1),
    ]


def test_an_environment_without_an_expert_is_refused() -> None:
    class Plain:
        num_envs = 1

    environment: Any = Plain()
    with pytest.raises(MMRLError, match="Plain has no scripted expert"):
        record(environment, torch.zeros(1).long(), HORIZON, only_successes=True)


def context(seed: int = 0, made: list[NumberedEnvironment] | None = None, solvable: bool = True) -> DataContext:
    def make(num_envs: int, overrides: Mapping[str, Any]) -> Any:
        assert overrides == {"domain": "real"}
        environment = NumberedEnvironment(num_envs, solvable)
        if made is not None:
            made.append(environment)
        return environment

    return DataContext(make, HORIZON, seed, torch.device("cpu"))


def demonstrations(seed: int = 0, **fields: Any) -> ScriptedDemonstrations:
    config = ScriptedDemonstrations.Config(**{"episodes": 7, "first_task": 10, "environment": {"domain": "real"}, **fields})
    return ScriptedDemonstrations(config, context=context(seed))


def stream(seed: int = 0, *, solvable: bool = True, **fields: Any) -> ExpertStream:
    config = ExpertStream.Config(**{"num_envs": 3, "buffer": 10, "first_task": 10, "environment": {"domain": "real"}, **fields})
    return ExpertStream(config, context=context(seed, solvable=solvable))


def test_few_demonstrations_are_drawn_from_for_ever() -> None:
    source = demonstrations()
    solved = [(i, t) for i in range(10, 17) if i % 5 != 4 for t in range(length_of(i))]
    assert len(source) == len(solved)
    counts = Counter(check(source.batch(40 * len(solved))))
    assert set(counts) == set(solved)
    assert max(counts.values()) < 40 * 2 and min(counts.values()) > 10  # about 40 each
    failures = demonstrations(only_successes=False)
    assert (14, 5) in set(check(failures.batch(2000)))


@pytest.mark.parametrize("seed", [1000, 1001, 123_456, 2**31])
def test_no_seed_demonstrates_what_is_evaluated(seed: int) -> None:
    first = ScriptedDemonstrations.Config(episodes=1).first_task
    state_N2 = (
        demonstrations(seed, episodes=500, first_task=first, num_envs=50, only_successes=False).batch(300).observation.state
    )
    assert state_N2 is not None and first <= state_N2[:, 0].min() and state_N2[:, 0].max() < MeasuringConfig().first_task


def test_another_seed_has_other_demonstrations() -> None:
    seen = [{task for task, _ in check(demonstrations(seed, only_successes=False).batch(500))} for seed in (0, 1, 0)]
    assert seen[0] == seen[2] == set(range(10, 17)) and seen[1] == set(range(17, 24))


def test_demonstrations_release_their_environment() -> None:
    made: list[NumberedEnvironment] = []
    config = ScriptedDemonstrations.Config(episodes=3, environment={"domain": "real"})
    ScriptedDemonstrations(config, context=context(made=made))
    assert [environment.closed for environment in made] == [True]


def test_only_failures_are_refused() -> None:
    with pytest.raises(MMRLError, match="every scripted demonstration failed"):
        demonstrations(episodes=1, first_task=14)


def test_a_stream_uses_every_moment_once_and_does_not_depend_on_the_batch_sizes() -> None:
    source = stream()
    parts = [check(source.batch(size)) for size in (3, 1, 20, 4, 9)]  # 20 is more than a buffer holds
    assert [len(part) for part in parts] == [3, 1, 20, 4, 9]
    together = [moment for part in parts for moment in part]
    assert len(set(together)) == 37
    assert check(stream().batch(37)) == together
    assert not any(task % 5 == 4 for task, _ in together)
    whole = [(i, t) for i in range(10, 100) if i % 5 != 4 for t in range(length_of(i))]
    assert {task for task, _ in together} <= {task for task, _ in whole[: 37 + 2 * 20]}  # no episodes are skipped
    assert together[:10] != sorted(together[:10])  # shuffled
    assert check(stream(seed=1).batch(5))[0][0] >= 100_000_000


@pytest.mark.parametrize("make", [stream, demonstrations])
@pytest.mark.parametrize("sizes", [(), (4,), (4, 30), (10,), (10, 1), (3, 3, 3, 3)])
def test_a_source_goes_on_from_its_state(make: Any, sizes: tuple[int, ...]) -> None:
    unbroken = make()
    for size in sizes:
        unbroken.batch(size)
    state = {name: tensor.clone() for name, tensor in unbroken.state_dict().items()}
    resumed = make()
    resumed.batch(25)  # whatever it did before; more than a buffer holds
    resumed.load_state_dict(state)
    saved_again = resumed.state_dict()
    assert saved_again.keys() == state.keys() and all(torch.equal(saved_again[name], state[name]) for name in state)
    for size in (2, 17, 8):
        assert check(resumed.batch(size)) == check(unbroken.batch(size))


def test_a_hopeless_expert_does_not_play_for_ever() -> None:
    with pytest.raises(MMRLError, match="solved none of 1000 episodes"):
        stream(solvable=False, num_envs=100).batch(1)
