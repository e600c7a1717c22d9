"""Write the architecture, tokenizer and image processor of tiny vision-language models (no weights).

    python assets/make_tiny_token_vla.py [FOLDER]

FOLDER/tiny_paligemma_architecture and FOLDER/tiny_qwen_architecture. The classes are transformers' own (PaliGemma and
Qwen2.5-VL); only the numbers are small. The tokenizers know whole words, those of the tabletop, and end in the 256 entries that
actions use.
``configs/tabletop/ppo_token_vla.yaml`` trains one from random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PaliGemmaConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, SiglipImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from simulators.tabletop_parts.language import vocabulary

ACTIVATION = "silu"  # half the time of tanh-gelu on a CPU
BINS = 256
# Qwen's own template without its system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PALIGEMMA_TOKENS = ("<pad>", "<bos>", "<unk>", "<image>")
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)


def build_tokenizer(
    special: tuple[str, ...], *, words: list[str], bins: int, pad: str, bos: str | None
) -> PreTrainedTokenizerFast:
    """Special tokens, newline, words, and last the bins (the lowest one at the very end)."""
    entries = [*special, "\n", *sorted(set(words)), *(f"<bin_{b}>" for b in reversed(range(bins)))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")])
    named = {"pad_token": pad, "unk_token": "<unk>"} | ({"bos_token": bos} if bos else {})
    others = [token for token in special if token not in named.values()]
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=others, **named)


def write_paligemma(
    folder: Path,
    *,
    words: list[str],
    width: int = 80,
    layers: int = 3,
    image: int = 64,
    patch: int = 16,
    vision_layers: int = 2,
    bins: int = BINS,
) -> Path:
    tokenizer = build_tokenizer(PALIGEMMA_TOKENS, words=words, bins=bins, pad="<pad>", bos="<bos>")
    common = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 2, "hidden_act": ACTIVATION}
    text = {
        **common,
        "model_type": "gemma",
        "vocab_size": len(tokenizer),
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "hidden_activation": ACTIVATION,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **common,
        "model_type": "siglip_vision_model",
        "num_hidden_layers": vision_layers,
        "image_size": image,
        "patch_size": patch,
        "vision_use_head": False,
    }
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=width, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = (image // patch) ** 2
    SiglipImageProcessorPil(size={"height": image, "width": image}, image_seq_length=tokens).save_pretrained(folder)
    return folder


def write_qwen(
    folder: Path,
    *,
    words: list[str],
    width: int = 80,
    layers: int = 3,
    patch: int = 8,
    vision_layers: int = 2,
    bins: int = BINS,
    tied: bool = True,
) -> Path:
    tokenizer = build_tokenizer(QWEN_TOKENS, words=[*words, "user", "assistant"], bins=bins, pad="<|endoftext|>", bos=None)
    tokenizer.chat_template = CHAT_TEMPLATE
    pairs = width // 4  # of numbers that a head rotates, half of its size, shared out among time, height and width
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8],
        },
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "window_size": 8 * patch,
        "fullatt_block_indexes": list(range(vision_layers)),
    }
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (32 * patch) ** 2}
    Qwen2VLImageProcessorPil(patch_size=patch, size=limits).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    for name, write in {"tiny_paligemma_architecture": write_paligemma, "tiny_qwen_architecture": write_qwen}.items():
        print(f"wrote {write(folder / name, words=vocabulary())}")


if __name__ == "__main__":
    main()
