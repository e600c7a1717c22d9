"""Token VLAs through the trainer, as any other policy: imitation, then PPO or GRPO on the tabletop; the shipped config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl.config import load
from mmrl.progress import Quiet
from mmrl.registry import ROOT
from mmrl.trainer import resume
from policies.token_vla import TokenVLA
from simulators.tabletop_parts.language import vocabulary
from tests.core import tiny_run
from tests.policies import tiny, tiny_vla

CONFIG = """
name: tiny
threads: 1
tensorboard: false
output: {output}
policy:
  target: policies.token_vla:TokenVLA
  checkpoint: {architecture}
  weights: random
  action_dim: 4
  chunk: 3
  execute: 2
  bins: 32
  state: bins
  prompt: "{{instruction}}"
  max_text_tokens: 24
  attention: eager
  critic: {{hidden: [16]}}
environment:
  target: simulators.tabletop:Tabletop
  families: [reach]
  image_size: 32
  max_steps: {{reach: 8}}
  speed: 0.15
  tolerance: 0.15
evaluation: {{episodes: 4, num_envs: 4}}
stages:
  - name: warm_start
    algorithm: {{target: mmrl.algorithms.sft:SFT, batch_size: 6}}
    iterations: 2
    data: {{target: mmrl.data.demonstrations:ScriptedDemonstrations, episodes: 5, only_successes: false}}
    optimizer: {{lr: 0.01}}
  - name: improve
    algorithm: {{target: mmrl.algorithms.ppo:PPO, epochs: 2, minibatches: 2}}
    iterations: 2
    collect: {{num_envs: 4, decisions: 4}}
    environment: {{reward: dense}}
    optimizer: {{lr: 0.001}}
"""
PPO = ("policy.granularity=action", "policy.train=lora")
GRPO = ("stages.improve.algorithm={target: mmrl.algorithms.grpo:GRPO, group_size: 2}", "policy.critic=null")
ANCHORED = (
    "stages.improve.supervised={batch_size: 5, weight: 0.5, "
    "data: {target: mmrl.data.demonstrations:ExpertStream, num_envs: 3, buffer: 8}}"
)


def write_config(folder: Path, kind: str) -> Path:
    architecture = tiny_vla.write(folder / "architecture", kind, statistics=False, words=vocabulary(), bins=32)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(output=folder / "runs", architecture=architecture))
    return path


def training(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The training rows of a stage."""
    return [row for row in rows if row["stage"] == name and row["kind"] == "train"]


@pytest.mark.parametrize("kind", tiny_vla.WRITERS)
@pytest.mark.parametrize("overrides", [PPO, GRPO], ids=["ppo, adapters, actions", "grpo, all, tokens"])
def test_imitation_then_reinforcement(tmp_path: Path, kind: str, overrides: tuple[str, ...]) -> None:
    config = write_config(tmp_path, kind)
    run_dir = tiny_run.run(config, "a", *overrides)
    rows = tiny_run.rows(run_dir)
    imitation, improvement = training(rows, "warm_start"), training(rows, "improve")
    assert len(imitation) == len(improvement) == 2
    assert all(row["policy/cross_entropy"] > 0 and 0 <= row["policy/token_accuracy"] <= 1 for row in imitation)
    learned = [row for row in improvement if "loss/loss" in row]  # a rollout whose groups are alike teaches GRPO nothing
    assert learned and all(row["policy/log_prob_mismatch_max"] < 1e-4 for row in learned)
    fields = {"weights": "pretrained", "action_dim": None, "bins": 32, "execute": 2, "state": "bins", "cameras": ("front",)}
    policy = TokenVLA(tiny_vla.config(str(run_dir / "policy"), **fields), device=tiny.CPU)
    assert policy.action_dim == 4 and policy.statistics is not None
    assert len(policy.statistics.actions_choices[3]) == 1, "the gripper does nothing in this family"
    decision = policy.act(policy.example_observation(3), tiny.draws(1, 3), explore=True)
    assert torch.equal(policy.evaluate(decision.trace).log_probs_NK, decision.log_probs_BK)


def test_a_resumed_run_ends_where_the_unbroken_one_ends(tmp_path: Path) -> None:
    """From the middle of the second stage, which has a supervised term."""
    whole = tiny_run.run(write_config(tmp_path, "paligemma"), "whole", ANCHORED, "checkpoint={every: 1, keep: 9}")
    again = shutil.copytree(whole, tmp_path / "again", ignore=shutil.ignore_patterns("policy", "report.html"))
    saves = sorted((again / "checkpoints").iterdir())
    shutil.rmtree(saves[-1])
    try:
        resume(again, Quiet())
    finally:
        torch.use_deterministic_algorithms(True)
    assert tiny_run.weights(whole) == tiny_run.weights(again)
    saved = json.loads((whole / "policy" / "statistics.json").read_text())
    assert len(saved["actions_q01"]) == 4 and saved["actions_choices"][3]


def test_the_shipped_config_loads_and_builds() -> None:
    config = load(ROOT / "configs" / "tabletop" / "ppo_token_vla.yaml")
    for architecture in ("tiny_paligemma_architecture", "tiny_qwen_architecture"):
        fields = {"checkpoint": str(ROOT / "assets" / architecture), "weights": "random", "bins": 256}
        fields |= {"max_text_tokens": 24} if architecture == "tiny_qwen_architecture" else {}
        policy = config.policy.override(fields).build(device=torch.device("cpu"))
        assert policy.needs_statistics()
        environment = config.environment.build(num_envs=200, device=torch.device("cpu"))
        seen = environment.reset(torch.arange(200))
        assert len(policy._backbone.eyes.read(seen.images, seen.instructions)["prompt"]) == 200, "no instruction is too long"
        words = policy._tokenizer(" ".join(vocabulary()), add_special_tokens=False)["input_ids"]
        assert policy._tokenizer.unk_token_id not in words
