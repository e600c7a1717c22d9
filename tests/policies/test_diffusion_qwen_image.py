"""A tiny Qwen-Image: it draws what diffusers' pipeline draws, prompts of several lengths side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.policies import tiny_diffusion as tiny


def write(folder: Path) -> str:
    torch.manual_seed(0)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate((*letters, *special))}, merges=[])  # type: ignore[arg-type]
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})  # type: ignore[dict-item]
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vocab_size": len(tokenizer),
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {"image_token_id": 261, "vision_start_token_id": 259, "vision_end_token_id": 260, "video_token_id": 261}
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)  # type: ignore[arg-type]
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    return tiny.save(pipeline, folder / "qwen")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("qwen"))


def images(pipeline: Any, noise: torch.Tensor) -> Any:
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": tiny.STEPS}
    empty = [""] * len(tiny.TEXTS)
    return pipeline(list(tiny.TEXTS), negative_prompt=empty, true_cfg_scale=3.0, latents=noise, output_type="np", **size).images


def test_qwen_image(qwen: str, tmp_path: Path) -> None:
    policy = tiny.load(qwen)
    tiny.assert_follows(policy, images)
    tiny.assert_replays(policy)
    tiny.assert_learns_and_travels(policy, tmp_path)


def test_a_long_prompt_beside_it_does_not_change_a_picture(qwen: str) -> None:
    policy = tiny.load(qwen)
    seen, index = tiny.observe(), torch.tensor([4])
    together = policy.act(seen, tiny.draws(), explore=True)
    apart = policy.act(seen.select(index), tiny.draws().select(index), explore=True)
    torch.testing.assert_close(apart.trace["clean"], together.trace["clean"][index], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart.log_probs_BK, together.log_probs_BK[index], rtol=1e-4, atol=1e-4)


def test_latents_are_scaled_by_channel(qwen: str) -> None:
    policy = tiny.load(qwen, height=16, width=32)
    encoded = torch.randn(2, 4, 1, 8, 16)
    latents = policy.family.to_latents(encoded)
    assert latents.shape == (2, *policy.family.latent_shape)
    torch.testing.assert_close(policy.family.from_latents(latents), encoded)
