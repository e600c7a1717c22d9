"""Observations in memory that the worker processes write and the parent reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrl.types import Observation
from mmrl.workers.shared import SharedArrays
from mmrl.workers.single import Description, View


class Board:
    """The last view of each of ``num_envs`` slots. The process that gives no ``name`` owns the memory.

    device: where ``read`` puts what it reads; for a GPU the memory is pinned, and nothing is copied on the way there.
    """

    def __init__(
        self, description: Description, num_envs: int, name: str | None = None, *, device: torch.device | None = None
    ) -> None:
        layout: dict[str, tuple[tuple[int, ...], str]] = {}
        layout |= {_image(camera): ((num_envs, *size, 3), "uint8") for camera, size in description.cameras.items()}
        layout["state"] = (num_envs, description.state_dim), "float32"
        self._device = device or torch.device("cpu")
        self._cameras = tuple(description.cameras)
        self._shared = SharedArrays(layout, name, pinned=self._device.type == "cuda")

    @property
    def name(self) -> str:
        return self._shared.name

    def write(self, slot: int, view: View) -> None:
        for camera in self._cameras:
            self._shared[_image(camera)][slot] = view.images[camera]
        if view.state is not None:
            self._shared["state"][slot] = view.state

    def write_rows(self, observation: Observation, rows_B: np.ndarray[Any, Any]) -> None:
        """What the slots ``rows_B`` (bool [B]) show, of an observation of all."""
        where: Any = slice(None) if rows_B.all() else rows_B
        for camera in self._cameras:
            self._shared[_image(camera)][where] = observation.images[camera].numpy(force=True)[where]
        if observation.state is not None:
            self._shared["state"][where] = observation.state.numpy(force=True)[where]

    def clear(self, slot: int) -> None:
        """Zeros, for a slot whose worker was lost: what it held may be half written."""
        for camera in self._cameras:
            self._shared[_image(camera)][slot] = 0
        self._shared["state"][slot] = 0

    def read(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Copies of all slots: camera name -> uint8 [B, height, width, 3], and float32 [B, S] or None."""
        images = {camera: self._copy(_image(camera)) for camera in self._cameras}
        return images, self._copy("state") if self._shared["state"].shape[1] else None

    def close(self) -> None:
        self._shared.close()

    def _copy(self, key: str) -> Tensor:
        """Done when it returns, so that a worker may write again."""
        return torch.from_numpy(self._shared[key]).to(self._device, copy=True)


def _image(camera: str) -> str:
    return f"image {camera}"
