"""Tiny CLIP, BLIP and detection models with random weights, as folders that transformers opens, and pictures to show them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmrl.messages import Message, Picture
from mmrl.transcripts import Question, Transcript, Turn

SIZE = 32


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture of random pixels, width by height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def drawn(image: Image.Image | None, prompt: str = "a cat", task: int = 0, **details: Any) -> Transcript:
    """A conversation in which a picture was asked for and given; None: a text was."""
    question = Question("drawn", (prompt,), (), lambda answer: 0.0, {"prompt": prompt, **details})
    part = "I cannot." if image is None else Picture(image)
    return Transcript(task, question, (Message("user", (prompt,)),), (Turn(Message("assistant", (part,))),), "", "answer")


def tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word for each token, letters for other words; ends in <end>, which is also the padding, as CLIP's."""
    vocabulary = {"<start>": 0, "<unknown>": 1, **{word: place + 2 for place, word in enumerate(words)}}
    vocabulary["<end>"] = len(vocabulary)
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    ends = [("<start>", 0), ("<end>", vocabulary["<end>"])]
    inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )


WORDS = ("a", "cat", "dog", "red", "blue", "photo", "of", "object", *string.ascii_lowercase[1:])


def clip_folder(folder: Path, seed: int = 0) -> str:
    """A CLIP model of a few thousand weights, large enough that pictures and prompts differ."""
    torch.manual_seed(seed)
    words = tokenizer(WORDS)
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **layers,
            "vocab_size": len(words),
            "max_position_embeddings": 12,
            "eos_token_id": words.eos_token_id,
            "bos_token_id": words.bos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        vision_config={**layers, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return str(folder)
