from __future__ import annotations

import pytest

from tests.policies import tiny


@pytest.fixture(scope="session")
def tiny_pi0(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the architecture, tokenizer and statistics of a tiny pi0."""
    return tiny.write_architecture(tmp_path_factory.mktemp("tiny_pi0"))
