"""What every test shares: one torch thread, deterministic kernels, ``require`` and ``installed`` for what a machine may lack."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch

from mmrl import doctor
from mmrl.registry import install_command

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """``require("chromium")`` goes on if ``mmrl doctor`` finds it; otherwise the test fails in CI and is skipped elsewhere."""
    known: dict[str, doctor.Capability] = {}

    def need(name: str) -> None:
        if name not in known:
            known[name] = doctor.check(name)
        capability = known[name]
        if not capability.ok:
            _absent(f"{capability.name} {capability.detail}; install it with: {capability.remedy}")

    return need


@pytest.fixture(scope="session")
def installed() -> Callable[[str], None]:
    """``installed("gymnasium")`` goes on if that package is there; otherwise the test fails in CI and is skipped elsewhere."""

    def need(module: str) -> None:
        if importlib.util.find_spec(module) is None:
            _absent(f"{module} is not installed; install it with: {install_command(module)}")

    return need


def _absent(sentence: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(sentence)
    pytest.skip(sentence)
