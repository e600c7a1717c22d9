"""The families of image generators that are known, by the class of diffusers' pipeline in a checkpoint's model_index.json."""

from __future__ import annotations

from policies.diffusion_families.base import Family
from policies.diffusion_families.sd3 import SD3

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusion3Pipeline": SD3,
}
