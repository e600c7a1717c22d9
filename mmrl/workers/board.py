"""Observations in memory that the worker processes write and the parent reads."""

from __future__ import annotations

from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrl.workers.single import Description, View

_ALIGN = 64  # bytes; a row of one worker never shares a cache line with another array


class Board:
    """The last view of each of ``num_envs`` slots. The process that gives no ``name`` owns the memory.

    The memory goes when the owner closes it; should the owner be killed, Python's resource tracker removes it.
    """

    def __init__(self, description: Description, num_envs: int, name: str | None = None) -> None:
        shapes = {camera: (num_envs, *size, 3) for camera, size in description.cameras.items()}
        sizes = {camera: _rounded(int(np.prod(shape))) for camera, shape in shapes.items()}
        total = sum(sizes.values()) + num_envs * description.state_dim * 4
        self._owner = name is None
        self._memory = SharedMemory(name, create=name is None, size=max(total, 1))
        offset = 0
        self._images: dict[str, np.ndarray[Any, Any]] = {}
        for camera, shape in shapes.items():
            self._images[camera] = np.ndarray(shape, np.uint8, self._memory.buf, offset)
            offset += sizes[camera]
        self._state = np.ndarray((num_envs, description.state_dim), np.float32, self._memory.buf, offset)

    @property
    def name(self) -> str:
        return self._memory.name

    def write(self, slot: int, view: View) -> None:
        for camera, image in self._images.items():
            image[slot] = view.images[camera]
        if view.state is not None:
            self._state[slot] = view.state

    def clear(self, slot: int) -> None:
        """Zeros, for a slot whose worker was lost: what it held may be half written."""
        for image in self._images.values():
            image[slot] = 0
        self._state[slot] = 0

    def read(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Copies of all slots: camera name -> uint8 [B, height, width, 3], and float32 [B, S] or None."""
        images = {camera: torch.from_numpy(image.copy()) for camera, image in self._images.items()}
        return images, torch.from_numpy(self._state.copy()) if self._state.shape[1] else None

    def close(self) -> None:
        self._images = {}
        self._state = np.zeros((0, 0), np.float32)  # an array that still looks into the memory would keep it from closing
        self._memory.close()
        if self._owner:
            self._owner = False
            self._memory.unlink()


def _rounded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
