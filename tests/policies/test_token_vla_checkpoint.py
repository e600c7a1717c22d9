"""What a token VLA carries between processes: weights, critic, adapters, statistics; where its tokens lie; what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from mmrl.errors import MMRLError
from mmrl.types import Decision, Examples, Observation
from policies.shared.adapters import LoraOptions
from policies.shared.checkpoints import HEADS_FILE, STATISTICS_FILE
from policies.token_vla import TokenVLA
from policies.token_vla_parts.options import CriticConfig
from tests.policies import tiny, tiny_vla


@pytest.fixture(scope="module", params=tiny_vla.WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vla.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vla.write(tmp_path_factory.mktemp("paligemma"), "paligemma")


def decide(policy: TokenVLA, *, explore: bool = True) -> Decision:
    return policy.act(tiny_vla.observation(5), tiny.draws(1), explore=explore)


def reopened(folder: Path, **fields: Any) -> TokenVLA:
    """The saved policy as a fresh process would build it."""
    return TokenVLA(tiny_vla.config(str(folder), weights="pretrained", **fields), device=tiny.CPU)


def assert_same(ours: Decision, theirs: Decision) -> None:
    assert torch.equal(ours.action, theirs.action) and torch.equal(ours.log_probs_BK, theirs.log_probs_BK)
    assert (ours.values_BV is None) == (theirs.values_BV is None)
    if ours.values_BV is not None and theirs.values_BV is not None:
        assert torch.equal(ours.values_BV, theirs.values_BV)


# -- save and load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_policy_acts_the_same(folder: str, tmp_path: Path, dtype: str) -> None:
    policy = tiny_vla.build(folder, dtype=dtype, state="bins")
    policy.save(tmp_path)
    twin = reopened(tmp_path, dtype=dtype, state="bins")
    assert twin.statistics == policy.statistics and twin.fingerprint() == policy.fingerprint()
    for explore in (False, True):
        assert_same(decide(twin, explore=explore), decide(policy, explore=explore))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}, "nothing is pickled"


def test_low_precision_scores_again_what_it_drew(folder: str) -> None:
    policy = tiny_vla.build(folder, dtype="bfloat16")
    decision = decide(policy)
    scored = policy.evaluate(decision.trace)
    assert torch.equal(scored.log_probs_NK, decision.log_probs_BK) and scored.log_probs_NK.dtype == torch.float32


def test_adapters_are_merged_when_saved(folder: str, tmp_path: Path) -> None:
    policy, plain = tiny_vla.build(folder, train="lora"), tiny_vla.build(folder)
    before = decide(policy).log_probs_BK
    assert (before - decide(plain).log_probs_BK).abs().max() > 1e-3, "adapters that do nothing would pass"
    policy.save(tmp_path)
    plain.save(tmp_path / "plain")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(tmp_path / "plain" / "model.safetensors").keys()
    torch.testing.assert_close(decide(reopened(tmp_path)).log_probs_BK, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(decide(policy).log_probs_BK, before), "saving changed the policy"


def test_a_critic_of_another_kind_starts_afresh(paligemma: str, tmp_path: Path) -> None:
    tiny_vla.build(paligemma, critic=CriticConfig(hidden=(16,))).save(tmp_path)
    for other in (CriticConfig(input="first_action", hidden=(16,)), CriticConfig(hidden=(8,))):
        values = decide(reopened(tmp_path, critic=other)).values_BV
        assert values is not None and torch.equal(values, torch.zeros(5, 1))
    reopened(tmp_path, critic=None).save(tmp_path)
    assert not (tmp_path / HEADS_FILE).exists()


def test_a_state_dict_carries_the_statistics(folder: str, tmp_path: Path) -> None:
    policy = tiny_vla.build(folder, state="bins")
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / STATISTICS_FILE).unlink()
    twin = TokenVLA(tiny_vla.config(str(bare), state="bins", seed=9), device=tiny.CPU)
    assert twin.needs_statistics()
    twin.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    assert not twin.needs_statistics() and twin.statistics == policy.statistics
    assert_same(decide(twin), decide(policy))


def test_building_leaves_the_global_generator_alone_and_follows_the_seed(folder: str) -> None:
    torch.manual_seed(1)
    first = TokenVLA(tiny_vla.config(folder, train="lora"), device=tiny.CPU)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    second, other = (TokenVLA(tiny_vla.config(folder, train="lora", seed=seed), device=tiny.CPU) for seed in (0, 5))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    changed = {name for name, p in first.named_parameters() if not torch.equal(p, other.get_parameter(name))}
    assert any("lora_A" in name for name in changed) and any("embed_tokens" in name for name in changed)
    assert any(name.startswith("critic.net") for name in changed)


def test_random_weights_have_the_size_of_their_inputs(folder: str) -> None:
    policy = TokenVLA(tiny_vla.config(folder), device=tiny.CPU)
    for name, parameter in policy.model.named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            assert float(parameter.detach().std()) == pytest.approx(parameter.shape[1] ** -0.5, rel=0.15), name


# -- where the tokens lie ----------------------------------------------------------------------------------------------


def test_the_vocabulary_may_end_with_the_tokenizer_or_with_the_head(tmp_path: Path) -> None:
    """A head with 40 rows more than the tokenizer has entries, as padded vocabularies have."""
    folder = Path(tiny_vla.write(tmp_path / "qwen", "qwen"))
    raw = json.loads((folder / "config.json").read_text())
    entries = raw["text_config"]["vocab_size"]
    raw["text_config"]["vocab_size"] = entries + 40
    (folder / "config.json").write_text(json.dumps(raw))
    for end, last in (("tokenizer", entries), ("head", entries + 40)):
        policy = tiny_vla.build(str(folder), vocabulary_end=end)
        assert policy._backbone.ids(torch.tensor([0, 1, tiny_vla.BINS - 1])).tolist() == [
            last - 1,
            last - 2,
            last - tiny_vla.BINS,
        ]
        decision = decide(policy)
        assert torch.equal(policy.evaluate(decision.trace).log_probs_NK, decision.log_probs_BK)


def test_bins_that_reach_into_special_tokens_are_refused(tmp_path: Path) -> None:
    folder = tiny_vla.write(tmp_path, "paligemma")
    with pytest.raises(MMRLError, match=r"the last 28 tokens of the vocabulary include special ones; try policy\.vocabulary_end"):
        TokenVLA(tiny_vla.config(folder, bins=28), device=tiny.CPU)
    with pytest.raises(MMRLError, match=r"policy\.bins = 300 does not fit into the 30 entries"):
        TokenVLA(tiny_vla.config(folder, bins=300), device=tiny.CPU)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"execute": 4}, "execute = 4 is more than the chunk of 3 actions that are predicted"),
        ({"cameras": ()}, "cameras must name at least one camera"),
        ({"prompt": "do it"}, "prompt must say where the task's sentence goes: {instruction}"),
        ({"bins": 1}, "greater than or equal to 2"),
        ({"chunk": 0}, "greater than or equal to 1"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        tiny_vla.config("nowhere", **fields)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"action_dim": 5}, "policy.action_dim = 5, but the statistics are of actions with 4 dimensions"),
        ({"train": "lora", "lora": LoraOptions(modules="none_such")}, "policy.lora.modules = 'none_such' fits no layer"),
        ({"train": "lora", "lora": LoraOptions(modules=r".*(lm_head|q_proj)")}, "adapts the output head, which cannot be"),
    ],
)
def test_policies_that_do_not_fit_their_checkpoint_are_refused(paligemma: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MMRLError) as caught:
        TokenVLA(tiny_vla.config(paligemma, **fields), device=tiny.CPU)
    assert sentence in str(caught.value)


def test_without_a_critic_there_is_no_value(paligemma: str) -> None:
    policy = tiny_vla.build(paligemma, critic=None)
    assert not policy.has_critic and decide(policy).values_BV is None
    assert TokenVLA.lacks(policy.config) == {"critic": ("critic", "is null; give the policy one, or use grpo")}
    assert TokenVLA.lacks(tiny_vla.config(paligemma)) == {}
    with pytest.raises(MMRLError, match="the policy has no critic"):
        policy.value(tiny_vla.observation(5), tiny.draws(1))


def test_without_statistics_nothing_acts_or_learns(tmp_path: Path) -> None:
    folder = tiny_vla.write(tmp_path, "paligemma", statistics=False)
    with pytest.raises(MMRLError, match=r"has no statistics, so the action size is unknown: set policy\.action_dim"):
        TokenVLA(tiny_vla.config(folder, action_dim=None), device=tiny.CPU)
    policy = tiny_vla.build(folder)
    with pytest.raises(MMRLError, match="has no statistics: fit_statistics must see data first"):
        decide(policy)
    with pytest.raises(MMRLError, match="has no statistics: fit_statistics must see data first"):
        policy.supervised_loss(tiny_vla.examples(5), tiny.generator())
    examples = tiny_vla.examples(5)
    with pytest.raises(MMRLError, match=r"policy\.action_dim = 4, but the examples' actions have 3 dimensions"):
        policy.fit_statistics(Examples(examples.observation, examples.actions_BHA[..., :3], examples.mask_BH))


def test_states_that_are_not_there_are_named(paligemma: str, tmp_path: Path) -> None:
    policy = tiny_vla.build(paligemma, state="bins")
    seen = tiny_vla.observation(5)
    assert seen.state is not None
    blind = Observation(seen.images, None, seen.instructions)
    with pytest.raises(MMRLError, match=r"policy\.state is 'bins', but the environment's observation has no state"):
        policy.act(blind, tiny.draws(1), explore=True)
    with pytest.raises(MMRLError, match="trained with 3 numbers of state, but here are 2"):
        policy.act(Observation(seen.images, seen.state[:, :2], seen.instructions), tiny.draws(1), explore=True)
    assert tiny_vla.build(paligemma).act(blind, tiny.draws(1), explore=True).action.isfinite().all()
    folder = Path(tiny_vla.write(tmp_path, "paligemma"))
    raw = json.loads((folder / STATISTICS_FILE).read_text())
    (folder / STATISTICS_FILE).write_text(json.dumps({name: x for name, x in raw.items() if not name.startswith("state")}))
    with pytest.raises(MMRLError, match=r"policy\.state is 'bins', but the statistics know no states"):
        tiny_vla.build(str(folder), state="bins")


def test_a_critic_that_reads_the_time_must_be_told_it(paligemma: str) -> None:
    policy = tiny_vla.build(paligemma, critic=CriticConfig(time=True, hidden=(8,)))
    seen = tiny_vla.observation(5)
    with pytest.raises(MMRLError, match=r"policy\.critic\.time is true, but the observation does not say how many"):
        policy.act(seen, tiny.draws(1), explore=True)
    assert policy.act(seen, tiny.draws(1), explore=False).action.isfinite().all()
    early, late = (policy.value(replace(seen, elapsed_B=torch.full((5,), t)), tiny.draws(1)) for t in (0, 9))
    assert (early - late).abs().min() > 1e-4


def test_cameras_and_sentences_that_do_not_fit_are_named(paligemma: str) -> None:
    seen = tiny_vla.observation(5)
    with pytest.raises(MMRLError, match=r"policy\.cameras names 'top', but the environment shows \['front', 'wrist'\]"):
        tiny_vla.build(paligemma, cameras=("top",)).act(seen, tiny.draws(1), explore=True)
    with pytest.raises(MMRLError, match=r"policy\.max_text_tokens = 6, but the prompt of .* has \d+ tokens; raise it"):
        tiny_vla.build(paligemma, max_text_tokens=6).act(seen, tiny.draws(1), explore=True)


def test_cameras_are_told_apart(folder: str) -> None:
    policy = tiny_vla.build(folder)
    seen = tiny_vla.observation(5)
    swapped = Observation({"front": seen.images["wrist"], "wrist": seen.images["front"]}, seen.state, seen.instructions)
    before, after = (policy.act(x, tiny.draws(1), explore=False).log_probs_BK for x in (seen, swapped))
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_lacks_something_is_named(tmp_path: Path, missing: str) -> None:
    sentences = {
        "config.json": "cannot be loaded as a vision-language model",
        "tokenizer.json": "no tokenizer could be loaded from there",
        "preprocessor_config.json": "has no image processor",
    }
    folder = Path(tiny_vla.write(tmp_path, "paligemma"))
    (folder / missing).unlink()
    with pytest.raises(MMRLError, match=f"{folder}.*{sentences[missing]}"):
        tiny_vla.build(str(folder))
