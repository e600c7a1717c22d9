"""What the decisions of whole episodes are worth among those of their group: GRPO's ``credit``.

    episode:  A_t = A(R), R = sum_t r_t
    turn:     A_t = A(G_t), G_t = r_t + gamma G_{t+1}, among the group's decisions of the same number t
    gigpo:    A_t = A(R) + w A(G_t), the second among the group's decisions that were made in the same state

A(x) = (x - baseline) / scale (``numerics.advantages``). GiGPO: Feng et al. 2025 (arXiv 2505.10978).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.errors import ConfigError
from mmrl.numerics import masked
from mmrl.numerics.advantages import group_relative, peer_relative, returns_to_go


@dataclass(frozen=True)
class Episodes:
    """One whole episode a slot (or none), of whose slots B / P in a row are a group.

    rewards_TB: 0 where not valid. anchor_TB: keys of states, or None. complete_P: groups of which no episode is missing; the
    others count for nothing.
    """

    rewards_TB: Tensor
    valid_TB: Tensor
    anchor_TB: Tensor | None
    complete_P: Tensor
    gamma: float

    @property
    def group_B(self) -> Tensor:
        groups = len(self.complete_P)
        return torch.arange(groups, device=self.valid_TB.device).repeat_interleave(self.valid_TB.shape[1] // groups)

    @property
    def counted_TB(self) -> Tensor:
        return self.valid_TB & self.complete_P[self.group_B]

    def by_group(self, x: Tensor) -> Tensor:
        """[..., B] as [..., P, G]."""
        return x.unflatten(-1, (len(self.complete_P), -1))

    def spread(self, credit: str) -> Tensor:
        """How far apart the returns are that ``credit`` compares, in each group: [P]."""
        returns_1PG = self.by_group(self.rewards_TB.sum(0, keepdim=True))
        between_P = (returns_1PG.amax((0, 2)) - returns_1PG.amin((0, 2))).clamp(min=0)
        return _SPREADS[credit](self, between_P)


def _span(x_TPG: Tensor, valid_TPG: Tensor, over: tuple[int, ...]) -> Tensor:
    """Largest less smallest of what is valid; 0 where nothing is."""
    top, bottom = (masked.fill(x_TPG, valid_TPG, sign * torch.inf) for sign in (-1.0, 1.0))
    return (top.amax(over) - bottom.amin(over)).clamp(min=0)


def _spread_of_turns(episodes: Episodes, between_P: Tensor) -> Tensor:
    returns_TB = returns_to_go(episodes.rewards_TB, gamma=episodes.gamma)
    return _span(episodes.by_group(returns_TB), episodes.by_group(episodes.valid_TB), (2,)).amax(0)


def _spread_of_steps(episodes: Episodes, between_P: Tensor) -> Tensor:
    returns_TB = returns_to_go(episodes.rewards_TB, gamma=episodes.gamma)
    return torch.maximum(between_P, _span(episodes.by_group(returns_TB), episodes.by_group(episodes.valid_TB), (0, 2)))


_SPREADS: dict[str, Callable[[Episodes, Tensor], Tensor]] = {
    "episode": lambda episodes, between_P: between_P,
    "turn": _spread_of_turns,
    "gigpo": _spread_of_steps,
}

Credit = tuple[Tensor, Mapping[str, float]]  # advantages [T, B] and metrics


def by_episode(episodes: Episodes, *, scale: str, baseline: str, step_weight: float, eps: float) -> Credit:
    complete_P = episodes.complete_P
    returns_PG = episodes.by_group(episodes.rewards_TB.sum(0))
    advantages_PG = torch.zeros_like(returns_PG)
    if bool(complete_P.any()):
        advantages_PG[complete_P] = group_relative(returns_PG[complete_P], scale=scale, baseline=baseline, eps=eps)
    return advantages_PG.reshape(1, -1).expand_as(episodes.rewards_TB), {}


def by_turn(episodes: Episodes, *, scale: str, baseline: str, step_weight: float, eps: float) -> Credit:
    if baseline == "none":
        return returns_to_go(episodes.rewards_TB, gamma=episodes.gamma) * episodes.counted_TB, {}
    turn_TB = torch.arange(len(episodes.valid_TB), device=episodes.valid_TB.device)[:, None].expand_as(episodes.valid_TB)
    return _among_peers(episodes, turn_TB, scale=scale, baseline=baseline, eps=eps)


def by_state(episodes: Episodes, *, scale: str, baseline: str, step_weight: float, eps: float) -> Credit:
    if episodes.anchor_TB is None:
        raise ConfigError(
            "'credit' is 'gigpo', which compares decisions made in the same state, but the environment gives its states no keys "
            "(Observation.anchors_B; with 'collect.parts' above 1 they are not passed on); use 'turn' or 'episode'"
        )
    whole_TB, _ = by_episode(episodes, scale=scale, baseline=baseline, step_weight=step_weight, eps=eps)
    steps_TB, metrics = _among_peers(episodes, episodes.anchor_TB, scale=scale, baseline=baseline, eps=eps)
    return whole_TB + step_weight * steps_TB, {**metrics, **_states(episodes, episodes.anchor_TB)}


def _states(episodes: Episodes, anchor_TB: Tensor) -> dict[str, float]:
    """How many states the groups were in, and in how many of them more than one episode was."""
    slot_B = torch.arange(anchor_TB.shape[1], device=anchor_TB.device)
    visits_TB3 = torch.stack([x.expand_as(anchor_TB) for x in (episodes.group_B, anchor_TB, slot_B)], 2)
    visits_V3 = visits_TB3[episodes.counted_TB].unique(dim=0)
    episodes_S = visits_V3[:, :2].unique(dim=0, return_counts=True)[1]
    return {"states": float(len(episodes_S)), "states_shared": float((episodes_S > 1).sum())}


def _among_peers(episodes: Episodes, key_TB: Tensor, *, scale: str, baseline: str, eps: float) -> Credit:
    """The returns from decisions on, among those of the group with equal keys; and the share that are alone."""
    counted_TB = episodes.counted_TB
    returns_TB = returns_to_go(episodes.rewards_TB, gamma=episodes.gamma)
    advantages_TB = torch.zeros_like(returns_TB)
    if not bool(counted_TB.any()):
        return advantages_TB, {"decisions_without_peers": 0.0}
    keys_M2 = torch.stack([episodes.group_B.expand_as(key_TB)[counted_TB], key_TB[counted_TB]], 1)
    peers_M = keys_M2.unique(dim=0, return_inverse=True)[1]
    advantages_TB[counted_TB], sizes_M = peer_relative(returns_TB[counted_TB], peers_M, scale=scale, baseline=baseline, eps=eps)
    return advantages_TB, {"decisions_without_peers": float((sizes_M == 1).float().mean())}


CREDITS: dict[str, Callable[..., Credit]] = {"episode": by_episode, "turn": by_turn, "gigpo": by_state}
