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


def score(network: Network, rows: Sequence[Sequence[Piece]], sampling: Sampling, chunk: int) -> Scores:
    """Score N conversations, each of pieces heard and said in turns, with gradients; ``chunk``: see head_log_probs.

    A conversation begins with a piece that was heard. Those of about the same length share a pass, so that little is padding.
    """
    if not rows:
        raise ValueError("there is nothing to score")
    passes = [(batch, _pass(network, [rows[n] for n in batch], sampling, chunk)) for batch in similar([*map(_length, rows)])]
    order = [n for batch, _ in passes for n in batch]
    tokens, turns = [_said(rows[n]) for n in order], [sum(isinstance(piece, Said) for piece in rows[n]) for n in order]
    token_M, turn_M = (_back(order, counts).to(network.device) for counts in (tokens, turns))
    return Scores(
        torch.cat([scores.log_probs_M for _, scores in passes])[token_M],
        torch.cat([scores.entropy_M for _, scores in passes])[token_M],
        torch.cat([scores.turns for _, scores in passes])[turn_M],
    )


def similar(lengths: Sequence[int], most: float = 0.25) -> list[list[int]]:
    """All rows, by length, in batches of which at most the share ``most`` is padding."""
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or tokens + lengths[row] < (1 - most) * longest * (len(batches[-1]) + 1):
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += lengths[row]
    return batches


def _length(pieces: Sequence[Piece]) -> int:
    return sum(map(len, pieces))


def _said(pieces: Sequence[Piece]) -> int:
    return sum(len(piece) for piece in pieces if isinstance(piece, Said))


def _back(order: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Where, in what the rows ``order`` have (``counts`` of each), that of row 0, 1, ... stands: an index."""
    begins = torch.tensor([0, *counts]).cumsum(0)
    places = {row: torch.arange(int(begins[k]), int(begins[k + 1])) for k, row in enumerate(order)}
    return torch.cat([places[row] for row in range(len(order))])


def _pass(network: Network, rows: Sequence[Sequence[Piece]], sampling: Sampling, chunk: int) -> Scores:
    """One forward pass over conversations side by side."""
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
