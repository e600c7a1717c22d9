"""A tiny Qwen-Image: it draws what diffusers' pipeline draws, prompts of several lengths side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmrl.errors import MMRLError
from mmrl.messages import Message, Picture
from mmrl.types import Observation, Talks
from tests.policies import tiny_diffusion as tiny


def write(folder: Path, kind: Any = QwenImagePipeline) -> str:
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
    eyes = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    sees = {} if kind is QwenImagePipeline else {"processor": Qwen2VLProcessor(eyes, tokenizer, Qwen2VLVideoProcessor())}
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        **sees,
    )
    return tiny.save(pipeline, folder / "qwen")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("qwen"))


PICTURES = tuple(tiny.picture(i) for i in range(len(tiny.TEXTS)))


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("edit"), QwenImageEditPipeline)


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


# -- editing -----------------------------------------------------------------------------------------------------------


def test_qwen_image_edit_edits_what_it_is_shown(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline takes one picture at a time, and would enlarge it to 1024 x 1024."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (tiny.SIZE, tiny.SIZE, None))
    policy, seen = tiny.load(edit), tiny.observe(pictures=PICTURES)

    def images(pipeline: Any, noise: torch.Tensor) -> Any:
        size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": tiny.STEPS, "output_type": "np"}
        each = [
            pipeline(PICTURES[b].image, text, negative_prompt="", true_cfg_scale=3.0, latents=noise[b : b + 1], **size).images
            for b, text in enumerate(tiny.TEXTS)
        ]
        return np.concatenate(each)

    tiny.assert_follows(policy, images, seen)
    tiny.assert_replays(policy, seen)


def test_the_picture_matters_to_the_text_and_beside_it(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, text = tiny.load(edit), "a red circle"
    told = [policy.family.read(text, (PICTURES[i],)) for i in (0, 1)]
    for name in ("embeds", "picture"):
        assert told[0][name].shape == told[1][name].shape and not torch.allclose(told[0][name], told[1][name], atol=1e-4), name
    reads: list[str] = []
    read = policy.family.read
    monkeypatch.setattr(policy.family, "read", lambda said, shown, **how: (reads.append(said), read(said, shown, **how))[1])
    first = tiny.observe((text,) * 3, (PICTURES[0], PICTURES[1], PICTURES[0]))
    made = policy.act(first, tiny.draws().select(torch.tensor([0, 0, 0])), explore=True)
    clean = policy.clean(made.trace)
    assert not torch.allclose(clean[0], clean[1], atol=1e-3) and torch.allclose(clean[0], clean[2], atol=1e-5)
    assert sorted(reads) == ["", "", text, text], "each of the two prompts is read once, and its picture once without text"
    policy.evaluate(made.trace)
    assert len(reads) == 4


def test_qwen_image_edit_imitates_and_travels(edit: str, tmp_path: Path) -> None:
    talks = Talks(tuple((*tiny.talk("one", PICTURES[i]), Message("assistant", (tiny.picture(10 + i),))) for i in range(3)))
    tiny.assert_learns_and_travels(tiny.load(edit, prompt_dropout=0.5), tmp_path, talks)


def test_other_than_one_picture_is_refused(edit: str) -> None:
    policy = tiny.load(edit)

    def asked(*pictures: Picture) -> None:
        policy.act(Observation({}, None, ("x",), conversations=(tiny.talk("x", *pictures),)), tiny.draws(0, 1), explore=True)

    with pytest.raises(MMRLError, match="shows several pictures, but Qwen-Image-Edit edits one"):
        asked(*PICTURES[:2])
    with pytest.raises(MMRLError, match="shows no picture, but Qwen-Image-Edit needs one"):
        asked()
