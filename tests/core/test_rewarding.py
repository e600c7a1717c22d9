"""Rewards of a stage: where scores land, how they are combined, and what becomes of an episode that could not be scored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.batching import make_batch
from mmrl.errors import TrainingError
from mmrl.numerics.advantages import gae
from mmrl.rewarding import RewardBlock, Scorer
from mmrl.rollout import Collector
from mmrl.transcripts import Transcript
from mmrl.types import Rollout, Step
from tests.core.test_talking import CPU, Listener, Talker

NAN = math.nan


class Table:
    """Scores as they are told, in the order of the conversations."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        scores: tuple[float, ...] = ()

    failure: str | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.terms = {"part": 0.25}

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        return list(self.config.scores)


class Turns:
    """A number of its own for each turn: 100 x the place of the conversation + the turn."""

    Config = Table.Config

    def __init__(self, config: Any) -> None: ...

    def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        return [[100.0 * place + t for t in range(len(each.turns))] for place, each in enumerate(transcripts)]


class Losing(Listener):
    """Loses the episodes of ``gone`` slots with their last decision."""

    def __init__(self, num_envs: int, gone: Sequence[int] = ()) -> None:
        super().__init__(num_envs)
        self.gone_B = torch.tensor([slot in gone for slot in range(num_envs)])

    def step(self, actions: Any) -> Step:
        step = super().step(actions)
        lost_B = step.terminated_B & self.gone_B
        return Step(
            step.observation, step.rewards_BC, step.valid_BC, step.terminated_B & ~lost_B, step.truncated_B, step.metrics, lost_B
        )


def block(name: str, weight: float, scores: Sequence[float] = (), kind: Any = Table) -> RewardBlock:
    return RewardBlock(f"fake:{kind.__name__}", kind, Table.Config(tuple(scores)), name, weight)


def collected(gone: Sequence[int] = ()) -> Rollout:
    """Six slots, groups of two: episodes of 1, 1, 2, 2, 3 and 3 turns. The environment pays 1 + slot at the end."""
    policy: Any = Talker()
    environment: Any = Losing(6, gone)
    return Collector([environment], decisions=3, seed=0, device=CPU, group_size=2, auto_reset=False).collect(policy)


def scored(*blocks: RewardBlock, rollout: Rollout | None = None, combine: str = "sum", environment: float = 0.0) -> Any:
    scorer = Scorer(blocks, "stages.improve.rewards", combine, environment)
    return scorer.score(collected() if rollout is None else rollout)


def columns(rollout: Rollout) -> list[list[float]]:
    return [[round(x, 5) for x in column] for column in rollout.rewards_TB.T.tolist()]


def test_a_score_stands_at_the_last_decision_and_a_turn_s_at_its_own() -> None:
    rollout, metrics = scored(block("mark", 2.0, [1, 2, 3, 4, 5, 6]))
    assert columns(rollout) == [[2, 0, 0], [4, 0, 0], [0, 6, 0], [0, 8, 0], [0, 0, 10], [0, 0, 12]]
    assert rollout.episodes.returns_M.tolist() == [2, 4, 6, 8, 10, 12]
    assert metrics == {
        "reward/mark": 3.5,
        "reward/mark/failed": 0.0,
        "reward/mark/part": 0.25,
        "rollout/unscored_episodes": 0.0,
    }
    rollout, _ = scored(block("turns", 0.5, kind=Turns))
    assert columns(rollout) == [[0, 0, 0], [50, 0, 0], [100, 100.5, 0], [150, 150.5, 0], [200, 200.5, 201], [250, 250.5, 251]]


def test_rewards_add_up_and_replace_the_environment_s() -> None:
    blocks = block("mark", 1.0, [1, 2, 3, 4, 5, 6]), block("turns", 0.01, kind=Turns), block("seen", 0.0, [9] * 6)
    rollout, metrics = scored(*blocks)
    assert columns(rollout)[4] == [4, 4.01, 9.02] and metrics["reward/seen"] == 9
    rollout, _ = scored(*blocks, environment=10.0)
    assert columns(rollout)[4] == [4, 4.01, 59.02] and columns(rollout)[0] == [1 + 10, 0, 0]


def test_without_rewards_a_rollout_stays_as_it_is() -> None:
    rollout = collected()
    assert scored(rollout=rollout) == (rollout, {})


def naive_normalised(kinds: list[tuple[float, list[list[float]]]], groups: list[list[int]]) -> list[list[float]]:
    """Per episode the sum over rewards of w (s_t - [t is last] mean S) / (std S + 1e-6)."""
    lengths = [len(turns) for turns in kinds[0][1]]
    total = [[0.0] * n for n in lengths]
    for weight, episodes in kinds:
        for group in groups:
            if len(group) < 2:
                continue
            sums = [sum(episodes[m]) for m in group]
            spread = statistics.stdev(sums) + 1e-6
            for m in group:
                for t, score in enumerate(episodes[m]):
                    last = t == lengths[m] - 1
                    total[m][t] += weight * (score - (statistics.fmean(sums) if last else 0.0)) / spread
    return total


def test_normalised_rewards_are_on_one_scale() -> None:
    marks, lengths = [1.0, 3.0, 7.0, 7.0, 0.0, 0.5], [1, 1, 2, 2, 3, 3]
    kinds = [
        (2.0, [[0.0] * (n - 1) + [mark] for mark, n in zip(marks, lengths, strict=True)]),
        (0.5, [[100.0 * m + t for t in range(n)] for m, n in enumerate(lengths)]),
        (1.5, [[0.0] * (n - 1) + [m + 1.0] for m, n in enumerate(lengths)]),
    ]
    expected = naive_normalised(kinds, [[0, 1], [2, 3], [4, 5]])
    rollout, metrics = scored(block("mark", 2.0, marks), block("turns", 0.5, kind=Turns), combine="normalised", environment=1.5)
    for m, column in enumerate(rollout.rewards_TB.T.tolist()):
        assert column == pytest.approx(expected[m] + [0.0] * (3 - lengths[m]), abs=1e-5)
    # A group's rewards add up to zero, and a score is as large as it is in units of its spread.
    assert rollout.episodes.returns_M.reshape(3, 2).sum(1).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert float(rollout.episodes.returns_M[5]) == pytest.approx((2.0 + 0.5 + 1.5) / math.sqrt(2), abs=1e-4)
    assert metrics["reward/mark"] == pytest.approx(sum(marks) / 6)  # as it was given


class Shifted(Turns):
    """1 in all, for the first turn of every other conversation and the last turn of the others."""

    def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
        return [
            [float(t == (0 if m % 2 else len(each.turns) - 1)) for t in range(len(each.turns))]
            for m, each in enumerate(transcripts)
        ]


def test_a_reward_that_does_not_tell_a_group_s_episodes_apart_is_nothing_there() -> None:
    """It has no scale: divided by a spread of 1e-6, scores of single turns would drown every other reward."""
    marks = [1.0, 3.0, 7.0, 8.0, 0.0, 0.5]
    alone, _ = scored(block("mark", 1.0, marks), combine="normalised")
    both, _ = scored(block("mark", 1.0, marks), block("shifted", 1.0, kind=Shifted), combine="normalised")
    assert torch.equal(both.rewards_TB, alone.rewards_TB)


@pytest.mark.parametrize("combine", ["sum", "normalised"])
@pytest.mark.parametrize("scale", ["group_std", "batch_std"])
def test_an_episode_without_a_score_is_as_one_that_was_lost(combine: str, scale: Any) -> None:
    scores = [1.0, 5.0, 2.0, 4.0, 3.0, 8.0]
    others = [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    failed = [NAN if m == 3 else score for m, score in enumerate(scores)]
    told, metrics = scored(block("a", 1.0, failed), block("b", 0.5, others), combine=combine)
    gone = [3]
    left = [m for m in range(6) if m not in gone]
    lost, _ = scored(
        block("a", 1.0, [scores[m] for m in left]),
        block("b", 0.5, [others[m] for m in left]),
        rollout=collected(gone),
        combine=combine,
    )
    assert metrics["rollout/unscored_episodes"] == 1 and metrics["reward/a/failed"] == pytest.approx(1 / 6)
    assert metrics["reward/a"] == pytest.approx(sum(scores[m] for m in left) / 5)
    assert torch.equal(told.valid_TB, lost.valid_TB) and torch.equal(told.rewards_TB, lost.rewards_TB)
    assert told.episodes.task_ids_M.tolist() == lost.episodes.task_ids_M.tolist()
    assert torch.equal(told.episodes.returns_M, lost.episodes.returns_M)
    assert [t.task_id for t in told.episodes.transcripts] == [0, 0, 1, 2, 2]
    policy: Any = Talker()
    algorithm = GRPO(GRPO.Config(group_size=2, scale=scale))
    ours, theirs = (make_batch(rollout, algorithm.advantages(rollout), policy) for rollout in (told, lost))
    assert len(ours) == 4  # the group of the episode is gone
    assert torch.equal(ours.advantages_NJ, theirs.advantages_NJ) and torch.equal(ours.mask_NK, theirs.mask_NK)
    assert ours.advantages_NJ[ours.trained_NJ].isfinite().all()

    def single(rollout: Rollout) -> Tensor:  # and where nothing compares episodes
        flags = rollout.terminated_TB, rollout.truncated_TB
        found = gae(rollout.rewards_TB, rollout.values_TBV[..., 0], rollout.next_values_TB, *flags, gamma=0.9, lam=0.8)[0]
        return found[rollout.valid_TB]

    assert torch.equal(single(told), single(lost))


def test_nan_of_one_turn_fails_the_conversation() -> None:
    class Torn(Turns):
        def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
            scores = super().per_turn(transcripts)
            scores[4][1] = NAN
            return scores

    rollout, metrics = scored(block("torn", 1.0, kind=Torn))
    assert not rollout.valid_TB[:, 4].any() and not rollout.rewards_TB[:, 4].any() and bool(rollout.rewards_TB.isfinite().all())
    assert rollout.valid_TB[:, 5].all() and metrics["rollout/unscored_episodes"] == 1


def test_a_reward_of_weight_0_masks_nothing() -> None:
    blocks = block("seen", 0.0, [NAN, 1, 1, 1, 1, 1]), block("mark", 1.0, [1] * 6)
    rollout, metrics = scored(*blocks)
    assert bool(rollout.valid_TB[0, 0]) and metrics["rollout/unscored_episodes"] == 0
    assert metrics["reward/seen/failed"] == pytest.approx(1 / 6)
    rollout, metrics = scored(blocks[0])
    assert not rollout.rewards_TB.any() and metrics["rollout/unscored_episodes"] == 0
    rollout, metrics = scored(block("seen", 0.0, [NAN] * 6), blocks[1])  # a judge that is down and only watches
    assert metrics["rollout/unscored_episodes"] == 0 and metrics["reward/seen/failed"] == 1 and "reward/seen" not in metrics


def test_a_reward_that_scores_nothing_stops_the_run() -> None:
    class Down(Table):
        failure = "judge.test refuses the key in KEY (status 401)"

    with pytest.raises(TrainingError) as error:
        scored(block("ok", 1.0, [1] * 6), block("judge", 1.0, [NAN] * 6, Down))
    assert str(error.value) == (
        "'stages.improve.rewards.judge' could score none of 6 episodes: judge.test refuses the key in KEY (status 401)"
    )
    with pytest.raises(TrainingError, match=r"rewards\.t' could score none of 6 episodes: fake:Table gave no number"):
        scored(block("t", 1.0, [NAN] * 6))


def test_a_rollout_of_lost_episodes_alone_is_not_judged() -> None:
    rollout = collected(range(6))
    assert scored(block("t", 1.0, [NAN] * 6), rollout=rollout) == (rollout, {})


def test_a_reward_that_miscounts_is_a_bug() -> None:
    class Short(Turns):
        def per_turn(self, transcripts: Sequence[Transcript]) -> list[list[float]]:
            return [[1.0] for _ in transcripts]

    with pytest.raises(ValueError, match="fake:Short scored 1 turns of an episode of 2"):
        scored(block("short", 1.0, kind=Short))
    with pytest.raises(ValueError, match="fake:Table gave 5 scores for 6 conversations"):
        scored(block("t", 1.0, [1] * 5))


@pytest.mark.parametrize("what", [None, "1.0", math.inf, -math.inf])
def test_a_score_that_is_no_number_is_a_failure(what: Any) -> None:
    class Odd(Table):
        def __call__(self, transcripts: Sequence[Transcript]) -> list[Any]:
            return [what, *range(1, len(transcripts))]

    rollout, metrics = scored(block("odd", 1.0, kind=Odd))
    assert metrics["reward/odd"] == 3.0 and metrics["reward/odd/failed"] == pytest.approx(1 / 6)
    assert metrics["rollout/unscored_episodes"] == 1 and not rollout.valid_TB[:, 0].any()
