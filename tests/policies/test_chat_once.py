"""What is read once, and kept, for many conversations: the same numbers as each of them read by itself gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from policies.chat_parts.keeping import BLOCK, growing
from policies.chat_parts.pieces import Rows, Said, lay_out
from policies.chat_parts.scoring import score
from tests.policies import tiny_chat
from tests.policies.chat_scores import CHUNK, conversations, counted, gradients, loss, one_by_one, same


@pytest.fixture(params=tiny_chat.FAMILIES)
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return tiny_chat.build(tiny_chat.write(tmp_path / "model", request.param))


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
