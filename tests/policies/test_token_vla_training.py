"""What learns in a token VLA, and that it does: imitation to the last token, PPO towards what is rewarded, the critic's reach."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mmrl.algorithms.ppo import PPO
from mmrl.protocols import LossContext
from mmrl.types import Batch, Examples
from policies.shared.adapters import LoraOptions
from policies.token_vla import TokenVLA
from policies.token_vla_parts.options import CriticConfig
from tests.policies import tiny, tiny_vla

CRITIC = CriticConfig(hidden=(8,))


@pytest.fixture(scope="module", params=tiny_vla.WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vla.write(tmp_path_factory.mktemp(request.param), request.param)


def with_gradient(policy: nn.Module, loss: Tensor) -> set[str]:
    """The parameters that a loss moves."""
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in policy.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}


def imitation(policy: TokenVLA) -> Tensor:
    return policy.supervised_loss(tiny_vla.examples(5), tiny.generator()).value


def likelihood(policy: TokenVLA) -> Tensor:
    decision = policy.act(tiny_vla.observation(5), tiny.draws(1), explore=True)
    return policy.evaluate(decision.trace).log_probs_NK.sum()


def value(policy: TokenVLA) -> Tensor:
    decision = policy.act(tiny_vla.observation(5), tiny.draws(1), explore=True)
    values = policy.evaluate(decision.trace).values_NV
    assert values is not None
    return values.square().sum()


# -- what learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [imitation, likelihood])
def test_train_all_reaches_every_weight(folder: str, loss: object) -> None:
    policy = tiny_vla.build(folder, critic=None)
    expected = {name for name, _ in policy.named_parameters()}
    # The softmax does not see what is added to all keys of a head alike: a bias of keys learns by rounding alone, if at all.
    idle = {name for name in expected if name.endswith(("k_proj.bias", "qkv.bias"))}
    assert with_gradient(policy, loss(policy)) | idle == expected  # type: ignore[operator]


@pytest.mark.parametrize("loss", [imitation, likelihood])
def test_train_lora_moves_adapters_alone(folder: str, loss: object) -> None:
    policy = tiny_vla.build(folder, train="lora", critic=None)
    adapters = {name for name, _ in policy.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 7 * 2  # two layers of seven linear maps, each with two factors
    last_queries = {name for name in adapters if "layers.1." in name and "q_proj" in name}
    assert adapters - last_queries <= with_gradient(policy, loss(policy)) <= adapters  # type: ignore[operator]


@pytest.mark.parametrize("train", ["all", "lora"])
def test_trainable_names_each_trained_parameter_once(folder: str, train: str) -> None:
    policy = tiny_vla.build(folder, train=train, critic=CRITIC)
    groups = policy.trainable()
    assert set(groups) == {"actor", "critic"} | ({"embedding"} if train == "all" else set())
    listed = [id(p) for parameters in groups.values() for p in parameters]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in policy.parameters() if p.requires_grad}
    assert {id(p) for p in groups["critic"]} == {id(p) for p in policy.get_submodule("critic").parameters()}


def test_embeddings_and_the_head_are_a_group_of_their_own(folder: str) -> None:
    policy = tiny_vla.build(folder)
    listed = {id(p) for p in policy.trainable()["embedding"]}
    names = {name for name, p in policy.named_parameters() if id(p) in listed}
    assert any(name.endswith("embed_tokens.weight") for name in names), "words; the head is tied to them"
    assert any("patch_embed" in name for name in names)
    assert not any("proj.weight" in name and "patch" not in name for name in names)


@pytest.mark.parametrize("source", ["prompt", "first_action"])
def test_a_detached_critic_s_loss_stops_at_the_head(folder: str, source: str) -> None:
    for detach in (True, False):
        policy = tiny_vla.build(folder, critic=CriticConfig(input=source, hidden=(8,), detach=detach))  # type: ignore[arg-type]
        moved = with_gradient(policy, value(policy))
        head = {name for name, _ in policy.named_parameters() if name.startswith("critic")}
        assert head <= moved
        assert (moved == head) is detach


def test_modes_change_nothing(folder: str) -> None:
    policy = tiny_vla.build(folder)
    before = likelihood(policy)
    policy.train()
    assert torch.equal(likelihood(policy), before) and not policy.model.training


# -- imitation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "chunk"])
def test_the_loss_is_the_mean_surprise_at_real_actions_in_dimensions_that_vary(folder: str, granularity: str) -> None:
    policy = tiny_vla.build(folder, granularity=granularity, dtype="float64")
    examples = tiny_vla.examples(5)
    assert not examples.mask_BH.all() and policy.action_bins is not None
    tokens = policy.action_bins.encode(examples.actions_BHA).flatten(1)
    scoring = tiny_vla.build(folder, granularity="token", execute=tiny_vla.CHUNK, dtype="float64")
    log_probs_BK = scoring.evaluate({**policy._inputs(examples.observation), "bins": tokens}).log_probs_NK
    surprises = [
        -float(log_probs_BK[b, h * tiny_vla.ACTION + a].detach())
        for b, h, a in itertools.product(range(5), range(tiny_vla.CHUNK), range(tiny_vla.ACTION))
        if examples.mask_BH[b, h] and a != 2  # the third dimension never varies
    ]
    loss = policy.supervised_loss(examples, tiny.generator())
    assert float(loss.value.detach()) == pytest.approx(sum(surprises) / len(surprises), rel=1e-6)


def test_what_follows_the_end_of_a_demonstration_does_not_matter(folder: str) -> None:
    policy = tiny_vla.build(folder)
    examples = tiny_vla.examples(5)
    other = examples.actions_BHA.clone()
    other[~examples.mask_BH] = 0.9
    before = policy.supervised_loss(examples, tiny.generator()).value
    after = policy.supervised_loss(replace(examples, actions_BHA=other), tiny.generator()).value
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_it_learns_a_handful_of_examples_by_heart(folder: str) -> None:
    """Cross entropy goes to zero, and greedy decoding gives the demonstrated actions, up to their bins."""
    policy = TokenVLA(tiny_vla.config(folder, execute=tiny_vla.CHUNK, critic=None), device=tiny.CPU)
    examples = tiny_vla.examples(5, ended=False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(120):
        loss = policy.supervised_loss(examples, tiny.generator())
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    last = policy.supervised_loss(examples, tiny.generator())
    assert float(last.value.detach()) < 0.02 and float(last.metrics["token_accuracy"]) == 1
    acted = policy.act(examples.observation, tiny.draws(0), explore=False).action
    assert policy.action_bins is not None
    assert torch.equal(acted, policy.action_bins.decode(policy.action_bins.encode(examples.actions_BHA)))
    low, high = (torch.tensor(x) for x in (tiny_vla.STATISTICS.actions_q01, tiny_vla.STATISTICS.actions_q99))
    assert ((acted - examples.actions_BHA).abs() <= (high - low) / (tiny_vla.BINS - 1) / 2 + 1e-5).all()


def test_statistics_come_from_real_actions(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_vla.write(tmp_path_factory.mktemp("bare"), "paligemma", statistics=False)
    policy = tiny_vla.build(folder, state="bins")
    assert policy.needs_statistics()
    examples = tiny_vla.examples(5)
    wild = examples.actions_BHA.clone()
    wild[~examples.mask_BH] = 100.0
    policy.fit_statistics(Examples(examples.observation, wild, examples.mask_BH))
    assert not policy.needs_statistics() and policy.statistics is not None
    assert max(policy.statistics.actions_q99) < 3
    assert policy.statistics.actions_choices == ((), (0.0, 1.0), (0.25,), ())
    assert policy.statistics.state_q01 is not None and len(policy.statistics.state_q01) == tiny_vla.STATE
    assert policy.supervised_loss(examples, tiny.generator()).value.isfinite()


# -- reinforcement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "action", "chunk"])
def test_ppo_makes_what_is_rewarded_likelier(folder: str, granularity: str) -> None:
    """A bandit: 1 where the first number of the first action is high. Its probability and the critic's value go up."""
    fields = {"granularity": granularity, "execute": 1, "critic": CRITIC, "cameras": ("front",)}
    policy = TokenVLA(tiny_vla.config(folder, **fields), device=tiny.CPU)
    algorithm = PPO(PPO.Config())
    rows = 40
    seen = tiny_vla.observation(5).select(torch.arange(rows) % 5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    wins, values = [], []
    for iteration in range(12):
        decision = policy.act(seen, tiny.draws(iteration, rows), explore=True)
        assert decision.values_BV is not None
        reward_N = (decision.action[:, 0, 0] > 0.25).float()
        wins.append(float(reward_N.mean()))
        values.append(float(decision.values_BV.mean()))
        reward_NJ = reward_N[:, None]
        advantages_NJ = reward_NJ - reward_NJ.mean()
        batch = Batch(decision.trace, decision.log_probs_BK, decision.mask_BK, advantages_NJ, reward_NJ, decision.values_BV)
        for _ in range(2):
            units = int(batch.mask_NK.sum())
            loss = algorithm.loss(
                policy, batch, LossContext(units=units, values=rows, samples=rows, iteration=iteration, advantage_std=0.5)
            )
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
    assert wins[0] < 0.75 and wins[-1] > 0.9, wins
    assert values[0] == 0 and values[-1] > 0.5, values


@pytest.mark.parametrize("granularity", ["token", "action", "chunk"])
def test_units_are_sums_of_tokens(folder: str, granularity: str) -> None:
    decision = tiny_vla.build(folder, granularity=granularity).act(tiny_vla.observation(5), tiny.draws(1), explore=True)
    single = tiny_vla.build(folder).act(tiny_vla.observation(5), tiny.draws(1), explore=True)
    assert torch.equal(decision.action, single.action)
    sizes = {"token": 1, "action": tiny_vla.ACTION, "chunk": tiny_vla.EXECUTE * tiny_vla.ACTION}
    pieces = single.log_probs_BK.split(sizes[granularity], 1)
    torch.testing.assert_close(decision.log_probs_BK, torch.stack([piece.sum(1) for piece in pieces], 1))
    choice = torch.tensor([True, True, False, True]).repeat(tiny_vla.EXECUTE)  # the third dimension never varies
    assert torch.equal(decision.mask_BK, choice.expand(5, -1) if granularity == "token" else decision.mask_BK.fill_(True))
    assert (single.log_probs_BK[:, ~choice] == 0).all() and (single.log_probs_BK[:, choice] < 0).all()


def test_fewer_executed_actions_are_the_first_of_the_chunk(folder: str) -> None:
    seen = tiny_vla.observation(5)
    one, three = (tiny_vla.build(folder, execute=n).act(seen, tiny.draws(1), explore=True) for n in (1, 3))
    assert one.action.shape == (5, 1, tiny_vla.ACTION) and three.action.shape == (5, 3, tiny_vla.ACTION)
    assert torch.equal(one.action, three.action[:, :1])
    torch.testing.assert_close(one.log_probs_BK, three.log_probs_BK[:, : tiny_vla.ACTION])


def test_adapters_options_reach_peft(folder: str) -> None:
    policy = tiny_vla.build(folder, train="lora", lora=LoraOptions(rank=3, alpha=6, modules=r".*language_model.*\.q_proj"))
    shapes = {tuple(p.shape) for name, p in policy.named_parameters() if "lora_A" in name}
    assert shapes == {(3, 32)}
