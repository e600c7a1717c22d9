"""What every likelihood policy promises (mmrl.protocols), over every implementation. A new policy adds one line to POLICIES."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmrl.algorithms.ppo import PPO
from mmrl.batching import make_batch
from mmrl.columns import Column, stack
from mmrl.messages import Message
from mmrl.numerics.losses import clipped_surrogate
from mmrl.optim import StepReport
from mmrl.protocols import Advantages, LikelihoodPolicy, LossContext, Policy, ValuePolicy
from mmrl.types import Batch, Decision, EpisodeRecord, Rollout
from mmrl.updates import RolloutUpdate
from policies.mlp import MLP
from tests.policies import tiny, tiny_diffusion, tiny_vla


def _mlp(**fields: Any) -> MLP:
    policy = tiny.stir(MLP(MLP.Config(state_dim=4, hidden=(16, 12), **fields), device=torch.device("cpu")))
    policy.adapt({"state": 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(5)) + 1})
    return policy


# name -> how to build it from the fixtures' folders; its parameters must be such that no output is trivially zero.
POLICIES: dict[str, Callable[[Mapping[str, str]], Any]] = {
    "pi0 flow_sde": lambda folders: tiny.build(folders["pi0"]),
    "pi0 flow_sde, all steps as units": lambda folders: tiny.build(folders["pi0"], stochastic_steps="all", granularity="step"),
    "pi0 flow_noise, actions as units": lambda folders: tiny.build(folders["pi0"], sampler="flow_noise", granularity="action"),
    "pi0 cps, re-encoded": lambda folders: tiny.build(folders["pi0"], sampler="cps", cache_prefix=False),
    "pi0, a critic that knows the time": lambda folders: tiny.build(folders["pi0"], critic={"inputs": ["state_token", "time"]}),
    "pi0 lora": lambda folders: tiny.build(folders["pi0"], train="lora"),
    "pi0 all, without critic": lambda folders: tiny.build(folders["pi0"], train="all", critic=None),
    "mlp gaussian": lambda _: _mlp(action_dim=3, log_std=-0.7),
    "mlp gaussian, one trunk, normalised": lambda _: _mlp(action_dim=2, critic="shared", normalize=True),
    "mlp choices": lambda _: _mlp(choices=(5, 3)),
    "mlp choices, without critic": lambda _: _mlp(choices=(6,), critic=None, activation="relu"),
    "paligemma, tokens": lambda folders: tiny_vla.build(folders["paligemma"], state="bins"),
    "paligemma, actions, critic after the first action": lambda folders: tiny_vla.build(
        folders["paligemma"], granularity="action", critic={"input": "first_action", "hidden": (8,), "detach": False}
    ),
    "paligemma, a critic that knows the time": lambda folders: tiny_vla.build(
        folders["paligemma"], critic={"time": True, "hidden": (8,)}
    ),
    "paligemma lora, chunks": lambda folders: tiny_vla.build(folders["paligemma"], train="lora", granularity="chunk"),
    "qwen, tokens": lambda folders: tiny_vla.build(folders["qwen"], attention="sdpa"),
    "qwen lora, actions": lambda folders: tiny_vla.build(folders["qwen"], train="lora", granularity="action", state="bins"),
    "qwen, chunks, without critic": lambda folders: tiny_vla.build(folders["qwen"], granularity="chunk", critic=None),
    "diffusion": lambda folders: tiny_diffusion.build(folders["sd3"]),
    "diffusion lora, cps, a window behind one prefix": lambda folders: tiny_diffusion.build(
        folders["sd3"],
        train="lora",
        sampler="cps",
        dtype="float64",
        trained_steps={"which": "window", "size": 2, "start": 1, "shared_prefix": True},
    ),
    "diffusion, flux kontext that edits": lambda folders: tiny_diffusion.load(folders["kontext"], max_text_tokens=8),
}
B, T = 5, 2


@pytest.fixture(params=POLICIES.values(), ids=list(POLICIES))
def make(request: pytest.FixtureRequest, folders: Mapping[str, str]) -> Callable[[], Any]:
    return lambda: request.param(folders)


@pytest.fixture
def policy(make: Callable[[], Any]) -> Any:
    return make()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(values: Any) -> Any:
    """Of what a policy was asked, says and remembers, what can be compared: tensors as they are, pictures as their pixels.

    A column gives a tensor where it holds messages, all of one size, and a list of keys where it holds prompts.
    """
    if not isinstance(values, Column):
        return values
    things = values.tolist()
    listed = things if isinstance(things, list) else [things]
    if all(isinstance(thing, Message) for thing in listed):
        shown = [torch.from_numpy(np.asarray(picture.image).copy()) for thing in listed for picture in thing.pictures]
        return torch.stack(shown).long()
    return [getattr(thing, "key", thing) for thing in listed]


def same(ours: Any, theirs: Any) -> bool:
    ours, theirs = plain(ours), plain(theirs)
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def assert_close(ours: Any, theirs: Any, what: str, within: float = 1e-4) -> None:
    """Numbers up to ``within``, pixels up to one of 255 levels, anything else exactly."""
    pixels = isinstance(ours, Column)
    ours, theirs = plain(ours), plain(theirs)
    if not isinstance(ours, Tensor):
        assert ours == theirs, what
        return
    close = {"rtol": 0, "atol": 1} if pixels else {"rtol": within, "atol": within}
    torch.testing.assert_close(ours, theirs, **close, msg=lambda m: f"{what}: {m}")


def copied(trace: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values.map(Tensor.clone) if isinstance(values, Column) else values.clone() for name, values in trace.items()}


@torch.no_grad()
def learn(policy: Any, seed: int) -> None:
    """Whatever learns becomes another: noise by name, so that equal names get equal noise."""
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=seeded(seed + sum(name.encode())))
            parameter += 0.2 * noise.to(parameter.dtype) / parameter.shape[-1] ** 0.5


def explore(policy: Policy, seed: int = 1, batch: int = B) -> Decision:
    with policy.compute_mode(train=False):
        return policy.act(policy.example_observation(batch), tiny.draws(seed, batch), explore=True)


def play(policy: Policy) -> Rollout:
    """T decisions of B environments, of which the first ended early, as the collector would assemble them."""
    decisions = [explore(policy, seed) for seed in range(T)]
    valid_TB = torch.ones(T, B, dtype=torch.bool)
    valid_TB[1, 0] = False
    nothing_TB, no_TB = torch.zeros(T, B), torch.zeros(T, B, dtype=torch.bool)
    values_TBV = torch.stack([torch.zeros(B, 1) if d.values_BV is None else d.values_BV for d in decisions])
    row = torch.zeros(0)
    return Rollout(
        trace={name: stack([d.trace[name] for d in decisions]) for name in decisions[0].trace},
        log_probs_TBK=torch.stack([d.log_probs_BK for d in decisions]),
        mask_TBK=torch.stack([d.mask_BK for d in decisions]),
        rewards_TB=torch.randn(T, B, generator=seeded(7)),
        values_TBV=values_TBV,
        next_values_TB=nothing_TB,
        valid_TB=valid_TB,
        terminated_TB=no_TB,
        truncated_TB=no_TB,
        task_ids_TB=torch.zeros(T, B, dtype=torch.long),
        episodes=EpisodeRecord(row.long(), row, row, row.long()),
        env_steps=0,
    )


def batch_of(policy: LikelihoodPolicy) -> Batch:
    """The rollout's nine valid decisions with advantages of both signs."""
    rollout = play(policy)
    advantages_TB = torch.randn(T, B, generator=seeded(8))
    returns_TBV = rollout.values_TBV + torch.randn(T, B, generator=seeded(9))[..., None]
    return make_batch(rollout, Advantages(advantages_TB, returns_TBV, rollout.valid_TB, {}), policy)


def gradients(policy: Any, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Equal up to rounding that is small against the whole gradient."""
    assert ours.keys() == theirs.keys() and ours
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 1e-4, "a gradient of zero would pass"
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-3, atol=1e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


# -- acting ------------------------------------------------------------------------------------------------------------


def test_it_keeps_the_protocol(policy: Any) -> None:
    assert isinstance(policy, LikelihoodPolicy) and isinstance(policy, nn.Module)
    assert isinstance(policy, ValuePolicy) or not policy.has_critic
    assert policy.version == 0
    seen = policy.example_observation(3)
    assert seen.batch_size == 3
    assert len({*map(str, seen.instructions), *(str(row) for row in (seen.state if seen.state is not None else []))}) > 1


@pytest.mark.parametrize("exploring", [True, False])
def test_acting_is_a_function_of_the_draws(make: Callable[[], Any], exploring: bool) -> None:
    first, second = make(), make()
    seen = first.example_observation(B)
    torch.manual_seed(1)
    ours = first.act(seen, tiny.draws(3), explore=exploring)
    torch.manual_seed(2)
    theirs = second.act(seen, tiny.draws(3), explore=exploring)
    assert same(ours.action, theirs.action) and torch.equal(ours.log_probs_BK, theirs.log_probs_BK)
    other = first.act(seen, tiny.draws(4), explore=exploring)
    assert not exploring or not same(other.action, ours.action)


def test_acting_leaves_weights_modes_and_gradients_alone(policy: Any) -> None:
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    decision = explore(policy)
    made = (decision.action, decision.log_probs_BK, *decision.trace.values())
    assert not any(values.requires_grad for values in made if isinstance(values, Tensor))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    assert torch.is_grad_enabled()


def test_acting_without_exploration_needs_no_trace(policy: Any) -> None:
    """What is not stored cannot be scored by mistake; the action has the shape of an exploring one."""
    decision = policy.act(policy.example_observation(B), tiny.draws(1), explore=False)
    assert decision.trace == {}
    assert decision.action.shape == explore(policy).action.shape


def test_a_decision_knows_the_version_that_made_it(policy: Any) -> None:
    policy.version = 17
    assert explore(policy).policy_version == 17


def test_observations_do_not_mix_within_a_batch(policy: Any) -> None:
    """Scoring one decision alone gives what scoring it among others gives, up to rounding."""
    decision = explore(policy)
    together = policy.evaluate(decision.trace)
    for b in range(B):
        alone = policy.evaluate({name: tensor[b : b + 1] for name, tensor in decision.trace.items()})
        torch.testing.assert_close(alone.log_probs_NK[0], together.log_probs_NK[b], rtol=1e-4, atol=1e-4)
        if together.values_NV is not None:
            torch.testing.assert_close(alone.values_NV[0], together.values_NV[b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exploring", [True, False])
def test_a_row_s_decision_does_not_depend_on_the_rows_beside_it(policy: Any, exploring: bool) -> None:
    """Up to the rounding of matrix products: neither its random numbers nor anything else comes from its neighbours."""
    seen, index = policy.example_observation(B), torch.tensor([3, 1])
    together = policy.act(seen, tiny.draws(1), explore=exploring)
    apart = policy.act(seen.select(index), tiny.draws(1).select(index), explore=exploring)
    assert_close(apart.action, together.action[index], "action")
    assert_close(apart.log_probs_BK, together.log_probs_BK[index], "log-probabilities")
    for name, values in apart.trace.items():
        assert_close(values, together.trace[name][index], name)


# -- scoring again -----------------------------------------------------------------------------------------------------


def test_scoring_again_equals_the_rollout(policy: Any) -> None:
    decision = explore(policy)
    with policy.compute_mode(train=True):
        scored = policy.evaluate(decision.trace)
    assert torch.equal(scored.log_probs_NK, decision.log_probs_BK)
    assert scored.entropy_NK.shape == scored.log_probs_NK.shape == decision.mask_BK.shape
    assert scored.log_probs_NK.dtype in (torch.float32, torch.float64) and scored.log_probs_NK.isfinite().all()
    assert (scored.values_NV is None) == (decision.values_BV is None) == (not policy.has_critic)
    if decision.values_BV is not None:
        assert torch.equal(scored.values_NV, decision.values_BV) and decision.values_BV.std() > 0


def test_scoring_twice_is_the_same_and_changes_nothing(policy: Any) -> None:
    decision = explore(policy)
    before = copied(decision.trace)
    first, second = policy.evaluate(decision.trace), policy.evaluate(decision.trace)
    assert torch.equal(first.log_probs_NK, second.log_probs_NK)
    assert all(same(before[name], values) for name, values in decision.trace.items())


def test_pack_takes_the_valid_decisions_in_time_then_slot_order(policy: Any) -> None:
    rollout = play(policy)
    packing = policy.pack(rollout)
    trace, index = packing.trace, packing.index_NJ
    order = [(t, b) for t, b in itertools.product(range(T), range(B)) if rollout.valid_TB[t, b]]
    assert len(order) == T * B - 1 and index.tolist() == [[t * B + b] for t, b in order]
    log_probs = policy.evaluate(trace).log_probs_NK
    for n, (t, b) in enumerate(order):
        for name, tensor in trace.items():
            assert same(tensor[n], rollout.trace[name][t, b]), name
        torch.testing.assert_close(log_probs[n], rollout.log_probs_TBK[t, b], rtol=1e-4, atol=1e-4)


def test_a_step_along_the_gradient_makes_decisions_likelier(policy: Any) -> None:
    decision = explore(policy)
    before = policy.evaluate(decision.trace).log_probs_NK.sum()
    before.backward()
    actor = [p for p in policy.trainable()["actor"] if p.grad is not None]
    length = float(torch.stack([p.grad.square().sum() for p in actor]).sum())
    with torch.no_grad():
        for p in actor:
            p += p.grad * (0.01 / length)
    after = policy.evaluate(decision.trace).log_probs_NK.sum().detach()
    assert float(after - before.detach()) == pytest.approx(0.01, rel=0.3)


# -- learning from a rollout -------------------------------------------------------------------------------------------


def test_the_gradient_at_ratio_one_is_reinforce_s(policy: Any) -> None:
    batch = batch_of(policy)
    log_probs = policy.evaluate(batch.trace).log_probs_NK
    weights = batch.advantages_NJ * batch.mask_NK / batch.mask_NK.sum()
    reinforce = gradients(policy, -(weights * log_probs).sum())
    with policy.compute_mode(train=True):
        scored = policy.evaluate(batch.trace)
    advantages_NK = batch.advantages_NJ.expand_as(log_probs)
    # The batch is scored in another shape than it was acted in, so its ratios are 1 up to rounding; old := new makes them 1.
    torch.testing.assert_close(scored.log_probs_NK, batch.old_log_probs_NK, rtol=1e-4, atol=1e-4)
    old = scored.log_probs_NK.detach()
    loss = clipped_surrogate(scored.log_probs_NK, old, advantages_NK, batch.mask_NK, clip_low=0.2, clip_high=0.2)
    assert loss.metrics["ratio_min"] == loss.metrics["ratio_max"] == 1 and loss.metrics["clip_fraction"] == 0
    assert_same_gradients(gradients(policy, loss.value), reinforce)


@dataclass
class Recorder:
    """Stands in for an Optimization and keeps the gradient it is given."""

    policy: Any
    gradients: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0

    def zero_grad(self) -> None:
        self.policy.zero_grad(set_to_none=True)

    def step(self, loss_is_finite: bool, *, loss: float) -> StepReport:
        assert loss_is_finite
        self.loss = loss
        self.gradients = {name: p.grad.clone() for name, p in self.policy.named_parameters() if p.grad is not None}
        return StepReport(False, 0.0, {})


@dataclass(frozen=True)
class ActorOnly:
    """PPO's policy loss for a policy without a critic."""

    epochs: int = 1
    minibatches: int = 1
    max_kl: float | None = None
    group_size: int = 1
    whole_episodes: bool = False
    uses_reference: bool = False

    def loss(self, policy: LikelihoodPolicy, batch: Batch, context: LossContext) -> Any:
        scored = policy.evaluate(batch.trace)
        return clipped_surrogate(
            scored.log_probs_NK,
            batch.old_log_probs_NK,
            batch.advantages_NJ,
            batch.mask_NK,
            clip_low=0.2,
            clip_high=0.2,
            normalizer=context.units,
        )


def updated(policy: Any, batch: Batch, micro_batch: int | None) -> tuple[Recorder, dict[str, float]]:
    recorder = Recorder(policy)
    algorithm = PPO(PPO.Config(entropy_weight=0.01)) if policy.has_critic else ActorOnly()
    update = RolloutUpdate(
        policy=policy,
        algorithm=algorithm,  # type: ignore[arg-type]
        optimization=recorder,  # type: ignore[arg-type]
        minibatch_generator=seeded(0),
        supervised_generator=seeded(0),
        iterations=1,
        micro_batch=micro_batch,
    )
    metrics = update._update(batch, 0)
    assert policy.version == 1
    policy.version = 0
    return recorder, metrics


@pytest.mark.parametrize("micro_batch", [3, 4, 1], ids=["even pieces", "an uneven last piece", "one by one"])
def test_micro_batches_add_up_to_the_whole(policy: Any, micro_batch: int) -> None:
    batch = batch_of(policy)
    assert len(batch) == 9
    whole, metrics = updated(policy, batch, None)
    pieces, parts = updated(policy, batch, micro_batch)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-4, abs=1e-5)
    assert_same_gradients(pieces.gradients, whole.gradients)
    for name in ("ratio_min", "ratio_max", "clip_fraction"):
        assert parts[name] == pytest.approx(metrics[name], rel=1e-3), name


# -- carrying a policy away --------------------------------------------------------------------------------------------


def test_a_state_dict_makes_the_same_policy(make: Callable[[], Any]) -> None:
    policy, twin = make(), make()
    learn(twin, seed=11)
    assert policy.fingerprint() == twin.fingerprint() and "\n" not in policy.fingerprint()
    decision = explore(policy)
    assert not torch.equal(explore(twin).log_probs_BK, decision.log_probs_BK)
    twin.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    again = explore(twin)
    assert same(again.action, decision.action) and torch.equal(again.log_probs_BK, decision.log_probs_BK)
    assert torch.equal(twin.evaluate(decision.trace).log_probs_NK, decision.log_probs_BK)


def test_a_reference_scores_alike_and_does_not_learn(policy: Any) -> None:
    decision = explore(policy)
    reference = policy.reference()
    assert not any(p.requires_grad for p in reference.parameters())
    scored = reference.evaluate(decision.trace).log_probs_NK
    assert torch.equal(scored, decision.log_probs_BK)
    fixed, theirs = [p for p in policy.parameters() if not p.requires_grad], {id(p) for p in reference.parameters()}
    assert all(id(p) in theirs for p in fixed), "what does not learn is not kept twice"
    learn(policy, seed=12)
    assert torch.equal(reference.evaluate(decision.trace).log_probs_NK, scored)
    assert not torch.equal(policy.evaluate(decision.trace).log_probs_NK, scored)


def test_trainable_groups_are_disjoint_and_complete(policy: Any) -> None:
    listed = [id(p) for parameters in policy.trainable().values() for p in parameters]
    assert len(listed) == len(set(listed)) > 0
    assert set(listed) == {id(p) for p in policy.parameters() if p.requires_grad}


def test_the_critic_says_the_same_when_bootstrapping(policy: Any) -> None:
    if not policy.has_critic:
        return
    values_B = policy.value(policy.example_observation(B), tiny.draws(1))
    expected = explore(policy, seed=1).values_BV[:, 0]
    assert values_B.shape == (B,) and not values_B.requires_grad
    torch.testing.assert_close(values_B, expected, rtol=1e-5, atol=1e-6)
