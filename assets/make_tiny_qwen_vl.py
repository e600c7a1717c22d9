"""Write the architecture, tokenizer and image processor of a tiny Qwen2.5-VL that talks and calls tools (no weights).

    python assets/make_tiny_qwen_vl.py [FOLDER]

FOLDER/tiny_qwen_vl_architecture. The classes are transformers' own, only the numbers are small: pieces of pictures are 14 pixels
wide instead of 28, and the tokenizer's 640 pieces are learnt from what the questions of simulators/prompts.py say.
``configs/pretrain/tiny_qwen_vl.yaml`` trains it from random weights.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmrl  # noqa: F401  isort: skip (first: it lets torchvision be imported beside a CPU torch)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmrl.calling import HermesCalls, Toolbox, load_tools
from mmrl.messages import ToolCall
from simulators.prompts import CountingQuestions, DetailQuestions, OrientationQuestions, SearchQuestions, texts

PIECES = 640
QUESTIONS = 400  # of each kind, for the tokenizer
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WHOLE = ("<tool_call>", "</tool_call>", "<answer>", "</answer>")  # tokens, but none that is special
# Qwen's own template without its system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen's: words with the space before them, and every digit by itself.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def spoken() -> Iterator[str]:
    """What is said about the questions, calls as the model writes them."""
    write = HermesCalls(HermesCalls.Config()).render
    yield from ("system", "user", "assistant", "tool")
    pictures = Toolbox(load_tools(["tools.crop:crop", "tools.rotate:rotate", "tools.flip:flip"]))
    details = DetailQuestions.Config(size=168, sign=(28, 40), kinds=("digit", "colour", "letter"))
    for asked, runner in (
        (DetailQuestions(details), pictures),
        (OrientationQuestions(OrientationQuestions.Config(operations=("rotate_90", "rotate_180", "flip_horizontal"))), pictures),
        (CountingQuestions(CountingQuestions.Config()), None),
    ):
        yield from texts(asked, QUESTIONS, runner)
    with tempfile.TemporaryDirectory() as folder:
        search = SearchQuestions(SearchQuestions.Config(folder=f"{folder}/pages"))
        corpus = str(search.corpus)
        found = load_tools(
            [
                {"target": "tools.text_search:TextSearch", "corpus": corpus},
                {"target": "tools.image_search:ImageSearch", "images": corpus},
            ]
        )
        # Without the names: they would be pieces of their own, and those of devices that training never asks about never learned.
        titles = [json.loads(line)["title"] for line in search.corpus.read_text().splitlines()]
        names = re.compile("|".join(rf"\b{title}\b" for title in titles), re.IGNORECASE)
        yield from (names.sub("", text) for text in texts(search, QUESTIONS, Toolbox(found)))
    for call in (
        ToolCall("crop", {"image": 1, "box": [0, 56, 112, 168]}),
        ToolCall("rotate", {"image": 1, "degrees": 90}),
        ToolCall("image_search", {"image": 1}),
        ToolCall("text_search", {"query": ""}),
    ):
        yield from [write([call])] * QUESTIONS


def build_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES - len(WHOLE), special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(spoken(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL[1:])
    )
    tokenizer.add_tokens(list(WHOLE))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write(
    folder: Path, *, width: int = 96, layers: int = 4, vision_width: int = 64, vision_layers: int = 3, patch: int = 7
) -> Path:
    tokenizer = build_tokenizer()
    heads = width // 32  # of 32 numbers each, the narrowest that vLLM computes on a CPU
    pairs = width // heads // 2  # of numbers that a head rotates, shared out among time, height and width
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8],
        },
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": vision_width,
        "intermediate_size": 3 * vision_width,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "window_size": 8 * patch,
        "fullatt_block_indexes": list(range(vision_layers)),
    }
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = dict.fromkeys(("shortest_edge", "longest_edge"), (8 * patch) ** 2)  # a crop is shown as large as what it is from
    Qwen2VLImageProcessorPil(patch_size=patch, size=limits).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    print(f"wrote {write(folder / 'tiny_qwen_vl_architecture')}")


if __name__ == "__main__":
    main()
