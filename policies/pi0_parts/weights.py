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
from transformers import AutoConfig, AutoTokenizer, PI0ForConditionalGeneration, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mmrl.errors import MMRLError

STATISTICS_FILE = "statistics.json"
# Where transformers' PI0Processor keeps its statistics, and what they are called there.
PROCESSOR_FILE = "processor_config.json"


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

        return Statistics(tuple(state_NS.double().mean(0).tolist()), std(state_NS), tuple(actions_NA.double().mean(0).tolist()), std(actions_NA))

    def dump(self, folder: Path) -> None:
        (folder / STATISTICS_FILE).write_text(json.dumps(self.__dict__, indent=1) + "\n")


def load_statistics(checkpoint: str) -> Statistics | None:
    """statistics.json of an mmrl checkpoint, else the numbers in transformers' processor config, else None."""
    for name in (STATISTICS_FILE, PROCESSOR_FILE):
        found = _file(checkpoint, name)
        if found is None:
            continue
        try:
            raw: Mapping[str, Any] = json.loads(found.read_text())
            if all(key in raw for key in Statistics.__dataclass_fields__):
                return Statistics(**{key: tuple(float(x) for x in raw[key]) for key in Statistics.__dataclass_fields__})
        except (ValueError, TypeError) as error:
            raise MMRLError(f"{found}: not a valid statistics file ({error}); delete it or compute it again") from error
    return None


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise MMRLError(f"policy.checkpoint = {checkpoint}: no tokenizer could be loaded from there ({_first_line(error)})") from error


def load_model(checkpoint: str, weights: str, dtype: torch.dtype, attention: str, seed: int) -> PI0ForConditionalGeneration:
    """``pretrained``: transformers' own loader, safetensors only. ``random``: the architecture of config.json, initialised afresh."""
    try:
        if weights == "pretrained":
            return PI0ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention, use_safetensors=True)
        config = AutoConfig.from_pretrained(checkpoint, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise MMRLError(f"policy.checkpoint = {checkpoint}: cannot be loaded as a pi0 ({_first_line(error)})") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PI0ForConditionalGeneration(config)
        fan_in_init(model)
    return model.to(dtype)


def fan_in_init(model: nn.Module) -> None:
    """std 1/sqrt(fan_in) for every linear layer: at widths near 100 transformers' default (std 0.02) hardly starts to learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _file(checkpoint: str, name: str) -> Path | None:
    if Path(checkpoint).is_dir():
        path = Path(checkpoint) / name
        return path if path.is_file() else None
    try:
        found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return Path(found) if found else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
