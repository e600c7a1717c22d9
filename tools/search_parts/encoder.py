"""Sentences as unit vectors, by any model that sentence-transformers can load as Transformer + Pooling (+ Normalize).

Only transformers is needed: what sentence-transformers adds at inference is a pooling that its files name, and a maximal length.
Vectors are always scaled to length 1, so that their products are cosines. Source: Reimers and Gurevych 2019 (arXiv:1908.10084).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from mmrl.caching import digest
from mmrl.errors import ConfigError
from tools.search_parts.caching import shown

BATCH = 32
_UNLIMITED = 10**6  # a tokenizer that knows no maximum says a far larger number


def _mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    weight_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1e-9)


def _first(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return hidden_BTD[torch.arange(len(hidden_BTD)), mask_BT.int().argmax(1)]


def _last(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    length = mask_BT.shape[1]
    return hidden_BTD[torch.arange(len(hidden_BTD)), length - 1 - mask_BT.flip(1).int().argmax(1)]


_POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "cls": _first, "lasttoken": _last}
_OLD_KEYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
_MODULES = ("Transformer", "Pooling", "Normalize")


class Encoder:
    """See the module. Safe between threads.

    path: a folder or a hub id. digest: hash of the weights and of all that decides a vector. Raises ConfigError if it cannot be
    loaded or has parts other than those above.
    """

    def __init__(self, path: str, *, device: str) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModel.from_pretrained(path, dtype=torch.float32).to(device).eval()
            modules = _json(path, "modules.json") or []
            settings = _json(path, "sentence_bert_config.json") or {}
            pooling = _json(path, "1_Pooling/config.json") or {"pooling_mode": "mean"}
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"encoder '{path}' cannot be loaded ({reason}); give a folder or hub id of a sentence encoder"
            ) from error
        others = [kind for module in modules if (kind := str(module.get("type", "")).rpartition(".")[2]) not in _MODULES]
        if others:
            raise ConfigError(
                f"encoder '{path}' has a part {others[0]}; only encoders of Transformer, Pooling and Normalize are read"
            )
        self._pool = _POOLINGS[_pooling(path, pooling)]
        self._limit = _limit(settings, self._tokenizer, self._model.config)
        self._device, self._lock = device, threading.Lock()  # a fast tokenizer keeps its padding between calls
        weights = [name.encode() + value.cpu().numpy().tobytes() for name, value in sorted(self._model.state_dict().items())]
        self.digest = digest(*weights, self._pool.__name__, self._limit, json.dumps(self._tokenizer.get_vocab(), sort_keys=True))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [N, D] of length 1, float32."""
        with self._lock:
            inputs = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._limit, return_tensors="pt")
        inputs = inputs.to(self._device)
        hidden_BTD = self._model(**inputs).last_hidden_state
        return torch.nn.functional.normalize(self._pool(hidden_BTD, inputs["attention_mask"]), dim=1).cpu().numpy()

    def encode_many(self, texts: Sequence[str], title: str) -> np.ndarray:
        """``encode`` in batches of texts of like length, with a bar on a terminal."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
        vectors_ND: np.ndarray | None = None
        for rows in shown(batches, title, len(batches)):
            part = self.encode([texts[row] for row in rows])
            vectors_ND = np.empty((len(texts), part.shape[1]), np.float32) if vectors_ND is None else vectors_ND
            vectors_ND[rows] = part
        return np.zeros((0, 0), np.float32) if vectors_ND is None else vectors_ND


def _json(path: str, name: str) -> Any | None:
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def _pooling(path: str, config: Mapping[str, Any]) -> str:
    """The one pooling that is named, in the new spelling (pooling_mode) or in the old (a flag each)."""
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    mode = config.get("pooling_mode", [_OLD_KEYS.get(flag, flag) for flag in flags] or "mean")
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ConfigError(f"encoder '{path}' pools by {' and '.join(modes)}; one of {', '.join(_POOLINGS)} is needed")
    return modes[0]


def _limit(settings: Mapping[str, Any], tokenizer: Any, config: Any) -> int:
    """Tokens of a text that are read: what sentence-transformers would take."""
    named = settings.get("max_seq_length")
    known = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", _UNLIMITED))
    return int(named) if named else int(min(number for number in (*known, 512 if min(known) >= _UNLIMITED else _UNLIMITED)))
