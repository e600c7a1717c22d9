"""Adapters that are added to the weights say, and learn, what peft's layers do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from policies.shared.adapters import add_adapters
from policies.shared.whole_adapters import WholeLinear

WIDTH = 24
LOW, HIGH = 2, 16  # ranks whose gradient goes through A and B, and through that of the weights


def layers(rank: int, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Any, Any]:
    """One adapted layer, ours and peft's, with the same numbers; no part of the adapter is zero."""
    model: Any = nn.ModuleDict({"only": nn.Linear(WIDTH, WIDTH + 4, bias=bias, dtype=dtype)})
    add_adapters(model, rank=rank, alpha=3 * rank, modules="only", seed=1, whole=True)
    nn.init.normal_(model["only"].lora_B["default"].weight, std=0.3)
    plain: Any = copy.deepcopy(model["only"])
    plain.__class__ = lora.Linear
    assert type(model["only"]) is WholeLinear and type(plain) is lora.Linear
    return model["only"].to(dtype), plain.to(dtype)


def gradients(layer: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
    (layer(x) * weight).sum().backward()
    assert all(p.grad is None for p in layer.get_base_layer().parameters())
    return [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


@pytest.mark.parametrize("rank", [LOW, HIGH])
@pytest.mark.parametrize("shape", [(5,), (3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_says_and_learns_what_peft_s_layer_does(rank: int, shape: tuple[int, ...], bias: bool) -> None:
    ours, theirs = layers(rank, bias=bias)
    x, weight = (torch.randn(*shape, width, dtype=torch.float64) for width in (WIDTH, WIDTH + 4))
    seen = [x.clone().requires_grad_() for _ in range(2)]
    assert not torch.allclose(ours(x), ours.get_base_layer()(x), atol=1e-2)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    found = [*gradients(ours, seen[0], weight), seen[0].grad]
    wanted = [*gradients(theirs, seen[1], weight), seen[1].grad]
    for one, other in zip(found, wanted, strict=True):
        assert other is not None and float(other.abs().max()) > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_what_bfloat16_would_swallow_stays_beside_the_weights() -> None:
    ours, theirs = layers(LOW, torch.bfloat16)
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x))
    ours, theirs = layers(LOW, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float()), theirs(x.float()))


def test_an_adapter_that_is_off_or_merged_counts_once() -> None:
    ours, _ = layers(LOW)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    adapted, base = ours(x), ours.get_base_layer()(x)
    ours.enable_adapters(False)
    assert torch.equal(ours(x), base)
    ours.enable_adapters(True)
    ours.merge()
    torch.testing.assert_close(ours(x), adapted, rtol=1e-10, atol=1e-10)
