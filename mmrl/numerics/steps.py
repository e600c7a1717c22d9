"""What the Gaussian steps of a flow model are compared by: ratios of their likelihoods, and divergences of their means.

N samples of K steps, each a draw of D numbers from N(mean, std^2); delta = t - t' is a step's length. A step's log-probability is
its **mean** over the D numbers, as image projects have it (so a ratio is a geometric mean, and clip ranges are 1e-5 to 1e-3).
Two policies share std and delta, which the schedule sets. Steps with std 0 have no density: 0 everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


def mean_shift(means_NKD: Tensor, other_NKD: Tensor) -> Tensor:
    """Mean over D of (mean - other)^2, in float32 or better: [N, K]."""
    dtype = torch.promote_types(means_NKD.dtype, torch.float32)
    return (means_NKD.to(dtype) - other_NKD.to(dtype)).pow(2).mean(-1)


def step_kl(means_NKD: Tensor, reference_NKD: Tensor, stds_NK: Tensor, deltas_NK: Tensor, *, form: str) -> Tensor:
    """How far steps are from a reference's, in one of the three normalisations that are published: [N, K].

    exact: the KL of a number, mean (mu - mu_ref)^2 / (2 std^2) (PromptRL; the formula of Flow-GRPO's paper, arXiv 2505.05470,
    divided by D). flow_grpo: that times delta, as Flow-GRPO's code leaves sqrt(delta) out of std. means: mean (mu - mu_ref)^2
    (Flow-Factory, x-based).
    """
    if form not in _KL_FORMS:
        raise ValueError(f"step_kl's form {form!r} is unknown; use one of {', '.join(sorted(_KL_FORMS))}")
    return _KL_FORMS[form](mean_shift(means_NKD, reference_NKD), stds_NK, deltas_NK)


def _exact_kl(shift_NK: Tensor, stds_NK: Tensor) -> Tensor:
    noisy_NK = stds_NK > 0
    safe_NK = torch.where(noisy_NK, stds_NK, torch.ones_like(stds_NK))  # keeps 0 / 0 out of the backward pass as well
    return torch.where(noisy_NK, shift_NK / (2 * safe_NK**2), torch.zeros_like(shift_NK))


_KL_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "exact": lambda shift_NK, stds_NK, deltas_NK: _exact_kl(shift_NK, stds_NK),
    "flow_grpo": lambda shift_NK, stds_NK, deltas_NK: _exact_kl(shift_NK, stds_NK) * deltas_NK,
    "means": lambda shift_NK, stds_NK, deltas_NK: shift_NK,
}


class _Gap(NamedTuple):
    log_probs_NK: Tensor  # new - old
    stds_NK: Tensor | None
    shift_NK: Tensor | None  # of the means


def step_log_ratio(
    log_probs_NK: Tensor,
    old_log_probs_NK: Tensor,
    *,
    form: str,
    stds_NK: Tensor | None = None,
    means_NKD: Tensor | None = None,
    old_means_NKD: Tensor | None = None,
) -> Tensor:
    """The logarithm of what a surrogate clips: [N, K], 0 at unchanged weights.

    likelihood: log p - log p_old. unscaled: that times 2 std^2, which is what coefficients-preserving sampling has (arXiv
    2509.05952), whose log p is -mean (x' - mean)^2; needs stds_NK. guard: GRPO-Guard's (arXiv 2510.22319), std (log p - log p_old
    + b) with b = mean (mu - mu_old)^2 / (2 std^2), whose mean under the old policy is 0, where that of the first is -b, and whose
    variance is that of mu - mu_old whatever the step; needs all three.
    """
    if form not in _LOG_RATIOS:
        raise ValueError(f"step_log_ratio's form {form!r} is unknown; use one of {', '.join(sorted(_LOG_RATIOS))}")
    shift_NK = None if means_NKD is None or old_means_NKD is None else mean_shift(means_NKD, old_means_NKD)
    return _LOG_RATIOS[form](_Gap(log_probs_NK - old_log_probs_NK, stds_NK, shift_NK))


def _unscaled(gap: _Gap) -> Tensor:
    assert gap.stds_NK is not None
    return 2 * gap.stds_NK**2 * gap.log_probs_NK


def _guarded(gap: _Gap) -> Tensor:
    assert gap.stds_NK is not None and gap.shift_NK is not None
    bias_NK = _exact_kl(gap.shift_NK, gap.stds_NK)
    return gap.stds_NK * (gap.log_probs_NK + bias_NK)


_LOG_RATIOS: Mapping[str, Callable[[_Gap], Tensor]] = {
    "likelihood": lambda gap: gap.log_probs_NK,
    "unscaled": _unscaled,
    "guard": _guarded,
}
