"""From a rollout to mini-batches: which rows, in which order, each exactly once an epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.batching import make_batch, micro_batches, minibatch_indices
from mmrl.columns import Column
from mmrl.protocols import Advantages
from mmrl.types import EpisodeRecord, Packing, Rollout


class Packer:
    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()


def numbered(t: int, b: int, valid_TB: Tensor) -> Rollout:
    """Every entry says where it is: 10 t + b."""
    where_TB = 10.0 * torch.arange(t)[:, None] + torch.arange(b)
    nothing = torch.zeros(0)
    flags_TB = torch.zeros(t, b, dtype=torch.bool)
    return Rollout(
        trace={"where": where_TB},
        log_probs_TBK=where_TB[..., None] + torch.tensor([0.1, 0.2]),
        mask_TBK=torch.stack([where_TB > 0, where_TB > 5], -1),
        rewards_TB=where_TB,
        values_TBV=where_TB[..., None] + 0.3,
        next_values_TB=where_TB,
        valid_TB=valid_TB,
        terminated_TB=flags_TB,
        truncated_TB=flags_TB,
        task_ids_TB=where_TB.long(),
        episodes=EpisodeRecord(nothing.long(), nothing, nothing, nothing.long()),
        env_steps=0,
    )


def test_a_batch_holds_the_kept_decisions_in_time_then_slot_order() -> None:
    valid_TB = torch.tensor([[True, True, True], [True, False, True]])
    rollout = numbered(2, 3, valid_TB)
    keep_TB = valid_TB & torch.tensor([True, True, False])
    advantages = Advantages(rollout.rewards_TB + 0.5, rollout.rewards_TB + 0.6, keep_TB, {})
    policy: Any = Packer()
    batch = make_batch(rollout, advantages, policy)
    where = torch.tensor([0.0, 1.0, 10.0])
    assert torch.equal(batch.trace["where"], where)
    assert torch.equal(batch.old_log_probs_NK, where[:, None] + torch.tensor([0.1, 0.2]))
    assert batch.mask_NK.tolist() == [[False, False], [True, False], [True, True]]
    assert torch.equal(batch.advantages_NJ, where[:, None] + 0.5)
    assert torch.equal(batch.returns_NV, where[:, None] + 0.6)
    assert torch.equal(batch.old_values_NV, where[:, None] + 0.3)
    everything = make_batch(rollout, Advantages(rollout.rewards_TB, rollout.rewards_TB, valid_TB, {}), policy)
    assert everything.trace["where"].tolist() == [0, 1, 2, 10, 12]


class EpisodePacker:
    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()


def test_a_sample_may_be_a_whole_episode() -> None:
    """Slot 0: an episode of two decisions and one of one. Slot 1: one of three, of which the last is not kept. Slot 2: lost."""
    valid_TB = torch.tensor([[True, True, False], [True, True, False], [True, True, False]])
    ended_TB = torch.tensor([[False, False, False], [True, False, False], [False, True, False]])
    names = Column.of("abcdefghi")
    rollout = numbered(3, 3, valid_TB)
    rollout = replace(rollout, terminated_TB=ended_TB, trace={**rollout.trace, "name": names.map(lambda x: x.reshape(3, 3))})
    keep_TB = valid_TB.clone()
    keep_TB[2, 1] = False
    policy: Any = EpisodePacker()
    batch = make_batch(rollout, Advantages(rollout.rewards_TB + 0.5, rollout.rewards_TB + 0.6, keep_TB, {}), policy)
    assert batch.trace["where"].tolist() == [[0, 10, 0], [20, 0, 0], [1, 11, 21]]
    assert batch.trace["name"].tolist() == [["a", "d", None], ["g", None, None], ["b", "e", "h"]]
    assert batch.mask_NK.tolist() == [
        [False, False, True, True, False, False],
        [True, True, False, False, False, False],
        [True, False, True, True, False, False],
    ]
    assert batch.trained_NJ.tolist() == [[False, True, False], [True, False, False], [True, True, False]]
    torch.testing.assert_close(batch.old_log_probs_NK[2], torch.tensor([1.1, 1.2, 11.1, 11.2, 21.1, 21.2]))
    torch.testing.assert_close(batch.advantages_NJ[2], torch.tensor([1.5, 11.5, 21.5]))
    torch.testing.assert_close(batch.per_unit(batch.returns_NV)[2], torch.tensor([1.6, 1.6, 11.6, 11.6, 21.6, 21.6]))
    assert batch.old_values_NV[0].tolist() == pytest.approx([0.3, 10.3, 0])
    keep_TB[:, 0] = False
    fewer = make_batch(rollout, Advantages(rollout.rewards_TB, rollout.rewards_TB, keep_TB, {}), policy)
    assert fewer.trace["name"].tolist() == [["b", "e", "h"]]


def test_a_rollout_without_a_valid_decision_is_an_empty_batch() -> None:
    rollout = numbered(2, 2, torch.zeros(2, 2, dtype=torch.bool))
    policies: list[Any] = [Packer(), EpisodePacker()]
    for policy in policies:
        assert len(make_batch(rollout, Advantages(rollout.rewards_TB, rollout.rewards_TB, rollout.valid_TB, {}), policy)) == 0


@pytest.mark.parametrize(("size", "count"), [(12, 4), (13, 4), (3, 4), (1, 1), (7, 1)])
def test_minibatches_are_a_shuffle_in_nearly_equal_parts(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    parts = list(minibatch_indices(size, count, generator))
    assert len(parts) == min(count, size)
    assert sorted(torch.cat(parts).tolist()) == list(range(size))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    again = list(minibatch_indices(size, count, generator))
    assert size < 7 or torch.cat(again).tolist() != torch.cat(parts).tolist()  # another epoch, another order
    generator.manual_seed(5)
    assert [part.tolist() for part in minibatch_indices(size, count, generator)] == [part.tolist() for part in parts]


def test_no_rows_no_minibatches() -> None:
    assert list(minibatch_indices(0, 4, torch.Generator())) == []


@pytest.mark.parametrize(
    ("size", "micro", "expected"),
    [
        (5, 2, [(0, 2), (2, 4), (4, 5)]),
        (4, 2, [(0, 2), (2, 4)]),
        (3, None, [(0, 3)]),
        (3, 9, [(0, 3)]),
        (0, None, []),
        (0, 2, []),
    ],
)
def test_micro_batches_cover_every_row_once(size: int, micro: int | None, expected: list[tuple[int, int]]) -> None:
    assert [(piece.start, piece.stop) for piece in micro_batches(size, micro)] == expected


def test_means_of_units_follow_their_units() -> None:
    """One sample a decision, and one an episode of several."""
    valid_TB = torch.tensor([[True, True], [True, False], [True, False]])
    rollout = numbered(3, 2, valid_TB)
    ended_TB = torch.tensor([[False, True], [False, False], [True, False]])
    means_TBKD = rollout.log_probs_TBK[..., None] + torch.tensor([0.0, 1000.0, 2000.0])
    rollout = replace(rollout, terminated_TB=ended_TB, means_TBKD=means_TBKD, reference_means_TBKD=-means_TBKD)
    advantages = Advantages(rollout.rewards_TB, rollout.rewards_TB, valid_TB, {})
    for policy in (Packer(), EpisodePacker()):
        batch = make_batch(rollout, advantages, policy)  # type: ignore[arg-type]
        assert batch.old_means_NKD is not None and batch.reference_means_NKD is not None
        expected = batch.old_log_probs_NK[..., None] + torch.tensor([0.0, 1000.0, 2000.0])
        torch.testing.assert_close(batch.old_means_NKD[batch.mask_NK], expected[batch.mask_NK])
        assert torch.equal(batch.reference_means_NKD, -batch.old_means_NKD)
    assert make_batch(numbered(3, 2, valid_TB), advantages, Packer()).old_means_NKD is None  # type: ignore[arg-type]


def test_rows_that_belong_together_stay_so() -> None:
    parts = list(minibatch_indices(12, 2, torch.Generator().manual_seed(0), together=3))
    assert sorted(torch.cat(parts).tolist()) == list(range(12)) and [len(part) for part in parts] == [6, 6]
    order = torch.cat(parts).reshape(-1, 3)
    assert (order[:, 0] % 3 == 0).all() and torch.equal(order, order[:, :1] + torch.arange(3))
    assert order[:, 0].tolist() != [0, 3, 6, 9]
    alone = list(minibatch_indices(4, 2, torch.Generator().manual_seed(0)))
    assert [part.tolist() for part in alone] == [(part[::3] // 3).tolist() for part in parts]
    slices = {micro: [(s.start, s.stop) for s in micro_batches(12, micro, 3)] for micro in (None, 1, 5, 7)}
    triples = [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert slices == {None: [(0, 12)], 1: triples, 5: triples, 7: [(0, 6), (6, 12)]}
    assert list(minibatch_indices(0, 2, torch.Generator(), together=2)) == []
