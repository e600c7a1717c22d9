"""Scoring whole conversations again: one forward pass, in which every token that the model said is scored where it was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.numerics.tokens import head_log_probs
from policies.chat_parts.engine import Sampling
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Heard, Piece, Rows, Said, lay_out


@dataclass(frozen=True)
class Scores:
    """Of the M tokens that N conversations said, in order: [M] each. turns: hidden states [M', W] in which their turns began."""

    log_probs_M: Tensor
    entropy_M: Tensor
    turns: Tensor
    likeliest_M: Tensor | None = None


def score(network: Network, rows: Sequence[Sequence[Piece]], sampling: Sampling, chunk: int) -> Scores:
    """One pass over N conversations, each of pieces heard and said in turns, with gradients; ``chunk``: see head_log_probs.

    A conversation begins with a piece that was heard; every piece that was said has a token at least.
    """
    laid = lay_out(rows, [0] * len(rows), network.axes, network.pad, network.device)
    hidden_FW = network.hidden(laid).flatten(0, 1)
    before_M, begins, ids_M = _places(rows, laid)
    log_probs_M, entropy_M = head_log_probs(
        hidden_FW[before_M],
        network.head.weight,
        ids_M,
        temperature=sampling.temperature,
        forbidden=sampling.forbidden,
        chunk=chunk,
    )
    return Scores(log_probs_M, entropy_M, hidden_FW[begins])


def _places(rows: Sequence[Sequence[Piece]], laid: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """For each said token: the flat (N, L) place of the one before it, and its id; and the former of each first one."""
    length, before, begins, ids = laid.ids_NL.shape[1], [], [], []
    for n, pieces in enumerate(rows):
        at = n * length
        for piece in pieces:
            if isinstance(piece, Said):
                before.append(torch.arange(at - 1, at - 1 + len(piece)))
                begins.append(at - 1)
                ids.append(piece.ids)
            else:
                assert isinstance(piece, Heard)
            at += len(piece)
    device = laid.ids_NL.device
    nothing = torch.zeros(0, dtype=torch.long)
    return (
        torch.cat([nothing, *before]).to(device),
        torch.tensor(begins, dtype=torch.long, device=device),
        torch.cat([nothing, *ids]).to(device),
    )
