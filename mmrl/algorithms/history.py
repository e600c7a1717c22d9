"""What prompts earned in earlier rollouts: DDPO's statistics of each prompt (arXiv 2305.13301).

    A = (R - mean H) / (std H + eps), H: the last ``size`` returns of the same prompt, those of this rollout among them

Before a prompt has ``min_count`` of them, mean and deviation are those of the whole rollout. Departure: deviations are unbiased.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrl.messages import Picture
from mmrl.transcripts import Transcript


def prompt_key(transcript: Transcript) -> int:
    """A number for what was asked, text and pictures: int64, the same in every process."""
    parts = [part.key if isinstance(part, Picture) else part for part in transcript.question.parts]
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class PromptHistory:
    """The last returns of each prompt."""

    def __init__(self, size: int, min_count: int) -> None:
        self._size, self._min_count = size, min_count
        self._returns: dict[int, deque[float]] = {}

    def judge(self, keys: Sequence[int], returns_M: Tensor, *, eps: float) -> Tensor:
        """Remember the returns of M episodes of the prompts ``keys``, and say what each is worth: [M]."""
        for key, value in zip(keys, returns_M.tolist(), strict=True):
            self._returns.setdefault(key, deque(maxlen=self._size)).append(value)
        scales = {key: self._scale(key, returns_M) for key in dict.fromkeys(keys)}
        mean_M, std_M = returns_M.new_tensor([scales[key] for key in keys]).reshape(-1, 2).unbind(1)
        return (returns_M - mean_M) / (std_M + eps)

    def _scale(self, key: int, everything_M: Tensor) -> tuple[float, float]:
        own = torch.tensor(list(self._returns[key]), dtype=torch.float64)
        judged_by = own if len(own) >= self._min_count else everything_M.double()
        return float(judged_by.mean()), float(judged_by.std()) if len(judged_by) > 1 else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        rows = [[*values, *[0.0] * (self._size - len(values))] for values in self._returns.values()]
        return {
            "keys": torch.tensor(list(self._returns), dtype=torch.int64),
            "counts": torch.tensor([len(values) for values in self._returns.values()], dtype=torch.int64),
            "returns": torch.tensor(rows, dtype=torch.float64).reshape(-1, self._size),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        kept = zip(state["keys"].tolist(), state["counts"].tolist(), state["returns"].tolist(), strict=True)
        self._returns = {key: deque(values[:count], maxlen=self._size) for key, count, values in kept}
