"""What a stage does around its updates: a policy that adapts sees every rollout, once, when its updates are done."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmrl import metrics
from mmrl.config import load
from mmrl.progress import Quiet
from mmrl.trainer import train

CONFIG = """
name: adapting
threads: 1
tensorboard: false
policy: {target: policies.mlp:MLP, state_dim: 4, action_dim: 4, hidden: [8], normalize: true}
environment: {target: simulators.tabletop:Tabletop, families: [reach], render: false, max_steps: {reach: 6}}
evaluation: {episodes: 2, num_envs: 2, videos: 0}
stages:
  - name: improve
    algorithm: {target: mmrl.algorithms.ppo:PPO, epochs: 2, minibatches: 2}
    iterations: 3
    collect: {num_envs: 5, auto_reset: false}
"""


def test_running_statistics_move_between_rollouts_and_not_within(tmp_path: Path) -> None:
    path = tmp_path / "adapting.yaml"
    path.write_text(CONFIG)
    run = train(load(path), tmp_path / "run", Quiet())
    rows = [row for row in metrics.read(run) if row["kind"] == "train"]
    # Decisions score again as they were drawn, although the statistics moved before the second and the third rollout.
    assert len(rows) == 3 and all(row["policy/log_prob_mismatch_max"] < 1e-5 for row in rows)
    saved = load_file(run / "policy" / "model.safetensors")
    assert float(saved["moments.count"]) == sum(row["rollout/decisions"] for row in rows)
    assert float(saved["moments.var_S"].min()) < 0.5 and saved["moments.mean_S"].any()
    assert rows[0]["rollout/decisions"] == pytest.approx(30, abs=10)
