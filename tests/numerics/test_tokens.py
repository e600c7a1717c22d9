"""Oracles: torch's log_softmax and Categorical in float64, gradcheck, and a count of the memory that is really asked for."""

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrl.numerics.tokens import head_log_probs, token_entropy, token_log_probs

close = torch.testing.assert_close


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 7, 11, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.randint(11, (2, 7), generator=generator)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_log_probs_and_their_gradient_are_torchs(chunk, case):
    logits, ids = case
    want = Categorical(logits=logits).log_prob(ids)
    got = token_log_probs(logits, ids, chunk=chunk)
    close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got_gradient,) = torch.autograd.grad((weights * got).sum(), logits)
    (want_gradient,) = torch.autograd.grad((weights * want).sum(), logits)
    close(got_gradient, want_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_entropy_and_its_gradient_are_torchs(chunk, case):
    logits, _ = case
    want = Categorical(logits=logits).entropy()
    got = token_entropy(logits, chunk=chunk)
    close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (got_gradient,) = torch.autograd.grad((weights * got).sum(), logits)
    (want_gradient,) = torch.autograd.grad((weights * want).sum(), logits)
    close(got_gradient, want_gradient, rtol=1e-11, atol=1e-12)


def test_gradients_by_finite_differences(case):
    logits, ids = case
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, ids, chunk=2), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, chunk=2), (logits,))


def test_a_forbidden_token_counts_for_nothing(case):
    logits, ids = case
    forbidden = logits.detach().clone()
    forbidden[..., 4] = -math.inf
    rest = torch.cat([forbidden[..., :4], forbidden[..., 5:]], dim=-1)
    forbidden.requires_grad_()
    entropy = token_entropy(forbidden)
    close(entropy, Categorical(logits=rest).entropy())
    allowed = torch.where(ids == 4, 0, ids)
    (gradient,) = torch.autograd.grad((entropy + token_log_probs(forbidden, allowed)).sum(), forbidden)
    assert gradient.isfinite().all() and not gradient[..., 4].any()


def test_bfloat16_logits_are_scored_in_float32(case):
    logits, ids = case
    half = logits.detach().bfloat16().requires_grad_()
    got = token_log_probs(half, ids)
    assert got.dtype == token_entropy(half).dtype == torch.float32
    close(got, half.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1), rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


class LargestFloat32(TorchDispatchMode):
    """Remembers the largest float32 tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.float32]
        self.size = max([self.size, *sizes])
        return result


def test_no_float32_copy_of_the_logits_is_made():
    logits = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with LargestFloat32() as seen:
        (token_log_probs(logits, ids, chunk=4).sum() + token_entropy(logits, chunk=4).sum()).backward()
    assert seen.size == 2 * 4 * 64
    with LargestFloat32() as naive:  # the meter does see a full copy where there is one
        logits.float().log_softmax(-1).sum().backward()
    assert naive.size == 2 * 32 * 64


def test_a_chunk_holds_at_least_one_position(case):
    with pytest.raises(ValueError, match="at least 1 position"):
        token_log_probs(*case, chunk=0)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("forbidden", [None, [2, 5]])
def test_the_head_s_log_probs_entropy_and_gradients_are_torchs(chunk, forbidden):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, generator=generator).requires_grad_() for n in (8, 11))
    ids = torch.tensor([0, 1, 3, 4, 6, 7, 10, 10])
    logits = hidden @ weight.T / 0.7
    if forbidden is not None:
        kept = torch.tensor([v for v in range(11) if v not in forbidden])
        want = Categorical(logits=logits[:, kept])
        want_log_probs, want_entropy = want.log_prob(torch.searchsorted(kept, ids)), want.entropy()
        forbidden = torch.tensor(forbidden)
    else:
        want_log_probs, want_entropy = Categorical(logits=logits).log_prob(ids), Categorical(logits=logits).entropy()
    got_log_probs, got_entropy = head_log_probs(hidden, weight, ids, temperature=0.7, forbidden=forbidden, chunk=chunk)
    close(got_log_probs, want_log_probs, rtol=1e-12, atol=1e-12)
    close(got_entropy, want_entropy, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    got = torch.autograd.grad((weights[0] * got_log_probs + weights[1] * got_entropy).sum(), (hidden, weight))
    want = torch.autograd.grad((weights[0] * want_log_probs + weights[1] * want_entropy).sum(), (hidden, weight))
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_head_of_nothing():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.ones(11, 6, requires_grad=True)
    log_probs, entropy = head_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,) and weight.grad is not None and not weight.grad.any()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.ones(2, 6, requires_grad=True), torch.randn(11, 6)
    head_log_probs(hidden, weight, torch.tensor([1, 2]))[0].sum().backward()
    assert hidden.grad is not None and hidden.grad.any() and weight.grad is None
