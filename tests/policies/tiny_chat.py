"""Tiny chat models of transformers' own classes, with a tokenizer trained on the spot, and conversations for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmrl.messages import Message, Picture
from policies.qwen_vl import QwenVL

CPU = torch.device("cpu")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_PART = "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}"
TEMPLATES = {
    # as Qwen2.5-VL's: a system message where there is none, and whatever role there is
    "any_role": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}" + _PART + "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # tools' answers are users' messages, whose pictures are lost; thoughts before the last message are dropped
    "drops_pictures": "{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}\n</tool_response><|im_end|>\n"
    "{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% for p in m['content'] %}{{ p['text'].split('</think>')[-1] }}{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}" + _PART + "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # text alone, and no tools
    "strings": "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
TEXT = [
    "Which way is up? The answer is <answer>left</answer> or right, of 12 x 34 pixels.",
    "Is it red? <tool_call> crop image 1 </tool_call>",
]


def tokenizer(template: str, pieces: int = 300) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL[1:])
    )
    made.chat_template = TEMPLATES[template]
    return made


def write(
    folder: Path, family: str = "qwen2_5_vl", template: str = "any_role", seed: int = 0, rows: int = 0, head: int = 24
) -> Path:
    """A random model of ``family`` whose weights are large enough that attention matters.

    rows: that its embedding has more than there are tokens. head: width of its two heads, half of its own.
    """
    words = tokenizer(template)
    torch.manual_seed(seed)
    model = _MODELS[family](words, _text(words, len(words) + rows, head))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.6 if "embed" in name else 1.2 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if family != "llama":
        size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
        Qwen2VLImageProcessorPil(size=size, patch_size=8, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    return folder


def _text(words: Any, rows: int, head: int) -> dict[str, Any]:
    section = head // 6  # of a head's angles, those for height, and for width
    return {
        "vocab_size": rows,
        "hidden_size": 2 * head,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head,
        "pad_token_id": 0,
        "eos_token_id": words.eos_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head // 2 - 2 * section, section, section],
        },
        "tie_word_embeddings": True,
    }


def _ids(words: Any) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in zip(names, tokens, strict=True)}


def _qwen2_5(words: Any, text: dict[str, Any]) -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": text["hidden_size"],
    }
    vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_ids(words))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen2(words: Any, text: dict[str, Any]) -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_ids(words))
    return Qwen2VLForConditionalGeneration(config)


def _qwen3(words: Any, text: dict[str, Any]) -> Any:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": text["hidden_size"],
    }
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    text["rope_parameters"]["mrope_interleaved"] = True
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_ids(words))
    return Qwen3VLForConditionalGeneration(config)


def _llama(words: Any, text: dict[str, Any]) -> Any:
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**text))


_MODELS = {"qwen2_5_vl": _qwen2_5, "qwen2_vl": _qwen2, "qwen3_vl": _qwen3, "llama": _llama}
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def build(folder: Path, **fields: Any) -> QwenVL:
    defaults: dict[str, Any] = {"checkpoint": str(folder), "max_new_tokens": 8, "dtype": "float64", "attention": "sdpa"}
    return QwenVL(QwenVL.Config(**(defaults | fields)), device=CPU)


def picture(seed: int, width: int = 40, height: int = 32) -> Picture:
    """Coloured blocks."""
    dice = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(dice.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = dice.randrange(width), dice.randrange(height)
        draw.rectangle((x, y, x + 12, y + 9), fill=tuple(dice.randrange(256) for _ in range(3)))
    return Picture(image)


def opening(seed: int, pictures: int = 1) -> tuple[Message, ...]:
    dice = random.Random(seed)
    seen = tuple(picture(10 * seed + i, dice.choice((20, 40, 70)), dice.choice((18, 33, 50))) for i in range(pictures))
    words = " ".join(dice.choice(("which", "way", "is", "up", "12", "?")) for _ in range(dice.randrange(2, 9)))
    return (Message("system", ("Answer.",)), Message("user", (*seen, words)))


def answer(seed: int, pictures: int = 1) -> Message:
    return Message("tool", (f"Image {seed} is here. ", *(picture(100 + seed + i, 24 + 8 * i, 30) for i in range(pictures))))
