"""The families of image generators that are known, by the class of diffusers' pipeline in a checkpoint's model_index.json."""

from __future__ import annotations

from policies.diffusion_families.base import Family
from policies.diffusion_families.flux import Flux, Kontext
from policies.diffusion_families.qwen_image import QwenImage, QwenImageEdit
from policies.diffusion_families.sana import Sana
from policies.diffusion_families.sd3 import SD3
from policies.diffusion_families.stable_diffusion import StableDiffusion, StableDiffusionXL

FAMILIES: dict[str, type[Family]] = {
    "FluxKontextPipeline": Kontext,
    "FluxPipeline": Flux,
    "QwenImageEditPipeline": QwenImageEdit,
    "QwenImagePipeline": QwenImage,
    "SanaPipeline": Sana,
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}
