"""Random numbers that do not depend on the order in which the parts of a run ask for them, and that survive a resume.

Each purpose ("collect", "minibatch", "supervised", "data", "evaluation", ...) draws from a stream of its own, whose seed is a
hash of the run's seed and the stream's name. Libraries that draw from the global generators of python, numpy and torch are
covered by ``seed_everything``, and the state of those generators travels with the streams.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmrl.errors import CheckpointError

_STREAM = "stream/"  # stream/NAME/DEVICE in a state
_PYTHON, _NUMPY, _TORCH, _CUDA = "global/python", "global/numpy", "global/torch", "global/cuda/"
_NO_GAUSS = float("nan")  # python keeps the second number of a Box-Muller pair; NaN stands for "none kept"


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) from ``seed`` and a path of names; the same in every process, unlike python's ``hash``."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Streams:
    """Named, independent ``torch.Generator`` streams of one run.

    >>> a, b = Streams(0), Streams(0)
    >>> _ = torch.rand(3, generator=a.get("collect", "cpu"))  # drawing from one stream does not move another
    >>> torch.equal(torch.rand(2, generator=a.get("data", "cpu")), torch.rand(2, generator=b.get("data", "cpu")))
    True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[tuple[str, str], torch.Generator] = {}

    def get(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The stream ``name`` on ``device``: made on first use, afterwards the same object, continuing where it stands."""
        if "/" in name:
            raise ValueError(f"stream name {name!r} contains '/', which separates name and device in a saved state")
        key = (name, str(torch.device(device)))
        if key not in self._generators:
            self._generators[key] = self.fresh(name, device=device)
        return self._generators[key]

    def fresh(self, name: str, *salt: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """A new generator at the start of the stream ``name`` (or of its substream ``salt``): the same numbers at every call."""
        return torch.Generator(device).manual_seed(derive_seed(self.seed, name, *salt))

    def state(self) -> dict[str, Tensor]:
        """Where every stream and the global generators of python, numpy and torch stand, as tensors."""
        streams = {f"{_STREAM}{name}/{device}": g.get_state() for (name, device), g in self._generators.items()}
        return {**streams, **_global_state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue every stream and the global generators from ``state``; streams it does not name start afresh.

        Raises CheckpointError for a key that ``state()`` does not write and for one it lacks.
        """
        required = {_PYTHON, _NUMPY, _TORCH}
        unknown = [key for key in state if key not in required and not key.startswith((_STREAM, _CUDA))]
        missing = sorted(required - state.keys())
        if unknown or missing:
            what = f"an unknown key {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
            raise CheckpointError(f"the generator state holds {what}; resume from a checkpoint written by this version")
        for (name, _), generator in self._generators.items():  # in place: whoever holds a generator goes on with the right one
            generator.manual_seed(derive_seed(self.seed, name))
        for key, value in state.items():
            if key.startswith(_STREAM):
                name, device = key.removeprefix(_STREAM).split("/")
                self.get(name, device).set_state(value.cpu())
        _load_global_state(state)


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (all devices), each with a number of its own."""
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))


def configure_torch(threads: int | None, deterministic: bool) -> None:
    """Set the number of CPU threads (None: leave it) and whether torch refuses operations that are not deterministic.

    On CUDA, determinism needs cuBLAS's workspace setting before its first call, so call this first in the process.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def _global_state() -> dict[str, Tensor]:
    state = {_PYTHON: _python_state(), _NUMPY: _numpy_state(), _TORCH: torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state |= {f"{_CUDA}{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _load_global_state(state: Mapping[str, Tensor]) -> None:
    _load_python_state(state[_PYTHON])
    _load_numpy_state(state[_NUMPY])
    torch.set_rng_state(state[_TORCH].cpu())
    for key, value in state.items():
        # A checkpoint of a machine with more GPUs may be continued on one with fewer; the devices both have are restored.
        if key.startswith(_CUDA) and int(key.removeprefix(_CUDA)) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value.cpu(), int(key.removeprefix(_CUDA)))


def _python_state() -> Tensor:
    """int64 [627]: version, the Mersenne twister's 625 words, and the bits of the kept Gaussian."""
    version, words, gauss = random.getstate()
    return torch.tensor([version, *words, _float_bits(_NO_GAUSS if gauss is None else gauss)], dtype=torch.int64)


def _load_python_state(state: Tensor) -> None:
    version, *words, gauss_bits = state.tolist()
    gauss = _bits_float(gauss_bits)
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))


def _numpy_state() -> Tensor:
    """int64 [627]: the legacy generator's 624 words, its position, whether a Gaussian is kept, and the Gaussian's bits."""
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)  # pyright: ignore[reportAssignmentType]
    return torch.tensor([*(int(word) for word in words), position, has_gauss, _float_bits(float(gauss))], dtype=torch.int64)


def _load_numpy_state(state: Tensor) -> None:
    *words, position, has_gauss, gauss_bits = state.tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, _bits_float(gauss_bits)))


def _float_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def _bits_float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
