"""Values refuse shapes that do not fit together, and select, join and map rows without mixing them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrl.types import ActionSpec, Batch, Decision, EpisodeRecord, Examples, Observation, Rollout, ShapeError, Step

B, C, A, K, T, H = 3, 2, 4, 5, 6, 7


def image(b: int = B) -> Tensor:
    return torch.randint(0, 256, (b, 8, 9, 3), dtype=torch.uint8)


def observation() -> Observation:
    return Observation({"front": image(), "wrist": image()}, torch.randn(B, 4), ("a", "b", "c"))


def decision() -> Decision:
    log_probs = torch.zeros(B, K)
    return Decision(torch.zeros(B, C, A), {"x": torch.zeros(B, 9)}, log_probs, log_probs > 0, torch.zeros(B, 1))


def step() -> Step:
    flags_B, numbers_BC = torch.zeros(B, dtype=torch.bool), torch.zeros(B, C)
    return Step(observation(), numbers_BC, numbers_BC > 0, flags_B, flags_B, {"success": torch.zeros(B)})


def episodes(m: int = B) -> EpisodeRecord:
    rows = torch.arange(m)
    return EpisodeRecord(rows, rows + 0.5, rows % 2, rows + 10, {"distance": rows * 0.1})


def rollout() -> Rollout:
    numbers_TB = torch.zeros(T, B)
    log_probs_TBK = torch.zeros(T, B, K)
    flags_TB = numbers_TB > 0
    numbers = {
        "rewards_TB": numbers_TB,
        "values_TBV": log_probs_TBK,
        "next_values_TB": numbers_TB,
        "task_ids_TB": numbers_TB.long(),
    }
    flags = {"valid_TB": flags_TB, "terminated_TB": flags_TB, "truncated_TB": flags_TB, "mask_TBK": log_probs_TBK > 0}
    trace = {"x": torch.zeros(T, B, 9)}
    return Rollout(trace=trace, log_probs_TBK=log_probs_TBK, episodes=episodes(), env_steps=0, **numbers, **flags)


def batch() -> Batch:
    rows = torch.arange(B).float()
    return Batch(
        {"x": rows[:, None] * 2},
        rows[:, None].expand(B, K),
        rows[:, None].expand(B, K) > 0,
        rows[:, None],
        rows[:, None] + 1,
        rows[:, None] + 2,
    )


def examples() -> Examples:
    return Examples(observation(), torch.zeros(B, H, A), torch.ones(B, H, dtype=torch.bool))


WRONG: list[tuple[Callable[[], Any], str, Any]] = [
    (observation, "images", {"front": image(B + 1)}),
    (observation, "images", {"front": image().float()}),
    (observation, "images", {"front": image()[..., :2]}),
    (observation, "images", {"front": image()[:, 0]}),
    (observation, "state", torch.zeros(B + 1, 4)),
    (observation, "state", torch.zeros(B)),
    (observation, "instructions", ("a", "b")),
    (observation, "conversations", ((),) * (B + 1)),
    (decision, "action", torch.zeros(B, A)),
    (decision, "log_probs_BK", torch.zeros(B + 1, K)),
    (decision, "log_probs_BK", torch.zeros(B)),
    (decision, "mask_BK", torch.ones(B, K + 1, dtype=torch.bool)),
    (decision, "values_BV", torch.zeros(B + 1, 1)),
    (decision, "values_BV", torch.zeros(B, 2)),
    (decision, "trace", {"x": torch.zeros(B + 1, 9)}),
    (step, "rewards_BC", torch.zeros(B + 1, C)),
    (step, "valid_BC", torch.ones(B, C + 1, dtype=torch.bool)),
    (step, "terminated_B", torch.zeros(B + 1, dtype=torch.bool)),
    (step, "truncated_B", torch.zeros((), dtype=torch.bool)),
    (step, "metrics", {"distance": torch.zeros(B)}),
    (step, "metrics", {"success": torch.zeros(B + 1)}),
    (episodes, "returns_M", torch.zeros(B + 1)),
    (episodes, "metrics", {"distance": torch.zeros(B - 1)}),
    (rollout, "values_TBV", torch.zeros(T, B + 1, 1)),
    (rollout, "values_TBV", torch.zeros(T, B, K - 1)),
    (rollout, "next_values_TB", torch.zeros(T + 1, B)),
    (rollout, "log_probs_TBK", torch.zeros(T, B)),
    (rollout, "mask_TBK", torch.ones(T, B, K + 1, dtype=torch.bool)),
    (rollout, "trace", {"x": torch.zeros(T, B + 1, 9)}),
    (batch, "mask_NK", torch.ones(B, K + 1, dtype=torch.bool)),
    (batch, "advantages_NJ", torch.zeros(B + 1, 1)),
    (batch, "advantages_NJ", torch.zeros(B, K + 1)),
    (batch, "returns_NV", torch.zeros(B)),
    (batch, "old_values_NV", torch.zeros(B, 2)),
    (batch, "reference_log_probs_NK", torch.zeros(B, K + 1)),
    (batch, "trace", {"x": torch.zeros(B + 1)}),
    (examples, "actions_BHA", torch.zeros(B, A)),
    (examples, "mask_BH", torch.ones(B, H + 1, dtype=torch.bool)),
]


@pytest.mark.parametrize(("make", "field", "value"), WRONG, ids=[f"{make.__name__}.{field}" for make, field, _ in WRONG])
def test_a_wrong_shape_is_refused_by_name(make: Callable[[], Any], field: str, value: Any) -> None:
    right = make()
    with pytest.raises(ShapeError, match=type(right).__name__):
        replace(right, **{field: value})


def test_an_action_s_bounds_fit_its_size() -> None:
    with pytest.raises(ShapeError, match="2 lower and 3 upper"):
        ActionSpec(3, (0.0, 0.0), (1.0, 1.0, 1.0))


def test_choices_are_whole_numbers() -> None:
    assert ActionSpec(1, (0.0,), (3.0,), discrete=True).discrete and not ActionSpec(1, (0.0,), (0.5,)).discrete
    with pytest.raises(ShapeError, match="whole numbers"):
        ActionSpec(1, (0.0,), (0.5,), discrete=True)


@pytest.mark.parametrize("make", [observation, decision, step, episodes, rollout, batch, examples])
def test_values_are_frozen(make: Callable[[], Any]) -> None:
    value = make()
    with pytest.raises(FrozenInstanceError):
        setattr(value, next(iter(value.__dataclass_fields__)), None)


def test_observations_select_and_join_rows() -> None:
    whole = observation()
    picked = whole.select(torch.tensor([2, 0]))
    assert picked.instructions == ("c", "a") and picked.batch_size == 2
    assert whole.state is not None and picked.state is not None
    assert torch.equal(picked.state, whole.state[[2, 0]])
    assert torch.equal(picked.images["wrist"], whole.images["wrist"][[2, 0]])
    joined = Observation.concat([picked, whole.select(torch.tensor([1]))])
    assert joined.instructions == ("c", "a", "b")
    assert torch.equal(joined.images["front"], whole.images["front"][[2, 0, 1]])
    blind = Observation({}, None, ("x", "y"))
    assert Observation.concat([blind, blind.select(torch.tensor([1]))]).instructions == ("x", "y", "y")


def test_observations_keep_count_of_decisions() -> None:
    plain = Observation({}, torch.zeros(3, 2), ("a", "b", "c"))
    assert plain.select(torch.tensor([1])).elapsed_B is None and Observation.concat([plain, plain]).elapsed_B is None
    counted = replace(plain, elapsed_B=torch.tensor([5, 0, 2]))
    picked = counted.select(torch.tensor([2, 0])).to(torch.device("cpu"))
    assert picked.elapsed_B is not None and picked.elapsed_B.tolist() == [2, 5]
    joined = Observation.concat([picked, counted])
    assert joined.elapsed_B is not None and joined.elapsed_B.tolist() == [2, 5, 5, 0, 2]
    with pytest.raises(ShapeError, match="elapsed_B"):
        replace(plain, elapsed_B=torch.zeros(2))


def test_observations_keep_the_keys_of_states() -> None:
    plain = Observation({}, None, ("a", "b", "c"))
    assert plain.select(torch.tensor([1])).anchors_B is None and Observation.concat([plain, plain]).anchors_B is None
    keyed = replace(plain, anchors_B=torch.tensor([5, -(2**62), 5]))
    picked = keyed.select(torch.tensor([2, 1])).to(torch.device("cpu"))
    joined = Observation.concat([picked, keyed])
    assert joined.anchors_B is not None and joined.anchors_B.tolist() == [5, -(2**62), 5, -(2**62), 5]
    with pytest.raises(ShapeError, match="anchors_B"):
        replace(plain, anchors_B=torch.zeros(2).long())


def test_episode_records_select_and_join_rows() -> None:
    joined = EpisodeRecord.concat([episodes(2), episodes(3)])
    assert joined.task_ids_M.tolist() == [0, 1, 0, 1, 2] and joined.lengths_M.tolist() == [10, 11, 10, 11, 12]
    picked = joined.select(torch.tensor([4, 1]))
    assert picked.returns_M.tolist() == [2.5, 1.5] and picked.success_M.tolist() == [0, 1]
    assert picked.metrics["distance"].tolist() == pytest.approx([0.2, 0.1])


def test_a_batch_moves_all_of_its_rows_together() -> None:
    whole = replace(batch(), reference_log_probs_NK=torch.arange(B).float()[:, None].expand(B, K) - 1)
    picked = whole.select(torch.tensor([2, 0]))
    assert len(picked) == 2
    assert picked.trace["x"][:, 0].tolist() == [4, 0]
    assert picked.old_log_probs_NK[:, 0].tolist() == [2, 0] and picked.mask_NK[:, 0].tolist() == [True, False]
    columns = (picked.advantages_NJ[:, 0], picked.returns_NV[:, 0], picked.old_values_NV[:, 0])
    assert [column.tolist() for column in columns] == [[2, 0], [3, 1], [4, 2]]
    assert picked.reference_log_probs_NK is not None and picked.reference_log_probs_NK[:, 0].tolist() == [1, -1]
    assert batch().select(torch.tensor([0])).reference_log_probs_NK is None


def test_done_is_either_end_and_decisions_are_the_valid_ones() -> None:
    ended = replace(step(), terminated_B=torch.tensor([True, False, False]), truncated_B=torch.tensor([False, True, False]))
    assert ended.done_B.tolist() == [True, True, False]
    valid_TB = torch.zeros(T, B, dtype=torch.bool)
    valid_TB[:2] = True
    assert replace(rollout(), valid_TB=valid_TB).decisions == 2 * B
