"""Oracles: the definitions retyped as sums over scalars, numbers worked by hand, and invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.numerics.advantages import (
    gae,
    gae_of_units,
    group_relative,
    overlong_penalty,
    peer_relative,
    returns_to_go,
    standardize,
)

close = torch.testing.assert_close


def naive_gae(rewards, values, next_values, terminated, truncated, *, gamma, lam):
    """One environment, straight from the definition: A_t = sum_l (gamma lam)^l delta_{t+l} up to the end of t's episode."""
    advantages = []
    for t in range(len(rewards)):
        total, weight = 0.0, 1.0
        for u in range(t, len(rewards)):
            bootstrap = 0.0 if terminated[u] else next_values[u]
            total += weight * (rewards[u] + gamma * bootstrap - values[u])
            weight *= gamma * lam
            if terminated[u] or truncated[u]:
                break
        advantages.append(total)
    return advantages


def random_rollout(seed, t, b, done=0.35):
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, t, b, dtype=torch.float64, generator=generator).unbind()
    dice = torch.rand(t, b, generator=generator)
    return rewards, values, next_values, dice < done / 2, (dice >= done / 2) & (dice < done)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), t=st.integers(1, 8), b=st.integers(1, 4), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_is_its_definition(seed, t, b, gamma, lam):
    rollout = random_rollout(seed, t, b)
    advantages, returns = gae(*rollout, gamma=gamma, lam=lam)
    for env in range(b):
        want = naive_gae(*(x[:, env].tolist() for x in rollout), gamma=gamma, lam=lam)
        close(advantages[:, env], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-10)
        close(returns[:, env], advantages[:, env] + rollout[1][:, env], rtol=0, atol=1e-12)


def test_gae_by_hand():
    """gamma 0.5, lam 0.5. Environment 0 terminates at t = 1 and starts anew; environment 1 is truncated there.

    Environment 0: d2 = 2 + .5*4 - 1 = 3; d1 = 1 - 2 = -1 (no bootstrap); d0 = 0 + .5*2 - 1 = 0; A = [0 + .25*-1, -1, 3].
    Environment 1: d1 = 1 + .5*6 - 2 = 2 (bootstraps from the final observation, 6), so A = [0 + .25*2, 2, 3].
    """
    two = lambda *column: torch.tensor(column, dtype=torch.float64)[:, None].expand(3, 2)  # noqa: E731
    rewards, values = two(0.0, 1.0, 2.0), two(1.0, 2.0, 1.0)
    next_values = two(2.0, 6.0, 4.0)
    terminated = torch.tensor([[False, False], [True, False], [False, False]])
    truncated = torch.tensor([[False, False], [False, True], [False, False]])
    advantages, returns = gae(rewards, values, next_values, terminated, truncated, gamma=0.5, lam=0.5)
    assert advantages.T.tolist() == [[-0.25, -1.0, 3.0], [0.5, 2.0, 3.0]]
    assert returns.T.tolist() == [[0.75, 1.0, 4.0], [1.5, 4.0, 4.0]]


def test_gae_with_lam_one_is_the_discounted_return_less_the_value():
    gamma, rewards, values, _, terminated, truncated = 0.9, *random_rollout(0, 9, 3)
    done = terminated | truncated
    final_values = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    following = torch.cat([values[1:], final_values[-1:]])  # what a critic gives: V of the next decision's observation...
    next_values = torch.where(done, final_values, following)  # ... and of the final observation where an episode ended
    advantages, returns = gae(rewards, values, next_values, terminated, truncated, gamma=gamma, lam=1.0)
    for env in range(3):
        for t in range(9):
            end = next((u for u in range(t, 9) if done[u, env]), 8)
            discounted = sum(gamma ** (u - t) * rewards[u, env].item() for u in range(t, end + 1))
            tail = 0.0 if terminated[end, env] else gamma ** (end - t + 1) * final_values[end, env].item()
            assert returns[t, env].item() == pytest.approx(discounted + tail, rel=1e-10)
    close(advantages, returns - values)


def test_gae_with_lam_zero_is_the_temporal_difference():
    rewards, values, next_values, terminated, truncated = random_rollout(1, 7, 5)
    advantages, _ = gae(rewards, values, next_values, terminated, truncated, gamma=0.9, lam=0.0)
    close(advantages, rewards + 0.9 * next_values * (~terminated) - values)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_gae_of_joined_episodes_is_that_of_each(end):
    first, second = random_rollout(2, 4, 2, done=0.0), random_rollout(3, 5, 2, done=0.0)
    first[3 if end == "terminated" else 4][-1] = True
    joined = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    options = {"gamma": 0.99, "lam": 0.95}
    close(gae(*joined, **options)[0], torch.cat([gae(*first, **options)[0], gae(*second, **options)[0]]))


def test_a_terminated_decision_ignores_what_came_after_even_nan():
    rewards, values, next_values, terminated, truncated = random_rollout(4, 5, 2)
    terminated[2] = True
    truncated[2] = False
    next_values[2] = math.nan
    advantages, _ = gae(rewards, values, next_values, terminated, truncated, gamma=0.99, lam=0.95)
    assert advantages.isfinite().all()
    close(advantages[2], rewards[2] - values[2])


def naive_gae_of_units(rewards_T, values_TV, next_values_T, there_TV, terminated_T, truncated_T, *, gamma, lam, earned_TV):
    """One environment, by lists of the units of an episode: what is shown between decisions is no step."""
    worth = [[0.0] * len(row) for row in there_TV]
    units, rewards = [], []
    for t, row in enumerate(there_TV):
        for v, there in enumerate(row):
            if there:
                units.append((t, v))
                rewards.append(earned_TV[t][v])
        if units:
            rewards[-1] += rewards_T[t]  # where the decision has no unit, this is one of a decision before
        if terminated_T[t] or truncated_T[t] or t == len(there_TV) - 1:
            values = [values_TV[u][v] for u, v in units] + [0.0 if terminated_T[t] else next_values_T[t]]
            errors = [reward + gamma * values[i + 1] - values[i] for i, reward in enumerate(rewards)]
            for i, (u, v) in enumerate(units):
                worth[u][v] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(errors)))
            units, rewards = [], []
    return worth


def random_units(seed, t, b, v):
    """A rollout whose decisions have any number of v units; the rest is NaN. Where an episode goes on, so do the values."""
    rewards, _, final, terminated, truncated = random_rollout(seed, t, b)
    generator = torch.Generator().manual_seed(seed + 1)
    there = torch.arange(v) < torch.randint(0, v + 1, (t, b, 1), generator=generator)
    values, earned = torch.randn(2, t, b, v, dtype=torch.float64, generator=generator).masked_fill(~there, math.nan).unbind()
    following = torch.cat([values[1:, :, 0], final[-1:]])
    return rewards, values, torch.where(terminated | truncated, final, following), there, terminated, truncated, earned


@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95)])
@pytest.mark.parametrize("seed", range(4))
def test_gae_of_units_is_its_definition(seed, gamma, lam, v):
    b = 12
    *rollout, earned = random_units(10 * seed, 6, b, v)
    advantages, returns = gae_of_units(*rollout, gamma=gamma, lam=lam, earned_TBV=earned)
    there = rollout[3]
    for env in range(b):
        lists = (x[:, env].tolist() for x in rollout)
        want = naive_gae_of_units(*lists, gamma=gamma, lam=lam, earned_TV=earned[:, env].tolist())
        close(advantages[:, env], torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    close(returns, torch.where(there, advantages + rollout[1], 0), rtol=0, atol=1e-12)


def test_gae_of_units_by_hand():
    """gamma 0.5, lam 0.5; a conversation of two turns, of two tokens and of one, and a last one that was cut before its first.

    The first turn is paid 1, the second 2, and the third 4, which is the second's as well; then time is up, at a value of 8.
    d3 = 2 + 4 + .5*8 - 3 = 7; d2 = 1 + .5*3 - 2 = 0.5, across the turns; d1 = 0 + .5*2 - 1 = 0.
    A3 = 7; A2 = 0.5 + .25*7 = 2.25; A1 = 0 + .25*2.25 = 0.5625.
    """
    rewards, following = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [0.0], [8.0]])
    values = torch.tensor([[[1.0, 2.0]], [[3.0, math.nan]], [[0.0, math.nan]]])
    there = torch.tensor([[[True, True]], [[True, False]], [[False, False]]])
    never, truncated = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [False], [True]])
    advantages, returns = gae_of_units(rewards, values, following, there, never, truncated, gamma=0.5, lam=0.5)
    assert advantages[:, 0].tolist() == [[0.5625, 2.25], [7, 0], [0, 0]] and returns[:, 0].tolist() == [
        [1.5625, 4.25],
        [10, 0],
        [0, 0],
    ]


def test_without_discount_a_unit_s_advantage_is_the_return_less_its_value():
    rewards, values, following, there, _, truncated, _ = random_units(5, 6, 3, 4)
    ends = torch.arange(6)[:, None].expand(6, 3) == 5
    truncated, following = (
        torch.zeros_like(truncated),
        torch.where(ends, following, torch.cat([values[1:, :, 0], following[-1:]])),
    )
    advantages, returns = gae_of_units(rewards, values, following, there, ends, truncated, gamma=1.0, lam=1.0)
    for t, b, v in there.nonzero().tolist():
        to_come = float(rewards[t:, b].sum())
        assert float(returns[t, b, v]) == pytest.approx(to_come, rel=1e-10)
        assert float(advantages[t, b, v]) == pytest.approx(to_come - float(values[t, b, v]), rel=1e-10)
    assert int(there.sum()) > 20


def test_gae_of_single_units_is_gae():
    rewards, values, following, terminated, truncated = random_rollout(6, 7, 5)
    everything = torch.ones(7, 5, 1, dtype=torch.bool)
    flags = terminated, truncated
    units = gae_of_units(rewards, values[..., None], following, everything, *flags, gamma=0.9, lam=0.8)
    for ours, theirs in zip(units, gae(rewards, values, following, *flags, gamma=0.9, lam=0.8), strict=True):
        assert torch.equal(ours[..., 0], theirs)


def naive_group_relative(rewards, scale, baseline, eps):
    everything = [r for group in rewards for r in group]
    result = []
    for group in rewards:
        row = []
        for i, r in enumerate(group):
            others = group[:i] + group[i + 1 :]
            base = {"mean": sum(group) / len(group), "leave_one_out": sum(others) / len(others), "none": 0.0}[baseline]
            sample = {"group_std": group, "batch_std": everything, "none": None}[scale]
            if sample is None:
                row.append(r - base)
                continue
            centre = sum(sample) / len(sample)
            spread = math.sqrt(sum((s - centre) ** 2 for s in sample) / (len(sample) - 1))
            row.append((r - base) / (spread + eps))
        result.append(row)
    return result


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_group_relative_is_its_definition(scale, baseline, eps):
    rewards = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    want = naive_group_relative(rewards.tolist(), scale, baseline, eps)
    close(group_relative(rewards, scale=scale, baseline=baseline, eps=eps), torch.tensor(want, dtype=torch.float64))


def test_group_relative_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    unbiased = math.sqrt(4 * 0.25 / 3)
    assert group_relative(rewards, eps=0.0)[0].tolist() == pytest.approx([0.5 / unbiased * s for s in (1, -1, -1, 1)])
    assert group_relative(rewards, scale="none", baseline="leave_one_out")[0].tolist() == pytest.approx(
        [2 / 3, -2 / 3, -2 / 3, 2 / 3]
    )


def test_leave_one_out_is_the_mean_baseline_times_g_over_g_minus_one():
    rewards = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    loo = group_relative(rewards, scale="none", baseline="leave_one_out")
    close(loo, group_relative(rewards, scale="none", baseline="mean") * 4 / 3)


def test_group_relative_ignores_shift_and_scale_of_each_group():
    rewards = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    moved = rewards * torch.tensor([[0.1], [1.0], [30.0]]) + torch.tensor([[5.0], [-1.0], [0.0]])
    close(group_relative(moved, eps=0.0), group_relative(rewards, eps=0.0))


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
def test_a_group_that_agrees_has_no_advantage(scale):
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert group_relative(rewards, scale=scale)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 1), {"scale": "group_std"}, "at least 2 samples a group, got 1"),
        ((3, 1), {"scale": "none", "baseline": "leave_one_out"}, "at least 2 samples a group"),
        ((1, 1), {"scale": "batch_std"}, "at least 2 rewards"),
        ((2, 2), {"scale": "std"}, "not 'mean' and 'std'"),
        ((2, 2), {"baseline": "median"}, "not 'median' and 'group_std'"),
    ],
)
def test_group_relative_refusals(shape, options, message):
    with pytest.raises(ValueError, match=message):
        group_relative(torch.zeros(shape), **options)


def test_standardize_is_over_the_kept_entries():
    x = torch.tensor([[1.0, math.nan], [3.0, 8.0]], dtype=torch.float64)
    got = standardize(x, torch.tensor([[True, False], [True, True]]), eps=0.5)
    spread = math.sqrt((9 + 1 + 16) / 2)  # mean 4, three entries, divisor n - 1
    close(got, torch.tensor([[-3.0, 0.0], [-1.0, 4.0]], dtype=torch.float64) / (spread + 0.5))


def test_standardize_of_one_entry_is_zero():
    assert standardize(torch.tensor([5.0, 7.0]), torch.tensor([True, False])).tolist() == [0, 0]


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_peers_are_compared_as_groups_are(scale, baseline):
    """Groups of 3, 1, 4 and 2, mixed; the one that is alone is worth 0."""
    keys = [7, -2, 7, 50, 3, 3, 50, 7, 3, 3]
    values = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(14)).tolist()
    spread = math.sqrt(sum((v - sum(values) / 10) ** 2 for v in values) / 9)
    got, sizes = peer_relative(torch.tensor(values).double(), torch.tensor(keys), scale=scale, baseline=baseline, eps=0.3)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        group = [v for k, v in zip(keys, values, strict=True) if k == key]
        assert int(sizes[i]) == len(group)
        if len(group) == 1:
            assert float(got[i]) == 0
            continue
        mean = sum(group) / len(group)
        base = mean if baseline == "mean" else (sum(group) - value) / (len(group) - 1)
        own = math.sqrt(sum((v - mean) ** 2 for v in group) / (len(group) - 1))
        divisor = {"group_std": own + 0.3, "batch_std": spread + 0.3, "none": 1.0}[scale]
        assert float(got[i]) == pytest.approx((value - base) / divisor, abs=1e-7)


def test_peers_of_equal_groups_are_group_relative():
    rewards = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(15))
    keys = torch.tensor([[9], [0], [4]]).expand(3, 4)
    close(peer_relative(rewards.flatten(), keys.flatten())[0].reshape(3, 4), group_relative(rewards), rtol=1e-12, atol=1e-12)


def test_peers_that_agree_are_worth_nothing():
    """A mean that is off by its rounding would be blown up by a standard deviation of 0."""
    assert peer_relative(torch.full((7,), 0.7), torch.zeros(7, dtype=torch.long))[0].abs().max() < 1e-9


@pytest.mark.parametrize("options", [{"baseline": "none"}, {"baseline": "median"}, {"scale": "std"}])
def test_peer_relative_refusals(options):
    with pytest.raises(ValueError, match=r"knows baselines \['leave_one_out', 'mean'\] and scales"):
        peer_relative(torch.zeros(2), torch.zeros(2, dtype=torch.long), **options)


def test_returns_to_go_is_its_sum():
    rewards = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(16))
    got = returns_to_go(rewards, gamma=0.7)
    for t in range(5):
        for b in range(3):
            assert float(got[t, b]) == pytest.approx(sum(0.7 ** (u - t) * float(rewards[u, b]) for u in range(t, 5)))
    assert torch.equal(returns_to_go(rewards, gamma=0.0), rewards)


def test_overlong_penalty_by_hand():
    """DAPO's own numbers: 16384 tokens, and 4096 more over which the punishment grows."""
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 99999])
    got = overlong_penalty(lengths, limit=20480, buffer=4096)
    assert got.tolist() == pytest.approx([0, 0, -1 / 4096, -0.5, -1, -1, -1])
    for buffer in (0, 20481):
        with pytest.raises(ValueError, match="use 1 to 20480"):
            overlong_penalty(lengths, limit=20480, buffer=buffer)
