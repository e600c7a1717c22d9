"""Keys and values in room that grows by blocks: another token is written behind them, instead of copying them all for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # tokens of room more at least


class _Growing(DynamicLayer):
    """keys and values [B, H, L, D] are views of the room's first L tokens. For passes without gradients: it writes in place."""

    _room: tuple[Tensor, Tensor] | None = None

    def hold(self, keys: Tensor, values: Tensor) -> _Growing:
        """Begin with these, which are never written to."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        return self

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        used, new = self.get_seq_length(), key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < used + new:
            self._room = self._larger(key_states, used, used + new), self._larger(value_states, used, used + new)
            if used:
                assert self.keys is not None and self.values is not None
                self._room[0][:, :, :used], self._room[1][:, :, :used] = self.keys, self.values
            self.is_initialized = True
        keys, values = self._room
        keys[:, :, used : used + new], values[:, :, used : used + new] = key_states, value_states
        self.keys, self.values = keys[:, :, : used + new], values[:, :, : used + new]
        return self.keys, self.values

    @staticmethod
    def _larger(states: Tensor, used: int, needed: int) -> Tensor:
        return states.new_empty(*states.shape[:-2], needed + max(BLOCK, used // 4), states.shape[-1])


def growing(layers: Sequence[tuple[Tensor, Tensor]] = ()) -> Any:
    """A cache that begins with keys and values of every layer, or with nothing."""
    if not layers:
        return Cache(layer_class_to_replicate=_Growing)
    return Cache(layers=[_Growing().hold(keys, values) for keys, values in layers])
