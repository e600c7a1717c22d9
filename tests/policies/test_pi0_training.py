"""What learns in a pi0 under each ``train``, where the critic's loss stops, how often the prefix is encoded, references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from policies.pi0 import Pi0
from policies.pi0_parts.options import CriticConfig
from tests.policies import tiny

PROJECTIONS = ("embed_action_time.", "action_out_proj.")


def with_gradient(policy: nn.Module, loss: Tensor) -> set[str]:
    """The parameters that a loss moves."""
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in policy.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}


def imitation(policy: Pi0) -> Tensor:
    return policy.supervised_loss(tiny.examples(5), tiny.generator(1)).value


def likelihood(policy: Pi0) -> Tensor:
    decision = policy.act(tiny.observation(5), tiny.draws(1), explore=True)
    with policy.compute_mode(train=True):
        return policy.evaluate(decision.trace).log_probs_NK.sum()


def value(policy: Pi0) -> Tensor:
    decision = policy.act(tiny.observation(5), tiny.draws(1), explore=True)
    with policy.compute_mode(train=True):
        values = policy.evaluate(decision.trace).values_NV
    assert values is not None
    return values.square().sum()


def named(policy: Pi0, keep: Callable[[str], bool]) -> set[str]:
    return {name for name, _ in policy.named_parameters() if keep(name)}


def is_expert(name: str) -> bool:
    """The expert and its projections; pi0 never reads the expert's own word embedding."""
    expert = name.startswith("model.model.dit.") and "embed_tokens" not in name
    return expert or name.startswith(tuple(f"model.{part}" for part in PROJECTIONS))


def is_read_by_the_expert(name: str) -> bool:
    """All of the vision-language model but what comes after the keys and values of its last layer (layer 1 of two)."""
    if not name.startswith("model.model.vlm."):
        return False
    after_last_keys = (".layers.1.self_attn.q_proj", ".layers.1.self_attn.o_proj", ".layers.1.mlp", ".layers.1.post_attention")
    return not ("language_model" in name and (any(part in name for part in after_last_keys) or "language_model.norm" in name))


@pytest.mark.parametrize("loss", [imitation, likelihood])
@pytest.mark.parametrize("cache_prefix", [True, False])
def test_train_expert_moves_the_expert_alone(architecture: str, loss: Callable[[Pi0], Tensor], cache_prefix: bool) -> None:
    policy = tiny.build(architecture, train="expert", critic=None, cache_prefix=cache_prefix)
    expected = named(policy, is_expert)
    assert len(expected) > 20
    assert with_gradient(policy, loss(policy)) == expected


@pytest.mark.parametrize("loss", [imitation, likelihood])
def test_train_all_reaches_the_prefix_through_its_keys_and_values(architecture: str, loss: Callable[[Pi0], Tensor]) -> None:
    policy = tiny.build(architecture, train="all", critic=None)
    expected = named(policy, is_expert) | named(policy, is_read_by_the_expert)
    for part in (
        "vision_tower",
        "multi_modal_projector",
        "language_model.embed_tokens",
        "language_model.layers.1.self_attn.k_proj",
    ):
        assert any(part in name for name in expected), part
    assert with_gradient(policy, loss(policy)) == expected


@pytest.mark.parametrize("loss", [imitation, likelihood])
def test_train_lora_moves_adapters_and_projections_alone(architecture: str, loss: Callable[[Pi0], Tensor]) -> None:
    policy = tiny.build(architecture, train="lora", critic=None)
    adapters = named(policy, lambda name: "lora_" in name and (is_expert(name) or is_read_by_the_expert(name)))
    projections = named(policy, lambda name: name.startswith(tuple(f"model.{part}" for part in PROJECTIONS)))
    assert any(".vlm." in name for name in adapters) and any(".dit." in name for name in adapters) and projections
    assert with_gradient(policy, loss(policy)) == adapters | projections


@pytest.mark.parametrize("train", ["expert", "all", "lora"])
def test_trainable_names_each_trained_parameter_once(architecture: str, train: str) -> None:
    policy = tiny.build(architecture, train=train, sampler="flow_noise")
    groups = policy.trainable()
    embedding = {"embedding"} if train == "all" else set()  # frozen otherwise
    assert set(groups) == {"actor", "critic", "noise_head"} | embedding
    listed = [id(p) for parameters in groups.values() for p in parameters]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in policy.parameters() if p.requires_grad}
    assert {id(p) for p in groups["critic"]} == {id(p) for p in policy.get_submodule("critic").parameters()}


def test_words_positions_and_patches_are_the_embedding_group(architecture: str) -> None:
    policy = tiny.build(architecture, train="all")
    listed = {id(p) for p in policy.trainable()["embedding"]}
    names = {name for name, p in policy.named_parameters() if id(p) in listed}
    ends = ("embed_tokens.weight", "position_embedding.weight", "patch_embedding.weight")
    assert sorted(end for name in names for end in ends if name.endswith(end)) == sorted(ends) and len(names) == 3
    assert not any(".dit." in name for name in names)


def test_random_weights_have_the_size_of_their_inputs(architecture: str) -> None:
    policy = Pi0(tiny.config(architecture, weights="random"), device=tiny.CPU)
    expected = {"embed_tokens.weight": None, "position_embedding.weight": 0.5, "down_proj.weight": None, "q_proj.weight": None}
    seen = set()
    for name, parameter in policy.model.named_parameters():
        end = next((end for end in expected if name.endswith(end) and ".vlm." in name), None)
        if end is not None:
            std = expected[end] or parameter.shape[1] ** -0.5
            assert float(parameter.detach().double().std()) == pytest.approx(std, rel=0.15), name
            seen.add(end)
    assert seen == expected.keys()


@pytest.mark.parametrize(("sampler", "critic"), [("flow_sde", None), ("ode", None), ("cps", None)])
def test_groups_that_cannot_learn_are_left_out(architecture: str, sampler: str, critic: None) -> None:
    assert set(tiny.build(architecture, sampler=sampler, critic=critic).trainable()) == {"actor"}


@pytest.mark.parametrize("sampler", ["flow_sde", "flow_noise"])
def test_likelihood_reaches_the_noise_head_of_flow_noise_alone(architecture: str, sampler: str) -> None:
    policy = tiny.build(architecture, sampler=sampler, critic=None)
    moved = with_gradient(policy, likelihood(policy))
    assert {name for name in moved if name.startswith("noise_head")} == (
        named(policy, lambda name: name.startswith("noise_head")) if sampler == "flow_noise" else set()
    )


# -- the critic's loss -------------------------------------------------------------------------------------------------


def is_critic(name: str) -> bool:
    return name.startswith("critic.")


@pytest.mark.parametrize("train", ["expert", "all"])
def test_a_detached_critic_teaches_its_head_alone(architecture: str, train: str) -> None:
    critic = CriticConfig(inputs=("prefix", "state_token", "suffix"), hidden=(16,))
    policy = tiny.build(architecture, critic=critic, train=train)
    assert with_gradient(policy, value(policy)) == named(policy, is_critic)


def test_an_attached_critic_teaches_the_expert(architecture: str) -> None:
    policy = tiny.build(architecture, critic=CriticConfig(inputs=("state_token",), hidden=(16,), detach=False))
    moved = with_gradient(policy, value(policy))
    assert named(policy, is_critic) < moved
    assert "model.embed_action_time.state_proj.weight" in moved and "model.model.dit.norm.weight" in moved
    # The state token sees no noisy action.
    assert not any("action_in_proj" in name or "action_time_mlp" in name or "action_out_proj" in name for name in moved)


def test_an_attached_critic_over_the_prefix_teaches_the_prefix(architecture: str) -> None:
    critic = CriticConfig(inputs=("prefix",), hidden=(16,), detach=False)
    policy = tiny.build(architecture, critic=critic, train="all")
    moved = with_gradient(policy, value(policy))
    assert any("language_model.norm" in name for name in moved)
    assert {name for name in moved if not is_critic(name)} == named(policy, lambda name: name.startswith("model.model.vlm."))


# -- how often the prefix is encoded -----------------------------------------------------------------------------------


@contextmanager
def counted(policy: Pi0) -> Iterator[list[int]]:
    """Grows by the batch size of every pass of the vision-language model."""
    passes: list[int] = []
    hook = policy.model.model.vlm.register_forward_hook(lambda *call: passes.append(len(call[2].last_hidden_state)))
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("train", ["expert", "all", "lora"])
def test_acting_encodes_the_prefix_once_for_all_steps(architecture: str, train: str, explore: bool) -> None:
    policy = tiny.build(architecture, train=train, denoising_steps=5)
    with counted(policy) as passes:
        policy.act(tiny.observation(5), tiny.draws(), explore=explore)
    assert passes == [5]


@pytest.mark.parametrize(
    ("train", "cache_prefix", "expected"),
    [("expert", True, []), ("expert", False, [5]), ("all", True, [5]), ("lora", True, [5])],
)
def test_scoring_encodes_the_prefix_only_where_it_must(
    architecture: str, train: str, cache_prefix: bool, expected: list[int]
) -> None:
    policy = tiny.build(architecture, train=train, cache_prefix=cache_prefix, stochastic_steps="all", denoising_steps=5)
    decision = policy.act(tiny.observation(5), tiny.draws(), explore=True)
    with counted(policy) as passes:
        policy.evaluate(decision.trace)
    assert passes == expected
    assert ("prefix_keys" in decision.trace) == (not expected)


def test_flow_samples_share_one_prefix(architecture: str) -> None:
    policy = tiny.build(architecture, train="all", flow_samples=4)
    with counted(policy) as passes:
        imitation(policy)
    assert passes == [5]


def test_both_traces_lead_to_the_same_gradient(architecture: str) -> None:
    kept, encoded = (tiny.build(architecture, cache_prefix=cache, critic=None) for cache in (True, False))
    for policy in (kept, encoded):
        likelihood(policy).backward()
    for (name, one), (_, other) in zip(kept.named_parameters(), encoded.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


# -- references --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["expert", "lora"])
def test_a_reference_is_frozen_and_stays_as_it_was(architecture: str, train: str) -> None:
    policy = tiny.build(architecture, train=train)
    reference = policy.reference()
    decision = policy.act(tiny.observation(5), tiny.draws(), explore=True)
    assert not any(p.requires_grad for p in reference.parameters())
    assert any(p.requires_grad for p in policy.parameters())
    before = reference.evaluate(decision.trace).log_probs_NK
    assert torch.equal(before, decision.log_probs_BK) and not before.requires_grad
    with torch.no_grad():
        for parameters in policy.trainable().values():
            for parameter in parameters:
                parameter += 0.1
    assert torch.equal(reference.evaluate(decision.trace).log_probs_NK, before)
    assert (policy.evaluate(decision.trace).log_probs_NK - before).abs().max() > 1e-3
