"""A tiny Sana: it draws what diffusers' pipeline draws."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from tests.policies import tiny_diffusion as tiny


def write(folder: Path, scheduler: Any) -> str:
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "▁": 4, **{c: 5 + i for i, c in enumerate(tiny.LETTERS)}}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])  # type: ignore[arg-type]
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
    )
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
        **blocks,
    )
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler)
    return tiny.save(pipeline, folder / "sana")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("sana"), FlowMatchEulerDiscreteScheduler(shift=3.0))


FIELDS: dict[str, Any] = {"height": 32, "width": 32, "max_text_tokens": 10}


def test_sana(sana: str, tmp_path: Path) -> None:
    policy = tiny.load(sana, **FIELDS)

    def images(pipeline: Any, noise: torch.Tensor) -> Any:
        size = {"height": 32, "width": 32, "num_inference_steps": tiny.STEPS, "use_resolution_binning": False}
        how = {"guidance_scale": 3.0, "max_sequence_length": 10, "output_type": "np"}
        return pipeline(list(tiny.TEXTS), latents=noise, **size, **how).images

    tiny.assert_follows(policy, images)
    tiny.assert_replays(policy)
    tiny.assert_learns_and_travels(policy, tmp_path)


def test_the_instruction_is_the_pipeline_s_and_not_for_the_empty_prompt(sana: str) -> None:
    policy = tiny.load(sana, **FIELDS)
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    for text, negative, how in (("one", False, instruction), ("", True, None)):
        ours = policy.family.encode([text], negative=negative)
        theirs, mask, _, _ = policy.family.pipeline.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=10, complex_human_instruction=how
        )
        assert torch.equal(ours["embeds"], theirs) and torch.equal(ours["mask"], mask)


def test_a_solver_s_sigmas_are_taken(tmp_path: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    policy = tiny.load(write(tmp_path, scheduler), **FIELDS)
    scheduler.set_timesteps(tiny.STEPS)
    grid = policy.family.schedule.grid(tiny.STEPS)
    torch.testing.assert_close(grid.levels, scheduler.sigmas.float())
    assert float(grid.levels[-1]) == 0
    tiny.assert_replays(policy)
