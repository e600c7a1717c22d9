"""Diffusers' pipelines from a folder or hub id, with their weights or with fresh ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from mmrl.errors import MMRLError
from policies.shared.checkpoints import find_file, first_line, of_run

_LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
_DIFFUSERS: Any = diffusers
_FAILURES = (OSError, ValueError, RuntimeError, TypeError, SafetensorError)
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


def pipeline_name(checkpoint: str) -> str:
    """The class of the checkpoint's pipeline."""
    try:
        return str(_DIFFUSERS.DiffusionPipeline.load_config(checkpoint)["_class_name"])
    except (*_FAILURES, KeyError) as error:
        reason = f"is no checkpoint in diffusers' format ({first_line(error)})"
        if not Path(checkpoint).exists():
            reason = f"is no folder here, and the hub gave no checkpoint in diffusers' format ({first_line(error)})"
        raise MMRLError(f"policy.checkpoint = {checkpoint}: {reason}{of_run(checkpoint)}") from error


def load_pipeline(checkpoint: str, weights: str, dtype: torch.dtype, seed: int) -> Any:
    """``pretrained``: diffusers' own loader, safetensors only. ``random``: see ``fresh_pipeline``."""
    cls = getattr(_DIFFUSERS, pipeline_name(checkpoint))
    try:
        if weights == "random":
            return fresh_pipeline(cls, checkpoint, dtype, seed)
        # Parts that the checkpoint does without, such as SD3's T5, must be named: diffusers would miss them otherwise.
        index = _DIFFUSERS.DiffusionPipeline.load_config(checkpoint)
        absent = {name: None for name, entry in index.items() if isinstance(entry, list | tuple) and entry[0] is None}
        return cls.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True, **absent)
    except _FAILURES as error:
        raise MMRLError(f"policy.checkpoint = {checkpoint}: cannot be loaded ({first_line(error)})") from error


def fresh_pipeline(cls: Any, checkpoint: str, dtype: torch.dtype, seed: int) -> Any:
    """The parts that model_index.json names, initialised afresh; a VAE whose weights are there is loaded with them.

    A VAE is trained before the rest and then left alone, so the folder of an architecture may hold one that is ready.
    """
    parts: dict[str, Any] = {}
    for name, entry in _DIFFUSERS.DiffusionPipeline.load_config(checkpoint).items():
        if name.startswith("_") or not isinstance(entry, list | tuple):
            continue
        library, class_name = entry
        if library is None:
            parts[name] = None
            continue
        part = getattr(_LIBRARIES[library], class_name)
        if not issubclass(part, nn.Module):
            parts[name] = part.from_pretrained(_place(checkpoint, name), **_subfolder(checkpoint, name))
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + sum(name.encode()))
            parts[name] = _fresh(part, checkpoint, name, dtype)
    return cls(**parts)


def _fresh(part: Any, checkpoint: str, name: str, dtype: torch.dtype) -> Any:
    where = _subfolder(checkpoint, name)
    if name == "vae" and find_file(checkpoint, VAE_FILE) is not None:
        return part.from_pretrained(_place(checkpoint, name), dtype=dtype, **where)
    if issubclass(part, _DIFFUSERS.ModelMixin):
        module = part.from_config(part.load_config(_place(checkpoint, name), **where))
        if name != "vae":
            _begin_at_nothing(module)
    else:
        module = part(part.config_class.from_pretrained(_place(checkpoint, name), **where))
        _fan_in(module)
    # Not module.to(dtype): it would round tables of positions as well, which are no weights.
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.eval()


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """All its parts, as safetensors. diffusers warns of each part that the checkpoint does without; that is no news here."""
    said = _DIFFUSERS.utils.logging.get_verbosity()
    _DIFFUSERS.utils.logging.set_verbosity_error()
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    finally:
        _DIFFUSERS.utils.logging.set_verbosity(said)


def _place(checkpoint: str, name: str) -> str:
    return str(Path(checkpoint) / name) if Path(checkpoint).is_dir() else checkpoint


def _subfolder(checkpoint: str, name: str) -> dict[str, str]:
    return {} if Path(checkpoint).is_dir() else {"subfolder": name}


@torch.no_grad()
def _begin_at_nothing(network: nn.Module) -> None:
    """Zeros where a transformer of pictures is trained from: its modulations and its output (DiT, arXiv 2212.09748).

    All else has torch's default, which is of the size of its inputs.
    """
    for name, module in network.named_modules():
        modulation = isinstance(module, nn.Linear) and "norm" in name and name.endswith(".linear")
        if modulation or name in ("proj_out", "conv_out"):
            for parameter in module.parameters():
                parameter.zero_()


@torch.no_grad()
def _fan_in(encoder: nn.Module) -> None:
    """A text encoder at the size of its inputs: at widths near 100 transformers' default (std 0.02) hardly starts to learn."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight.shape[1]))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def lay_out(vae: nn.Module, memory_format: torch.memory_format) -> None:
    """How the weights of its convolutions lie in memory: quicker with channels last, while safetensors writes contiguous ones."""
    for parameter in vae.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
