"""What decisions and units are worth under GRPO's switches, against twins with loops over episodes of several decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.ppo import PPO
from mmrl.batching import make_batch
from mmrl.errors import ConfigError
from mmrl.types import EpisodeRecord, Packing, Rollout

T, P, G, K = 4, 3, 4, 3
B = P * G
LOST = 5  # the slot whose episode the simulator lost, of the second group


def episodes(**changes: Any) -> Rollout:
    """Episodes of 1 to 4 decisions with a reward each; some units of a decision are not trained; states are met again."""
    lengths_B = torch.randint(1, T + 1, (B,))
    lengths_B[LOST] = 0
    lengths_B[0], lengths_B[1:G] = T, lengths_B[1:G].clamp(max=T - 1)  # nobody to compare its last decision with
    valid_TB = torch.arange(T)[:, None] < lengths_B
    zero_TB = torch.zeros(T, B, dtype=torch.float64)
    played = lengths_B > 0
    log_probs_TBK = torch.randn(T, B, K, dtype=torch.float64)
    rollout = Rollout(
        trace={},
        log_probs_TBK=log_probs_TBK,
        mask_TBK=torch.rand(T, B, K) < 0.7,
        rewards_TB=torch.where(valid_TB, torch.randn(T, B, dtype=torch.float64), 0),
        values_TBV=zero_TB[..., None],
        next_values_TB=zero_TB,
        valid_TB=valid_TB,
        terminated_TB=torch.arange(T)[:, None] == lengths_B - 1,
        truncated_TB=torch.zeros(T, B, dtype=torch.bool),
        task_ids_TB=(torch.arange(B) // G).expand(T, B),
        episodes=EpisodeRecord(torch.arange(B)[played] // G, torch.zeros(B)[played], torch.ones(B)[played], lengths_B[played]),
        env_steps=int(valid_TB.sum()),
        lost=1,
        anchor_TB=torch.randint(0, 4, (T, B)),
        reference_log_probs_TBK=log_probs_TBK + 0.3 * torch.randn(T, B, K, dtype=torch.float64),
    )
    return replace(rollout, **changes)


@dataclass
class Twin:
    """The same by loops. Decisions are (t, b), units (t, b, k); the incomplete group has none."""

    rollout: Rollout
    config: GRPO.Config

    def __post_init__(self) -> None:
        self.slots = [b for b in range(B) if b // G != LOST // G]
        self.decisions = [(t, b) for b in self.slots for t in range(T) if self.rollout.valid_TB[t, b]]
        self.penalty = {}
        for t, b in self.decisions:
            for k in self.units(t, b):
                assert self.rollout.reference_log_probs_TBK is not None
                gap = float(self.rollout.log_probs_TBK[t, b, k] - self.rollout.reference_log_probs_TBK[t, b, k])
                kl = {"k1": gap, "k2": gap * gap / 2, "k3": math.exp(-gap) - 1 + gap}[self.config.kl_kind]
                self.penalty[t, b, k] = self.config.kl_weight * kl if self.config.kl_in == "reward" else 0.0
        self.rewards = {
            (t, b): float(self.rollout.rewards_TB[t, b]) - sum(self.penalty[t, b, k] for k in self.units(t, b))
            for t, b in self.decisions
        }
        if self.config.overlong is not None:
            for b in self.slots:
                last = max(t for t, other in self.decisions if other == b)
                self.rewards[last, b] += self.punishment(sum(len(self.units(t, b)) for t in range(last + 1)))

    def units(self, t: int, b: int) -> list[int]:
        return [k for k in range(K) if self.rollout.mask_TBK[t, b, k]]

    def punishment(self, length: int) -> float:
        o = self.config.overlong
        assert o is not None
        over = length - (o.limit - o.buffer)
        return -o.weight * min(max(over / o.buffer, 0.0), 1.0)

    def to_go(self, t: int, b: int) -> float:
        return sum(self.config.gamma ** (u - t) * self.rewards[u, b] for u in range(t, T) if (u, b) in self.rewards)

    def whole(self, b: int) -> float:
        return sum(self.rewards[t, b] for t in range(T) if (t, b) in self.rewards)

    def compare(self, value: float, peers: list[float], everything: list[float]) -> float:
        """``peers`` contain the value."""
        if self.config.baseline == "none":
            return value
        if len(peers) == 1:
            return 0.0
        others = (sum(peers) - value) / (len(peers) - 1)
        centred = value - (others if self.config.baseline == "leave_one_out" else fmean(peers))
        spread = {"group_std": stdev(peers) + 1e-6, "batch_std": stdev(everything) + 1e-6}
        return centred / spread.get(self.config.scale, 1.0)

    def of_episode(self, b: int) -> float:
        group = [self.whole(other) for other in self.slots if other // G == b // G]
        return self.compare(self.whole(b), group, [self.whole(other) for other in self.slots])

    def of_key(self, t: int, b: int, key: Any) -> float:
        peers = [self.to_go(u, c) for u, c in self.decisions if c // G == b // G and key(u, c) == key(t, b)]
        return self.compare(self.to_go(t, b), peers, [self.to_go(u, c) for u, c in self.decisions])

    def decision(self, t: int, b: int) -> float:
        def state(u: int, c: int) -> int:
            assert self.rollout.anchor_TB is not None
            return int(self.rollout.anchor_TB[u, c])

        if self.config.credit == "episode":
            return self.of_episode(b)
        if self.config.credit == "turn":
            return self.of_key(t, b, lambda u, c: u)
        return self.of_episode(b) + self.config.step_weight * self.of_key(t, b, state)

    def unit(self, t: int, b: int, k: int) -> float:
        """Before whitening."""
        paid = sum(self.penalty[t, b, j] for j in self.units(t, b) if j < k)
        return self.decision(t, b) + (paid if (self.config.credit, self.config.baseline) == ("turn", "none") else 0.0)

    def all_units(self) -> dict[tuple[int, int, int], float]:
        worth = {(t, b, k): self.unit(t, b, k) for t, b in self.decisions for k in self.units(t, b)}
        if self.config.scale == "whiten":
            mean, std = fmean(worth.values()), stdev(worth.values())
            worth = {place: (value - mean) / (std + 1e-6) for place, value in worth.items()}
        return worth


REWARD: dict[str, Any] = {"kl_in": "reward", "kl_weight": 0.4}
CASES: dict[str, dict[str, Any]] = {
    "episode": {},
    "episode, batch std": {"scale": "batch_std"},
    "Dr.GRPO": {"scale": "none"},
    "RLOO": {"scale": "none", "baseline": "leave_one_out"},
    "KL in rewards": {**REWARD, "kl_kind": "k1"},
    "KL in rewards, k3": {**REWARD, "kl_kind": "k3", "scale": "none"},
    "turn": {"credit": "turn"},
    "turn, discounted": {"credit": "turn", "gamma": 0.8, "scale": "none"},
    "turn, leave one out": {"credit": "turn", "scale": "batch_std", "baseline": "leave_one_out"},
    "turn, KL in rewards": {"credit": "turn", **REWARD, "kl_kind": "k2"},
    "GiGPO": {"credit": "gigpo", "gamma": 0.95, "scale": "none"},
    "GiGPO, scaled": {"credit": "gigpo", "gamma": 0.9, "step_weight": 0.3},
    "GiGPO, leave one out": {"credit": "gigpo", "baseline": "leave_one_out", "scale": "batch_std", "step_weight": 2.0},
    "REINFORCE": {"baseline": "none", "scale": "none"},
    "REINFORCE++": {"baseline": "none", "scale": "whiten", "credit": "turn", **REWARD, "kl_kind": "k1"},
    "REINFORCE++, discounted": {"baseline": "none", "scale": "whiten", "credit": "turn", "gamma": 0.7},
    "REINFORCE++, not whitened": {"baseline": "none", "scale": "none", "credit": "turn", "gamma": 0.7, **REWARD},
    "REINFORCE++-baseline": {"scale": "whiten"},
    "REINFORCE++-baseline, turns": {"scale": "whiten", "credit": "turn", **REWARD},
    "overlong": {"overlong": {"limit": 6, "buffer": 4, "weight": 2.0}},
    "overlong, turns": {"overlong": {"limit": 6, "buffer": 4}, "credit": "turn", "gamma": 0.9, "scale": "none"},
}


class Packer:
    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_episode()


@pytest.mark.parametrize("case", CASES)
def test_every_unit_is_worth_what_the_twin_says(case: str) -> None:
    """From the rollout to the batch, whose samples are whole episodes."""
    rollout, algorithm = episodes(), GRPO(GRPO.Config(**{"group_size": G, **CASES[case]}))
    twin = Twin(rollout, algorithm.config)
    result = algorithm.advantages(rollout)
    assert result.keep_TB[:, LOST // G * G : LOST // G * G + G].sum() == 0
    assert sorted(map(tuple, result.keep_TB.nonzero().tolist())) == sorted(twin.decisions)
    policy: Any = Packer()
    batch = make_batch(rollout, result, policy)
    wanted = twin.all_units()
    longest = batch.advantages_NJ.shape[1]
    got = batch.advantages_NK.unflatten(1, (longest, K))
    trained = batch.mask_NK.unflatten(1, (longest, K))
    assert int(trained.sum()) == len(wanted)
    for (t, b, k), value in wanted.items():
        row = twin.slots.index(b)
        assert bool(trained[row, t, k])
        assert float(got[row, t, k]) == pytest.approx(value, rel=1e-9, abs=1e-9)
    if algorithm.config.scale != "whiten":
        for t, b in twin.decisions:
            assert float(batch.advantages_NJ[twin.slots.index(b), t]) == pytest.approx(twin.decision(t, b), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_trained_may_hold_anything(case: str) -> None:
    rollout, algorithm = episodes(), GRPO(GRPO.Config(**{"group_size": G, **CASES[case]}))
    nan = torch.tensor(math.nan, dtype=torch.float64)
    assert rollout.reference_log_probs_TBK is not None
    poisoned = replace(
        rollout,
        rewards_TB=torch.where(rollout.valid_TB, rollout.rewards_TB, 99.0),
        log_probs_TBK=torch.where(rollout.mask_TBK, rollout.log_probs_TBK, nan),
        reference_log_probs_TBK=torch.where(rollout.mask_TBK & rollout.valid_TB[..., None], rollout.reference_log_probs_TBK, nan),
    )
    clean, dirty = algorithm.advantages(rollout), algorithm.advantages(poisoned)
    assert torch.equal(dirty.keep_TB, clean.keep_TB)
    assert torch.equal(dirty.advantages_TB[clean.keep_TB], clean.advantages_TB[clean.keep_TB])
    if clean.units_TBK is not None:
        trained = rollout.mask_TBK & clean.keep_TB[..., None]
        assert dirty.units_TBK is not None and torch.equal(dirty.units_TBK[trained], clean.units_TBK[trained])


def test_whitened_advantages_have_mean_zero_and_deviation_one_over_units() -> None:
    rollout = episodes()
    result = GRPO(GRPO.Config(group_size=G, scale="whiten")).advantages(rollout)
    assert result.units_TBK is not None
    kept = result.units_TBK[rollout.mask_TBK & result.keep_TB[..., None]]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-12) and float(kept.std()) == pytest.approx(1, abs=1e-5)


def table(rewards: list[list[float]], anchors: list[list[int]] | None = None) -> Rollout:
    """Two episodes, a column each, of one unit a decision."""
    rewards_TB = torch.tensor(rewards, dtype=torch.float64)
    t, b = rewards_TB.shape
    ones_TBK, zero_TB = torch.ones(t, b, 1, dtype=torch.bool), torch.zeros(t, b, dtype=torch.float64)
    return Rollout(
        trace={},
        log_probs_TBK=ones_TBK.double(),
        mask_TBK=ones_TBK,
        rewards_TB=rewards_TB,
        values_TBV=zero_TB[..., None],
        next_values_TB=zero_TB,
        valid_TB=ones_TBK[..., 0],
        terminated_TB=torch.arange(t)[:, None].expand(t, b) == t - 1,
        truncated_TB=torch.zeros(t, b, dtype=torch.bool),
        task_ids_TB=zero_TB.long(),
        episodes=EpisodeRecord(torch.zeros(b).long(), rewards_TB.sum(0), torch.ones(b), torch.full((b,), t)),
        env_steps=t * b,
        anchor_TB=None if anchors is None else torch.tensor(anchors),
    )


def test_gigpo_by_hand() -> None:
    """Episode 0 walks through states 1, 2, 1 and fails; episode 1 through 1, 2, 3 and succeeds. gamma 1/2, no deviations.

    Returns 0 and 1: A_episode = -1/2, 1/2. From decisions on: 0, 0, 0 and 1/4, 1/2, 1. State 1: 0, 0, 1/4, so -1/12, -1/12, 1/6;
    state 2: 0, 1/2, so -1/4, 1/4; state 3 was met once: 0.
    """
    rollout = table([[0, 0], [0, 0], [0, 1]], [[1, 1], [2, 2], [1, 3]])
    result = GRPO(GRPO.Config(group_size=2, credit="gigpo", gamma=0.5, scale="none")).advantages(rollout)
    expected = [[-1 / 2 - 1 / 12, 1 / 2 + 1 / 6], [-1 / 2 - 1 / 4, 1 / 2 + 1 / 4], [-1 / 2 - 1 / 12, 1 / 2]]
    torch.testing.assert_close(result.advantages_TB, torch.tensor(expected, dtype=torch.float64))
    assert result.metrics["decisions_without_peers"] == pytest.approx(1 / 6)


def test_states_of_other_tasks_are_other_states() -> None:
    rollout = table([[0, 1, 0, 5]], [[1, 1, 1, 1]])
    result = GRPO(GRPO.Config(group_size=2, credit="gigpo", scale="none")).advantages(rollout)
    assert result.advantages_TB.tolist() == [[-1, 1, -5, 5]]


def test_leave_one_out_is_g_over_g_minus_one_times_the_distance_from_the_mean() -> None:
    rollout = episodes()
    centred, rloo = (
        GRPO(GRPO.Config(group_size=G, scale="none", baseline=baseline)).advantages(rollout)  # type: ignore[arg-type]
        for baseline in ("mean", "leave_one_out")
    )
    torch.testing.assert_close(rloo.advantages_TB, centred.advantages_TB * G / (G - 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("credit", "rewards", "teaches"),
    [
        ("episode", [[1, 0], [0, 1]], False),  # the same return, earned at other times
        ("turn", [[1, 0], [0, 1]], True),
        ("turn", [[1, 1], [1, 1]], False),
        ("gigpo", [[1, 1], [1, 1]], True),  # the same state may have been met at both times
        ("gigpo", [[0, 0], [0, 0]], False),
    ],
)
def test_a_group_teaches_if_the_returns_differ_that_its_credit_compares(credit: Any, rewards: Any, teaches: bool) -> None:
    rollout = table(rewards, [[0, 0], [0, 0]])
    algorithm = GRPO(GRPO.Config(group_size=2, credit=credit))
    assert algorithm.taught(rollout).tolist() == [teaches] * 2
    assert bool(algorithm.advantages(rollout).keep_TB.all()) is teaches


def test_neither_length_nor_a_kl_makes_a_group_worth_learning_from() -> None:
    """All of a group failed alike: what it could learn is to be short."""
    mask_TBK = torch.tensor([[[True, True], [True, False]]])
    rollout = replace(table([[0.0, 0.0]]), mask_TBK=mask_TBK, log_probs_TBK=torch.randn(1, 2, 2, dtype=torch.float64))
    rollout = replace(rollout, reference_log_probs_TBK=torch.zeros(1, 2, 2, dtype=torch.float64))
    fields: dict[str, Any] = {"overlong": {"limit": 2, "buffer": 2}, "kl_weight": 1.0, "kl_in": "reward"}
    result = GRPO(GRPO.Config(group_size=2, **fields)).advantages(rollout)
    assert not result.keep_TB.any() and result.metrics["groups_without_spread"] == 1 and result.metrics["episodes_overlong"] == 1
    # Nor is a group of whatever spread left out where nothing is compared.
    lone = GRPO(GRPO.Config(group_size=1, baseline="none", scale="whiten"))
    assert lone.advantages(rollout).keep_TB.all()


def test_ppo_takes_the_kl_off_its_rewards() -> None:
    rollout = episodes()
    fields: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "normalize_advantages": None}
    penalised = PPO(PPO.Config(**fields, kl_weight=0.5, kl_kind="k1", kl_in="reward"))
    assert penalised.uses_reference and rollout.reference_log_probs_TBK is not None
    gaps_TBK: Tensor = rollout.log_probs_TBK - rollout.reference_log_probs_TBK
    paid_TB = torch.zeros(T, B, dtype=torch.float64)
    for t, b, k in (rollout.mask_TBK & rollout.valid_TB[..., None]).nonzero().tolist():
        paid_TB[t, b] += 0.5 * gaps_TBK[t, b, k]
    by_hand = PPO(PPO.Config(**fields)).advantages(replace(rollout, rewards_TB=rollout.rewards_TB - paid_TB))
    torch.testing.assert_close(penalised.advantages(rollout).advantages_TB, by_hand.advantages_TB, rtol=1e-12, atol=1e-12)


def test_credit_by_state_needs_keys_of_states() -> None:
    with pytest.raises(ConfigError, match=r"'credit' is 'gigpo'.*Observation\.anchors_B.*use 'turn' or 'episode'"):
        GRPO(GRPO.Config(group_size=2, credit="gigpo")).advantages(table([[0, 1]]))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gamma": 0.9}, "gamma is 0.9, but credit 'episode' discounts nothing"),
    ({"step_weight": 0.5, "credit": "turn"}, "step_weight is 0.5, but credit 'turn' does not read it"),
    ({"group_size": 1}, "group_size is 1, but baseline 'mean' compares episodes"),
    ({"baseline": "none"}, "leaves nothing centred for scale 'group_std'"),
    ({"baseline": "none", "scale": "whiten", "credit": "gigpo"}, "credit 'gigpo' compares decisions"),
    ({"baseline": "none", "scale": "whiten", "max_refills": 2}, "max_refills replaces groups without spread"),
    ({"overlong": {"limit": 10, "buffer": 11}}, r"buffer is 11, which is more than limit \(10\)"),
    ({"reduce": "constant"}, "divides by units_per_sample; set it"),
    ({"units_per_sample": 5}, "reduce 'unit_mean' does not read it"),
    ({"objective": "cispo", "dual_clip": 3.0}, "dual_clip is 3.0, but objective 'cispo' is bounded by clip_high"),
    ({"kl_in": "reward"}, "kl_in is 'reward', but kl_weight is 0"),
    ({"kl_in": "reward", "kl_weight": 0.1, "kl_corrected": True}, "kl_corrected weighs a KL in the loss"),
    ({"kl_corrected": True}, "set kl_in: loss and kl_weight above 0"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_switches_that_do_not_fit_together_are_refused_by_name(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        GRPO.Config(**fields)
