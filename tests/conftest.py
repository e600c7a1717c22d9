"""What every test shares: one torch thread, deterministic kernels, and ``require`` for what a machine may lack."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from mmrl import doctor

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
        if capability.ok:
            return
        sentence = f"{capability.name} {capability.detail}; install it with: {capability.remedy}"
        if os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)

    return need
