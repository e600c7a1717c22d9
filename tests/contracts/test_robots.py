"""What every environment promises, for simulators that take seconds to build: one small test of each, with two slots.

``test_environments.py`` asks the rest of the machinery that they share (mmrl.workers), of an environment that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmrl.protocols import Environment, ExpertEnvironment, RenderEnvironment
from simulators.libero import Libero
from simulators.maniskill import ManiSkill
from tests.contracts.test_environments import actions_for, assert_same_observation, assert_same_step, rows

CPU = torch.device("cpu")
# name -> (what the doctor calls what it needs, a small environment of two slots in one worker)
ROBOTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "maniskill": (
        "vulkan",
        lambda: ManiSkill(ManiSkill.Config(task="PickCube-v1", image_size=32, workers=1, max_steps=5), num_envs=2, device=CPU),
    ),
    "libero": (
        "robosuite",
        lambda: Libero(Libero.Config(tasks=(0,), image_size=32, workers=1, max_steps=5, settle_steps=2), num_envs=2, device=CPU),
    ),
}


@pytest.mark.parametrize("name", ROBOTS)
def test_robots_keep_the_contract(name: str, require: Callable[[str], None]) -> None:
    needs, make = ROBOTS[name]
    require(needs)
    environment = make()
    try:
        assert isinstance(environment, Environment)
        assert isinstance(environment, ExpertEnvironment) and isinstance(environment, RenderEnvironment)
        tasks, swapped = torch.tensor([7, 3]), torch.tensor([3, 7])
        first = environment.reset(tasks)
        assert all(first.instructions) and environment.family_of(tasks) == environment.family_of(swapped)[::-1]
        pictures = list(first.images.values())
        assert pictures and all(image.float().std() > 5 for image in pictures), "a camera shows nothing"
        assert not any(torch.equal(image[0], image[1]) for image in pictures), "two tasks look alike"
        copies = [image.clone() for image in pictures]
        # Chunks that run over the time limit: they end there, and nothing moves afterwards.
        steps = [environment.step(actions_for(environment, tasks, moment, 2)) for moment in (0, 2, 4, 6)]
        assert [step.valid_BC.tolist() for step in steps] == [[[True] * 2] * 2] * 2 + [[[True, False]] * 2, [[False] * 2] * 2]
        assert steps[2].truncated_B.all() and not steps[2].terminated_B.any()
        assert_same_step(steps[3], _without_actions(steps[2], steps[3]), [0, 1], [0, 1])
        # The same episodes in the other slots, after something else was played.
        again = environment.reset(swapped)
        assert_same_observation(rows(again, [1, 0]), first)
        for moment, before in zip((0, 2), steps, strict=False):
            assert_same_step(environment.step(actions_for(environment, swapped, moment, 2)), before, [1, 0], [0, 1])
        # Starting one slot anew leaves the other alone.
        partly = environment.reset(torch.tensor([7, 7]), torch.tensor([True, False]))
        assert_same_observation(rows(partly, [0, 1]), _join(rows(first, [0]), rows(steps[1].observation, [0])))
        assert all(torch.equal(image, copy) for image, copy in zip(pictures, copies, strict=True)), "written to afterwards"
        assert environment.render_video(torch.tensor([0])).float().std() > 5
    finally:
        environment.close()


def _without_actions(last: Any, shape: Any) -> Any:
    """The step that should follow the end: what ``last`` showed, and nothing executed."""
    return type(last)(
        last.observation,
        torch.zeros_like(shape.rewards_BC),
        torch.zeros_like(shape.valid_BC),
        last.terminated_B,
        last.truncated_B,
        last.metrics,
    )


def _join(first: Any, second: Any) -> Any:
    return type(first).concat([first, second])
