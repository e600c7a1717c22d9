"""Muon against torch's own, against the singular value decomposition, and beside AdamW in one optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmrl.muon import MuonAdamW, orthogonalize

LR, DECAY = 0.02, 0.1


def gradients(shape: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(6)]


def follow(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[Tensor]) -> Tensor:
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_equals_torchs_muon_up_to_bfloat16(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = MuonAdamW([{"params": [mine], "lr": LR, "weight_decay": DECAY, "muon": True}])
    reference = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    moved = follow(ours, mine, gradients(shape)) - start
    expected = follow(reference, theirs, gradients(shape)) - start
    # bfloat16 has 8 bits: the two agree to a percent or two of the distance moved, and not by accident.
    assert float((moved - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_orthogonalize_keeps_singular_vectors_and_evens_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix)
    inner = u.T @ result @ v.T
    values = inner.diagonal()
    assert result.dtype == torch.float64
    torch.testing.assert_close(inner, torch.diag(values), rtol=0, atol=1e-10)  # the same singular vectors
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    torch.testing.assert_close(orthogonalize(matrix * 1e3), result)  # the size of a gradient does not matter


def test_other_groups_are_adamws() -> None:
    vector, matrix, twin = (nn.Parameter(torch.ones(n)) for n in ((3,), (3, 3), (3,)))
    both = MuonAdamW(
        [{"params": [matrix], "lr": LR, "muon": True}, {"params": [vector], "lr": 0.1, "muon": False}], betas=(0.8, 0.9)
    )
    plain = torch.optim.AdamW([twin], lr=0.1, betas=(0.8, 0.9))
    for gradient in gradients((3, 3)):
        matrix.grad, vector.grad, twin.grad = gradient, gradient[0].clone(), gradient[0].clone()
        both.step()
        plain.step()
        assert matrix.grad is gradient  # gradients are left where they were
    assert torch.equal(vector.detach(), twin.detach())
    assert set(both.state[matrix]) == {"step", "momentum_buffer"}


def test_a_matrix_without_a_gradient_stays() -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = MuonAdamW([{"params": [matrix], "lr": LR, "weight_decay": DECAY, "muon": True}])
    optimizer.step()
    assert torch.equal(matrix.detach(), torch.ones(2, 2)) and not optimizer.state[matrix]
