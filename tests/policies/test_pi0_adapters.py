"""Adapters: what a checkpoint sees and says, for each simulator, compared with openpi's and robosuite's own definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.component import Component
from mmrl.errors import MMRLError
from mmrl.types import Examples, Observation
from policies.pi0 import Pi0
from policies.pi0_adapters.libero import Libero
from policies.pi0_adapters.maniskill import ManiSkill, turn
from tests.policies import tiny

LIBERO = "policies.pi0_adapters.libero:Libero"
MANISKILL = "policies.pi0_adapters.maniskill:ManiSkill"


def quaternion(axis: tuple[float, float, float], angle: float) -> list[float]:
    """(w, x, y, z) of the rotation about a unit axis."""
    return [math.cos(angle / 2), *(math.sin(angle / 2) * number for number in axis)]


def hand_state(rotations: list[list[float]], before: int = 18) -> Tensor:
    """A state of ManiSkill's: joints and speeds, perhaps more, then the hand's pose."""
    torch.manual_seed(2)
    count = len(rotations)
    return torch.cat([torch.rand(count, before), torch.rand(count, 3), torch.tensor(rotations)], dim=1)


# -- turns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [1e-5, 0.3, 1.0, 3.0, math.pi, 3.3, 5.0])
def test_a_turn_is_axis_times_angle(angle: float) -> None:
    axis = (0.6, -0.48, 0.64)
    for sign in (1.0, -1.0):  # both quaternions of the rotation
        found = turn(sign * torch.tensor([quaternion(axis, angle)], dtype=torch.float64))[0]
        assert found.tolist() == pytest.approx([angle * number for number in axis], rel=1e-6, abs=1e-12)


def test_the_turn_of_a_hand_that_points_down_does_not_jump() -> None:
    """On both sides of w = 0, where a quaternion's other sign is usually chosen, the numbers are neighbours."""
    near = torch.tensor([quaternion((1.0, 0.0, 0.0), math.pi + step) for step in (-1e-3, 1e-3)])
    first, second = turn(near)
    assert (first - second).abs().max() < 3e-3
    assert float(first[0]) == pytest.approx(math.pi, abs=2e-3)


def test_no_turn_is_zero() -> None:
    assert turn(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).tolist() == [[0.0, 0.0, 0.0]]


# -- ManiSkill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hand_at", [18, 19])
def test_the_hand_is_position_turn_and_fingers_as_in_libero(hand_at: int) -> None:
    angle = 2.9
    state = torch.cat([hand_state([quaternion((1.0, 0.0, 0.0), angle)] * 2, before=hand_at), torch.rand(2, 3)], dim=1)
    state[:, 7:9] = torch.tensor([[0.04, 0.03], [0.01, 0.0]])
    found = ManiSkill(ManiSkill.Config(hand_at=hand_at)).state(state)
    assert found.shape == (2, 8)
    assert torch.equal(found[:, :3], state[:, hand_at : hand_at + 3])
    torch.testing.assert_close(found[:, 3:6], torch.tensor([[angle, 0.0, 0.0]] * 2))
    torch.testing.assert_close(found[:, 6:], torch.tensor([[0.04, -0.03], [0.01, 0.0]]))


def test_a_hand_that_is_not_there_is_named() -> None:
    state = hand_state([quaternion((1.0, 0.0, 0.0), 3.0)], before=19)
    with pytest.raises(MMRLError, match=r"policy\.adapter\.hand_at = 18, but no pose begins there in a state of 26 numbers"):
        ManiSkill(ManiSkill.Config()).state(state)
    with pytest.raises(MMRLError, match="no pose begins there"):
        ManiSkill(ManiSkill.Config(hand_at=22)).state(state)


def test_all_of_the_state_passes_as_it_is() -> None:
    state = torch.rand(2, 29)
    assert torch.equal(ManiSkill(ManiSkill.Config(state="all")).state(state), state)


def test_libero_s_actions_in_maniskill_move_as_far() -> None:
    """5 cm are 1 in LIBERO and half of that in ManiSkill, half a radian is 1 and -5, an open gripper is -1 and 1."""
    adapter, state = ManiSkill(ManiSkill.Config(actions="libero")), torch.zeros(1, 25)
    libero = torch.tensor([[[1.0, -0.5, 0.2, 0.1, 0.0, -0.1, -1.0]]])
    own = adapter.to_simulator(libero, state)
    metres, radians = own[0, 0, :3] * 0.1, own[0, 0, 3:6] * -0.1
    torch.testing.assert_close(metres, libero[0, 0, :3] * 0.05)
    torch.testing.assert_close(radians, libero[0, 0, 3:6] * 0.5)
    assert float(own[0, 0, 6]) == 1.0
    torch.testing.assert_close(adapter.to_policy(own, state), libero)
    with pytest.raises(MMRLError, match=r"of 7 numbers, but here are 4; it needs environment\.control_mode pd_ee_delta"):
        adapter.to_simulator(torch.zeros(1, 1, 4), state)
    with pytest.raises(ValidationError, match="relative must be 0 with actions 'libero'"):
        ManiSkill.Config(actions="libero", relative=6)


def test_joint_targets_are_differences_to_the_checkpoint() -> None:
    """As openpi's DeltaActions: every action of the chunk less the state at its beginning; the gripper stays as it is."""
    adapter = ManiSkill(ManiSkill.Config(relative=7))
    targets, state = torch.rand(3, 5, 8), torch.rand(3, 25)
    differences = adapter.to_policy(targets, state)
    for b in range(3):
        for h in range(5):
            assert torch.equal(differences[b, h, :7], targets[b, h, :7] - state[b, :7])
            assert differences[b, h, 7] == targets[b, h, 7]
    torch.testing.assert_close(adapter.to_simulator(differences, state), targets)
    with pytest.raises(MMRLError, match="the first 7 numbers cannot be relative, where there are 4 numbers of an action"):
        adapter.to_policy(torch.rand(3, 5, 4), state)


# -- LIBERO ------------------------------------------------------------------------------------------------------------


def test_libero_passes_as_openpi_has_it() -> None:
    adapter = Libero(Libero.Config())
    state, actions = torch.rand(2, 8), torch.rand(2, 4, 7)
    assert adapter.cameras == ("agentview", "wrist")
    assert adapter.state(state) is state
    assert torch.equal(adapter.to_policy(actions, state), actions) and torch.equal(adapter.to_simulator(actions, state), actions)


def test_older_libero_checkpoints_predict_differences() -> None:
    """openpi's mask (6, -1): the six numbers of the hand's motion are shifted, the gripper's is not."""
    adapter, state, actions = Libero(Libero.Config(relative=True)), torch.rand(2, 8), torch.rand(2, 4, 7)
    predicted = adapter.to_policy(actions, state)
    torch.testing.assert_close(predicted[..., :6], actions[..., :6] - state[:, None, :6])
    assert torch.equal(predicted[..., 6], actions[..., 6])
    torch.testing.assert_close(adapter.to_simulator(predicted, state), actions)


def test_what_is_not_libero_s_is_named() -> None:
    adapter = Libero(Libero.Config())
    with pytest.raises(MMRLError, match="whose state has 8 numbers, but here are 25"):
        adapter.state(torch.zeros(1, 25))
    with pytest.raises(MMRLError, match=r"whose actions have 7 numbers, but here are 6; set policy\.action_dim to 7"):
        adapter.to_simulator(torch.zeros(1, 2, 6), torch.zeros(1, 8))


# -- within a pi0 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint for 8 numbers of state and 7 of action, without statistics."""
    return tiny.write_architecture(tmp_path_factory.mktemp("wide"), statistics=False, max_state_dim=8, max_action_dim=7)


def adapted(checkpoint: str, target: str, **fields: Any) -> Pi0:
    block = Component.parse({"target": target, **fields})
    return tiny.build(checkpoint, adapter=block, cameras=None, action_dim=7, dtype="float64")


def examples_of(policy: Pi0, states: Tensor) -> Examples:
    seen = policy.example_observation(len(states))
    actions = torch.randn(len(states), tiny.HORIZON, 7, generator=tiny.generator(5))
    return Examples(Observation(seen.images, states, seen.instructions), actions, torch.ones(len(states), tiny.HORIZON).bool())


def test_everything_passes_through_the_adapter(wide: str, tmp_path: Path) -> None:
    """A policy with an adapter, fed by the simulator, is the plain policy fed with what the adapter makes of it."""
    fields = {"actions": "libero"}
    policy = adapted(wide, MANISKILL, **fields)
    adapter = ManiSkill(ManiSkill.Config(actions="libero"))
    assert policy.cameras == ("base_camera",)
    states = hand_state([quaternion((1.0, 0.0, 0.0), 2.5 + 0.1 * i) for i in range(6)])
    raw = examples_of(policy, states)
    view = {"front": raw.observation.images["base_camera"]}
    seen = Observation(view, adapter.state(states), raw.observation.instructions)
    translated = Examples(seen, adapter.to_policy(raw.actions_BHA, states), raw.mask_BH)
    plain = tiny.build(wide, cameras=None, action_dim=7, dtype="float64")
    for of, data in ((policy, raw), (plain, translated)):
        of.fit_statistics(data)
    assert policy.statistics == plain.statistics and policy.statistics is not None
    losses = [of.supervised_loss(data, tiny.generator(3)).value for of, data in ((policy, raw), (plain, translated))]
    torch.testing.assert_close(losses[0], losses[1])
    ours = policy.act(raw.observation, tiny.draws(4, rows=6), explore=True)
    theirs = plain.act(seen, tiny.draws(4, rows=6), explore=True)
    torch.testing.assert_close(ours.action, adapter.to_simulator(theirs.action, states))
    torch.testing.assert_close(ours.log_probs_BK, theirs.log_probs_BK)
    torch.testing.assert_close(policy.evaluate(ours.trace).log_probs_NK, ours.log_probs_BK)
    values = [of.value(data, tiny.draws(rows=6)) for of, data in ((policy, raw.observation), (plain, seen))]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("target", [LIBERO, MANISKILL])
def test_a_dry_run_observation_fits_the_adapter(wide: str, target: str) -> None:
    policy = adapted(wide, target)
    action = policy.act(policy.example_observation(3), tiny.draws(rows=3), explore=False).action
    assert action.shape == (3, tiny.EXECUTE, 7) and bool(action.isfinite().all())


def test_cameras_of_the_block_come_before_the_adapter_s(wide: str) -> None:
    policy = tiny.build(wide, adapter=Component.parse({"target": LIBERO}), cameras=("wrist",), action_dim=7)
    assert policy.cameras == ("wrist",)
    assert list(policy.example_observation(2).images) == ["wrist"]
