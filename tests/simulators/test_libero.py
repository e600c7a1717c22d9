"""LIBERO: what its class adds to LIBERO's own environment. Small: building a scene takes seconds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mmrl.data.demonstrations import record
from mmrl.errors import MMRLError
from simulators.libero import Libero
from simulators.libero_parts.options import Options, limit
from simulators.maniskill_parts import options as maniskill

CPU = torch.device("cpu")
Make = Callable[..., Libero]


@pytest.fixture
def make(require: Callable[[str], None]) -> Iterator[Make]:
    require("robosuite")
    opened: list[Libero] = []

    def build(num_envs: int = 1, **fields: Any) -> Libero:
        config = Options(**{"suite": "libero_object", "tasks": (0,), "workers": 1, "render": False, **fields})
        opened.append(Libero(config, num_envs=num_envs, device=CPU))
        return opened[-1]

    yield build
    for environment in opened:
        environment.close()


def test_the_expert_s_demonstrations_and_the_state(make: Make) -> None:
    environment = make()
    examples = record(environment, torch.tensor([3]), 4, only_successes=True)
    assert 50 < len(examples) < 200 and examples.actions_BHA.abs().max() <= 1
    assert environment.family_of(torch.tensor([3])) == ("pick_up_the_alphabet_soup_and_place_it_in_the_basket",)
    assert examples.observation.instructions[0] == "pick up the alphabet soup and place it in the basket"
    state = examples.observation.state
    assert state is not None and state.shape[1] == 8
    # openpi's order: the hand (metres; it starts above the floor and carries things over the rim), its turn, both fingers.
    assert 0.1 < float(state[0, 2]) < 0.4 and float(state[:, 1].amax()) > 0.2
    assert float(state[0, 3:6].norm()) == pytest.approx(3.14, abs=0.1)  # the hand points down: half a turn
    assert state[0, 6:].tolist() == pytest.approx([0.039, -0.039], abs=0.005)  # open
    closed = state[examples.actions_BHA[:, 0, 6] > 0]
    assert float(closed[-1, 6]) < 0.036  # around the can
    # It lies in the basket: no action changes that, and the slot is done.
    step = environment.step(torch.zeros(1, 1, 7))
    assert step.terminated_B.all() and step.metrics["success"].tolist() == [1] and not step.valid_BC.any()


def test_pictures_are_the_right_way_up_and_mirrored_on_request(make: Make) -> None:
    seen = {mirror: make(render=True, mirror=mirror, image_size=64).reset(torch.tensor([0])) for mirror in (True, False)}
    for camera in ("agentview", "wrist"):
        assert torch.equal(seen[True].images[camera], seen[False].images[camera].flip(2))
    view = seen[False].images["agentview"][0].float().mean(2)
    # The robot, white on grey, stands at the back, which is up; a camera that looks at it has the basket (y > 0) on its right.
    lightness = view[8:20, 27:36].mean() - view[8:20, 2:12].mean()
    assert lightness > 20 and lightness > 20 + view.flip(0)[8:20, 27:36].mean() - view.flip(0)[8:20, 2:12].mean()
    assert view[28:40, 46:58].std() > 1.5 * view[28:40, 6:18].std()


def test_episodes_may_be_longer_than_robosuite_s_limit(require: Callable[[str], None]) -> None:
    require("robosuite")
    single = importlib.import_module("simulators.libero_parts.single").Single(
        Options(suite="libero_object", tasks=(0,), render=False, settle_steps=0, max_steps=2000)
    )
    try:
        single.reset(0)
        single._env.env.timestep = 999  # robosuite's limit is 1,000
        outcomes = [single.step(np.zeros(7)) for _ in range(3)]
    finally:
        single.close()
    assert not any(outcome.terminated or outcome.truncated for outcome in outcomes)


@pytest.mark.parametrize("options", [Options, maniskill.Options])
def test_a_seed_is_a_count(options: type) -> None:
    """numpy takes no other, and would say so from within a worker."""
    with pytest.raises(ValidationError, match="seed"):
        options(seed=-1)


def test_tasks_and_initial_states_in_turn(make: Make) -> None:
    environment = make(2, tasks=(6, 0), settle_steps=0)
    observation = environment.reset(torch.tensor([0, 3]))
    assert observation.instructions == (
        "pick up the butter and place it in the basket",
        "pick up the alphabet soup and place it in the basket",
    )
    assert observation.state is not None
    first = observation.state.clone()
    # Two tasks with fifty states each: number 100 plays what number 0 did.
    second = environment.reset(torch.tensor([100, 2])).state
    assert second is not None
    assert torch.allclose(first[0], second[0], atol=1e-6) and not torch.allclose(first[0], second[1], atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"suite": "libero_spacial"},
            "environment.suite = libero_spacial: LIBERO has none so called; did you mean 'libero_spatial'",
        ),
        ({"tasks": (3, 10)}, "'environment.tasks' must be numbers below 10"),
        (
            {"suite": "libero_goal_temp", "tasks": (0,)},
            r"(initial states .* not installed|none so called|at least one|numbers below)",
        ),
    ],
    ids=str,
)
def test_what_does_not_exist_is_named(make: Make, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(MMRLError, match=match):
        make(**fields)


def test_a_perturbed_suite(make: Make) -> None:
    environment = make(suite="libero_goal_swap", tasks=(1,))
    assert environment.max_steps == 300
    assert environment.reset(torch.tensor([0])).instructions[0]
    with pytest.raises(MMRLError, match="no scripted expert"):
        environment.expert_action()


def test_step_limits() -> None:
    assert [limit(Options(suite=suite)) for suite in ("libero_spatial", "libero_10", "libero_10_swap", "libero_90")] == [
        220,
        520,
        520,
        400,
    ]
    assert limit(Options(suite="libero_goal", max_steps=7)) == 7
