"""Interrupted demonstrations against a naive loop over what an environment saw executed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.data.demonstrations import ExpertStream, Interruptions, ScriptedDemonstrations, record
from mmrl.protocols import DataContext
from mmrl.types import ActionSpec, Examples, Observation, Step

HORIZON, LIMIT = 3, 40


class Line:
    """A point on a line that the expert walks home in steps of at most 0.5; the state is (task, time, place)."""

    max_steps = LIMIT
    action_spec = ActionSpec(2, (-1.0, 2.0), (1.0, 3.0))  # the second entry does nothing; the expert's is 2.5

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        self.task_B, self.time_B = task_ids_B.double(), torch.zeros(self.num_envs).double()
        self.place_B = 3 + task_ids_B.double() % 4
        self.executed: list[Tensor] = []
        self.wanted: list[Tensor] = []
        return self._observe()

    def _observe(self) -> Observation:
        return Observation({}, torch.stack([self.task_B, self.time_B, self.place_B], 1), ("go home",) * self.num_envs)

    def _home(self) -> Tensor:
        return self.place_B.abs() < 0.2

    def expert_action(self) -> Tensor:
        return torch.stack([-self.place_B.clamp(-0.5, 0.5), torch.full_like(self.place_B, 2.5)], 1).float()

    def step(self, actions_BCA: Tensor) -> Step:
        alive_B = ~self._home()
        self.wanted.append(self.expert_action())
        self.executed.append(actions_BCA[:, 0])
        self.place_B = torch.where(alive_B, self.place_B + actions_BCA[:, 0, 0], self.place_B)
        self.time_B = self.time_B + alive_B
        home_B = self._home()
        return Step(
            self._observe(),
            torch.zeros(self.num_envs, 1),
            alive_B[:, None],
            home_B,
            ~home_B & (self.time_B >= LIMIT),
            {"success": home_B.float()},
        )

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return ("line",) * len(task_ids_M)

    def close(self) -> None:
        pass


def recorded(num_envs: int, chance: float, longest: int, **options: Any) -> tuple[Line, Examples]:
    environment, generator = Line(num_envs), torch.Generator().manual_seed(3)
    options = {"only_successes": False, "interruptions": Interruptions(chance, longest), "generator": generator, **options}
    return environment, record(environment, torch.arange(num_envs), HORIZON, **options)


def own_moments(environment: Line, slot: int) -> list[bool]:
    """At which steps of its episode the slot did what the expert wanted."""
    length = int(environment.time_B[slot])
    pairs = zip(environment.executed[:length], environment.wanted[:length], strict=True)
    return [torch.equal(done[slot], wanted[slot]) for done, wanted in pairs]


def test_only_the_experts_own_actions_are_imitated_up_to_the_next_burst() -> None:
    environment, examples = recorded(50, 0.1, 4)
    expected = []
    for slot in range(50):
        own = own_moments(environment, slot)
        for t in (t for t, mine in enumerate(own) if mine):
            run = next((s for s in range(t, len(own)) if not own[s]), len(own))
            actions = [environment.wanted[min(t + h, run - 1)][slot].tolist() for h in range(HORIZON)]
            expected.append((slot, t, actions, [t + h < run for h in range(HORIZON)]))
    assert examples.observation.state is not None
    rows = zip(examples.observation.state.tolist(), examples.actions_BHA.tolist(), examples.mask_BH.tolist(), strict=True)
    assert [(int(state[0]), int(state[1]), actions, mask) for state, actions, mask in rows] == expected
    assert {mask for _, _, _, flags in expected for mask in flags} == {True, False}


def test_bursts_hold_one_random_action_within_the_bounds_and_come_as_often_as_asked() -> None:
    environment, _ = recorded(1000, 0.05, 3)
    lengths, chances, begun, values = [], 0, 0, []
    for slot in range(1000):
        own = own_moments(environment, slot)
        steps = [environment.executed[t][slot] for t in range(len(own))]
        bursts = [
            (key, len(list(run)))
            for key, run in groupby([None if mine else tuple(a.tolist()) for mine, a in zip(own, steps, strict=True)])
        ]
        whole = bursts[:-1]  # the end of an episode cuts its last burst
        lengths += [size for key, size in whole if key is not None]
        values += [key for key, _ in whole if key is not None]
        begun += sum(key is not None for key, _ in bursts)
        chances += sum(own) + sum(key is not None for key, _ in bursts)
    counts = torch.bincount(torch.tensor(lengths), minlength=4)
    assert counts[0] == 0 and len(counts) == 4
    assert (counts[1:] / len(lengths)).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    assert begun / chances == pytest.approx(0.05, abs=0.006)
    low, high = torch.tensor(values).aminmax(dim=0)
    assert low.tolist() == pytest.approx([-1, 2], abs=0.02) and high.tolist() == pytest.approx([1, 3], abs=0.02)


def test_without_interruptions_every_action_is_the_experts() -> None:
    environment, examples = recorded(6, 0.5, 1, interruptions=None, generator=None)
    assert all(all(own_moments(environment, slot)) for slot in range(6))
    assert len(examples) == int(environment.time_B.sum())


def context(seed: int = 0) -> DataContext:
    def make(num_envs: int, overrides: Mapping[str, Any]) -> Any:
        return Line(num_envs)

    return DataContext(make, HORIZON, seed, torch.device("cpu"))


@pytest.mark.parametrize("used", [0, 5, 64, 90])
def test_an_interrupted_stream_goes_on_from_its_state_bit_for_bit(used: int) -> None:
    config = ExpertStream.Config(num_envs=4, buffer=64, interruptions=Interruptions(0.2, 2))
    unbroken, resumed = ExpertStream(config, context=context()), ExpertStream(config, context=context())
    if used:
        unbroken.batch(used)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in unbroken.state_dict().items()})
    for _ in range(3):
        one, other = unbroken.batch(40), resumed.batch(40)
        assert torch.equal(one.actions_BHA, other.actions_BHA) and torch.equal(one.mask_BH, other.mask_BH)
        assert one.observation.state is not None and other.observation.state is not None
        assert torch.equal(one.observation.state, other.observation.state)


def test_few_demonstrations_can_be_interrupted() -> None:
    config = ScriptedDemonstrations.Config(episodes=20, interruptions=Interruptions(0.3, 2))
    plain = ScriptedDemonstrations.Config(episodes=20)
    masks = [ScriptedDemonstrations(c, context=context()).batch(400).mask_BH.float().mean() for c in (config, plain)]
    assert masks[0] < masks[1] - 0.1
