"""The code that CONTRIBUTING.md shows runs, keeps the promises it is an example of, and does what its docstrings say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl.batching import make_batch
from mmrl.calling import HermesCalls, Toolbox
from mmrl.messages import Picture
from mmrl.protocols import Environment, LikelihoodPolicy, LossContext, Reward, RolloutAlgorithm, TurnReward
from mmrl.registry import ROOT
from mmrl.rollout import Collector
from tests.rewards.tales import tale

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every name that a block defines."""
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        module = ModuleType(f"contributing_{number}")
        sys.modules[module.__name__] = module  # where dataclasses look their annotations up
        exec(compile(block, f"CONTRIBUTING.md, block {number}", "exec"), vars(module))
        names |= vars(module)
    return names


@pytest.fixture
def parts(shown: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Policy, environment of 14 slots, algorithm."""
    policy = shown["LinearGaussian"](shown["LinearGaussian"].Config(state_dim=1, action_dim=1), device=torch.device("cpu"))
    environment = shown["Walk"](shown["Walk"].Config(), num_envs=14, device=torch.device("cpu"))
    return policy, environment, shown["Reinforce"](shown["Reinforce"].Config())


def test_they_keep_their_promises(parts: tuple[Any, Any, Any]) -> None:
    policy, environment, algorithm = parts
    assert isinstance(policy, LikelihoodPolicy)
    assert isinstance(environment, Environment)
    assert all(hasattr(algorithm, name) for name in ("needs", *RolloutAlgorithm.__annotations__, "advantages", "loss"))


def test_the_walk_ends_where_it_says(parts: tuple[Any, Any, Any]) -> None:
    _, environment, _ = parts
    environment.reset(torch.arange(14))
    step = environment.step(torch.ones(14, 4, 1))  # 0.8 further in four steps: tasks 2, 3, ... started at 0.2 or beyond
    assert step.metrics["success"].tolist() == [float(task % 7 >= 2) for task in range(14)]
    assert step.rewards_BC.sum(1).tolist() == step.metrics["success"].tolist()
    step = environment.step(-torch.ones(14, 6, 1))
    assert step.truncated_B.tolist() == [task % 7 < 2 for task in range(14)]
    assert not step.valid_BC[2].any()


def test_the_three_learn_together(parts: tuple[Any, Any, Any]) -> None:
    policy, environment, algorithm = parts
    torch.nn.init.zeros_(policy.mean.weight)
    torch.nn.init.constant_(policy.mean.bias, 0.2)  # walks 0.4 on average, which is enough for some of the tasks
    collector = Collector([environment], decisions=10, seed=0, device=torch.device("cpu"), auto_reset=False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    success = []
    for _ in range(40):
        rollout = collector.collect(policy)
        advantages = algorithm.advantages(rollout)
        batch = make_batch(rollout, advantages, policy)
        n = len(batch)
        torch.testing.assert_close(policy.evaluate(batch.trace).log_probs_NK, batch.old_log_probs_NK, rtol=0, atol=0)
        optimizer.zero_grad()
        algorithm.loss(policy, batch, LossContext(units=n, values=n, samples=n, iteration=0)).value.backward()
        optimizer.step()
        success.append(float(rollout.episodes.success_M.mean()))
    assert sum(success[:3]) / 3 < 0.6
    assert sum(success[-3:]) / 3 > 0.9


def test_the_reward_scores_conversations(shown: dict[str, Any]) -> None:
    reward = shown["Brevity"](shown["Brevity"].Config(limit=4))
    assert isinstance(reward, Reward) and not isinstance(reward, TurnReward)
    assert reward([tale(), tale([], [], []), tale([]), tale([], answer="maybe")]) == [0.75, 0.0, 0.5, 0.25]


def test_a_model_calls_the_tool_and_is_told_its_mistakes(shown: dict[str, Any]) -> None:
    pixels = Image.new("RGB", (8, 6))
    pixels.putpixel((3, 2), (255, 0, 0))
    toolbox = Toolbox([shown["crop"]])
    (schema,) = toolbox.schemas
    assert schema.description == "Cut a rectangle out of the image with this number, in pixels from its upper left corner."
    assert schema.parameters["required"] == ["image", "left", "top", "right", "bottom"]
    text = (
        '<tool_call>{"name": "crop", "arguments": {"image": 2, "left": 3, "top": 2, "right": 5, "bottom": 6}}</tool_call>'
        '<tool_call>{"name": "crop", "arguments": {"image": 2, "left": 3, "top": 2, "right": 9, "bottom": 6}}</tool_call>'
        '<tool_call>{"name": "crop", "arguments": {"image": 2, "left": 3, "top": 2, "right": "5"}}</tool_call>'
    )
    calls = HermesCalls(HermesCalls.Config()).parse(text)
    good, outside, unfit = toolbox.run(calls, pictures=[Picture(Image.new("RGB", (1, 1))), Picture(pixels)])
    (cut,) = good.result.pictures
    assert (good.error, good.result.text) == (None, "Image 3 is 2 x 4 pixels.")
    assert cut.image.getpixel((0, 0)) == (255, 0, 0) and (cut.source, cut.box_in_source()) == (1, (3, 2, 5, 6))
    assert (outside.error, outside.result.text) == ("tool_error", "The rectangle must lie within 8 x 6 pixels.")
    assert unfit.result.text == "crop: 'right' must be an integer, got '5'; 'bottom' is missing."


def test_the_policy_saves_what_it_holds(parts: tuple[Any, Any, Any], tmp_path: Path) -> None:
    parts[0].save(tmp_path / "policy")
    assert (tmp_path / "policy" / "model.safetensors").is_file()
