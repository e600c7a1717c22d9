"""What a pi0 carries between processes: weights, heads, adapters, statistics; how it starts; what it refuses, in a sentence."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import PI0ForConditionalGeneration

from mmrl.errors import MMRLError
from mmrl.types import Decision, Examples, Observation
from policies.pi0 import Pi0
from policies.pi0_parts.options import CriticConfig, LoraOptions
from policies.pi0_parts.weights import Statistics
from policies.shared.checkpoints import HEADS_FILE
from tests.policies import tiny


def decide(policy: Pi0, *, explore: bool) -> Decision:
    return policy.act(tiny.observation(5), tiny.draws(1), explore=explore)


def reopened(folder: Path, **fields: Any) -> Pi0:
    """The saved policy as a fresh process would build it."""
    return Pi0(tiny.config(str(folder), weights="pretrained", **fields), device=tiny.CPU)


# -- save and load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("train", ["expert", "all"])
def test_a_saved_policy_acts_the_same(architecture: str, tmp_path: Path, train: str, dtype: str) -> None:
    policy = tiny.build(architecture, train=train, dtype=dtype, sampler="flow_noise")
    policy.save(tmp_path)
    twin = reopened(tmp_path, train=train, dtype=dtype, sampler="flow_noise")
    # transformers rounds one constant of the word embedding (its scale) differently when it loads in float64.
    error = 1e-5 if dtype == "float64" else 0
    same = functools.partial(torch.testing.assert_close, rtol=error, atol=error)
    for explore in (False, True):
        ours, theirs = decide(policy, explore=explore), decide(twin, explore=explore)
        same(ours.action, theirs.action)
        same(ours.log_probs_BK, theirs.log_probs_BK)
    assert ours.values_BV is not None and theirs.values_BV is not None
    same(ours.values_BV, theirs.values_BV)


def test_nothing_is_pickled(architecture: str, tmp_path: Path) -> None:
    tiny.build(architecture).save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}


def test_heads_of_another_kind_start_afresh(architecture: str, tmp_path: Path) -> None:
    policy = tiny.build(architecture, critic=CriticConfig(inputs=("state_token",), hidden=(16,)))
    policy.save(tmp_path)
    for other in (CriticConfig(inputs=("suffix",), hidden=(16,)), CriticConfig(inputs=("state_token",), hidden=(8,))):
        values = decide(reopened(tmp_path, critic=other), explore=True).values_BV
        assert values is not None and torch.equal(values, torch.zeros(5, 1))
    reopened(tmp_path, critic=None).save(tmp_path)
    assert not (tmp_path / HEADS_FILE).exists()


def test_damaged_heads_are_named(architecture: str, tmp_path: Path) -> None:
    tiny.build(architecture).save(tmp_path)
    (tmp_path / HEADS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{not a header}")
    with pytest.raises(MMRLError, match=rf"{HEADS_FILE}: the saved heads cannot be read .*delete it"):
        reopened(tmp_path)


@pytest.mark.parametrize("fields", [{"train": "lora"}, {"sampler": "flow_noise"}, {"critic": None}], ids=str)
def test_a_state_dict_carries_everything(architecture: str, fields: dict[str, Any]) -> None:
    policy = tiny.build(architecture, **fields)
    twin = Pi0(tiny.config(architecture, seed=9, **fields), device=tiny.CPU)
    assert not torch.equal(decide(twin, explore=True).action, decide(policy, explore=True).action)
    twin.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    ours, theirs = decide(policy, explore=True), decide(twin, explore=True)
    assert torch.equal(ours.action, theirs.action) and torch.equal(ours.log_probs_BK, theirs.log_probs_BK)
    if ours.values_BV is not None:
        assert theirs.values_BV is not None and torch.equal(ours.values_BV, theirs.values_BV)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_are_merged_when_saved(architecture: str, tmp_path: Path) -> None:
    policy, plain = tiny.build(architecture, train="lora"), tiny.build(architecture)
    before = decide(policy, explore=False).action
    assert (before - decide(plain, explore=False).action).abs().max() > 1e-3, "adapters that do nothing would pass"
    policy.save(tmp_path)
    plain.save(tmp_path / "plain")
    weights = "model.safetensors"
    assert load_file(tmp_path / weights).keys() == load_file(tmp_path / "plain" / weights).keys()
    after = decide(reopened(tmp_path), explore=False).action
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(decide(policy, explore=False).action, before), "saving changed the policy"
    assert any("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_fresh_adapters_change_nothing_and_come_from_the_seed(architecture: str) -> None:
    plain = Pi0(tiny.config(architecture), device=tiny.CPU)
    torch.manual_seed(1)
    first = Pi0(tiny.config(architecture, train="lora"), device=tiny.CPU)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn), "building a policy used up the global generator"
    second = Pi0(tiny.config(architecture, train="lora"), device=tiny.CPU)
    assert torch.equal(decide(first, explore=False).action, decide(plain, explore=False).action)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    third = Pi0(tiny.config(architecture, train="lora", seed=5), device=tiny.CPU)
    names = [name for name, _ in first.named_parameters() if "lora_A" in name]
    assert names and all(not torch.equal(first.get_parameter(name), third.get_parameter(name)) for name in names)


def test_low_precision_keeps_the_frequencies_of_time_and_position(architecture: str) -> None:
    """In bfloat16 a frequency of 1571 would be off by 3, which scrambles the time embedding near t = 1."""
    exact, rounded = (
        dict(Pi0(tiny.config(architecture, dtype=d), device=tiny.CPU).named_buffers()) for d in ("float32", "bfloat16")
    )
    assert any("sinusoid_freq" in name for name in exact) and any("inv_freq" in name for name in exact)
    for name, buffer in exact.items():
        assert torch.equal(rounded[name], buffer), name


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_are_mean_and_std_of_real_actions(tmp_path: Path) -> None:
    policy = tiny.build(tiny.write_architecture(tmp_path, statistics=False))
    assert policy.needs_statistics()
    examples = tiny.examples(5)
    policy.fit_statistics(examples)
    assert not policy.needs_statistics() and policy.statistics is not None
    for d in range(tiny.ACTION):
        kept = [float(examples.actions_BHA[b, h, d]) for b in range(5) for h in range(tiny.HORIZON) if examples.mask_BH[b, h]]
        mean = sum(kept) / len(kept)
        std = (sum((x - mean) ** 2 for x in kept) / (len(kept) - 1)) ** 0.5
        assert policy.statistics.actions_mean[d] == pytest.approx(mean, rel=1e-6)
        assert policy.statistics.actions_std[d] == pytest.approx(std, rel=1e-6)
    assert examples.observation.state is not None
    assert policy.statistics.state_mean == pytest.approx(examples.observation.state.double().mean(0).tolist())


def test_a_constant_dimension_keeps_its_scale() -> None:
    data = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert Statistics.fit(data, data).actions_std == pytest.approx((2**0.5, 1.0))


def test_normalisation_and_its_inverse_cancel(architecture: str) -> None:
    policy = tiny.build(architecture, dtype="float64")
    actions = torch.randn(5, tiny.EXECUTE, tiny.ACTION, dtype=torch.float64)
    there = policy._normalize(actions, "actions")
    assert (there - actions).abs().max() > 0.1
    torch.testing.assert_close(policy._actions(there), actions)


def test_statistics_travel_to_the_last_bit(architecture: str, tmp_path: Path) -> None:
    policy = tiny.build(architecture, dtype="float64")
    exact = Statistics((1 / 3, 0.1, 1e-17, -2.0), (1 / 7, 1.0, 1e9, 3.0), (2 / 3, 1 / 9, 0.0), (1 / 11, 1.0, 0.3))
    policy.statistics = exact
    policy.save(tmp_path)
    assert reopened(tmp_path, dtype="float64").statistics == exact
    twin = tiny.build(architecture, dtype="float64")
    twin.load_state_dict(policy.state_dict())
    assert twin.statistics == exact
    policy.statistics = None
    twin.load_state_dict(policy.state_dict())
    assert twin.needs_statistics()


def test_statistics_of_transformers_processor_are_read(tmp_path: Path) -> None:
    folder = tiny.write_architecture(tmp_path, statistics=False)
    numbers = {"state_mean": [0, 1, 2, 3], "state_std": [1, 1, 1, 2], "actions_mean": [0, 0, 5], "actions_std": [1, 2, 3]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"chunk_size": 4, **numbers}))
    policy = tiny.build(folder, action_dim=None)
    assert policy.action_dim == 3 and policy.statistics is not None and policy.statistics.actions_mean == (0.0, 0.0, 5.0)


def test_fewer_action_dimensions_than_statistics_are_the_first_ones(architecture: str) -> None:
    policy = tiny.build(architecture, action_dim=2)
    full = tiny.build(architecture)
    ours, theirs = decide(policy, explore=False).action, decide(full, explore=False).action
    assert ours.shape == (5, tiny.EXECUTE, 2) and torch.equal(ours, theirs[..., :2])
    assert policy.supervised_loss(tiny.examples(5), tiny.generator()).value.isfinite()


def test_actions_of_another_robot_are_not_cut_to_size(architecture: str) -> None:
    for action_dim in (2, None):
        policy = tiny.build(architecture, action_dim=action_dim)
        with pytest.raises(MMRLError, match=rf"was trained with {tiny.ACTION} numbers of actions, but the examples have 7"):
            policy.supervised_loss(tiny.examples(5, dim=7), tiny.generator())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sampler": "flow_sde", "noise_level": None}, "noise_level must be above 0 with sampler 'flow_sde'"),
        ({"sampler": "cps", "noise_level": 0.0}, "noise_level must be above 0 with sampler 'cps'"),
        ({"sampler": "cps", "noise_level": 1.1}, "noise_level must be at most 1 with sampler 'cps'"),
        ({"sampler": "ode", "noise_level": 0.5}, "noise_level is not used by sampler 'ode'; remove it"),
        ({"sampler": "flow_noise", "noise_level": 0.5}, "noise_level is not used by sampler 'flow_noise'; remove it"),
        ({"noise_std_range": (0.2, 0.1)}, "noise_std_range must be two positive numbers, low and high"),
        (
            {"denoising_steps": 1, "train_last_step": False},
            "denoising_steps must be at least 2, because train_last_step is false",
        ),
        ({"denoising_steps": 1, "sampler": "cps"}, "denoising_steps must be at least 2, because the last step of sampler 'cps'"),
        ({"granularity": "step", "step_reduction": "mean"}, "step_reduction is not used with granularity 'step'"),
        ({"cameras": ()}, "cameras must name at least one camera"),
        ({"execute": 0}, "greater than or equal to 1"),
        ({"denoising_steps": 0}, "greater than or equal to 1"),
        ({"flow_samples": 0}, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        tiny.config("nowhere", **fields)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"execute": 5}, "policy.execute = 5 is more than the 4 actions that"),
        ({"action_dim": 4}, "policy.action_dim = 4 is more than the 3 dimensions that"),
        (
            {"train": "lora", "lora": LoraOptions(modules="nothing_like_it")},
            "policy.lora.modules = 'nothing_like_it' fits no layer",
        ),
    ],
)
def test_policies_that_do_not_fit_their_checkpoint_are_refused(architecture: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MMRLError) as caught:
        Pi0(tiny.config(architecture, **fields), device=tiny.CPU)
    assert sentence in str(caught.value)


def test_a_checkpoint_without_statistics_must_be_told_the_action_size(tmp_path: Path) -> None:
    folder = tiny.write_architecture(tmp_path, statistics=False)
    with pytest.raises(MMRLError, match=r"has no statistics, so the action size is unknown: set policy\.action_dim"):
        Pi0(tiny.config(folder, action_dim=None), device=tiny.CPU)
    with pytest.raises(MMRLError, match=r"policy\.action_dim = 7 is more than the 6 dimensions"):
        Pi0(tiny.config(folder, action_dim=7), device=tiny.CPU)
    policy = tiny.build(folder)
    with pytest.raises(MMRLError, match="has no statistics: fit_statistics must see data before training"):
        policy.supervised_loss(tiny.examples(5), tiny.generator())
    with pytest.raises(MMRLError, match=r"policy\.action_dim = 3, but the examples' actions have 2 dimensions"):
        policy.fit_statistics(tiny.examples(5, dim=2))


@pytest.mark.parametrize("what", ["checkpoint", "tokenizer", "statistics"])
def test_a_folder_that_is_no_pi0_is_named(architecture: str, tmp_path: Path, what: str) -> None:
    sentences = {
        "checkpoint": "cannot be loaded as a pi0",
        "tokenizer": "no tokenizer could be loaded from there",
        "statistics": "not a valid statistics file",
    }
    tiny.write_architecture(tmp_path)
    if what == "checkpoint":
        (tmp_path / "config.json").unlink()
    elif what == "tokenizer":
        (tmp_path / "tokenizer.json").unlink()
    else:
        (tmp_path / "statistics.json").write_text("{half")
    with pytest.raises(MMRLError) as caught:
        Pi0(tiny.config(str(tmp_path)), device=tiny.CPU)
    assert sentences[what] in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_built(
    tmp_path: Path, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    monkeypatch.setattr(PI0ForConditionalGeneration, "__init__", lambda self, config, *_: built.append(config))
    folder = tiny.write_architecture(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "paligemma"}))
    with pytest.raises(MMRLError, match=r"policy\.checkpoint = .*: is a paligemma, not a pi0; name one that is"):
        Pi0(tiny.config(folder, weights=weights), device=tiny.CPU)
    assert not built


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(MMRLError, match="is no folder here, and as a hub id it cannot be loaded as a pi0"):
        Pi0(tiny.config(str(tmp_path / "nowhere")), device=tiny.CPU)
    (tmp_path / "run/policy").mkdir(parents=True)
    with pytest.raises(MMRLError, match=r"it is a run's, whose policy is .*run/policy$"):
        Pi0(tiny.config(str(tmp_path / "run"), weights="pretrained"), device=tiny.CPU)


def altered(**fields: Any) -> Observation:
    return replace(tiny.observation(5), **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"images": {"front": tiny.observation(5).images["front"]}}, "policy.cameras names 'wrist', but the environment shows"),
        ({"state": None}, "pi0 needs the robot's state, but the environment's observation has none"),
        ({"state": torch.zeros(5, 3)}, "was trained with 4 numbers of state, but here are 3"),
        ({"instructions": ("go " * 11,) * 5}, "has 13 tokens, more than policy.max_text_tokens = 12: raise it"),
    ],
    ids=["camera", "no state", "state size", "instruction"],
)
def test_observations_that_do_not_fit_are_refused(architecture: str, fields: dict[str, Any], sentence: str) -> None:
    policy = tiny.build(architecture)
    with pytest.raises(MMRLError) as caught:
        policy.act(altered(**fields), tiny.draws(), explore=False)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_state_wider_than_the_network_takes_is_refused(tmp_path: Path) -> None:
    policy = tiny.build(tiny.write_architecture(tmp_path, statistics=False))
    with pytest.raises(MMRLError, match=r"state has 6 numbers, but .* takes at most 5"):
        policy.act(altered(state=torch.zeros(5, 6)), tiny.draws(), explore=False)


def test_examples_without_a_state_are_refused(architecture: str) -> None:
    examples = tiny.examples(5)
    blind = Examples(altered(state=None), examples.actions_BHA, examples.mask_BH)
    with pytest.raises(MMRLError, match="pi0 needs the robot's state, but the examples have none"):
        tiny.build(architecture).fit_statistics(blind)


def test_a_policy_without_critic_says_so(architecture: str) -> None:
    policy = tiny.build(architecture, critic=None)
    assert not policy.has_critic
    with pytest.raises(MMRLError, match=r"policy\.critic is null"):
        policy.value(tiny.observation(5), tiny.draws())


@pytest.mark.parametrize(
    ("fields", "lacking"),
    [({"sampler": "ode"}, {"likelihood"}), ({"critic": None}, {"critic"}), ({}, set()), ({"sampler": "flow_noise"}, set())],
)
def test_a_config_says_what_it_cannot_give(fields: dict[str, Any], lacking: set[str]) -> None:
    found = Pi0.lacks(tiny.config("nowhere", **fields))
    assert set(found) == lacking
    assert all(field in Pi0.Config.__dataclass_fields__ for field, _ in found.values())


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ({"expert_width": 48}, {}),
        ({"chunk_size": 6}, {}),
        ({"max_action_dim": 8}, {}),
        ({}, {"train": "lora"}),
        ({}, {"action_dim": 2}),
        ({}, {"critic": None}),
        ({}, {"critic": CriticConfig(inputs=("suffix",))}),  # as large as the default, but another function
    ],
    ids=str,
)
def test_fingerprints_tell_policies_apart(
    architecture: str, tmp_path: Path, sizes: dict[str, int], fields: dict[str, Any]
) -> None:
    base = Pi0(tiny.config(architecture), device=tiny.CPU)
    same = Pi0(tiny.config(architecture, seed=4, sampler="flow_noise"), device=tiny.CPU)
    other = Pi0(tiny.config(tiny.write_architecture(tmp_path, statistics=True, **sizes), **fields), device=tiny.CPU)
    assert base.fingerprint() == same.fingerprint() != other.fingerprint()
