"""Runs of agents from their YAML: imitation, GRPO and PPO with tools, resumed runs, and the configs that ship."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmrl.config import load
from mmrl.errors import MMRLError
from mmrl.progress import Quiet
from mmrl.registry import ROOT
from mmrl.trainer import resume
from tests.core import tiny_run
from tests.policies import tiny_chat

CONFIG = """
name: tiny
threads: 1
tensorboard: false
output: {output}
policy:
  target: policies.qwen_vl:QwenVL
  checkpoint: {model}
  max_new_tokens: 12
environment:
  target: mmrl.tool_use:ToolEnvironment
  questions: {{target: simulators.prompts:DetailQuestions, size: 168, sign: [28, 40], kinds: [colour]}}
  tools: [tools.crop:crop]
  max_turns: 2
  describe_tools: false
evaluation: {{episodes: 5, num_envs: 4, act_batch: 4, videos: 0, environment: {{questions: {{split: held_out}}}}}}
checkpoint: {{every: 1}}
stages:
  - name: warm_start
    algorithm: {{target: mmrl.algorithms.sft:SFT, batch_size: 4}}
    iterations: 2
    data: {{target: mmrl.data.conversations:ScriptedConversations, num_envs: 4}}
    optimizer: {{lr: 0.001}}
  - name: improve
    algorithm:
      target: mmrl.algorithms.grpo:GRPO
      group_size: 3
      epochs: 2
      minibatches: 2
      kl_weight: 0.01
      baseline: none # a model that says nothing sensible gets the same reward every time
      scale: none
      overlong: {{limit: 12, buffer: 8}}
    iterations: 3
    collect: {{num_envs: 6}}
    micro_batch: 2
    rewards:
      - {{target: mmrl.rewards.answers:Correct}}
    optimizer: {{lr: 0.001}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    model = tiny_chat.write(folder / "model")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(output=folder / "runs", model=model))
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    return tiny_run.run(config, "whole")


def test_every_stage_learns_and_says_what_happened(whole: Path) -> None:
    rows = tiny_run.rows(whole)
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["stage"] for row in trained] == ["warm_start"] * 2 + ["improve"] * 3
    for row in trained[2:]:
        assert row["policy/log_prob_mismatch_max"] < 1e-4, "at unchanged weights the ratio is 1"
        assert row["reward/correct"] == 0 and row["update/grad_norm"] > 0
        assert row["agent/turns"] >= 1 and "agent/tool_rate" in row and row["policy/kl_reference"] >= 0
    ends = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["label"] for row in ends] == ["before", "after", "after"] and all("tool_rate" in row for row in ends)
    assert {path.name for path in (whole / "policy").iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    }


def test_imitation_and_rewards_also_learn_from_lines(config: Path, whole: Path) -> None:
    """The first step of imitation is that of conversations side by side; what acting said is what lines say."""
    packed = tiny_run.run(config, "packed", "policy.pack_tokens=4096", "stages.improve.micro_batch=null")
    ours, theirs = ([row for row in tiny_run.rows(run) if row["kind"] == "train"] for run in (packed, whole))
    for name in ("loss/loss", "update/grad_norm"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4) and ours[0][name] != 0
    for row in ours[2:]:
        assert row["policy/log_prob_mismatch_max"] < 1e-4 and row["update/grad_norm"] > 0


@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_resumed_run_is_the_unbroken_run(config: Path, whole: Path, number: int) -> None:
    """From the checkpoint in the middle of either stage, and from the one between them."""
    broken = config.parent / "runs" / f"broken{number}"
    kept: Any = f"checkpoint.keep={9}"
    tiny_run.run(config, broken.name, kept)
    for path in sorted((broken / "checkpoints").iterdir()):
        if path.is_dir() and int(path.name.split("-")[-1].lstrip("0") or 0) > number:
            shutil.rmtree(path)
    shutil.rmtree(broken / "policy")
    resume(broken, Quiet())
    assert tiny_run.rows(broken) == tiny_run.rows(whole) and tiny_run.weights(broken) == tiny_run.weights(whole)


PPO = (
    "policy.critic={granularity: token, hidden: [16]}",
    "stages.improve.algorithm={target: 'mmrl.algorithms.ppo:PPO', epochs: 2, minibatches: 2, kl_weight: 0.1, kl_in: reward}",
)


def test_a_run_with_values_of_tokens_is_resumed_as_the_unbroken_one(config: Path) -> None:
    run = tiny_run.run(config, "tokens", "checkpoint.keep=9", *PPO)
    rows, weights = tiny_run.rows(run), tiny_run.weights(run)
    trained = [row for row in rows if row.get("stage") == "improve" and row["kind"] == "train"]
    assert len(trained) == 3
    for row in trained:
        assert row["policy/log_prob_mismatch_max"] < 1e-4 and row["loss/value_loss"] > 0
        assert "advantages/explained_variance" in row and row["advantages/advantage_std"] > 0
    kept = [json.loads(path.read_text()) for path in sorted((run / "trajectories").glob("improve-training-*.json"))]
    worth = [[token[2] for token in said["tokens"]] for talk in kept for said in talk["messages"] if said.get("tokens")]
    assert any(len(set(tokens)) == len(tokens) > 3 for tokens in worth), "each token of a turn is worth something else"
    shutil.rmtree(run / "policy")
    gone = sorted((run / "checkpoints").glob("*[45]"))
    for path in gone:
        shutil.rmtree(path)
    assert len(gone) == 2 and list((run / "checkpoints").glob("*3"))
    resume(run, Quiet())
    assert tiny_run.rows(run) == rows and tiny_run.weights(run) == weights


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("policy.max_tokens=8", "policy.max_tokens = 8, but a conversation begins with more; raise it"),
        ("policy.frozen=nothing", "policy.frozen = 'nothing' fits no weight"),
        ("environment.tools=[tools.crop:crop, tools.crop:crop]", "both called 'crop'"),
    ],
)
def test_what_cannot_be_ends_in_a_sentence(config: Path, override: str, sentence: str) -> None:
    with pytest.raises(MMRLError) as caught:
        tiny_run.run(config, override.partition("=")[0], override)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("grpo_qwen_vl_*.yaml")), ids=lambda path: path.stem)
def test_configs_that_ship_are_valid(path: Path) -> None:
    assert load(path).stages[-1].rewards
