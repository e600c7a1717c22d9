"""Low-rank adapters (peft) beside a model's linear layers, and how they are merged into the weights that are saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from mmrl.errors import MMRLError
from policies.shared.checkpoints import first_line
from policies.shared.whole_adapters import WholeLinear

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoraOptions:
    """Low-rank adapters (peft) on the language model's linear layers."""

    rank: int = Field(default=32, gt=0)
    """Rank of the adapters."""
    alpha: int = 16
    """Their output is multiplied by alpha / rank."""
    modules: str = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Regular expression over module names."""


def add_adapters(model: nn.Module, *, rank: int, alpha: int, modules: str, seed: int, whole: bool = False) -> None:
    """Put trainable low-rank adapters beside the layers whose names match ``modules``; freeze all the rest.

    ``seed`` initialises them. whole: they are added to the weights in every pass (``whole_adapters``).
    """
    config: Any = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
    if whole:
        config._register_custom_module({nn.Linear: WholeLinear})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise MMRLError(f"policy.lora.modules = {modules!r} fits no layer ({first_line(error)})") from error


def frozen_twin(module: Model) -> Model:
    """A copy that does not learn. What does not learn in the original either is not copied: it belongs to both."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, memo).requires_grad_(False)


def without_adapters(model: Model) -> Model:
    """``model`` itself, its adapters off: it computes what it would without them."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled=False)
    return model


def merged(model: Model) -> Model:
    """A copy with every peft adapter merged into its base layer, so that the names are transformers' own again."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()  # type: ignore[operator]
                setattr(parent, name, child.get_base_layer())
    return model


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under transformers' own name, with the adapters merged into it: one at a time, without a copy of the model.

    A weight that several modules share comes once.
    """
    adapted = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, parameter in model.named_parameters():
        prefix = next((prefix for prefix in adapted if name.startswith(prefix)), None)
        if prefix is None:
            yield name, parameter.detach()
            continue
        kind = name.removeprefix(f"{prefix}base_layer.")
        if kind == name:
            continue  # of an adapter
        layer: Any = adapted[prefix]
        added = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters) if kind == "weight" else 0
        yield prefix + kind, (parameter + added).detach()
