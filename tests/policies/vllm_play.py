"""What tests of vLLM's engine share: its block, conversations, and how far what it says is from the policy's own."""

from __future__ import annotations

from typing import Any

import torch

from policies.chat_parts.policy import ChatPolicy
from policies.chat_parts.scoring import score
from tests.policies import tiny_chat
from tests.policies.chat_play import Played

VLLM = {"target": "policies.vllm_engine:VllmEngine", "cpu_memory_gib": 0.05, "concurrent": 64}
TALKS = [tiny_chat.opening(seed, seed % 3) for seed in range(6)]


@torch.no_grad()
def gap(policy: ChatPolicy, played: Played) -> float:
    """How far the log-probabilities of acting are from the policy's own, for the token for which that is farthest."""
    worst = 0.0
    for b, row in enumerate(played.rows()):
        own = score(policy.network, [row], policy.engine.sampling, 64).log_probs_M
        worst = max(worst, float((own - played.log_probs(b)).abs().max()))
    return worst


def ids_of(played: Played) -> list[list[tuple[int, ...]]]:
    return [[message.token_ids for message in decision.action.tolist()] for decision in played.decisions]


def change(policy: Any, pattern: str = "", size: float = 0.05) -> None:
    """Other weights, of which nobody is told."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if pattern in name:
                parameter.add_(size * torch.randn(parameter.shape))
