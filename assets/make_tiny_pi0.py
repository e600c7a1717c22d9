"""Write the architecture and tokenizer of the tiny pi0 (no weights): ``python assets/make_tiny_pi0.py [FOLDER]``.

The classes are transformers' own (PaliGemma + Gemma expert); only the numbers are small. The tokenizer knows whole words: the
tabletop's vocabulary. ``configs/pretrain/tiny_pi0.yaml`` trains it into ``assets/tiny_pi0``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PI0Config, PreTrainedTokenizerFast

from simulators.tabletop_parts.language import vocabulary

WIDTH, LAYERS, HEADS, HEAD_DIM, PATCH, IMAGE = 80, 3, 2, 40, 16, 64
ACTIVATION = "silu"  # half the time of Gemma's tanh-gelu on a CPU


def build_tokenizer(known: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Whole words, split at spaces: those ``known``, or the tabletop's; any other is <unk>."""
    words = ["<pad>", "<bos>", "<unk>", "\n", *sorted(set(vocabulary() if known is None else known))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")


def build_config(
    vocabulary_size: int,
    *,
    width: int = WIDTH,
    layers: int = LAYERS,
    patch: int = PATCH,
    vision_layers: int = 2,
    chunk_size: int = 5,
    max_state_dim: int = 4,
    max_action_dim: int = 4,
) -> PI0Config:
    text = {
        "model_type": "gemma",
        "vocab_size": vocabulary_size + 1,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "pad_token_id": 0,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": HEADS,
        "hidden_act": ACTIVATION,
        "image_size": IMAGE,
        "patch_size": patch,
        "vision_use_head": False,
    }
    vlm = CONFIG_MAPPING["paligemma"](
        text_config=text, vision_config=vision, projection_dim=width, image_token_id=vocabulary_size, pad_token_id=0
    )
    expert = CONFIG_MAPPING["gemma"](**{**text, "vocab_size": 8})
    sizes = {"chunk_size": chunk_size, "max_state_dim": max_state_dim, "max_action_dim": max_action_dim}
    return PI0Config(vlm_config=vlm, dit_config=expert, num_inference_steps=4, **sizes)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "tiny_pi0_architecture")
    folder = parser.parse_args().folder
    tokenizer = build_tokenizer()
    build_config(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
