"""Architectures at their true size, written without weights: ``python -m t2i_step_parts.presets sd35 FOLDER``.

Stable Diffusion 3.5 medium's transformer, VAE, schedule and both CLIPs, as its checkpoint has them. There is no T5, for which the
pipeline puts zeros, so that the transformer sees as many tokens; a loop without a cache is spared what its encoding costs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig

from assets.make_tiny_sd3 import build_tokenizer, write

_TRANSFORMER: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_TOKENS, _VOCABULARY = 77, 49408
_CLIPS = {"text_encoder": (768, 12, 12, "quick_gelu"), "text_encoder_2": (1280, 32, 20, "gelu")}


def _sd35(folder: Path) -> None:
    tokenizer = build_tokenizer(tokens=_TOKENS)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clips = {
        name: CLIPTextConfig(
            vocab_size=_VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=_TOKENS,
            hidden_act=activation,
            **ends,
        )
        for name, (width, layers, heads, activation) in _CLIPS.items()
    }
    write(folder, transformer=_TRANSFORMER, vae=_VAE, tokenizer=tokenizer, text=clips["text_encoder"], shift=3.0)
    clips["text_encoder_2"].save_pretrained(folder / "text_encoder_2")


PRESETS = {"sd35": _sd35}


if __name__ == "__main__":
    PRESETS[sys.argv[1]](Path(sys.argv[2]))
