"""The recipes on robots, made small: demonstrations, imitation, PPO and evaluation all run, with real cameras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrl.config import load
from mmrl.metrics import read
from mmrl.progress import Quiet
from mmrl.registry import ROOT
from mmrl.trainer import train

SMALL = (
    "tensorboard=false",
    "environment.workers=1",
    "evaluation={episodes: 1, num_envs: 1, videos: 0}",
    "stages.imitate.algorithm.batch_size=4",
    "stages.imitate.iterations=2",
    "stages.imitate.data={episodes: 1, num_envs: 1, only_successes: false}",
    "stages.improve.iterations=2",
    "stages.improve.algorithm={epochs: 1, critic_warmup: 0}",
    "stages.improve.evaluate_every=0",
)
# config -> (what the doctor calls what it needs, overrides)
RECIPES = {
    "ppo_pi0_maniskill": (
        "vulkan",
        "environment.max_steps=10",
        "stages.imitate.data.environment={max_steps: 8}",
        "stages.improve.collect={num_envs: 2, decisions: 3}",
    ),
    "ppo_pi0_libero": ("robosuite", "environment={max_steps: 10, settle_steps: 1}", "stages.improve.collect.num_envs=1"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_a_recipe_runs(
    name: str, require: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs, *overrides = RECIPES[name]
    require(needs)
    monkeypatch.chdir(ROOT)
    try:
        run = train(load(f"configs/{name}.yaml", [*SMALL, *overrides]), tmp_path / "run", Quiet())
    finally:
        torch.use_deterministic_algorithms(True)
    rows = list(read(run))
    assert [(row["stage"], row["iteration"], row.get("label", "train")) for row in rows] == [
        ("imitate", 0, "before"),
        *(("imitate", i, "train") for i in (1, 2)),
        ("imitate", 2, "after"),
        *(("improve", i, "train") for i in (1, 2)),
        ("improve", 2, "after"),
    ]
    learned = [row for row in rows if row["stage"] == "improve" and row["kind"] == "train"]
    assert all(row["rollout/decisions"] > 0 and row["rollout/lost_episodes"] == 0 for row in learned)
    assert max(row["policy/log_prob_mismatch_max"] for row in learned) < 1e-4
    weights = load_file(run / "policy/model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert (run / "policy/statistics.json").is_file()
