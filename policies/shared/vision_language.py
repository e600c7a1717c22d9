"""Loading language models of transformers, with eyes or without, and the groups in which their weights learn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from policies.shared.checkpoints import load_pretrained, unloadable


def load_model(
    checkpoint: str,
    weights: str,
    dtype: torch.dtype,
    attention: str,
    seed: int,
    *,
    loader: Any = AutoModelForImageTextToText,
    what: str = "vision-language model",
    **where: Any,
) -> Any:
    """``pretrained``: transformers' own loader, safetensors only. ``random``: config.json's architecture, initialised afresh.

    loader: transformers' class, of ``what``. where: further arguments with which transformers finds the checkpoint's files.
    """
    if weights == "pretrained":
        options = {"dtype": dtype, "attn_implementation": attention, **where}
        return load_pretrained(loader, checkpoint, what, **options).eval()
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint, **where)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = loader.from_config(config, attn_implementation=attention)
            fan_in_init(model)
    except (OSError, ValueError) as error:
        raise unloadable(checkpoint, what, error) from error
    # Not model.to(dtype): it would round the frequencies of positions as well, which a loaded model keeps in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def fan_in_init(model: Any) -> None:
    """Everything at the size of its inputs, because at widths near 100 transformers' default (std 0.02) hardly starts to learn.

    std 1/sqrt(fan_in) for linear layers and convolutions; 1/2 for positions of patches. Words have std 1, but 1/sqrt(width) where
    the model multiplies them by sqrt(width), as Gemma does, or uses them in the output as well.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    words = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is words.weight
    small = tied or hasattr(words, "embed_scale")
    nn.init.normal_(words.weight, std=1 / math.sqrt(words.weight.shape[1]) if small else 1.0)


def model_groups(model: Any) -> dict[str, list[nn.Parameter]]:
    """The weights that learn: those that turn words, positions and patches into vectors, and the head, apart from all others.

    Muon is not for them.
    """
    kinds = nn.Embedding | nn.Conv2d | nn.Conv3d
    apart = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters(recurse=False)}
    apart |= {id(p) for p in model.get_output_embeddings().parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "actor": [p for p in trained if id(p) not in apart],
        "embedding": [p for p in trained if id(p) in apart],
    }
