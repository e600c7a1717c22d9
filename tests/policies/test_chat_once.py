"""What is read once, and kept, for many conversations: the same numbers as each of them read by itself gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mmrl.messages import Message
from policies.chat_parts.keeping import BLOCK, growing
from policies.chat_parts.network import Network
from policies.chat_parts.pieces import Piece, Rows, Said, lay_out
from policies.chat_parts.scoring import Scores, score
from tests.policies import tiny_chat

CHUNK = 64


@pytest.fixture(params=tiny_chat.FAMILIES)
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return tiny_chat.build(tiny_chat.write(tmp_path / "model", request.param))


def conversations(policy: Any, sizes: tuple[int, ...] = (3, 4, 1), *, alike: bool = False) -> list[tuple[Piece, ...]]:
    """``sizes[g]`` conversations that begin with question g, of any length (or all ``alike``); some go on after an answer."""
    dice = torch.Generator().manual_seed(0)

    def said(most: int) -> Said:
        length = most if alike else int(torch.randint(1, most, (), generator=dice))
        return Said(torch.randint(7, 250, (length,), generator=dice))

    rows: list[tuple[Piece, ...]] = []
    for group, size in enumerate(sizes):
        opening = tiny_chat.opening(group, 1 + group % 2)
        for copy in range(size):
            heard, first = policy.ears.listen(opening)[0], said(6)
            spoken = Message("assistant", ("x",), token_ids=tuple(first.ids.tolist()))
            answer = policy.ears.listen((*opening, spoken, tiny_chat.answer(group, 1)))[0][2]
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


def test_a_question_is_read_once_for_its_group(policy: Any) -> None:
    rows = conversations(policy, alike=True)
    with counted(policy.network) as passes:
        ours = score(policy.network, rows, policy.engine.sampling, CHUNK)
    once = {row[0] for row in rows}
    assert sum(passes) == sum(map(len, once)) + sum(len(piece) for row in rows for piece in row[1:])
    same(ours, one_by_one(policy, rows), policy)


def test_what_is_shared_may_go_on_at_any_length(policy: Any) -> None:
    rows = conversations(policy)
    with counted(policy.network) as passes:
        ours = score(policy.network, rows, policy.engine.sampling, CHUNK)
    assert sum(passes) < 0.9 * sum(len(piece) for row in rows for piece in row)
    same(ours, one_by_one(policy, rows), policy)


def test_gradients_through_what_is_shared_are_exact_where_nothing_rounds(policy: Any) -> None:
    """transformers' norms compute in float32; in float64, and without pictures, which it turns in float32, no doubt is left."""
    for module in policy.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_exact_norm, module)
    asked = [policy.ears.listen(tiny_chat.opening(group, 0))[0] for group in (0, 1)]
    rows = [(*asked[group], Said(torch.arange(9 + group, 14 + row + group))) for group in (0, 1) for row in range(3)]
    with counted(policy.network) as passes:
        ours = score(policy.network, rows, policy.engine.sampling, CHUNK)
    assert sum(passes) < sum(len(piece) for row in rows for piece in row)
    found, wanted = gradients(policy, loss(ours)), gradients(policy, loss(one_by_one(policy, rows)))
    assert max(float(g.abs().max()) for g in wanted.values()) > 1
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-11, msg=name)


def _exact_norm(module: Any, hidden: Tensor) -> Tensor:
    return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)


def test_conversations_that_have_nothing_in_common_share_nothing(policy: Any) -> None:
    rows = conversations(policy, (1, 1, 1, 1))
    with counted(policy.network) as passes:
        ours = score(policy.network, rows, policy.engine.sampling, CHUNK)
    assert sum(passes) == sum(len(piece) for row in rows for piece in row)
    same(ours, one_by_one(policy, rows), policy)


def test_conversations_in_which_nothing_is_said_yet_are_read_whole(policy: Any) -> None:
    """As for the value of a state."""
    heard = policy.ears.listen(tiny_chat.opening(0))[0]
    rows = [(*heard, Said(torch.zeros(0, dtype=torch.long)))] * 3 + [(*heard, Said(torch.tensor([9, 8])))]
    ours = score(policy.network, rows, policy.engine.sampling, CHUNK)
    assert ours.log_probs_M.shape == (2,) and ours.turns.shape[0] == 4
    torch.testing.assert_close(ours.turns, ours.turns[3:].expand_as(ours.turns), rtol=0, atol=1e-10)


def test_nothing_is_shared_where_activations_are_computed_again(tmp_path: Path) -> None:
    """transformers drops the cache there, and with it what was read."""
    folder = tiny_chat.write(tmp_path / "model")
    plain, saving = tiny_chat.build(folder), tiny_chat.build(folder, checkpointing=True)
    found = []
    for policy in (plain, saving):
        rows = conversations(policy)
        with policy.compute_mode(train=True):
            scores = score(policy.network, rows, policy.engine.sampling, CHUNK)
            found.append((scores.log_probs_M.detach(), gradients(policy, loss(scores))))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-10)
    for name, gradient in found[0][1].items():
        assert float((found[1][1][name] - gradient).abs().max()) < 3e-6 * (1 + float(gradient.abs().max())), name


def test_a_token_that_follows_sees_what_transformers_lets_it_see(policy: Any) -> None:
    """With holes in the past, as between turns."""
    network, rows = policy.network, [row[:1] for row in conversations(policy)[2:5]]
    hidden = []
    for takes in (True, False):
        network._takes_masks = takes and network._takes_masks
        cache = growing()
        with torch.no_grad():
            laid = lay_out(rows, [0] * len(rows), network.axes, network.pad, network.device)
            network.hidden(laid, cache=cache)
            mask_NL, places_N = laid.mask_NL, laid.next_N
            for token in (11, 12, 13):
                ids_N1 = torch.full((len(rows), 1), token)
                here_N1 = torch.tensor([[True], [token != 12], [True]])
                one = Rows(ids_N1, here_N1, places_N.expand(network.axes, -1)[..., None], places_N)
                hidden.append(network.hidden(one, cache=cache, past_NP=mask_NL)[here_N1])
                mask_NL, places_N = torch.cat([mask_NL, here_N1], 1), places_N + here_N1[:, 0]
    assert policy.config.attention == "sdpa"
    for ours, theirs in zip(hidden[:3], hidden[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("begin", [0, 5])
def test_a_growing_cache_holds_what_transformers_holds(begin: int) -> None:
    dice = torch.Generator().manual_seed(1)

    def some(length: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 3, length, 4, generator=dice), torch.randn(2, 3, length, 4, generator=dice)

    first = [some(begin), some(begin)] if begin else []
    kept = [(keys.clone(), values.clone()) for keys, values in first]
    ours, theirs = growing(first), DynamicCache(kept) if begin else DynamicCache()  # type: ignore[arg-type]
    for length in (3, 1, 1, BLOCK, 1, 2 * BLOCK, *[1] * (BLOCK + 1)):
        for layer in (0, 1):
            keys, values = some(length)
            for mine, its in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(mine, its)
        assert ours.get_seq_length() == theirs.get_seq_length()
    for (keys, values), (its_keys, its_values) in zip(first, kept, strict=True):
        assert torch.equal(keys, its_keys) and torch.equal(values, its_values), "what it began with was written to"
