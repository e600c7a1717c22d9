"""Flow-GRPO on Gaussian steps whose means are leaves: what is clipped, what the KL is, and what a picture is worth."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmrl.algorithms.flow_grpo import FlowGRPO
from mmrl.algorithms.history import PromptHistory, prompt_key
from mmrl.errors import ConfigError
from mmrl.numerics.flow import gaussian_log_prob
from mmrl.protocols import LossContext
from mmrl.transcripts import Question, Transcript
from mmrl.types import Batch, EpisodeRecord, Evaluation, Rollout

N, K, D = 6, 3, 4
LOG_RATIOS = ["likelihood", "unscaled", "guard"]


def flow_grpo(**fields: Any) -> FlowGRPO:
    return FlowGRPO(FlowGRPO.Config(**{"group_size": 4, **fields}))


class Steps:
    """A policy whose steps' means are leaves."""

    def __init__(self, means_NKD: Tensor) -> None:
        self.means = means_NKD.clone().requires_grad_()
        self.stds = 0.2 + torch.rand(N, K, dtype=torch.float64)
        self.deltas = 0.05 + torch.rand(N, K, dtype=torch.float64) / 4

    def evaluate(self, trace: Any) -> Evaluation:
        row = trace["row"]
        means, stds = self.means[row], self.stds[row]
        log_probs_NK = gaussian_log_prob(trace["x"], means, stds[..., None]).mean(-1)
        return Evaluation(log_probs_NK, torch.zeros_like(log_probs_NK), None, means, stds, self.deltas[row])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def case(moved: float = 0.1) -> tuple[Steps, Batch]:
    """A policy and what was drawn from N(old means); the policy's means are ``moved`` from these, the reference's elsewhere."""
    old = draw(N, K, D)
    policy = Steps(old + moved * draw(N, K, D))
    x = old + policy.stds[..., None] * draw(N, K, D)
    mask_NK = torch.rand(N, K) < 0.8
    batch = Batch(
        trace={"row": torch.arange(N), "x": x},
        old_log_probs_NK=gaussian_log_prob(x, old, policy.stds[..., None]).mean(-1),
        mask_NK=mask_NK,
        advantages_NJ=draw(N, 1),
        returns_NV=draw(N, 1),
        old_values_NV=draw(N, 1),
        reference_log_probs_NK=draw(N, K),
        old_means_NKD=old,
        reference_means_NKD=old + 0.2 * draw(N, K, D),
    )
    return policy, batch


def context(batch: Batch) -> LossContext:
    return LossContext(int(batch.mask_NK.sum()), len(batch), len(batch), 0)


def twin(policy: Steps, batch: Batch, config: FlowGRPO.Config) -> Tensor:
    """The loss, unit by unit, of scalars and their graph."""
    total = torch.zeros((), dtype=torch.float64)
    for n, k in batch.mask_NK.nonzero().tolist():
        mean, old = policy.means[n, k], batch.old_means_NKD[n, k]  # type: ignore[index]
        std, delta, x = float(policy.stds[n, k]), float(policy.deltas[n, k]), batch.trace["x"][n, k]

        def log_p(mu: Tensor, std: float = std, x: Tensor | Any = x) -> Tensor:
            return (-((x - mu) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()

        log_ratio = log_p(mean) - log_p(old)
        if config.log_ratio == "unscaled":
            log_ratio = -((x - mean) ** 2).mean() + ((x - old) ** 2).mean()
        if config.log_ratio == "guard":
            log_ratio = std * (log_ratio + ((mean - old) ** 2).mean() / (2 * std**2))
        advantage, ratio = float(batch.advantages_NJ[n, 0]), log_ratio.exp()
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        surrogate = torch.maximum(-advantage * ratio, -advantage * bounded)
        total = total + (surrogate / delta if config.divide_by_delta else surrogate)
        if config.kl_weight > 0:
            squares = ((mean - batch.reference_means_NKD[n, k]) ** 2).mean()  # type: ignore[index]
            kl = {"exact": squares / (2 * std**2), "flow_grpo": squares * delta / (2 * std**2), "means": squares}
            gap = log_p(mean) - float(batch.reference_log_probs_NK[n, k])  # type: ignore[index]
            kl["estimate"] = (-gap).exp() - 1 + gap
            total = total + config.kl_weight * kl[config.kl_form]
    return total / int(batch.mask_NK.sum())


@pytest.mark.parametrize(
    "kl", [{}, *({"kl_weight": 0.3, "kl_form": form} for form in ("flow_grpo", "exact", "means", "estimate"))]
)
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
@pytest.mark.parametrize("divide", [False, True])
def test_loss_and_gradient_equal_a_twin(kl: dict[str, Any], log_ratio: Any, divide: bool) -> None:
    policy, batch = case()
    algorithm = flow_grpo(clip_low=0.02, clip_high=0.05, log_ratio=log_ratio, divide_by_delta=divide, **kl)
    loss = algorithm.loss(policy, batch, context(batch))  # type: ignore[arg-type]
    expected = twin(policy, batch, algorithm.flow)
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    gradients = [torch.autograd.grad(value, policy.means)[0] for value in (loss.value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert 0 < float(loss.metrics["clip_fraction"]) < 1


@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
def test_at_unchanged_weights_ratios_are_1_and_the_gradient_is_reinforces(log_ratio: Any) -> None:
    """Of log p times what the log-ratio is scaled by: 1, 2 std^2, std."""
    policy, batch = case(moved=0.0)
    loss = flow_grpo(log_ratio=log_ratio).loss(policy, batch, context(batch))  # type: ignore[arg-type]
    assert float(loss.metrics["ratio_min"]) == float(loss.metrics["ratio_max"]) == 1 and not loss.metrics["clip_fraction"]
    scale = {"likelihood": torch.ones_like(policy.stds), "unscaled": 2 * policy.stds**2, "guard": policy.stds}[log_ratio]
    log_probs_NK = policy.evaluate(batch.trace).log_probs_NK
    reinforce = -(batch.advantages_NJ * scale * log_probs_NK)[batch.mask_NK].sum() / int(batch.mask_NK.sum())
    gradients = [torch.autograd.grad(value, policy.means, retain_graph=True)[0] for value in (loss.value, reinforce)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_micro_batches_add_up() -> None:
    policy, batch = case()
    algorithm = flow_grpo(kl_weight=0.1, log_ratio="guard", divide_by_delta=True)
    whole = algorithm.loss(policy, batch, context(batch)).value  # type: ignore[arg-type]
    pieces = [batch.map(lambda x, piece=piece: x[piece]) for piece in (slice(0, 1), slice(1, 4), slice(4, N))]
    parts = [algorithm.loss(policy, piece, context(batch)).value for piece in pieces]  # type: ignore[arg-type]
    assert float(whole.detach()) == pytest.approx(sum(float(part.detach()) for part in parts))


@pytest.mark.parametrize(
    "fields",
    [
        {"kl_weight": 0.5},
        {"kl_weight": 0.3, "kl_form": "exact"},
        {"kl_weight": 0.3, "kl_form": "means"},
        {"kl_weight": 0.3, "kl_form": "estimate"},
        {"log_ratio": "unscaled"},
        {"log_ratio": "guard"},
        {"divide_by_delta": True},
        {"clip_low": 0.5},
        {"clip_high": 0.5},
    ],
)
def test_every_switch_of_the_loss_changes_the_gradient(fields: dict[str, Any]) -> None:
    policy, batch = case()
    base = {"kl_weight": 0.3, "clip_low": 1e-3, "clip_high": 1e-3}

    def gradient(**more: Any) -> Tensor:
        loss = flow_grpo(**{**base, **more}).loss(policy, batch, context(batch))  # type: ignore[arg-type]
        return torch.autograd.grad(loss.value, policy.means)[0]

    assert not torch.allclose(gradient(), gradient(**fields))


# ---------------------------------------------------------------- what pictures are worth


def question(text: str) -> Question:
    return Question("draw", (text,), (), lambda answer: 0.0)


def rollout(returns: list[float], prompts: list[str] | None = None) -> Rollout:
    b = len(returns)
    rewards_TB = torch.tensor([returns], dtype=torch.float64)
    yes_TB, zero_TB = torch.ones(1, b, dtype=torch.bool), torch.zeros(1, b)
    transcripts = tuple(Transcript(i, question(text), (), (), "", "answer") for i, text in enumerate(prompts or []))
    spans = torch.stack([torch.arange(b), torch.zeros(b).long(), torch.zeros(b).long()], 1)
    record = EpisodeRecord(torch.arange(b), rewards_TB[0], zero_TB[0], torch.ones(b).long(), {}, spans, transcripts)
    units = torch.zeros(1, b, 2)
    return Rollout(
        {}, units, units == 0, rewards_TB, units[..., :1], zero_TB, yes_TB, yes_TB, ~yes_TB, zero_TB.long(), record, env_steps=b
    )


RETURNS = [0.1, 0.9, 0.4, 0.9, -3.0, 0.2, 0.2, 0.2]


def test_the_deviation_is_that_of_all_returns_and_advantages_are_bounded() -> None:
    spread = statistics.stdev(RETURNS) + 1e-4
    expected = [(r - statistics.fmean(RETURNS[i // 4 * 4 : i // 4 * 4 + 4])) / spread for i, r in enumerate(RETURNS)]
    free = flow_grpo(clamp=None).advantages(rollout(RETURNS))
    assert free.advantages_TB[0].tolist() == pytest.approx(expected) and free.metrics["clamped"] == 0
    bounded = flow_grpo(clamp=0.5).advantages(rollout(RETURNS))
    assert bounded.advantages_TB[0].tolist() == pytest.approx([max(-0.5, min(0.5, a)) for a in expected])
    assert bounded.metrics["clamped"] == sum(abs(a) > 0.5 for a in expected) / 8 > 0
    whitened = flow_grpo(scale="whiten", clamp=0.5).advantages(rollout(RETURNS)).units_TBK
    assert whitened is not None and float(whitened.abs().max()) == 0.5
    by_group = flow_grpo(scale="group_std", eps=1e-8, clamp=None).advantages(rollout(RETURNS)).advantages_TB[0]
    group = RETURNS[4:]
    assert float(by_group[4]) == pytest.approx((group[0] - statistics.fmean(group)) / statistics.stdev(group))


def test_who_is_worth_nothing_is_left_out() -> None:
    result = flow_grpo().advantages(rollout([0.0, 1.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.0]))
    assert result.keep_TB[0].tolist() == [True, True, False, False, True, True, True, True]


def test_the_best_and_the_worst_of_a_group() -> None:
    best = flow_grpo(compare="best").advantages(rollout(RETURNS))
    assert best.advantages_TB[0].tolist() == [0, 1, 0, 1, 0, 1, 1, 1]
    assert torch.equal(best.keep_TB, best.advantages_TB != 0)
    both = flow_grpo(compare="best_worst").advantages(rollout([*RETURNS, 0.5, 0.5, 0.5, 0.5]))
    assert both.advantages_TB[0].tolist() == [-1, 1, 0, 0, -1, 1, 0, 0, 0, 0, 0, 0]
    assert both.metrics["groups_without_spread"] == pytest.approx(1 / 3)


def test_raw_returns() -> None:
    raw = flow_grpo(baseline="none", scale="none", clamp=None).advantages(rollout(RETURNS))
    assert raw.advantages_TB[0].tolist() == RETURNS


PROMPTED = {"compare": "prompt", "baseline": "none", "scale": "none", "clamp": None, "group_size": 1}


def test_a_prompt_is_judged_by_its_own_history_once_that_is_long_enough() -> None:
    algorithm = flow_grpo(**PROMPTED, history=3, min_history=3, eps=1e-6)
    kept: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        returns = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        prompts = ["a cat", "a dog", "a cat", "two cats", "a cat"]
        for prompt, value in zip(prompts, returns, strict=True):
            kept[prompt] = [*kept.get(prompt, []), value][-3:]
        got = algorithm.advantages(rollout(returns, prompts)).advantages_TB[0].tolist()
        for prompt, value, worth in zip(prompts, returns, got, strict=True):
            scale = kept[prompt] if len(kept[prompt]) >= 3 else returns
            assert worth == pytest.approx((value - statistics.fmean(scale)) / (statistics.stdev(scale) + 1e-6))
    again = flow_grpo(**PROMPTED, history=3, min_history=3, eps=1e-6)
    again.load_state_dict(algorithm.state_dict())
    last = rollout([0.1, 0.2, 0.3], ["a dog", "new", "two cats"])
    assert torch.equal(algorithm.advantages(last).advantages_TB, again.advantages(last).advantages_TB)
    assert {name: x.tolist() for name, x in again.state_dict().items()} == {
        name: x.tolist() for name, x in algorithm.state_dict().items()
    }


def test_slots_whose_episode_was_lost_have_no_history() -> None:
    algorithm = flow_grpo(**PROMPTED, history=2, min_history=2)
    lost = rollout([0.5, 0.7, 0.1], ["a", "b", "c"])
    valid_TB = torch.tensor([[True, False, True]])
    lost = replace(lost, valid_TB=valid_TB, episodes=lost.episodes.select(torch.tensor([0, 2])))
    result = algorithm.advantages(lost)
    assert result.keep_TB.tolist() == [[True, False, True]] and len(algorithm.state_dict()["keys"]) == 2
    scale = statistics.stdev([0.5, 0.1]) + 1e-4
    assert result.advantages_TB[0, [0, 2]].tolist() == pytest.approx([0.2 / scale, -0.2 / scale])


def test_keys_are_those_of_the_whole_question() -> None:
    def key(*parts: str) -> int:
        return prompt_key(Transcript(0, Question("draw", parts, (), lambda answer: 0.0), (), (), None, "answer"))

    assert len({key("a", "b"), key("ab"), key("a"), key("b", "a")}) == 4 and key("a", "b") == key("a", "b")


def test_a_history_without_prompts_can_be_saved() -> None:
    empty = PromptHistory(4, 2)
    empty.load_state_dict(PromptHistory(4, 2).state_dict())
    assert empty.state_dict()["returns"].shape == (0, 4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"compare": "prompt"}, "set baseline: none, scale: none"),
        ({"compare": "best", "scale": "none"}, "reads neither scale nor baseline"),
        ({"compare": "best_worst", "credit": "turn"}, "set credit: episode"),
        ({"history": 8}, "leave it out"),
        ({**PROMPTED, "history": 8}, "raise history"),
        ({"kl_weight": 0.1, "kl_in": "reward"}, "set kl_form: estimate"),
        ({"kl_weight": 0.1, "kl_corrected": True}, "set kl_form: estimate"),
        ({"group_size": 1}, "baseline: none"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        flow_grpo(**fields)


@pytest.mark.parametrize("fields", [{"log_ratio": "guard"}, {"kl_weight": 0.1}, {"divide_by_delta": True}])
def test_a_policy_without_gaussian_steps_is_refused_in_a_sentence(fields: dict[str, Any]) -> None:
    policy, batch = case()
    policy.evaluate = lambda trace: Evaluation(batch.old_log_probs_NK, batch.old_log_probs_NK, None)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="but the policy gives none"):
        flow_grpo(**fields).loss(policy, batch, context(batch))  # type: ignore[arg-type]


def test_histories_need_conversations() -> None:
    with pytest.raises(ConfigError, match="holds no conversations"):
        flow_grpo(**PROMPTED).advantages(rollout(RETURNS))


def test_means_are_asked_for_only_where_they_are_read() -> None:
    for fields, read in (
        ({}, (False, False)),
        ({"kl_weight": 0.1, "kl_form": "estimate"}, (False, False)),
        ({"kl_weight": 0.1}, (False, True)),
        ({"log_ratio": "guard"}, (True, False)),
    ):
        algorithm = flow_grpo(**fields)
        assert (algorithm.uses_means, algorithm.uses_reference_means) == read
        assert algorithm.asks(algorithm.flow) == (frozenset({"means"}) if any(read) else frozenset())
    assert flow_grpo(kl_weight=0.1).uses_reference and not flow_grpo(log_ratio="guard").uses_reference
