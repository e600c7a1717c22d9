"""Chat models that read and write text alone, as policies: any of transformers' causal language models with full attention.

The weights may stand in a GGUF file, which is unpacked into ordinary weights as it is loaded.

Departures from transformers' ``generate``: as in ``policies.qwen_vl``. Models whose layers attend within a window, or keep
another state than keys and values, and those that change the logits after the output head, are refused.
"""

from __future__ import annotations

import importlib.util
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmrl.errors import MMRLError
from policies.chat_parts.network import Network
from policies.chat_parts.policy import STRICT, ChatConfig, ChatPolicy
from policies.shared.adapters import LoraOptions
from policies.shared.checkpoints import load_tokenizer
from policies.shared.vision_language import load_model

_PACKAGE = "package:"


@dataclass(frozen=True, config=STRICT)
class TextLoraOptions(LoraOptions):
    """Low-rank adapters (peft) on the linear layers."""

    modules: str = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    """Regular expression over module names."""


class LanguageModel(ChatPolicy):
    """See the module."""

    kind: ClassVar[str] = "language_model"

    @dataclass(frozen=True, kw_only=True, config=STRICT)
    class Config(ChatConfig):
        """Fields of a ``policies.language_model:LanguageModel`` block. ``checkpoint: package:NAME`` is a package's folder."""

        gguf_file: str | None = None
        """File of the checkpoint to read instead of safetensors and json; a folder without it (a saved one) is read as usual."""
        lora: TextLoraOptions = field(default_factory=TextLoraOptions)
        """Used with ``train: lora``."""

    config: Config

    def __init__(self, config: Config, *, device: torch.device) -> None:
        super().__init__(replace(config, checkpoint=_folder(config.checkpoint)), device=device)

    def _load(self, dtype: torch.dtype) -> Any:
        config = self.config
        model = load_model(
            config.checkpoint,
            config.weights,
            dtype,
            config.attention,
            config.seed,
            loader=AutoModelForCausalLM,
            what="language model",
            **self._file(),
        )
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)  # the weights are plain, and are saved so
            model._weight_conversions = None
        kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise MMRLError(
                f"policy.checkpoint = {config.checkpoint}: has layers of {', '.join(sorted(kinds))}; use a model without"
            )
        return model

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        file = self._file()
        # AutoTokenizer would first read the whole file twice, to learn which class this is.
        return load_tokenizer(self.config.checkpoint, loader=PreTrainedTokenizerFast if file else AutoTokenizer, **file)

    def _file(self) -> dict[str, Any]:
        """What tells transformers of the GGUF file, where there is one."""
        config = self.config
        if config.gguf_file is None:
            return {}
        folder = Path(config.checkpoint)
        if folder.is_dir() and not (folder / config.gguf_file).is_file():
            if (folder / "config.json").is_file():
                return {}
            raise MMRLError(f"policy.gguf_file = {config.gguf_file}: there is no such file in {folder}")
        if importlib.util.find_spec("gguf") is None:
            raise MMRLError("policy.gguf_file needs the package gguf; install it with: pip install 'mmrl-framework[gguf]'")
        return {"gguf_file": config.gguf_file}

    def _network(self) -> Network:
        pad = self.model.config.pad_token_id
        network = Network(self.model, 0 if pad is None else pad)
        with torch.no_grad():
            ids = torch.arange(4, device=network.device)[None]
            ours = network.head(self.model.base_model(input_ids=ids).last_hidden_state)
            theirs = self.model(input_ids=ids).logits
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
            raise MMRLError(
                f"policy.checkpoint = {self.config.checkpoint}: changes the logits after its output head, which is not supported"
            )
        return network


def _folder(checkpoint: str) -> str:
    """The folder of ``package:NAME``; any other place as it is."""
    if not checkpoint.startswith(_PACKAGE):
        return checkpoint
    name = checkpoint.removeprefix(_PACKAGE)
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise MMRLError(f"policy.checkpoint = {checkpoint}: the package {name} is not installed")
    return str(Path(found.origin).parent)
