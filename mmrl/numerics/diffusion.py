"""One denoising step of a model that predicts noise, as a Gaussian: DDIM with noise, which DDPO trains.

Convention: ``x_t = sqrt(s) x0 + sqrt(1 - s) noise`` with s the signal's share of the variance (alpha-bar), which grows from near
0 (noise) to near 1 (data). A step goes from s to s' > s. With e the predicted noise and the clean estimate
``x0_hat = (x - sqrt(1 - s) e) / sqrt(s)``,

    std  = eta sqrt((1 - s') / (1 - s)) sqrt(1 - s / s')
    mean = sqrt(s') x0_hat + sqrt(1 - s' - std^2) e

(Song et al. 2021, arXiv 2010.02502, formulas 12 and 16). eta = 0 is deterministic, eta = 1 the ancestral sampling of DDPM. Drawn
steps as actions are DDPO's (Black et al. 2023, arXiv 2305.13301).

A model of noise is a flow model in other coordinates: see ``flow_time``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.numerics.flow import Transition


def ddim(x_t: Tensor, noise: Tensor, share: Tensor, share_next: Tensor, *, eta: float) -> Transition:
    """The Gaussian from which x at ``share_next`` is drawn, given ``x_t`` and the noise predicted there (both [B, ...]).

    share, share_next: alpha-bar before and after the step, a number or [B] each. In float32, or float64 if ``x_t`` is. Raises
    ValueError for an eta outside 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is out of range for ddim; use 0 to 1")
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    x_t, noise = x_t.to(dtype), noise.to(dtype)
    share, share_next = (_over_batch(s, x_t) for s in (share, share_next))
    # Clamped: a last step whose s' is 1 may come out as -0 or less by rounding.
    variance = eta**2 * ((1 - share_next) / (1 - share) * (1 - share / share_next)).clamp(min=0)
    clean = (x_t - (1 - share).sqrt() * noise) / share.sqrt()
    mean = share_next.sqrt() * clean + (1 - share_next - variance).clamp(min=0).sqrt() * noise
    return Transition(mean, variance.sqrt())


def noised(clean: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """x_t = sqrt(s) x0 + sqrt(1 - s) noise, in float32 or better; share a number or [B]."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    clean, noise = clean.to(dtype), noise.to(dtype)
    share = _over_batch(share, clean)
    return share.sqrt() * clean + (1 - share).sqrt() * noise


def flow_time(share: Tensor) -> Tensor:
    """The time t of ``mmrl.numerics.flow`` at which data and noise are mixed in the same ratio.

    Where x_t is a mixture of ``share``, ``x_t / (sqrt(s) + sqrt(1 - s))`` is (1 - t) x0 + t noise.
    """
    return (1 - share).sqrt() / (share.sqrt() + (1 - share).sqrt())


def share_at(t: Tensor) -> Tensor:
    """The inverse of ``flow_time``."""
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


def _over_batch(value: Tensor, like: Tensor) -> Tensor:
    value = value.to(like.device, like.dtype)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
