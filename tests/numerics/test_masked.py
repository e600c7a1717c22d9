"""Oracle: torch's reductions over the kept entries alone."""

import math

import pytest
import torch

from mmrl.numerics import masked

REDUCTIONS = {
    "sum": torch.sum,
    "mean": torch.mean,
    "var": torch.var,
    "std": torch.std,
    "min": torch.min,
    "max": torch.max,
}


@pytest.mark.parametrize("name", sorted(REDUCTIONS))
def test_a_masked_reduction_is_that_of_the_kept_entries(name):
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.5
    x = torch.where(mask, kept, torch.full_like(kept, math.nan)).requires_grad_()
    got = getattr(masked, name)(x, mask)
    torch.testing.assert_close(got, REDUCTIONS[name](kept[mask]), rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(got, x)
    assert gradient.isfinite().all() and not gradient[~mask].any() and gradient[mask].any()


def test_a_mask_broadcasts_over_the_entries():
    x = torch.arange(6.0).reshape(2, 3)
    assert masked.mean(x, torch.tensor([[True], [False]])).item() == 1


def test_nothing_kept_is_not_nan():
    x, nothing = torch.ones(3), torch.zeros(3, dtype=torch.bool)
    assert [getattr(masked, name)(x, nothing).item() for name in ("sum", "mean", "var", "std")] == [0, 0, 0, 0]
    assert (masked.min(x, nothing).item(), masked.max(x, nothing).item()) == (math.inf, -math.inf)


def test_one_entry_has_no_variance():
    assert masked.var(torch.tensor([3.0, 4.0]), torch.tensor([True, False])).item() == 0
