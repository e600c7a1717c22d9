"""LeRobot's own loader reads what mmrl writes. Skipped where lerobot cannot be imported, which no extra installs.

lerobot 0.4.4 asks for an older torch than mmrl has, so it goes beside mmrl, without its dependencies:
``pip install --no-deps lerobot==0.4.4 torchvision==0.25.0`` in a copy of the environment. Its decoder ``pyav`` needs the
VideoReader that later torchvisions lack. Beside a torch that is not its own, torchvision imports once the schemas of
``torchvision::nms`` and ``torchvision::qnms`` are declared (``torch.library.Library("torchvision", "DEF")``, sitecustomize.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.core.test_lerobot_write import LENGTHS, SUCCESS, episode, write

try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision that does not fit fails in ways of its own
    pytest.skip(f"lerobot cannot be imported: {error}", allow_module_level=True)

FPS = 20


@pytest.fixture(scope="module", params=["image", "video"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("sets") / "mine"
    return request.param, write(folder, [episode(i) for i in range(3)], storage=request.param, fps=FPS, crf=10)


def open_set(folder: Path, **options: Any) -> Any:
    return LeRobotDataset("mmrl/mine", root=folder, video_backend="pyav", **options)


def test_every_frame_is_what_was_recorded(loaded: tuple[str, Path]) -> None:
    storage, folder = loaded
    data = open_set(folder)
    assert (len(data), data.num_episodes, data.meta.fps, data.meta.robot_type) == (sum(LENGTHS), 3, FPS, "robot")
    where = [(e, t) for e, length in enumerate(LENGTHS) for t in range(length)]
    for index, (e, t) in enumerate(where):
        frame, one = data[index], episode(e)
        assert (int(frame["index"]), int(frame["episode_index"]), int(frame["frame_index"])) == (index, e, t)
        assert float(frame["timestamp"]) == pytest.approx(t / FPS, abs=1e-6)
        assert torch.equal(frame["action"], one.actions_TA[t])
        assert one.observation.state is not None and torch.equal(frame["observation.state"], one.observation.state[t])
        assert float(frame["next.reward"]) == float(one.rewards_T[t])
        last = t == LENGTHS[e] - 1
        assert (bool(frame["next.done"]), bool(frame["next.success"])) == (last, last and SUCCESS[e])
        assert frame["task"] == one.observation.instructions[t]
        for camera, pictures in one.observation.images.items():
            seen_CHW = frame[f"observation.images.{camera}"]  # from 0 to 1
            difference_HWC = (seen_CHW.permute(1, 2, 0) * 255 - pictures[t]).abs()
            assert float(difference_HWC.max()) <= (0.01 if storage == "image" else 16)  # the next frame is 20 away


def test_chunks_of_actions_end_with_their_episode(loaded: tuple[str, Path]) -> None:
    data = open_set(loaded[1], delta_timestamps={"action": [h / FPS for h in range(3)]})
    frame, actions = data[4], episode(0).actions_TA  # the last but one of six
    assert frame["action_is_pad"].tolist() == [False, False, True]
    assert torch.equal(frame["action"], actions[[4, 5, 5]])


def test_one_episode_alone(loaded: tuple[str, Path]) -> None:
    data = open_set(loaded[1], episodes=[2])
    assert (len(data), data.num_episodes) == (LENGTHS[2], 1)
    assert torch.equal(torch.stack([data[t]["action"] for t in range(LENGTHS[2])]), episode(2).actions_TA)


def test_statistics_are_those_of_the_frames(loaded: tuple[str, Path]) -> None:
    stats = open_set(loaded[1]).meta.stats
    actions = torch.cat([episode(i).actions_TA for i in range(3)]).double().numpy()
    for name, value in {"min": actions.min(0), "max": actions.max(0), "mean": actions.mean(0), "std": actions.std(0)}.items():
        np.testing.assert_allclose(stats["action"][name], value, rtol=1e-6, err_msg=name)
    assert stats["observation.images.front"]["mean"].shape == (3, 1, 1)
