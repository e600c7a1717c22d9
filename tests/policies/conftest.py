from __future__ import annotations

import pytest

from tests.policies import tiny


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny pi0's architecture, tokenizer and statistics."""
    return tiny.write_architecture(tmp_path_factory.mktemp("tiny_pi0"))
