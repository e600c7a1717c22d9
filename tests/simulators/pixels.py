"""gymnasium environments: Pixels-v0, with images, MultiDiscrete actions and ``is_success``, and Odd-v0, with what is rare."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Sequence, Text

SIZE, LIMIT = 8, 10


class Pixels(gymnasium.Env):
    """A dot on a board whose colour names the episode; (0 stay, 1 right, 2 left) x (0 stay, 1 down). The last row is the goal."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (as gymnasium has it)
    observation_space = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = MultiDiscrete([3, 2], start=[1, 5])

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.row, self.column = 0, int(self.np_random.integers(SIZE))
        self.colour = self.np_random.integers(1, 256, 3)
        return self._board(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.column = (self.column + (0, 1, -1)[action[0] - 1]) % SIZE
        self.row += int(action[1] - 5)
        done = self.row == SIZE - 1
        reward = float(self.np_random.random())  # the episode's own chance: every random number counts
        return self._board(), reward, done, False, {"is_success": done and self.column % 2 == 0}

    def render(self) -> np.ndarray:
        return np.kron(self._board(), np.ones((4, 4, 1), np.uint8))

    def _board(self) -> np.ndarray:
        board = np.zeros((SIZE, SIZE, 3), np.uint8)
        board[self.row, self.column] = self.colour
        return board


class Odd(gymnasium.Env):
    """Counts actions in whole numbers, 1 of reward each; ends with the second 1, and only then says whether it was a success: no.

    seen="grows", done="text": spaces of which nothing can be made.
    """

    def __init__(self, seen: str = "number", done: str = "choice") -> None:
        self.observation_space = Sequence(Box(0, 1)) if seen == "grows" else Box(0, 9, (), np.int64)
        self.action_space = Text(3) if done == "text" else Discrete(2, start=-1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.age, self.ones = 0, 0
        return np.array(self.age), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.age, self.ones = self.age + 1, self.ones + int(action) + 1
        done = self.ones == 2
        return np.array(self.age), 1.0, done, False, {"is_success": False} if done else {}


gymnasium.register("Odd-v0", entry_point=Odd, max_episode_steps=9)
gymnasium.register("Pixels-v0", entry_point=Pixels, max_episode_steps=LIMIT)
