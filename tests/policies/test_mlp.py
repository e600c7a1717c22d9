"""The MLP against torch.distributions, CleanRL's initialisation and statistics of everything it has seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mmrl.errors import MMRLError
from mmrl.protocols import AdaptivePolicy, LikelihoodPolicy, SupervisedPolicy, ValuePolicy
from mmrl.types import Examples, Observation
from policies.mlp import MLP
from tests.policies import tiny

S = 4


def build(*, stirred: bool = True, **fields: Any) -> MLP:
    policy = MLP(MLP.Config(state_dim=S, **fields), device=torch.device("cpu"))
    return tiny.stir(policy) if stirred else policy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observation(state_BS: Tensor) -> Observation:
    return Observation({}, state_BS, ("",) * len(state_BS))


def states(n: int) -> Tensor:
    return torch.randn(n, S, generator=seeded(9))


def network(trunk: Any, head: Any, state_BS: Tensor) -> Tensor:
    """The layers by hand, in float64: h <- tanh(W h + b), then W h + b."""
    h = state_BS.double()
    for layer in (*(layer for layer in trunk if isinstance(layer, nn.Linear)), head):
        h = h @ layer.weight.double().T + layer.bias.double()
        h = h if layer is head else h.tanh()
    return h


def test_it_keeps_every_promise_that_it_names() -> None:
    policy = build(choices=(2,))
    for protocol in (LikelihoodPolicy, ValuePolicy, SupervisedPolicy, AdaptivePolicy):
        assert isinstance(policy, protocol), protocol


# -- distributions -----------------------------------------------------------------------------------------------------


def test_gaussian_scores_are_those_of_torch_distributions() -> None:
    policy = build(action_dim=3, log_std=-0.4)
    decision = policy.act(observation(states(6)), tiny.draws(1, 6), explore=True)
    scored = policy.evaluate(decision.trace)
    actions: Any = policy.actions
    normal = torch.distributions.Normal(network(policy.trunk, actions.mean, states(6)), actions.log_std.double().exp())
    expected = normal.log_prob(decision.action[:, 0].double()).sum(1)
    torch.testing.assert_close(scored.log_probs_NK[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored.entropy_NK[:, 0].double(), normal.entropy().sum(1).expand(6), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scored.values_NV[:, 0].double(), network(policy.critic_trunk, policy.critic, states(6))[:, 0])


def test_categorical_scores_are_those_of_torch_distributions() -> None:
    """Two components of 4 and 2 choices: the logits of choices that do not exist count for nothing."""
    policy = build(choices=(4, 2))
    decision = policy.act(observation(states(50)), tiny.draws(1, 50), explore=True)
    scored = policy.evaluate(decision.trace)
    logits = network(policy.trunk, policy.actions.logits, states(50))
    parts = [torch.distributions.Categorical(logits=part) for part in (logits[:, :4], logits[:, 4:6])]
    chosen = decision.action[:, 0]
    expected = sum(part.log_prob(chosen[:, i].double()) for i, part in enumerate(parts))
    torch.testing.assert_close(scored.log_probs_NK[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    entropy = sum(part.entropy() for part in parts)
    torch.testing.assert_close(scored.entropy_NK[:, 0].double(), entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{"action_dim": 2}, {"choices": (4, 2)}], ids=["gaussian", "categorical"])
def test_log_probs_and_entropies_have_the_gradients_of_torch_distributions(fields: dict[str, Any]) -> None:
    policy = build(**fields)
    trace = policy.act(observation(states(7)), tiny.draws(2, 7), explore=True).trace
    scored = policy.evaluate(trace)
    ours = torch.autograd.grad(scored.log_probs_NK.sum() + 0.3 * scored.entropy_NK.sum(), policy.trainable()["actor"])
    output = policy.actions(policy.trunk(trace["state"]))
    actions: Any = policy.actions
    if "choices" in fields:
        parts = [torch.distributions.Categorical(logits=output[:, 0]), torch.distributions.Categorical(logits=output[:, 1, :2])]
        log_prob = sum(part.log_prob(trace["action"][:, i]) for i, part in enumerate(parts))
        entropy = sum(part.entropy() for part in parts)
    else:
        normal = torch.distributions.Normal(output, actions.log_std.exp())
        log_prob, entropy = normal.log_prob(trace["action"]).sum(1), normal.entropy().sum(1)
    theirs = torch.autograd.grad((log_prob + 0.3 * entropy).sum(), policy.trainable()["actor"])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_choices_are_drawn_as_often_as_they_are_likely() -> None:
    policy, n = build(choices=(4, 2)), 20_000
    one = states(1)
    drawn = policy.act(observation(one.expand(n, S)), tiny.draws(3, n), explore=True).action[:, 0].long()
    logits = network(policy.trunk, policy.actions.logits, one)[0]
    for component, part in enumerate((logits[:4], logits[4:6])):
        share = drawn[:, component].bincount(minlength=len(part)).double() / n
        torch.testing.assert_close(share, part.softmax(-1).detach(), rtol=0, atol=0.015)


def test_gaussian_actions_spread_as_they_say_and_are_not_clipped() -> None:
    policy = build(action_dim=2, log_std=0.8)
    drawn = policy.act(observation(states(1).expand(20_000, S)), tiny.draws(3, 20_000), explore=True).action[:, 0]
    actions: Any = policy.actions
    torch.testing.assert_close(drawn.mean(0), actions.mean(policy.trunk(states(1)))[0], rtol=0, atol=0.06)
    torch.testing.assert_close(drawn.std(0), actions.log_std.exp(), rtol=0.03, atol=0)
    assert float(drawn.abs().max()) > 4


def test_without_exploration_it_takes_the_likeliest_action() -> None:
    categorical = build(choices=(4, 2))
    logits = network(categorical.trunk, categorical.actions.logits, states(30))
    best = torch.stack([logits[:, :4].argmax(1), logits[:, 4:6].argmax(1)], 1)
    assert torch.equal(categorical.act(observation(states(30)), tiny.draws(0, 30), explore=False).action[:, 0].long(), best)
    gaussian = build(action_dim=2)
    mean = gaussian.act(observation(states(30)), tiny.draws(0, 30), explore=False).action[:, 0]
    torch.testing.assert_close(mean.double(), network(gaussian.trunk, gaussian.actions.mean, states(30)))


# -- weights -----------------------------------------------------------------------------------------------------------


def assert_orthogonal(weight: Tensor, gain: float) -> None:
    narrow = weight if weight.shape[0] <= weight.shape[1] else weight.T
    torch.testing.assert_close(narrow @ narrow.T, gain**2 * torch.eye(len(narrow)), rtol=1e-4, atol=1e-4 * gain**2)


def test_weights_start_as_cleanrl_s() -> None:
    policy = build(stirred=False, action_dim=3, log_std=-0.5)
    actions: Any = policy.actions
    hidden = [layer for trunk in (policy.trunk, policy.critic_trunk) for layer in trunk or () if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in hidden] == [(64, S), (64, 64)] * 2
    gains = [(layer, math.sqrt(2)) for layer in hidden] + [(actions.mean, 0.01), (policy.critic, 1.0)]
    for layer, gain in gains:
        assert_orthogonal(layer.weight, gain)
        assert not layer.bias.any()
    assert actions.log_std.tolist() == [-0.5] * 3
    assert not torch.equal(hidden[0].weight, hidden[2].weight)


def test_another_seed_gives_other_weights_and_the_global_generator_stays() -> None:
    torch.manual_seed(4)
    first = build(stirred=False, choices=(2,), seed=1)
    drawn = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(torch.rand(3), drawn)
    second, third = build(stirred=False, choices=(2,), seed=1), build(stirred=False, choices=(2,), seed=2)
    assert torch.equal(first.actions.logits.weight, second.actions.logits.weight)
    assert not torch.equal(first.actions.logits.weight, third.actions.logits.weight)


@pytest.mark.parametrize(("critic", "touched"), [("separate", False), ("shared", True)])
def test_only_a_shared_critic_moves_the_actor(critic: str, touched: bool) -> None:
    policy = build(choices=(2,), critic=critic)
    trace = policy.act(observation(states(5)), tiny.draws(0, 5), explore=True).trace
    values = policy.evaluate(trace).values_NV
    assert values is not None
    values.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.trainable()["actor"]) is touched


def test_a_policy_without_critic_says_so() -> None:
    assert MLP.lacks(MLP.Config(S, choices=(2,), critic=None))["critic"][0] == "critic"
    assert MLP.lacks(MLP.Config(S, choices=(2,))) == {}
    policy = build(choices=(2,), critic=None)
    assert not policy.has_critic and set(policy.trainable()) == {"actor"}
    with pytest.raises(MMRLError, match=r"policy\.critic is null"):
        policy.value(observation(states(2)), tiny.draws(0, 2))


# -- statistics --------------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_all_states_together() -> None:
    policy = build(choices=(2,), normalize=True)
    parts = [5 + 3 * torch.randn(n, S, generator=seeded(n)) for n in (1, 40, 7, 300)]
    for part in parts:
        policy.adapt({"state": part})
    policy.adapt({"state": torch.zeros(0, S)})
    moments, whole = policy.moments, torch.cat(parts).double()
    assert moments is not None and float(moments.count) == len(whole)
    torch.testing.assert_close(moments.mean_S, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.var_S, ((whole - whole.mean(0)) ** 2).mean(0), rtol=1e-12, atol=1e-12)


def test_running_moments_are_gymnasium_s(installed: Callable[[str], None]) -> None:
    installed("gymnasium")
    upstream = pytest.importorskip("gymnasium.wrappers.utils").RunningMeanStd(epsilon=1e-12, shape=(S,))
    policy = build(choices=(2,), normalize=True)
    for n in (3, 50, 8):
        part = 2 * torch.randn(n, S, generator=seeded(n)) - 1
        upstream.update(part.double().numpy())
        policy.adapt({"state": part})
    assert policy.moments is not None
    torch.testing.assert_close(policy.moments.mean_S, torch.tensor(upstream.mean), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(policy.moments.var_S, torch.tensor(upstream.var), rtol=1e-9, atol=1e-9)


def test_normalised_states_are_what_the_network_sees_cut_at_ten_deviations() -> None:
    policy = build(choices=(2,), normalize=True)
    policy.adapt({"state": 100 + 7 * torch.randn(2000, S, generator=seeded(1))})
    seen: list[Tensor] = []
    policy.trunk.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    state = torch.tensor([[100.0, 107.0, 93.0, 1000.0]])
    policy.act(observation(state), tiny.draws(0, len(state)), explore=True)
    torch.testing.assert_close(seen[0], torch.tensor([[0.0, 1.0, -1.0, 10.0]]), rtol=0.05, atol=0.05)
    assert float(seen[0][0, 3]) == 10.0


def test_statistics_come_from_examples_once_and_travel_with_the_weights() -> None:
    policy, twin = (build(choices=(2,), normalize=True) for _ in range(2))
    assert policy.needs_statistics() and not build(choices=(2,)).needs_statistics()
    policy.fit_statistics(Examples(observation(states(30)), torch.zeros(30, 1, 1), torch.ones(30, 1, dtype=torch.bool)))
    assert not policy.needs_statistics() and policy.moments is not None
    torch.testing.assert_close(policy.moments.mean_S, states(30).double().mean(0))
    twin.load_state_dict(policy.state_dict())
    assert not twin.needs_statistics()
    ours, theirs = (p.act(observation(states(5)), tiny.draws(0, 5), explore=True).log_probs_BK for p in (policy, twin))
    assert torch.equal(ours, theirs)


# -- imitation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"action_dim": 2}, {"choices": (4, 2)}], ids=["gaussian", "categorical"])
def test_the_supervised_loss_is_the_mean_surprise_over_real_first_actions(fields: dict[str, Any]) -> None:
    policy = build(**fields)
    decision = policy.act(observation(states(6)), tiny.draws(5, 6), explore=True)
    mask_BH = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1], [0, 0], [1, 1]]).bool()
    later = torch.full((6, 1, 2), 1.0)
    examples = Examples(observation(states(6)), torch.cat([decision.action, later], 1), mask_BH)
    surprise = [-float(decision.log_probs_BK[i, 0]) for i in range(6) if mask_BH[i, 0]]
    loss = policy.supervised_loss(examples, seeded())
    assert float(loss.value.detach()) == pytest.approx(sum(surprise) / len(surprise), rel=1e-5)
    assert not build(**fields, critic="shared").supervised_loss(examples, seeded()).value.isnan()
    with pytest.raises(MMRLError, match="actions have 2 numbers, but the examples' have 1"):
        policy.supervised_loss(Examples(observation(states(6)), torch.zeros(6, 1, 1), mask_BH[:, :1]), seeded())


def test_imitation_learns_a_rule() -> None:
    policy = build(stirred=False, choices=(3,))
    seen = torch.randn(512, S, generator=seeded(1))
    right = seen[:, :3].argmax(1)
    examples = Examples(observation(seen), right[:, None, None].float(), torch.ones(512, 1, dtype=torch.bool))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        policy.supervised_loss(examples, seeded()).value.backward()
        optimizer.step()
    chosen = policy.act(observation(seen), tiny.draws(0, len(seen)), explore=False).action[:, 0, 0].long()
    assert float((chosen == right).float().mean()) > 0.95


# -- files and mistakes ------------------------------------------------------------------------------------------------


def test_a_saved_policy_loads_from_its_folder(tmp_path: Path) -> None:
    policy = build(action_dim=2, normalize=True, hidden=(8,))
    policy.adapt({"state": 3 + states(40)})
    policy.save(tmp_path / "policy")
    loaded = build(
        stirred=False, action_dim=2, normalize=True, hidden=(8,), checkpoint=str(tmp_path / "policy"), seed=7, log_std=-1
    )
    ours, theirs = (p.act(observation(states(5)), tiny.draws(2, 5), explore=True) for p in (policy, loaded))
    assert torch.equal(ours.action, theirs.action) and torch.equal(ours.log_probs_BK, theirs.log_probs_BK)
    assert ours.values_BV is not None and torch.equal(ours.values_BV, theirs.values_BV)


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_field(tmp_path: Path) -> None:
    build(choices=(2,), hidden=(8,)).save(tmp_path)
    with pytest.raises(MMRLError, match=r"policy\.hidden is \[9\], but .* was saved with \[8\]"):
        build(choices=(2,), hidden=(9,), checkpoint=str(tmp_path))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "checkpoint" not in saved and saved["choices"] == [2]
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(MMRLError, match=r"policy\.checkpoint = .* cannot be loaded as an MLP"):
        build(choices=(2,), hidden=(8,), checkpoint=str(tmp_path))
    with pytest.raises(MMRLError, match=r"policy\.checkpoint = .*nowhere"):
        build(choices=(2,), checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "give either action_dim"),
        ({"action_dim": 1, "choices": (2,)}, "give either action_dim"),
        ({"choices": ()}, "choices is empty"),
        ({"choices": (2,), "log_std": -1.0}, "log_std is not used"),
        ({"choices": (1,)}, "greater than or equal to 2"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        MLP.Config(S, **fields)


def test_observations_that_do_not_fit_end_in_a_sentence() -> None:
    policy = build(choices=(2,))
    with pytest.raises(MMRLError, match=r"policy\.state_dim is 4, but the environment's state has 3 numbers"):
        policy.act(observation(torch.zeros(2, 3)), tiny.draws(0, 2), explore=True)
    images = Observation({"front": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)}, None, ("", ""))
    with pytest.raises(MMRLError, match="needs a state"):
        policy.act(images, tiny.draws(0, 2), explore=True)


def test_fingerprints_tell_architectures_apart_and_not_starts() -> None:
    prints = [build(**fields).fingerprint() for fields in ({"choices": (2,)}, {"choices": (3,)}, {"action_dim": 1})]
    assert len(set(prints)) == 3
    assert build(action_dim=1, seed=4, log_std=-1.0).fingerprint() == prints[2]
