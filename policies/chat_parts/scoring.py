"""Scoring whole conversations again: every token that the model said is scored where it was said, all turns in one pass.

In a pass they stand side by side, those of about the same length together and padded, or packed: end to end in a line, without
padding, where none sees another. What many of a pass begin with, as a group does with its question, is read once. Side by side
that takes a pass of its own, and the others continue from its keys and values, through which gradients reach it; in a line they
stand behind it and see it, by a mask. Flash attention takes no such mask: where what is shared is a good part of all,
conversations then stand side by side after all, and elsewhere each has its own copy in the line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mmrl.numerics.tokens import head_log_probs
from policies.chat_parts.engine import Sampling
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Piece, Said, Stretch, lay_out, line_up


@dataclass(frozen=True)
class Scores:
    """Of the M tokens that N conversations said, in order: [M] each. turns: hidden states [M', W] in which their turns began.

    before_MW: hidden states from which the tokens were drawn, if asked for.
    """

    log_probs_M: Tensor
    entropy_M: Tensor
    turns: Tensor
    before_MW: Tensor | None = None


def score(
    network: Network,
    rows: Sequence[Sequence[Piece]],
    sampling: Sampling,
    chunk: int,
    pack: int | None = None,
    *,
    before: bool = False,
) -> Scores:
    """Score N conversations, each of pieces heard and said in turns, with gradients; ``chunk``: see head_log_probs.

    A conversation begins with a piece that was heard. pack: tokens of a line at most; None: those of about the same length side
    by side, so that little is padding. before: whether ``before_MW`` is asked for.
    """
    if not rows:
        raise ValueError("there is nothing to score")
    if pack is not None and (network.branches or not _worth_it(network, rows)):
        batches, read = filled(rows, pack, share=network.branches), _end_to_end
    else:
        batches, read = similar([*map(_length, rows)]), _side_by_side
    passes = [(batch, _pass(network, [rows[n] for n in batch], sampling, chunk, read, before=before)) for batch in batches]
    order = [n for batch, _ in passes for n in batch]
    tokens, turns = [spoken_in(rows[n]) for n in order], [sum(isinstance(piece, Said) for piece in rows[n]) for n in order]
    token_M, turn_M = (_back(order, counts).to(network.device) for counts in (tokens, turns))
    return Scores(
        torch.cat([scores.log_probs_M for _, scores in passes])[token_M],
        torch.cat([scores.entropy_M for _, scores in passes])[token_M],
        torch.cat([scores.turns for _, scores in passes])[turn_M],
        torch.cat([scores.before_MW for _, scores in passes if scores.before_MW is not None])[token_M] if before else None,
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


def filled(rows: Sequence[Sequence[Piece]], room: int, *, share: bool) -> list[list[int]]:
    """All rows, in lines of at most ``room`` tokens: the longest first, each where least room is left; a longer one alone.

    share: those that begin with the same piece follow one another, and where they meet in a line this is counted once.
    """
    lengths, kinds, totals = [*map(_length, rows)], [row[0] if share else n for n, row in enumerate(rows)], Counter[Any]()
    for kind, length in zip(kinds, lengths, strict=True):
        totals[kind] += length
    lines: list[list[int]] = []
    left: list[int] = []
    for n in sorted(range(len(rows)), key=lambda n: (-totals[kinds[n]], kinds.index(kinds[n]), -lengths[n])):
        costs = [lengths[n] - len(rows[n][0]) * any(kinds[m] == kinds[n] for m in line) for line in lines]
        fits = [(cost, left[k] - cost, k) for k, cost in enumerate(costs) if cost <= left[k]]
        if not fits:
            lines.append([])
            left.append(room)
        cost, _, k = min(fits, default=(lengths[n], 0, len(lines) - 1))
        left[k] -= cost
        lines[k].append(n)
    return lines


def _length(pieces: Sequence[Piece]) -> int:
    return sum(map(len, pieces))


def spoken_in(pieces: Sequence[Piece]) -> int:
    """How many tokens of a conversation the model said."""
    return sum(len(piece) for piece in pieces if isinstance(piece, Said))


def _back(order: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Where, in what the rows ``order`` have (``counts`` of each), that of row 0, 1, ... stands: an index."""
    begins = torch.tensor([0, *counts]).cumsum(0)
    places = {row: torch.arange(int(begins[k]), int(begins[k + 1])) for k, row in enumerate(order)}
    return torch.cat([places[row] for row in range(len(order))])


def _pass(
    network: Network, rows: Sequence[Sequence[Piece]], sampling: Sampling, chunk: int, read: _Reader, *, before: bool
) -> Scores:
    hidden_FW, begins = read(network, rows)
    before_M, turns, ids_M = (part.to(network.device) for part in _places(rows, begins))
    before_MW = hidden_FW[before_M]
    log_probs_M, entropy_M = head_log_probs(
        before_MW,
        network.head.weight,
        ids_M,
        temperature=sampling.temperature,
        forbidden=sampling.forbidden,
        chunk=chunk,
    )
    return Scores(log_probs_M, entropy_M, hidden_FW[turns], before_MW if before else None)


# -- reading: hidden states of all tokens [F, W], and of each row the places in them where its pieces begin --------------------


_Reader = Callable[[Network, Sequence[Sequence[Piece]]], tuple[Tensor, list[list[int]]]]


def _end_to_end(network: Network, rows: Sequence[Sequence[Piece]]) -> tuple[Tensor, list[list[int]]]:
    """One pass over a line: what several rows begin with, followed by how each of them goes on; then the next."""
    stretches: list[Stretch] = []
    begins: list[list[int]] = [[] for _ in rows]
    at = 0
    for members in _beginning_alike(rows) if network.branches else [[n] for n in range(len(rows))]:
        shared, before = (rows[members[0]][:1], [at]) if len(members) > 1 else ((), [])
        after = len(stretches) if shared else None
        if shared:
            stretches.append(Stretch(shared))
            at += _length(shared)
        for n in members:
            pieces = rows[n][len(shared) :]
            stretches.append(Stretch(pieces, after))
            begins[n] = [*before, *_begins(pieces, at)]
            at += _length(pieces)
    return network.hidden_of_line(line_up(stretches, network.axes, network.device)), begins


def _beginning_alike(rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
    groups: dict[Piece, list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(row[0], []).append(n)
    return list(groups.values())


def _side_by_side(network: Network, rows: Sequence[Sequence[Piece]]) -> tuple[Tensor, list[list[int]]]:
    return (_read_once if _worth_it(network, rows) else _read)(network, rows)


def _read(network: Network, rows: Sequence[Sequence[Piece]]) -> tuple[Tensor, list[list[int]]]:
    """One forward pass."""
    laid = lay_out(rows, [0] * len(rows), network.axes, network.pad, network.device)
    length = laid.ids_NL.shape[1]
    return network.hidden(laid).flatten(0, 1), [_begins(pieces, n * length) for n, pieces in enumerate(rows)]


def _read_once(network: Network, rows: Sequence[Sequence[Piece]]) -> tuple[Tensor, list[list[int]]]:
    """A pass over the pieces with which the rows begin, each of them once, and one over what follows, which attends to them."""
    firsts = list(dict.fromkeys(row[0] for row in rows))
    places = {piece: place for place, piece in enumerate(firsts)}
    which = [places[row[0]] for row in rows]
    heads = lay_out([[piece] for piece in firsts], [0] * len(firsts), network.axes, network.pad, network.device)
    cache: Any = DynamicCache()
    heads_ULW = network.hidden(heads, cache=cache)
    which_N = torch.tensor(which, device=network.device)
    spread = DynamicCache([(layer.keys[which_N], layer.values[which_N]) for layer in cache.layers])  # type: ignore[arg-type]
    starts = heads.next_N[which_N].tolist()
    rest = lay_out([row[1:] for row in rows], starts, network.axes, network.pad, network.device)
    rest_NLW = network.hidden(rest, cache=spread, past_NP=heads.mask_NL[which_N])
    (count, head), length = heads.ids_NL.shape, rest.ids_NL.shape[1]
    begins = [[which[n] * head, *_begins(row[1:], count * head + n * length)] for n, row in enumerate(rows)]
    return torch.cat([heads_ULW.flatten(0, 1), rest_NLW.flatten(0, 1)]), begins


def _worth_it(network: Network, rows: Sequence[Sequence[Piece]]) -> bool:
    """Whether a group's question, or the like, is a good part of all that there is to read."""
    once = sum(len(piece) for piece in {row[0] for row in rows})
    spared = sum(len(row[0]) for row in rows) - once
    return network.continues and 4 * spared >= sum(map(_length, rows)) and all(_length(row[1:]) for row in rows)


def _begins(pieces: Sequence[Piece], at: int) -> list[int]:
    return list(accumulate(map(len, pieces[:-1]), initial=at)) if pieces else []


def _places(rows: Sequence[Sequence[Piece]], begins: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """For each said token: the place of the one before it, and its id; and the former of each first one."""
    before, turns, ids = [], [], []
    for pieces, places in zip(rows, begins, strict=True):
        for (heard, place), (said, begin) in pairwise(zip(pieces, places, strict=True)):
            if isinstance(said, Said):
                last = place + len(heard) - 1
                turns.append(last)
                before += [torch.full((min(len(said), 1),), last), torch.arange(begin, begin + max(len(said) - 1, 0))]
                ids.append(said.ids)
    nothing = torch.zeros(0, dtype=torch.long)
    return torch.cat([nothing, *before]), torch.tensor(turns, dtype=torch.long), torch.cat([nothing, *ids])
