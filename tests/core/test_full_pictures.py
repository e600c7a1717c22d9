"""The full-size recipes of image generators, with everything large replaced: tiny pipelines, tiny scorers, small files.

What reads pictures with a model has a tiny one of random weights; where that takes several models, or a server, a cheap reward
stands in its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from mmrl.building import build_policy
from mmrl.config import RunConfig, load
from mmrl.metrics import read
from mmrl.registry import ROOT
from tests.core import tiny_run
from tests.policies import tiny_diffusion
from tests.rewards.tiny_encoders import clip_folder
from tests.tools.servers import Server, reply, serving

FOLDER = ROOT / "configs/full"
RECIPES = sorted({*FOLDER.glob("sd35*.yaml"), *FOLDER.glob("flux*.yaml")})
GROUP, SIZE = 4, 16
CHEAP = "{{target: 'mmrl.rewards.brightness:{cls}', name: {name}, weight: {weight}}}"
# reward -> what is in its place, or the fields of it that name models
REPLACED = {
    "mmrl.rewards.geneval:GenEval": "Sharpness",
    "mmrl.rewards.image_reward:ImageReward": "Sharpness",
    "mmrl.rewards.remote:Remote": "Brightness",  # the server's, which reads nothing in such pictures
}
MODELS = {"checkpoint": "{clip}", "processor": "{clip}", "weights": "null"}
PROMPTS = {
    "geneval": [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
    ],
    "pictures": [{"prompt": "a red circle"}, {"prompt": "two blue squares"}],
    "edits": [{"prompt": f"make it blue, number {number}", "image": "owl.png"} for number in range(8)],
    "captioned": [
        {
            "messages": [
                {"role": "user", "content": "a red circle"},
                {"role": "assistant", "content": [{"type": "image", "image": "owl.png"}]},
            ]
        }
    ],
}
FILES = {
    "GenEvalPrompts": "geneval.jsonl",
    "OcrPrompts": "words.txt",
    "PicturePrompts": "pictures.jsonl",
}
SMALL = (
    "tensorboard=false",
    "device=cpu",
    "threads=1",
    "evaluation={episodes: 2, num_envs: 2, act_batch: 2, videos: 0, every: 0}",
    f"policy={{dtype: float32, height: {SIZE}, width: {SIZE}, max_text_tokens: 8, evaluation_steps: 2}}",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts of every kind, pictures to edit and to imitate, a pipeline of each family, a CLIP model."""
    folder = tmp_path_factory.mktemp("files")
    Image.linear_gradient("L").resize((SIZE, SIZE)).convert("RGB").save(folder / "owl.png")
    for name, lines in PROMPTS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "words.txt").write_text('a sign that says "CAT"\na wall with "NO"\n')
    # A fresh network says nothing at all, so that adapters of it would get no gradient.
    sd3 = tiny_diffusion.build(tiny_diffusion.write_sd3(folder / "architecture"))
    sd3.save(folder / "stable-diffusion-3.5-medium")
    for name, kind in (("FLUX.1-dev", diffusers.FluxPipeline), ("FLUX.1-Kontext-dev", diffusers.FluxKontextPipeline)):  # type: ignore[attr-defined]
        Path(tiny_diffusion.write_flux(folder, kind)).rename(folder / name)
    clip_folder(folder / "clip")
    return folder


@pytest.fixture
def judge() -> Iterator[Server]:
    """Finds that each further picture is better edited."""
    asked: list[bytes] = []

    def say(handler: Any) -> None:
        asked.append(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = f"Fine. Score: {len(asked) % 10}"
        reply(handler, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode())

    with serving() as server:
        server.answers["/v1/chat/completions"] = say
        yield server


def small(recipe: RunConfig, files: Path, judge: Server, cache: Path) -> list[str]:
    """The overrides that make a recipe small."""
    policy: Any = recipe.policy.config
    environment: Any = recipe.environment.config
    edits = "Kontext" in policy.checkpoint
    changes = [*SMALL, f"policy.checkpoint={files / policy.checkpoint.rpartition('/')[2]}"]
    changes += ["policy.lora.rank=2"] if policy.train == "lora" else []
    changes.append(f"policy.steps={min(policy.steps, 6)}")
    prompts = files / ("edits.jsonl" if edits else FILES[environment.prompts.target.rpartition(":")[2]])
    changes.append(f"environment.prompts.path={prompts}")
    if "path" in recipe.evaluation.environment.get("prompts", {}):
        changes.append(f"evaluation.environment.prompts.path={prompts}")
    changes += ["environment.prompts.held_out_share=0.5"] if edits else []
    for place, reward in enumerate(environment.rewards):
        changes += _small_reward(f"environment.rewards.{place}", reward, files, judge, cache)
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        changes += [f"{where}.iterations=2", f"{where}.micro_batch=3"]
        if stage.data is not None:
            changes += [f"{where}.data.path={files / 'captioned.jsonl'}", f"{where}.algorithm.batch_size=4"]
        if stage.collect is not None:
            changes += [f"{where}.algorithm.group_size={GROUP}", f"{where}.algorithm.minibatches=2"]
            changes.append(f"{where}.collect={{num_envs: {2 * GROUP}, parts: 2}}")
    return changes


def _small_reward(where: str, reward: Any, files: Path, judge: Server, cache: Path) -> list[str]:
    if reward.target in REPLACED:
        return [f"{where}={CHEAP.format(cls=REPLACED[reward.target], name=reward.name, weight=reward.weight)}"]
    if hasattr(reward.config, "model"):
        return [f"{where}={{url: '{judge.url('/v1')}', cache: {cache}, retries: 0, concurrency: 1}}"]
    given = {name: value.format(clip=files / "clip") for name, value in MODELS.items() if hasattr(reward.config, name)}
    given |= {"dtype": "float32"} if hasattr(reward.config, "dtype") else {}
    return [f"{where}.{name}={value}" for name, value in given.items()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps_of_every_stage(path: Path, files: Path, judge: Server, tmp_path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    changes = [*small(recipe, files, judge, tmp_path / "cache"), f"output={tmp_path}"]
    config = load(path, changes)
    before = build_policy(config, config.stages[0], torch.device("cpu")).state_dict()
    run = tiny_run.run(path, str(tmp_path / "run"), *changes)
    rows = [row for row in read(run) if row["kind"] == "train"]
    assert [(row["stage"], row["iteration"]) for row in rows] == [(stage.name, i) for stage in config.stages for i in (1, 2)]
    assert all(row["update/grad_norm"] > 0 and row.get("rollout/lost_episodes", 0) == 0 for row in rows), rows
    told = {f"score_{reward.name}" for reward in config.environment.config.rewards}  # type: ignore[attr-defined]
    evaluations = [row for row in read(run) if row["kind"] == "evaluation"]
    assert len(evaluations) == 2 and all(told == row["metrics"].keys() for row in evaluations), evaluations
    saved = config.policy.override({"checkpoint": str(run / "policy"), "weights": "pretrained", "train": "all"})
    after = saved.build(device=torch.device("cpu")).state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    plain = {name.replace(".base_layer", ""): value for name, value in before.items() if "lora_" not in name}
    assert after.keys() == plain.keys()
    assert any(not torch.equal(after[name], value) for name, value in plain.items())
