"""The full-size recipes of agents, with everything large replaced: a tiny model, small files, a judge on this machine.

A random model calls no tool and answers nothing right, so what recipes are made of is also tried with a conversation that does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl.building import build_policy
from mmrl.columns import Column
from mmrl.config import RunConfig, load
from mmrl.messages import Message, ToolCall
from mmrl.metrics import read
from mmrl.registry import ROOT
from mmrl.transcripts import Transcript
from tests.core import tiny_run
from tests.policies import tiny_chat
from tests.tools.servers import Server, reply, serving

RECIPES = sorted((ROOT / "configs/full").glob("qwen*.yaml"))
FAMILIES = {"Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl", "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl"}
SMALL = (
    "tensorboard=false",
    "device=cpu",
    "threads=1",
    "environment.describe_tools=false",  # thousands of tokens for a tokenizer of few words
    "evaluation={episodes: 2, num_envs: 2, act_batch: 2, videos: 0, every: 0}",
    "policy={dtype: float32, max_new_tokens: 12, min_pixels: 256, max_pixels: 1024, lora: {rank: 2}}",
)
# Nothing that a random model says is right, so that rewards alone would teach it nothing.
TAUGHT = "{group_size: 2, minibatches: 2, baseline: none, scale: none, overlong: {limit: 12, buffer: 12}}"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "crop": {"image": 1, "box": [4, 4, 20, 20]},
    "rotate": {"image": 1, "degrees": 90},
    "flip": {"image": 1, "direction": "horizontal"},
    "resize": {"image": 1, "width": 16},
    "adjust": {"image": 1, "contrast": 2.0},
    "python": {"code": "print(6 * 7)"},
    "text_search": {"query": "owl"},
    "image_search": {"image": 1},
    "visit": {"url": "owl"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of every kind of check, conversations to imitate, a corpus, and a model of either family."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (40, 40), "brown").save(folder / "owl.png")
    picture = {"type": "image", "image": "owl.png"}
    checks: tuple[tuple[Any, Any], ...] = (
        ("owl", "normalised"),
        ("owl", "exact"),
        ("A", {"kind": "choice", "options": ["owl", "cat"]}),
        (42, {"kind": "number", "tolerance": 0.5}),
        ("[4, 4, 20, 20]", {"kind": "box", "threshold": 0.5}),
    )
    details = {"operations": ["rotate_90", "crop"], "box": [4, 4, 20, 20]}
    questions = [
        {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": f"What is it, number {number}?"}]}]}
        | {"answer": checks[number % 5][0], "check": checks[number % 5][1], "details": details}
        for number in range(60)
    ]
    said = {"role": "assistant", "content": "<think>hm</think><answer>owl</answer>"}
    talk = {"messages": [questions[0]["messages"][0], said]}
    page = {"id": "owl", "title": "Owl", "text": "An owl is a bird.", "images": ["owl.png"]}
    for name, lines in {"questions": questions, "trajectories": [talk] * 3, "corpus": [page]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for family in FAMILIES.values():
        tiny_chat.write(folder / family, family)
    return folder


@pytest.fixture
def judge() -> Iterator[Server]:
    """Says that all is well."""

    def say(handler: Any) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        reply(handler, json.dumps({"choices": [{"message": {"role": "assistant", "content": "Score: 1"}}]}).encode())

    with serving() as server:
        server.answers["/v1/chat/completions"] = say
        yield server


def small(recipe: RunConfig, files: Path, judge: Server, cache: Path) -> list[str]:
    """The overrides that make a recipe small."""
    checkpoint: Any = recipe.policy.config
    environment: Any = recipe.environment.config
    changes = [*SMALL, f"policy.checkpoint={files / FAMILIES[checkpoint.checkpoint]}"]
    changes.append(f"environment.questions={{path: {files / 'questions.jsonl'}, held_out_share: 0.5}}")
    corpus = files / "corpus.jsonl"
    for place, tool in enumerate(environment.tools):
        where = f"environment.tools.{place}"
        config = None if tool.component is None else tool.component.config
        if hasattr(config, "clip"):
            changes.append(f"{where}={{target: 'tools.image_search:ImageSearch', images: {corpus}, cache: {cache}}}")
            continue
        changes += [f"{where}.{name}={corpus}" for name in ("corpus", "images") if isinstance(getattr(config, name, None), str)]
        changes += [f"{where}.cache={cache}"] if hasattr(config, "cache") else []
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        changes.append(f"{where}.iterations=2")
        changes += [f"{where}.data.path={files / 'trajectories.jsonl'}"] if stage.data else []
        changes.append(f"{where}.algorithm={TAUGHT}" if stage.collect else f"{where}.algorithm.batch_size=2")
        changes += [f"{where}.collect={{num_envs: 4, parts: 2}}"] if stage.collect else []
        for place, reward in enumerate(stage.rewards):
            asks = "" if hasattr(reward.cls, "ask") else ".judge"
            if not asks or getattr(reward.config, "judge", None) is not None:
                changes.append(f"{where}.rewards.{place}{asks}={{url: {judge.url('/v1')}, cache: {cache}, retries: 0}}")
    return changes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps_of_every_stage(
    path: Path, files: Path, judge: Server, tmp_path: Path, require: Callable[[str], None]
) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    _needs(recipe, require)
    changes = [*small(recipe, files, judge, tmp_path / "cache"), f"output={tmp_path}"]
    config = load(path, changes)
    before = build_policy(config, config.stages[0], torch.device("cpu")).state_dict()
    run = tiny_run.run(path, str(tmp_path / "run"), *changes)
    rows = [row for row in read(run) if row["kind"] == "train"]
    assert [(row["stage"], row["iteration"]) for row in rows] == [(stage.name, i) for stage in config.stages for i in (1, 2)]
    assert all(row["update/grad_norm"] > 0 and row.get("rollout/unscored_episodes", 0) == 0 for row in rows)
    assert {name for name in rows[-1] if name.count("/") == 1 and name.startswith("reward/")} >= {
        f"reward/{reward.name}" for reward in config.stages[-1].rewards
    }
    saved = config.policy.override({"checkpoint": str(run / "policy"), "train": "all"}).build(device=torch.device("cpu"))
    assert all(bool(tensor.isfinite().all()) for tensor in saved.state_dict().values())
    adapted = {name.replace(".base_layer", "") for name in before if ".base_layer." in name}
    after = saved.state_dict()
    assert adapted and any(not torch.equal(after[n], before[n.replace("proj.", "proj.base_layer.")]) for n in adapted)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_tools_answer_and_its_rewards_pay_a_good_conversation(
    path: Path, files: Path, judge: Server, tmp_path: Path, require: Callable[[str], None]
) -> None:
    recipe = load(path)
    _needs(recipe, require)
    config = load(path, small(recipe, files, judge, tmp_path / "cache"))
    told = _told(config)
    assert [call.error for call in told.calls] == [None] * len(told.calls)
    assert told.ended == "answer" and told.mark == 1.0
    for block in config.stages[-1].rewards:
        reward: Any = block.build()
        (score,) = reward.per_turn([told]) if hasattr(reward, "per_turn") else reward([told])
        best = max(score) if isinstance(score, list) else score
        assert best > 0 or block.name == "call_cost", (block.name, score)
        if block.name == "call_cost":
            assert score == -float(max(0, len(told.calls) - 2))


def _told(config: RunConfig) -> Transcript:
    """A conversation that calls every tool, two a turn, and gives the right answer."""
    environment: Any = config.environment.build(num_envs=1, device=torch.device("cpu"))
    try:
        environment.reset(torch.tensor([0]))
        tag = config.environment.config.answer_tag  # type: ignore[attr-defined]
        names = [schema.name for schema in environment.toolbox.schemas]
        for turn in range(0, len(names), 2):  # two calls a turn
            call = environment.format.render([ToolCall(name, ARGUMENTS[name]) for name in names[turn : turn + 2]])
            environment.step(Column.of([Message("assistant", (f"<think>I call it.</think>\n{call}",))]))
        answer = environment.transcript(0).question.references[0]
        text = answer if tag is None else f"<think>So it is.</think><{tag}>{answer}</{tag}>"
        environment.step(Column.of([Message("assistant", (text,))]))
        return environment.transcript(0)
    finally:
        environment.close()


def _needs(recipe: RunConfig, require: Callable[[str], None]) -> None:
    if any("python_sandbox" in tool.target for tool in recipe.environment.config.tools):  # type: ignore[attr-defined]
        require("python_sandbox")
