"""The tabletop's laws, each on a scene set up by hand, and its hashed random numbers."""

from __future__ import annotations

import pytest
import torch

from mmrl.numerics.hashing import mix
from simulators.tabletop import Tabletop
from simulators.tabletop_parts.hashing import normal, uniform

OPEN, CLOSE = -1.0, 1.0


def scene(gripper: tuple[float, float, float], *blocks: tuple[float, float, float], domain: str = "sim") -> Tabletop:
    """One environment with the gripper and blocks at these places; no zones."""
    config = Tabletop.Config(domain=domain, families=("push",), distractors=(5, 5), render=False, max_steps={"push": 100})
    env = Tabletop(config, num_envs=1)
    env.reset(torch.tensor([1]))
    env._state.gripper_B3[0] = torch.tensor(gripper)
    env._state.blocks_BK3[:] = -9.0
    env._layout.present_BK[:] = False
    env._layout.zone_B23[..., :2] = -9.0
    for slot, place in enumerate(blocks):
        env._state.blocks_BK3[0, slot] = torch.tensor(place)
        env._layout.present_BK[0, slot] = True
    return env


def act(env: Tabletop, *actions: tuple[float, float, float, float]) -> None:
    for action in actions:
        env.step(torch.tensor([[action]]))


def block(env: Tabletop, slot: int = 0) -> list[float]:
    return [round(v, 3) for v in env._state.blocks_BK3[0, slot].tolist()]


def test_an_action_moves_the_gripper_by_speed_and_stops_at_the_walls() -> None:
    env = scene((0.5, 0.5, 0.2))
    act(env, (1.0, -0.5, -1.0, OPEN))
    torch.testing.assert_close(env._state.gripper_B3[0], torch.tensor([0.58, 0.46, 0.12]))
    act(env, *[(9.0, -9.0, -9.0, OPEN)] * 10)
    assert env._state.gripper_B3[0].tolist() == [1.0, 0.0, 0.0]


def test_a_fist_pushes_open_fingers_straddle_and_height_clears() -> None:
    for z, grip, moved in ((0.0, CLOSE, True), (0.0, OPEN, False), (0.2, CLOSE, False)):
        env = scene((0.3, 0.5, z), (0.45, 0.5, 0.0))
        act(env, *[(1.0, 0.0, 0.0, grip)] * 3)
        assert block(env) == ([round(0.3 + 0.24 + 0.095, 3), 0.5, 0.0] if moved else [0.45, 0.5, 0.0])


@pytest.mark.parametrize("aside", [0.0, 0.03, -0.06, 0.085])
@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.6, -0.8)])
def test_an_off_centre_push_moves_a_block_along_and_not_aside(aside: float, direction: tuple[float, float]) -> None:
    (cosine, sine), contact = direction, 0.095
    forward = (contact**2 - aside**2) ** 0.5 + 0.01
    start = (0.4 + forward * cosine - aside * sine, 0.5 + forward * sine + aside * cosine)
    env = scene((0.4, 0.5, 0.0), (*start, 0.0))
    act(env, (0, 0, 0, CLOSE), *[(cosine, sine, 0.0, CLOSE)] * 3)
    moved = 3 * 0.08 - 0.01
    assert block(env)[:2] == pytest.approx([start[0] + moved * cosine, start[1] + moved * sine], abs=2e-3)


def test_a_fist_leaves_alone_what_is_beside_its_way_behind_it_or_below_it() -> None:
    for start, action in (((0.4, 0.6, 0.0), (1, 0, 0)), ((0.38, 0.54, 0.0), (1, 0, 0)), ((0.43, 0.54, 0.0), (0, 0, -1))):
        env = scene((0.4, 0.5, 0.0), start)
        act(env, *[(*map(float, action), CLOSE)] * 3)
        assert block(env) == list(start)


def test_grasp_carry_and_release_onto_another_block() -> None:
    env = scene((0.3, 0.5, 0.0), (0.31, 0.5, 0.0), (0.53, 0.5, 0.0))
    act(env, (0, 0, 0, CLOSE), (0, 0, 1, CLOSE), (1, 0, 0, CLOSE), (1, 0, 0, CLOSE), (0.8, 0, 0, CLOSE))
    assert env._state.held_B.tolist() == [0]
    torch.testing.assert_close(env._state.blocks_BK3[0, 0], env._state.gripper_B3[0])
    act(env, (0, 0, 0, OPEN))
    assert block(env)[2] == 0.06 and block(env, 1) == [0.53, 0.5, 0.0]
    act(env, (0, 0, 1, OPEN), (-1, 0, 0, CLOSE))
    assert env._state.held_B.tolist() == [-1]


def test_a_block_dropped_beside_another_falls_to_the_table_and_they_part() -> None:
    env = scene((0.3, 0.5, 0.2), (0.3, 0.5, 0.2), (0.4, 0.5, 0.0))
    act(env, *[(0, 0, 0, OPEN)] * 40)
    assert block(env)[2] == 0.0
    assert block(env, 1)[0] - block(env)[0] == pytest.approx(0.15, abs=0.002)


def test_closing_away_from_a_block_grasps_nothing() -> None:
    env = scene((0.3, 0.5, 0.1), (0.3, 0.5, 0.0), (0.37, 0.5, 0.1))
    act(env, (0, 0, 0, CLOSE))
    assert env._state.held_B.tolist() == [-1]


def test_real_actions_come_a_step_late_with_noise() -> None:
    env = scene((0.5, 0.5, 0.2), domain="real")
    act(env, (1.0, 0.0, 0.0, OPEN))
    first = env._state.gripper_B3[0, 0].item() - 0.5
    act(env, (0.0, 0.0, 0.0, OPEN))
    second = env._state.gripper_B3[0, 0].item() - 0.5 - first
    assert abs(first) < 0.02 and abs(second - 0.08) < 0.02 and first != 0


def test_splitmix64_matches_its_published_sequence() -> None:
    """First outputs of Vigna's splitmix64.c with the seed 1234567: state advances by the golden gamma each draw."""
    state = 1234567
    seen = []
    for _ in range(3):
        seen.append(int(mix(torch.tensor(state))) & (2**64 - 1))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = state - 2**64 if state >= 2**63 else state
    assert seen == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_hashed_numbers_have_the_right_moments_and_no_correlation() -> None:
    ids = torch.arange(20000)
    u = uniform(5, ids, 3)
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.var(0) - 1 / 12).abs().max() < 0.002
    n = torch.cat([normal(5, ids, torch.full_like(ids, step), 2) for step in (0, 1)], 1)
    correlation = torch.corrcoef(n.T)
    assert n.mean().abs() < 0.02 and (n.var(0) - 1).abs().max() < 0.03
    assert (correlation - torch.eye(4)).abs().max() < 0.03
