"""The full-size recipes of robots, with everything large replaced: a tiny checkpoint, the tabletop, few environments."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from assets.make_tiny_pi0 import build_config, build_tokenizer
from mmrl.building import build_policy
from mmrl.config import RunConfig, load
from mmrl.metrics import read
from mmrl.progress import Quiet
from mmrl.registry import ROOT
from mmrl.trainer import train

FOLDER = ROOT / "configs/full"
RECIPES = sorted({*FOLDER.glob("*.yaml")} - {path for kind in ("qwen", "sd35", "flux") for path in FOLDER.glob(f"{kind}*.yaml")})
EXPERT = "{target: mmrl.data.demonstrations:ScriptedDemonstrations, episodes: 4, only_successes: false}"
SMALL = (
    "tensorboard=false",
    "device=cpu",
    "threads=1",
    "environment={target: simulators.tabletop:Tabletop, families: [reach], image_size: 32, reward: dense}",
    "evaluation={episodes: 2, num_envs: 2, videos: 0, every: 0}",
    "policy={weights: random, action_dim: 4}",
)
# policy -> what is smaller in it, and takes the tabletop; {folder}: the checkpoints of the test
POLICIES = {
    "policies.pi0:Pi0": "policy={checkpoint: {folder}/pi0, tokenizer: null, adapter: null, cameras: null, max_text_tokens: 16}",
    "policies.token_vla:TokenVLA": "policy={checkpoint: {folder}/token_vla, cameras: [front]}",
}
# a block that a stage may have -> what is smaller in it
BLOCKS = {
    "collect": ("collect={num_envs: 8, decisions: null}", "micro_batch=7"),
    "data": (f"data={EXPERT}",),
    "supervised": ("supervised.batch_size=3", f"supervised.data={EXPERT}"),
}
# a field that an algorithm may have -> what is smaller in it
FIELDS = {
    "batch_size": "batch_size=4",
    "epochs": "epochs=1",
    "minibatches": "minibatches=2",
    "success_range": "success_range=null",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pi0 that predicts ten actions, as many as any recipe executes, and a token VLA that knows its bounds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = build_tokenizer()
    config: Any = build_config(len(tokenizer), width=32, layers=2, vision_layers=1, chunk_size=10)
    config.vlm_config.vision_config.image_size = 32
    config.save_pretrained(folder / "pi0")
    tokenizer.save_pretrained(folder / "pi0")
    copytree(ROOT / "assets/tiny_paligemma_architecture", folder / "token_vla")
    bounds = {"actions_q01": [-1.0] * 4, "actions_q99": [1.0] * 4, "state_q01": [0.0] * 4, "state_q99": [1.0] * 4}
    (folder / "token_vla/statistics.json").write_text(json.dumps(bounds))
    return folder


def small(recipe: RunConfig, checkpoints: Path) -> list[str]:
    """The overrides that make a recipe small."""
    changes = [*SMALL, POLICIES[recipe.policy.target].replace("{folder}", str(checkpoints))]
    for stage in recipe.stages:
        shrunk = ["iterations=2", *(f"algorithm.{FIELDS[f]}" for f in FIELDS if hasattr(stage.algorithm.config, f))]
        shrunk += [change for block, lines in BLOCKS.items() if getattr(stage, block) is not None for change in lines]
        changes += [f"stages.{stage.name}.{change}" for change in shrunk]
    return changes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps_of_every_stage(
    path: Path, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load(path)
    assert recipe.name == path.stem
    config = load(path, small(recipe, checkpoints))
    before = build_policy(config, config.stages[0], torch.device("cpu")).state_dict()
    try:
        run = train(config, tmp_path / "run", Quiet())
    finally:
        torch.use_deterministic_algorithms(True)
    rows = [row for row in read(run) if row["kind"] == "train"]
    assert [(row["stage"], row["iteration"]) for row in rows] == [(stage.name, i) for stage in config.stages for i in (1, 2)]
    last = config.stages[-1]
    saved = config.policy.override({"checkpoint": str(run / "policy"), "weights": "pretrained"}).override(last.policy)
    after = saved.build(device=torch.device("cpu")).state_dict()
    changed = [name for name, tensor in before.items() if tensor.is_floating_point() and not torch.equal(after[name], tensor)]
    assert any("model." in name for name in changed) and all(bool(after[name].isfinite().all()) for name in changed)
    if last.supervised is not None:
        assert all("loss/flow_matching" in row for row in rows), sorted(rows[-1])
