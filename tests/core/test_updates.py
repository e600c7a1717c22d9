"""Updates: that micro-batches change nothing but memory, what is merged how, and what stops or skips an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmrl.algorithms.grpo import GRPO
from mmrl.algorithms.ppo import PPO
from mmrl.algorithms.sft import SFT
from mmrl.errors import TrainingError
from mmrl.optim import Optimization, OptimizerConfig, StepReport
from mmrl.protocols import Advantages, LossContext
from mmrl.types import Batch, EpisodeRecord, Evaluation, Examples, Loss, Observation, Packing, Rollout
from mmrl.updates import RolloutUpdate, SupervisedTerm, SupervisedUpdate

N, K, S, H = 11, 3, 4, 5


class Linear(nn.Module):
    """Scores, values and imitation from one matrix each, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self.actor, self.critic, self.imitator = (nn.Linear(S, out, dtype=torch.float64) for out in (K, 1, H))

    def trainable(self) -> dict[str, list[nn.Parameter]]:
        return {"actor": [*self.actor.parameters(), *self.imitator.parameters()], "critic": list(self.critic.parameters())}

    def compute_mode(self, *, train: bool) -> Any:
        return torch.set_grad_enabled(train) if not train else nullcontext()

    def pack(self, rollout: Rollout) -> Packing:
        return rollout.by_decision()

    def evaluate(self, trace: Mapping[str, Tensor]) -> Evaluation:
        x = trace["x"]
        log_probs_NK = self.actor(x)
        return Evaluation(log_probs_NK, log_probs_NK.tanh(), self.critic(x))

    def supervised_weight(self, examples: Examples) -> Tensor:
        return examples.mask_BH.sum(1)

    def supervised_loss(self, examples: Examples, generator: torch.Generator) -> Loss:
        """The mean over the real actions, as the contract says; no noise, so that pieces can be compared."""
        error_BH = (self.imitator(examples.observation.state) - examples.actions_BHA[..., 0]).pow(2)
        value = error_BH[examples.mask_BH].sum() / examples.mask_BH.sum().clamp(min=1)
        return Loss(value, {"imitation": value.detach()})


class Recorder:
    """An optimizer that takes no steps and keeps the gradients."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.gradients: list[list[Tensor]] = []

    def zero_grad(self) -> None:
        self.policy.zero_grad()

    def step(self, loss_is_finite: bool = True, *, loss: float | None = None) -> StepReport:
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.policy.parameters()])
        self.zero_grad()
        return StepReport(False, 0.0, {"actor": 0.1})


class Source:
    """Examples of which the demonstration had ended at various moments (and one that is nothing but padding)."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def batch(self, size: int) -> Examples:
        self.drawn.append(size)
        generator = torch.Generator().manual_seed(8)
        state = torch.randn(size, S, generator=generator, dtype=torch.float64)
        mask_BH = torch.arange(H) < (torch.arange(size) % (H + 1))[:, None]
        actions = torch.randn(size, H, 1, generator=generator, dtype=torch.float64)
        return Examples(Observation({}, state, ("",) * size), actions, mask_BH)

    def state_dict(self) -> Mapping[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


@pytest.fixture
def policy() -> Linear:
    return Linear()


@pytest.fixture
def batch(policy: Linear) -> Batch:
    x = torch.randn(N, S, dtype=torch.float64)
    scored = policy.evaluate({"x": x})
    assert scored.values_NV is not None
    noise_NK = 0.3 * torch.randn(N, K, dtype=torch.float64)
    mask_NK = torch.rand(N, K) < 0.6
    mask_NK[3] = False
    return Batch(
        trace={"x": x},
        old_log_probs_NK=scored.log_probs_NK.detach() + noise_NK,
        mask_NK=mask_NK,
        advantages_NJ=torch.randn(N, 1, dtype=torch.float64),
        returns_NV=torch.randn(N, 1, dtype=torch.float64),
        old_values_NV=scored.values_NV.detach() + 0.3 * torch.randn(N, 1, dtype=torch.float64),
        reference_log_probs_NK=scored.log_probs_NK.detach() - noise_NK,
    )


def update_of(policy: Linear, algorithm: Any, optimization: Any, **options: Any) -> RolloutUpdate:
    generator = torch.Generator().manual_seed(1)
    liked: Any = policy
    return RolloutUpdate(liked, algorithm, optimization, generator, torch.Generator(), 10, **options)


PPO_WITH_EVERYTHING = PPO(PPO.Config(entropy_weight=0.1, kl_weight=0.2, value_clip=0.1, epochs=1, minibatches=1))
PER_MINIBATCH = PPO(PPO.Config(normalize_advantages="minibatch", epochs=1, minibatches=1))
PER_SAMPLE = PPO(PPO.Config(entropy_weight=0.1, kl_weight=0.2, reduce="sample_mean", dual_clip=1.5))


@pytest.mark.parametrize(
    "algorithm", [PPO_WITH_EVERYTHING, PER_SAMPLE, PER_MINIBATCH], ids=["unit_mean", "sample_mean", "standardised"]
)
@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 4, 10, 50])
def test_micro_batches_give_the_whole_batch_s_gradient_and_metrics(
    algorithm: PPO, supervised: bool, micro: int, policy: Linear, batch: Batch
) -> None:
    results = []
    for size in (None, micro):
        recorder = Recorder(policy)
        term = SupervisedTerm(Source(), 7, 0.4, 0.4) if supervised else None
        metrics = update_of(policy, algorithm, recorder, micro_batch=size, supervised=term).run(batch, 0)
        results.append((recorder.gradients[0], metrics))
    (whole, whole_metrics), (pieces, pieces_metrics) = results
    assert all(gradient.abs().sum() > 0 for gradient in (whole if supervised else whole[:4]))
    for expected, actual in zip(whole, pieces, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert pieces_metrics == pytest.approx(whole_metrics, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("micro", [1, 3, 5, 6])
def test_micro_batches_of_examples_weigh_by_their_real_actions(micro: int, policy: Linear) -> None:
    algorithm, results = SFT(SFT.Config(batch_size=13)), []
    for size in (None, micro):
        recorder: Any = Recorder(policy)
        source = Source()
        metrics = SupervisedUpdate(policy, algorithm, recorder, source, torch.Generator(), size).run()
        results.append((recorder.gradients[0], metrics))
        assert source.drawn == [13]  # drawn at once: which examples an update sees does not depend on its pieces
    (whole, whole_metrics), (pieces, pieces_metrics) = results
    for expected, actual in zip(whole, pieces, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert pieces_metrics == pytest.approx(whole_metrics, rel=1e-9)
    assert whole_metrics["loss"] == pytest.approx(whole_metrics["imitation"])


def test_the_supervised_term_is_its_weight_times_the_imitation_loss(policy: Linear, batch: Batch) -> None:
    source, recorder = Source(), Recorder(policy)
    term = SupervisedTerm(source, 9, weight_from=0.5, weight_to=0.1)
    update = update_of(policy, PPO_WITH_EVERYTHING, recorder, supervised=term, micro_batch=2)
    metrics = update.run(batch, 4)
    weight = 0.5 + (0.1 - 0.5) * 4 / 9
    assert source.drawn == [9]
    plain = update_of(policy, PPO_WITH_EVERYTHING, Recorder(policy), micro_batch=2).run(batch, 4)
    loss = policy.supervised_loss(Source().batch(9), torch.Generator())
    assert metrics["supervised_loss"] == pytest.approx(float(loss.value.detach()))
    assert metrics["loss"] == pytest.approx(plain["loss"] + weight * float(loss.value.detach()))
    loss.value.backward()
    for index, parameter in enumerate(policy.imitator.parameters()):
        assert parameter.grad is not None
        torch.testing.assert_close(recorder.gradients[0][4 + index], weight * parameter.grad, rtol=1e-10, atol=1e-12)
    assert [term.weight(i, 10) for i in (0, 9)] == [0.5, pytest.approx(0.1)]
    assert term.weight(0, 1) == 0.5


class Reporting:
    """An algorithm that reports what it is told to, one entry an update, with a loss that moves the actor."""

    epochs, minibatches, group_size, whole_episodes, uses_reference = 2, 3, 1, False, False

    def __init__(self, reports: list[dict[str, float]], max_kl: float | None = None, bad: tuple[int, ...] = ()) -> None:
        self.reports, self.max_kl, self.bad, self.calls = reports, max_kl, bad, 0
        self.contexts: list[LossContext] = []

    def advantages(self, rollout: Rollout) -> Advantages:
        raise AssertionError("not asked for")

    def loss(self, policy: Any, batch: Batch, context: LossContext) -> Loss:
        self.calls += 1
        self.contexts.append(context)
        value = policy.evaluate(batch.trace).log_probs_NK.sum()
        basics = {"approx_kl": 0.0, "log_prob_gap": 0.0, "log_prob_gap_max": 0.0}
        report = self.reports[self.calls - 1] if self.calls <= len(self.reports) else {}
        return Loss(value * float("nan") if self.calls in self.bad else value, basics | report)


def real_optimization(policy: Linear, max_skipped: int = 3) -> Optimization:
    return Optimization(OptimizerConfig(lr=0.01), policy.trainable(), 100, max_skipped=max_skipped)


def test_how_updates_are_merged(policy: Linear, batch: Batch) -> None:
    reports = [
        {"ratio_min": 0.9, "ratio_max": 1.0, "clip_fraction": 0.1, "log_prob_gap": 1e-7, "log_prob_gap_max": 3e-7},
        {"ratio_min": 0.5, "ratio_max": 1.3, "clip_fraction": 0.2, "log_prob_gap": 0.5, "log_prob_gap_max": 0.7},
        {"ratio_min": 0.7, "ratio_max": 1.2, "clip_fraction": 0.6, "log_prob_gap": 0.9, "log_prob_gap_max": 0.9},
        *({"ratio_min": 0.8, "ratio_max": 1.1, "clip_fraction": 0.1} for _ in range(3)),
    ]
    metrics = update_of(policy, Reporting(reports), real_optimization(policy)).run(batch, 0)
    assert (metrics["ratio_min"], metrics["ratio_max"]) == (0.5, 1.3)
    assert metrics["clip_fraction"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 6)
    # The mismatch between rollout and training is seen before the first step, and only there.
    assert (metrics["log_prob_mismatch"], metrics["log_prob_mismatch_max"]) == (1e-7, 3e-7)
    assert not any(name.startswith("log_prob_gap") for name in metrics)
    assert metrics["updates"] == 6 and metrics["skipped"] == 0 and metrics["stopped_by_kl"] == 0
    assert metrics["lr_actor"] == metrics["lr_critic"] == pytest.approx(0.01)
    assert policy.version == 6


def test_every_epoch_sees_every_row_once_in_minibatches_of_its_own(policy: Linear, batch: Batch) -> None:
    algorithm = Reporting([])
    seen: list[Tensor] = []
    score = policy.evaluate
    policy.evaluate = lambda trace: (seen.append(trace["x"][:, 0]), score(trace))[1]  # type: ignore[method-assign]
    update_of(policy, algorithm, real_optimization(policy), micro_batch=2).run(batch, 0)
    rows = torch.cat(seen)
    assert sorted(rows[:N].tolist()) == sorted(rows[N:].tolist()) == sorted(batch.trace["x"][:, 0].tolist())
    assert rows[:N].tolist() != rows[N:].tolist()
    # Micro-batches are told the size and advantages of their mini-batch: 4, 4 and 3 rows in pieces of at most 2.
    numbers = batch.trace["x"][:, 0].tolist()
    order = [numbers.index(x) for x in rows[:N].tolist()]
    masks_NK, advantages_NJ = batch.mask_NK[order], batch.advantages_NJ[order]
    for pieces, (first, last) in zip(((0, 1), (2, 3), (4, 5)), ((0, 4), (4, 8), (8, 11)), strict=True):
        for piece in pieces:
            context = algorithm.contexts[piece]
            assert context.units == int(masks_NK[first:last].sum())
            trained = advantages_NJ[first:last, 0][masks_NK[first:last].any(1)].tolist()
            assert context.samples == context.values == len(trained)
            assert context.advantage_mean == pytest.approx(fmean(trained)) and context.advantage_std == pytest.approx(
                stdev(trained)
            )


def test_decisions_of_a_sample_are_counted_one_by_one(policy: Linear, batch: Batch) -> None:
    """Here each unit is a decision of its own."""
    each_NJ = torch.randn(N, K, dtype=torch.float64)
    algorithm = Reporting([])
    algorithm.epochs = algorithm.minibatches = 1
    many = replace(batch, advantages_NJ=each_NJ, returns_NV=each_NJ, old_values_NV=each_NJ)
    update_of(policy, algorithm, real_optimization(policy)).run(many, 0)
    (context,), trained = algorithm.contexts, each_NJ[batch.mask_NK].tolist()
    assert (context.units, context.values, context.samples) == (len(trained), len(trained), int(batch.mask_NK.any(1).sum()))
    assert context.samples < context.values
    assert (context.advantage_mean, context.advantage_std) == (pytest.approx(fmean(trained)), pytest.approx(stdev(trained)))


def test_advantages_of_units_are_put_on_the_scale_of_units(policy: Linear, batch: Batch) -> None:
    algorithm = Reporting([])
    algorithm.epochs = algorithm.minibatches = 1
    units_NK = torch.randn(N, K, dtype=torch.float64)
    update_of(policy, algorithm, real_optimization(policy)).run(replace(batch, unit_advantages_NK=units_NK), 0)
    (context,), trained = algorithm.contexts, units_NK[batch.mask_NK].tolist()
    assert (context.advantage_mean, context.advantage_std) == (pytest.approx(fmean(trained)), pytest.approx(stdev(trained)))


def test_too_much_divergence_leaves_the_remaining_updates_out(policy: Linear, batch: Batch) -> None:
    algorithm = Reporting([{"approx_kl": 0.01}, {"approx_kl": 0.3}], max_kl=0.1)
    metrics = update_of(policy, algorithm, real_optimization(policy)).run(batch, 0)
    assert metrics["updates"] == 2 and metrics["stopped_by_kl"] == 1 and algorithm.calls == 2 and policy.version == 2


def test_an_empty_batch_updates_nothing(policy: Linear, batch: Batch) -> None:
    algorithm, before = Reporting([]), [p.clone() for p in policy.parameters()]
    metrics = update_of(policy, algorithm, real_optimization(policy)).run(batch.select(torch.zeros(0).long()), 0)
    assert metrics == {"updates": 0.0, "stopped_by_kl": 0.0} and algorithm.calls == 0
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_is_skipped_and_counted(policy: Linear, batch: Batch) -> None:
    optimization, before = real_optimization(policy), [p.clone() for p in policy.parameters()]
    algorithm = Reporting([], bad=(1, 2))
    update = update_of(policy, algorithm, optimization)
    algorithm.epochs = 1
    metrics = update.run(batch, 0)
    assert metrics["skipped"] == 2 and metrics["updates"] == 3
    assert policy.version == 1 and optimization.skipped_total == 2 and optimization.skipped_in_a_row == 0
    # What the one good update did is what it does alone: the bad ones left nothing behind, in the moments neither.
    alone = Linear()
    alone.load_state_dict(dict(zip(policy.state_dict(), before, strict=True)))
    lone = Reporting([], bad=())
    lone.epochs, lone.minibatches = 1, 1
    index = list(_last_minibatch(batch))
    update_of(alone, lone, real_optimization(alone)).run(batch.select(index[-1]), 0)
    for p, q in zip(policy.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def _last_minibatch(batch: Batch) -> tuple[Tensor, ...]:
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    return order.tensor_split(3)


def test_too_many_skipped_updates_stop_the_run_with_a_sentence(policy: Linear, batch: Batch) -> None:
    algorithm = Reporting([], bad=tuple(range(100)))
    update = update_of(policy, algorithm, real_optimization(policy, max_skipped=8))
    update.run(batch, 0)  # six in a row are not enough
    with pytest.raises(TrainingError, match=r"8 updates in a row .* not finite"):
        update.run(batch, 1)
    assert policy.version == 0


def rollout_of(policy: Linear) -> Rollout:
    x = torch.randn(3, 4, S, dtype=torch.float64)
    scored = policy.evaluate({"x": x.flatten(0, 1)})
    assert scored.values_NV is not None
    done_TB = torch.tensor([[False] * 4, [False] * 4, [True] * 4])
    valid_TB = torch.ones(3, 4, dtype=torch.bool)
    valid_TB[2, 1] = False
    return Rollout(
        trace={"x": x},
        log_probs_TBK=scored.log_probs_NK.detach().reshape(3, 4, K),
        mask_TBK=torch.ones(3, 4, K, dtype=torch.bool),
        rewards_TB=torch.randn(3, 4, dtype=torch.float64),
        values_TBV=scored.values_NV.detach().reshape(3, 4, 1),
        next_values_TB=torch.zeros(3, 4, dtype=torch.float64),
        valid_TB=valid_TB,
        terminated_TB=done_TB,
        truncated_TB=torch.zeros(3, 4, dtype=torch.bool),
        task_ids_TB=torch.zeros(3, 4, dtype=torch.long),
        episodes=EpisodeRecord(torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(4)),
        env_steps=11,
    )


@pytest.mark.parametrize("micro", [None, 2])
def test_the_reference_scores_every_decision_with_its_own_weights(micro: int | None, policy: Linear) -> None:
    torch.manual_seed(9)
    other: Any = Linear()
    update = update_of(policy, PPO_WITH_EVERYTHING, Recorder(policy), reference=other, micro_batch=micro)
    rollout = rollout_of(policy)
    batch, advantages = update.prepare(rollout)
    expected = other.evaluate(policy.pack(rollout).trace).log_probs_NK
    assert batch.reference_log_probs_NK is not None and not batch.reference_log_probs_NK.requires_grad
    torch.testing.assert_close(batch.reference_log_probs_NK, expected.detach(), rtol=1e-12, atol=1e-12)
    assert len(batch) == 11 and torch.equal(advantages.keep_TB, rollout.valid_TB)


class Remembering:
    """An algorithm that learns from some slots, in samples of whole episodes, and keeps the rollout it was shown."""

    epochs, minibatches, max_kl, group_size, whole_episodes, uses_reference, max_refills = 1, 1, None, 1, True, True, 0
    judges_by_reference = False

    def taught(self, rollout: Rollout) -> Tensor:
        return torch.tensor([True, True, False, True])

    def advantages(self, rollout: Rollout) -> Advantages:
        self.seen = rollout
        return Advantages(rollout.rewards_TB, rollout.rewards_TB, rollout.valid_TB & self.taught(rollout), {})


@pytest.mark.parametrize(("micro", "everything"), [(None, False), (2, False), (2, True)])
def test_the_reference_scores_before_rewards_are_judged_and_what_is_read_alone(
    micro: int | None, everything: bool, policy: Linear
) -> None:
    """What is left out of the loss is scored only where rewards are judged by the reference."""

    class Whole(Linear):
        rows = 0

        def pack(self, rollout: Rollout) -> Packing:
            return rollout.by_episode()

        def evaluate(self, trace: Mapping[str, Tensor]) -> Evaluation:
            self.rows += len(trace["x"])
            scored = super().evaluate({"x": trace["x"].flatten(0, 1)})
            longest = trace["x"].shape[1]
            return Evaluation(scored.log_probs_NK.reshape(-1, longest * K), scored.entropy_NK.reshape(-1, longest * K), None)

    rollout, algorithm = rollout_of(policy), Remembering()
    algorithm.judges_by_reference = everything
    torch.manual_seed(9)
    reference, learner = Whole(), Whole()
    update = update_of(learner, algorithm, Recorder(policy), reference=reference, micro_batch=micro)
    batch, _ = update.prepare(rollout)
    scored = Linear.evaluate(reference, {"x": rollout.trace["x"]}).log_probs_NK.detach()  # type: ignore[arg-type]
    read_TB = rollout.valid_TB & torch.tensor([True, True, everything, True])
    seen_TBK = algorithm.seen.reference_log_probs_TBK
    assert seen_TBK is not None and reference.rows == 3 + everything
    torch.testing.assert_close(seen_TBK, scored * read_TB[..., None], rtol=1e-12, atol=1e-12)
    assert batch.reference_log_probs_NK is not None and len(batch) == 3
    rows_NJK = batch.reference_log_probs_NK.unflatten(1, (3, K))
    torch.testing.assert_close(rows_NJK[2], scored[:, 3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows_NJK[1, :2], scored[:2, 1], rtol=1e-12, atol=1e-12)


def test_the_first_update_of_a_rollout_has_ratio_one(policy: Linear) -> None:
    update = update_of(policy, PPO(PPO.Config(epochs=1, minibatches=1)), real_optimization(policy))
    batch, _ = update.prepare(rollout_of(policy))
    metrics = update.run(batch, 0)
    # A product over eleven rows may differ from that over twelve in the last bit.
    assert metrics["ratio_min"] == pytest.approx(1, abs=1e-13) and metrics["ratio_max"] == pytest.approx(1, abs=1e-13)
    assert metrics["log_prob_mismatch_max"] < 1e-13
    later = update.run(batch, 0)  # the weights have moved, the rollout has not
    assert later["ratio_min"] < 1 < later["ratio_max"] and later["log_prob_mismatch"] > 0


def test_filtered_groups_reach_no_loss(policy: Linear) -> None:
    algorithm = GRPO(GRPO.Config(group_size=2))
    rollout = rollout_of(policy)
    flat = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=torch.float64)  # the first group has no spread
    rewards_TB = torch.zeros_like(rollout.rewards_TB)
    rewards_TB[0] = flat
    batch, advantages = update_of(policy, algorithm, Recorder(policy)).prepare(replace(rollout, rewards_TB=rewards_TB))
    assert len(batch) == 6 and advantages.metrics["groups_without_spread"] == 0.5
    assert torch.equal(batch.trace["x"], rollout.trace["x"][:, 2:].flatten(0, 1))


def spy(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*arguments, **named)

    return wrapper


def test_training_happens_in_the_policy_s_training_mode(policy: Linear, batch: Batch) -> None:
    modes: list[str] = []
    inner = policy.compute_mode
    policy.compute_mode = lambda *, train: spy(modes, f"train={train}", inner)(train=train)  # type: ignore[method-assign]
    reference: Any = Linear()
    reference.compute_mode = policy.compute_mode
    update = update_of(policy, PPO_WITH_EVERYTHING, Recorder(policy), reference=reference)
    update.prepare(rollout_of(policy))
    update.run(batch, 0)
    assert modes == ["train=False", "train=True"]
