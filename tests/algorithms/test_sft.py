"""SFT: the policy's own loss, scaled by the micro-batch's share."""

from __future__ import annotations

import pytest
import torch

from mmrl.algorithms.sft import SFT
from mmrl.types import Examples, Loss, Observation


class Squared:
    """Imitates with one number: the mean square of its distance from the actions."""

    def __init__(self) -> None:
        self.weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def supervised_loss(self, examples: Examples, generator: torch.Generator) -> Loss:
        value = (self.weight - examples.actions_BHA).pow(2).mean() + torch.rand((), generator=generator) * 0
        return Loss(value, {"error": value.detach()})


def test_a_share_scales_the_loss_but_not_what_is_logged() -> None:
    actions_BHA = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]], dtype=torch.float64)
    examples = Examples(Observation({}, None, ("a", "b")), actions_BHA, torch.ones(2, 2, dtype=torch.bool))
    policy, algorithm = Squared(), SFT(SFT.Config(batch_size=8))
    loss = algorithm.loss(policy, examples, share=0.25, generator=torch.Generator())  # type: ignore[arg-type]
    loss.value.backward()
    assert float(loss.value.detach()) == pytest.approx(0.25 * (0.25 + 2.25 + 6.25 + 12.25) / 4)
    assert float(loss.metrics["error"]) == pytest.approx((0.25 + 2.25 + 6.25 + 12.25) / 4)
    assert policy.weight.grad is not None and float(policy.weight.grad) == pytest.approx(0.25 * 2 * (0.5 - 2.5))
    assert algorithm.batch_size == 8
