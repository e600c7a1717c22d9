from __future__ import annotations

import pytest
from diffusers import FluxKontextPipeline

from tests.policies import tiny, tiny_diffusion, tiny_vla


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with the architecture, tokenizer and statistics of tiny models, by kind."""
    vision_language = {kind: tiny_vla.write(tmp_path_factory.mktemp(kind), kind) for kind in tiny_vla.WRITERS}
    drawing = {
        "sd3": tiny_diffusion.write_sd3(tmp_path_factory.mktemp("sd3")),
        "kontext": tiny_diffusion.write_flux(tmp_path_factory.mktemp("kontext"), FluxKontextPipeline),
    }
    return {"pi0": tiny.write_architecture(tmp_path_factory.mktemp("pi0")), **vision_language, **drawing}
