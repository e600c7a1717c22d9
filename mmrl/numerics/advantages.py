"""Advantages: how much better a decision did than expected. Pure tensor functions, no gradients needed or kept.

Two conventions differ between projects and are therefore arguments: what a group's reward is compared with (``baseline``) and
divided by (``scale``). Standard deviations are unbiased (divisor n - 1), as in pi_RL and TRL; some projects use n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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
def gae_of_units(
    rewards_TB: Tensor,
    values_TBV: Tensor,
    next_values_TB: Tensor,
    there_TBV: Tensor,
    terminated_TB: Tensor,
    truncated_TB: Tensor,
    *,
    gamma: float,
    lam: float,
    earned_TBV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``gae`` over the V units of decisions, each with a value before it, one after the other: (advantages_TBV, returns_TBV).

    there_TBV (bool) says which units there are; the rest may hold anything and is 0 in the results. What follows a unit is the
    next one that is there, of the same decision or a later one; what was seen in between takes no step. So gamma is per unit. A
    decision's reward, end and next value are its last unit's; those of a decision without units are of the one before it in
    its episode. earned_TBV: what each unit earned beside. With V = 1 and all of it there this is ``gae``.
    """
    t, _, v = there_TBV.shape
    rewards_TB, next_values_TB, terminated_TB, truncated_TB = _joined(
        rewards_TB, next_values_TB, there_TBV.any(2), terminated_TB, truncated_TB
    )
    last_TBV = there_TBV & (there_TBV.flip(2).cumsum(2).flip(2) == 1)
    there_SB = there_TBV.transpose(1, 2).flatten(0, 1)  # S = T V steps, of which a slot's own come first in ``order_LB``
    lengths_B = there_SB.sum(0)
    order_LB = (~there_SB).to(torch.uint8).argsort(dim=0, stable=True)[: max(int(lengths_B.max()), 1)]
    real_LB = torch.arange(len(order_LB), device=lengths_B.device)[:, None] < lengths_B

    def steps(x_TBV: Tensor) -> Tensor:
        return masked.fill(x_TBV.transpose(1, 2).flatten(0, 1).gather(0, order_LB), real_LB)

    def at_last(x_TB: Tensor) -> Tensor:
        return steps(torch.where(last_TBV, x_TB[..., None], torch.zeros_like(x_TB[..., None])))

    values_LB, last_LB = steps(values_TBV), steps(last_TBV)
    within_LB = torch.cat([values_LB[1:], torch.zeros_like(values_LB[:1])])
    advantages_LB, returns_LB = gae(
        at_last(rewards_TB) + (0 if earned_TBV is None else steps(earned_TBV)),
        values_LB,
        torch.where(last_LB, at_last(next_values_TB.to(values_LB.dtype)), within_LB),
        at_last(terminated_TB),
        at_last(truncated_TB),
        gamma=gamma,
        lam=lam,
    )

    def placed(x_LB: Tensor) -> Tensor:
        x_SB = x_LB.new_zeros(there_SB.shape).scatter(0, order_LB, masked.fill(x_LB, real_LB))
        return x_SB.unflatten(0, (t, v)).transpose(1, 2)

    return placed(advantages_LB), placed(returns_LB)


def _joined(
    rewards_TB: Tensor, next_values_TB: Tensor, steps_TB: Tensor, terminated_TB: Tensor, truncated_TB: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, next values and ends of decisions; of one that is no step (``steps_TB``) they are of the one before it."""
    rewards, following, terminated, truncated = (
        list(x_TB.unbind()) for x_TB in (rewards_TB, next_values_TB, terminated_TB, truncated_TB)
    )
    for t in reversed(range(1, len(rewards))):
        moves_B = ~steps_TB[t] & ~terminated[t - 1] & ~truncated[t - 1]
        rewards[t - 1] = rewards[t - 1] + masked.fill(rewards[t], moves_B)
        following[t - 1] = torch.where(moves_B, following[t], following[t - 1])
        terminated[t - 1] = terminated[t - 1] | (moves_B & terminated[t])
        truncated[t - 1] = truncated[t - 1] | (moves_B & truncated[t])
    return torch.stack(rewards), torch.stack(following), torch.stack(terminated), torch.stack(truncated)


@torch.no_grad()
def group_relative(rewards_PG: Tensor, *, scale: str = "group_std", baseline: str = "mean", eps: float = 1e-6) -> Tensor:
    """Each of G rewards of a prompt (task) against the others of its group: (reward - baseline) / (scale + eps), [P, G].

    baseline: ``mean`` of the group (GRPO, arXiv 2402.03300); ``leave_one_out``, the mean of the other G - 1 (RLOO, arXiv
    2402.14740), which is G / (G - 1) times as large an advantage; or ``none``, nothing (REINFORCE).
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
    "none": torch.zeros_like,
}
_SCALES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "group_std": lambda centred_PG, rewards_PG, eps: centred_PG / (rewards_PG.std(dim=1, keepdim=True) + eps),
    "batch_std": lambda centred_PG, rewards_PG, eps: centred_PG / (rewards_PG.std() + eps),
    "none": lambda centred_PG, rewards_PG, eps: centred_PG,
}


@torch.no_grad()
def extremes(rewards_PG: Tensor, *, worst: bool) -> Tensor:
    """1 for the best of each group and 0 for the others, as if only the best were imitated: [P, G]; who shares it has it too.

    worst: as if the best were preferred to the worst: 1 for the first of the best, -1 for the first of the worst, 0 for a group
    whose rewards are all the same.
    """
    best_PG = rewards_PG == rewards_PG.amax(1, keepdim=True)
    if not worst:
        return best_PG.to(rewards_PG.dtype)
    size = rewards_PG.shape[1]
    first, last = (one_hot(rewards_PG.argmax(1), size), one_hot(rewards_PG.argmin(1), size))
    return (first - last).to(rewards_PG.dtype)


@torch.no_grad()
def peer_relative(
    values_M: Tensor, groups_M: Tensor, *, scale: str = "group_std", baseline: str = "mean", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Each of M values against those of equal ``groups_M`` (int64), as ``group_relative`` does it; groups may be of any sizes.

    A value without peers is worth 0: nothing says whether it is much. ``batch_std`` is over all M values. Computed in float64.
    Also returns how many values each one's group has, int64 [M].
    Raises ValueError for an unknown option; baseline ``none`` is one, for it compares nothing.
    """
    if baseline not in _PEER_BASELINES or scale not in _PEER_SCALES:
        raise ValueError(
            f"peer_relative knows baselines {sorted(_PEER_BASELINES)} and scales {sorted(_PEER_SCALES)}, "
            f"not {baseline!r} and {scale!r}"
        )
    peers = _Peers.of(values_M.double(), groups_M)
    centred_M = peers.values_M - _PEER_BASELINES[baseline](peers)
    worth_M = torch.where(peers.sizes_M > 1, centred_M / _PEER_SCALES[scale](peers, eps), 0)
    return worth_M.to(values_M.dtype), peers.sizes_M


class _Peers(NamedTuple):
    """Values, and of the group of each: how many there are, their sum, and the sum of their squared distances from the mean."""

    values_M: Tensor
    sizes_M: Tensor
    sums_M: Tensor
    squares_M: Tensor

    @staticmethod
    def of(values_M: Tensor, groups_M: Tensor) -> _Peers:
        places_M = groups_M.unique(return_inverse=True)[1]
        sizes_M = places_M.bincount()[places_M]

        def sums(x_M: Tensor) -> Tensor:
            return torch.zeros_like(x_M).index_add(0, places_M, x_M)[places_M]

        sums_M = sums(values_M)
        return _Peers(values_M, sizes_M, sums_M, sums((values_M - sums_M / sizes_M) ** 2))


_PEER_BASELINES: dict[str, Callable[[_Peers], Tensor]] = {
    "mean": lambda p: p.sums_M / p.sizes_M,
    "leave_one_out": lambda p: (p.sums_M - p.values_M) / (p.sizes_M - 1),
}
_PEER_SCALES: dict[str, Callable[[_Peers, float], Tensor]] = {
    "group_std": lambda p, eps: (p.squares_M / (p.sizes_M - 1)).sqrt() + eps,
    "batch_std": lambda p, eps: p.values_M.std() + eps,
    "none": lambda p, eps: torch.ones_like(p.values_M),
}


@torch.no_grad()
def returns_to_go(rewards_TB: Tensor, *, gamma: float) -> Tensor:
    """What each of T decisions and those after it earned: G_t = r_t + gamma G_{t+1}; one episode per column."""
    returns_TB = rewards_TB.clone()
    for t in reversed(range(len(rewards_TB) - 1)):
        returns_TB[t] += gamma * returns_TB[t + 1]
    return returns_TB


@torch.no_grad()
def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 up to limit - buffer, falling linearly to -1 at limit, -1 beyond.

    lengths: units of each sample, any shape; float64. Raises ValueError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"overlong_penalty's buffer is {buffer}; it lies below limit ({limit}), so use 1 to {limit}")
    return ((limit - buffer - lengths.double()) / buffer).clamp(-1, 0)


@torch.no_grad()
def standardize(x: Tensor, mask: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / (std + eps) over the entries the mask keeps (unbiased std), 0 elsewhere."""
    return masked.fill((x - masked.mean(x, mask)) / (masked.std(x, mask) + eps), mask)
