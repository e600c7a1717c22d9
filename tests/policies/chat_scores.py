"""Conversations to be scored, and their numbers one by one, for what is scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmrl.messages import Message
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Piece, Rows, Said
from policies.chat_parts.scoring import Scores, score
from tests.policies import tiny_chat

CHUNK = 64


def conversations(
    policy: Any, sizes: Sequence[int] = (3, 4, 1), *, pictures: Sequence[int] = (1, 2), alike: bool = False
) -> list[tuple[Piece, ...]]:
    """``sizes[g]`` conversations that begin with question g, of any length (or all ``alike``); some go on after an answer.

    pictures: of question 0, 1, ... and around again.
    """
    dice = torch.Generator().manual_seed(0)
    sees = policy.ears.image_id is not None

    def said(most: int) -> Said:
        length = most if alike else int(torch.randint(1, most, (), generator=dice))
        return Said(torch.randint(7, 250, (length,), generator=dice))

    rows: list[tuple[Piece, ...]] = []
    for group, size in enumerate(sizes):
        opening = tiny_chat.opening(group, pictures[group % len(pictures)] if sees else 0)
        for copy in range(size):
            heard, first = policy.ears.listen(opening)[0], said(6)
            spoken = Message("assistant", ("x",), token_ids=tuple(first.ids.tolist()))
            answer = policy.ears.listen((*opening, spoken, tiny_chat.answer(group, int(sees))))[0][2]
            rows.append((*heard, first, answer, said(4)) if copy == 1 and not alike else (*heard, first))
    return rows


@contextmanager
def counted(network: Network) -> Iterator[list[int]]:
    """Tokens of each pass within it."""
    passes: list[int] = []
    hidden = network.hidden

    def counting(rows: Rows, **options: Any) -> Tensor:
        passes.append(int(rows.mask_NL.sum()))
        return hidden(rows, **options)

    network.hidden = counting  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del network.hidden


def loss(scores: Scores) -> Tensor:
    places = torch.arange(len(scores.log_probs_M))
    return (scores.log_probs_M * (places % 5 - 1.5)).sum() + 0.3 * scores.entropy_M.sum() + scores.turns.square().mean()


def gradients(policy: Any, value: Tensor) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def one_by_one(policy: Any, rows: Sequence[tuple[Piece, ...]]) -> Scores:
    parts = [score(policy.network, [row], policy.engine.sampling, CHUNK) for row in rows]
    return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in ("log_probs_M", "entropy_M", "turns")))


def same(ours: Scores, theirs: Scores, policy: Any) -> None:
    for name in ("log_probs_M", "entropy_M", "turns"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-10, msg=name)
    found, wanted = gradients(policy, loss(ours)), gradients(policy, loss(theirs))
    assert found.keys() == wanted.keys() and max(float(g.abs().max()) for g in wanted.values()) > 1
    for name, gradient in wanted.items():  # transformers' norms round to float32, in the backward pass too
        assert float((found[name] - gradient).abs().max()) < 3e-6 * (1 + float(gradient.abs().max())), name
