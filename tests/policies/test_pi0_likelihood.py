"""pi0's likelihood: the same bits when scored again, the right density by an independent loop, entropy, chosen steps."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from mmrl.errors import MMRLError
from mmrl.types import Decision, Evaluation
from policies.pi0 import Pi0
from policies.pi0_parts.heads import NoiseHead
from policies.pi0_parts.options import CriticConfig
from policies.pi0_parts.sampling import Sampler
from policies.shared.heads import TIME_FEATURES, CriticHead, time_features
from tests.policies import tiny

SAMPLERS = ("flow_sde", "flow_noise", "cps")


def act_and_score(policy: Pi0, seed: int = 1) -> tuple[Decision, Evaluation]:
    """A decision, and the same one scored as an update does it: with gradients."""
    decision = policy.act(tiny.observation(5), tiny.draws(seed), explore=True)
    with policy.compute_mode(train=True):
        scored = policy.evaluate(decision.trace)
    assert scored.log_probs_NK.requires_grad
    return decision, scored


@functools.cache
def built(architecture: str, **fields: Any) -> Pi0:
    """For tests that only look."""
    return tiny.build(architecture, **fields)


@pytest.mark.parametrize("granularity", ["chunk", "action", "step"])
@pytest.mark.parametrize("cache_prefix", [True, False])
@pytest.mark.parametrize("denoising_steps", [3, 4])  # thirds are not exact in binary, quarters are
@pytest.mark.parametrize("stochastic_steps", ["one", "all"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scoring_again_gives_the_same_bits(
    architecture: str, sampler: str, stochastic_steps: str, denoising_steps: int, cache_prefix: bool, granularity: str
) -> None:
    policy = built(
        architecture,
        sampler=sampler,
        stochastic_steps=stochastic_steps,
        denoising_steps=denoising_steps,
        cache_prefix=cache_prefix,
        granularity=granularity,
    )
    decision, scored = act_and_score(policy)
    assert torch.equal(scored.log_probs_NK, decision.log_probs_BK)
    assert scored.values_NV is not None and decision.values_BV is not None
    assert torch.equal(scored.values_NV, decision.values_BV)
    assert decision.log_probs_BK.isfinite().all() and (decision.log_probs_BK != 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("train", ["all", "lora"])
def test_scoring_again_gives_the_same_bits_when_the_prefix_learns(architecture: str, train: str, attention: str) -> None:
    decision, scored = act_and_score(tiny.build(architecture, train=train, attention=attention, stochastic_steps="all"))
    assert torch.equal(scored.log_probs_NK, decision.log_probs_BK)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("step_reduction", ["mean", "mean_with_prior"])
def test_scoring_again_gives_the_same_bits_whatever_the_reduction(architecture: str, sampler: str, step_reduction: str) -> None:
    decision, scored = act_and_score(tiny.build(architecture, sampler=sampler, step_reduction=step_reduction))
    assert torch.equal(scored.log_probs_NK, decision.log_probs_BK)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bfloat16_weights_leave_chain_and_densities_in_float32(architecture: str, sampler: str) -> None:
    policy = tiny.build(architecture, sampler=sampler, dtype="bfloat16", stochastic_steps="all")
    assert policy.model.dtype == torch.bfloat16
    decision, scored = act_and_score(policy)
    for name in ("x_before", "x_after", "prior", "state"):
        assert decision.trace[name].dtype == torch.float32, name
    assert decision.log_probs_BK.dtype == scored.log_probs_NK.dtype == decision.action.dtype == torch.float32
    assert torch.equal(scored.log_probs_NK, decision.log_probs_BK)
    assert scored.values_NV is not None and decision.values_BV is not None
    assert torch.equal(scored.values_NV, decision.values_BV) and scored.values_NV.dtype == torch.float32


# -- an independent loop in float64 ------------------------------------------------------------------------------------


def upstream_pass(policy: Pi0, x: Tensor, t: float, row: int) -> tuple[Tensor, Tensor]:
    """Velocity [H, 6] and action tokens' hidden states [H, W] of one sample, by transformers, prefix and all."""
    inputs = {name: tensor[row : row + 1] for name, tensor in tiny.upstream_inputs(policy, tiny.observation(5)).items()}
    time = torch.tensor([t], dtype=torch.float64)
    suffix = policy.model.embed_action_time(inputs.pop("state"), x[None], time)
    hidden = policy.model.model(action_embeds=suffix, **inputs).last_hidden_state[:, -tiny.HORIZON :]
    return policy.model.action_out_proj(hidden)[0], hidden[0]


def gaussian(policy: Pi0, x: Tensor, velocity: Tensor, hidden: Tensor, k: int) -> Normal:
    """The transition of step k by the formulas as the papers print them."""
    steps, a = policy.config.denoising_steps, policy.config.noise_level or 0.0
    t, t_next = 1 - k / steps, 1 - (k + 1) / steps
    delta = t - t_next
    if policy.config.sampler == "flow_sde":
        sigma = a * math.sqrt(t / (1 - (t_next if k == 0 else t)))
        drift = x * (1 - sigma**2 * delta / (2 * t)) - delta * velocity * (1 + sigma**2 * (1 - t) / (2 * t))
        return Normal(drift, torch.full_like(x, sigma * math.sqrt(delta)))
    if policy.config.sampler == "cps":
        clean, noise = x - t * velocity, x + (1 - t) * velocity
        angle = a * math.pi / 2
        return Normal((1 - t_next) * clean + t_next * math.cos(angle) * noise, torch.full_like(x, t_next * math.sin(angle)))
    low, high = (math.log(std**2) for std in policy.config.noise_std_range)
    z = hidden
    for layer in policy.noise_head.net:
        z = z @ layer.weight.T + layer.bias if isinstance(layer, torch.nn.Linear) else torch.tanh(z)
    variance = torch.exp(low + (high - low) * (torch.tanh(z) + 1) / 2)
    return Normal(x - delta * velocity, variance.sqrt())


def naive_densities(policy: Pi0, decision: Decision) -> Tensor:
    """Replays every chain from its first noise, checking states and action on the way; log densities [B, J, C, A]."""
    trace, steps = decision.trace, policy.config.denoising_steps
    out = torch.zeros(*trace["step"].shape, tiny.EXECUTE, tiny.ACTION, dtype=torch.float64)
    assert policy.statistics is not None
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (policy.statistics.actions_mean, policy.statistics.actions_std))
    for b in range(trace["step"].shape[0]):
        x, column = trace["prior"][b], {int(k): j for j, k in enumerate(trace["step"][b])}
        for k in range(steps):
            velocity, hidden = upstream_pass(policy, x, 1 - k / steps, b)
            if k not in column:
                x = x - velocity / steps
                continue
            j = column[k]
            torch.testing.assert_close(trace["x_before"][b, j], x, rtol=1e-4, atol=1e-4)
            x = trace["x_after"][b, j]
            density = gaussian(policy, trace["x_before"][b, j], velocity, hidden, k).log_prob(x)
            out[b, j] = density[: tiny.EXECUTE, : tiny.ACTION]
        action = x[: tiny.EXECUTE, : tiny.ACTION] * std + mean
        torch.testing.assert_close(decision.action[b], action, rtol=1e-4, atol=1e-4)
    return out


def naive_units(policy: Pi0, densities: Tensor, prior: Tensor) -> Tensor:
    granularity, reduction = policy.config.granularity, policy.config.step_reduction
    batch, count = densities.shape[:2]
    prior_density = Normal(0.0, 1.0).log_prob(prior)[:, : tiny.EXECUTE, : tiny.ACTION]
    rows = []
    for b in range(batch):
        if granularity == "step":
            rows.append([float(densities[b, j].sum()) for j in range(count)])
            continue
        groups = [slice(None)] if granularity == "chunk" else [slice(c, c + 1) for c in range(tiny.EXECUTE)]
        steps = [[float(densities[b, j, group].sum()) for j in range(count)] for group in groups]
        first = [float(prior_density[b, group].sum()) for group in groups]
        how = {
            "sum": lambda terms, p: sum(terms),
            "mean": lambda terms, p: sum(terms) / len(terms),
            "mean_with_prior": lambda terms, p: (sum(terms) + p) / (len(terms) + 1),
        }[reduction]
        rows.append([how(terms, p) for terms, p in zip(steps, first, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(("granularity", "step_reduction"), [("chunk", "sum"), ("action", "mean"), ("chunk", "mean_with_prior")])
@pytest.mark.parametrize("stochastic_steps", ["one", "all"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_log_probs_are_those_of_a_loop_over_samples_and_steps(
    architecture: str, sampler: str, stochastic_steps: str, granularity: str, step_reduction: str
) -> None:
    policy = tiny.build(
        architecture,
        sampler=sampler,
        dtype="float64",
        stochastic_steps=stochastic_steps,
        granularity=granularity,
        step_reduction=step_reduction,
    )
    decision = policy.act(tiny.observation(5), tiny.draws(3), explore=True)
    densities = naive_densities(policy, decision)
    expected = naive_units(policy, densities, decision.trace["prior"])
    torch.testing.assert_close(decision.log_probs_BK, expected, rtol=1e-4, atol=1e-4)


def test_steps_as_units_are_summed_over_the_chunk_alone(architecture: str) -> None:
    policy = tiny.build(architecture, dtype="float64", stochastic_steps="all", granularity="step", train_last_step=False)
    decision = policy.act(tiny.observation(5), tiny.draws(3), explore=True)
    with torch.no_grad():
        expected = naive_units(policy, naive_densities(policy, decision), decision.trace["prior"])
    assert decision.log_probs_BK.shape == (5, 3)
    torch.testing.assert_close(decision.log_probs_BK, expected, rtol=1e-4, atol=1e-4)


# -- which steps -------------------------------------------------------------------------------------------------------


def chosen(architecture: str, **fields: Any) -> Tensor:
    policy = built(architecture, denoising_steps=5, **fields)
    return policy._sampler.choose(tiny.draws(0, 5000))


@pytest.mark.parametrize(
    ("fields", "candidates"),
    [({}, 5), ({"train_last_step": False}, 4), ({"sampler": "cps"}, 4)],  # the last step of cps has no noise
    ids=["all steps", "never the last", "cps"],
)
def test_the_stochastic_step_is_uniform_and_each_sample_s_own(architecture: str, fields: dict[str, Any], candidates: int) -> None:
    step_BJ = chosen(architecture, **fields)
    assert step_BJ.shape == (5000, 1)
    counts = torch.bincount(step_BJ[:, 0], minlength=5).double()
    assert counts[candidates:].sum() == 0
    expected = 5000 / candidates
    chi_squared = float(((counts[:candidates] - expected) ** 2 / expected).sum())
    assert chi_squared < 13.3  # 1 % for four degrees of freedom
    assert abs(torch.corrcoef(torch.stack([step_BJ[:-1, 0], step_BJ[1:, 0]]).double())[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stochastic_steps": "all"}, [0, 1, 2, 3, 4]),
        ({"stochastic_steps": "all", "train_last_step": False}, [0, 1, 2, 3]),
        ({"stochastic_steps": "all", "sampler": "cps"}, [0, 1, 2, 3]),
        ({"sampler": "flow_noise"}, [0, 1, 2, 3, 4]),
    ],
)
def test_all_steps_are_all_that_have_noise(architecture: str, fields: dict[str, Any], expected: list[int]) -> None:
    assert chosen(architecture, **fields)[17].tolist() == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exploration_moves_the_action_and_its_absence_does_not(architecture: str, sampler: str) -> None:
    policy = built(architecture, sampler=sampler, stochastic_steps="all")
    decision = policy.act(tiny.observation(5), tiny.draws(3), explore=True)
    still = policy.act(tiny.observation(5), tiny.draws(3), explore=False)
    assert (decision.action - still.action).abs().mean() > 1e-3
    assert still.trace == {} and still.values_BV is None


# -- flow noise --------------------------------------------------------------------------------------------------------


def test_entropy_of_flow_noise_is_torch_s_and_teaches_the_noise_head(architecture: str) -> None:
    policy = tiny.build(architecture, sampler="flow_noise", denoising_steps=3)
    decision, scored = act_and_score(policy)
    inputs, seen = decision.trace, tiny.observation(5)
    expected = torch.zeros(5)
    with torch.no_grad():
        prefix = policy._encode(policy._inputs(seen))
        for k in range(3):
            hidden = policy._expert(prefix, inputs["state"], inputs["x_before"][:, k], torch.full((5,), 1 - k / 3))[1]
            std = policy.noise_head(hidden[:, -tiny.HORIZON :])[:, : tiny.EXECUTE, : tiny.ACTION]
            expected += Normal(0.0, std).entropy().mean((1, 2)) / 3
    torch.testing.assert_close(scored.entropy_NK[:, 0], expected)
    scored.entropy_NK.sum().backward()
    for name, parameter in policy.noise_head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
def test_entropy_of_a_fixed_noise_is_a_constant(architecture: str, sampler: str) -> None:
    _, scored = act_and_score(tiny.build(architecture, sampler=sampler, train_last_step=False, denoising_steps=2))
    assert not scored.entropy_NK.requires_grad
    std = 0.5 if sampler == "flow_sde" else 0.5 * math.sin(math.pi / 4)  # the only candidate is step 0, from 1 to 1/2
    torch.testing.assert_close(scored.entropy_NK, torch.full((5, 1), 0.5 * math.log(2 * math.pi * math.e * std**2)))


def test_learned_noise_stays_within_its_range_and_reaches_both_ends() -> None:
    torch.manual_seed(0)
    head = NoiseHead(tiny.WIDTH, tiny.PADDED_ACTION, (0.05, 0.4))
    tiny.stir(head, size=20.0)
    std = head(torch.randn(500, tiny.HORIZON, tiny.WIDTH) * 10).detach()
    assert std.shape == (500, tiny.HORIZON, tiny.PADDED_ACTION)
    assert float(std.min()) == pytest.approx(0.05, rel=1e-3) and float(std.max()) == pytest.approx(0.4, rel=1e-3)
    assert (std >= 0.05 * (1 - 1e-5)).all() and (std <= 0.4 * (1 + 1e-5)).all()


@pytest.mark.parametrize("head", [CriticHead(tiny.WIDTH, (16,)), NoiseHead(tiny.WIDTH, 2, (0.1, 0.3))], ids=["critic", "noise"])
def test_heads_compute_in_float32_within_autocast(head: torch.nn.Module) -> None:
    tiny.stir(head)
    features = torch.randn(7, tiny.WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(features)
    assert inside.dtype == torch.float32 and torch.equal(inside, head(features))


# -- the critic --------------------------------------------------------------------------------------------------------


CriticInputs = tuple[Literal["prefix", "state_token", "suffix"], ...]


def values_of(policy: Pi0, seed: int) -> Tensor:
    values = policy.act(tiny.observation(5), tiny.draws(seed), explore=True).values_BV
    assert values is not None
    return values[:, 0]


@pytest.mark.parametrize("stochastic_steps", ["one", "all"])
@pytest.mark.parametrize("inputs", [("state_token",), ("prefix",), ("prefix", "state_token")], ids="+".join)
def test_values_do_not_depend_on_the_noise(architecture: str, inputs: CriticInputs, stochastic_steps: str) -> None:
    policy = built(architecture, critic=CriticConfig(inputs=inputs, hidden=(16,)), stochastic_steps=stochastic_steps)
    first, second = values_of(policy, 1), values_of(policy, 2)
    bootstrap = policy.value(tiny.observation(5), tiny.draws(3))
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bootstrap, first, rtol=1e-5, atol=1e-6)
    assert first.std() > 1e-3, "the same value for every observation would pass"


def test_values_of_the_action_tokens_are_those_of_the_trained_steps(architecture: str) -> None:
    policy = built(architecture, critic=CriticConfig(inputs=("suffix",)))
    assert (values_of(policy, 1) - values_of(policy, 2)).abs().max() > 1e-4
    assert torch.equal(policy.value(tiny.observation(5), tiny.draws(1)), values_of(policy, 1))


def test_a_critic_that_knows_the_time_says_other_values_later_and_nothing_else_changes(architecture: str) -> None:
    policy = built(architecture, critic=CriticConfig(inputs=("state_token", "time"), hidden=(16,)))
    early, late = (replace(tiny.observation(5), elapsed_B=torch.full((5,), n)) for n in (0, 3))
    ours, theirs = (policy.act(seen, tiny.draws(1), explore=True) for seen in (early, late))
    assert torch.equal(ours.action, theirs.action) and torch.equal(ours.log_probs_BK, theirs.log_probs_BK)
    assert ours.values_BV is not None and theirs.values_BV is not None
    assert (ours.values_BV - theirs.values_BV).abs().min() > 1e-3
    torch.testing.assert_close(policy.value(late, tiny.draws(3)), theirs.values_BV[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(MMRLError, match="inputs has 'time'"):
        policy.act(tiny.observation(5), tiny.draws(1), explore=True)
    policy.act(tiny.observation(5), tiny.draws(1), explore=False)  # asks no critic


def test_times_are_told_apart() -> None:
    """From one decision to the next, and over episodes of hundreds."""
    features = time_features(torch.arange(400))
    assert features.shape == (400, TIME_FEATURES)
    assert torch.pdist(features).min() > 0.05


def test_a_fresh_critic_says_zero(architecture: str) -> None:
    policy = Pi0(tiny.config(architecture), device=tiny.CPU)
    assert torch.equal(values_of(policy, 0), torch.zeros(5))


def test_sampler_counts_a_chain_without_trained_steps_as_nothing() -> None:
    """Acting without exploration reduces no step at all: one unit of log-probability 0, also where a mean is asked for."""
    sampler = Sampler("flow_sde", 4, 0.5, False, True, "chunk", "mean", tiny.EXECUTE, tiny.ACTION)
    nothing = torch.zeros(2, 0, tiny.EXECUTE, tiny.ACTION)
    assert torch.equal(sampler.units(nothing, torch.ones(2, tiny.HORIZON, tiny.PADDED_ACTION)), torch.zeros(2, 1))
