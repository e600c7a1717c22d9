"""Advantages: how much better a decision did than expected. Pure tensor functions, no gradients needed or kept.

Two conventions differ between projects and are therefore arguments: what a group's reward is compared with (``baseline``) and
divided by (``scale``). Standard deviations are unbiased (divisor n - 1), as in pi_RL and TRL; some projects use n.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrl.numerics import masked


@torch.no_grad()
def gae(
    rewards_TB: Tensor,
    values_TB: Tensor,
    next_values_TB: Tensor,
    terminated_TB: Tensor,
    truncated_TB: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over T decisions of B environments: (advantages_TB, returns_TB).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t); A_t = delta_t + gamma lam A_{t+1}; the return is A_t + V(s_t).
    ``next_values_TB`` is the value of the observation after decision t; at an episode's end that is the *final* observation, not
    the first of the next episode. Termination: nothing follows, the bootstrap is dropped (next_values may be anything there).
    Truncation: the episode would have gone on, so it bootstraps, but the next row is another episode's and the trace is cut.
    gamma is per decision (a chunk of actions), not per environment step.
    """
    future_TB = torch.where(terminated_TB, torch.zeros_like(next_values_TB), next_values_TB)
    delta_TB = rewards_TB + gamma * future_TB - values_TB
    decay_TB = gamma * lam * (~(terminated_TB | truncated_TB)).to(delta_TB.dtype)
    advantages_TB = torch.empty_like(delta_TB)
    following_B = torch.zeros_like(delta_TB[0])
    for t in reversed(range(delta_TB.shape[0])):
        following_B = delta_TB[t] + decay_TB[t] * following_B
        advantages_TB[t] = following_B
    return advantages_TB, advantages_TB + values_TB


@torch.no_grad()
def group_relative(rewards_PG: Tensor, *, scale: str = "group_std", baseline: str = "mean", eps: float = 1e-6) -> Tensor:
    """Each of G rewards of a prompt (task) against the others of its group: (reward - baseline) / (scale + eps), [P, G].

    baseline: ``mean`` of the group (GRPO, arXiv 2402.03300) or ``leave_one_out``, the mean of the other G - 1 (RLOO, arXiv
    2402.14740), which is G / (G - 1) times as large an advantage.
    scale: ``group_std`` (GRPO), ``batch_std`` over all P x G rewards (flow_grpo's default), or ``none`` (Dr.GRPO, arXiv
    2503.20783; eps is not used). Both are unbiased standard deviations of the rewards.

    Raises ValueError for an unknown option and where a group (or batch) of one leaves nothing to compare with.
    """
    if baseline not in _BASELINES or scale not in _SCALES:
        raise ValueError(
            f"group_relative knows baselines {sorted(_BASELINES)} and scales {sorted(_SCALES)}, not {baseline!r} and {scale!r}"
        )
    group = rewards_PG.shape[1]
    if group < 2 and (scale == "group_std" or baseline == "leave_one_out"):
        raise ValueError(
            f"group_relative with scale {scale!r} and baseline {baseline!r} needs at least 2 samples a group, got {group}"
        )
    if rewards_PG.numel() < 2 and scale == "batch_std":
        raise ValueError("group_relative with scale 'batch_std' needs at least 2 rewards in the batch, got 1")
    return _SCALES[scale](rewards_PG - _BASELINES[baseline](rewards_PG), rewards_PG, eps)


def _others_mean(rewards_PG: Tensor) -> Tensor:
    return (rewards_PG.sum(dim=1, keepdim=True) - rewards_PG) / (rewards_PG.shape[1] - 1)


_BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rewards_PG: rewards_PG.mean(dim=1, keepdim=True),
    "leave_one_out": _others_mean,
}
_SCALES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "group_std": lambda centred_PG, rewards_PG, eps: centred_PG / (rewards_PG.std(dim=1, keepdim=True) + eps),
    "batch_std": lambda centred_PG, rewards_PG, eps: centred_PG / (rewards_PG.std() + eps),
    "none": lambda centred_PG, rewards_PG, eps: centred_PG,
}


@torch.no_grad()
def standardize(x: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / (std + eps) over the entries the mask keeps (unbiased std), 0 elsewhere."""
    return masked.fill((x - masked.mean(x, mask)) / (masked.std(x, mask) + eps), mask)
