"""The numbers of mmrl.numerics, pinned: a change of any of them must be meant.

The inputs come from Python's own generator, whose stream never changes between versions. After a change that is meant, run
``python tests/numerics/test_golden.py`` and say in the commit by how much the numbers moved, and why.
"""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mmrl.numerics import advantages, flow, losses, matching, statistics, steps, tokens

GOLDEN = Path(__file__).parent.parent / "golden" / "numerics.json"
SEEDS = (0, 1)


class Draw:
    """Float64 tensors from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor([self.random.gauss(0, 1) for _ in range(count)], dtype=torch.float64).reshape(shape)

    def coin(self, *shape: int, chance: float) -> torch.Tensor:
        return torch.tensor([self.random.random() < chance for _ in range(torch.Size(shape).numel())]).reshape(shape)


def chain(rule: str, noise_level: float | None) -> Callable[[Draw], list[torch.Tensor]]:
    """Four steps from noise to data with a fixed linear velocity field; means, and log-probabilities of what was drawn."""

    def run(draw: Draw) -> list[torch.Tensor]:
        grid = flow.time_grid(4, dtype=torch.float64)
        x, record = draw.normal(2, 3), []
        std = torch.full((3,), 0.1, dtype=torch.float64) if rule == "flow_noise" else None
        for t, t_next in pairwise(grid):
            t_star = flow.guarded_time(t, t_next)
            step = flow.transition(x, 0.5 * x - t, t, t_next, rule=rule, noise_level=noise_level, t_star=t_star, std=std)
            x = step.mean + step.std * draw.normal(2, 3)
            record += [step.mean, flow.gaussian_log_prob(x, step.mean, step.std)]
        return record

    return run


def gae(draw: Draw) -> list[torch.Tensor]:
    rewards, values, next_values = draw.normal(3, 5, 2)
    terminated = draw.coin(5, 2, chance=0.3)
    truncated = draw.coin(5, 2, chance=0.3) & ~terminated
    return list(advantages.gae(rewards, values, next_values, terminated, truncated, gamma=0.99, lam=0.95))


def group_relative(draw: Draw) -> list[torch.Tensor]:
    rewards = draw.normal(2, 4)
    return [
        advantages.group_relative(rewards, scale=scale, baseline=baseline, eps=1e-4)
        for scale in ("group_std", "batch_std", "none")
        for baseline in ("mean", "leave_one_out")
    ]


def surrogate(draw: Draw) -> list[torch.Tensor]:
    old = draw.normal(3, 4)
    units = (old + 0.3 * draw.normal(3, 4), old, draw.normal(3, 4), draw.coin(3, 4, chance=0.7))
    results = [
        losses.clipped_surrogate(*units, clip_low=0.2, clip_high=0.28, dual_clip=3.0, ratio=ratio, reduce=reduce, normalizer=6)
        for ratio in ("unit", "sequence")
        for reduce in ("unit_mean", "sample_mean", "constant")
    ]
    return [number for loss in results for number in (loss.value, *(torch.as_tensor(m) for m in loss.metrics.values()))]


def cispo(draw: Draw) -> list[torch.Tensor]:
    old = draw.normal(3, 4)
    units = (old + 0.3 * draw.normal(3, 4), old, draw.normal(3, 4), draw.coin(3, 4, chance=0.7))
    return [losses.clipped_surrogate(*units, clip_low=1.0, clip_high=0.3, objective="cispo").value]


def peers(draw: Draw) -> list[torch.Tensor]:
    values, groups = draw.normal(8), torch.tensor([1, 0, 0, 5, 1, 0, 1, 0])
    return [
        advantages.peer_relative(values, groups, scale=scale, baseline=baseline, eps=1e-4)[0]
        for scale in ("group_std", "batch_std", "none")
        for baseline in ("mean", "leave_one_out")
    ]


def shaping(draw: Draw) -> list[torch.Tensor]:
    lengths = (20 * draw.normal(6)).abs().round()
    return [advantages.returns_to_go(draw.normal(4, 2), gamma=0.9), advantages.overlong_penalty(lengths, limit=20, buffer=10)]


def critic(draw: Draw) -> list[torch.Tensor]:
    values, old, returns = draw.normal(3, 8)
    mask = draw.coin(8, chance=0.8)
    loss = losses.value_loss(values, old, returns, mask, clip=0.2, huber_delta=1.0)
    return [loss.value, losses.explained_variance(values, returns, mask), advantages.standardize(returns, mask)]


def divergences(draw: Draw) -> list[torch.Tensor]:
    log_probs, reference = draw.normal(2, 4)
    return [losses.kl_estimate(log_probs, reference, kind) for kind in ("k1", "k2", "k3")]


def vocabulary(draw: Draw) -> list[torch.Tensor]:
    logits = draw.normal(1, 3, 5)
    return [tokens.token_log_probs(logits, torch.tensor([[0, 2, 4]]), chunk=2), tokens.token_entropy(logits, chunk=2)]


def intervals(draw: Draw) -> list[torch.Tensor]:
    seeds = draw.normal(4).tolist()
    return [
        torch.tensor(pair, dtype=torch.float64) for pair in (statistics.wilson_interval(37, 64), statistics.mean_interval(seeds))
    ]


def gaussian_steps(draw: Draw) -> list[torch.Tensor]:
    means, other = draw.normal(2, 2, 3, 4)
    log_probs, old, stds, deltas = draw.normal(4, 2, 3)
    stds, deltas = stds.abs(), deltas.abs()
    kls = [steps.step_kl(means, other, stds, deltas, form=form) for form in ("exact", "flow_grpo", "means")]
    given = {"stds_NK": stds, "means_NKD": means, "old_means_NKD": other}
    return [*kls, *(steps.step_log_ratio(log_probs, old, form=form, **given) for form in ("likelihood", "unscaled", "guard"))]


def velocity_fields(draw: Draw) -> list[torch.Tensor]:
    v, old, x0, noise = draw.normal(4, 3, 4)
    t, preference = draw.normal(2, 3).sigmoid()
    x_t = flow.interpolate(x0, noise, t)
    error = matching.matching_error(v, x0, noise)
    weightings = ("uniform", "time", "time_squared", "huber", "power")
    margin = matching.dpo_margin(error, error.flip(0), t, preference, beta=3.0)
    return [
        matching.nft_loss(v, old, x_t, x0, t, preference, strength=0.3),
        *(matching.matching_log_prob(error, t, weighting=weighting) for weighting in weightings),
        margin,
        matching.dpo_loss(margin),
        *matching.soar_point(x0, noise, old, t, t + preference * (1 - t)),
        matching.shifted(t, 3.0),
        matching.unshifted(t, 3.0),
        advantages.extremes(v, worst=True),
        advantages.extremes(v, worst=False),
    ]


CASES: dict[str, Callable[[Draw], list[torch.Tensor]]] = {
    "flow.ode": chain("ode", None),
    "flow.flow_sde": chain("flow_sde", 0.5),
    "flow.cps": chain("cps", 0.8),
    "flow.flow_noise": chain("flow_noise", None),
    "flow.constant": chain("constant", 0.3),
    "advantages.gae": gae,
    "advantages.group_relative": group_relative,
    "advantages.peer_relative": peers,
    "advantages.shaping": shaping,
    "losses.clipped_surrogate": surrogate,
    "losses.cispo": cispo,
    "losses.critic": critic,
    "losses.kl_estimate": divergences,
    "matching": velocity_fields,
    "steps": gaussian_steps,
    "tokens": vocabulary,
    "statistics": intervals,
}


def numbers(case: str, seed: int) -> list[float]:
    return torch.cat([x.flatten() for x in CASES[case](Draw(seed))]).tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", sorted(CASES))
def test_numbers_are_the_pinned_ones(case, seed):
    assert numbers(case, seed) == pytest.approx(json.loads(GOLDEN.read_text())[case][str(seed)], rel=1e-9, abs=1e-11)


def test_nothing_is_pinned_that_is_not_checked():
    pinned = json.loads(GOLDEN.read_text())
    assert set(pinned) == set(CASES)
    assert all(set(by_seed) == {str(seed) for seed in SEEDS} for by_seed in pinned.values())


def regenerate() -> None:
    """Write the file anew, one line per case and seed, so that a diff shows what moved."""
    lines = []
    for case in sorted(CASES):
        rows = [f'    "{seed}": {json.dumps(numbers(case, seed))}' for seed in SEEDS]
        lines.append(f'  "{case}": {{\n' + ",\n".join(rows) + "\n  }")
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    regenerate()
