"""ManiSkill: what its class adds to ManiSkill's own environment, which is the oracle. Small: a robot is built for every reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.data.demonstrations import record
from mmrl.errors import MMRLError
from mmrl.types import Observation
from mmrl.workers.environment import WorkerEnvironment
from simulators.maniskill import ManiSkill
from simulators.maniskill_parts.options import INSTRUCTIONS, Options, in_words, sentences

CPU = torch.device("cpu")
EXPERTS = ("PushCube-v1", "PullCube-v1", "PickCube-v1", "StackCube-v1", "PlaceSphere-v1")
Make = Callable[..., ManiSkill]


@pytest.fixture
def make(require: Callable[[str], None]) -> Iterator[Make]:
    opened: list[ManiSkill] = []

    def build(num_envs: int = 1, **fields: Any) -> ManiSkill:
        require("vulkan" if fields.get("render", False) else "mani_skill")
        config = Options(**{"render": False, "workers": 1, "image_size": 32, **fields})
        opened.append(ManiSkill(config, num_envs=num_envs, device=CPU))
        return opened[-1]

    yield build
    for environment in opened:
        environment.close()


def images_of(observation: Observation) -> Tensor:
    assert list(observation.images) == ["base_camera"]
    return observation.images["base_camera"]


def test_images_show_the_scene_and_actions_move_it(make: Make) -> None:
    environment = make(2, task="PushCube-v1", render=True, image_size=96)
    first = environment.reset(torch.tensor([3, 4]))
    picture = images_of(first)
    assert picture.shape == (2, 96, 96, 3) and picture.float().std() > 10
    # The cube is blue, and lies elsewhere in another episode.
    blue_BHW = (picture[..., 2].int() - picture[..., 0].int()) > 40
    assert blue_BHW.flatten(1).sum(1).min() > 3 and not torch.equal(blue_BHW[0], blue_BHW[1])
    up = torch.tensor([[[0.0, 0, 1, 0, 0, 0, 1]], [[0.0, 0, 0, 0, 0, 0, 1]]])
    step = environment.step(up.expand(-1, 3, -1))
    moved_B = (images_of(step.observation).float() - picture.float()).abs().mean((1, 2, 3))
    assert float(moved_B[0]) > 2 * float(moved_B[1])
    assert environment.render_video(torch.tensor([1])).shape == (1, 256, 256, 3)
    again = environment.reset(torch.tensor([4, 3]))
    assert torch.equal(images_of(again), picture.flip(0))


def test_the_state_is_the_robot_s_and_the_goal_is_in_it(make: Make) -> None:
    environment = make(task="PickCube-v1")
    observation = environment.reset(torch.tensor([5]))
    assert observation.state is not None and observation.images == {}
    joints = observation.state[0, :9]
    assert joints[7:] == pytest.approx([0.04, 0.04], abs=1e-3)  # an open Panda hand, in metres
    step = environment.step(torch.tensor([[[0.0, 0, 0, 0, 0, 0, -1]] * 3]))
    assert step.observation.state is not None
    assert float(step.observation.state[0, 7]) < 0.03  # -1 closes it
    # Joint positions and velocities, whether it holds something, the hand's pose, and where the cube is to go.
    assert observation.state.shape[1] == 9 + 9 + 1 + 7 + 3
    assert observation.instructions[0] in INSTRUCTIONS["PickCube-v1"]


@pytest.mark.parametrize("task", EXPERTS)
def test_the_experts_solve_their_tasks(make: Make, task: str) -> None:
    """`python benchmarks/experts.py` measures how often."""
    environment = make(2, task=task)
    examples = record(environment, torch.tensor([0, 1]), 1, only_successes=False)
    assert examples.actions_BHA.abs().max() <= 1
    step = environment.step(torch.zeros(2, 1, 7))
    assert step.terminated_B.all() and step.metrics["success"].tolist() == [1, 1] and not step.valid_BC.any()


def test_an_expert_for_the_position_controller(make: Make) -> None:
    environment = make(task="PullCube-v1", control_mode="pd_ee_delta_pos", reward="dense", expert_speed=0.7)
    assert environment.action_spec.dim == 4
    environment.reset(torch.tensor([2]))
    rewards, done = [], False
    while not done:
        action = environment.expert_action()
        assert float(action[:, :3].norm()) <= 0.7001
        step = environment.step(action[:, None])
        rewards.append(float(step.rewards_BC))
        done = bool(step.done_B)
    assert bool(step.terminated_B)
    assert rewards[-1] == pytest.approx(1.0) and 0 < rewards[0] < 0.5  # ManiSkill's dense reward is 1 on success
    other = make(task="PullCube-v1", control_mode="pd_joint_delta_pos")
    other.reset(torch.tensor([2]))
    with pytest.raises(MMRLError, match="no scripted expert for PullCube-v1 in pd_joint_delta_pos"):
        other.expert_action()


def test_time_is_up_without_success(make: Make) -> None:
    environment = make(task="PickCube-v1", max_steps=4)
    environment.reset(torch.tensor([0]))
    step = environment.step(torch.zeros(1, 6, 7))
    assert step.valid_BC.tolist() == [[True] * 4 + [False] * 2]
    assert bool(step.truncated_B) and not bool(step.terminated_B) and step.metrics["success"].tolist() == [0]


def test_the_batched_class_gives_what_the_workers_give(make: Make) -> None:
    """With one environment it runs on the CPU as well; more of them need a GPU."""
    workers, batched = make(task="PickCube-v1", max_steps=9), make(task="PickCube-v1", max_steps=9, backend="gpu")
    assert isinstance(workers._inner, WorkerEnvironment) and not isinstance(batched._inner, WorkerEnvironment)
    seen = [environment.reset(torch.tensor([11])) for environment in (workers, batched)]
    for moment in range(3):
        action = torch.rand(1, 4, 7, generator=torch.Generator().manual_seed(moment)) * 2 - 1
        ours, theirs = workers.step(action), batched.step(action)
        seen += [ours.observation, theirs.observation]
        assert torch.equal(ours.rewards_BC, theirs.rewards_BC) and torch.equal(ours.valid_BC, theirs.valid_BC)
        assert torch.equal(ours.truncated_B, theirs.truncated_B) and ours.metrics.keys() == theirs.metrics.keys()
    for ours, theirs in zip(seen[::2], seen[1::2], strict=True):
        assert ours.state is not None and theirs.state is not None
        assert torch.equal(ours.state, theirs.state) and ours.instructions == theirs.instructions
    with pytest.raises(MMRLError, match="set it to 'cpu'"):
        make(2, backend="gpu")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"task": "PushCub-v1"}, "environment.task = PushCub-v1: ManiSkill has none so called; did you mean 'PushCube-v1'"),
        ({"control_mode": "by_hand"}, "control_mode"),
    ],
)
def test_what_does_not_exist_is_named(make: Make, fields: dict[str, str], match: str) -> None:
    with pytest.raises(MMRLError, match=match):
        make(**fields)


def test_sentences() -> None:
    assert sentences(Options(task="PushCube-v1", instructions=("go",))) == ("go",)
    assert sentences(Options(task="PlaceSphere-v1")) == INSTRUCTIONS["PlaceSphere-v1"]
    assert sentences(Options(task="PickClutterYCB-v1")) == ()
    assert in_words("PickClutterYCB-v1").startswith("pick clutter")


def test_a_task_of_another_package_in_modes_of_its_own(make: Make) -> None:
    """Registered by a module that is named; pictures with segmentation alone, no reward of its own, but sentences."""
    fields = {"task": "PushCubeLikeBridge-v1", "registered_by": "tests.simulators.bridge_like", "backend": "gpu"}
    environment = make(render=True, control_mode=None, image_size=None, max_steps=3, **fields)
    observation = environment.reset(torch.tensor([4]))
    assert observation.instructions == ("put carrot on plate",)
    assert images_of(observation).shape == (1, 128, 128, 3)  # the camera's own size
    assert environment.action_spec.dim == 8  # pd_joint_delta_pos, the robot's default
    step = environment.step(torch.zeros(1, 4, 8))
    assert step.rewards_BC.tolist() == [[0.0] * 4] and bool(step.truncated_B)
    with pytest.raises(MMRLError, match=r"'environment\.registered_by' is no_such_module, which cannot be imported"):
        make(task="PushCube-v1", registered_by="no_such_module", backend="gpu")
    with pytest.raises(MMRLError, match="reward 'dense'"):
        make(control_mode=None, reward="dense", **fields)


def test_progress_adds_up_to_the_dense_reward(make: Make) -> None:
    """Its sum is what the dense reward is at that moment, 1 with success; each episode starts from nothing."""
    dense, progress = (
        make(task="PullCube-v1", control_mode="pd_ee_delta_pos", reward=reward, expert_speed=0.8)
        for reward in ("dense", "progress")
    )
    for task in (2, 3):
        for environment in (dense, progress):
            environment.reset(torch.tensor([task]))
        total, done = 0.0, False
        while not done:
            action = dense.expert_action()
            steps = [environment.step(action[:, None]) for environment in (dense, progress)]
            total += float(steps[1].rewards_BC)
            assert total == pytest.approx(float(steps[0].rewards_BC), abs=1e-4)
            done = bool(steps[0].done_B)
        assert total == pytest.approx(1.0, abs=1e-4)
