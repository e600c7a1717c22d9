"""A pi0 so small that a test can afford it; its shapes are chosen so that every slice matters.

Padded actions (6) and states (5) are larger than the real ones (3 and 4), fewer actions are executed (3) than predicted (4), and
there are two cameras.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PI0Config, PreTrainedTokenizerFast

from mmrl.numerics.draws import Draws
from mmrl.types import Examples, Observation
from policies.pi0 import Pi0
from policies.pi0_parts.weights import Statistics

WIDTH, HORIZON, EXECUTE, PADDED_ACTION, ACTION, PADDED_STATE, STATE, TEXT = 32, 4, 3, 6, 3, 5, 4, 12
CAMERAS = ("front", "wrist")
SENTENCES = ("reach the red cube", "push the blue disc to the red cube", "reach the disc", "go", "push the red disc")
CPU = torch.device("cpu")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<unk>", "\n", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")


def _config(vocabulary: int, **sizes: int) -> PI0Config:
    common = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **common,
        "model_type": "gemma",
        "vocab_size": vocabulary + 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    vision = {**common, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16, "vision_use_head": False}
    tokens = {"image_token_id": vocabulary, "pad_token_id": 0}
    vlm = CONFIG_MAPPING["paligemma"](**{"text_config": text, "vision_config": vision, "projection_dim": WIDTH, **tokens})
    expert = CONFIG_MAPPING["gemma"](**{**text, "vocab_size": 8, "hidden_size": sizes.pop("expert_width", WIDTH)})
    shape = {"chunk_size": HORIZON, "max_action_dim": PADDED_ACTION, "max_state_dim": PADDED_STATE, **sizes}
    return PI0Config(vlm_config=vlm, dit_config=expert, **shape)  # type: ignore[arg-type]


def write_architecture(folder: Path, *, statistics: bool = True, **sizes: int) -> str:
    """Config, tokenizer and statistics, without weights. ``sizes``: fields of PI0Config, or expert_width."""
    tokenizer = _tokenizer()
    _config(len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if statistics:
        Statistics((0.1, -0.2, 0.3, 0.0), (0.5, 1.5, 2.0, 1.0), (0.05, -0.1, 0.2), (0.3, 0.4, 0.25)).dump(folder)
    return str(folder)


def config(checkpoint: str, **fields: Any) -> Pi0.Config:
    """A config with random weights; Flow-SDE with noise 0.5 unless ``fields`` say otherwise."""
    sampler = fields.setdefault("sampler", "flow_sde")
    if sampler in ("flow_sde", "cps"):
        fields.setdefault("noise_level", 0.5)
    defaults: dict[str, Any] = {
        "weights": "random",
        "cameras": CAMERAS,
        "max_text_tokens": TEXT,
        "execute": EXECUTE,
        "action_dim": ACTION,
        "attention": "eager",
    }
    return Pi0.Config(checkpoint=checkpoint, **{**defaults, **fields})


def build(checkpoint: str, **fields: Any) -> Pi0:
    """A policy whose heads and norms are stirred, so that no output is zero just because it starts there."""
    return stir(Pi0(config(checkpoint, **fields), device=CPU))


@torch.no_grad()
def stir(module: nn.Module, seed: int = 3, size: float = 0.2) -> Any:
    """Add noise to every parameter, by name, so that equal names get equal noise."""
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / parameter.shape[-1] ** 0.5
    return module


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(seed: int = 0, rows: int = 5) -> Draws:
    """Random numbers for acting: those of row b do not depend on ``rows``."""
    return Draws.of(seed, torch.arange(rows))


@functools.cache
def observation(batch: int = 5, size: int = 32) -> Observation:
    draw = generator(batch)
    images = {camera: torch.randint(0, 256, (batch, size, size, 3), generator=draw, dtype=torch.uint8) for camera in CAMERAS}
    sentences = tuple(SENTENCES[i % len(SENTENCES)] for i in range(batch))
    return Observation(images, torch.randn(batch, STATE, generator=draw), sentences)


@functools.cache
def examples(batch: int = 5, *, dim: int = ACTION, ended: bool = True) -> Examples:
    actions = torch.randn(batch, HORIZON, dim, generator=generator(batch + 1))
    lengths_B = torch.arange(batch) % HORIZON + 1 if ended else torch.full((batch,), HORIZON)
    return Examples(observation(batch), actions, torch.arange(HORIZON) < lengths_B[:, None])


def upstream_inputs(policy: Pi0, seen: Observation) -> dict[str, Tensor]:
    """What ``PI0ForConditionalGeneration.forward`` takes, made here in the layout of transformers' PI0Processor."""
    tokenizer = _tokenizer()
    arch: Any = policy.model.config
    dtype = policy.model.dtype
    image_tokens = [arch.vlm_config.image_token_id] * (len(CAMERAS) * (32 // 16) ** 2)
    rows, masks = [], []
    for sentence in seen.instructions:
        ids = image_tokens + tokenizer.convert_tokens_to_ids(["<bos>", *sentence.split(), "\n"])  # type: ignore[operator]
        padding = len(image_tokens) + TEXT - len(ids)
        rows.append(ids + [0] * padding)
        masks.append([1] * len(ids) + [0] * padding)
    pixels = torch.stack([seen.images[camera].permute(0, 3, 1, 2).to(dtype) / 255 * 2 - 1 for camera in CAMERAS], 1)
    assert seen.state is not None and policy.statistics is not None
    mean, std = (torch.tensor(x, dtype=dtype) for x in (policy.statistics.state_mean, policy.statistics.state_std))
    state = torch.zeros(seen.batch_size, PADDED_STATE, dtype=dtype)
    state[:, :STATE] = (seen.state.to(dtype) - mean) / std
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(seen.batch_size, len(CAMERAS), dtype=torch.bool),
        "state": state,
    }
