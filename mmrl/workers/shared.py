"""Arrays in memory that processes share."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch

_ALIGN = 64  # bytes; no two arrays share a cache line

Layout = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape, numpy's name of the type)


class SharedArrays:
    """The arrays of ``layout``, all zeros. The process that gives no ``name`` owns the memory.

    The memory goes when the owner closes it; should the owner be killed, Python's resource tracker removes it. pinned: CUDA may
    copy straight from and to it (where CUDA refuses, it is copied as any other memory is).
    """

    def __init__(self, layout: Layout, name: str | None = None, *, pinned: bool = False) -> None:
        sizes = {key: int(np.prod(shape)) * np.dtype(kind).itemsize for key, (shape, kind) in layout.items()}
        self._owner = name is None
        self._memory = SharedMemory(name, create=name is None, size=max(sum(map(_rounded, sizes.values())), 1))
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        offset = 0
        for key, (shape, kind) in layout.items():
            self._arrays[key] = np.ndarray(shape, kind, self._memory.buf, offset)
            offset += _rounded(sizes[key])
        self._pinned_at = _pin(self._memory) if pinned else None

    @property
    def name(self) -> str:
        return self._memory.name

    def __getitem__(self, key: str) -> np.ndarray[Any, Any]:
        """A view, which must be gone when the memory is closed."""
        return self._arrays[key]

    def close(self) -> None:
        if self._pinned_at is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)  # pyright: ignore[reportOptionalMemberAccess]
            self._pinned_at = None
        self._arrays = {}
        self._memory.close()
        if self._owner:
            self._owner = False
            self._memory.unlink()


def _pin(memory: SharedMemory) -> int | None:
    """The address of what is pinned now; None where CUDA refused."""
    address = np.ndarray(1, np.uint8, memory.buf).ctypes.data
    status = torch.cuda.cudart().cudaHostRegister(address, memory.size, 0)  # pyright: ignore[reportOptionalMemberAccess]
    return address if int(status) == 0 else None


def _rounded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
