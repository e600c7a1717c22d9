"""A run that a test can afford: a two-stage configuration of a few seconds, on a pi0 of 60,000 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from assets.make_tiny_pi0 import build_config, build_tokenizer
from mmrl import checkpoint, metrics
from mmrl.config import load
from mmrl.progress import Quiet
from mmrl.trainer import train

CONFIG = """
name: tiny
threads: 1
tensorboard: false
output: {output}
policy:
  target: policies.pi0:Pi0
  checkpoint: {architecture}
  weights: random
  sampler: flow_sde
  noise_level: 0.5
  denoising_steps: 2
  execute: 3
  action_dim: 4
  max_text_tokens: 16
  attention: eager
  critic: {{hidden: [16]}}
environment:
  target: simulators.tabletop:Tabletop
  families: [reach]
  image_size: 32
  max_steps: {{reach: 8}}
  speed: 0.15
  tolerance: 0.15
evaluation: {{episodes: 7, num_envs: 4, videos: 2, environment: {{split: held_out}}}}
checkpoint: {{every: 1}}
stages:
  - name: warm_start
    algorithm: {{target: mmrl.algorithms.sft:SFT, batch_size: 6}}
    iterations: 2
    data: {{target: mmrl.data.demonstrations:ScriptedDemonstrations, episodes: 5, only_successes: false}}
    optimizer: {{lr: 0.01}}
  - name: improve
    algorithm: {{target: mmrl.algorithms.ppo:PPO, epochs: 2, minibatches: 2}}
    iterations: 3
    collect: {{num_envs: 4, decisions: 4}}
    environment: {{reward: dense}}
    optimizer: {{lr: 0.001}}
"""

GRPO = "stages.improve.algorithm={target: mmrl.algorithms.grpo:GRPO, group_size: 2}"
FLOW_NOISE = ("policy.sampler=flow_noise", "policy.noise_level=null", "policy.step_reduction=mean_with_prior")
SUPERVISED = (
    "stages.improve.supervised={batch_size: 5, weight: [0.5, 0.1], "
    "data: {target: mmrl.data.demonstrations:ExpertStream, num_envs: 3, buffer: 8}}"
)


def write_architecture(folder: Path, width: int = 32) -> Path:
    """Config and tokenizer of a pi0 for 32x32 images, without weights or statistics."""
    tokenizer = build_tokenizer()
    config: Any = build_config(len(tokenizer), width=width, layers=2, vision_layers=1)
    config.vlm_config.vision_config.image_size = 32
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder: Path) -> Path:
    """The architecture, and a config whose runs go to ``folder``/runs."""
    architecture = write_architecture(folder / "architecture")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(output=folder / "runs", architecture=architecture))
    return path


def run(config: Path, name: str, *overrides: str) -> Path:
    """Train it in this process; the run's folder."""
    try:
        return train(load(config, overrides), config.parent / "runs" / name, Quiet())
    finally:
        torch.use_deterministic_algorithms(True)  # as every test has it; a run sets what its own config says


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    clocks = ("seconds", "speed/")
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in metrics.read(run_dir)]


def weights(run_dir: Path) -> dict[str, bytes]:
    """The files of the final policy."""
    return {path.name: path.read_bytes() for path in sorted((run_dir / "policy").iterdir())}


def newest(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of the newest checkpoint, as section/name, and its meta without what depends on the clock or on kills."""
    sections, meta = checkpoint.load(checkpoint.latest(run_dir / "checkpoints").path)
    tensors = {f"{section}/{name}": tensor for section, named in sections.items() for name, tensor in named.items()}
    return tensors, {name: value for name, value in meta.items() if name not in ("number", "metrics_position", "elapsed")}
