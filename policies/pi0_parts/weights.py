"""Loading, saving and initialising a pi0 and the statistics that travel with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PI0ForConditionalGeneration

from mmrl.errors import MMRLError
from policies.shared.checkpoints import STATISTICS_FILE, check_kind, find_file, load_pretrained, unloadable

# Where transformers' PI0Processor keeps its statistics, and what they are called there.
PROCESSOR_FILE = "processor_config.json"
_UNREAD = "dit.embed_tokens"  # pi0 never reads the expert's own token embedding


@dataclass(frozen=True)
class Statistics:
    """Mean and std of state [S] and actions [A] in the training data: what the network sees is (x - mean) / std."""

    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    actions_mean: tuple[float, ...]
    actions_std: tuple[float, ...]

    @staticmethod
    def fit(state_NS: Tensor, actions_NA: Tensor) -> Statistics:
        """From data; a dimension that never changes keeps std 1, so that it stays finite."""

        def std(x: Tensor) -> tuple[float, ...]:
            spread = x.double().std(0)
            return tuple(torch.where(spread > 1e-6, spread, torch.ones_like(spread)).tolist())

        return Statistics(
            tuple(state_NS.double().mean(0).tolist()), std(state_NS), tuple(actions_NA.double().mean(0).tolist()), std(actions_NA)
        )

    def moments(self, name: str, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of ``name`` (state, actions), its first ``size`` dimensions, in float32 or, where ``like`` is, float64."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean, std = (torch.tensor(getattr(self, f"{name}_{m}")[:size], device=like.device, dtype=dtype) for m in ("mean", "std"))
        return mean, std

    def dump(self, folder: Path) -> None:
        (folder / STATISTICS_FILE).write_text(json.dumps(self.__dict__, indent=1) + "\n")


def load_statistics(checkpoint: str) -> Statistics | None:
    """statistics.json of an mmrl checkpoint, else the numbers in transformers' processor config, else None."""
    for name in (STATISTICS_FILE, PROCESSOR_FILE):
        found = find_file(checkpoint, name)
        if found is None:
            continue
        try:
            raw: Mapping[str, Any] = json.loads(found.read_text())
            if all(key in raw for key in Statistics.__dataclass_fields__):
                return Statistics(**{key: tuple(float(x) for x in raw[key]) for key in Statistics.__dataclass_fields__})
        except (ValueError, TypeError) as error:
            raise MMRLError(f"{found}: not a valid statistics file ({error}); delete it or compute it again") from error
    return None


def load_model(checkpoint: str, weights: str, dtype: torch.dtype, attention: str, seed: int) -> PI0ForConditionalGeneration:
    """``pretrained``: transformers' own loader, safetensors only. ``random``: config.json's architecture, initialised afresh."""
    if weights == "pretrained":
        options = {"dtype": dtype, "attn_implementation": attention}
        return load_pretrained(PI0ForConditionalGeneration, checkpoint, "pi0", unread=_UNREAD, **options)
    check_kind(checkpoint, PI0ForConditionalGeneration, "pi0")
    try:
        config: Any = AutoConfig.from_pretrained(checkpoint, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise unloadable(checkpoint, "pi0", error) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PI0ForConditionalGeneration(config)
        fan_in_init(model)
    # Not model.to(dtype): it would round the frequencies of times and positions as well, which a loaded model keeps in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def fan_in_init(model: PI0ForConditionalGeneration) -> None:
    """Everything at the size of its inputs, because at widths near 100 transformers' default (std 0.02) hardly starts to learn.

    std 1/sqrt(fan_in) for linear layers; 1/sqrt(width) for words, which Gemma multiplies by sqrt(width); 1/2 for the positions
    of patches, which otherwise drown in the patches' mean colour.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    words, positions, _ = embedding_weights(model)
    nn.init.normal_(words, std=1 / math.sqrt(words.shape[1]))
    nn.init.normal_(positions, std=0.5)


def embedding_weights(model: PI0ForConditionalGeneration) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """The weights that turn words, patch positions and patches into vectors."""
    vlm: Any = model.model.vlm
    patches = vlm.vision_tower.embeddings
    return vlm.get_input_embeddings().weight, patches.position_embedding.weight, patches.patch_embedding.weight


def model_groups(model: PI0ForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """The weights that learn: those of the embeddings apart from all others, because Muon is not for them."""
    embeddings = {id(p) for p in embedding_weights(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "actor": [p for p in trained if id(p) not in embeddings],
        "embedding": [p for p in trained if id(p) in embeddings],
    }
