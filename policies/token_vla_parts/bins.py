"""Actions as tokens: bins between quantiles of the data, as OpenVLA has them (Kim et al. 2024, ``ActionTokenizer``).

OpenVLA's convention, kept: V = 256 edges are spread evenly over [-1, 1], so that there are 255 bins between them. x, the action
scaled so that its 1 % and 99 % quantiles are -1 and 1 and cut there, belongs to bin b where edge b <= x < edge b + 1. Its token
is entry (end of the vocabulary) - 1 - b, so that bins descend from the last entry, and it is decoded as the bin's centre. x = 1
has a token of its own (b = 255), which means the same as b = 254.

Departure: a dimension that took only one or two values in the data, such as a gripper's, is not divided into bins. Two values are
the first and the last token, which mean exactly these; one value is the middle token. Every other token is ruled out there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.errors import MMRLError
from policies.shared.checkpoints import STATISTICS_FILE, find_file


@dataclass(frozen=True)
class Statistics:
    """1 % and 99 % quantile of each dimension of the actions [A] and, where the data has states, of the states [S].

    Where the two are equal although a dimension varies, they are its minimum and maximum instead.

    actions_choices: for each dimension of the actions, the only values it took if these are one or two, in order; otherwise ().
    """

    actions_q01: tuple[float, ...]
    actions_q99: tuple[float, ...]
    actions_choices: tuple[tuple[float, ...], ...]
    state_q01: tuple[float, ...] | None = None
    state_q99: tuple[float, ...] | None = None

    @staticmethod
    def fit(actions_NA: Tensor, state_NS: Tensor | None) -> Statistics:
        choices = (torch.unique(values_N) for values_N in actions_NA.unbind(1))
        state_low, state_high = (None, None) if state_NS is None else _quantiles(state_NS)
        return Statistics(
            *_quantiles(actions_NA),
            tuple(tuple(values.tolist()) if len(values) <= 2 else () for values in choices),
            state_low,
            state_high,
        )

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> Statistics:
        """From plain data; a file of ``mmrl statistics`` says nothing of choices, but one value shows in equal bounds."""
        low, high = _bounds(raw, "actions")
        told = raw.get("actions_choices") or only_value(low, high)
        state = _bounds(raw, "state") if "state_q01" in raw else (None, None)
        return Statistics(low, high, tuple(tuple(float(x) for x in values) for values in told), *state)

    def text(self) -> str:
        return json.dumps({name: value for name, value in self.__dict__.items() if value is not None}, indent=1) + "\n"


def load_statistics(checkpoint: str) -> Statistics | None:
    """Those of a checkpoint's statistics.json; None where it has no such file."""
    found = find_file(checkpoint, STATISTICS_FILE)
    if found is None:
        return None
    try:
        return Statistics.parse(json.loads(found.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise MMRLError(f"{found}: not a statistics file with actions_q01 and actions_q99 ({error}); compute it again") from error


class Bins(nn.Module):
    """V tokens for each of A dimensions; what they mean in the environment's units, and which of them a dimension may use."""

    edges_V: Tensor
    low_A: Tensor
    high_A: Tensor
    values_AV: Tensor  # float64: what a token means
    allowed_AV: Tensor
    fixed_A: Tensor  # True for a dimension that is not divided into bins

    def __init__(
        self, low: tuple[float, ...], high: tuple[float, ...], choices: tuple[tuple[float, ...], ...], bins: int
    ) -> None:
        super().__init__()
        edges_V = spread(bins)
        centres_V = (edges_V[:-1] + edges_V[1:]) / 2
        centres_V = torch.cat([centres_V, centres_V[-1:]])  # the last token means what the one before it means
        bounds_A2 = [(values[0], values[-1]) if values else pair for values, *pair in zip(choices, low, high, strict=True)]
        low_A, high_A = torch.tensor(bounds_A2, dtype=torch.float64).reshape(-1, 2).unbind(1)
        values_AV = low_A[:, None] + (centres_V + 1) / 2 * (high_A - low_A)[:, None]
        allowed_AV = torch.ones_like(values_AV, dtype=torch.bool)
        for dimension, values in enumerate(choices):
            if values:
                places = torch.tensor([0, bins - 1] if len(values) == 2 else [bins // 2])
                allowed_AV[dimension] = False
                allowed_AV[dimension, places] = True
                values_AV[dimension, places] = torch.tensor(values, dtype=torch.float64)
        fixed_A = torch.tensor([bool(values) for values in choices])
        buffers = {
            "edges_V": edges_V,
            "low_A": low_A,
            "high_A": high_A,
            "values_AV": values_AV,
            "allowed_AV": allowed_AV,
            "fixed_A": fixed_A,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)  # the statistics are what is saved

    @property
    def varies_A(self) -> Tensor:
        """Whether a dimension has a choice at all."""
        return self.allowed_AV.sum(1) > 1

    def encode(self, x_NA: Tensor) -> Tensor:
        """Numbers in the environment's units, [..., A] -> tokens of the same shape, int64 from 0 to V - 1."""
        scaled = (x_NA.to(self.low_A) - self.low_A) * 2 / (self.high_A - self.low_A) - 1  # 0 / 0 where it never varies
        tokens = torch.bucketize(scaled.clamp(-1, 1).contiguous(), self.edges_V, right=True) - 1
        last = len(self.edges_V) - 1
        chosen = torch.where(self.varies_A, torch.where(scaled < 0, 0, last), len(self.edges_V) // 2)
        return torch.where(self.fixed_A, chosen, tokens)

    def decode(self, tokens_NA: Tensor) -> Tensor:
        """Tokens [..., A] -> float32 numbers in the environment's units, of the same shape."""
        dimensions_A = torch.arange(len(self.values_AV), device=tokens_NA.device)
        return self.values_AV[dimensions_A, tokens_NA].float()


def spread(bins: int) -> Tensor:
    """``numpy.linspace(-1, 1, bins)``, to the last bit: float64 [V]."""
    edges_V = torch.arange(bins, dtype=torch.float64) * (2 / (bins - 1)) - 1
    edges_V[-1] = 1
    return edges_V


def only_value(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The choices of dimensions of which nothing but bounds is known: one value where these are equal."""
    return tuple(() if a < b else (a,) for a, b in zip(low, high, strict=True))


def _bounds(raw: Mapping[str, Any], name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """1 % and 99 % quantile of each dimension; where they are equal its extremes, if those are known (as in Statistics)."""
    inner = [(float(low), float(high)) for low, high in zip(raw[f"{name}_q01"], raw[f"{name}_q99"], strict=True)]
    outer = [*zip(raw.get(f"{name}_min", ()), raw.get(f"{name}_max", ()), strict=True)] or inner
    pairs = [quantiles if quantiles[0] < quantiles[1] else ends for quantiles, ends in zip(inner, outer, strict=True)]
    return tuple(float(low) for low, _ in pairs), tuple(float(high) for _, high in pairs)


def _quantiles(x_ND: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    at = torch.tensor([0.01, 0.99], dtype=torch.float64, device=x_ND.device)
    low_D, high_D = torch.quantile(x_ND.double(), at, dim=0)
    rare_D = low_D == high_D
    low_D = torch.where(rare_D, x_ND.double().amin(0), low_D)
    high_D = torch.where(rare_D, x_ND.double().amax(0), high_D)
    return tuple(low_D.tolist()), tuple(high_D.tolist())
