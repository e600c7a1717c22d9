"""The tabletop's pictures against the state they show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simulators.tabletop import Tabletop
from simulators.tabletop_parts.domains import DOMAINS
from simulators.tabletop_parts.language import COLOURS
from simulators.tabletop_parts.render import RGB


def make(num_envs: int, **fields: object) -> Tabletop:
    return Tabletop(Tabletop.Config(**fields), num_envs=num_envs)


def share_of_colour(window: Tensor, colour: str, gain: tuple[float, float, float]) -> float:
    """The share of pixels whose nearest block colour is ``colour`` and near it."""
    shades = torch.tensor([RGB[name] for name in COLOURS]).float() * torch.tensor(gain)
    distance = torch.cdist(window.reshape(-1, 3).float(), shades)
    nearest = (distance.argmin(1) == COLOURS.index(colour)) & (distance.amin(1) < 50)
    return nearest.float().mean().item()


@pytest.mark.parametrize("domain", ["sim", "real"])
@pytest.mark.parametrize("size", [64, 96])
def test_a_blocks_colour_is_where_the_state_says(domain: str, size: int) -> None:
    n = 60
    env = make(n, families=("reach",), domain=domain, image_size=size)
    env.reset(torch.arange(n))
    d, checked = DOMAINS[domain], 0
    env._state.gripper_B3[:, :2] = 0.0
    env._state.gripper_B3[:, 2] = 0.0
    image = env._observe().images["front"]
    for i, slot in torch.nonzero(env._layout.present_BK).tolist():
        x, y, z = env._state.blocks_BK3[i, slot].tolist()
        if max(x, y) < 0.3:
            continue  # behind the gripper
        column = int(size * (d.left + d.zoom * x))
        row = int(size * (d.bottom - d.zoom * (d.squash * y + 0.5 * (z + 0.06))))
        half = size * 6 // 100
        window = image[i, row - half : row + half + 1, column - half : column + half + 1]
        colour = COLOURS[int(env._layout.colour_BK[i, slot])]
        gain = tuple(g * (1 + d.gain_spread * float(env._layout.light_B[i])) for g in d.gain)
        assert share_of_colour(window, colour, gain) > 0.25, (i, slot, colour)
        checked += 1
    assert checked > 60


def white(image: Tensor) -> Tensor:
    """Mean (row, column) of the gripper's fingers, which alone are white: [B, 2]."""
    mask = (image.float().amin(-1) > 225).float()
    grid = torch.stack(torch.meshgrid(*[torch.arange(s).float() for s in mask.shape[1:]], indexing="ij"), -1)
    return (mask[..., None] * grid).sum((1, 2)) / mask.sum((1, 2))[:, None]


def test_the_picture_follows_the_gripper_in_all_three_directions() -> None:
    env = make(16, families=("reach",), max_steps={"reach": 50}, tolerance=1e-6)
    env.reset(torch.arange(16))
    env._state.gripper_B3[:] = torch.tensor([0.5, 0.5, 0.2])
    start = white(env._observe().images["front"])
    pixels = 64 * 0.92 * 0.16  # two steps
    cases = (((1, 0, 0), (0, pixels)), ((0, 1, 0), (-pixels * 0.84, 0)), ((0, 0, -1), (pixels * 0.5, 0)))
    for direction, (down, right) in cases:
        env._state.gripper_B3[:] = torch.tensor([0.5, 0.5, 0.2])
        action = torch.tensor([*direction, -1.0]).expand(16, 2, 4)
        moved = white(env.step(action).observation.images["front"]) - start
        assert (moved - torch.tensor([down, right])).abs().max() < 1.6, direction


def test_fingers_and_held_blocks_show() -> None:
    env = make(64, families=("pick_place",))
    env.reset(torch.arange(64))
    for _ in range(14):
        step = env.step(env.expert_action()[:, None])
    carrying = (env._state.held_B == 0) & (env._state.blocks_BK3[:, 0, 2] > 0.08)
    assert carrying.sum() > 5
    image = step.observation.images["front"]
    for i in carrying.nonzero()[:, 0].tolist():
        x, y, z = env._state.blocks_BK3[i, 0].tolist()
        column, row = int(64 * (0.04 + 0.92 * x)), int(64 * (0.95 - 0.92 * (0.84 * y + 0.5 * z)))
        window = image[i, max(row - 6, 0) : row + 5, max(column - 5, 0) : column + 6]
        colour = COLOURS[int(env._layout.colour_BK[i, 0])]
        assert share_of_colour(window, colour, (1, 1, 1)) > 0.05, (i, colour)


def test_real_looks_different_but_shows_the_same_layout() -> None:
    ids = torch.arange(8)
    sim, real = make(8), make(8, domain="real")
    a, b = sim.reset(ids), real.reset(ids)
    assert a.instructions == b.instructions
    assert torch.equal(a.state, b.state)
    changed = (a.images["front"].int() - b.images["front"].int()).abs().amax(-1) > 10
    assert changed.float().mean() > 0.9


def test_cameras_and_video_have_the_promised_sizes_and_the_wrist_camera_follows() -> None:
    env = make(6, wrist_camera=True, image_size=48)
    first = env.reset(torch.arange(6))
    assert {name: tuple(image.shape) for name, image in first.images.items()} == dict.fromkeys(("front", "wrist"), (6, 48, 48, 3))
    frames = env.render_video(torch.tensor([4, 1]))
    assert frames.shape == (2, 192, 192, 3) and frames.dtype == torch.uint8 and frames.is_contiguous()
    assert torch.equal(frames[1], env.render_video(torch.tensor([1]))[0])
    middle = white(first.images["wrist"])[:, 1]
    moved = env.step(torch.tensor([1.0, 0, 0, -1]).expand(6, 2, 4)).observation.images["wrist"]
    assert (white(moved)[:, 1] - middle).abs().max() < 1.5
    assert not torch.equal(moved, first.images["wrist"])


def test_an_observation_does_not_change_when_the_world_goes_on() -> None:
    env = make(4)
    before = env.reset(torch.arange(4))
    image, state = before.images["front"].clone(), before.state.clone()
    env.step(torch.ones(4, 3, 4))
    assert torch.equal(before.images["front"], image) and torch.equal(before.state, state)
