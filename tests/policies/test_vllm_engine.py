"""vLLM in the place of the policy's own generation, on a tiny Qwen2.5-VL. All tests but one share the vLLM of this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmrl.component import Component, Problems
from mmrl.errors import MMRLError
from mmrl.numerics.draws import Draws
from mmrl.registry import ROOT
from mmrl.types import Conversation
from policies.chat_parts.engine import Request
from policies.chat_parts.policy import CriticOptions
from policies.qwen_vl import QwenVL
from policies.shared.adapters import LoraOptions
from tests.core import tiny_run
from tests.policies import chat_play, tiny_chat
from tests.policies.chat_play import END, play
from tests.policies.vllm_play import TALKS, VLLM, change, gap, ids_of

ARCHITECTURE = ROOT / "assets" / "tiny_qwen_vl_architecture"


@pytest.fixture(scope="module")
def vllm_engine(installed: Callable[[str], None]) -> Any:
    installed("vllm")
    return importlib.import_module("policies.vllm_engine")


@pytest.fixture(scope="module")
def make(vllm_engine: Any) -> Callable[..., Any]:
    """A policy that ends its turn after some of the tokens it says, drawn by vLLM unless ``engine`` is None."""

    def build(engine: dict[str, Any] | None = VLLM, **fields: Any) -> Any:
        defaults: dict[str, Any] = {"max_new_tokens": 10, "max_tokens": 512, "temperature": 0.8, "weights": "random"}
        component = None if engine is None else Component.parse(engine)
        config = QwenVL.Config(checkpoint=str(ARCHITECTURE), engine=component, **(defaults | fields))
        return chat_play.quick(QwenVL(config, device=tiny_chat.CPU))

    return build


@pytest.fixture(scope="module")
def policy(make: Callable[..., Any]) -> Any:
    return make()


class Raises:
    def __getattribute__(self, name: str) -> Any:
        raise ModuleNotFoundError("No module named 'nothing'")


class MakesUp:
    def __getattribute__(self, name: str) -> Any:
        return lambda: None


@pytest.mark.parametrize("kind", [Raises, MakesUp])
def test_what_does_not_bear_to_be_looked_at_is_out_of_sight(vllm_engine: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at everything in every module as it starts; trimesh and llvmlite have such things."""
    module, trap = ModuleType("a_module_with_a_trap"), kind()
    vars(module).update(trap=trap, other=pytest)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    starting = importlib.import_module("policies.vllm_parts.starting")
    with starting._without_traps():
        assert "trap" not in vars(module) and vars(module)["other"] is pytest
    kept = vars(module)["trap"] is trap
    del trap, module  # pytest looks at a test's names where it fails
    assert kept


# -- what is said ------------------------------------------------------------------------------------------------------


def test_drawn_tokens_have_the_policy_s_own_log_probs(policy: Any) -> None:
    """Three turns, after pictures in the question and in the results of tools."""
    policy.version = 3
    played = play(policy, TALKS)
    assert gap(policy, played) < 1e-4
    assert policy.rescores and all(decision.policy_version == 3 for decision in played.decisions)
    said = [message for decision in played.decisions for message in decision.action.tolist()]
    assert {message.finish for message in said} == {"stop", "length"}
    for message in said:
        assert (message.finish == "stop") == (message.token_ids[-1] == END) and END not in message.token_ids[:-1]
        assert len(message.token_ids) <= 10 and (message.finish == "stop" or len(message.token_ids) == 10)


def test_the_likeliest_tokens_are_the_local_engine_s(policy: Any, make: Callable[..., Any]) -> None:
    local = make(engine=None)
    local.load_state_dict(policy.state_dict())
    theirs, ours = play(policy, TALKS, explore=False), play(local, TALKS, explore=False)
    assert ids_of(theirs) == ids_of(ours)
    for a, b in zip(theirs.decisions, ours.decisions, strict=True):
        torch.testing.assert_close(a.log_probs_BK, b.log_probs_BK, rtol=0, atol=1e-4)
        assert torch.equal(a.mask_BK, b.mask_BK)


def test_a_row_s_tokens_depend_on_its_own_stream(policy: Any) -> None:
    together = policy.act(chat_play.observe(TALKS), chat_play.draws(6), explore=True).action.tolist()
    some = torch.tensor([4, 1])
    alone = policy.act(chat_play.observe([TALKS[4], TALKS[1]]), chat_play.draws(6).select(some), explore=True).action.tolist()
    assert [message.token_ids for message in alone] == [together[4].token_ids, together[1].token_ids]
    other = policy.act(chat_play.observe(TALKS), chat_play.draws(6, seed=1), explore=True).action.tolist()
    assert [message.token_ids for message in other] != [message.token_ids for message in together]


def test_tokens_are_drawn_as_often_as_they_are_likely(policy: Any) -> None:
    """The first token of one conversation, which is never one that stands for pictures, although they are the likeliest."""
    words, forbidden = policy.model.get_input_embeddings().weight, policy.engine.sampling.forbidden
    pieces, _ = policy.ears.listen(TALKS[1])
    before, count = words.detach().clone(), 2048
    try:
        with torch.no_grad():
            words[forbidden] = 5 * policy._hidden([pieces])[0]
            made = policy.engine.generate([Request(pieces, None, 1)] * count, Draws.of(0, torch.arange(count)))
            hidden_W = policy._hidden([pieces])[0]
            logits_V = hidden_W @ words.T / policy.config.temperature
    finally:
        words.data.copy_(before)
        policy.engine.forget()
    assert bool((logits_V.softmax(-1)[forbidden].sum()) > 0.5)
    expected_V = logits_V.index_fill(-1, forbidden, -torch.inf).softmax(-1)
    often_V = torch.bincount(made.ids_BK[:, 0], minlength=len(expected_V))
    assert not often_V[forbidden].any()
    often, expected = often_V[count * expected_V > 5], count * expected_V[count * expected_V > 5]
    chi_square, freedom = float(((often - expected).square() / expected).sum()), len(expected)
    assert freedom > 50 and abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_limits_of_a_conversation_are_kept(make: Callable[..., Any]) -> None:
    """What is left of max_tokens bounds a turn; where nothing is left nothing is said."""
    policy = make(max_tokens=512)
    pieces, _ = policy.ears.listen(TALKS[1])
    length = sum(map(len, pieces))
    long: Conversation = (*TALKS[1][:-1], tiny_chat.Message("user", ("word " * 600,)))
    requests = [Request(pieces, None, limit) for limit in (1, 3, 512 - length)]
    made = policy.engine.generate(requests, None)
    assert made.count_B[:2].tolist() == [1, 3] or bool(made.ended_B[1])
    decision = policy.act(chat_play.observe([TALKS[1], long]), chat_play.draws(2), explore=True)
    assert decision.mask_BK.sum(1).tolist()[1] == 0 and decision.action.tolist()[1].finish == "length"


def test_values_are_the_critic_s_own(make: Callable[..., Any]) -> None:
    """vLLM shows no hidden states, so the policy reads the conversation itself."""
    policy = make(critic=CriticOptions(hidden=(8,)))
    decision = policy.act(chat_play.observe(TALKS), chat_play.draws(6), explore=True)
    torch.testing.assert_close(
        decision.values_BV[:, 0], policy.value(chat_play.observe(TALKS), chat_play.draws(6)), rtol=0, atol=1e-6
    )


def test_check_policy_tries_the_engine(policy: Any) -> None:
    tried = list(policy.checks())
    assert [check for check in tried if not check.ok] == []


# -- the weights that it speaks with -----------------------------------------------------------------------------------


def test_new_weights_are_taken_in_place(policy: Any, vllm_engine: Any) -> None:
    runner = policy.engine._runner()
    # Keys and values are kept in whole blocks: a conversation that fills none would not tell whether those before are forgotten.
    long = (*TALKS[1][:-1], tiny_chat.Message("user", (*TALKS[1][-1].pictures, "which way is up? " * 40)))
    block = runner._llm.llm_engine.vllm_config.cache_config.block_size
    assert block < sum(map(len, policy.ears.listen(long)[0])) < 500
    talks = [*TALKS, long]
    before = play(policy, talks, turns=1)
    with policy.compute_mode(train=True):
        change(policy)
    policy.version += 1
    after = play(policy, talks, turns=1)
    assert policy.engine._runner() is runner, "without a restart"
    assert gap(policy, after) < 1e-4 < gap(policy, before)
    assert after.decisions[0].policy_version == before.decisions[0].policy_version + 1


@pytest.mark.parametrize("part", ["visual", "embed_tokens", "norm"])
def test_weights_that_change_in_silence_are_noticed(policy: Any, part: str) -> None:
    """As moving averages do that are shown for an evaluation: no update, no new version. Pictures are encoded again."""
    talks = [tiny_chat.opening(7, 2)]
    before = play(policy, talks, turns=1)
    change(policy, part)
    assert gap(policy, before) > 1e-3
    assert gap(policy, play(policy, talks, turns=1)) < 1e-4


def test_adapters_are_merged(make: Callable[..., Any]) -> None:
    """And a policy that comes after another one speaks with its own weights, from the same vLLM."""
    first, second = make(), make(train="lora", lora=LoraOptions(rank=4, alpha=8))
    base = play(second, TALKS, turns=1)
    change(second, "lora_")
    assert gap(second, base) > 1e-3
    assert gap(second, play(second, TALKS, turns=2)) < 1e-4
    assert gap(first, play(first, TALKS, turns=1)) < 1e-4
    assert gap(second, play(second, TALKS, turns=1)) < 1e-4, (
        "nothing of it has changed since it last spoke, but vLLM's weights have"
    )
    assert first.engine._runner() is second.engine._runner()


def test_a_reference_copies_the_weights_and_not_the_program(policy: Any) -> None:
    reference: Any = policy.reference()
    assert reference.engine is not policy.engine and reference.engine.network is reference.network
    assert reference.engine._runner() is policy.engine._runner()
    change(policy, "embed_tokens")
    assert gap(reference, play(reference, TALKS[:2], turns=1)) < 1e-4


def test_the_canary_sees_weights_that_do_not_arrive(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    play(policy, TALKS[:1], turns=1)
    runner = policy.engine._runner()
    monkeypatch.setattr(runner, "load", lambda weights: None)
    change(policy)
    with pytest.raises(MMRLError, match=r"policy\.engine: vLLM was given new weights, but speaks with the old ones"):
        play(policy, TALKS[:1], turns=1)


@pytest.mark.parametrize("part", ["visual.merger.mlp.0.weight", "layers.2.self_attn.v_proj.weight"])
def test_the_canary_sees_weights_of_which_some_do_not_arrive(policy: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = policy.engine._runner()
    load = type(runner).load

    def without(weights: Any) -> None:
        load(runner, [(name, torch.zeros_like(w) if part in name else w) for name, w in weights])

    monkeypatch.setattr(runner, "load", without)
    policy.engine.forget()
    with pytest.raises(MMRLError, match=r"policy\.engine: vLLM's log-probabilities are .* so it computes another model"):
        play(policy, TALKS[:1], turns=1)


# -- runs --------------------------------------------------------------------------------------------------------------

CONFIG = """
name: tiny
threads: 1
tensorboard: false
output: {output}
policy:
  target: policies.qwen_vl:QwenVL
  checkpoint: {model}
  weights: random
  max_new_tokens: 10
  max_tokens: 512
  engine: null
environment:
  target: mmrl.tool_use:ToolEnvironment
  questions: {{target: simulators.prompts:DetailQuestions, size: 168, sign: [28, 40], kinds: [colour]}}
  tools: [tools.crop:crop]
  max_turns: 2
  describe_tools: false
evaluation: {{episodes: 4, num_envs: 4, act_batch: 4, videos: 0, environment: {{questions: {{split: held_out}}}}}}
stages:
  - name: improve
    algorithm: {{target: mmrl.algorithms.grpo:GRPO, group_size: 2, baseline: none, scale: none, importance: sequence}}
    iterations: 2
    collect: {{num_envs: 4}}
    rewards: [{{target: mmrl.rewards.form:Form}}]
    optimizer: {{lr: 0.01}}
"""


@pytest.mark.parametrize("engine", ["{target: policies.vllm_engine:VllmEngine, cpu_memory_gib: 0.05, concurrent: 64}", "null"])
def test_one_key_says_who_speaks_in_a_run(engine: str, vllm_engine: Any, tmp_path: Path) -> None:
    """GRPO with new weights for the second iteration; how far the engine is from the policy is in the log."""
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs", model=ARCHITECTURE))
    rows = tiny_run.rows(tiny_run.run(path, "run", f"policy.engine={engine}"))
    trained = [row for row in rows if row["kind"] == "train"]
    assert len(trained) == 2 and all(row["policy/log_prob_mismatch_max"] < 1e-4 for row in trained)
    gaps = [name for name in trained[0] if "engine_gap" in name]
    assert bool(gaps) == (engine != "null")
    for row in trained:
        assert all(0 <= row[name] < 1e-4 for name in gaps)
        assert not gaps or row[gaps[0].replace("engine_gap_max", "engine_gap").replace("gap", "weight")] == pytest.approx(
            1, abs=1e-3
        )


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_without_vllm_the_key_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # type: ignore[arg-type]
    for name in [name for name in sys.modules if name.startswith("policies.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Problems, match="needs the package 'vllm', which is not installed; install it with `pip install"):
        Component.parse(VLLM)


def test_what_is_no_engine_is_refused() -> None:
    other = Component.parse({"target": "mmrl.algorithms.sft:SFT", "batch_size": 2})
    with pytest.raises(MMRLError, match=r"policy\.engine\.target = mmrl\.algorithms\.sft:SFT: is no engine"):
        QwenVL(QwenVL.Config(checkpoint=str(ARCHITECTURE), weights="random", engine=other), device=tiny_chat.CPU)


def test_models_that_vllm_cannot_run_are_refused_before_anything_starts(
    vllm_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = importlib.import_module("policies.vllm_parts.starting")
    monkeypatch.setattr(vllm_engine, "Runner", None)
    narrow = tiny_chat.write(tmp_path / "narrow")
    with pytest.raises(
        MMRLError, match=r"policy\.engine: the model's heads are 24 wide, .* are 32, 64, .* set policy\.engine: null"
    ):
        tiny_chat.build(narrow, engine=Component.parse(VLLM))
    monkeypatch.setattr(starting.ModelRegistry, "get_supported_archs", lambda: ["LlamaForCausalLM"])
    with pytest.raises(MMRLError, match=r"vLLM .* does not know Qwen2_5_VLForConditionalGeneration; set policy\.engine: null"):
        tiny_chat.build(narrow, engine=Component.parse(VLLM))


def test_why_vllm_does_not_start_is_a_sentence(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    starting = importlib.import_module("policies.vllm_parts.starting")
    dice, threads = torch.get_rng_state(), torch.get_num_threads()

    def fail(*_: Any, **__: Any) -> None:
        torch.manual_seed(9)
        torch.rand(3)
        raise ValueError("No memory\nfor anything")

    monkeypatch.setattr(starting, "LLM", fail)
    with pytest.raises(MMRLError, match=r"policy\.engine: vLLM .* does not start \(No memory\); set VLLM_LOGGING_LEVEL"):
        starting.start(policy.network, policy._tokenizer, {})
    assert torch.equal(torch.get_rng_state(), dice) and torch.get_num_threads() == threads
